"""The tables of docs/codecs.md: what codecs keep of boundary tensors at equal true bits, and what they cost.

    python benchmarks/rate_distortion.py --data DIR [--json] [--only quality,sets,claims,cost]
    python benchmarks/rate_distortion.py --smoke

DIR holds the real models and data that the tests use (EVENBITS_TEST_DATA by default); --synthetic leaves them out. The
tensors are those of benchmarks/traffic.py. Figures:

    SNR       10 log10 (Σ x² / Σ (x̂ − x)²) of what `decode(encode(x))` gives, in dB
    bits      true bits per element of the payload: codes, scales, indices, headers
    DC ratio  |mean (x̂ − x)| · √n / rms x: the error's common part, which a sum over n positions multiplies by n
    ECSQ      the uniform quantizer of entropy R, a bound for entropy-coded scalar codes; it has no fixed payload size
    ms        processor time for 1 Mi float32 elements, one direction, one thread, best of up to nine; not the time on
              the clock, so that other work on the machine counts little
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import traffic
from machine import fingerprint
from traffic import Traffic

from evenbits.comms.codecs import get
from evenbits.comms.codecs.base import Meta
from evenbits.numerics.metrics import sqnr_db

RATES = (4, 6, 8)
ECSQ = "entropy-coded uniform (bound)"
PARTS = (1, 2, 4, 8, 16, 32, 64)
CLAIMED = ((8, 8), (4, 16), (8, 64), (6, 4), (2, 4))
SHARES = ("1", "0.5", "0.3", "0.1", "0.05", "0.01")
COSTS = (
    *("raw", "fp16", "bf16", "fp8", "int8:g128", "int6:g128", "int5:g128", "int4:g128", "int3:g128", "int2:g128"),
    *(
        "int4:g128:affine",
        "uint4:g128:offset",
        "int4:g128:stochastic",
        "sign",
        "int8:tensor",
        "hadamard+int4:g128",
        "hadamard+int8:g128",
    ),
    *("multi6x4", "multi6x4:cuberoot", "multi6x4:dp", "multi8x8", "multi8x8:cuberoot", "multi8x8:dp", "lloyd4"),
    *("top0.5+multi8x8", "top0.5+multi8x8:dp", "top0.1+int8:g128", "top0.01+int8:g128", "lowrank4"),
    *("nf4:g64", "flint4:g64", "mxfp4", "nvfp4", "ovp4:g32", "int4:g128:mse"),
)
SIZE = 1 << 20


def methods(rate: int) -> dict[str, str]:
    """What is compared at `rate` bits: name → codec. Multi-partition codes have four parts: two bits less in each."""
    return {
        "min/max per tensor, zero off the grid": f"uint{rate}:tensor:affine:free",
        "min/max per tensor": f"uint{rate}:tensor:affine",
        "multi-partition, sorted": f"multi{rate - 2}x4",
        "multi-partition, cube root": f"multi{rate - 2}x4:cuberoot",
        "multi-partition, least error": f"multi{rate - 2}x4:dp",
        "groups of 128": f"int{rate}:g128",
        "groups of 128, affine": f"uint{rate}:g128:affine",
        "groups of 128, offset": f"uint{rate}:g128:offset",
        "groups of 128, zero off the grid": f"uint{rate}:g128:affine:free",
        "groups of 64, affine": f"uint{rate}:g64:affine",
        "Hadamard, groups of 128": f"hadamard+int{rate}:g128",
        "Lloyd-Max per tensor": f"lloyd{rate}:free",
    }


def sent(spec: str, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What arrives, and the true bits per element."""
    codec, meta = get(spec), Meta.of(x)
    payload = codec.encode(x)
    return codec.decode(payload, meta), codec.true_bits(payload, meta)


def dc_ratio(x: torch.Tensor, y: torch.Tensor) -> float:
    """|mean error| · √n / rms x."""
    error = (y.double() - x.double()).mean().abs() * math.sqrt(x.numel())
    return float(error / x.double().square().mean().sqrt())


def ecsq(x: torch.Tensor, rate: float) -> float | None:
    """SNR of the uniform quantizer whose codes have entropy `rate`; None if x has less entropy than that."""
    chosen = torch.randint(x.numel(), (min(x.numel(), 1 << 18),), generator=torch.Generator().manual_seed(0))
    sample = x.flatten().double()[chosen]
    top = float(sample.abs().max())
    low, high = math.log2(top) - 22, math.log2(top) + 1  # float32 resolves 2^-24
    if entropy(sample, 2.0**low) < rate:
        return None
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy(sample, 2.0**middle) > rate else (low, middle)
    step = 2.0**high
    return sqnr_db(x.double(), (x.double() / step).round() * step)


def entropy(x: torch.Tensor, step: float) -> float:
    """Bits per element of round(x / step)."""
    counts = torch.unique((x / step).round(), return_counts=True)[1].double()
    share = counts / counts.sum()
    return float(-(share * share.log2()).sum())


def quality(samples: Sequence[Traffic]) -> Iterator[dict[str, Any]]:
    """A line for each rate, method and tensor."""
    for rate in RATES:
        for sample in samples:
            for name, spec in methods(rate).items():
                y, bits = sent(spec, sample.x)
                figures = {"bits": bits, "snr_db": sqnr_db(sample.x, y), "dc_ratio": dc_ratio(sample.x, y)}
                yield {
                    "table": "quality",
                    "rate": rate,
                    "method": name,
                    "codec": spec,
                    "tensor": sample.name,
                    **figures,
                }
            figures = {"bits": float(rate), "snr_db": ecsq(sample.x, rate)}
            yield {"table": "quality", "rate": rate, "method": ECSQ, "tensor": sample.name, **figures}


def sets(samples: Sequence[Traffic], timed: torch.Tensor) -> Iterator[dict[str, Any]]:
    """How many (minimum, step) sets: at 8 bits inside a part, and at 8 bits altogether."""
    for total in (False, True):
        for parts in PARTS:
            bits = 8 - parts.bit_length() + 1 if total else 8
            for cut in ("", ":cuberoot", ":dp"):
                spec = f"multi{bits}x{parts}{cut}"
                found = {sample.name: sent(spec, sample.x) for sample in samples}
                snr = {sample.name: sqnr_db(sample.x, found[sample.name][0]) for sample in samples}
                true = sum(bits for _, bits in found.values()) / len(found)
                line = {"table": "sets", "total": total, "parts": parts, "codec": spec, "bits": true, "snr_db": snr}
                yield {**line, **cost(spec, timed)}


def claims(size: int) -> Iterator[dict[str, Any]]:
    """Claimed and true bits per element of multi-partition codes, pruned or not; and with indices as torch has them."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    for bits, parts in CLAIMED:
        for share in SHARES:
            inner = f"multi{bits}x{parts}"
            width, kept = bits + parts.bit_length() - 1, float(share)
            _, true = sent(inner if share == "1" else f"top{share}+{inner}", x)
            lists = None if share == "1" else kept * (64 + width)
            line = {"table": "claims", "bits_claimed": bits * kept, "bits": bits, "parts": parts, "kept": kept}
            yield {**line, "bits_true": true, "bits_with_int64_indices": lists}


def cost(spec: str, x: torch.Tensor) -> dict[str, float]:
    """Milliseconds for one direction and the other, per 1 Mi elements."""
    codec, meta = get(spec), Meta.of(x)
    payload = codec.encode(x)
    scale = 1e3 * SIZE / x.numel()
    return {
        "encode_ms": scale * best(lambda: codec.encode(x)),
        "decode_ms": scale * best(lambda: codec.decode(payload, meta)),
    }


def best(work: Callable[[], object]) -> float:
    """Processor seconds of the fastest run of up to nine, within a second."""
    times, start = [], time.perf_counter()
    while len(times) < 9 and (len(times) < 2 or time.perf_counter() - start < 1):
        begun = time.process_time()
        work()
        times.append(time.process_time() - begun)
    return min(times)


def costs(x: torch.Tensor, specs: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A line for each codec."""
    for spec in specs:
        _, bits = sent(spec, x)
        yield {"table": "cost", "codec": spec, "bits": bits, **cost(spec, x)}


def shown(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or math.isinf(value) else f"{value:.{digits}f}"


def markdown(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """One table."""
    lines = [f"### {title}", "", _line(head), "|---" * len(head) + "|", *(_line(row) for row in rows), ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def report(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """All tables that there are lines for."""
    every = {name: [line for line in lines if line.get("table") == name] for name in TABLES}
    for name, made in TABLES.items():
        if every[name]:
            yield from made(every[name])


def _quality_tables(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(line["tensor"] for line in lines))
    head = ["method", "bits", *names]
    for rate in RATES:
        yield markdown(f"SNR in dB at {rate} bits", head, _quality(lines, rate, names, "snr_db"))
    yield markdown("DC ratio at 8 bits", head, _quality(lines, 8, names, "dc_ratio"))


def _set_tables(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    names = list(lines[0]["snr_db"])
    for total, title in ((False, "8 bits in each part"), (True, "8 bits altogether")):
        rows = [
            [f"`{line['codec']}`", str(line["parts"]), shown(line["bits"], 2)]
            + [shown(line["snr_db"][name]) for name in names]
            + [shown(line["encode_ms"])]
            for line in lines
            if line["total"] == total
        ]
        yield markdown(f"How many sets: {title}", ["codec", "sets", "bits", *names, "encode ms"], rows)


def _claim_tables(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    keys = ("kept", "bits_claimed", "bits_true", "bits_with_int64_indices")
    rows = [[f"{line['bits']} b × {line['parts']}", *(shown(line[key], 2) for key in keys)] for line in lines]
    head = ["setting", "kept", "claimed", "true", "with int64 indices"]
    yield markdown("Claimed and true bits per element", head, rows)


def _cost_tables(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    keys = ("bits", "encode_ms", "decode_ms")
    rows = [[f"`{line['codec']}`", *(shown(line[key], 2) for key in keys)] for line in lines]
    yield markdown("Milliseconds for 1 Mi elements", ["codec", "bits", "encode", "decode"], rows)


TABLES = {"quality": _quality_tables, "sets": _set_tables, "claims": _claim_tables, "cost": _cost_tables}


def _quality(lines: Sequence[dict[str, Any]], rate: int, names: Sequence[str], figure: str) -> list[list[str]]:
    rows = []
    for method in dict.fromkeys(line["method"] for line in lines if figure in line):
        found = {line["tensor"]: line for line in lines if line["rate"] == rate and line["method"] == method}
        bits = {shown(found[name]["bits"], 2) for name in names}
        digits = 1 if figure == "snr_db" else 2
        rows.append([method, "–".join(sorted(bits)), *(shown(found[name][figure], digits) for name in names)])
    return rows


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("EVENBITS_TEST_DATA"), help="real models and data")
    parser.add_argument("--synthetic", action="store_true", help="leave the captured tensors out")
    parser.add_argument("--size", type=int, default=SIZE, help="elements of a synthetic tensor, a multiple of 1024")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--sentences", type=int, default=48)
    parser.add_argument("--only", default="quality,sets,claims,cost", help="tables, with commas between")
    parser.add_argument("--json", action="store_true", help="JSON lines, a fingerprint first")
    parser.add_argument("--smoke", action="store_true", help="small synthetic tensors, few codecs")
    given = parser.parse_args()
    if given.smoke:
        given.synthetic, given.size = True, 1 << 14
    if given.data is None and not given.synthetic:
        raise SystemExit("name the folder of real models: --data DIR or EVENBITS_TEST_DATA; or give --synthetic")
    return given


def main() -> None:
    given, start = options(), time.perf_counter()
    torch.set_num_threads(1)
    samples = list(traffic.synthetic(given.size))
    timed = samples[0].x
    samples += [] if given.synthetic else traffic.captured(Path(given.data), given.pictures, given.sentences)
    specs = COSTS[:10] if given.smoke else COSTS
    made = {
        "quality": lambda: quality(samples),
        "sets": lambda: sets(samples, timed),
        "claims": lambda: claims(given.size),
        "cost": lambda: costs(timed, specs),
    }
    lines = [line for name in given.only.split(",") for line in made[name]()]
    about = {**fingerprint(), "size": given.size, "pictures": given.pictures, "sentences": given.sentences}
    about["seconds"] = round(time.perf_counter() - start, 1)
    if given.json:
        print(*(json.dumps(line) for line in [about, *lines]), sep="\n")
    else:
        print(about, *report(lines), sep="\n\n")


if __name__ == "__main__":
    main()
