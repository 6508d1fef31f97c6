"""Watches one real forward and records the data flow: which operation read and wrote which tensor, inside which module.

No export and no table of architectures: whatever Python the model runs, the operations that reach torch are seen
through a `TorchDispatchMode`. A *value* is one tensor at one moment (an in-place write makes a new value). Intermediate
tensors are not kept alive: values are numbered, and numbers are found again through weak references while their tensor
lives.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evenbits.graph.channels import ChannelFlow
from evenbits.nn.layout import Layout


@dataclass(frozen=True)
class Ref:
    """A value among an operation's arguments."""

    value: int


@dataclass(frozen=True)
class Op:
    """One operation: its name ("aten.mul.Tensor"), arguments (tensors as Ref), outputs and innermost module."""

    name: str
    args: tuple[Any, ...]
    inputs: frozenset[int]
    outputs: tuple[int, ...]
    module: str
    is_view: bool


@dataclass
class Trace:
    """The data flow of one forward. parameters: value → names (several if tied); calls: layer → values it was given;
    flow: whose channels every value carries (channels.py); narrowest: the floating-point type of least precision."""

    ops: list[Op] = field(default_factory=list)
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    parameters: dict[int, tuple[str, ...]] = field(default_factory=dict)
    producer: dict[int, int] = field(default_factory=dict)
    readers: dict[int, list[int]] = field(default_factory=dict)
    calls: dict[str, list[int]] = field(default_factory=dict)
    mutated: set[int] = field(default_factory=set)
    escaped: set[int] = field(default_factory=set)
    flow: ChannelFlow = field(default_factory=lambda: ChannelFlow({}, {}))
    narrowest: torch.dtype = torch.float64

    def keeps_channels(self, op: Op) -> bool:
        """Whether `op` only rearranges or copies its first input and leaves the last dimension alone."""
        copies = op.name.rpartition(".")[0] in _COPIES
        if not (op.is_view or copies) or not op.args or not isinstance(op.args[0], Ref) or len(op.outputs) != 1:
            return False
        before, after = self.shapes[op.args[0].value], self.shapes[op.outputs[0]]
        return bool(before) and bool(after) and before[-1] == after[-1]

    def root(self, value: int, *, whole: bool = False) -> int:
        """Walks back through views and copies that keep the last dimension (whole: every one) to where `value` was
        computed."""
        while (index := self.producer.get(value)) is not None and self.keeps_channels(self.ops[index]):
            before = self.ops[index].args[0].value
            if whole and self.shapes[before] != self.shapes[value]:
                break
            value = before
        return value


_COPIES = frozenset({"aten._unsafe_view", "aten.clone", "aten._to_copy", "aten.contiguous", "aten._reshape_alias"})


def trace(model: nn.Module, run: Callable[[], Any], layers: Mapping[str, Layout], *, hooks: bool = True) -> Trace:
    """Runs `run()`, one forward of `model`, and returns its data flow and what the modules in `layers` read.

    layers: the matrix layers whose channels are followed, with their layouts.
    hooks: without them operations have no module, and the model takes the paths it keeps for when nobody watches.
    """
    recorder = _Recorder(model, layers)
    with ExitStack() as stack:
        if hooks:
            stack.enter_context(_module_names(model, recorder))
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorder)
        output = run()
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    bases = [leaf._base for leaf in leaves if leaf._base is not None]
    returned = {recorder.value_of(tensor) for tensor in (*leaves, *bases)}
    if recorder.alive() & set(recorder.result.producer) - returned:
        gc.collect()  # it may only wait for the collector
    # Whatever is still alive is held by the output or by something that the forward filled (a cache, an attribute).
    recorder.result.escaped |= recorder.alive() | returned
    result = recorder.result
    result.flow.finish(result.escaped - set(result.parameters), result.shapes)
    del output, leaves, bases
    return recorder.result


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module, layers: Mapping[str, Layout]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers = layers
        self.result = Trace()
        self.stack: list[str] = [""]
        self.aside = False  # while labels are computed: no operations of the model
        self._next = 0
        self._live: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._storage: dict[int, set[int]] = {}
        names: dict[int, list[str]] = {}
        tensors = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in tensors.items():
            names.setdefault(id(parameter), []).append(name)
        for parameter in {id(p): p for p in tensors.values()}.values():
            self.result.parameters[self.value_of(parameter)] = tuple(names[id(parameter)])
        owned = {}
        for value, tied in self.result.parameters.items():
            homes = {id(model.get_submodule(name.rpartition(".")[0])) for name in tied}
            # Of several modules with one weight none is a layer whose weight may be changed.
            if len(homes) == 1 and (found := next((n for n in tied if n.rpartition(".")[0] in layers), None)):
                owned[value] = found.rpartition(".")[0]
        self.result.flow = ChannelFlow(layers, owned)
        for value, known in self.result.parameters.items():
            self.result.flow.add_parameter(value, known[0], self.result.shapes[value])

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """Hooks run inside the recorder; what they compute is none of the model's data flow."""
        self.aside = True
        try:
            yield
        finally:
            self.aside = False

    def value_of(self, tensor: torch.Tensor) -> int:
        """The number of the value that `tensor` holds now."""
        entry = self._live.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else self._new_value(tensor)

    def alive(self) -> set[int]:
        """The values whose tensors still exist."""
        return {value for reference, value in self._live.values() if reference() is not None}

    def _new_value(self, tensor: torch.Tensor) -> int:
        value, key = self._next, id(tensor)
        self._next += 1
        storage = tensor.untyped_storage()._cdata if tensor.layout == torch.strided else -1

        def forget(_: object) -> None:
            if key in self._live and self._live[key][1] == value:
                del self._live[key]
            self._storage.get(storage, set()).discard(value)

        self._live[key] = (weakref.ref(tensor, forget), value)
        self._storage.setdefault(storage, set()).add(value)
        self.result.shapes[value] = tuple(tensor.shape)
        if tensor.is_floating_point() and tensor.dtype.itemsize < self.result.narrowest.itemsize:
            self.result.narrowest = tensor.dtype
        return value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.aside:
            return func(*args, **kwargs)
        recorded = tuple(self._simple(argument) for argument in args)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        read = {id(leaf): self.value_of(leaf) for leaf in leaves}
        written = self._written(func, args, kwargs)
        sharing: set[int] = set()
        for tensor in written:
            # Everything that shares the memory changes under its readers: no such value may be permuted.
            sharing |= self._storage.get(tensor.untyped_storage()._cdata, set()) | {self.value_of(tensor)}
        self.result.mutated |= sharing
        output = func(*args, **kwargs)
        for tensor in written:
            self.result.mutated.add(self._new_value(tensor))
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.result.flow.step(func, args, kwargs, output, self.value_of, self.stack[-1], read, sharing)
        self._record(func, recorded, frozenset(read.values()), tuple(self.value_of(tensor) for tensor in outputs))
        return output

    def _record(self, func: Any, args: tuple[Any, ...], inputs: frozenset[int], outputs: tuple[int, ...]) -> None:
        result, index = self.result, len(self.result.ops)
        schema = func._schema
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        result.ops.append(Op(str(func), args, inputs, outputs, self.stack[-1], is_view))
        for value in inputs:
            result.readers.setdefault(value, []).append(index)
        for value in outputs:
            if value not in inputs:
                result.producer[value] = index

    def _simple(self, argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            return Ref(self.value_of(argument))
        if isinstance(argument, (list, tuple)) and all(isinstance(a, int) for a in argument):
            return tuple(argument)
        return argument if isinstance(argument, (int, float, bool, str)) else None

    @staticmethod
    def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        if not func._schema.is_mutable:
            return []
        written: list[Any] = []
        for position, spec in enumerate(func._schema.arguments):
            if spec.alias_info is not None and spec.alias_info.is_write:
                written.append(args[position] if position < len(args) else kwargs.get(spec.name))
        return [leaf for leaf in tree_leaves(written) if isinstance(leaf, torch.Tensor)]


@contextmanager
def _module_names(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    handles, flow = [], recorder.result.flow

    def enter(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorder.stack.append(name)
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            flow.see(name, (recorder.value_of(tensor) for tensor in given))
            if name in recorder.layers:
                value = recorder.value_of(given[0])
                recorder.result.calls.setdefault(name, []).append(value)
                with recorder.looking_away():
                    flow.enter(name, value, given[0].shape)

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            recorder.stack.pop()
            given = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            flow.see(recorder.stack[-1], (recorder.value_of(tensor) for tensor in given))
            if name in recorder.layers:
                with recorder.looking_away():
                    flow.leave(name, [(recorder.value_of(tensor), tensor.shape) for tensor in given])

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
        handles.append(module.register_forward_hook(leave(name), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
