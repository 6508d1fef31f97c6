"""What must hold of the numbers in a checkpoint beyond names, shapes and hashes: another program may have written it.

Scales are finite, an order of channels is one, and pairs are of the alphabet that docs/ovp-format.md describes. Files
with a wrong byte are refused: a decoder would read zeros there and say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from evenbits.checkpoints.state import State
from evenbits.errors import CheckpointError
from evenbits.nn.base import QuantizedLayer, index_type
from evenbits.numerics.elements import PairType
from evenbits.numerics.format import Format
from evenbits.numerics.ovp import first_illegal, pair_kind

_SCALES = ("weight_scale", "weight_global_scale", "input_scale", "input_multiplier")


def check_contents(state: State, layers: Mapping[str, QuantizedLayer]) -> None:
    """Raises CheckpointError naming the first tensor whose numbers cannot be.

    layers: the checkpoint's, without contents. A tensor of another shape or type is left to `restore`, which says so.
    """
    for name, tensor in state.tensors.items():
        if name.endswith(_SCALES) and not bool(tensor.float().isfinite().all()):
            raise CheckpointError(f"tensor {name!r} of the checkpoint holds scales that are not finite.")
    for name, layer in layers.items():
        weight = _stored(state, f"{name}.weight")
        if weight is not None and weight.shape == layer.weight.shape and weight.dtype == layer.weight.dtype:
            check_pairs(name, weight, layer.weight_format)
        order = _stored(state, f"{name}.input_permutation")
        expected = layer.input_permutation
        if order is None or expected is None or order.shape != expected.shape:
            continue
        if not torch.equal(order.long().sort().values, torch.arange(len(order))):
            raise CheckpointError(
                f"layer {name!r} of the checkpoint: its input_permutation is no order of the channels 0 to "
                f"{len(order) - 1}. Quantize the model again."
            )


def check_pairs(name: str, packed_RB: torch.Tensor, fmt: Format) -> None:
    """Raises CheckpointError with layer, row, offset and bytes if a weight is made of pairs and one is illegal."""
    if not isinstance(fmt.dtype, PairType):
        return
    # Which bytes are legal does not depend on the kind, which may be another one in each group.
    found = first_illegal(packed_RB, pair_kind("int" if fmt.dtype.bits == 4 else "int8"))
    if found is not None:
        row, offset, pair = found
        what = "byte" if len(pair) == 1 else "bytes"
        raise CheckpointError(
            f"layer {name!r} of the checkpoint: row {row} of its weight ({fmt}) has the {what} "
            f"{' '.join(f'0x{byte:02x}' for byte in pair)} at offset {offset}, which is no outlier-victim pair "
            "(docs/ovp-format.md). Whoever wrote it packs pairs in another way; mend that and write the file again."
        )


def _stored(state: State, name: str) -> torch.Tensor | None:
    return state.tensors.get(state.aliases.get(name, name))


def with_narrow_orders(state: State, layers: Mapping[str, QuantizedLayer]) -> State:
    """The state with orders of channels in the type that layers keep them in: older checkpoints have int32 ones."""
    tensors = dict(state.tensors)
    for name in layers:
        order = _stored(state, f"{name}.input_permutation")
        if order is not None and order.dtype == torch.int32:
            key = f"{name}.input_permutation"
            tensors[state.aliases.get(key, key)] = order.to(index_type(len(order)))
    return State(tensors, state.aliases, state.widened)
