"""Delta-coded activations between stages: what one process computes, both ends alike, memory and faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import visit_work
from pipelines import BATCH, LENGTH, MICROBATCHES, WIDTH
from ranks import run, values

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.delta import DeltaCoder
from evenbits.comms.visits import Delta, Visits
from evenbits.comms.wire import TRAILER
from evenbits.errors import EvenbitsError

META = Meta((BATCH // MICROBATCHES, LENGTH, WIDTH), torch.float32)


PLAIN = {"codec": "int4:g16"}


def bytes_of(spec: str) -> int:
    return MICROBATCHES * (get(spec).payload_bytes(META) + TRAILER)


@pytest.mark.parametrize("schedule", ["1F1B", "GPipe"])
def test_two_processes_compute_what_one_does(schedule: str) -> None:
    """Independent oracle: one process that keeps what it decoded in a dictionary."""
    steps = 2 * visit_work.BATCHES + 1
    first, second = (found[schedule] for found in values(run(visit_work.many, 2, [schedule], steps, PLAIN)))
    assert second[0] == visit_work.one_process("int4:g16", steps)
    visits = [bytes_of("bf16")] * visit_work.BATCHES + [bytes_of("int4:g16")] * (steps - visit_work.BATCHES)
    assert first[1] == visits, "first visits in 16 bits, later ones in 4"
    assert set(second[1]) == {bytes_of("int8:g16")}, "gradients are not delta-coded"


def test_samples_are_dropped_alike_at_both_ends_and_however_receives_are_posted() -> None:
    """Room for one step and a half: of the batches seen in turn none is known when it comes again."""
    tight = {"codec": "int4:g16", "capacity": 12}
    near, far = (values(run(visit_work.many, 2, ["1F1B"], 4, {**tight, "ahead": ahead})) for ahead in (None, 3))
    assert near == far
    assert near[0]["1F1B"][1] == [bytes_of("bf16")] * 4


def test_stages_in_a_row_and_several_per_rank() -> None:
    """Three edges; every schedule keeps its samples in step."""
    for result in values(run(visit_work.many, 2, ["Interleaved1F1B"], 5, PLAIN)):
        losses, sent, _ = result["Interleaved1F1B"]
        assert sent[4] < sent[0] and (not losses[0] or sum(losses[-1]) < sum(losses[0]))


def test_a_run_goes_on_from_its_state_with_samples_in_files(tmp_path: Path) -> None:
    for whole, parts in values(run(visit_work.resumed, 2, str(tmp_path))):
        assert whole == parts
    assert list((tmp_path / "a" / "stage0-edge0-0").iterdir()), "some samples were spilled"


def test_a_failed_step_leaves_both_ends_alike() -> None:
    first, second = values(run(visit_work.spoilt, 2))
    for found in (first, second):
        assert found[4].startswith("AgreedError") and "NaN" in found[4]
    new, known = bytes_of("bf16"), bytes_of("int4:g16")
    assert first[:4] + first[5:] == [new, new, new, known, known, known, new, known]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("samples", "told different samples"),
        ("codec", "delta coders differ"),
        ("none", "was not told the samples of this step"),
    ],
)
def test_ends_that_were_told_different_things(case: str, words: str) -> None:
    for kind, text in run(visit_work.confused, 2, case, link_timeout=5.0):
        assert kind in ("AgreedError", "EvenbitsError"), text
        assert words in text or (case == "samples" and "could not be read" in text)


def test_telemetry_sees_the_delta_and_evaluation_does_not_use_it() -> None:
    first, _ = values(run(visit_work.measured, 2))
    forward = [(codec, bits, snr) for direction, codec, bits, snr in first if direction == "forward"]
    codecs = [codec for codec, _, _ in forward]
    assert codecs.count("bf16") == 1 and codecs.count("delta(int4:g16,bf16):all") == 2 * visit_work.BATCHES
    visits = [(bits, snr) for codec, bits, snr in forward if codec != "bf16"]
    assert visits[-1][0] < 6 < 16 < visits[0][0]
    assert visits[-1][1] > 30, "four bits of a small difference are more than four bits of an activation"


def file_of(x: torch.Tensor) -> str:
    """The file that this tensor's memory is a map of; empty if it is none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= x.data_ptr() < last:
            return rest[4] if len(rest) > 4 else ""
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_what_is_spilled_is_not_read_for_a_checkpoint(tmp_path: Path) -> None:
    coder = DeltaCoder("int4:g32", memory=0, folder=tmp_path / "spill")
    x = torch.randn(6, 4, 32)
    coder.encode(x, list(range(6)))
    state = coder.state_dict()
    kept = [state[str(i)].clone() for i in range(6)]
    # The maps outlive what training does to the files.
    coder.encode(x + 1, list(range(6)))
    assert all(state[str(i)].equal(kept[i]) for i in range(6))
    assert all(file_of(state[str(i)]).startswith(str(tmp_path)) for i in range(6)) and "spill" not in file_of(kept[0])


def test_what_cannot_be_announced() -> None:
    visits = Visits(Delta("int4:g32", capacity=4), 0)
    for samples, words in (([1, 1], "each once"), ([0.5], "whole numbers"), (list(range(5)), "capacity")):
        with pytest.raises(EvenbitsError, match=words):
            visits.announce(samples)  # type: ignore[arg-type]
    visits.announce(torch.arange(4))
    visits.begin(True)
    with pytest.raises(EvenbitsError, match="4 were announced"):
        visits.of(0, 1, 0, Meta((3, 8), torch.float32))
    assert visits.of(0, 1, 0, Meta((2, 8), torch.float32)).samples == [2, 3]  # type: ignore[union-attr]
    visits.begin(False)
    assert visits.of(0, 0, 0, Meta((2, 8), torch.float32)) is None
    with pytest.raises(EvenbitsError, match="was not told the samples"):
        visits.begin(True)
