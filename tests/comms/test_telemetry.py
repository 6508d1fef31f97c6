"""Every figure against its definition, on whole tensors in double precision."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.telemetry import Sums, Telemetry, by_channel, error_figures
from evenbits.comms.wire import TRAILER, Lane
from evenbits.errors import EvenbitsError


def tensors(seed: int, scale: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [scale * torch.randn(5, 33, generator=generator) ** 3 for _ in range(3)]
    return [torch.where(x.abs() < 0.05 * scale, torch.zeros(()), x) for x in made]


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-6, 1.0, 1e4]), spec=st.sampled_from(["int3:g16", "fp16"]))
def test_figures_are_what_their_definitions_say_over_all_messages_of_a_step(seed: int, scale: float, spec: str) -> None:
    telemetry, lane = Telemetry(), Lane(2, "backward", (spec,))
    parts = tensors(seed, scale)
    for x in parts:
        telemetry.encode(lane, x, step=4)
    telemetry.close_step()
    f = telemetry.last(2, "backward")
    assert f is not None and (f.step, f.messages, f.elements, f.codec) == (4, 3, 495, spec)
    codec = get(spec)
    y = torch.cat([codec.decode(codec.encode(x), Meta.of(x)).flatten() for x in parts]).double()
    x = torch.cat([x.flatten() for x in parts]).double()
    e = y - x
    close = {"rel_tol": 1e-4, "abs_tol": 1e-12}
    assert math.isclose(f.relative_l1, float(e.abs().sum() / x.abs().sum()), **close)
    assert math.isclose(f.relative_l2, float(e.norm() / x.norm()), **close)
    assert math.isclose(
        f.dc_ratio, float(e.mean().abs() * len(x) ** 0.5 / x.square().mean().sqrt()), rel_tol=1e-2, abs_tol=1e-4
    )
    assert f.snr_db is not None and math.isclose(f.snr_db, float(20 * torch.log10(x.norm() / e.norm())), abs_tol=0.01)
    assert f.cosine is not None and math.isclose(f.cosine, float(x @ y / (x.norm() * y.norm())), abs_tol=1e-5)
    assert f.zeros == float((x == 0).double().mean())
    assert f.underflowed == float(((x != 0) & (y == 0)).double().mean())
    assert f.bytes == sum(codec.payload_bytes(Meta.of(x)) + TRAILER for x in parts)
    assert f.raw_bytes == 4 * 495


def test_raw_is_exact_and_zeros_have_no_ratio() -> None:
    f = error_figures(torch.randn(100), get("raw"))
    assert (f.snr_db, f.relative_l2, f.dc_ratio, f.clipped, f.underflowed) == (None, 0.0, 0.0, 0.0, 0.0)
    assert f.cosine == pytest.approx(1.0)
    f = error_figures(torch.zeros(100), get("int8:g16"))
    assert (f.snr_db, f.cosine, f.zeros, f.relative_l1) == (None, None, 1.0, 0.0)


def test_clipped_counts_what_a_type_cannot_hold() -> None:
    x = torch.ones(1000)
    x[:3] = 1e6
    f = error_figures(x, get("fp16"))
    assert f.clipped == 0.003 and f.underflowed == 0.0


def test_a_grid_without_zero_is_seen_in_the_dc_ratio_and_not_in_the_signal_to_noise_ratio() -> None:
    """The measurement behind the guard: a sparse, heavy-tailed gradient on a min/max grid with and without zero."""
    x = torch.randn(200_000) ** 3 * (torch.rand(200_000) < 0.6)
    free, snapped = error_figures(x, get("int8:tensor:affine:free")), error_figures(x, get("int8:tensor:affine"))
    assert free.snr_db is not None and snapped.snr_db is not None and abs(free.snr_db - snapped.snr_db) < 8
    assert free.dc_ratio > 10 * snapped.dc_ratio


def test_lines_are_whole_json_and_appended(tmp_path: Path) -> None:
    path = tmp_path / "figures.jsonl"
    for step in (0, 1):
        telemetry, lane = Telemetry(path), Lane(0, "forward", ("int8:g16",))
        telemetry.encode(lane, torch.randn(64), step=step)
        telemetry.close_step()
        assert path.read_text().endswith("\n"), "flushed at the end of each step"
        telemetry.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert {"edge", "direction", "snr_db", "dc_ratio", "bytes", "encode_seconds"} <= set(lines[0])


def test_summary_has_a_line_per_lane_and_only_asked_steps_are_measured() -> None:
    telemetry = Telemetry(every=3)
    assert [step for step in range(7) if telemetry.wants(step)] == [0, 3, 6]
    for direction in ("forward", "backward"):
        telemetry.encode(Lane(1, direction, ("int4:g16",)), torch.randn(64), step=0)
    telemetry.close_step()
    head, *rows = telemetry.summary().splitlines()
    assert "DC" in head and len(rows) == 2 and all("int4:g16" in row for row in rows)
    with pytest.raises(EvenbitsError, match="at least 1"):
        Telemetry(every=0)


def test_nan_is_written_as_null_and_a_tensor_that_could_not_be_coded_not_at_all(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path / "figures.jsonl")
    x = torch.tensor([1.0, float("nan")])
    telemetry.encode(Lane(0, "forward", ("raw",)), x, step=0)
    with pytest.raises(EvenbitsError, match="NaN or infinite"):
        telemetry.encode(Lane(1, "forward", ("int8:g16",)), x, step=0)
    telemetry.close()
    (line,) = [json.loads(text) for text in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert line["edge"] == 0 and line["relative_l2"] is None and line["messages"] == 1


@pytest.mark.parametrize(("shape", "dimension"), [((2, 5, 3, 4), 1), ((2, 6, 5), 2), ((7, 5), 1)])
def test_a_shared_error_of_one_channel_is_seen_though_the_tensor_has_none(
    shape: tuple[int, ...], dimension: int
) -> None:
    x = torch.randn(shape)
    e = torch.zeros(shape)
    e.select(dimension, 1).fill_(0.5)
    e.select(dimension, 3).fill_(-0.5)
    sums = Sums()
    for part in (slice(None, 1), slice(1, None)):  # microbatches are pooled
        sums.add(x[part], x[part] + e[part])
    f = sums.figures(0, 0, "backward", "raw")
    mine = x.select(dimension, 1), x.select(dimension, 3)
    assert f.dc_ratio < 1e-5
    assert f.channel_dc == pytest.approx(max(0.5 * v.numel() / float(v.norm()) for v in mine), rel=1e-4)


def test_a_silent_channel_does_not_make_the_ratio_infinite() -> None:
    x = torch.randn(100, 4)
    x[:, 2] = 0.0
    sums = Sums()
    sums.add(x, x + torch.tensor([0.0, 0.0, 0.01, 0.0]))
    floor = 0.01 * float(x.square().sum()) / 4
    assert sums.figures(0, 0, "forward", "raw").channel_dc == pytest.approx(1.0 / floor**0.5, rel=1e-4)


def test_one_channel_has_the_ratio_of_the_tensor() -> None:
    f = error_figures(torch.rand(100), get("int4:tensor"))
    assert f.channel_dc == pytest.approx(f.dc_ratio) and f.dc_ratio > 0
    assert by_channel(torch.zeros(())).shape == (1, 1) and by_channel(torch.zeros(2, 3, 4, 5, 6)).shape == (3, 240)
    assert error_figures(torch.zeros(4, 0), get("raw")).channel_dc == 0.0
