"""docs/numerics.md, "Spelling": every word of it parses, nothing that parses is missing, and every hint is right."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

from evenbits.errors import EvenbitsError
from evenbits.numerics.elements import parse_element
from evenbits.numerics.encode import encode
from evenbits.numerics.format import Format

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8").split("## Spelling")[1].split("\n## ")[0]
BLOCKS = ("mxfp4", "nvfp4")
FAMILIES = ("int", "flint", "pot", "nf", "fp", "ant")


def _rows(head: str) -> list[list[str]]:
    """Cells of the table whose first heading is `head`, without the heading."""
    lines = TEXT.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(rf"\| {head}\s+\| (what|for)", line))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def _words(cell: str) -> list[str]:
    """`int2` … `int8` → all seven; `fp4`, `fp8` → both; patterns such as `fpN_eXmY` are left out."""
    found: list[str] = []
    for part in re.split(r"`, |, `", cell):
        names = re.findall(r"[a-z][a-z_0-9-]*[a-z0-9]|[0-9.]+|[a-z0-9.]+", part.replace("`", ""))
        if " … " in part and len(names) == 2:
            stem = names[0].rstrip("0123456789")
            first, last = (int(name.removeprefix(stem)) for name in names)
            found += [f"{stem}{bits}" for bits in range(first, last + 1)]
        else:
            found += names[:1] if "N" not in part else []
    return found


TYPES = [name for row in _rows("data type") for name in _words(row[0])]
OPTIONS = [(word, row[1]) for row in _rows("option") for word in re.findall(r"`([^`]+)`", row[0])]
EXAMPLES = re.findall(r"`([^`]+)`", TEXT.split("Examples:")[1].split("\n\n")[0])
BASES = {"pairs": "ovp4:row", "integers": "int4:row", "signed": "int4:row", "with": "uint8:row:affine"}


def _spelled(name: str) -> str:
    return name if name in BLOCKS else f"{name}:g32" if name == "ovp4-mix" else f"{name}:row"


@pytest.mark.parametrize("name", TYPES)
def test_every_type_of_the_document_parses_and_encodes(name: str) -> None:
    fmt = Format.parse(_spelled(name))
    assert str(fmt) == _spelled(name)
    assert Format.parse(str(fmt)) == fmt
    x = torch.rand(2, 32)
    assert encode(x, fmt).dequantize().shape == x.shape


def test_no_type_is_missing() -> None:
    names = [f"{u}{family}{bits}" for u in ("", "u") for family in FAMILIES for bits in range(1, 10)]
    names += ["ovp4", *(f"ovp4-{kind}" for kind in ("int", "flint", "flint_i8", "i8", "mix")), "ovp8"]
    known = []
    for name in names:
        try:
            parse_element(name)
        except EvenbitsError:
            continue
        known.append(name)
    plain = [name for name in TYPES if "_e" not in name]
    assert sorted(plain) == sorted([*known, *BLOCKS])
    assert len(plain) == len(set(plain)) > 50


@pytest.mark.parametrize(("option", "what"), OPTIONS)
def test_every_option_of_the_document_parses(option: str, what: str) -> None:
    base = "int8:row" if option == "127.5" else BASES.get(what.split(",")[0].split()[0], "fp4:row")
    fmt = Format.parse(f"{base}:{option}")
    assert Format.parse(str(fmt)) == fmt
    assert option in str(fmt).split(":") or option == "minmax"


def test_no_option_is_missing() -> None:
    assert {option for option, _ in OPTIONS} == {
        "minmax", "mse", "p99.9", "3sigma", "paper", "reference", "affine", "free", "127.5", "7.5",
    }  # fmt: skip


@pytest.mark.parametrize("spelling", EXAMPLES)
def test_every_example_parses_and_is_spelled_as_it_is_stored(spelling: str) -> None:
    assert str(Format.parse(spelling)) == spelling


@pytest.mark.parametrize(
    "name", ["fp2", "fp3", "fp5", "fp6", "fp7", "ufp2", "ufp3", "ufp4", "ufp6", "ufp8", "fp4_e2m2"]
)
def test_what_is_offered_instead_of_a_wrong_float_is_right(name: str) -> None:
    with pytest.raises(EvenbitsError) as refused:
        parse_element(name)
    offered = re.findall(r"u?fp\d_e\dm\d", str(refused.value).split(":", 1)[1])
    assert all(parse_element(other).name == other for other in offered)
    assert len(offered) == len(set(offered)) >= (0 if name == "fp2" else 2)
    assert all(other.startswith(name[: 3 + name.startswith("u")]) for other in offered)


@pytest.mark.parametrize("base", ["int4:row", "uint8:row", "fp4:row", "nf4:g64", "ovp4:row", "mxfp4", "ant4:row"])
def test_options_that_are_offered_are_taken(base: str) -> None:
    with pytest.raises(EvenbitsError) as refused:
        Format.parse(f"{base}:wrong")
    offered = [word.split()[0] for word in str(refused.value).split("Allowed: ")[1].rstrip(".").split(", ")]
    for word in ("p99.9" if word == "pN" else word for word in offered):
        Format.parse(f"{base}:affine:{word}" if word == "free" else f"{base}:{word}")
    assert {"mse", "minmax", "pN"} <= set(offered)
