"""How each operation passes per-channel factors on. An operation that has no rule here does not commute with them.

| operations                               | rule                                                             |
|------------------------------------------|------------------------------------------------------------------|
| views, permutations, slices, cat, index  | run on the labels themselves                                     |
| ReLU, LeakyReLU, PReLU, abs, copies      | f(s·x) = s·f(x) for s > 0: labels pass                           |
| pooling, upsampling                      | mix positions, never channels: labels along channels pass        |
| padding with zeros, cat with zeros       | the same; channels of zeros carry any factor (padding.py)        |
| mean, sum over positions                 | the same                                                         |
| a + b                                    | both must carry the same factors                                 |
| a · b                                    | one of them carries, the other is fixed; a parameter carries     |
| attention · values, a @ b                | linear in b along its last dimension: b carries                  |
| x @ W.T for a parameter W of no layer   | W's columns are a reader of x's factors                          |
| LayerNorm, GroupNorm, RMSNorm, BatchNorm | the input is fixed; gain and bias are sources (normed.py)        |

Rules return labels for the output (a list for several outputs) or raise `Opaque`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from evenbits.graph.normed import normed
from evenbits.graph.padding import joined_with_zeros, padded
from evenbits.graph.variables import ONE, Opaque

_LARGEST = 2**27  # elements of a value whose labels are rearranged


def base_name(func: Any) -> str:
    """ "relu" for aten.relu_.default: the operation's name without namespace, in-place mark and overload."""
    name: str = func._schema.name.rpartition("::")[2]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def base_name_of(name: str) -> str:
    """ "relu" for "aten.relu_.default", as `base_name`, from an operation's recorded name."""
    return name.removeprefix("aten.").partition(".")[0].removesuffix("_")


def _same(look: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
    return look.labels(args[0])


def _copy(look: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
    if isinstance(output, torch.Tensor) and not output.is_floating_point() and args[0].is_floating_point():
        raise Opaque  # rounds to whole numbers
    labels = look.labels(args[0])
    return labels if labels is not None else look.parameter(args[0])


def _rearranged(look: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
    if func._schema.is_mutable:
        raise Opaque  # t_, squeeze_: the shape before the operation is gone
    if any(isinstance(argument, torch.dtype) for argument in args):
        raise Opaque  # view(dtype): other numbers from the same bytes
    data = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
    labels = [_copy(look, func, (x,), kwargs, None) for x in data]
    if all(found is None for found in labels):
        return None
    if any(x.numel() > _LARGEST for x in data):
        raise Opaque
    shapes = [[max(size, 1) for size in x.shape] for x in data]
    full = [
        (torch.full((1,) * x.ndim, ONE) if found is None else found).expand(shape).contiguous()
        for x, found, shape in zip(data, labels, shapes, strict=True)
    ]
    first = full if isinstance(args[0], (list, tuple)) else full[0]
    rest, named = tree_map(_filled, (tuple(args[1:]), kwargs))
    named = {name: value for name, value in named.items() if name not in ("dtype", "device", "memory_format")}
    if base_name(func) in _SIZED and any(0 in x.shape for x in data):
        rest = tree_map(lambda size: 1 if isinstance(size, int) and size == 0 else size, rest)
    try:
        result = func(first, *rest, **named)
    except (RuntimeError, IndexError):  # what stands in for nothing does not fit
        raise Opaque from None
    return [_compressed(part) for part in result] if isinstance(result, (list, tuple)) else _compressed(result)


def _filled(leaf: Any) -> Any:
    """An index with something in it. Nothing is routed to some experts: their values have no rows, but channels."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if leaf.dtype == torch.bool and not bool(leaf.any()):
        return torch.ones(leaf.shape, dtype=torch.bool)
    return leaf.cpu() if leaf.numel() else torch.zeros([max(size, 1) for size in leaf.shape], dtype=leaf.dtype)


def _compressed(labels: torch.Tensor) -> torch.Tensor:
    """Labels with every dimension along which they do not vary at size one."""
    if not labels.numel():
        raise Opaque
    for dim, size in enumerate(labels.shape):
        if size > 1 and bool((labels == labels.narrow(dim, 0, 1)).all()):
            labels = labels.narrow(dim, 0, 1)
    return labels.contiguous()


def _joined(look: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
    found = joined_with_zeros(look, args, kwargs)
    return _rearranged(look, func, args, kwargs, output) if found is None else found


def _positions(look: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """Operations that change the sizes of dimensions along which nothing varies, and only those."""
    labels = look.labels(args[0])
    if labels is None:
        return None
    first = output[0] if isinstance(output, (list, tuple)) else output
    changed = [i for i, (a, b) in enumerate(zip(args[0].shape, first.shape, strict=True)) if a != b]
    spatial = range(labels.ndim - _spatial(base_name(func)), labels.ndim)
    if any(labels.shape[dim] > 1 for dim in {*changed, *spatial}):
        raise Opaque
    return [labels] if isinstance(output, (list, tuple)) else labels


def _spatial(name: str) -> int:
    """How many trailing dimensions an operation mixes."""
    return next((n for n in (1, 2, 3) if f"{n}d" in name), 2)


def _reduced(look: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
    labels = look.labels(args[0])
    if labels is None:
        return None
    if len(args) < 2 or args[1] is None:
        raise Opaque
    dims = {dim % labels.ndim for dim in (args[1] if isinstance(args[1], (list, tuple)) else [args[1]])}
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    if not dims or any(labels.shape[dim] > 1 for dim in dims):
        raise Opaque  # no dimensions: all of them
    kept = [size for dim, size in enumerate(labels.shape) if dim not in dims]
    return labels if keep else labels.reshape(kept)


def _added(look: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
    a, b = args[0], args[1]
    left, right = look.labels(a), look.labels(b)
    if not isinstance(b, torch.Tensor) or not isinstance(a, torch.Tensor) or 1 in (a.numel(), b.numel()):
        first = isinstance(b, torch.Tensor) and (not isinstance(a, torch.Tensor) or a.numel() == 1 < b.numel())
        number, tensor = (a, b) if first else (b, a)
        if not isinstance(number, torch.Tensor):
            number = number * kwargs.get("alpha", 1) * (-1 if base_name(func) == "sub" else 1)
        return _plus_number(look, tensor, number)
    left = left if left is not None else look.parameter(a) if right is not None else None
    right = right if right is not None else look.parameter(b) if left is not None else None
    if left is None and right is None:
        return None
    if left is None or right is None:
        raise Opaque
    ndim = max(left.ndim, right.ndim)
    left, right = _padded_dims(left, ndim), _padded_dims(right, ndim)
    look.variables.unify(left, right)
    shape = torch.broadcast_shapes(left.shape, right.shape)
    return left.expand(shape).contiguous()


def _plus_number(look: Any, tensor: torch.Tensor, number: Any) -> Any:
    labels = look.labels(tensor)
    labels = labels if labels is not None else look.parameter(tensor)
    if isinstance(number, torch.Tensor) and look.labels(number) is not None:
        raise Opaque
    if labels is None or (isinstance(number, (int, float)) and number == 0):
        return labels
    offset = float(number) if isinstance(number, (int, float)) and look.derived(tensor) else None
    shifted = None if offset is None else look.shifted(labels, offset)
    if shifted is None:
        raise Opaque
    return shifted


def _multiplied(look: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
    a, b = args[0], args[1]
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return look.labels(a if isinstance(a, torch.Tensor) else b)
    left, right = look.labels(a), look.labels(b)
    for gain, wide, other in ((look.parameter(b), a, left), (look.parameter(a), b, right)):
        if gain is not None and output is not a and gain.numel() < wide.numel():
            look.fix(other, "it is multiplied by a parameter, which is scaled instead")
            return _padded_dims(gain, output.ndim)
    left, right = look.labels(a), look.labels(b)
    if left is not None and right is not None:
        if bool(torch.isin(look.variables.find(left), look.variables.find(right)).any()):
            raise Opaque  # a square
        # The product is scaled through one factor only. What is fixed already cannot carry it.
        first = output is a or bool(look.variables.free(left).all())
        carrier, other = (left, right) if first else (right, left)
        look.fix(other, "it is multiplied by a tensor that is scaled instead")
    else:
        carrier = left if left is not None else right
        if output is a and left is None and right is not None:
            raise Opaque
    return None if carrier is None else _padded_dims(carrier, output.ndim)


def _padded_dims(labels: torch.Tensor, ndim: int) -> torch.Tensor:
    return labels.view((1,) * (ndim - labels.ndim) + tuple(labels.shape))


def _divided(look: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
    a, b = args[0], args[1]
    look.fix(look.labels(b), "something is divided by it")
    labels = look.labels(a)
    return None if labels is None else _padded_dims(labels, output.ndim)


def _product(look: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
    a, b = args[0], args[1]
    if look.reads(a, b):
        return None
    look.fix(look.labels(a), f"it is the left factor of {base_name(func)}")
    labels = look.labels(b)
    if labels is None:
        return None
    if labels.shape[-2] > 1:
        raise Opaque
    return labels


def _affine(look: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """bias + a @ b, for a parameter b."""
    if not look.reads(args[1], args[2]):
        raise Opaque
    look.fix(look.labels(args[0]), "it is added to a product")
    return None


def _linear(look: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
    if not look.reads(args[0], args[1], turned=True):
        raise Opaque
    return None


def _attention(look: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
    query, key, value = args[:3]
    look.fix(look.labels(query), "it is a query of attention")
    look.fix(look.labels(key), "it is a key of attention")
    labels = look.labels(value)
    if labels is None:
        return None
    if labels.ndim != 4 or labels.shape[2] > 1:
        raise Opaque
    repeats = query.shape[1] // value.shape[1]
    return [labels.repeat_interleave(repeats, dim=1) if labels.shape[1] > 1 else labels]


def is_exact(func: Any, tensors: int) -> bool:
    """Whether an operation on one tensor gives its elements, in another order or with a number added."""
    return tensors == 1 and RULES.get(base_name(func)) in (_copy, _rearranged, _added)


def hands_on(name: str) -> bool:
    """Whether an operation lets factors of one kind or another pass, so that one without any was given none."""
    return name in RULES and name not in _MAKERS


def _named(words: str, rule: Any) -> dict[str, Any]:
    return dict.fromkeys(words.split(), rule)


def _indexed(look: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """Rows picked by one index, where nothing varies from row to row: as for the whole tensor."""
    labels, index = look.labels(args[0]), args[1]
    picks_rows = len(index) == 1 and isinstance(index[0], torch.Tensor) and index[0].ndim == 1
    if picks_rows and labels is not None and labels.shape[0] == 1:
        return labels
    return _rearranged(look, func, args, kwargs, output)


_VIEWS = """view _unsafe_view reshape _reshape_alias permute transpose t unsqueeze squeeze expand slice select split
split_with_sizes unsafe_split chunk unbind flatten unflatten movedim repeat repeat_interleave stack index_select
roll flip pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle"""
_POOLS = """max_pool{n}d max_pool{n}d_with_indices avg_pool{n}d adaptive_avg_pool{n}d _adaptive_avg_pool{n}d
adaptive_max_pool{n}d reflection_pad{n}d replication_pad{n}d upsample_nearest{n}d"""
_UPSAMPLED = "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d"
_ATTENTIONS = """scaled_dot_product_attention _scaled_dot_product_attention_math _scaled_dot_product_flash_attention
_scaled_dot_product_flash_attention_for_cpu
_scaled_dot_product_efficient_attention
_scaled_dot_product_cudnn_attention"""
_BATCH_NORMS = """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
_batch_norm_with_update batch_norm"""


def turns_matrix(name: str, args: tuple[Any, ...]) -> bool | None:
    """Whether an operation hands on its matrix turned (True) or as it is (False); None for any other operation."""
    if name == "transpose":
        return bool((args[1] - args[2]) % 2)
    if name == "permute":
        return bool(args[1][0] % 2)
    return {"t": True, **_named("_to_copy clone contiguous detach alias", False)}.get(name)


# Where, among the tensors an operation reads, the matrix stands.
MATRIX_AT = {"mm": 1, "matmul": 1, "linear": 1, "addmm": 2}

# What they make has the channels of their weight, gain or last factor, and no others.
_MAKERS = frozenset(
    f"addmm linear bmm matmul mm native_layer_norm native_group_norm _fused_rms_norm rms_norm "
    f"{_ATTENTIONS} {_BATCH_NORMS}".split()
)
_SIZED = frozenset("view _unsafe_view reshape _reshape_alias expand".split())
RULES: dict[str, Callable[..., Any]] = {
    **_named("relu leaky_relu abs neg _prelu_kernel", _same),
    **_named("clone _to_copy contiguous alias detach lift_fresh positive", _copy),
    **_named(_VIEWS, _rearranged),
    "cat": _joined,
    "index": _indexed,
    **{name: rule for n in (1, 2, 3) for name, rule in _named(_POOLS.format(n=n), _positions).items()},
    **_named(_UPSAMPLED, _positions),
    "constant_pad_nd": padded,
    **_named("mean sum", _reduced),
    **_named("add sub", _added),
    "mul": _multiplied,
    "div": _divided,
    "addmm": _affine,
    "linear": _linear,
    **_named("bmm matmul mm", _product),
    **_named(_ATTENTIONS, _attention),
    "native_layer_norm": normed(2, 3, -1),
    **_named("_fused_rms_norm rms_norm", normed(2, None, -1)),
    "native_group_norm": normed(1, 2, 1),
    **_named(_BATCH_NORMS, normed(1, 2, 1)),
}
