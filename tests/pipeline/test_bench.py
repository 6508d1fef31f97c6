"""The benchmark on small nets: which variants stand in the tables, what is said of those that do not, and memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import evenbits
from evenbits.errors import EvenbitsError
from evenbits.nn.base import QuantizedLayer
from evenbits.pipeline import peers as peers_module
from evenbits.pipeline.bench import Wish, bench
from evenbits.pipeline.bench_inputs import Inputs, items
from evenbits.pipeline.peers import PEERS, peers
from evenbits.pipeline.variants import Variant, decoded, served

SOURCE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(),
                         nn.Linear(512, 4))
"""
WISH = Wish(Inputs(image=(3, 16, 16)), seconds=0.2, memory=False)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(FILE.py:build, the static checkpoint of it)"""
    folder = tmp_path_factory.mktemp("net")
    (folder / "net.py").write_text(SOURCE)
    factory, out = f"{folder / 'net.py'}:build", folder / "out"
    from evenbits.checkpoints.sources import open_model

    model = open_model(factory).model
    evenbits.quantize(model, scheme="W8A8_STATIC", method="rtn", data=[torch.randn(2, 3, 16, 16)])
    evenbits.save(model, out)
    return factory, str(out)


@pytest.mark.filterwarnings("ignore:byte convolutions run as float ones")  # on CPUs without VNNI
def test_every_variant_is_in_the_table_once_and_each_missing_peer_is_named(net: tuple[str, str]) -> None:
    factory, out = net
    found = bench(out, WISH, against=factory, factory=factory)
    names = [row.variant for row in found.speed]
    assert names == list(dict.fromkeys(names))
    assert names[:4] == ["evenbits", "evenbits byte chains", "float32", "bfloat16"]
    told = " ".join(found.notes)
    assert {"torchao int8 dynamic", "openvino NNCF int8"} < set(PEERS)
    for peer in PEERS:
        assert peer in names or f"{peer}: not measured" in told
    assert "hand on bytes" in told
    (base,) = (row for row in found.speed if row.variant == "float32")
    assert base.speedup == 1.0 and base.unit == "samples"
    ours = next(row for row in found.memory if row.variant == "evenbits")
    assert ours.weight_bytes is not None and ours.weight_bytes < found.memory[2].weight_bytes / 3  # type: ignore[operator]
    assert set(found.kernels) >= {"cpu"} and "(" in found.kernels["cpu"]
    assert set(found.layers) == {"0", "2", "5"} and json.loads(json.dumps(found.to_json()))


def test_without_the_float_model_its_decoded_weights_stand_in(net: tuple[str, str]) -> None:
    factory, out = net
    found = bench(
        out, Wish(WISH.inputs, batches=(1, 2), seconds=0.1, fuse=False, peers=False, memory=False), factory=factory
    )
    assert "decoded" in found.against and any("--no-fuse" in note for note in found.notes)
    assert [(row.variant, row.batch) for row in found.speed] == [
        (name, size) for size in (1, 2) for name in ("evenbits", "float32", "bfloat16")
    ]


def test_a_float_model_is_timed_by_itself(net: tuple[str, str]) -> None:
    found = bench(net[0], Wish(WISH.inputs, seconds=0.1, peers=False, memory=False))
    assert [row.variant for row in found.speed] == ["float32", "bfloat16"] and not found.layers


def test_peak_memory_is_of_a_process_of_its_own(net: tuple[str, str]) -> None:
    factory, out = net
    ballast = torch.ones(300_000_000 // 4)  # would be in the peak of this process
    found = bench(out, Wish(WISH.inputs, seconds=0.1, peers=False, fuse=False), against=factory, factory=factory)
    peaks = {row.variant: row.peak for row in found.memory}
    for name in ("evenbits", "float32"):
        peak = peaks[name]
        assert peak is not None and peak.before <= peak.loaded <= peak.peak < peak.before + ballast.nbytes
    assert peaks["bfloat16"] is None


def test_decoded_layers_compute_what_weight_only_layers_do() -> None:
    x = torch.randn(2, 4, 9, 9)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, groups=2), nn.Flatten(), nn.Linear(200, 3, bias=False))
    evenbits.quantize(model, scheme="W8A16", method="rtn")
    plain = decoded(model)
    assert not any(isinstance(m, QuantizedLayer) for m in plain.modules()) and isinstance(model[0], QuantizedLayer)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
    assert set(served(model).values()) == {"float product of decoded weights"}


def test_groups_whose_sums_float32_cannot_hold_are_no_byte_products() -> None:
    model = nn.Sequential(nn.Conv2d(2048, 2, 5, groups=2))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    evenbits.quantize(model, scheme="W8A8", method="rtn")
    assert not model[0].takes_bytes
    assert served(model)["0"].startswith("exact sums by windows")


def test_a_peer_that_cannot_take_the_model_is_named_with_its_reason() -> None:
    found, notes = peers(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8))
    assert all(variant.name != "torch dynamic int8" for variant in found)
    assert any(note.startswith("torch dynamic int8: not measured") and "linear layers only" in note for note in notes)


def test_a_peer_that_fails_at_its_first_call_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bitsandbytes does on a CPU where a layer has two outputs."""

    def broken(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("N must be divisible by block_n")

    monkeypatch.setitem(peers_module._BUILDERS, "torch dynamic int8", lambda *_: Variant("x", broken, None))
    found, notes = peers(nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8))
    assert all(variant.run is not broken for variant in found)
    assert "torch dynamic int8: not measured (AssertionError: N must be divisible by block_n)." in notes


@pytest.mark.parametrize(
    "words, message",
    [
        ({"data": None, "tokens": 4, "image": "3x8x8"}, "one of the two"),
        ({"data": None, "tokens": None, "image": "3x8"}, "3x224x224"),
        ({"data": None, "tokens": None, "image": "3x0x8"}, "3x224x224"),
    ],
)
def test_input_options_are_checked(words: dict[str, object], message: str) -> None:
    with pytest.raises(EvenbitsError, match=message):
        Inputs.parse(**words)  # type: ignore[arg-type]


def test_what_the_model_takes_must_be_known(net: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(EvenbitsError, match="--image"):
        bench(net[0], Wish(Inputs(), memory=False))
    with pytest.raises(EvenbitsError, match="float model"):
        bench(net[0], WISH, against=net[0])
    with pytest.raises(EvenbitsError, match="device"):
        bench(net[0], Wish(WISH.inputs, device="tpu"))


def test_items_are_tokens_or_samples() -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert items({"input_ids": ids}) == (10, "tokens") and items((torch.zeros(3, 4),)) == (3, "samples")
