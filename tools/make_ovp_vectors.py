"""Writes docs/ovp-vectors.json: what every byte means, and what encoders must write, for implementers of the format.

python tools/make_ovp_vectors.py [--example]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from evenbits.numerics.encode import encode
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


# name: (format, policy, rows, columns, times, weighted). Scales by a percentile: nothing here depends on a search.
TENSORS = {
    "one scale": ("ovp4-int:tensor:p90", "optimal", 2, 10, 1.0, False),
    "row scales": ("ovp4-flint:row:p90", "optimal", 3, 12, 1.0, False),
    "a float16 factor": ("ovp4-flint:row:p90", "paper", 2, 12, 2.0**-30, False),
    "an odd row": ("ovp4-int:row:p90", "reference", 3, 33, 1.0, False),
    "a row of zeros": ("ovp4-flint_i8:row:p90", "paper", 3, 10, 1.0, False),
    "groups of 32": ("ovp4-int:g32:p90", "optimal", 2, 72, 1.0, False),
    "groups of 16, odd": ("ovp4-flint_i8:g16:p90", "reference", 2, 37, 1.0, False),
    "groups of 128": ("ovp4-flint:g128:p90", "optimal", 2, 150, 1.0, False),
    "a kind for each group": ("ovp4-mix:g16:p90", "optimal", 3, 144, 1.0, False),
    "weighted": ("ovp4-int:g32:p90", "optimal", 2, 64, 1.0, True),
    "8 bits": ("ovp8:row:p90", "optimal", 3, 17, 1.0, False),
    "8 bits, groups": ("ovp8:g16:p90", "reference", 2, 32, 1.0, False),
}


def tensor_vector(name: str, index: int) -> dict[str, object]:
    """One whole tensor: numbers, how they were encoded, what is stored, and what must come out."""
    fmt, policy, rows, columns, times, weighted = TENSORS[name]
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(rows, columns, generator=generator) * torch.randn(rows, columns, generator=generator).exp()
    spread = torch.rand(rows, columns, generator=generator) < 0.04
    x = (torch.where(spread, x * 20, x) * 64).round() / 64 * times  # few digits
    if name == "a row of zeros":
        x[1] = 0
    importance = (torch.rand(columns, generator=generator) * 16).round() / 4 if weighted else None
    encoded = encode(x, fmt, policy=policy, importance=importance)
    granularity = encoded.format.granularity
    return {
        "name": name,
        "format": str(encoded.format),
        "policy": policy,
        "importance": None if importance is None else importance.tolist(),
        "shape": [rows, columns],
        "group": granularity.size if granularity.kind == "group" else granularity.kind,
        "bytes": [bytes(row).hex() for row in encoded.packed.tolist()],
        "scale_type": encoded.format.storage,
        "scale": bytes(encoded.scale.flatten().view(torch.uint8).tolist()).hex(),
        "factor": None if encoded.global_scale is None else float(encoded.global_scale),
        "kinds": None if encoded.kinds is None else [bytes(row).hex() for row in encoded.kinds.tolist()],
        "numbers": x.tolist(),
        "decoded": encoded.dequantize().tolist(),
    }


def vectors() -> dict[str, object]:
    """The whole file."""
    kinds: dict[str, object] = {}
    for name in KINDS:
        table, legal = decode_table(pair_kind(name)).int().tolist(), legal_bytes(pair_kind(name)).tolist()
        decode = [pair if fine else None for pair, fine in zip(table, legal, strict=True)]
        kinds[name] = {"decode": decode, "encode": encoder_vectors(name)}
    head = {"format": "outlier-victim pairs", "version": 1, "nibbles": "low nibble = even index"}
    return {**head, "kinds": kinds, "tensors": [tensor_vector(name, index) for index, name in enumerate(TENSORS)]}


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
