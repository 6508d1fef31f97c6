"""When is a codec worth it, and how far does a pipeline scale over slow links: predictions, not measurements.

    python benchmarks/pipeline_scale.py [--rows 4096] [--width 1024] [--stages 2,16,256,1024] [--rates 20e6,100e6,1e9]
        [--latency 0.03] [--microbatches 64] [--codecs …] [--seconds 0.5] [--json]

First table: what each codec costs on this machine for one activation of rows × width (best of five), the bits per
element it sends, and the bandwidth below which it is faster than sending float32. The activation has per-channel
scales over two orders of magnitude, as residual streams do.

Second table: seconds per step that comms/simulate.py computes from these costs, for a stage that needs --seconds to
compute one microbatch forward (backward: twice that), with torch's 1F1B, receives posted one microbatch ahead.
"""

from __future__ import annotations

import argparse
import json

import torch
from machine import fingerprint

from evenbits.comms.simulate import Costs, Network, predict
from evenbits.comms.timing import break_even, timed

CODECS = "raw,bf16,int8:g128,int4:g128,int2:g64,multi2x4:dp,top0.1+int8:g128"


def activation(rows: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = 10 ** (2 * torch.rand(width, generator=generator) - 1)
    return torch.randn(rows, width, generator=generator) * scale


def costs_of(codecs: list[str], x: torch.Tensor) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    raw = timed("raw", x)
    for codec in codecs:
        mine = timed(codec, x)
        encode, decode, nbytes = mine
        limit = break_even(mine, raw)
        rows.append(
            {
                "codec": codec,
                "encode_ms": 1e3 * encode,
                "decode_ms": 1e3 * decode,
                "bits": 8 * nbytes / x.numel(),
                "break_even_mbit": limit / 1e6 if limit != float("inf") else None,
            }
        )
    return rows


def steps_of(options: argparse.Namespace, codecs: list[str], x: torch.Tensor) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for codec in codecs:
        cost = Costs.measured(codec, x, forward=options.seconds, backward=2 * options.seconds)
        for stages in map(int, options.stages.split(",")):
            for rate in map(float, options.rates.split(",")):
                made = predict(
                    "1F1B",
                    stages=stages,
                    microbatches=options.microbatches,
                    cost=cost,
                    net=Network(rate, options.latency, options.latency / 10),
                    ahead=1,
                )
                rows.append({"codec": codec, "stages": stages, "rate": rate, "seconds": made.seconds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--stages", default="2,16,256")
    parser.add_argument("--rates", default="20e6,100e6,1e9")
    parser.add_argument("--latency", type=float, default=0.03)
    parser.add_argument("--microbatches", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--codecs", default=CODECS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, codecs = activation(options.rows, options.width), options.codecs.split(",")
    costs, steps = costs_of(codecs, x), steps_of(options, codecs, x)
    if options.json:
        print("\n".join(json.dumps(line) for line in [fingerprint(), *costs, *steps]))
        return
    print(f"{'codec':24} {'encode ms':>9} {'decode ms':>9} {'bits/elt':>8} {'break-even Mbit/s':>17}")
    for r in costs:
        limit = "always" if r["break_even_mbit"] is None else f"{r['break_even_mbit']:.0f}"
        print(f"{r['codec']:24} {r['encode_ms']:9.1f} {r['decode_ms']:9.1f} {r['bits']:8.2f} {limit:>17}")
    print(f"\n{'codec':24} {'stages':>6} {'Mbit/s':>7} {'seconds':>9}")
    for r in steps:
        print(f"{r['codec']:24} {r['stages']:>6} {float(str(r['rate'])) / 1e6:>7g} {r['seconds']:>9.1f}")


if __name__ == "__main__":
    main()
