"""Calibration data: what counts as a batch, that it is walked once, and what is refused."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from evenbits.errors import EvenbitsError
from evenbits.pipeline.batches import KEPT, Batches


class Echo(nn.Module):
    """Remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls.append((args, kwargs))
        first = args[0] if args else next(iter(kwargs.values()))
        return first * self.weight


def run(data: Any) -> tuple[Echo, Batches]:
    model = Echo()
    batches = Batches(model, data, progress=False)
    batches.run_all()
    return model, batches


X = torch.arange(3.0)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_tuple_or_list_is_positional_arguments(kind: type) -> None:
    model, _ = run([kind([X, X + 1])])
    ((args, kwargs),) = model.calls
    assert len(args) == 2 and torch.equal(args[1], X + 1) and not kwargs


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
def test_a_mapping_of_any_kind_is_keyword_arguments(kind: type) -> None:
    model, _ = run([kind(a=X, b=X + 1)])
    ((args, kwargs),) = model.calls
    assert not args and list(kwargs) == ["a", "b"] and torch.equal(kwargs["b"], X + 1)


def test_a_tensor_is_the_one_argument_and_other_leaves_pass_through() -> None:
    model, _ = run([X, {"a": X, "flag": True, "none": None}])
    assert torch.equal(model.calls[0][0][0], X)
    assert model.calls[1][1]["flag"] is True and model.calls[1][1]["none"] is None


def test_a_batch_encoding_is_keyword_arguments() -> None:
    from transformers import BatchEncoding

    model, _ = run([BatchEncoding({"input_ids": X})])
    assert list(model.calls[0][1]) == ["input_ids"]


@pytest.mark.parametrize("count", [1, KEPT - 1, KEPT, KEPT + 1, 11])
def test_an_iterator_is_walked_once_in_order_and_the_first_batches_are_kept(count: int) -> None:
    walked: list[int] = []

    def generate() -> Iterator[torch.Tensor]:
        for index in range(count):
            walked.append(index)
            yield torch.full((2,), float(index))

    model, batches = run(generate())
    assert walked == list(range(count))
    assert [int(args[0][0]) for args, _ in model.calls] == list(range(count))
    assert batches.count == count and len(batches.kept) == min(KEPT, count)


def test_the_rest_of_a_stream_is_not_held() -> None:
    import weakref

    seen: list[weakref.ref[torch.Tensor]] = []

    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    def generate() -> Iterator[torch.Tensor]:
        for _ in range(20):
            batch = torch.ones(2)
            seen.append(weakref.ref(batch))
            yield batch
            del batch

    batches = Batches(Plain(), generate(), progress=False)
    batches.run_all()
    assert sum(reference() is not None for reference in seen) == len(batches.kept) == KEPT


def test_runs_repeats_the_kept_batches_one_each() -> None:
    model, batches = run([X + index for index in range(6)])
    model.calls.clear()
    for forward in batches.runs():
        forward()
    assert [float(args[0][0]) for args, _ in model.calls] == [0.0, 1.0, 2.0, 3.0]


def test_no_gradients_are_made() -> None:
    class Check(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not (x * self.weight).requires_grad
            return x

    Batches(Check(), [X], progress=False).run_all()


@pytest.mark.parametrize("data", ["a text", b"bytes", torch.ones(2, 3), {"input_ids": X}, 3, None, object()])
def test_one_batch_instead_of_an_iterable_of_batches_is_refused(data: Any) -> None:
    with pytest.raises(EvenbitsError, match=r"iterable of batches.*given one"):
        Batches(Echo(), data, progress=False)


@pytest.mark.parametrize(
    "data",
    [[], (), iter([]), (batch for batch in []), [torch.empty(0, 4)], [torch.empty(0)] * 6, [{"a": torch.empty(0, 2)}]],
    ids=["list", "tuple", "iterator", "generator", "zero rows", "several", "mapping"],
)
def test_data_without_an_element_is_refused(data: Any) -> None:
    with pytest.raises(EvenbitsError, match="calibration data is empty"):
        Batches(Echo(), data, progress=False)


@pytest.mark.parametrize("batch", ["a text", {"text": "x"}, None, [], {}, 7, object()])
def test_a_batch_without_a_tensor_is_refused_by_its_number_and_kind(batch: Any) -> None:
    with pytest.raises(EvenbitsError, match=f"batch 1 holds no tensor .*{type(batch).__name__}"):
        Batches(Echo(), [X, batch], progress=False)


class Picky(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.weight, self.error = nn.Parameter(torch.ones(1)), error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) != 3:
            raise self.error
        return x


@pytest.mark.parametrize(
    "error",
    [TypeError("t"), ValueError("v"), RuntimeError("r"), IndexError("i"), KeyError("k"), AttributeError("a"),
     AssertionError("s"), NotImplementedError("n")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
@pytest.mark.parametrize("position", [0, 1, KEPT + 1])
def test_a_batch_that_the_model_cannot_take_is_named(error: Exception, position: int) -> None:
    data: list[Any] = [X] * (KEPT + 3)
    data[position] = torch.ones(5)
    batches = Batches(Picky(error), data, progress=False)
    with pytest.raises(EvenbitsError, match=f"calibration batch {position} .Tensor.") as caught:
        batches.run_all()
    assert caught.value.__cause__ is error


def test_a_wrong_keyword_is_explained() -> None:
    with pytest.raises(EvenbitsError, match=r"input_idz.*mapping as keyword arguments"):
        Batches(Picky(ValueError()), [{"input_idz": X}], progress=False).run_all()


def test_an_error_of_the_users_own_iterator_is_not_disguised() -> None:
    def generate() -> Iterator[torch.Tensor]:
        yield from [X] * (KEPT + 1)
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        Batches(Echo(), generate(), progress=False).run_all()


def test_a_model_without_parameters_or_buffers_runs() -> None:
    Batches(nn.Sequential(nn.ReLU()), [X], progress=False).run_all()


def test_a_quantized_model_that_does_not_run_is_an_error() -> None:
    batches = Batches(Picky(RuntimeError("broken kernel")), [torch.ones(5)], progress=False)
    with pytest.raises(EvenbitsError, match=r"does not run with quantized layers .RuntimeError: broken kernel"):
        batches.check_quantized()
