"""Outlier-victim pairs (OVP): two numbers share a byte, and an outlier may take its neighbour's place.

Most numbers of a group are small; a few are ten times larger. A pair of neighbours is written as two ordinary 4-bit
codes, or, if one of them is an outlier, as an outlier code plus the identifier 1000b, which marks the other one, the
victim, as zero. The byte stays a byte, and the scale can serve the many.

    byte = pair, low nibble = even index          kinds       normal values              outliers
    (n, n)       both normal: 15 · 15 = 225       int         0 … ±7, two's complement   ±12 16 24 32 48 64 96
    (o, 1000)    even is the outlier: 14          flint       0 ±1 2 3 4 6 8 16          ±24 32 48 64 96 128 192
    (1000, o)    odd is the outlier: 14           flint_i8    as flint                   ±20 24 32 48 64 96 120

253 bytes are legal; (1000, 1000), (1000, 0000) and (0000, 1000) are not (`first_illegal`). Outlier nibbles are sign,
two exponent bits and one mantissa bit (abfloat, bias 2 or 3); `flint_i8` replaces the outermost magnitudes so that
every value fits int8. At 8 bits a pair is two bytes: normal −127 … 127, identifier 0x80, outliers (8 + m) << (e + 4) up
to 2^15.

Normal values are the nearest ones; ties go to the even integer (int) or the smaller magnitude (flint, and all
outliers).

Which element of two outliers stays is the encoder's policy, the decoder does not care:
    optimal    least squared error of the pair, optionally weighted; ties to the normal pair, then to the even element
    paper      outliers are what lies nearer to an outlier than to a normal value; of two, the larger stays
    reference  likewise, but the even element always stays, as the released code does

Source: C. Guo et al., "OliVe: Accelerating Large Language Models via Hardware-friendly Outlier-Victim Pair
Quantization", ISCA 2023, sections 3 and 4. The byte layout is this project's (docs/ovp-format.md). R: rows, K: columns
(even), P: pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from evenbits.errors import EvenbitsError, unknown_name
from evenbits.numerics.codebook import Codebook

POLICIES = ("optimal", "paper", "reference")
IDENTIFIER = {4: 0b1000, 8: 0x80}


@dataclass(frozen=True)
class PairKind:
    """One alphabet of pairs. normals: value of code 0, 1, …; outliers: value of code 1, 2, … (0 is unused)."""

    name: str
    bits: int
    normals: tuple[int, ...]
    outliers: tuple[int, ...]

    @property
    def normal_max(self) -> int:
        return max(self.normals)

    @property
    def threshold(self) -> float:
        """Half-way between the largest normal value and the smallest outlier."""
        return (self.normal_max + min(self.outliers)) / 2

    @property
    def largest(self) -> int:
        return max(self.outliers)


@cache
def pair_kind(name: str) -> PairKind:
    """`"int"`, `"flint"`, `"flint_i8"` (4 bits) or `"int8"` (8 bits). Raises EvenbitsError for another word."""
    if name == "int":
        return PairKind(name, 4, tuple(range(8)), _magnitudes("abfloat4_b2"))
    if name == "flint":
        return PairKind(name, 4, tuple(int(v) for v in Codebook.parse("flint4").values[:8]), _magnitudes("abfloat4_b3"))
    if name == "flint_i8":
        return PairKind(name, 4, pair_kind("flint").normals, (20, 24, 32, 48, 64, 96, 120))
    if name == "int8":
        return PairKind(name, 8, tuple(range(128)), tuple(v for v in _magnitudes("abfloat8_b4") if v <= 1 << 15))
    raise unknown_name("pair kind", name, ["int", "flint", "flint_i8", "int8"])


def _magnitudes(name: str) -> tuple[int, ...]:
    book = Codebook.parse(name)
    return tuple(int(value) for value in book.values[1 : 1 << (book.bits - 1)])


def snap(
    u_RK: torch.Tensor, kind: PairKind, policy: str = "optimal", importance_K: torch.Tensor | None = None
) -> torch.Tensor:
    """Scaled values [R, K] (float32, K even) → the values of the pairs they are written as, [R, K].

    importance_K: weights of the squared error (such as mean x² of each input channel), for policy "optimal".
    Raises EvenbitsError for an odd K and an unknown policy.
    """
    if policy not in POLICIES:
        raise unknown_name("pair policy", policy, POLICIES)
    if u_RK.shape[-1] % 2:
        raise EvenbitsError(f"pairs need an even number of columns; given {u_RK.shape[-1]}. Pad with a zero.")
    values = _nearest_normal(u_RK, kind)
    pairs_P2 = u_RK.reshape(-1, 2)
    # Only where an element lies beyond the threshold can an outlier code be nearer than the normal pair.
    beyond = pairs_P2.abs() > kind.threshold if policy == "optimal" else pairs_P2.abs() >= kind.threshold
    index_S = (beyond[:, 0] | beyond[:, 1]).nonzero().squeeze(1)
    if index_S.numel():
        flat = values.reshape(-1, 2)
        weights = None
        if importance_K is not None:
            weights = importance_K.reshape(-1, 2)[index_S % (u_RK.shape[-1] // 2)]
        flat[index_S] = _decide(pairs_P2[index_S], flat[index_S], beyond[index_S], kind, policy, weights)
        values = flat.reshape(u_RK.shape)
    return values


def _nearest_normal(u: torch.Tensor, kind: PairKind) -> torch.Tensor:
    if not kind.name.startswith("flint"):
        return u.round().clamp_(-kind.normal_max, kind.normal_max)
    return Codebook.parse("flint4").nearest(u)


def nearest_outlier(magnitude: torch.Tensor, kind: PairKind, *, out: torch.Tensor) -> torch.Tensor:
    """The nearest outliers of magnitudes (float32, not negative), ties to the smaller, written to `out` (another one).

    Outliers are floats with one mantissa bit (of 8-bit pairs: three). Adding just under half of the last bit that stays
    carries into it, and on into the exponent, exactly where the value rounds up. `flint_i8` has two odd ones.
    """
    dropped = 22 if kind.bits == 4 else 20
    out.copy_(magnitude).view(torch.int32).add_((1 << (dropped - 1)) - 1).bitwise_and_(-(1 << dropped))
    if kind.name != "flint_i8":
        return out.clamp_(kind.outliers[0], kind.largest)
    out.clamp_(24, 96).masked_fill_(magnitude <= 22, 20)
    return out.masked_fill_(magnitude > 108, 120)


def _decide(
    u_P2: torch.Tensor,
    normal_P2: torch.Tensor,
    beyond_P2: torch.Tensor,
    kind: PairKind,
    policy: str,
    weights_P2: torch.Tensor | None,
) -> torch.Tensor:
    """The values of pairs that have an element beyond the threshold."""
    magnitude_P2 = u_P2.abs().float()
    outlier_P2 = nearest_outlier(magnitude_P2, kind, out=torch.empty_like(magnitude_P2)).copysign(u_P2)
    if policy == "optimal":
        # What each choice wins over the normal pair in squared error. Differences of squares are written as
        # products, so that far outliers neither overflow nor cancel.
        u, n = u_P2.double(), normal_P2.double()
        kept_P2 = (n - outlier_P2) * (n + outlier_P2 - 2 * u)  # (n − u)² − (o − u)²
        lost_P2 = n * (2 * u - n)  # u² − (n − u)²
        if weights_P2 is not None:
            kept_P2, lost_P2 = kept_P2 * weights_P2, lost_P2 * weights_P2
        left, right = kept_P2[:, 0] - lost_P2[:, 1], kept_P2[:, 1] - lost_P2[:, 0]
        stays_normal = torch.maximum(left, right) <= 0
        keep_left = left >= right
    else:
        stays_normal = torch.zeros_like(beyond_P2[:, 0])
        even_wins = u_P2[:, 0].abs() >= u_P2[:, 1].abs() if policy == "paper" else torch.ones_like(stays_normal)
        keep_left = beyond_P2[:, 0] & (~beyond_P2[:, 1] | even_wins)
    paired = outlier_P2 * torch.stack([keep_left, ~keep_left], dim=1)
    return torch.where(stays_normal.unsqueeze(1), normal_P2, paired)


def pack_pairs(values_RK: torch.Tensor, kind: PairKind) -> torch.Tensor:
    """Values of legal pairs [R, K] → bytes uint8 [R, K/2] (4 bits) or [R, K] (8 bits)."""
    table = _encode_table(kind, values_RK.device)
    codes = table[(values_RK + kind.largest).long()]
    outlier_R2 = (values_RK.abs() > kind.normal_max).reshape(len(values_RK), -1, 2)
    victim = outlier_R2.flip(-1).reshape(values_RK.shape)
    codes = torch.where(victim, IDENTIFIER[kind.bits], codes).to(torch.uint8)
    if kind.bits == 8:
        return codes
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_pairs(bytes_RB: torch.Tensor, kind: PairKind) -> torch.Tensor:
    """Bytes [R, B] → values float32 [R, K]; illegal bytes decode to zeros (see `first_illegal`)."""
    if kind.bits == 4:
        pairs = decode_table(kind).to(bytes_RB.device)[bytes_RB.long()]
        return pairs.reshape(len(bytes_RB), -1)
    codes = bytes_RB.reshape(len(bytes_RB), -1, 2)
    is_victim = codes == IDENTIFIER[8]
    normal, outlier = _code_values(kind)
    values = torch.where(
        is_victim.flip(-1), outlier.to(codes.device)[codes.long()], normal.to(codes.device)[codes.long()]
    )
    return values.masked_fill(is_victim, 0.0).reshape(len(bytes_RB), -1)


@cache
def decode_table(kind: PairKind) -> torch.Tensor:
    """float32 [256, 2]: the two values of every byte of a 4-bit kind; illegal bytes are zeros."""
    normal, outlier = _code_values(kind)
    byte = torch.arange(256, device="cpu")
    low, high = byte & 15, byte >> 4
    table = torch.stack([normal[low], normal[high]], dim=1)
    nothing = torch.zeros(256, device="cpu")
    table[high == 8] = torch.stack([outlier[low], nothing], dim=1)[high == 8]
    table[low == 8] = torch.stack([nothing, outlier[high]], dim=1)[low == 8]
    return table * legal_bytes(kind).unsqueeze(1)


@cache
def legal_bytes(kind: PairKind) -> torch.Tensor:
    """bool [256]: which bytes of a 4-bit kind an encoder may write. 253 of them."""
    byte = torch.arange(256, device="cpu")
    low, high = byte & 15, byte >> 4
    return ~((low == 8) & ((high == 8) | (high == 0)) | (high == 8) & (low == 0))


_CHECKED = 1 << 18  # bytes at a time


def first_illegal(bytes_RB: torch.Tensor, kind: PairKind) -> tuple[int, int, bytes] | None:
    """The first illegal pair of uint8 [R, B]: (row, offset of its first byte in the row, its byte or bytes), or None.

    4 bits: 0x88, 0x08 and 0x80. 8 bits (B even): the identifier 0x80 beside another one, or beside what is no outlier
    code: a byte whose lower seven bits are 0 or above 64. Everything else an encoder may write.
    """
    rows = max(1, _CHECKED // max(1, bytes_RB.shape[1]))  # some at a time: a checkpoint is checked while it is loaded
    for start in range(0, len(bytes_RB), rows):
        illegal = _illegal(bytes_RB[start : start + rows], kind)
        if bool(illegal.any()):
            row, pair = (int(index) for index in illegal.nonzero()[0])
            width = kind.bits // 4
            return start + row, pair * width, bytes(bytes_RB[start + row, pair * width : (pair + 1) * width].tolist())
    return None


def _illegal(bytes_RB: torch.Tensor, kind: PairKind) -> torch.Tensor:
    """Which pairs of uint8 [R, B] no encoder writes: bool [R, pairs]."""
    if kind.bits == 4:
        return (bytes_RB == 0x88) | (bytes_RB == 0x08) | (bytes_RB == 0x80)
    pairs = bytes_RB.reshape(len(bytes_RB), -1, 2)
    magnitude = pairs & 0x7F
    outlier = (magnitude > 0) & (magnitude <= len(kind.outliers))
    return ((pairs == IDENTIFIER[8]) & ~outlier.flip(-1)).any(dim=-1)


@cache
def _code_values(kind: PairKind) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [2^bits] each: what a code means beside a normal neighbour, and beside an identifier.

    On the CPU, as all cached tables, whatever the default device is: one must not be left on "meta".
    """
    half = 1 << (kind.bits - 1)
    normal, outlier = torch.zeros(2 * half, device="cpu"), torch.zeros(2 * half, device="cpu")
    for code, value in enumerate(kind.normals):
        normal[code] = value
        if value:
            # int kinds are two's complement, flint kinds sign and magnitude.
            normal[half + code if kind.name.startswith("flint") else 2 * half - code] = -value
    for code, value in enumerate(kind.outliers, start=1):
        outlier[code], outlier[half + code] = value, -value
    return normal, outlier


@cache
def _encode_table(kind: PairKind, device: torch.device) -> torch.Tensor:
    """int64 [2·largest + 1]: value + largest → code, normal or outlier (their values do not overlap)."""
    table = torch.zeros(2 * kind.largest + 1, dtype=torch.int64, device="cpu")
    for values in _code_values(kind):
        codes = values.nonzero().squeeze(1)
        table[values[codes].long() + kind.largest] = codes
    return table.to(device)


# Built now: a table that is first needed while torch traces would be cached as a fake tensor.
for _kind in map(pair_kind, ("int", "flint", "flint_i8")):
    decode_table(_kind)
_code_values(pair_kind("int8"))
