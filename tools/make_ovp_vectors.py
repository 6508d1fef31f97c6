"""Writes docs/ovp-vectors.json: what every byte means, and what encoders must write, for implementers of the format.

python tools/make_ovp_vectors.py [--example]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from evenbits.numerics.ovp import POLICIES, decode_table, legal_bytes, pack_pairs, pair_kind, snap

KINDS = ("int", "flint", "flint_i8")
EXAMPLE = [(15.0, -30.0), (30.0, 15.0), (10.0, 7.0), (3.0, 40.0), (200.0, 1.0)]
HAND_PICKED = [
    *EXAMPLE,
    *[
        (0.0, 0.0),
        (-0.0, 0.4),
        (0.5, 1.5),
        (2.5, -2.5),
        (5.0, 7.0),
        (12.0, -12.0),
        (9.5, 0.0),
        (9.51, 0.0),
        (14.0, 0.0),
    ],
    *[(20.0, 1.0), (-18.0, 3.0), (7.5, 11.0), (96.0, -96.0), (1e9, -1e9), (-250.0, 3.0), (24.0, 0.2), (110.0, 0.0)],
]


def encoder_vectors(kind_name: str) -> list[dict[str, object]]:
    """One entry per policy: numbers (scale 1), bytes."""
    kind = pair_kind(kind_name)
    generator = torch.Generator().manual_seed(2026)
    random = (torch.randn(64, 2, generator=generator) * torch.tensor([4.0, 20.0])).mul(4).round().div(4)
    pairs = torch.cat([torch.tensor(HAND_PICKED), random])
    found = []
    for policy in POLICIES:
        packed = pack_pairs(snap(pairs.reshape(1, -1), kind, policy), kind)
        found.append({"policy": policy, "numbers": pairs.flatten().tolist(), "bytes": packed.flatten().tolist()})
    return found


def vectors() -> dict[str, object]:
    """The whole file."""
    kinds: dict[str, object] = {}
    for name in KINDS:
        table, legal = decode_table(pair_kind(name)).int().tolist(), legal_bytes(pair_kind(name)).tolist()
        decode = [pair if fine else None for pair, fine in zip(table, legal, strict=True)]
        kinds[name] = {"decode": decode, "encode": encoder_vectors(name)}
    return {"format": "outlier-victim pairs", "version": 1, "nibbles": "low nibble = even index", "kinds": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--example", action="store_true", help="print the policies side by side and write nothing")
    if parser.parse_args().example:
        for pair in EXAMPLE:
            u = torch.tensor([pair])
            written = {p: tuple(snap(u, pair_kind("int"), p)[0].int().tolist()) for p in POLICIES}
            print(pair, *(f"{policy}: {values}" for policy, values in written.items()))
        return
    target = Path(__file__).resolve().parent.parent / "docs" / "ovp-vectors.json"
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(vectors(), separators=(",", ":")) + "\n", encoding="utf-8")
    partial.rename(target)
    print(f"wrote {target.name}")


if __name__ == "__main__":
    main()
