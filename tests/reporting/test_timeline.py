"""The timeline picture: well-formed, every sample in place, GPU panels only where there was a GPU."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from evenbits.evaluation.monitor import Sample, Timeline
from evenbits.reporting.timeline import nice_step, panels, summary, timeline_svg, write_png

SPACE = "{http://www.w3.org/2000/svg}"


def made(gpu: bool = False, command: str = "python run.py") -> Timeline:
    rows = [
        Sample(i / 2, 90.0 + i, 10**8 * (1 + i % 5), 1, 40.0 if gpu else None, 10**9 if gpu else None)
        for i in range(21)
    ]
    return Timeline(command, 0.5, "none seen (no nvidia-smi)", rows, 3)


@pytest.mark.parametrize("gpu, count", [(False, 2), (True, 4)])
def test_one_line_a_panel_with_every_sample_inside(gpu: bool, count: int) -> None:
    root = ElementTree.fromstring(timeline_svg(made(gpu)))
    height = float(root.attrib["viewBox"].split()[3])
    lines = root.findall(f"{SPACE}polyline")
    assert len(lines) == count == len(panels(made(gpu)))
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        assert len(points) == 21 and points == sorted(points, key=lambda p: p[0])
        assert all(0 < x < 960 and 0 < y < height for x, y in points)


def test_the_words_say_peaks_and_the_end() -> None:
    text = timeline_svg(made())
    assert "peak 500.00 MB" in text and "exit code 3" in text and "10 s" in text


def test_a_command_is_escaped_cut_and_put_on_one_line() -> None:
    text = timeline_svg(made(command="x <&>\n" + "y" * 500))
    ElementTree.fromstring(text)
    assert "x &lt;&amp;&gt; yyy" in text and "…" in text


def test_nothing_measured_is_a_picture_all_the_same() -> None:
    empty = Timeline("true", 1.0, "")
    ElementTree.fromstring(timeline_svg(empty))
    assert "Nothing was measured" in summary(empty, [])


def test_the_summary_names_files_and_gpu() -> None:
    line = summary(made(gpu=True), [Path("a.svg")])
    assert "a.svg" in line and "1.00 GB at most" in line
    assert "none seen" in summary(made(), [])


def test_the_png_is_one(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert write_png(made(gpu=True), tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_steps_are_round() -> None:
    assert [nice_step(x, 4) for x in (4, 8, 9, 17, 1e9)] == [1, 2, 2.5, 5, 2.5e8]
