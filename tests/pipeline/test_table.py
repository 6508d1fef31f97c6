"""A table from a recipe on a tiny model of its own making: rows, figures, and whose fault a failure is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import evenbits
from evenbits.checkpoints.sources import open_model
from evenbits.errors import EvenbitsError
from evenbits.evaluation.class_metrics import bootstrap_errors
from evenbits.evaluation.paired import paired
from evenbits.evaluation.result import Evaluation
from evenbits.pipeline import table as module
from evenbits.pipeline.calibration import calibration
from evenbits.pipeline.table import Table, TableRow, make_table
from evenbits.schemes.recipe import Recipe, read_recipe

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(60))]
RUNS: list[dict[str, Any]] = [
    {"name": "pairs", "scheme": "W4A4_OVP", "published": 0.5},
    {"name": "coarse", "scheme": {"weights": "int2:row"}, "method": "rtn"},
]


def _folder(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24, pad_token_id=0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(12)  # the initial 0.02 would put every sentence into one class
    model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **named).save_pretrained(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two models, twelve labelled sentences and a text to calibrate on."""
    folder = tmp_path_factory.mktemp("table")
    _folder(folder / "models" / "one", 0)
    _folder(folder / "models" / "two", 1)
    generator = torch.Generator().manual_seed(5)
    lines = []
    for row in range(12):
        words = torch.randint(0, 60, (3 + row % 5,), generator=generator).tolist()
        lines.append(f"{row * row % 3 % 2}\t" + " ".join(f"w{i}" for i in words))
    (folder / "dev.tsv").write_text("\n".join(lines) + "\n")
    words = torch.randint(0, 60, (200,), generator=generator).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in words) + "\n")
    return folder


def _recipe(folder: Path, **changes: Any) -> Recipe:
    keys = {
        "title": "tiny", "model": "models/one", "task": "classification", "evaluation": "dev.tsv",
        "calibration": "text.txt", "samples": 6, "published": 0.75, "runs": RUNS,
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**keys, **changes}))
    return read_recipe(path)


def _independently(data: Path, run: dict[str, Any] | None, model: str = "models/one") -> tuple[Evaluation, Any]:
    """The same figures from the public functions, without the table."""
    source = open_model(str(data / model))
    result = None
    if run is not None:
        batches = calibration(str(data / "text.txt"), source.model, source.tokenizer, samples=6).batches
        result = evenbits.quantize(source.model, scheme=run["scheme"], method=run.get("method"), data=batches)
    scored = evenbits.evaluate(
        source.model, task="classification", data=data / "dev.tsv", tokenizer=source.tokenizer, progress=False
    )
    return scored, result


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, list[str]]:
    said: list[str] = []
    return make_table(_recipe(tmp_path_factory.mktemp("recipe")), data, say=said.append), said


def test_a_row_for_float_and_one_for_each_run(made: tuple[Table, list[str]]) -> None:
    table, said = made
    assert (table.title, table.metric, table.n) == ("tiny", "accuracy", 12)
    assert [row.name for row in table.rows] == ["float", "pairs", "coarse"]
    assert said == ["pairs …", "coarse …"]
    first, pairs, coarse = table.rows
    assert (first.bits_per_weight, first.weight_bytes, first.seconds, first.difference, first.p) == (32, *[None] * 4)
    assert [row.published for row in table.rows] == [0.75, 0.5, None]
    assert 4 < pairs.bits_per_weight < 8 and 2 < coarse.bits_per_weight < pairs.bits_per_weight
    assert pairs.seconds is not None and pairs.seconds > 0


def test_figures_are_those_of_an_independent_evaluation(made: tuple[Table, list[str]], data: Path) -> None:
    table, _ = made
    baseline, _ = _independently(data, None)
    assert table.rows[0].metric == baseline.metrics["accuracy"]
    changed = 0
    for row, run in zip(table.rows[1:], RUNS, strict=True):
        scored, result = _independently(data, run)
        compared = paired(baseline.items, scored.items)
        value = scored.metrics["accuracy"]
        assert row.metric == value
        assert row.difference == pytest.approx(compared.difference) == value - baseline.metrics["accuracy"]
        assert (row.paired_error, row.p) == (compared.standard_error, compared.p)
        assert row.standard_error == pytest.approx(math.sqrt(value * (1 - value) / 12))
        assert row.weight_bytes == result.weight_bytes
        assert row.bits_per_weight == 32 * result.weight_bytes / result.float_weight_bytes
        changed += compared.only_first + compared.only_second
    assert changed > 0  # else the comparison above compares nothing


def test_json(made: tuple[Table, list[str]]) -> None:
    plain = json.loads(json.dumps(made[0].to_json(), allow_nan=False))
    assert set(plain) == {"title", "metric", "n", "rows", "reference"}
    for row in plain["rows"]:
        assert set(row) == {
            "name", "metric", "standard_error", "difference", "paired_error", "p", "bits_per_weight", "weight_bytes",
            "seconds", "published", "divergence",
        }  # fmt: skip


def test_a_table_is_the_same_twice(made: tuple[Table, list[str]], data: Path, tmp_path: Path) -> None:
    again = make_table(_recipe(tmp_path), data, say=lambda _: None)
    for one, other in zip(made[0].rows, again.rows, strict=True):
        assert (one.metric, one.p, one.weight_bytes) == (other.metric, other.p, other.weight_bytes)


@pytest.mark.parametrize("metric", ["matthews", "f1"])
def test_another_metric_with_its_bootstrap_errors(data: Path, tmp_path: Path, metric: str) -> None:
    """As CoLA (Matthews) and MRPC (F1) need it."""
    table = make_table(_recipe(tmp_path, metric=metric, runs=RUNS[1:]), data, say=lambda _: None)
    baseline, _ = _independently(data, None)
    scored, _ = _independently(data, RUNS[1])
    first, row = table.rows
    assert table.metric == metric
    assert (first.metric, row.metric) == (baseline.metrics[metric], scored.metrics[metric])
    assert first.metric != baseline.metrics["accuracy"]
    assert row.difference == scored.metrics[metric] - baseline.metrics[metric] != 0
    assert (row.standard_error, row.paired_error) == bootstrap_errors(metric, baseline.outcomes, scored.outcomes)
    assert first.standard_error == bootstrap_errors(metric, baseline.outcomes, baseline.outcomes)[0] > 0
    assert (first.paired_error, first.p, row.p) == (None, None, None)


def test_accuracy_by_name_is_the_default(made: tuple[Table, list[str]], data: Path, tmp_path: Path) -> None:
    named = make_table(_recipe(tmp_path, metric="accuracy", runs=RUNS[1:]), data, say=lambda _: None)
    assert [(r.metric, r.standard_error, r.paired_error, r.p) for r in named.rows] == [
        (r.metric, r.standard_error, r.paired_error, r.p) for r in (made[0].rows[0], made[0].rows[2])
    ]


@pytest.mark.parametrize("absolute", [True, False])
def test_another_model_in_place_of_the_recipes(data: Path, tmp_path: Path, absolute: bool) -> None:
    recipe = _recipe(tmp_path, runs=RUNS[:1], **({} if absolute else {"model": str(data / "models" / "two")}))
    table = make_table(recipe, data, model=str(data / "models" / "two") if absolute else None, say=lambda _: None)
    scored, _ = _independently(data, None, "models/two")
    assert table.rows[0].metric == scored.metrics["accuracy"]
    scored, _ = _independently(data, RUNS[0], "models/two")
    assert table.rows[1].metric == scored.metrics["accuracy"]


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"name": "wrong method", "scheme": "W8A8", "method": "olive"}, "run 'wrong method': layer .*outlier-victim"),
        (
            {"name": "x", "scheme": "W8A8", "method": "smothquant"},
            "run 'x': unknown method.*Did you mean 'smoothquant'",
        ),
        ({"name": "y", "scheme": "W4A4_OVP", "options": {"weigthed": False}}, "run 'y': .*Did you mean 'weighted'"),
        ({"name": "z", "scheme": {"weights": "int8:row", "ignore": ["*"]}}, "run 'z': no layer would be quantized"),
        ({"name": "p", "scheme": "W8A8", "options": {"progress": False}}, "run 'p': unknown option .*'progress'"),
        ({"name": "d", "scheme": "W8A8", "options": {"data": []}}, "run 'd': unknown option .*'data'"),
    ],
)
def test_a_failing_run_names_itself(data: Path, tmp_path: Path, run: dict[str, Any], words: str) -> None:
    said: list[str] = []
    with pytest.raises(EvenbitsError, match=words):
        make_table(_recipe(tmp_path, runs=[RUNS[1], run]), data, say=said.append)
    assert said == ["coarse …", f"{run['name']} …"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluation": "none.tsv"}, "there is no file none.tsv"),
        ({"task": "clasification"}, "Did you mean 'classification'"),
        ({"calibration": "none.txt"}, "run 'pairs': there is no file none.txt"),
        ({"model": "models"}, "neither a Hugging Face folder"),
        ({"samples": 0}, "run 'pairs': samples"),
        ({"metric": "mathews"}, "metric of task 'classification' 'mathews'. Did you mean 'matthews'"),
        ({"metric": 3}, "'metric' must be text"),
    ],
)
def test_what_a_recipe_names_must_be_there(data: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(EvenbitsError, match=words):
        make_table(_recipe(tmp_path, **changes), data, say=lambda _: None)


def test_figures_that_are_not_finite_are_null() -> None:
    row = TableRow("x", math.inf, None, math.nan, None, None, 4.0, 10, 0.5, None)
    plain = Table("t", "perplexity", 3, (row,)).to_json()
    assert plain["rows"][0]["metric"] is None and plain["rows"][0]["difference"] is None
    assert plain["rows"][0]["bits_per_weight"] == 4.0
    json.dumps(plain, allow_nan=False)


def test_a_task_that_counts_no_right_answers_has_no_paired_test(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = Evaluation("perplexity", {"perplexity": 12.0}, 2, None, ((3.0, 5), (4.0, 6)))
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: documents)
    table = make_table(_recipe(tmp_path, runs=RUNS[1:]), data, say=lambda _: None)
    assert (table.metric, table.n) == ("perplexity", 2)
    row = table.rows[1]
    assert (row.difference, row.standard_error, row.paired_error, row.p) == (0.0, None, None, None)


@pytest.mark.data
def test_pairs_and_int8_keep_the_accuracy_of_minilm(test_data: Path, tmp_path: Path) -> None:
    """W4A8_OVP against float on all sentences of SST-2's dev set."""
    recipe = _recipe(
        tmp_path, model=str(test_data / "minilm_glue" / "sst2"), samples=32,
        evaluation=str(test_data / "sst2" / "dev.tsv"),
        calibration=str(test_data / "sst2" / "train.tsv"), runs=[{"name": "W4A8", "scheme": "W4A8_OVP"}],
    )  # fmt: skip
    table = make_table(recipe, test_data, say=lambda _: None)
    first, quantized = table.rows
    assert table.n == 872 and first.metric == pytest.approx(0.8739, abs=0.001)
    assert quantized.difference is not None and abs(quantized.difference) <= 0.015
    assert 4 < quantized.bits_per_weight < 4.3


def test_divergences_are_those_of_an_independent_computation(data: Path, tmp_path: Path) -> None:
    """As torch's own kl_div has them, and the pairs' beside the coarse ones' on the same sentences."""
    table = make_table(_recipe(tmp_path, reference="coarse"), data, say=lambda _: None)
    logits = []
    for run in (None, *RUNS):
        source = open_model(str(data / "models" / "one"))
        if run is not None:
            batches = calibration(str(data / "text.txt"), source.model, source.tokenizer, samples=6).batches
            evenbits.quantize(source.model, scheme=run["scheme"], method=run.get("method"), data=batches)
        lines = [line.split("\t")[1] for line in (data / "dev.tsv").read_text().splitlines()]
        with torch.no_grad():
            given = source.tokenizer(lines, padding=True, return_tensors="pt")
            logits.append(source.model.eval()(**given).logits.double().log_softmax(dim=1))
    expected = [
        torch.nn.functional.kl_div(other, logits[0], log_target=True, reduction="none").sum(dim=1)
        for other in logits[1:]
    ]
    first, pairs, coarse = (row.divergence for row in table.rows)
    assert table.reference == "coarse" and first is None and pairs is not None and coarse is not None
    for found, values in ((pairs, expected[0]), (coarse, expected[1])):
        assert found.mean == pytest.approx(float(values.mean()), rel=1e-3, abs=1e-7) and found.mean > 0
        assert found.error == pytest.approx(float(values.std()) / math.sqrt(12), rel=1e-3)
    apart = expected[0] - expected[1]
    assert pairs.difference == pytest.approx(float(apart.mean()), rel=1e-3)
    assert pairs.difference < 0  # pairs of 4 bits keep more than 2 bits
    assert pairs.paired_error == pytest.approx(float(apart.std()) / math.sqrt(12), rel=1e-3)
    assert (coarse.difference, coarse.paired_error) == (None, None)


def test_a_reference_without_classes_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = Evaluation("perplexity", {"perplexity": 12.0}, 2, None, ((3.0, 5), (4.0, 6)))
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: documents)
    with pytest.raises(EvenbitsError, match=r"'reference: coarse' compares divergences .* has none; leave it out"):
        make_table(_recipe(tmp_path, reference="coarse"), data, say=lambda _: None)
