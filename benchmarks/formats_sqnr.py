"""The tables of docs/formats.md: what every 4-bit format keeps of a tensor, in groups of equal true bits.

    python benchmarks/formats_sqnr.py --data DIR [--json] [--rows 128] [--seeds 2] [--jobs 2]
        [--formats ovp4:row …]
    python benchmarks/formats_sqnr.py --smoke

DIR holds the real tensors that the tests use (EVENBITS_TEST_DATA by default); --synthetic leaves them out. Every figure
is the signal-to-quantization-noise ratio in dB of `evenbits.encode(x, format).dequantize()`, averaged over the tensors
of a family (benchmarks/tensors.py); bits are those of the packed tensor with everything that is stored.
`FORMAT+repair` permutes the columns first, as the re-pairing method would.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeAlias

import numpy as np
import tensors
import torch
from machine import fingerprint

import evenbits
from evenbits.algorithms.repair import repair
from evenbits.numerics.metrics import compare

GROUPS = {
    "4 bits: a scale per tensor or row": (
        *("int4:tensor", "int4:tensor:mse", "flint4:tensor", "ovp4:tensor", "ovp4:tensor:3sigma:reference"),
        *("int4:row", "int4:row:mse", "int4:row:7.5:mse", "flint4:row", "pot4:row", "ant4:row", "nf4:row"),
        *("nf4:row:mse", "ovp4-int:row", "ovp4-flint:row", "ovp4:row:3sigma:reference", "ovp4:row"),
    ),
    "4.125 bits": (
        *("int4:g128", "int4:g128:mse", "int4:g128:7.5:mse", "int4:g128:affine", "int4:g128:affine:mse"),
        *("flint4:g128", "ant4:g128", "nf4:g128:mse", "ovp4:g128:3sigma:reference", "ovp4:g128"),
    ),
    "4.25 bits": (
        *("int4:g64", "int4:g64:7.5:mse", "flint4:g32", "nf4:g64", "nf4:g64:mse", "nf4:g32", "nf4:g32:mse"),
        *("fp4:g32", "fp4:g32:mse", "mxfp4", "mxfp4:mse", "ovp4:g64"),
        *("ovp4:g32:3sigma:reference", "ovp4:g32", "ovp4-mix:g32"),
    ),
    "4.5 bits": (
        *("int4:g32", "int4:g32:mse", "int4:g32:7.5:mse", "flint4:g16", "nf4:g16:mse"),
        *("nvfp4", "nvfp4:mse", "ovp4:g16", "ovp4-mix:g16"),
    ),
}
POLICIES = (
    *("ovp4:tensor:3sigma:reference", "ovp4:tensor:reference", "ovp4:tensor:paper", "ovp4:tensor"),
    *("ovp4:tensor+repair", "ovp4:row:3sigma:reference", "ovp4:row:reference", "ovp4:row:paper", "ovp4:row"),
    *("ovp4:row+repair", "ovp4:g32:reference", "ovp4:g32:paper", "ovp4:g32", "ovp4:g32+repair"),
)
NARROW = ("int4:row:mse", "flint4:row", "nf4:row", "ovp4:row", "ovp4:g32", "ovp4:g16", "mxfp4", "nvfp4", "nvfp4:mse")
VERSUS = (
    *(("ovp4:tensor", "ovp4:tensor:3sigma:reference"), ("ovp4:row", "ovp4:row:3sigma:reference")),
    *(("ovp4:g128", "ovp4:g128:3sigma:reference"), ("ovp4:g32", "ovp4:g32:3sigma:reference")),
    *(("ovp4:row", "int4:row:mse"), ("ovp4:row", "nf4:row:mse")),
    *(("ovp4:g128", "int4:g128:mse"), ("ovp4:g128", "int4:g128:affine"), ("ovp4:g128", "nf4:g128:mse")),
    *(("ovp4:g32", "mxfp4"), ("ovp4:g32", "mxfp4:mse"), ("ovp4:g32", "fp4:g32:mse"), ("ovp4:g32", "int4:g64:7.5:mse")),
    *(("ovp4:g32", "nf4:g32:mse"), ("ovp4-mix:g32", "nf4:g32:mse"), ("ovp4:g16", "nvfp4"), ("ovp4:g16", "nvfp4:mse")),
    *(("ovp4-mix:g16", "nvfp4:mse"), ("ovp4:g16", "int4:g32:7.5:mse"), ("ovp4:g16", "nf4:g16:mse")),
)
SMOKE = (
    *("int4:row:mse", "ovp4:row:reference", "ovp4:row", "ovp4:row+repair", "int4:g128", "ovp4:g128", "mxfp4"),
    *("ovp4:g32", "ovp4-mix:g32", "nvfp4", "nvfp4:mse", "ovp4:g16"),
)


@dataclass(frozen=True)
class Figure:
    """One format on one tensor."""

    family: str
    tensor: str
    format: str
    sqnr_db: float
    nbytes: int
    elements: int


# Of a family and a format: the figures of all its tensors, in order.
Found: TypeAlias = "dict[tuple[str, str], list[Figure]]"


def wanted(family: str) -> list[str]:
    """The formats a family is measured in, each once."""
    if family in tensors.NARROW:
        return list(NARROW)
    return list(dict.fromkeys([name for names in GROUPS.values() for name in names] + list(POLICIES)))


def measure(family: str, tensor: str, values: np.ndarray, formats: Sequence[str]) -> list[Figure]:
    """Every format on one tensor, float32 [R, K]."""
    x, made = torch.from_numpy(values), []
    for name in formats:
        spelling, _, repaired = name.partition("+")
        given = _repaired(x) if repaired else x
        q = evenbits.encode(given, spelling)
        made.append(Figure(family, tensor, name, compare(given, q.dequantize()).sqnr_db, q.nbytes, x.numel()))
    return made


def _repaired(x_RK: torch.Tensor) -> torch.Tensor:
    found = repair(x_RK.abs().amax(dim=0), [x_RK]).perm_I
    return x_RK if found is None else x_RK[:, found].contiguous()


def measured(samples: Iterable[tensors.Sample], formats: Sequence[str] | None, jobs: int) -> Found:
    """All figures, over `jobs` processes of one thread each."""
    work = [(s.family, s.name, s.x.numpy(), formats or wanted(s.family)) for s in samples]
    if jobs == 1:
        results = [measure(*item) for item in work]
    else:
        with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            results = list(pool.map(measure, *zip(*work, strict=True)))
    found: Found = {}
    for figure in (figure for result in results for figure in result):
        found.setdefault((figure.family, figure.format), []).append(figure)
    return found


def mean(figures: Sequence[Figure]) -> float:
    return sum(figure.sqnr_db for figure in figures) / len(figures)


def bits(figures: Iterable[Figure]) -> float:
    """True bits per element of several tensors together."""
    kept = list(figures)
    return 8 * sum(figure.nbytes for figure in kept) / sum(figure.elements for figure in kept)


def summary(found: Found) -> Iterator[dict[str, object]]:
    """One JSON line for each family and format."""
    for (family, name), figures in found.items():
        each = [figure.sqnr_db for figure in figures]
        yield {
            "family": family,
            "real": family in tensors.REAL,
            "format": name,
            "bits": round(bits(figures), 4),
            "sqnr_db": round(mean(figures), 3),
            "lowest": round(min(each), 3),
            "highest": round(max(each), 3),
            "tensors": len(each),
        }


def versus(found: Found, families: Sequence[str]) -> Iterator[dict[str, object]]:
    """The first format against the second: mean difference per family, and on how many tensors it is the better."""
    for first, second in VERSUS:
        if any((family, name) not in found for family in families for name in (first, second)):
            continue
        pairs = {
            family: [a.sqnr_db - b.sqnr_db for a, b in zip(found[family, first], found[family, second], strict=True)]
            for family in families
        }
        every = [difference for differences in pairs.values() for difference in differences]
        yield {
            "format": first,
            "against": second,
            "difference_db": {family: round(sum(d) / len(d), 3) for family, d in pairs.items()},
            "better": sum(difference > 0 for difference in every),
            "tensors": len(every),
            "worse_on": [
                f"{family}/{figure.tensor} {difference:+.4f}"
                for family, differences in pairs.items()
                for figure, difference in zip(found[family, first], differences, strict=True)
                if difference < 0 and "3sigma" in second
            ],
        }


def table(title: str, formats: Sequence[str], families: Sequence[str], found: Found) -> str:
    """Markdown: a row per format, a column per family."""
    rows = [name for name in formats if (families[0], name) in found]
    if not rows:
        return ""
    lines = [f"### {title}", "", _line(["format", "bits", *families]), "|---" * (2 + len(families)) + "|"]
    for name in rows:
        each = [bits(found[family, name]) for family in families]
        shown = {f"{value:.3f}" for value in (min(each), max(each))}
        cells = [f"{mean(found[family, name]):.1f}" for family in families]
        lines.append(_line([f"`{name}`", "–".join(sorted(shown)), *cells]))
    return "\n".join([*lines, ""])


def differences(title: str, families: Sequence[str], found: Found) -> str:
    """Markdown: the first format minus the second, in dB."""
    lines = [
        f"### {title}",
        "",
        _line(["format", "against", *families, "better on"]),
        "|---" * (3 + len(families)) + "|",
    ]
    for row in versus(found, families):
        cells = [f"{value:+.1f}" for value in row["difference_db"].values()]  # type: ignore[attr-defined]
        count = f"{row['better']} of {row['tensors']}"
        lines.append(_line([f"`{row['format']}`", f"`{row['against']}`", *cells, count]))
    return "\n".join([*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def report(found: Found) -> str:
    """All tables."""
    present = dict.fromkeys(family for family, _ in found)
    kinds = {
        "synthetic": [family for family in present if family not in tensors.REAL],
        "real": [family for family in present if family in (*tensors.WEIGHTS, *tensors.ACTIVATIONS)],
    }
    parts = []
    for kind, families in kinds.items():
        if families:
            parts += [table(f"{title}, {kind}", names, families, found) for title, names in GROUPS.items()]
            parts.append(table(f"Policies and re-pairing, {kind}", POLICIES, families, found))
            parts.append(differences(f"Differences, {kind}", families, found))
    narrow = [family for family in present if family in tensors.NARROW]
    if narrow:
        parts.append(table("Rows of nine", NARROW, narrow, found))
    return "\n".join(part for part in parts if part)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("EVENBITS_TEST_DATA"), help="the real tensors")
    parser.add_argument("--synthetic", action="store_true", help="leave the real tensors out")
    parser.add_argument("--shape", default="64x2048", help="of synthetic tensors, ROWSxCOLUMNS")
    parser.add_argument("--seeds", type=int, default=2, help="synthetic tensors per family")
    parser.add_argument("--rows", type=int, default=128, help="rows of each real tensor")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--formats", nargs="+", help="only these, in every family")
    parser.add_argument("--json", action="store_true", help="JSON lines, a fingerprint first")
    parser.add_argument("--smoke", action="store_true", help="small synthetic tensors, few formats, one process")
    given = parser.parse_args()
    if given.smoke:
        given.synthetic, given.shape, given.seeds, given.jobs = True, "16x1024", 1, 1
    if given.data is None and not given.synthetic:
        raise SystemExit("name the folder of real tensors: --data DIR or EVENBITS_TEST_DATA; or give --synthetic")
    return given


def main() -> None:
    given, start = options(), time.perf_counter()
    rows, columns = (int(word) for word in given.shape.split("x"))
    samples = list(tensors.synthetic(rows, columns, given.seeds))
    samples += [] if given.synthetic else tensors.real(Path(given.data), given.rows)
    found = measured(samples, SMOKE if given.smoke else given.formats, given.jobs)
    about = {**fingerprint(), "processes": given.jobs, "shape": given.shape, "seeds": given.seeds, "rows": given.rows}
    about["seconds"] = round(time.perf_counter() - start, 1)
    if not given.json:
        print(about, report(found), sep="\n\n")
        return
    families = dict.fromkeys(sample.family for sample in samples)
    synthetic = [family for family in families if family not in tensors.REAL]
    real = [family for family in families if family in tensors.REAL and family not in tensors.NARROW]
    compared = [row for part in (synthetic, real) if part for row in versus(found, part)]
    for line in [about, *summary(found), *compared]:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
