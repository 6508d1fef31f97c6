"""The sweep on a tiny model: what is compared with what, on which samples, and what survives an interruption."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import evenbits
from evenbits.errors import EvenbitsError
from evenbits.evaluation.paired import paired
from evenbits.pipeline import sweep_bench as bench_module
from evenbits.pipeline import workers
from evenbits.pipeline.points import make_points, parse_alphas
from evenbits.pipeline.sweep_bench import values_hash, weights_hash
from evenbits.pipeline.sweep_result import Sweep, compare, summarise
from evenbits.pipeline.sweep_state import State

FACTORY = """
import os, signal, torch
from pathlib import Path
from torch import nn
HERE = Path(__file__).parent
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 4)
    def forward(self, x):
        x = self.last(self.first(self.norm(x)).relu())
        # Calibration batches have 8 rows, those to score 40: the bomb goes off while a point is scored.
        if len(x) == 40 and (HERE / "bomb").exists() and not isinstance(self.first, nn.Linear):
            (HERE / "bomb").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return x
def net():
    torch.manual_seed(3)
    model = Net()
    with torch.no_grad():
        model.norm.weight[5] = 40.0  # an outlier channel
    return model.eval()
def other():
    torch.manual_seed(4)
    return Net().eval()
def drifting():
    return Net()
"""


def inputs(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """The same as that of FACTORY, for the Python interface."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(self.first(self.norm(x)).relu())
        return logits


def net() -> nn.Module:
    torch.manual_seed(3)
    model = Net()
    with torch.no_grad():
        model.norm.weight[5] = 40.0
    return model.eval()


def labelled() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = inputs(80, 1)
    y = net()(x).argmax(dim=1)
    y[::7] = (y[::7] + 1) % 4  # not everything is right, in float either
    return [(x[:40], y[:40]), (x[40:], y[40:])]


def run(model: Any = None, **options: Any) -> Sweep:
    words: dict[str, Any] = {
        "task": "classification", "data": labelled(), "calibration": [inputs(8, 2)], "alpha": "0.25,0.75",
        "scheme": {"weights": "int4:row", "input_activations": "int8:tensor", "dynamic": False},
    }  # fmt: skip
    return evenbits.sweep(net() if model is None else model, **{**words, **options})


@pytest.fixture(scope="module")
def made() -> Sweep:
    return run()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(FACTORY)
    return tmp_path / "nets.py"


def points(folder: Path) -> set[str]:
    return {path.name.removeprefix("point-").removesuffix(".json") for path in folder.glob("point-*.json")}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of points that are really run."""
    names: list[str] = []
    real = bench_module.Bench.run

    def counting(self: Any, point: Any) -> Any:
        names.append(point.name)
        return real(self, point)

    monkeypatch.setattr(bench_module.Bench, "run", counting)
    return names


def test_baselines_then_every_alpha(made: Sweep) -> None:
    assert [row.name for row in made.rows] == ["float", "none", "auto", "0.25", "0.75"]
    assert [row.alpha for row in made.rows] == [None, None, None, 0.25, 0.75]
    assert [row.method for row in made.rows] == [None, "rtn", *["smoothquant"] * 3]
    assert (made.metric, made.n, made.higher_is_better) == ("accuracy", 80, True)
    assert [row.name for row in made.curve] == ["0.25", "0.75"]


@pytest.mark.parametrize(
    ("name", "options"),
    [("none", {"method": "rtn"}), ("0.25", {"method": "smoothquant", "alpha": 0.25}),
     ("auto", {"method": "smoothquant", "alpha": "auto"})],
)  # fmt: skip
def test_a_row_is_what_the_public_functions_give(made: Sweep, name: str, options: dict[str, Any]) -> None:
    model, float_model = net(), net()
    result = evenbits.quantize(model, scheme=made.scheme, data=[inputs(8, 2)], **options)
    scored = evenbits.evaluate(model, task="classification", data=labelled())
    unsmoothed = net()
    evenbits.quantize(unsmoothed, scheme=made.scheme, method="rtn", data=[inputs(8, 2)])
    baselines = {
        "none": evenbits.evaluate(unsmoothed, task="classification", data=labelled()),
        "float": evenbits.evaluate(float_model, task="classification", data=labelled()),
    }
    row = made.row(name)
    assert row is not None
    assert (row.metric, row.interval) == (scored.metrics["accuracy"], scored.interval)
    for other, found in (("none", row.against_none), ("float", row.against_float)):
        if other == name:
            assert found is None
            continue
        expected = paired(baselines[other].items, scored.items)
        assert found is not None
        assert (found.difference, found.standard_error, found.p) == (
            expected.difference, expected.standard_error, expected.p,
        )  # fmt: skip
    statuses = [region.status for region in result.regions]
    assert row.regions == {status: statuses.count(status) for status in set(statuses)}
    ratios = [layer.output_sqnr_db for layer in result.quantized if layer.output_sqnr_db is not None]
    assert row.mean_output_sqnr_db == pytest.approx(sum(ratios) / len(ratios))
    assert row.weight_bytes == result.weight_bytes


def test_alpha_matters_to_the_layers_here(made: Sweep) -> None:
    found = {row.mean_output_sqnr_db for row in made.rows if row.method}
    assert len(found) == 4


def test_the_spread_compares_best_with_worst(made: Sweep) -> None:
    assert made.spread is not None
    best, worst = made.row(made.spread.best), made.row(made.spread.worst)
    assert best is not None and worst is not None
    assert best.metric == max(row.metric for row in made.curve)
    assert made.spread.comparison.difference == pytest.approx(best.metric - worst.metric)
    error = made.spread.comparison.standard_error
    assert error is not None and made.spread.separated == (best.metric - worst.metric > 2 * error)
    assert run(alpha=0.5, auto=False).spread is None


def summed_up(items: dict[str, list[Any]], metric: str = "accuracy") -> Sweep:
    """A sweep of two α whose items are given."""
    made = {}
    for point in make_points((0.2, 0.7), "smoothquant", {}, auto="auto" in items):
        own = items[point.name]
        score = (
            sum(own) / len(own) if metric == "accuracy" else math.exp(sum(n for n, _ in own) / sum(t for _, t in own))
        )
        evaluation = {"metrics": {metric: score}, "n": len(own), "interval": None, "items": own, "notes": []}
        made[point.name] = {
            "name": point.name, "alpha": point.alpha, "method": point.method, "evaluation": evaluation, "regions": {},
            "region_alphas": {}, "mean_output_sqnr_db": None, "weight_bytes": None, "seconds": {}, "notes": [],
        }  # fmt: skip
    about: dict[str, Any] = {"scheme": {}, "options": {}, "calibration": "", "key": ""}
    points = make_points((0.2, 0.7), "smoothquant", {}, auto="auto" in items)
    return summarise(points, made, model="m", task="t", method="smoothquant", **about)


def test_auto_is_compared_with_the_best_alpha_and_with_one_picked_elsewhere() -> None:
    """0.2 is right on even samples, 0.7 on odd ones: what is picked on one half is wrong on all of the other."""
    even, odd = [1, 0] * 20 + [1], [0, 1] * 20 + [0]
    auto = [1, 0, 0, 1] * 10 + [0]
    items = {"float": even, "none": odd, "auto": auto, "0.2": even, "0.7": odd}
    search = summed_up(items).search
    assert search is not None and search.best == "0.2" and search.picked == ("0.2", "0.7")
    assert search.against_best == compare(even, auto) and search.against_best.difference == pytest.approx(-1 / 41)
    error = search.against_best.standard_error
    assert error is not None and not search.below and search.against_best.difference > -error
    assert search.against_picked == compare([0] * 41, auto) and search.against_picked.difference == pytest.approx(
        20 / 41
    )
    worse = summed_up({**items, "auto": [0] * 41}).search
    assert worse is not None and worse.below
    assert summed_up({name: own for name, own in items.items() if name != "auto"}).search is None
    single = summed_up({name: [1] for name in items}).search
    assert single is not None and single.against_picked is None and not single.below


def test_a_lower_perplexity_is_the_better_one_of_a_half() -> None:
    low, high = [[5.0, 10], [20.0, 10]] * 3, [[10.0, 10], [12.0, 10]] * 3
    found = summed_up({"float": low, "none": low, "auto": high, "0.2": low, "0.7": high}, "perplexity").search
    assert found is not None and found.best == "0.7" and found.picked == ("0.2", "0.7")
    assert found.against_best.difference == 0 and not found.below
    # The odd documents are answered by what is best on the even ones, 0.2, and the even ones by 0.7.
    assert found.against_picked == compare([[10.0, 10], [20.0, 10]] * 3, high)
    worse = summed_up({"float": low, "none": low, "auto": [[30.0, 10]] * 6, "0.2": low, "0.7": high}, "perplexity")
    assert worse.search is not None and worse.search.below


def test_json_has_every_field_and_no_nan(made: Sweep) -> None:
    plain = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert plain["format"] == "evenbits.sweep/1"
    assert set(plain) == {
        "format", "model", "task", "metric", "higher_is_better", "n", "scheme", "method", "options", "calibration",
        "rows", "spread", "search", "key", "notes",
    }  # fmt: skip
    assert set(plain["rows"][3]) == {
        "name", "alpha", "method", "metric", "interval", "against_none", "against_float", "regions", "region_alphas",
        "mean_output_sqnr_db", "weight_bytes", "seconds",
    }  # fmt: skip
    assert set(plain["rows"][3]["against_none"]) == {"difference", "standard_error", "interval", "p"}
    assert set(plain["spread"]) == {"best", "worst", "comparison", "separated"}
    assert set(plain["search"]) == {"best", "against_best", "below", "picked", "against_picked"}
    assert set(plain["rows"][2]["region_alphas"]) and not plain["rows"][3]["region_alphas"]


def test_the_model_that_is_given_stays_as_it_is() -> None:
    model = net()
    before = weights_hash(model)
    run(model, auto=False, alpha="0.5")
    assert weights_hash(model) == before and isinstance(model.get_submodule("first"), nn.Linear)


def test_a_generator_is_walked_once_and_serves_every_point(made: Sweep) -> None:
    found = run(data=iter(labelled()), calibration=(x for x in [inputs(8, 2)]))
    assert [row.metric for row in found.rows] == [row.metric for row in made.rows]
    assert found.key == made.key


def test_no_smoothing_of_two_methods_keeps_the_weight_method() -> None:
    made = make_points([0.5], "smoothquant+olive", {"policy": "paper", "criterion": "max"}, auto=True)
    assert [(p.name, p.method, dict(p.options)) for p in made] == [
        ("float", None, {}),
        ("none", "olive", {"policy": "paper"}),
        ("auto", "smoothquant+olive", {"policy": "paper", "criterion": "max", "alpha": "auto"}),
        ("0.5", "smoothquant+olive", {"policy": "paper", "alpha": 0.5}),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.1:0.4:0.1", (0.1, 0.2, 0.3, 0.4)), ("0:1:0.25", (0, 0.25, 0.5, 0.75, 1)), ("0.7,0.3", (0.3, 0.7)),
     ("0.5", (0.5,)), (0.5, (0.5,)), ([0.9, 0.2], (0.2, 0.9)), ("0.5:0.5:0.1", (0.5,))],
)  # fmt: skip
def test_ranges_and_lists_of_alpha(text: Any, expected: tuple[float, ...]) -> None:
    assert parse_alphas(text) == pytest.approx(expected)


def test_the_default_range_has_nineteen_points() -> None:
    assert parse_alphas("0.05:0.95:0.05") == pytest.approx([0.05 * i for i in range(1, 20)])


@pytest.mark.parametrize(
    ("text", "words"),
    [("0.1:0.9", "2 numbers"), ("a:b:c", "range or a list"), ("0.9:0.1:0.1", "LOW to HIGH"), ("0:2:0.1", "0..1"),
     ("0:1:0", "0.001"), ("0:1:-0.1", "0.001"), ("0:1:1e-9", "0.001"), ("0.1,1.5", "1.5"), ("", "range"),
     ("0.5,0.5", "twice"), ("nan", "range"), ("auto", "range"), ([], "nothing"), ("0:inf:0.1", "range")],
)  # fmt: skip
def test_what_is_no_range_of_alpha(text: Any, words: str) -> None:
    with pytest.raises(EvenbitsError, match=words):
        parse_alphas(text)


SEARCHED = {"weights": "int8:row", "input_activations": "int8:tensor:mse", "dynamic": False}


@pytest.mark.parametrize(
    ("words", "message"),
    [({"method": "rtn"}, "alpha"), ({"method": "nothing"}, "unknown method"), ({"banana": 1}, "banana"),
     ({"criterion": "best"}, "unknown criterion"), ({"scheme": SEARCHED}, "auto=False"),
     ({"scheme": "W9"}, "unknown scheme"), ({"task": "guessing"}, "unknown evaluation task"), ({"jobs": 0}, "jobs=0"),
     ({"data": "missing.npz"}, "missing.npz"), ({"calibration": "text"}, "tokenizer"), ({"data": []}, "nothing"),
     ({"criterion": "max", "auto": False}, "how α is searched")],
)  # fmt: skip
def test_what_is_given_wrongly(words: dict[str, Any], message: str) -> None:
    with pytest.raises(EvenbitsError, match=message):
        run(**words)


def test_no_smoothing_has_the_options_that_are_not_of_the_smoothing() -> None:
    """Else the bias correction of every α would count as a gain of smoothing."""
    points = make_points([0.5], "smoothquant", {"bias_correction": True, "scope": "block"}, auto=True)
    assert [dict(point.options) for point in points] == [
        {},
        {"bias_correction": True},
        {"bias_correction": True, "scope": "block", "alpha": "auto"},
        {"bias_correction": True, "alpha": 0.5},
    ]


def test_a_second_run_finds_everything_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Sweep) -> None:
    names, said = counted(monkeypatch), list[str]()
    first = run(state=tmp_path)
    assert names == ["float", "none", "auto", "0.25", "0.75"]
    second = run(state=tmp_path, say=said.append)
    assert names == ["float", "none", "auto", "0.25", "0.75"]
    assert second == first and second.key == made.key
    assert said == [f"5 of 5 points are done already, in {tmp_path}."]
    finer = run(state=tmp_path, alpha="0.25,0.5,0.75")
    assert names[5:] == ["0.5"] and len(finer.curve) == 3


def test_progress_names_the_score_and_the_time_left() -> None:
    said: list[str] = []
    run(say=said.append, auto=False)
    assert len(said) == 4
    assert "accuracy" in said[0] and "1 of 4" in said[0] and "left" in said[0]
    assert said[3].startswith("α = 0.75: ") and "4 of 4" in said[3] and "left" not in said[3]


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "calibration": ({"calibration": [inputs(8, 9)]}, "calibration data"),
    "labels": ({"data": [(x, (y + 1) % 4) for x, y in labelled()]}, "evaluation data"),
    "scheme": ({"scheme": "W8A8"}, "scheme"),
    "ignore": ({"ignore": ("last",)}, "scheme"),
    "options": ({"bias_correction": True}, "method"),
    "evaluation": ({"evaluation": {"max_length": 7}}, "evaluation"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_key_is_refused_and_nothing_is_lost(tmp_path: Path, change: str) -> None:
    run(state=tmp_path, auto=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    words, named = CHANGES[change]
    with pytest.raises(EvenbitsError, match=f"with another {named}.*--restart"):
        run(state=tmp_path, auto=False, **words)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_model_is_refused_and_restart_throws_the_points_away(tmp_path: Path) -> None:
    run(state=tmp_path, auto=False, alpha="0.25,0.75")
    (tmp_path / "mine.txt").write_text("not ours")
    torch.manual_seed(9)
    with pytest.raises(EvenbitsError, match="weights"):
        run(Net(), state=tmp_path, auto=False)
    run(Net(), state=tmp_path, auto=False, alpha="0.5", restart=True)
    assert points(tmp_path) == {"float", "none", "0.5"} and (tmp_path / "mine.txt").exists()


def test_a_damaged_or_foreign_point_is_named(tmp_path: Path) -> None:
    run(state=tmp_path, auto=False)
    path = tmp_path / "point-0.25.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(EvenbitsError, match=r"point-0.25.json is damaged"):
        run(state=tmp_path, auto=False)
    path.write_text(json.dumps({**json.loads(whole), "key": "0"}))
    with pytest.raises(EvenbitsError, match="does not belong"):
        run(state=tmp_path, auto=False)


def failing(monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> None:
    """α = 0.25 raises, whatever else happens."""
    real = bench_module.evaluate

    def evaluate(model: nn.Module, **words: Any) -> Any:
        if getattr(model, "alpha", None) == 0.25:
            raise error()
        return real(model, **words)

    quantize = bench_module.quantize

    def marking(model: nn.Module, **words: Any) -> Any:
        found = quantize(model, **words)
        model.alpha = words.get("alpha")  # type: ignore[assignment]
        return found

    monkeypatch.setattr(bench_module, "evaluate", evaluate)
    monkeypatch.setattr(bench_module, "quantize", marking)


@pytest.mark.parametrize("error", [EvenbitsError("too hot"), RuntimeError("too hot")])
def test_a_failed_point_is_named_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with monkeypatch.context() as patched:
        failing(patched, lambda: error)
        with pytest.raises(EvenbitsError, match=r"1 of 4 points failed. α = 0.25: .*too hot.*kept in"):
            run(state=tmp_path, auto=False)
    assert points(tmp_path) == {"float", "none", "0.75"}
    names = counted(monkeypatch)
    assert len(run(state=tmp_path, auto=False).rows) == 4 and names == ["0.25"]


def test_an_interruption_leaves_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        failing(patched, lambda: os.kill(os.getpid(), signal.SIGTERM) or RuntimeError("went on"))  # type: ignore[func-returns-value]
        with pytest.raises(KeyboardInterrupt):
            run(state=tmp_path, auto=False)
    assert signal.getsignal(signal.SIGTERM) is before
    assert points(tmp_path) == {"float", "none"} and not list(tmp_path.glob(".*"))
    assert len(run(state=tmp_path, auto=False).rows) == 4


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    state = State(tmp_path, {"a": "b"})
    monkeypatch.setattr("evenbits.pipeline.sweep_state.os.fsync", full)
    with pytest.raises(EvenbitsError, match=r"cannot be written.*No space"):
        workers.write_point(tmp_path, state.digest, make_points([0.5], "smoothquant", {}, auto=False)[0], {})
    assert points(tmp_path) == set() and not list(tmp_path.glob(".*"))


def test_two_processes_give_what_one_gives(source: Path, made: Sweep) -> None:
    found = run(f"{source}:net", jobs=2, state=source.parent / "state")
    assert [row.metric for row in found.rows] == [row.metric for row in made.rows]
    assert [row.mean_output_sqnr_db for row in found.rows] == [row.mean_output_sqnr_db for row in made.rows]


def test_a_killed_process_costs_its_point_only_and_the_next_run_makes_it(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = source.parent / "state"
    (source.parent / "bomb").touch()
    with pytest.raises(EvenbitsError, match=r"1 of 5 points failed. .*exit code -9"):
        run(f"{source}:net", jobs=2, state=state)
    done = points(state)
    assert len(done) == 4
    assert not (source.parent / "bomb").exists()
    names = counted(monkeypatch)
    assert len(run(f"{source}:net", state=state).rows) == 5
    assert set(names) == {"float", "none", "auto", "0.25", "0.75"} - done


def test_what_cannot_be_sent_to_a_process_is_said_so() -> None:
    with pytest.raises(EvenbitsError, match="cannot be sent to another process"):
        run(lambda: net(), jobs=2)


def test_a_factory_must_give_the_same_weights_each_time(source: Path) -> None:
    with pytest.raises(EvenbitsError, match="float: the model source gave other weights"):
        run(f"{source}:drifting", auto=False, alpha="0.5")


def test_an_edited_file_is_another_model(source: Path) -> None:
    state = source.parent / "state"
    run(f"{source}:net", state=state, auto=False)
    source.write_text(FACTORY + "\n# edited\n")
    with pytest.raises(EvenbitsError, match="another model"):
        run(f"{source}:net", state=state, auto=False)


def test_hashes_see_every_byte() -> None:
    x = torch.zeros(5000)
    y = x.clone()
    y[2500] = 1e-30
    assert values_hash([{"x": x}]) != values_hash([{"x": y}])
    assert values_hash([x[:10], x[:20]]) != values_hash([x[:20], x[:10]])
    assert values_hash([x.half()]) != values_hash([x])
    assert weights_hash(net()) == weights_hash(net())
    assert values_hash([torch.tensor(1.0), torch.ones(3, dtype=torch.bfloat16)])


def test_a_comparison_of_documents_is_in_perplexity() -> None:
    first, second = [[10.0, 10], [30.0, 20]], [[20.0, 10], [50.0, 20]]
    found = compare(first, second)
    assert found.difference == pytest.approx(2.718281828 ** (70 / 30) - 2.718281828 ** (40 / 30))
    assert found.standard_error is not None and found.interval is not None
    with pytest.raises(EvenbitsError, match="same documents"):
        compare(first, [[20.0, 11], [50.0, 20]])


class Words(nn.Module):
    """ids [N, T] → logits [N, T, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(12, 16), nn.LayerNorm(16), nn.Linear(16, 12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.embed(ids)))
        return logits


def test_perplexity_is_compared_document_by_document() -> None:
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 12, (9 + i,), generator=generator) for i in range(6)]
    model = Words().eval()
    scheme = {"weights": "int2:row", "input_activations": "int8:row"}
    words: dict[str, Any] = {"task": "perplexity", "data": documents, "calibration": [documents[0].unsqueeze(0)]}
    found = evenbits.sweep(model, alpha="0.2,0.8", scheme=scheme, **words)
    assert (found.metric, found.higher_is_better, found.n) == ("perplexity", False, 6)
    none = found.row("none")
    assert none is not None and found.spread is not None
    for row in found.curve:
        assert row.against_none is not None
        assert row.against_none.difference == pytest.approx(row.metric - none.metric)
    best, worst = found.row(found.spread.best), found.row(found.spread.worst)
    assert best is not None and worst is not None and best.metric < worst.metric
    assert found.spread.comparison.difference < 0
