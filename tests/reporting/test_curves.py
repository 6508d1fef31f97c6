"""Curves as SVG: well-formed, to scale, words apart and inside the picture."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenbits.reporting.curves import Figure, Panel, spread_out, svg, ticks
from evenbits.reporting.png import png

NS = "{http://www.w3.org/2000/svg}"
X = (0.1, 0.5, 0.9)


def figure(panel: Panel, title: str = "t") -> Figure:
    return Figure(title, ("s",), "x", (panel, panel), ("c",))


def dots(root: ET.Element) -> list[tuple[float, float]]:
    return [
        (float(c.get("cx", "nan")), float(c.get("cy", "nan"))) for c in root.iter(f"{NS}circle") if c.get("r") == "3"
    ]


def test_points_are_to_scale_and_inside() -> None:
    root = ET.fromstring(svg(figure(Panel("l", X, (1.0, 2.0, 4.0), (0.5, 1.5, 3.0), (1.5, 2.5, 5.0)))))
    found = dots(root)
    assert len(found) == 6
    (x1, y1), (x2, y2), (x3, y3) = found[:3]
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2) and 2 * (y1 - y2) == pytest.approx(y2 - y3, abs=0.3)
    _, _, width, height = map(float, root.get("viewBox", "").split())
    for line in root.iter(f"{NS}line"):
        assert 0 <= float(line.get("x1", "-1")) <= float(line.get("x2", "-1")) <= width
        assert 0 <= float(line.get("y2", "-1")) <= height


def test_a_logarithmic_axis_has_equal_factors_apart() -> None:
    root = ET.fromstring(svg(figure(Panel("l", X, (1.0, 10.0, 100.0), None, None, logarithmic=True))))
    (_, y1), (_, y2), (_, y3) = dots(root)[:3]
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.3)
    assert not list(root.iter(f"{NS}polygon"))


@pytest.mark.parametrize("words", ["<b>", "a & b", "α → β", "]]>"])
def test_words_are_escaped(words: str) -> None:
    panel = Panel(words, X, (1.0, 2.0, 3.0), None, None, ((words, 2.0),), ((0.5, 2.0, words, True),))
    root = ET.fromstring(svg(figure(panel, words)))
    assert [t.text for t in root.iter(f"{NS}text")].count(words) == 7


@pytest.mark.parametrize(
    "panel",
    [Panel("l", (0.5,), (1.0,), (0.9,), (1.1,)), Panel("l", (), (), None, None),
     Panel("l", X, (math.nan,) * 3, None, None),
     Panel("l", X, (0.0, 0.0, 0.0), None, None, (("a", 0.0), ("b", 0.0), ("c", 0.0))),
     Panel("l", X, (1.0, math.nan, 3.0), None, None)],
)  # fmt: skip
def test_odd_data_is_drawn_too(panel: Panel, tmp_path: Path) -> None:
    text = svg(figure(panel))
    assert "nan" not in text and "inf" not in text
    assert len(dots(ET.fromstring(text))) == 2 * sum(math.isfinite(y) for y in panel.y)
    png(figure(panel), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_few_and_inside(low: float, width: float) -> None:
    high = low + width
    found = ticks(low, high)
    assert len(found) <= 9 and found == sorted(found)
    assert all(low - 1e-6 * width - 1e-9 <= value <= high + 1e-6 * width + 1e-9 for value in found)


def test_ticks_of_a_range_of_alpha() -> None:
    assert ticks(0.05, 0.95, count=10) == pytest.approx([0.1 * i for i in range(1, 10)])
    assert ticks(3.0, 120.0, logarithmic=True) == [5, 10, 20, 50, 100]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=5))
def test_words_are_kept_apart_and_inside(wanted: list[float]) -> None:
    placed = spread_out(wanted, 10, 0, 100)
    assert all(b - a >= 10 - 1e-9 for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False))
    assert min(placed) >= -1e-9 and max(placed) <= 100 + 1e-9
