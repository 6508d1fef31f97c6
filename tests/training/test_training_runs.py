"""Whole runs on made-up pictures: alone, as a pipeline, as replicas; interrupted, continued, diverged."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evenbits.training import __main__ as command
from evenbits.training import state

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Runs are compared bit by bit, and sums in float32 depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training pictures and 8 test pictures, CIFAR-10's binary version."""
    made = tmp_path_factory.mktemp("data")
    (made / "cifar10").mkdir()
    torch.manual_seed(0)
    for name, count in [("test_batch", 8), ("data_batch_1", 20), *((f"data_batch_{i}", 1) for i in range(2, 6))]:
        table = torch.randint(256, (count, 3073), dtype=torch.uint8)
        table[:, 0] %= 10
        (made / "cifar10" / f"{name}.bin").write_bytes(bytes(table.flatten().tolist()))
    return made


def words(folder: Path, out: Path, *more: str, steps: int = STEPS) -> list[str]:
    base = f"--recipe cifar10_mobilenetv2 --data {folder} --out {out} --size 32 --batch 8 --microbatches 2"
    codecs = f"--forward int4:g128 --backward top0.5+int8:g128 --steps {steps} --telemetry-every 2"
    return [*base.split(), *codecs.split(), "--weights", "", *more]


def log(out: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"log-rank{rank}.jsonl").read_text().splitlines()]


def untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if "seconds" not in k}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def final(out: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    newest = state.newest(out)
    assert newest is not None
    tensors: dict[str, torch.Tensor] = {}
    state.pack(state.read(newest / f"rank{rank}.safetensors"), tensors)
    return tensors


def same(a: Path, b: Path, rank: int = 0, *, padding: int = 0) -> None:
    """padding: bytes that may differ per step."""
    mine, theirs = final(a, rank), final(b, rank)
    assert list(mine) == list(theirs) and len(mine) > 10
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    lines = list(zip(untimed(log(a, rank)), untimed(log(b, rank)), strict=True))
    assert all(abs(x.pop("bytes") - y.pop("bytes")) <= padding * len(lines) for x, y in lines)
    assert all(x == y for x, y in lines)


def ranks(arguments: list[str], world: int = 2) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    start = [sys.executable, "-m", "evenbits.training", *arguments]
    return [
        subprocess.Popen(
            start, env={**shared, "RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for r in range(world)
    ]


def ended(processes: list[subprocess.Popen[str]], code: int = 0) -> list[str]:
    """Standard output of every rank."""
    try:
        found = [p.communicate(timeout=120) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [code] * len(processes), [err[-3000:] for _, err in found]
    return [out for out, _ in found]


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert command.main(words(folder, out)) == 0
    return out


def test_the_log_says_loss_bytes_and_what_the_codecs_did(alone: Path) -> None:
    lines = log(alone)
    assert [line["step"] for line in lines] == list(range(STEPS))
    measured = [line for line in lines if line["codecs"]]
    assert [line["step"] for line in measured] == [0, 2, 4]
    for line in measured:
        lanes = {f["direction"]: f for f in line["codecs"]}
        assert set(lanes) == {"forward", "backward"}
        assert lanes["forward"]["snr_db"] > 10 and lanes["forward"]["dc_ratio"] >= 0
        assert sum(f["bytes"] for f in line["codecs"]) == line["bytes"] - (
            lines[line["step"] - 1]["bytes"] if line["step"] else 0
        )


@pytest.mark.slow
def test_a_pipeline_goes_through_the_same_numbers(folder: Path, alone: Path, tmp_path: Path) -> None:
    """Under torchrun; the model's parts are on two ranks, losses and bytes together are those of one process."""
    out = tmp_path / "run"
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "evenbits.training"]
    done = subprocess.run([*start, *words(folder, out)], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    mine, theirs = [log(out, rank) for rank in (0, 1)], log(alone)
    assert [line["loss"] for line in mine[1]] == [line["loss"] for line in theirs]
    assert [a["bytes"] + b["bytes"] for a, b in zip(*mine, strict=True)] == [line["bytes"] for line in theirs]
    assert all(line["loss"] is None for line in mine[0])
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["loss"] == theirs[-1]["loss"] and 0 <= result["accuracy"] <= 1


def test_a_run_that_is_continued_equals_one_that_was_not_interrupted(folder: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    original = command.Run._step

    def killed(self: Any) -> Any:
        if self.done == 4:
            raise KeyboardInterrupt
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.Run, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            command.main(words(folder, out, "--checkpoint-every", "3"))
    assert len(log(out)) == 4  # One line lies after the checkpoint, and is written again.
    assert command.main(words(folder, out)) == 1
    assert command.main(words(folder, out, "--resume", "--seed", "3")) == 1
    assert command.main(words(folder, out, "--resume")) == 0
    same(out, alone)


@pytest.mark.slow
def test_sigterm_leaves_a_pipeline_that_continues_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    arguments = words(folder, out, "--checkpoint-every", "0", steps=12)
    processes = ranks(arguments)
    deadline = time.monotonic() + 60
    while not (out / "log-rank1.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    processes[0].send_signal(signal.SIGTERM)
    ended(processes, 128 + signal.SIGTERM)
    newest = state.newest(out)
    assert newest is not None and 0 < int(newest.name.removeprefix("step-")) < 12
    ended(ranks([*arguments, "--resume"]))
    ended(ranks(words(folder, whole, "--checkpoint-every", "0", steps=12)))
    for rank in (0, 1):
        same(out, whole, rank)


@pytest.mark.slow
def test_replicas_with_error_feedback_continue_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    more = ["--data-parallel", "int4:g128+ef", "--checkpoint-every", "2", "--microbatches", "1"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    ended(ranks(words(folder, whole, *more, steps=4)))
    first, second = state.folder_of(whole, 2), out / "checkpoints" / "step-00000002"
    second.mkdir(parents=True)
    for file in (*first.iterdir(), whole / "run.json"):
        target = out if file.name == "run.json" else second
        (target / file.name).write_bytes(file.read_bytes())
    for rank in (0, 1):
        (out / f"log-rank{rank}.jsonl").write_bytes((whole / f"log-rank{rank}.jsonl").read_bytes())
    ended(ranks(words(folder, out, *more, "--resume", steps=4)))
    for rank in (0, 1):
        same(out, whole, rank, padding=16)  # DDP begins with other buckets, and each is filled up to eight bytes.
    kept = state.read(state.folder_of(whole, 4) / "rank0.safetensors")["engine"]["codecs"]["hook"]["errors"]
    assert kept and any(float(error.abs().max()) > 0 for error in kept.values())
    models = [state.read(state.folder_of(whole, 4) / f"rank{r}.safetensors")["engine"]["model"] for r in (0, 1)]
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0] if "running" not in k and "num_b" not in k)


def test_a_loss_that_is_not_finite_is_a_clear_error(folder: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = words(folder, tmp_path / "run", "--rate", "1e30", "--forward", "raw", "--backward", "raw")
    assert command.main(arguments) == 1
    said = capsys.readouterr().err
    assert "is NaN or infinite" in said and "lower rate" in said


@pytest.mark.slow
def test_a_pipeline_that_diverges_ends_on_all_ranks(folder: Path, tmp_path: Path) -> None:
    processes = ranks(words(folder, tmp_path / "run", "--rate", "1e30"))
    found = [p.communicate(timeout=120)[1] for p in processes]
    assert [p.returncode for p in processes] == [1, 1], found
    assert all("NaN or infinite" in text and "Traceback" not in text for text in found), found


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--data-parallel", "int8:g128+ef", "--microbatches", "1"]])
def test_a_killed_rank_is_one_error_on_the_other_and_the_run_continues(
    folder: Path, tmp_path: Path, more: list[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    arguments = words(folder, out, "--checkpoint-every", "2", "--timeout", "30", *more, steps=12)
    processes = ranks(arguments)
    until = time.monotonic() + 90
    while state.newest(out) is None and time.monotonic() < until:
        time.sleep(0.02)
    processes[1].kill()
    killed = time.monotonic()
    said = processes[0].communicate(timeout=60)[1]
    processes[1].communicate()
    assert processes[0].returncode == 1 and time.monotonic() - killed < 45
    errors = [line for line in said.splitlines() if line.startswith("evenbits.training: ")]
    assert len(errors) == 1 and "rank(s) [1] said nothing: killed, stalled or cut off" in errors[0], said
    assert "Traceback" not in said
    ended(ranks([*arguments, "--resume"]))
    ended(ranks(words(folder, whole, "--checkpoint-every", "2", *more, steps=12)))
    for rank in (0, 1):
        same(out, whole, rank, padding=16 if more else 0)


@pytest.mark.slow
def test_a_guard_climbs_the_ladder_at_the_same_step_in_one_process_and_in_a_pipeline(
    folder: Path, tmp_path: Path
) -> None:
    more = ["--forward", "int2:g128>int8:g128", "--backward", "uint1:tensor:affine:free>int8:g128", "--guard", "raise"]
    more += ["--telemetry-every", "1", "--cuts", "stem"]
    assert command.main(words(folder, tmp_path / "one", *more, steps=8)) == 0
    ended(ranks(words(folder, tmp_path / "two", *more, steps=8)))
    one, two = log(tmp_path / "one"), [log(tmp_path / "two", rank) for rank in (0, 1)]
    assert [line["loss"] for line in one] == [line["loss"] for line in two[1]]
    used = [[f["codec"] for f in line["codecs"] if f["direction"] == "backward"] for line in one]
    assert used == [[f["codec"] for f in line["codecs"] if f["direction"] == "backward"] for line in two[1]]
    assert used[0] == ["uint1:tensor:affine:free"] and used[-1] == ["int8:g128"]


def test_a_guard_warns_in_one_line_and_its_state_resumes(folder: Path, tmp_path: Path, capsys: Any) -> None:
    more = [
        "--backward",
        "uint1:tensor:affine:free>int8:g128",
        "--guard",
        "raise",
        "--telemetry-every",
        "1",
        "--cuts",
        "stem",
    ]
    whole, out = words(folder, tmp_path / "whole", *more), words(folder, tmp_path / "run", *more)
    assert command.main(whole) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "harms the backward tensors of edge 0" in line]
    assert (
        said and said[0].startswith("evenbits.training: codec") and "it uses 'int8:g128' from the next step" in said[0]
    )
    original = command.Run._step

    def killed(self: Any) -> Any:
        if self.done == 2:
            raise KeyboardInterrupt
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.Run, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            command.main([*out, "--checkpoint-every", "2"])
    assert command.main([*out, "--resume"]) == 0
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--forward", "int4:g128>int8:g128"], "nothing climbs the ladder int4:g128>int8:g128 without --guard raise"),
        (["--guard", "panic"], "unknown guard"),
        (["--guard", "warn", "--data-parallel", "int8:g128"], "a guard watches cuts"),
        (["--device", "tpu"], "unknown device"),
        (["--device", "cuda:99"], "torch sees"),
        (["--cuts", "blok6"], "Did you mean 'block6'"),
        (["--data-parallel", "int8:g128"], "torchrun"),
        (["--recipe", "cifar"], "unknown recipe"),
        (["--batch", "32"], "do not fill a batch"),
    ],
)
def test_wrong_options_say_what_is_allowed(
    folder: Path, tmp_path: Path, capsys: Any, more: list[str], says: str
) -> None:
    assert command.main(words(folder, tmp_path / "run", *more)) == 1
    assert says in capsys.readouterr().err


def test_data_come_from_the_environment_or_from_here(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = words(folder, tmp_path / "run", steps=1)
    place = given.index("--data")
    given = given[:place] + given[place + 2 :]
    monkeypatch.chdir(tmp_path)
    for value in ("", str(tmp_path / "nowhere")):
        monkeypatch.setenv("EVENBITS_TEST_DATA", value)
        assert command.main(given) == 1
        said = capsys.readouterr().err
        assert "EVENBITS_TEST_DATA" in said and "./data" in said and "--data DIR" in said
    monkeypatch.setenv("EVENBITS_TEST_DATA", str(folder))
    assert command.main(given) == 0


def test_a_pipeline_of_another_length_than_the_cuts_is_refused(folder: Path, tmp_path: Path) -> None:
    processes = ranks(words(folder, tmp_path / "run", "--cuts", "stem,features"))
    found = [p.communicate(timeout=120)[1] for p in processes]
    assert all(p.returncode == 1 for p in processes) and all("make 3 stages" in text for text in found)


@pytest.mark.slow
@pytest.mark.data
def test_the_commands_of_the_documentation_run(test_data: Path, tmp_path: Path) -> None:
    """Every torchrun line of docs/training.md, and the issue's own without --data, with fewer steps and examples."""
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text().replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("torchrun") and "[" not in line]
    assert len(lines) >= 3
    small = "--steps 2 --train 32 --test 8 --batch 8 --microbatches 2".split()
    environment = {**os.environ, "EVENBITS_TEST_DATA": str(test_data), "OMP_NUM_THREADS": "1"}
    for i, (_, *line) in enumerate(lines):
        given = [
            str(test_data) if word == "DIR" else str(tmp_path / f"{i}") if word == "RUN" else word for word in line
        ]
        size = ["--size", "32" if "cifar10" in " ".join(line) else "24"]
        start = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
        start += ["--rdzv-endpoint", "localhost:0", *given, *small, *size]
        done = subprocess.run(start, capture_output=True, text=True, timeout=180, check=False, env=environment)
        assert done.returncode == 0, f"{' '.join(line)}: {done.stderr[-3000:]}"
        assert json.loads(done.stdout.splitlines()[-1])["steps"] == 2


@pytest.mark.data
def test_an_embedding_is_pruned_in_one_process_only_if_that_was_asked_for(test_data: Path, capsys: Any) -> None:
    small = "--task rte --size 24 --steps 1 --train 8 --test 8 --batch 8 --microbatches 1 --forward top0.5+int8:g128"
    given = ["--recipe", "text_classification", "--data", str(test_data), *small.split()]
    assert command.main([*given, "--cuts", "embedding"]) == 1
    assert "would prune the output of an embedding" in capsys.readouterr().err
    assert command.main([*given, "--cuts", "embedding", "--prune-embeddings"]) == 0
    assert command.main([*given, "--cuts", "layer0"]) == 0


@pytest.mark.data
def test_the_recipes_start_on_the_real_data(test_data: Path, tmp_path: Path, capsys: Any) -> None:
    base = [
        "--data",
        str(test_data),
        "--batch",
        "8",
        "--microbatches",
        "1",
        "--steps",
        "2",
        "--train",
        "32",
        "--test",
        "8",
    ]
    assert command.main(["--recipe", "cifar10_mobilenetv2", "--size", "32", *base]) == 0
    for task in ("cola", "rte"):
        assert command.main(["--recipe", "text_classification", "--task", task, "--size", "24", *base]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [sorted(set(line) - {"rank", "loss", "steps", "bytes"}) for line in lines] == [
        ["accuracy"],
        ["Matthews correlation"],
        ["accuracy"],
    ]
