"""A model's tensors in a file: stored once, narrowed only where no bit is lost, tied again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from evenbits.checkpoints.state import State, model_state, restore
from evenbits.errors import CheckpointError, EvenbitsError


class Store(nn.Module):
    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def round_trip(model: nn.Module, fresh: nn.Module) -> nn.Module:
    state = model_state(model)
    restore(fresh, State({k: v.clone() for k, v in state.tensors.items()}, state.aliases, state.widened))
    expected, found = model.state_dict(), fresh.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(bits(found[name]), bits(tensor)), name
    return fresh


def test_float16_values_in_float32_are_stored_narrow_and_come_back_bit_for_bit() -> None:
    special = torch.tensor([0.0, -0.0, 65504.0, -65504.0, 2.0**-24, -(2.0**-24), 1.5, float("inf"), -float("inf")])
    wide = torch.cat([torch.randn(2000).half().float(), special])
    state = model_state(Store(w=wide))
    assert state.tensors["w"].dtype == torch.float16 and state.widened == {"w": "float32"}
    loaded = round_trip(Store(w=wide), Store(w=torch.zeros_like(wide)))
    assert torch.equal(torch.signbit(loaded.w), torch.signbit(wide))


def test_bfloat16_values_are_stored_narrow_too() -> None:
    wide = (torch.randn(2000) * 1e20).bfloat16().float()
    assert model_state(Store(w=wide)).tensors["w"].dtype == torch.bfloat16
    round_trip(Store(w=wide), Store(w=torch.zeros_like(wide)))


@pytest.mark.parametrize("odd", [1 + 2.0**-20, 1e30 + 1e23, float("nan"), 2.0**-140])
def test_one_value_that_does_not_fit_keeps_the_tensor_wide(odd: float) -> None:
    wide = torch.randn(2000).half().float()
    wide[1234] = odd
    state = model_state(Store(w=wide))
    assert state.tensors["w"].dtype == torch.float32 and not state.widened
    round_trip(Store(w=wide), Store(w=torch.zeros_like(wide)))


def test_small_and_other_types_are_stored_as_they_are() -> None:
    model = Store(
        small=torch.ones(10),
        t_half=torch.ones(2000).half(),
        t_double=torch.ones(2000).double(),
        integer=torch.arange(2000),
        flag=torch.ones(2000, dtype=torch.bool),
        empty=torch.empty(0, 3),
        scalar=torch.tensor(3.0),
    )
    state = model_state(model)
    assert not state.widened and all(state.tensors[name].dtype == t.dtype for name, t in model.state_dict().items())
    round_trip(model, Store(**{name: torch.zeros_like(t) for name, t in model.state_dict().items()}))


def test_tied_parameters_are_stored_once_and_tied_again() -> None:
    weight = nn.Parameter(torch.randn(40, 40))
    state = model_state(Store(a=weight, b=weight, c=nn.Parameter(weight.detach().clone())))
    assert set(state.tensors) == {"a", "c"} and state.aliases == {"b": "a"}
    fresh = [nn.Parameter(torch.zeros(40, 40)) for _ in range(3)]
    loaded = round_trip(Store(a=weight, b=weight, c=weight.clone().detach()), Store(a=fresh[0], b=fresh[1], c=fresh[2]))
    assert loaded.a is loaded.b and loaded.a is not loaded.c


def test_a_square_matrix_and_its_transpose_are_not_the_same_tensor() -> None:
    """They share memory, shape and type; only the strides tell them apart."""
    matrix = torch.randn(40, 40)
    model = Store(a=matrix, t=matrix.t())
    assert not model_state(model).aliases
    loaded = round_trip(model, Store(a=torch.zeros(40, 40), t=torch.zeros(40, 40)))
    assert torch.equal(loaded.t, matrix.t()) and not torch.equal(loaded.t, matrix)


def test_overlapping_views_are_written_without_sharing_memory() -> None:
    whole = torch.randn(64, 8)
    views = {"whole": whole, "head": whole[:4], "tail": whole[60:], "stride": whole[::2], "flat": whole.view(-1)}
    state = model_state(Store(**views))
    pointers = [tensor.untyped_storage().data_ptr() for tensor in state.tensors.values()]
    assert len(set(pointers)) == len(pointers)
    round_trip(Store(**views), Store(**{name: torch.zeros(tensor.shape) for name, tensor in views.items()}))


def test_a_buffer_that_shares_a_parameters_memory_survives() -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    fresh = nn.Parameter(torch.zeros(8, 8))
    loaded = round_trip(Store(w=weight, view=weight.data), Store(w=fresh, view=fresh.data))
    assert isinstance(loaded.w, nn.Parameter) and "view" in dict(loaded.named_buffers())
    loaded = round_trip(Store(view=weight.data, w=weight), Store(view=fresh.data, w=fresh))
    assert isinstance(loaded.w, nn.Parameter)


def test_non_contiguous_tensors_are_written_in_order() -> None:
    matrix = torch.randn(6, 9).t()
    round_trip(Store(a=matrix), Store(a=torch.zeros(9, 6)))


def test_the_model_is_not_changed_by_being_written() -> None:
    model = Store(a=nn.Parameter(torch.randn(2000).half().float()))
    before, identity = bits(model.a).clone(), id(model.a)
    state = model_state(model)
    state.tensors["a"].zero_()
    assert torch.equal(bits(model.a), before) and id(model.a) == identity


def test_a_state_that_is_no_tensor_is_refused() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"anything": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(EvenbitsError, match=r"_extra_state.*dict"):
        model_state(nn.Sequential(Extra(2, 2)))


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (State({}, {}, {}), "lacks 'a'"),
        (State({"a": torch.ones(3), "z": torch.ones(1)}, {}, {}), "has 'z'"),
        (State({"a": torch.ones(4)}, {}, {}), r"shape \[4\]"),
        (State({"a": torch.ones(1, 3)}, {}, {}), r"shape \[1, 3\]"),
        (State({"a": torch.ones(3).int()}, {}, {}), "int32"),
        (State({"a": torch.ones(3)}, {"b": "a"}, {}), "has 'b'"),
        (State({}, {"a": "b"}, {}), "ties 'a' to 'b'"),
        (State({"a": torch.ones(3)}, {}, {"b": "float32"}), "widens 'b'"),
        (State({"a": torch.ones(3)}, {}, {"a": "object"}), "widens 'a' to 'object'"),
    ],
)
def test_a_state_that_does_not_belong_is_refused_and_changes_nothing(state: State, match: str) -> None:
    model = Store(a=nn.Parameter(torch.zeros(3)))
    identity = id(model.a)
    with pytest.raises(CheckpointError, match=match):
        restore(model, state)
    assert id(model.a) == identity and torch.equal(model.a, torch.zeros(3))
