"""The picture of channel ranges: well-formed, to scale, and safe with any text."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest

from evenbits.reporting.svg import channel_ranges

NS = "{http://www.w3.org/2000/svg}"


def drawn(*args: object, **kwargs: object) -> ET.Element:
    return ET.fromstring(channel_ranges(*args, **{"title": "t", **kwargs}))  # type: ignore[arg-type]


def bars(root: ET.Element) -> list[ET.Element]:
    return [rect for rect in root.iter(f"{NS}rect") if rect.get("class") == "bar"]


def test_one_bar_per_channel_that_is_not_dead() -> None:
    root = drawn([("before", [1.0, 0.0, 3.0]), ("after", [2.0, 2.0])])
    assert len(bars(root)) == 4
    titles = [bar.findtext(f"{NS}title") for bar in bars(root)]
    assert titles == ["channel 0: 1", "channel 2: 3", "channel 0: 2", "channel 1: 2"]


def test_heights_are_logarithmic_on_one_axis() -> None:
    root = drawn([("a", [1.0, 10.0, 100.0]), ("b", [10.0])])
    tops = [float(bar.get("y", "nan")) for bar in bars(root)]
    assert tops[0] - tops[1] == pytest.approx(tops[1] - tops[2], abs=0.2)
    assert tops[3] == pytest.approx(tops[1])


def test_a_dashed_line_marks_one_step_and_counts_what_never_reaches_it() -> None:
    root = drawn([("a", [127.0, 0.5, 0.9, 2.0, 0.0])])
    (line,) = [line for line in root.iter(f"{NS}line") if line.get("class") == "step"]
    note = next(text.text for text in root.iter(f"{NS}text") if text.get("class") == "note")
    assert note is not None and "step = 1:" in note and "3 of 5 channels never reach it" in note
    top = {bar.findtext(f"{NS}title"): float(bar.get("y", "nan")) for bar in bars(root)}
    assert top["channel 3: 2"] < float(line.get("y1", "nan")) < top["channel 2: 0.9"]


def test_another_number_of_levels_moves_the_step() -> None:
    root = drawn([("a", [7.0, 2.0])], levels=7)
    note = next(text.text for text in root.iter(f"{NS}text") if text.get("class") == "note")
    assert note is not None and "step = 1:" in note and "0 of 2" in note


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "a & b", '"quoted"', "]]>", "α → β"])
def test_text_is_escaped(text: str) -> None:
    root = drawn([(text, [1.0])], title=text)
    assert root.findtext(f"{NS}title") == text
    assert text in [element.text for element in root.iter(f"{NS}text")]
    assert not list(root.iter(f"{NS}script"))


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [1e-30], [1e30], [1.0], [1.0] * 4096, [1e-30, 1e30]])
def test_everything_stays_inside_the_picture(values: list[float]) -> None:
    root = drawn([("a", values), ("b", [1.0])])
    _, _, width, height = (float(part) for part in root.get("viewBox", "").split())
    for element in root.iter():
        for key in ("x", "x1", "x2", "y", "y1", "y2"):
            if (found := element.get(key)) is not None:
                assert math.isfinite(float(found)) and -1 <= float(found) <= (width if "x" in key else height) + 1
        if element.tag == f"{NS}rect":
            assert float(element.get("height", "nan")) > 0 and float(element.get("width", "nan")) > 0


def test_nothing_outside_is_loaded() -> None:
    text = channel_ranges([("a", [1.0])], title="t")
    assert text.count("http") == 1 and "href" not in text and "url(" not in text


def test_the_same_figures_give_the_same_picture() -> None:
    panels = [("a", [1.0, 2.0]), ("b", [3.0])]
    assert channel_ranges(panels, title="t") == channel_ranges(panels, title="t")
