"""What may run in bytes: convolutions of a symbolic trace, each with the addition and activation behind it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from evenbits.errors import EvenbitsError
from evenbits.nn.conv import QConv, QConv2d
from evenbits.nn.conv_u8 import Grid, input_grid

_RELU = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
_RELU_FUNCTIONS = {torch.relu: "relu", F.relu: "relu", torch.relu_: "relu", F.relu6: "relu6"}
_RELU_METHODS = {"relu": "relu", "relu_": "relu"}
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_WRITING_FUNCTIONS = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem, torch.relu_)
_VIEWS = frozenset(
    "view view_as reshape reshape_as flatten unflatten transpose permute t squeeze unsqueeze expand expand_as narrow "
    "select split chunk unbind movedim swapaxes diagonal detach".split()
)
_VIEW_FUNCTIONS = (operator.getitem, *(getattr(torch, name) for name in sorted(_VIEWS) if hasattr(torch, name)))
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout2d)


@dataclass
class Group:
    """A convolution and what is done inside it. source: the node it reads; end: the node whose value it computes;
    inner: the nodes between; grid_out: the grid its readers want, or None for float output; multiplier: that its
    readers' smoothing multiplies their input by, where its bytes are multiplied already, float32 [O]; keeps_floats:
    they multiply and its bytes are not (a grid of uneven channels would undo the smoothing); why: of float output.
    """

    name: str
    layer: QConv2d
    source: fx.Node
    end: fx.Node
    grid_in: Grid
    activation: str = "none"
    addend: fx.Node | None = None
    grid_out: Grid | None = None
    multiplier: torch.Tensor | None = None
    needs_range: bool = False
    keeps_floats: bool = False
    why: str = ""
    inner: list[fx.Node] = field(default_factory=list)


def byte_groups(
    model: nn.Module, graph: fx.Graph, shapes: Mapping[fx.Node, torch.Size]
) -> tuple[list[Group], dict[str, str]]:
    """The groups of a graph, in its order, and for every other quantized convolution why it stays apart.

    shapes: of the tensors of one forward. Raises EvenbitsError if a tensor is read after it was written to in place.
    """
    _check_writes(model, graph)
    groups: list[Group] = []
    apart: dict[str, str] = {}
    for node in graph.nodes:
        layer = _module(model, node)
        if not isinstance(layer, QConv):
            continue
        name = str(node.target)
        source = node.args[0] if node.args else node.kwargs.get("input")
        reason = _why_apart(layer)
        if not reason and len(shapes[node]) != 4:
            reason = "its input is not a batch [N, C, H, W]"
        if reason or not isinstance(layer, QConv2d):
            apart[name] = reason or f"{type(layer).__name__} has no byte form"
            continue
        grid = input_grid(layer)
        assert grid is not None  # _why_apart
        groups.append(Group(name, layer, source, node, grid))
    called = {id(_module(model, node)) for node in graph.nodes}
    for name, layer in model.named_modules():
        if isinstance(layer, QConv) and id(layer) not in called:
            apart[name] = "the traced forward does not call it"
    taken: set[fx.Node] = set()
    for group in groups:
        _extend(model, group, taken, shapes)
    _grids(model, groups)
    return groups, apart


def _check_writes(model: nn.Module, graph: fx.Graph) -> None:
    """A chain knows values, not memory: who reads a tensor after it was written to would get it as it was before."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        written = node.args[0] if _writes(model, node) and node.args else None
        while isinstance(written, fx.Node):
            late = next((user for user in written.users if order[user] > order[node]), None)
            if late is not None:
                raise EvenbitsError(
                    f"{node.name} writes into the tensor that {late.name} reads afterwards; byte chains cannot follow "
                    "that. Use the value it returns (x = relu(x)), or leave the tensor as it is."
                )
            shared = passes(model, written) or _is_view(model, written)
            written = written.args[0] if shared and written.args else None


def _is_view(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node's value may share memory with its input."""
    if node.op == "call_method":
        return str(node.target) in _VIEWS
    return node.target in _VIEW_FUNCTIONS or isinstance(_module(model, node), nn.Flatten)


def _writes(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_function":
        relu = node.target in (F.relu, F.relu6) and node.args[1:2] == (True,)
        return node.target in _WRITING_FUNCTIONS or node.kwargs.get("inplace") is True or relu
    return getattr(_module(model, node), "inplace", False) is True


def _why_apart(layer: QConv) -> str:
    if not isinstance(layer, QConv2d):
        return f"{type(layer).__name__} has no byte form"
    if layer.input_scale is None:
        return "its activations are not static"
    if layer.input_multiplier is not None and not bool((layer.input_multiplier > 0).all()):
        return "its smoothing multiply is not positive everywhere"
    if layer.padding_mode != "zeros":
        return f"padding {layer.padding_mode!r} is done in float"
    return "" if input_grid(layer) is not None else f"{layer.input_format} and {layer.weight_format} are not int8"


def _extend(model: nn.Module, group: Group, taken: set[fx.Node], shapes: Mapping[fx.Node, torch.Size]) -> None:
    """Takes the addition and the activation that only this convolution's value flows into."""
    user = _only_user(model, group.end)
    if user is not None and user not in taken and _is_add(user):
        other = next((arg for arg in user.args[:2] if arg is not _back(model, user, group.end)), None)
        alike = shapes.get(other) == shapes[group.end] if isinstance(other, fx.Node) else False
        if isinstance(other, fx.Node) and alike:  # of two convolutions that are added the first one takes the addition
            _advance(model, group, user)
            group.addend = other
            taken.add(user)
            user = _only_user(model, group.end)
    kind = None if user is None else activation_of(model, user)
    if user is not None and kind is not None:
        _advance(model, group, user)
        group.activation = kind


def _back(model: nn.Module, user: fx.Node, end: fx.Node) -> fx.Node:
    """The argument of `user` through which the value of `end` reaches it."""
    for argument in user.args:
        node = argument
        while isinstance(node, fx.Node) and node is not end and passes(model, node):
            node = node.args[0]
        if node is end and isinstance(argument, fx.Node):
            return argument
    return end


def _advance(model: nn.Module, group: Group, user: fx.Node) -> None:
    node = group.end
    while node is not user:
        group.inner.append(node)
        node = next(iter(node.users))
    group.end = user


def _only_user(model: nn.Module, node: fx.Node) -> fx.Node | None:
    """The one node that reads a value, through nodes that only pass it on."""
    while len(node.users) == 1:
        (user,) = node.users
        if not passes(model, user):
            return user
        node = user
    return None


def _grids(model: nn.Module, groups: list[Group]) -> None:
    """The grid each group writes: what the convolutions that read it want.

    Behind a ReLU nothing is negative, so the zero point goes: the same steps, and the codes below it go to what is
    beyond the calibrated range. Zero points cost time (kernels/conv_u8.py). Readers that multiply their input get it
    multiplied, a factor per channel being a part of the weight's scales, if nobody else does: an addition has no room
    for a factor, and a grid of even channels holds little of those that the readers hardly weigh.
    """
    by_source: dict[fx.Node, list[Group]] = {}
    rectified = {group.end for group in groups if group.activation != "none"}
    for group in groups:
        origin = _origin(model, group.source)
        if origin in rectified or activation_of(model, origin) is not None:
            group.grid_in = group.grid_in._replace(zero=0)
        by_source.setdefault(origin, []).append(group)
    added = {_origin(model, group.addend) for group in groups if group.addend is not None}
    for group in groups:
        readers = by_source.get(group.end, [])
        multiplier = readers[0].layer.input_multiplier if readers else None
        alike = all(r.grid_in == readers[0].grid_in and same(r.layer.input_multiplier, multiplier) for r in readers)
        plain = multiplier is None or (group.addend is None and _only_read_by(model, group.end, readers))
        if readers and alike and plain:
            group.grid_out, group.multiplier = readers[0].grid_in, multiplier
        elif readers:
            group.why = "added or read by others, and multiplied" if alike else "its readers want different grids"
        group.keeps_floats = group.grid_out is None and any(r.layer.input_multiplier is not None for r in readers)
        group.needs_range = group.grid_out is None and group.end in added


def _only_read_by(model: nn.Module, node: fx.Node, readers: list[Group]) -> bool:
    """Whether a value goes to these convolutions alone, also through what hands codes on."""
    convolutions = {reader.inner[0] if reader.inner else reader.end for reader in readers}

    def fits(user: fx.Node) -> bool:
        hands_on = passes(model, user) or is_max_pool(model, user) or zero_padding(model, user) is not None
        return user in convolutions or (hands_on and _only_read_by(model, user, readers))

    return all(fits(user) for user in node.users)


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two multipliers are one, or both missing."""
    return one is other or (one is not None and other is not None and one.equal(other))


def _origin(model: nn.Module, node: fx.Node) -> fx.Node:
    """The node whose codes a node's are: back through pooling, zero padding and what only passes on."""
    while passes(model, node) or is_max_pool(model, node) or zero_padding(model, node) is not None:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _module(model: nn.Module, node: fx.Node) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def _has_input(node: fx.Node) -> bool:
    """Whether a node's first argument is a value, given by position."""
    return bool(node.args) and isinstance(node.args[0], fx.Node)


def passes(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node hands its input on as it is (in evaluation)."""
    if not _has_input(node):
        return False
    if node.op == "call_method":
        return node.target in ("contiguous", "clone")
    return isinstance(_module(model, node), _PASSING)


def activation_of(model: nn.Module, node: fx.Node) -> str | None:
    """ "relu" or "relu6" if the node is one, else None."""
    module = _module(model, node)
    if module is not None:
        six = isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) == (0, 6)
        return "relu6" if six else _RELU.get(type(module))
    if node.op == "call_method":
        return _RELU_METHODS.get(str(node.target))
    return _RELU_FUNCTIONS.get(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]


def _is_add(node: fx.Node) -> bool:
    named = node.op == "call_function" and node.target in _ADD_FUNCTIONS
    method = node.op == "call_method" and node.target in ("add", "add_")
    plain = len(node.args) == 2 and not node.kwargs and all(isinstance(arg, fx.Node) for arg in node.args)
    return (named or method) and plain


def is_max_pool(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node is a max pooling that codes can go through."""
    if not _has_input(node):
        return False
    module = _module(model, node)
    if isinstance(module, nn.MaxPool2d):
        return module.dilation in (1, (1, 1)) and not module.ceil_mode and not module.return_indices
    if node.op != "call_function" or node.target not in (F.max_pool2d, torch.max_pool2d):
        return False
    return set(node.kwargs) <= {"kernel_size", "stride", "padding", "ceil_mode", "return_indices", "dilation"} and (
        node.kwargs.get("dilation", 1) in (1, (1, 1)) and not node.kwargs.get("ceil_mode") and len(node.args) <= 4
    )


def zero_padding(model: nn.Module, node: fx.Node) -> tuple[int, ...] | None:
    """(left, right, top, bottom) if a node pads height and width with zeros (or cuts them), else None."""
    if not _has_input(node):
        return None
    module = _module(model, node)
    if isinstance(module, nn.ZeroPad2d):
        return tuple(module.padding)
    if node.op != "call_function" or node.target is not F.pad:
        return None
    given: dict[str, Any] = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | dict(node.kwargs)
    sizes = tuple(given["pad"])
    plain = given.get("mode", "constant") == "constant" and not given.get("value")
    fixed = plain and len(sizes) in (2, 4) and all(isinstance(size, int) for size in sizes)
    return (*sizes, *(0,) * (4 - len(sizes))) if fixed else None


def pool_arguments(model: nn.Module, node: fx.Node) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Kernel, stride and padding of a max pooling node, two numbers each."""
    module = _module(model, node)
    if isinstance(module, nn.MaxPool2d):
        return _two(module.kernel_size), _two(module.stride), _two(module.padding)
    given = dict(zip(("kernel_size", "stride", "padding"), node.args[1:], strict=False)) | dict(node.kwargs)
    kernel = _two(given["kernel_size"])
    return kernel, _two(given.get("stride") or kernel), _two(given.get("padding") or 0)


def _two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
