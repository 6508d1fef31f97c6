"""The commands as people and scripts meet them: one JSON object on standard output, or one line on standard error."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import evenbits
from evenbits import cli
from evenbits.cli import main

FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))

def linears():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))

def noisy():
    print("a library that prints")
    return build()

def other():
    return nn.Sequential(nn.Linear(16, 3))

def broken():
    model = build()
    model[1].weight.data[0, 0] = float("nan")
    return model

def norm():
    return nn.LayerNorm(16)
"""

KEYS = {"layers", "regions", "weight_bytes", "float_weight_bytes", "model_bytes", "seconds", "peak_bytes"}
LAYER = {"name", "format", "status", "reason", "bits_per_weight", "sqnr_db", "output_sqnr_db"}


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON object on one line and nothing else."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1 and self.out.endswith("}\n"), self.out
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    def refused(self, match: str) -> None:
        """Exit code 1, nothing on standard output, one line on standard error that says why."""
        assert self.code == 1 and self.out == "", (self.code, self.out, self.err)
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("evenbits: "), self.err
        assert match in lines[0]


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["evenbits", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capfd.readouterr()
        code = end.value.code
        return Done(code if isinstance(code, int) else 0 if code is None else 1, captured.out, captured.err)

    return call


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(FACTORY)
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((40, 16)).astype(np.float32)
    np.savez(tmp_path / "x.npz", inputs=inputs)
    np.savez(tmp_path / "xy.npz", inputs=inputs, labels=generator.integers(0, 3, 40))
    return str(tmp_path / "net.py")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model with a tokenizer of words, as a Hugging Face folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hf") / "llama"
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, max_position_embeddings=24, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 40)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", bos_token="<s>", eos_token="</s>")
    made.save_pretrained(folder)
    (folder.parent / "text.txt").write_text(" ".join(f"w{3 + i * i % 37}" for i in range(300)) + "\n")
    return folder


# ------------------------------------------------------------------------------------------------------ what works


@pytest.mark.parametrize("name", ["build", "linears", "noisy"])
def test_a_plain_model_from_end_to_end(name: str, run: Run, net: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run("quantize", f"{net}:{name}", "-o", out, "--calibration", tmp_path / "x.npz", "--json").json
    assert set(found) >= KEYS and all(set(row) >= LAYER for row in found["layers"])
    assert found["output"] == str(out) and "40 inputs" in found["calibration"]
    assert found["weight_bytes"] == found["weight_bytes_on_disk"]
    shown = run("inspect", out, "--json").json
    assert shown["weight_bytes"] == found["weight_bytes"] and len(shown["layers"]) == 2
    arguments = ("evaluate", out, "--model", f"{net}:{name}", "--task", "classification", "--data", tmp_path / "xy.npz")
    scored = run(*arguments, "--json").json
    assert set(scored) >= {"task", "metrics", "n", "interval"} and scored["n"] == 40
    low, high = scored["interval"]
    assert 0 <= low <= scored["metrics"]["accuracy"] <= high <= 1
    plain = run("evaluate", f"{net}:{name}", "--task", "classification", "--data", tmp_path / "xy.npz", "--json").json
    assert abs(plain["metrics"]["accuracy"] - scored["metrics"]["accuracy"]) <= 0.1


CONVOLUTIONS = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
"""


@pytest.mark.filterwarnings("ignore:byte convolutions run as float ones")  # on CPUs without VNNI
def test_byte_chains_are_named_by_quantize_and_run_by_evaluate(run: Run, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(CONVOLUTIONS)
    net, out = f"{tmp_path / 'net.py'}:build", tmp_path / "out"
    generator = np.random.default_rng(0)
    inputs, labels = generator.standard_normal((40, 3, 10, 10)).astype(np.float32), generator.integers(0, 3, 40)
    np.savez(tmp_path / "xy.npz", inputs=inputs, labels=labels)
    data, common = tmp_path / "xy.npz", ("--scheme", "W8A8_STATIC", "--method", "rtn")
    told = run("quantize", net, "-o", out, *common, "--calibration", data).out
    assert "3 static convolutions" in told and "evaluate --fuse" in told
    scoring = ("evaluate", out, "--model", net, "--task", "classification", "--data", data)
    plain, fused = run(*scoring, "--json").json, run(*scoring, "--fuse", "--json").json
    assert fused["n"] == plain["n"] == 40 and abs(fused["metrics"]["accuracy"] - plain["metrics"]["accuracy"]) <= 0.1
    assert any("byte chains: 2 of 3 convolutions hand on bytes" in note for note in fused["notes"])
    given = run(*scoring, "--fuse", "--calibration", data, "--json").json
    assert given["metrics"] == fused["metrics"]
    run(*scoring, "--calibration", data).refused("give --fuse, too")
    run("evaluate", net, *scoring[4:], "--fuse").refused("no convolution hands bytes")
    batches = (*scoring[:-1], f"{tmp_path / 'net.py'}:build", "--fuse")
    run(*batches).refused("byte chains need a few inputs")


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC", "W8A16", "w4a16"])
def test_a_hugging_face_model_from_end_to_end(scheme: str, run: Run, llama: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", llama.parent / "text.txt"
    arguments = ("--scheme", scheme, "--method", "smoothquant", "--calibration", text, "--json")
    made = run("quantize", llama, "-o", out, *arguments).json
    assert {row["status"] for row in made["regions"]} == {"folded"}
    assert len([row for row in made["layers"] if row["status"] == "quantized"]) == 7
    figures = [
        run("evaluate", model, "--task", "perplexity", "--data", text, "--json").json["metrics"]["perplexity"]
        for model in (llama, out)
    ]
    assert figures[1] == pytest.approx(figures[0], rel=0.05)
    assert (out / "tokenizer.json").exists() and (out / "config.json").exists()


def test_the_built_in_text_is_announced(run: Run, llama: Path, tmp_path: Path) -> None:
    done = run("quantize", llama, "-o", tmp_path / "out", "--samples", "4", "--sequence-length", "16", "--json")
    assert "built-in text" in done.json["calibration"]
    assert "Calibrating on 4 blocks" in done.err and "--calibration FILE" in done.err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_back_bit_for_bit(dtype: str, run: Run, llama: Path, tmp_path: Path) -> None:
    made = run("quantize", llama, "-o", tmp_path / "out", "--dtype", dtype, "--samples", "4", "--json").json
    assert "output of a calibration batch" in made["compared"]
    assert next(row for row in made["layers"] if row["name"] == "lm_head")["format"] == dtype


def test_the_default_output_stands_beside_the_caller(run: Run, net: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("quantize", "net.py:build", "--method", "rtn").code == 0
    assert (tmp_path / "build-W8A8" / "evenbits.json").exists()
    run("quantize", "net.py:build", "--method", "rtn").refused("build-W8A8 exists")


def test_options_reach_the_pipeline(run: Run, net: str, tmp_path: Path) -> None:
    arguments = ["quantize", f"{net}:build", "-o", tmp_path / "out", "--calibration", tmp_path / "x.npz"]
    made = run(*arguments, "--alpha", "0.25", "--ignore", "3", "--samples", "10", "--batch-size", "4", "--json").json
    assert [row["alpha"] for row in made["regions"]] == [0.25]
    assert {row["name"]: row["status"] for row in made["layers"]} == {"1": "quantized", "3": "float"}
    assert made["calibration_batches"] == 3 and "10 inputs" in made["calibration"]


def test_tables_for_people(run: Run, net: str, tmp_path: Path) -> None:
    done = run("quantize", f"{net}:build", "-o", tmp_path / "out", "--calibration", tmp_path / "x.npz")
    assert done.code == 0
    for expected in ("2 layers quantized", "2 regions", "folded", "equal bit for bit", "Next: evenbits"):
        assert expected in done.out
    assert f"evenbits inspect {tmp_path / 'out'}\n" in done.out  # whole, to be copied
    done = run("inspect", tmp_path / "out")
    assert done.code == 0 and "true bits per quantized weight" in done.out and "All files intact" in done.out
    done = run("evaluate", f"{net}:build", "--task", "classification", "--data", tmp_path / "xy.npz")
    assert done.code == 0 and "accuracy" in done.out and "95 % interval" in done.out


def test_a_folder_with_brackets_in_its_name_can_be_shown(run: Run, net: str, tmp_path: Path) -> None:
    (tmp_path / "[").mkdir()
    out = tmp_path / "[" / "red]"
    assert run("quantize", f"{net}:build", "-o", out, "--method", "rtn").code == 0
    done = run("inspect", out)
    assert done.code == 0 and str(out) in done.out.replace("\n", "")


def test_in_a_process_of_its_own_json_is_all_there_is(net: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evenbits", "quantize", f"{net}:noisy", "-o", str(tmp_path / "out"), "--json"]
    command += ["--calibration", str(tmp_path / "x.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = Done(done.returncode, done.stdout, done.stderr)
    assert set(found.json) >= KEYS and "a library that prints" in done.stderr
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("evenbits: the output folder")


def test_overwriting_is_asked_for(run: Run, net: str, tmp_path: Path) -> None:
    arguments = ["quantize", f"{net}:build", "-o", tmp_path / "out", "--method", "rtn", "--json"]
    run(*arguments)
    run(*arguments).refused("exists")
    assert run(*arguments, "--overwrite").json["output"] == str(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------- what is refused


def test_an_existing_output_is_refused_before_any_work(run: Run, tmp_path: Path) -> None:
    """The model's file would fail when it is opened; it never is."""
    (tmp_path / "net.py").write_text("raise RuntimeError('opened')\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    run("quantize", f"{tmp_path}/net.py:build", "-o", tmp_path / "out").refused("exists")
    run("quantize", f"{tmp_path}/net.py:build", "-o", tmp_path / "out", "--overwrite").refused("other than")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--scheme", "W8A9"], "Did you mean 'W8A8'"),
        (["--scheme", "none.yaml"], "none.yaml cannot be read"),
        (["--method", "smoothqant"], "Did you mean 'smoothquant'"),
        (["--method", "rtn", "--alpha", "0.5"], "alpha"),
        (["--alpha", "7"], "between 0 and 1"),
        (["--alpha", "much"], "alpha is a number from 0 to 1, 'auto' or"),
        (["--alpha", "auto:0.7:0.3:0.1"], "a grid of alpha"),
        (["--alpha", "auto", "--criterion", "median"], "criterion"),
        (["--alpha", "auto", "--scope", "model"], "scope"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--calibration", "none.npz"], "none.npz"),
        (["--calibration", "none.txt"], "none.txt"),
        ([], "needs a tokenizer"),
        (["--scheme", "W8A8_STATIC", "--method", "rtn"], "needs a tokenizer"),
        (["--ignore", "*"], "ignored by the scheme"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_errors_are_one_line(
    arguments: list[str], match: str, as_json: bool, run: Run, net: str, tmp_path: Path
) -> None:
    needs_data = "--ignore" in arguments or ("--alpha" in arguments and "rtn" not in arguments)
    given = ["--calibration", str(tmp_path / "x.npz")] if needs_data else []
    done = run("quantize", f"{net}:build", "-o", tmp_path / "out", *arguments, *given, *(["--json"] if as_json else []))
    if needs_data:  # the line that says what the data is comes before the one that says what is wrong
        done = Done(done.code, done.out, "\n".join(done.err.splitlines()[-1:]))
    done.refused(match)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "match"),
    [("broken", "NaN or infinite"), ("norm", "no layer"), ("absent", "has no 'absent'")],
)
def test_models_that_cannot_be_quantized(name: str, match: str, run: Run, net: str, tmp_path: Path) -> None:
    done = run("quantize", f"{net}:{name}", "-o", tmp_path / "out", "--method", "rtn")
    Done(done.code, done.out, "\n".join(done.err.splitlines()[-1:])).refused(match)
    assert not (tmp_path / "out").exists()


def test_nan_in_calibration_is_refused(run: Run, net: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "nan.npz", inputs=np.full((4, 16), np.nan, np.float32))
    done = run("quantize", f"{net}:build", "-o", tmp_path / "out", "--calibration", tmp_path / "nan.npz")
    assert done.code == 1 and done.out == "" and "NaN" in done.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["quantize", "evaluate", "inspect"])
def test_a_model_that_is_not_there(command: str, run: Run, tmp_path: Path) -> None:
    arguments = {"evaluate": ["--task", "perplexity", "--data", tmp_path / "x.txt"], "inspect": []}
    (tmp_path / "x.txt").write_text("words")
    run(command, tmp_path, *arguments.get(command, ["-o", tmp_path / "out"])).refused(str(tmp_path))


def test_evaluate_refuses_what_it_cannot_do(run: Run, net: str, tmp_path: Path) -> None:
    model = f"{net}:build"
    run("evaluate", model, "--task", "perplexty", "--data", tmp_path / "xy.npz").refused("Did you mean 'perplexity'")
    run("evaluate", model, "--task", "perplexity", "--data", "none.txt").refused("")
    run("evaluate", model, "--task", "classification", "--data", "none.npz").refused("none.npz")
    run("evaluate", model, "--task", "classification", "--data", tmp_path / "xy.npz", "--stride", "3").refused("stride")
    run("evaluate", "none.py:x", "--task", "classification", "--data", tmp_path / "xy.npz").refused("does not exist")


def test_a_checkpoint_that_needs_its_factory_says_so_and_refuses_another(run: Run, net: str, tmp_path: Path) -> None:
    run("quantize", f"{net}:build", "-o", tmp_path / "out", "--method", "rtn")
    arguments = ["evaluate", tmp_path / "out", "--task", "classification", "--data", tmp_path / "xy.npz"]
    run(*arguments).refused("--model FILE.py:factory")
    run(*arguments, "--model", f"{net}:other").refused("belongs to another model")
    run(*arguments, "--model", f"{net}:linears").refused("")


def test_a_damaged_checkpoint_is_refused_by_every_command(run: Run, llama: Path, tmp_path: Path) -> None:
    run("quantize", llama, "-o", tmp_path / "out", "--method", "rtn")
    weights = tmp_path / "out" / "evenbits.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 4
    weights.write_bytes(data)
    run("inspect", tmp_path / "out").refused("altered")
    arguments = ["--task", "perplexity", "--data", llama.parent / "text.txt"]
    run("evaluate", tmp_path / "out", *arguments).refused("altered")


def test_a_quantized_model_is_not_quantized_again(run: Run, llama: Path, tmp_path: Path) -> None:
    run("quantize", llama, "-o", tmp_path / "out", "--method", "rtn")
    run("quantize", tmp_path / "out", "-o", tmp_path / "again").refused("quantized already")


def test_an_error_of_several_lines_becomes_one(run: Run, monkeypatch: Any) -> None:
    def fail() -> None:
        raise evenbits.EvenbitsError("first line\n  second line\n\nthird")

    monkeypatch.setattr(cli, "app", fail)
    done = run()
    done.refused("first line second line third")


@pytest.mark.parametrize(
    "arguments",
    [["quantise"], ["quantize"], ["inspect"], ["quantize", "x", "--alfa", "1"], ["quantize", "x", "--samples", "0"],
     ["quantize", "x", "--samples", "much"]],
)  # fmt: skip
def test_wrong_options_exit_with_two(arguments: list[str], run: Run) -> None:
    done = run(*arguments)
    assert done.code == 2 and done.out == "" and done.err


def test_an_interruption_says_that_nothing_was_written(run: Run, net: str, tmp_path: Path, monkeypatch: Any) -> None:
    from evenbits.pipeline import run as pipeline

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "quantize", interrupt)
    done = run("quantize", f"{net}:build", "-o", tmp_path / "out", "--method", "rtn")
    assert done.code == 130 and done.out == "" and "interrupted; nothing was written" in done.err
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- real models


@pytest.mark.data
@pytest.mark.parametrize("method", ["smoothquant", "rtn"])
def test_minilm_on_sst2(method: str, run: Run, test_data: Path, tmp_path: Path) -> None:
    """Float accuracy on the 872 sentences is 0.8739; W8A8 stays within half a point."""
    out = tmp_path / "out"
    model = test_data / "minilm_glue" / "sst2"
    made = run("quantize", model, "-o", out, "--scheme", "W8A8", "--method", method, "--samples", "32", "--json").json
    encoder = [row for row in made["layers"] if ".encoder.layer." in row["name"]]
    assert len(encoder) == 6 * made_per_block(encoder) and all(row["status"] == "quantized" for row in encoder)
    assert made["weight_bytes"] / made["float_weight_bytes"] <= 0.26
    assert made["weight_bytes_on_disk"] / made["float_weight_bytes"] <= 0.26
    assert all(row["sqnr_db"] > 30 and row["output_sqnr_db"] > 20 for row in encoder)
    if method == "smoothquant":
        blocks = [row for row in made["regions"] if ".encoder.layer." in row["name"]]
        assert len(blocks) == 6 * 4 and all(row["status"] in ("folded", "multiplied") for row in blocks)
    arguments = ["--task", "classification", "--data", test_data / "sst2" / "dev.tsv", "--json"]
    scored = run("evaluate", out, *arguments).json
    assert scored["n"] == 872
    assert abs(scored["metrics"]["accuracy"] - 0.8739) <= 0.005


def made_per_block(rows: list[dict[str, Any]]) -> int:
    """Linear layers of the first block."""
    count = sum(".encoder.layer.0." in row["name"] for row in rows)
    assert count == 6
    return count


@pytest.mark.data
def test_stories_keep_their_perplexity(run: Run, test_data: Path, tmp_path: Path) -> None:
    model, out = test_data / "stories260k_llama", tmp_path / "out"
    text = (test_data / "caltext" / "tiny.utf8").read_text(encoding="utf-8")[:60_000]
    (tmp_path / "tiny.txt").write_text(text, encoding="utf-8")
    made = run("quantize", model, "-o", out, "--json").json
    assert {row["status"] for row in made["regions"]} <= {"folded", "multiplied"}
    arguments = ["--task", "perplexity", "--data", tmp_path / "tiny.txt", "--json"]
    before, after = (run("evaluate", m, *arguments).json for m in (model, out))
    assert before["n"] == after["n"] > 10
    assert after["metrics"]["perplexity"] == pytest.approx(before["metrics"]["perplexity"], rel=0.01)
    low, high = after["interval"]
    assert low < after["metrics"]["perplexity"] < high
    loaded = evenbits.load(out)
    prompt = torch.tensor([[1, 403, 407]])
    made_ids = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    assert made_ids.shape[1] > prompt.shape[1] and torch.equal(made_ids[:, :3], prompt)
