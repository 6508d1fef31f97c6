"""Frames, lanes and cards, without a link."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.comms.handshake import card, disagreements
from evenbits.comms.wire import (
    TRAILER,
    Edge,
    FrameError,
    Lane,
    as_bytes,
    blank,
    edge_of,
    framed,
    from_bytes,
    named,
    opened,
    sequence_of,
)
from evenbits.errors import EvenbitsError

CPU = torch.device("cpu")
SEQUENCES = st.tuples(
    st.integers(0, 10_000), st.integers(0, 4095), st.sampled_from(["forward", "backward"]), st.integers(0, 127)
)


@given(content=st.binary(max_size=200), where=SEQUENCES, flags=st.integers(0, 255), level=st.integers(0, 255))
def test_a_frame_gives_back_what_was_put_in(
    content: bytes, where: tuple[int, int, str, int], flags: int, level: int
) -> None:
    payload = torch.tensor(list(content), dtype=torch.uint8)
    frame = framed(payload, sequence=sequence_of(*where), flags=flags, level=level)
    assert frame.dtype == torch.uint8 and frame.numel() == len(content) + TRAILER
    got, got_flags, got_level = opened(frame, sequence_of(*where))
    assert bytes(got.tolist()) == content and (got_flags, got_level) == (flags, level)


@given(size=st.integers(0, 64), lost=st.integers(1, 72), where=SEQUENCES)
def test_a_frame_that_was_cut_anywhere_is_seen(size: int, lost: int, where: tuple[int, int, str, int]) -> None:
    """As gloo does it: the first bytes arrive, the rest of the buffer stays as it was."""
    sequence = sequence_of(*where)
    sent = framed(torch.full((size,), 0xEB, dtype=torch.uint8), sequence=sequence)
    arrived = blank(size, CPU)
    arrived[: max(0, sent.numel() - lost)] = sent[: max(0, sent.numel() - lost)]
    if torch.equal(arrived[-TRAILER:], sent[-TRAILER:]):  # Only zeros at the trailer's end were lost, and are there.
        assert torch.equal(arrived, sent) and lost <= 3
    else:
        with pytest.raises(FrameError):
            opened(arrived, sequence)


@given(a=SEQUENCES, b=SEQUENCES)
def test_a_frame_out_of_turn_is_seen(a: tuple[int, int, str, int], b: tuple[int, int, str, int]) -> None:
    """Steps are counted modulo 4096."""
    frame = framed(torch.zeros(4, dtype=torch.uint8), sequence=sequence_of(*a))
    if (a[0] % 4096, *a[1:]) == (b[0] % 4096, *b[1:]):
        opened(frame, sequence_of(*b))
    else:
        with pytest.raises(FrameError, match="out of turn"):
            opened(frame, sequence_of(*b))


def test_a_sequence_is_named() -> None:
    assert named(sequence_of(5, 7, "backward", 2)) == "step 5, microbatch 7, backward, slot 2"


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int8, torch.float16])
def test_bytes_of_any_tensor(dtype: torch.dtype) -> None:
    x = torch.randint(0, 2, (3, 5)).to(dtype).t()
    assert torch.equal(from_bytes(as_bytes(x), x.shape, dtype), x)


def test_a_lane_changes_its_rung_when_the_next_step_begins() -> None:
    lane = Lane(0, "forward", ("int4:g16", "int8:g16"))
    lane.hear(1)
    assert lane.codec.spec == "int4:g16"
    lane.advance()
    assert lane.codec.spec == "int8:g16"
    with pytest.raises(FrameError, match="no such rung"):
        lane.hear(2)


def test_every_edge_must_be_named() -> None:
    assert edge_of({0: "raw", 1: Edge.of("bf16")}, 1) == Edge.of("bf16")
    with pytest.raises(EvenbitsError, match="no codec for the edge between stages 2 and 3"):
        edge_of({0: "raw", 1: "bf16"}, 2)


def test_cards_are_compared_edge_by_edge() -> None:
    edge = Edge.of("int8:g16")

    def shown(before: Edge | None, after: Edge | None, **changes: object) -> dict[str, object]:
        plain = card(before, after, chunks=4, rungs={"0.forward": 0}, step=-1)
        metas = {
            "inputs": [[[2, 3], "float32"]],
            "outputs": [[[2, 3], "float32"]],
            "input_grads": [],
            "output_grads": [],
        }
        return {**plain, **metas, **changes}

    assert disagreements([shown(None, edge), shown(edge, None)]) == []
    (found,) = disagreements([shown(None, edge), shown(edge, None, inputs=[[[2, 4], "float32"]])])
    assert "activations of edge 0 differ" in found and "[2, 4]" in found
    (found,) = disagreements([shown(None, edge), shown(edge, None, rungs={"0.forward": 1})])
    assert "rungs of edge 0 differ" in found
    (found,) = disagreements([shown(None, edge), shown(edge, None, step=7)])
    assert "steps done differ: stage 0 has -1, stage 1 has 7" in found
