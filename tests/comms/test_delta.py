"""Delta coding: both ends hold the same, errors shrink with every visit, memory is bounded, files are whole."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.delta import DeltaCoder, SampleStore
from evenbits.errors import EvenbitsError
from evenbits.numerics.metrics import sqnr_db

SHAPE = (4, 8)


def _batch(samples: list[int], epoch: int) -> torch.Tensor:
    """Activations of samples that drift a little from epoch to epoch."""
    rows = []
    for sample in samples:
        generator = torch.Generator().manual_seed(sample)
        base, drift = (torch.randn(SHAPE, generator=generator) for _ in range(2))
        rows.append(base + 0.02 * epoch * drift)
    return torch.stack(rows)


@given(st.lists(st.lists(st.integers(0, 6), min_size=0, max_size=5, unique=True), max_size=8), st.integers(1, 8))
def test_both_ends_agree_whatever_comes(batches: list[list[int]], capacity: int) -> None:
    sender, receiver = (DeltaCoder("int4:g32", "fp16", capacity=capacity) for _ in range(2))
    for epoch, samples in enumerate(batches):
        x = _batch(samples, epoch) if samples else torch.zeros(0, *SHAPE)
        expected = receiver.payload_bytes(Meta.of(x), samples)  # before anything was sent
        payload = sender.encode(x, samples)
        assert payload.numel() == expected
        y = receiver.decode(payload, Meta.of(x), samples)
        assert y.shape == x.shape and len(receiver.state_dict()) - 1 <= capacity
        mine, theirs = sender.state_dict(), receiver.state_dict()
        assert mine.keys() == theirs.keys() and all(mine[key].equal(theirs[key]) for key in mine)


def test_a_second_visit_costs_less_and_errs_less_than_the_codec_alone() -> None:
    sender, receiver, samples = DeltaCoder("int4:g32"), DeltaCoder("int4:g32"), list(range(6))
    sizes, quality = [], []
    for epoch in range(5):
        x = _batch(samples, epoch)
        payload = sender.encode(x, samples)
        sizes.append(payload.numel())
        quality.append(sqnr_db(x, receiver.decode(payload, Meta.of(x), samples)))
    alone = get("int4:g32")
    direct = sqnr_db(x, alone.decode(alone.encode(x), Meta.of(x)))
    assert sizes[0] == 2 * x.numel() and set(sizes[1:]) == {alone.payload_bytes(Meta.of(x))}
    assert min(quality[1:]) > direct + 20  # errors do not add up over epochs
    torch.testing.assert_close(receiver.state_dict()["0"], x[0], rtol=0, atol=0.01)


def test_new_and_known_samples_share_a_batch() -> None:
    sender, receiver = DeltaCoder("int2:g32", "raw"), DeltaCoder("int2:g32", "raw")
    for samples in ([1, 2], [2, 3, 1], [9]):
        x = _batch(samples, 0)
        y = receiver.decode(sender.encode(x, samples), Meta.of(x), samples)
        assert y.equal(x)  # first visits are raw, and nothing has changed since


def test_the_sample_longest_unseen_is_dropped() -> None:
    coder = DeltaCoder("int8:g32", capacity=3)
    for samples in ([1, 2, 3], [1], [4]):
        coder.encode(_batch(samples, 0), samples)
    assert coder.state_dict()["samples"].tolist() == [3, 1, 4]
    new = coder.payload_bytes(Meta((1, *SHAPE), torch.float32), [2])
    known = coder.payload_bytes(Meta((1, *SHAPE), torch.float32), [1])
    assert new == 64 and known == 34


def test_memory_is_bounded_and_files_hold_the_rest(tmp_path: Path) -> None:
    row = 4 * 8 * 4
    plain, bounded = DeltaCoder("int4:g32"), DeltaCoder("int4:g32", memory=2 * row, folder=tmp_path / "spill")
    draw = random.Random(0)
    for epoch in range(6):
        samples = draw.sample(range(10), 4)
        x = _batch(samples, epoch)
        assert plain.encode(x, samples).equal(bounded.encode(x, samples))
        assert bounded._store.nbytes <= 2 * row
    kept, found = plain.state_dict(), bounded.state_dict()
    assert kept.keys() == found.keys() and all(kept[key].equal(found[key]) for key in kept)
    names = sorted(path.name for path in (tmp_path / "spill").iterdir())
    assert names and all(name.endswith(".safetensors") and not name.startswith(".") for name in names)


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    store = SampleStore(memory=0, folder=tmp_path / "spill")

    def half(tensors: dict[str, torch.Tensor], path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", half)
        with pytest.raises(EvenbitsError, match="no space left on device"):
            store.put(1, torch.ones(3))
    assert not list((tmp_path / "spill").iterdir())
    store.put(2, torch.ones(3))
    assert store.get(2).tolist() == [1, 1, 1] and store.nbytes <= 12
    (tmp_path / "spill" / "2.safetensors").write_bytes(b"half")
    with pytest.raises(EvenbitsError, match="sample 2 cannot be read"):
        store.get(2)
    store.drop(2)
    with pytest.raises(EvenbitsError, match="cannot be read"):
        store.get(2)


def test_files_of_another_run_are_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "1.safetensors").write_bytes(b"")
    with pytest.raises(EvenbitsError, match="is not empty"):
        DeltaCoder("int4:g32", memory=10, folder=tmp_path)
    for arguments in ({"memory": 10}, {"folder": tmp_path}):
        with pytest.raises(EvenbitsError, match="needs a folder"):
            DeltaCoder("int4:g32", **arguments)  # type: ignore[arg-type]


def test_a_restart_goes_on_where_it_stopped() -> None:
    sender, receiver = DeltaCoder("int4:g32"), DeltaCoder("int4:g32")
    x = _batch([1, 2, 3], 0)
    receiver.decode(sender.encode(x, [1, 2, 3]), Meta.of(x), [1, 2, 3])
    restarted = DeltaCoder("int4:g32")
    restarted.load_state_dict(receiver.state_dict())
    later = _batch([3, 1], 1)
    payload = sender.encode(later, [3, 1])
    assert restarted.decode(payload, Meta.of(later), [3, 1]).equal(receiver.decode(payload, Meta.of(later), [3, 1]))
    for state in ({}, {"samples": torch.tensor([1])}, {"samples": torch.tensor([1.0]), "0": x}):
        with pytest.raises(EvenbitsError, match="state of a delta coder"):
            restarted.load_state_dict(state)
    assert restarted.state_dict()["samples"].tolist() == [2, 3, 1]


def test_what_is_kept_may_be_shorter_than_what_is_decoded() -> None:
    sender, receiver = (DeltaCoder("int8:g32", "raw", dtype=torch.bfloat16) for _ in range(2))
    x = _batch([1], 0)
    assert receiver.decode(sender.encode(x, [1]), Meta.of(x), [1]).equal(x)
    assert receiver.state_dict()["0"].dtype == torch.bfloat16
    y = receiver.decode(sender.encode(x, [1]), Meta.of(x), [1])
    assert sqnr_db(x, y) > 80


@pytest.mark.parametrize(
    ("shape", "samples", "message"),
    [
        ((2, 4, 8), [1], "one identifier"),
        ((2, 4, 8), [1, 1], "different from the others"),
        ((1, 4, 9), [7], "keeps its shape"),
        ((1, 4, 8), ["seven"], "whole numbers; given str"),
        ((), [], "one identifier"),
    ],
)
def test_batches_that_name_their_samples_wrongly_are_refused(
    shape: tuple[int, ...], samples: list[int], message: str
) -> None:
    coder = DeltaCoder("int4:g32")
    coder.encode(_batch([7], 0), [7])
    with pytest.raises(EvenbitsError, match=message):
        coder.encode(torch.zeros(shape), samples)


def test_an_end_that_saw_other_samples_is_told_so() -> None:
    sender, receiver, x = DeltaCoder("int4:g32"), DeltaCoder("int4:g32"), _batch([1], 0)
    sender.encode(x, [1])
    with pytest.raises(EvenbitsError, match="seen the same samples"):
        receiver.decode(sender.encode(x, [1]), Meta.of(x), [1])
    with pytest.raises(EvenbitsError, match="at least one sample"):
        DeltaCoder("int4:g32", capacity=0)
    assert sender.spec == "delta(int4:g32,bf16):all"
