"""CodecStage under torch's own schedules, in real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import stage_work
import torch
from pipelines import BATCH, LENGTH, MICROBATCHES, SCHEDULES, WIDTH
from ranks import run, values
from torch.distributed.pipelining import PipelineStage

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta
from evenbits.comms.stages import CodecStage
from evenbits.comms.wire import TRAILER, Edge
from evenbits.errors import EvenbitsError

META = Meta((BATCH // MICROBATCHES, LENGTH, WIDTH), torch.float32)


def bytes_of(spec: str) -> int:
    """One step of one lane: payloads and trailers of all microbatches."""
    return MICROBATCHES * (get(spec).payload_bytes(META) + TRAILER)


def test_raw_is_bit_identical_to_the_stock_stage_under_every_schedule() -> None:
    for by_schedule in values(run(stage_work.against_stock, 2, list(SCHEDULES), 2)):
        assert set(by_schedule) == set(SCHEDULES)
        for name, (stock, coded) in by_schedule.items():
            assert stock == coded, name


def test_raw_is_bit_identical_on_four_ranks() -> None:
    results = values(run(stage_work.against_stock, 4, ["1F1B"], 2))
    assert any(stock[0][0] for result in results for stock, _ in result.values())
    for result in results:
        stock, coded = result["1F1B"]
        assert stock == coded


def test_every_schedule_learns_with_packed_bytes_and_sends_what_the_codec_says() -> None:
    first, second = values(run(stage_work.train_all, 2, list(SCHEDULES), "int4:g16/int8:g16", 6))
    for name, (_, per_rank) in SCHEDULES.items():
        losses = first[name][0] if name == "ZBVZeroBubble" else second[name][0]
        assert sum(losses[-1]) < sum(losses[0]), name
        edges = {"ZBVZeroBubble": 2}.get(name, 2 * per_rank - 1)  # The V's bottom is a local hop and costs nothing.
        sent = first[name][2] + second[name][2]
        assert sent == 6 * edges * (bytes_of("int4:g16") + bytes_of("int8:g16")), name


CODECS = [
    "int4:g16/int8:g16",
    "bf16/fp16",
    "top0.25+int8:g16/top0.25+int8:g16",  # the gradient on the forward's index set
    "top0.25+int8:g16/int8:g16",  # a dense gradient
    "int8:g16/top0.25+raw",  # the gradient brings its own index set
    "multi2x4/int8:g16:affine",
]


def test_a_pipeline_computes_what_fake_quantization_at_the_cut_computes() -> None:
    """Independent oracle: one process, no messages, encode and decode inside an autograd function."""
    first, second = values(run(stage_work.two_stages, 2, CODECS, 3))
    for codec in CODECS:
        assert second[codec][0] == stage_work.one_process(codec, 3), codec
    top = get("top0.25+int8:g16")
    kept = top.kept(META)  # type: ignore[attr-defined]
    both = "top0.25+int8:g16/top0.25+int8:g16"
    assert first[both][2] == 3 * bytes_of("top0.25+int8:g16")
    assert second[both][2] == 3 * MICROBATCHES * (top.payload_bytes_on(META, kept) + TRAILER)
    assert second[both][2] < first[both][2]


def test_integers_half_floats_tensors_without_gradient_and_strides_arrive_as_sent() -> None:
    (stock, coded, _), (_, _, (h, picture, half)) = values(run(stage_work.several, 2))
    assert stock == coded
    assert h["leaf"] and h["learns"]
    assert picture["strides"][1] == 1, "channels-last, which the stock stage cannot send at all"
    assert not half["learns"] and half["type"] == "torch.bfloat16"


def test_static_shapes_and_evaluation_between_steps() -> None:
    for plain, evaluated in values(run(stage_work.static_and_eval, 2)):
        assert plain == evaluated


def test_every_edge_and_direction_has_its_own_codec() -> None:
    results = values(run(stage_work.per_edge, 4))
    expected = [
        bytes_of("int8:g16"),
        bytes_of("int4:g16") + bytes_of("bf16"),
        bytes_of("raw") + bytes_of("int8:g16"),
        bytes_of("int2:g16"),
    ]
    assert [sent for _, _, sent in results] == expected


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("codec", "codecs of edge 0 differ: stage 0 has int8:g16/int8:g16, stage 1 has int8:g16/int4:g16"),
        ("version", "versions of evenbits differ"),
        ("microbatches", "numbers of microbatches differ: stage 0 has 4, stage 1 has 2"),
        ("embedding", "would prune the output of an embedding"),
    ],
)
def test_ends_that_do_not_fit_raise_the_same_error_on_every_rank(case: str, words: str) -> None:
    texts = values(run(stage_work.handshake, 2, case))
    assert texts[0] == texts[1]
    assert texts[0].startswith("AgreedError") and words in texts[0]


def test_a_neighbour_with_another_stage_class_is_named() -> None:
    (kind, text), _ = run(stage_work.stock_neighbour, 2, link_timeout=4.0)
    assert kind == "LinkError"
    assert "stages [1] did not show their codecs within 1 s" in text


def test_pruning_is_refused_right_behind_embeddings_only() -> None:
    assert values(run(stage_work.behind_a_layer, 2)) == ["", ""]


def test_edges_are_spelled() -> None:
    assert Edge.of("int8:g128") == Edge(("int8:g128",), ("int8:g128",))
    assert Edge.of("int4:g64>int8:g64/bf16") == Edge(("int4:g64", "int8:g64"), ("bf16",))
    assert str(Edge.of("int4:g64>int8:g64/bf16")) == "int4:g64>int8:g64/bf16"
    for wrong in ("int8:g128/int8:g128/raw", "", "nonsense/raw", 8):
        with pytest.raises(EvenbitsError):
            Edge.of(wrong)  # type: ignore[arg-type]


def check_ahead(schedules: list[str], codec: str | Edge) -> None:
    for by_schedule in values(run(stage_work.ahead, 2, schedules, codec)):
        assert set(by_schedule) == set(schedules)
        for name, runs in by_schedule.items():
            assert all(other == runs[0] for other in runs[1:]), (codec, name)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["int4:g16/int8:g16", "int8:g16/top0.5+raw", "top0.5+int8:g16/top0.5+raw"])
def test_receives_may_be_posted_ahead_under_all_five_schedules(codec: str) -> None:
    edge = Edge.of(codec)
    check_ahead(list(SCHEDULES), Edge(edge.forward, edge.backward, prune_embeddings=True))


def test_receives_may_be_posted_ahead() -> None:
    """Losses, gradients and bytes do not depend on it; with index sets, gradients wait for theirs."""
    check_ahead(["1F1B", "ZBVZeroBubble"], "int4:g16/top0.5+raw")
    for kind, text in run(stage_work.wrong_ahead, 2):
        assert kind == "EvenbitsError" and "ahead is 'auto', None, or a number" in text


def test_pipelines_side_by_side_with_coded_data_parallel_gradients() -> None:
    results = values(run(stage_work.both_ways, 4, "int8:g16"))
    assert results[0][1] == results[2][1] and results[1][1] == results[3][1], "replicas stay equal"
    assert results[1][0] != results[3][0], "they saw different batches"
    for losses in (results[1][0], results[3][0]):
        assert sum(losses[-1]) < sum(losses[0])
    assert all(sent > 0 for _, _, sent in results)


def test_a_nan_in_one_of_two_pipelines_stops_both() -> None:
    """What one pipeline's ranks agree on, the other one does not know: nobody is left waiting all the same."""
    results = run(stage_work.both_ways, 4, "int8:g16", True, link_timeout=20.0, deadline=15.0)
    for kind, text in results:
        assert kind == "LinkError", text
    assert any("NaN or infinite values" in text for _, text in results)


def test_telemetry_of_a_pipeline_is_what_was_sent(tmp_path: Path) -> None:
    """Steps 0, 2 and 4 of five are measured."""
    for rank, (sent, summary) in enumerate(values(run(stage_work.measured, 2, str(tmp_path)))):
        lines = [json.loads(line) for line in (tmp_path / f"{rank}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 2, 4]
        direction, codec = [("forward", "int4:g16"), ("backward", "int8:g16")][rank]
        assert all((line["edge"], line["direction"], line["codec"]) == (0, direction, codec) for line in lines)
        assert sum(line["bytes"] for line in lines) * 5 == sent * 3
        assert all(line["messages"] == MICROBATCHES and 10 < line["snr_db"] < 60 for line in lines)
        assert codec in summary


def test_a_torch_with_another_stage_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(PipelineStage, "_post_metadata_inference_cleanup")
    with pytest.raises(EvenbitsError, match="has another PipelineStage"):
        CodecStage(torch.nn.Linear(2, 2), 0, 2, torch.device("cpu"))
