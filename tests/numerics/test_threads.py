"""One thread for a while: afterwards as many as before, and what is searched does not depend on how many there were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import evenbits
from evenbits.numerics import pair_search
from evenbits.numerics.threads import one_thread


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_as_many_as_before_on_an_error_too() -> None:
    with one_thread(), one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError), one_thread():
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("fmt", ["ovp4:g32", "ovp4:row", "ovp4:row:3sigma:reference"])
def test_the_search_runs_in_one_thread(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    made = pair_search.PairLoss.__call__

    def watched(*given: object, **named: object) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return made(*given, **named)  # type: ignore[arg-type]

    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(pair_search.PairLoss, "__call__", watched)
    found = evenbits.encode(weight, fmt)
    assert set(seen) == {1} and torch.get_num_threads() == 2
    torch.set_num_threads(1)
    again = evenbits.encode(weight, fmt)
    assert torch.equal(found.packed, again.packed) and torch.equal(found.scale.float(), again.scale.float())
