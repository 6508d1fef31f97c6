"""The recorder: values, readers, in-place writes, what stays alive, and that it leaves no trace of its own."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graph_nets import layouts
from torch import nn

from evenbits.graph.trace import Ref, Trace, trace


class Fn(nn.Module):
    """A norm, a layer, and a forward given as a function of the module."""

    def __init__(self, body: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(8), nn.Linear(8, 8)
        self.body = body

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, x)


def traced(body: Callable[[Any, torch.Tensor], Any], *, hooks: bool = True) -> Trace:
    model = Fn(body).eval()
    x = torch.randn(2, 3, 8)
    return trace(model, lambda: model(x), layouts(model), hooks=hooks)


def norm_output(flow: Trace) -> int:
    (op,) = [op for op in flow.ops if op.name.startswith("aten.native_layer_norm")]
    return op.outputs[0]


def test_a_layer_reads_the_value_that_the_norm_computed() -> None:
    flow = traced(lambda m, x: m.proj(m.norm(x)))
    (value,) = flow.calls["proj"]
    assert value == norm_output(flow)
    assert flow.shapes[value] == (2, 3, 8)
    readers = {flow.ops[index].module for index in flow.readers[value]}
    assert readers == {"proj"}
    assert flow.ops[flow.producer[value]].module == "norm"


def test_parameters_are_known_by_name_and_read_where_they_are_used() -> None:
    flow = traced(lambda m, x: m.proj(m.norm(x)))
    names = set(flow.parameters.values())
    assert names == {("norm.weight",), ("norm.bias",), ("proj.weight",), ("proj.bias",)}
    (weight,) = [value for value, names in flow.parameters.items() if names == ("proj.weight",)]
    assert {flow.ops[index].module for index in flow.readers[weight]} == {"proj"}


def test_a_tied_parameter_has_all_its_names() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    flow = trace(model, lambda: model(torch.randn(2, 8)), layouts(model))
    assert ("0.weight", "1.weight") in flow.parameters.values()


def test_a_layer_called_by_keyword_is_seen() -> None:
    flow = traced(lambda m, x: m.proj(input=m.norm(x)))
    assert flow.calls["proj"] == [norm_output(flow)]


def test_each_call_is_recorded() -> None:
    flow = traced(lambda m, x: m.proj(m.norm(x)) + m.proj(x))
    assert len(flow.calls["proj"]) == 2
    assert len(set(flow.calls["proj"])) == 2


def test_views_and_copies_that_keep_the_last_dimension_have_the_root_of_their_source() -> None:
    flow = traced(lambda m, x: m.proj(m.norm(x).reshape(6, 8).clone()[1:3].contiguous().double().float()))
    (value,) = flow.calls["proj"]
    assert value != norm_output(flow)
    assert flow.root(value) == norm_output(flow)


@pytest.mark.parametrize(
    "change",
    [lambda y: y.flip(-1), lambda y: y.roll(1, -1), lambda y: y + 0, lambda y: y[..., [1, 0, 2, 3, 4, 5, 6, 7]]],
)
def test_what_moves_or_computes_channels_is_a_root_of_its_own(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    flow = traced(lambda m, x: m.proj(change(m.norm(x))))
    assert flow.root(flow.calls["proj"][0]) != norm_output(flow)


def test_a_view_that_changes_the_last_dimension_is_not_followed() -> None:
    flow = traced(lambda m, x: m.proj(m.norm(x).transpose(1, 2).reshape(2, 3, 8)))
    assert flow.root(flow.calls["proj"][0]) != norm_output(flow)


def _write_itself(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.norm(x)
    z = m.proj(y)
    y.mul_(2)
    return z


def _write_a_view(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.norm(x)
    z = m.proj(y)
    y[:, 0].zero_()
    return z


def _write_the_base(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.norm(x)
    z = m.proj(y.view(6, 8))
    y += 1
    return z


def _write_through_out(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.norm(x)
    z = m.proj(y)
    torch.add(y, 1, out=y)
    return z


def _write_by_setitem(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.norm(x)
    z = m.proj(y)
    y[0] = 0
    return z


@pytest.mark.parametrize("body", [_write_itself, _write_a_view, _write_the_base, _write_through_out, _write_by_setitem])
def test_every_way_to_write_in_place_is_noticed(body: Callable[[Any, torch.Tensor], Any]) -> None:
    flow = traced(body)
    assert norm_output(flow) in flow.mutated


def test_writing_something_else_is_not_held_against_the_value() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x)
        other = torch.zeros(3)
        other += 1
        return m.proj(y)

    flow = traced(body)
    assert norm_output(flow) not in flow.mutated


class _Remembering(Fn):
    def __init__(self) -> None:
        super().__init__(lambda m, x: None)
        self.last: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        self.last = {"deep": [SimpleNamespace(kept=y)]}
        return self.proj(y)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y, z: (z, y),
        lambda y, z: {"a": z, "b": [y]},
        lambda y, z: SimpleNamespace(z=z, y=y),
        lambda y, z: (z, SimpleNamespace(deep=SimpleNamespace(y=y))),
    ],
)
def test_a_value_that_leaves_the_model_has_escaped_however_it_is_wrapped(wrap: Callable[..., Any]) -> None:
    def body(m: Any, x: torch.Tensor) -> Any:
        y = m.norm(x)
        return wrap(y, m.proj(y))

    flow = traced(body)
    assert norm_output(flow) in flow.escaped


def test_a_value_kept_on_the_model_has_escaped() -> None:
    model = _Remembering().eval()
    flow = trace(model, lambda: model(torch.randn(2, 3, 8)), layouts(model))
    assert norm_output(flow) in flow.escaped


def test_a_value_that_nobody_keeps_has_not_escaped() -> None:
    flow = traced(lambda m, x: m.proj(m.norm(x)))
    assert norm_output(flow) not in flow.escaped


def test_no_intermediate_tensor_is_kept_alive_by_the_trace() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x)
        kept.append(weakref.ref(y))
        return m.proj(y)

    flow = traced(body)
    gc.collect()
    assert flow.ops and kept[0]() is None


def test_numbers_are_not_reused_when_memory_is() -> None:
    """Hundreds of tensors that live one after the other in the same memory are hundreds of values."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(200):
            x = x * 1.01
        return m.proj(x)

    flow = traced(body)
    products = [op for op in flow.ops if op.name == "aten.mul.Tensor"]
    assert len({op.outputs[0] for op in products}) == len(products) == 200
    for before, after in itertools.pairwise(products):
        assert after.args[0] == Ref(before.outputs[0])


def test_hooks_are_gone_afterwards_even_if_the_forward_fails() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.proj(x)
        raise RuntimeError("half-way")

    model = Fn(body).eval()
    with pytest.raises(RuntimeError, match="half-way"):
        trace(model, lambda: model(torch.randn(2, 8)), layouts(model))
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_caught_exception_inside_a_layer_does_not_shift_the_module_names() -> None:
    class Breaks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.breaks, self.proj = Breaks(), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return self.breaks(x)
            except ValueError:
                return self.proj(x) * 3

    model = Tries().eval()
    flow = trace(model, lambda: model(torch.randn(2, 8)), layouts(model))
    assert [op.module for op in flow.ops if op.name == "aten.mul.Tensor"] == [""]
    assert {op.module for op in flow.ops if op.name.startswith("aten.addmm")} == {"proj"}


def test_without_hooks_the_same_operations_are_seen_without_names() -> None:
    watched, bare = (traced(lambda m, x: m.proj(m.norm(x)), hooks=hooks) for hooks in (True, False))
    assert [op.name for op in bare.ops] == [op.name for op in watched.ops]
    assert {op.module for op in bare.ops} == {""}
    assert not bare.calls


def test_gradients_are_not_recorded_and_the_forward_is_the_real_one() -> None:
    outputs: list[torch.Tensor] = []
    model = Fn(lambda m, x: m.proj(m.norm(x))).eval()
    x = torch.randn(2, 8)
    trace(model, lambda: outputs.append(model(x)), layouts(model))
    assert not outputs[0].requires_grad
    assert torch.equal(outputs[0], model(x))
