"""What a stranger with docs/ovp-format.md and docs/numerics.md would write: bytes to numbers. Imports nothing of the
library, and nothing but Python's own.

Numbers are Python's doubles, rounded to float32 where the documents say so: a product or a quotient of two float32
that is first rounded to double and then to float32 is the one that is rounded once.
"""

from __future__ import annotations

import math
import struct
from typing import Any

LARGEST = 3.4028234663852886e38  # of float32


def float32(number: float) -> float:
    """The nearest float32; beyond the largest, the largest."""
    if abs(number) > LARGEST:
        return math.copysign(LARGEST, number)
    rounded: float = struct.unpack("<f", struct.pack("<f", number))[0]
    return rounded


def e4m3(byte: int) -> float:
    """FP8 E4M3: sign, four exponent bits (bias 7), three mantissa bits; subnormals at exponent 0."""
    sign, exponent, mantissa = -1 if byte & 0x80 else 1, (byte >> 3) & 15, byte & 7
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


# --- pairs

NORMALS = {
    "int": {**{code: code for code in range(8)}, **{code: code - 16 for code in range(9, 16)}},
    "flint": dict(zip([*range(8), *range(9, 16)], [0, 1, 2, 3, 16, 8, 4, 6, -1, -2, -3, -16, -8, -4, -6], strict=True)),
    "int8": {**{code: code for code in range(128)}, **{code: code - 256 for code in range(129, 256)}},
}
NORMALS["flint_i8"] = NORMALS["flint"]
OUTLIER_MAGNITUDES = {
    "int": [12, 16, 24, 32, 48, 64, 96],
    "flint": [24, 32, 48, 64, 96, 128, 192],
    "flint_i8": [20, 24, 32, 48, 64, 96, 120],
    "int8": [(8 + (code & 7)) << ((code >> 3) + 4) for code in range(1, 65)],
}
SIGN = {"int": 8, "flint": 8, "flint_i8": 8, "int8": 0x80}  # the sign bit, and the identifier
OUTLIERS = {
    kind: {code | sign: -value if sign else value for sign in (0, SIGN[kind]) for code, value in enumerate(values, 1)}
    for kind, values in OUTLIER_MAGNITUDES.items()
}


def decode_pair(kind: str, even: int, odd: int) -> list[int] | None:
    """Two codes → two values, or None for a pair that must not be written."""
    identifier = SIGN[kind]
    if odd == identifier:
        return [OUTLIERS[kind][even], 0] if even in OUTLIERS[kind] else None
    if even == identifier:
        return [0, OUTLIERS[kind][odd]] if odd in OUTLIERS[kind] else None
    return [NORMALS[kind][even], NORMALS[kind][odd]]


def _nearest(number: float, codes: dict[int, int], *, even: bool = False) -> tuple[int, int]:
    """(code, value) of the nearest value; ties to the even value, or to the smaller magnitude."""
    return min(codes.items(), key=lambda item: (abs(item[1] - number), item[1] % 2 if even else abs(item[1])))


def encode_pair(kind: str, policy: str, a: float, b: float, weights: tuple[float, float] = (1, 1)) -> tuple[int, int]:
    """Two scaled numbers → (even code, odd code)."""
    normal = [_nearest(number, NORMALS[kind], even=kind.startswith("int")) for number in (a, b)]
    outlier = [_nearest(number, OUTLIERS[kind]) for number in (a, b)]
    as_normal = normal[0][0], normal[1][0]
    as_even, as_odd = (outlier[0][0], SIGN[kind]), (SIGN[kind], outlier[1][0])
    if policy == "optimal":
        choices = [
            (as_normal, (normal[0][1], normal[1][1])),
            (as_even, (outlier[0][1], 0)),
            (as_odd, (0, outlier[1][1])),
        ]
        return min(choices, key=lambda choice: _error(choice[1], (a, b), weights))[0]  # the first of equals
    edge = (max(NORMALS[kind].values()) + min(OUTLIER_MAGNITUDES[kind])) / 2
    far = [abs(a) >= edge, abs(b) >= edge]
    if not any(far):
        return as_normal
    even_stays = far[0] and (not far[1] or policy == "reference" or abs(a) >= abs(b))
    return as_even if even_stays else as_odd


def _error(values: tuple[int, int], numbers: tuple[float, float], weights: tuple[float, float]) -> float | int:
    """Weighted squared error; where squares of far numbers would cancel, in integers of 1/65536."""
    if max(abs(number) for number in numbers) > 1e6:
        return sum((value * 256 - int(number * 256)) ** 2 for value, number in zip(values, numbers, strict=True))
    return sum(w * (value - number) ** 2 for value, number, w in zip(values, numbers, weights, strict=True))


# --- tensors


def codes_of(row: bytes, bits: int, count: int) -> list[int]:
    """The first `count` codes of a row: a stream of bits, lowest first."""
    stream = int.from_bytes(row, "little")
    return [(stream >> (bits * index)) & ((1 << bits) - 1) for index in range(count)]


def scales_of(entry: dict[str, Any]) -> list[float]:
    """All scales of a tensor, row by row, as float32."""
    raw, kind = bytes.fromhex(entry["scale"]), entry["scale_type"]
    if kind in ("float32", "float16"):
        width, letter = (4, "f") if kind == "float32" else (2, "e")
        stored = list(struct.unpack(f"<{len(raw) // width}{letter}", raw))
    else:
        stored = [e4m3(byte) if kind == "e4m3" else 2.0 ** (byte - 127) for byte in raw]
    return stored if entry["factor"] is None else [float32(scale * entry["factor"]) for scale in stored]


def group_of(entry: dict[str, Any], row: int, column: int) -> int:
    """Which scale a number has. group: columns of a group, "row" or "tensor"."""
    group = entry["group"]
    if group == "tensor":
        return 0
    return row if group == "row" else row * -(-entry["shape"][1] // group) + column // group


def kind_of(entry: dict[str, Any], row: int, column: int) -> str:
    """The kind of pairs at a place, from the format's word and, of a mix, from the group's bit."""
    word = entry["format"].split(":")[0]
    if word != "ovp4-mix":
        return "int8" if word == "ovp8" else word.removeprefix("ovp4-")
    index = column // entry["group"]
    return "flint" if bytes.fromhex(entry["kinds"][row])[index // 8] >> (index % 8) & 1 else "int"


def decode(entry: dict[str, Any], table: list[float] | None = None) -> list[list[float]]:
    """A tensor of shape [R, K] from its entry, as docs/ovp-vectors.json has them.

    table: what each code stands for, of types that are no pairs; `zero_points` of the entry, one for each scale, are
    subtracted from the table's numbers.
    """
    (rows, columns), scales = entry["shape"], scales_of(entry)
    found = []
    for r in range(rows):
        row = bytes.fromhex(entry["bytes"][r])
        if table is None:
            bits = 8 if entry["format"].startswith("ovp8") else 4
            codes = codes_of(row, bits, columns + columns % 2)
            values: list[float] = []
            for k in range(0, len(codes), 2):
                pair = decode_pair(kind_of(entry, r, k), codes[k], codes[k + 1])
                assert pair is not None, f"row {r}: illegal pair {codes[k : k + 2]} at column {k}"
                values += pair
        else:
            values = [table[code] for code in codes_of(row, (len(table) - 1).bit_length(), columns)]
        groups = [group_of(entry, r, k) for k in range(columns)]
        zeros = entry.get("zero_points")
        found.append(
            [float32((v - (zeros[g] if zeros else 0)) * scales[g]) for v, g in zip(values, groups, strict=False)]
        )
    return found


def encode(entry: dict[str, Any]) -> list[str]:
    """The bytes of each row, from the entry's numbers and stored scales."""
    (rows, columns), scales = entry["shape"], scales_of(entry)
    weights = [float32(weight) for weight in entry["importance"] or [1] * columns] + [0.0] * (columns % 2)
    found = []
    for r in range(rows):
        u = [float32(entry["numbers"][r][k] / scales[group_of(entry, r, k)]) for k in range(columns)]
        u += [0.0] * (columns % 2)
        row = bytearray()
        for k in range(0, len(u), 2):
            kind = kind_of(entry, r, k)
            even, odd = encode_pair(kind, entry["policy"], u[k], u[k + 1], (weights[k], weights[k + 1]))
            row += bytes([even, odd]) if kind == "int8" else bytes([even | odd << 4])
        found.append(row.hex())
    return found
