"""The folder of a diagnosis: every picture is there, well-formed, and shows what it should; whole, or not at all."""

from __future__ import annotations

import json
import struct
import sys
import xml.etree.ElementTree as ElementTree
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evenbits.errors import EvenbitsError, MissingExtraError
from evenbits.pipeline.diagnose import Diagnosis, diagnose
from evenbits.pipeline.layer_errors import ErrorRow, LayerErrors
from evenbits.reporting import diagnosis as written
from evenbits.reporting.diagnosis import file_name, write_diagnosis
from evenbits.reporting.pictures import drawing, errors_picture, histogram_picture, shown, step_of

D = 16
KINDS = ("ranges", "histogram", "surface")


def scored() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(30, D), torch.arange(30) % 3)]


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    data = [torch.randn(6, D) for _ in range(3)]
    return diagnose(
        model, scheme="W8A8_STATIC", data=data, sizes=(3, 6, 18), task="classification", evaluation=scored()
    )


@pytest.fixture(scope="module")
def folder(found: Diagnosis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("diagnosis") / "out"
    names = write_diagnosis(found, path, "net: W8A8_STATIC, smoothquant")
    assert sorted(names) == sorted(file.name for file in path.iterdir())
    return path


def words(path: Path) -> str:
    """All text of an SVG; parsing it proves that it is well-formed."""
    tree = ElementTree.parse(path)
    assert tree.getroot().tag == "{http://www.w3.org/2000/svg}svg"
    return " ".join(text for node in tree.iter() for text in node.itertext() if text.strip())


def pixels(path: Path) -> tuple[int, int, bytes]:
    """Width, height and unpacked lines of a PNG, its checksums checked."""
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    position, data, size = 8, b"", (0, 0)
    while position < len(raw):
        (length,), kind = struct.unpack(">I", raw[position : position + 4]), raw[position + 4 : position + 8]
        body = raw[position + 8 : position + 8 + length]
        assert struct.unpack(">I", raw[position + 8 + length : position + 12 + length])[0] == zlib.crc32(kind + body)
        if kind == b"IHDR":
            size = struct.unpack(">II", body[:8])
        data += body if kind == b"IDAT" else b""
        position += 12 + length
    return (*size, zlib.decompress(data))


def test_every_picture_is_there_twice(folder: Path) -> None:
    stems = {"errors", "convergence", *(f"layer{n}-{name}-{k}" for n, name in ((1, "1"), (2, "3")) for k in KINDS)}
    others = {"diagnosis.json"}
    alike = {f"layer{n}-{name}-{k}" for n, name in ((1, "3"), (2, "1")) for k in KINDS} | {"errors", "convergence"}
    names = {file.name for file in folder.iterdir()} - others
    assert names in ({f"{s}.{e}" for s in chosen for e in ("svg", "png")} for chosen in (stems, alike))


def test_pictures_are_well_formed_and_not_blank(folder: Path) -> None:
    for file in folder.glob("*.png"):
        width, height, lines = pixels(file)
        assert width > 600 and height > 300
        assert len(set(lines)) > 20, file.name  # many colours, not one
    for file in folder.glob("*.svg"):
        assert words(file)
        assert "mathdefault" not in words(file)


def test_pictures_say_what_they_show(folder: Path, found: Diagnosis) -> None:
    errors = words(folder / "errors.svg")
    for expected in ("isolated", "cumulative", "model output", "SQNR, dB", "relative L1 loss", "net: W8A8_STATIC"):
        assert expected in errors
    look = found.looks[0]
    stem = f"layer1-{file_name(look.name)}"
    assert look.after is not None
    ranges = words(folder / f"{stem}-ranges.svg")
    for expected in ("before smoothing", "after smoothing", "input channel", "rounds to zero", "median channel"):
        assert expected in ranges
    histogram = words(folder / f"{stem}-histogram.svg")
    for expected in (f"{look.numbers:,} values", "255 values of the quantizer", "bits per code", "calibrated scale"):
        assert expected in histogram
    assert f"{look.before.entropy:.2f} bits" in histogram and f"{look.after.entropy:.2f} bits" in histogram
    surface = words(folder / f"{stem}-surface.svg")
    for expected in ("channel", "token", "|x|", f"largest {max(max(row) for row in look.before.surface):.3g}"):
        assert expected in surface
    settling = words(folder / "convergence.svg")
    for expected in ("absmax", "channel absmax", "static scale", "accuracy", "18", "per doubling", "worst layer"):
        assert expected in settling


def test_the_data_is_all_there(folder: Path, found: Diagnosis) -> None:
    stored = json.loads((folder / "diagnosis.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(found.to_json()))
    assert {"errors", "ranges", "regions", "looks", "accuracy", "convergence"} <= set(stored)


def test_the_same_diagnosis_gives_the_same_bytes(folder: Path, found: Diagnosis, tmp_path: Path) -> None:
    write_diagnosis(replace(found, looks=()), tmp_path / "out", "net: W8A8_STATIC, smoothquant")
    for name in ("errors.svg", "convergence.svg", "errors.png"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_hostile_names_are_only_names(found: Diagnosis, tmp_path: Path) -> None:
    name = "../../$x^{<script>&\x01" + "long" * 40
    rows = tuple(replace(row, name=name) for row in found.errors.rows)
    looks = (replace(found.looks[0], name=name),)
    hostile = replace(found, errors=replace(found.errors, rows=rows), looks=looks, convergence=None)
    write_diagnosis(hostile, tmp_path / "out", name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    for file in (tmp_path / "out").glob("*.svg"):
        text = words(file)
        assert "$x^{<script>&" in text
    assert len(shown(name)) <= 45


def test_figures_that_are_absent_or_infinite_can_be_drawn(tmp_path: Path) -> None:
    rows = (
        ErrorRow("a", "Linear", 0.0, float("inf"), None, None, "routed"),
        ErrorRow("b", "Linear", 0.1, 20.0, 0.2, 14.0),
    )
    with drawing():
        made = errors_picture(LayerErrors(rows, None, None, 1, 0), "title")
        made.savefig(tmp_path / "errors.svg")
        many = tuple(replace(rows[1], name=f"layer{index}") for index in range(300))
        errors_picture(LayerErrors(many, 0.1, 20.0, 1, 0), "title").savefig(tmp_path / "many.svg")
    assert "layer295" in words(tmp_path / "many.svg") and "layer296" not in words(tmp_path / "many.svg")


def test_few_values_of_a_quantizer_are_lines(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(D, 8)).eval()
    (look,) = diagnose(model, scheme="W4A4", method="rtn", data=[torch.randn(6, D)]).looks
    with drawing():
        histogram_picture(look).savefig(tmp_path / "histogram.svg")
    text = words(tmp_path / "histogram.svg")
    assert "15 values of the quantizer" in text and "nothing is smoothed" in text


def test_steps() -> None:
    assert step_of([]) is None and step_of([-2.0, -0.5, 0.0, 0.25, 3.0]) == 0.25 and step_of([-1.0, 0.0]) == 1.0


def test_without_matplotlib_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, found: Diagnosis, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"evenbits\[report\]"):
        write_diagnosis(found, tmp_path / "out", "title")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_a_failure_half_way_leaves_nothing(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, found: Diagnosis, tmp_path: Path
) -> None:
    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(written, "surface_picture", fails)
    with pytest.raises((EvenbitsError, KeyboardInterrupt)):
        write_diagnosis(found, tmp_path / "out", "title")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(found: Diagnosis, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(EvenbitsError, match="exists"):
        write_diagnosis(found, tmp_path, "title")
    with pytest.raises(EvenbitsError, match="exists"):
        write_diagnosis(found, tmp_path / "mine", "title")
    with pytest.raises(EvenbitsError, match="make it first"):
        write_diagnosis(found, tmp_path / "no" / "out", "title")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("name", "expected"), [("a.b-c_1", "a.b-c_1"), ("../x y", "x_y"), ("", "layer"), ("…", "layer")]
)
def test_names_of_files(name: str, expected: str) -> None:
    assert file_name(name) == expected
