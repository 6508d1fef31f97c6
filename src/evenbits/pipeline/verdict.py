"""Which of the measured formats a layer gets, and why, in words made from the measurements.

The least output error wins. Formats less than a margin behind the best (0.1 dB unless told otherwise) count as equal,
and of equals that one is taken which

    1. is computed in integers in this layer,
    2. has values that int8 holds exactly (int4, pairs of the int kind), so that integer engines can have it,
    3. takes fewer bits (to a hundredth),
    4. errs least.

The runner-up is the best format of another element type: that int4 beats int4 says little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from evenbits.pipeline.advice import ZONES, Facts, Measured

_RANK = {"product": 2, "values": 1, "": 0}
_PREFERRED = ("its product runs in integers", "int8 holds its values", "it takes fewer bits")


def choose(measured: Sequence[Measured], margin_db: float) -> tuple[Measured, Measured | None]:
    """(chosen, runner-up or None) of the candidates that fit; at least one must."""
    fitting = [m for m in measured if m.format]
    best = max(m.sqnr_db for m in fitting)
    tied = [m for m in fitting if gap_db(best, m.sqnr_db) <= margin_db]
    chosen = max(tied, key=lambda m: (*_preference(m), m.sqnr_db))
    others = [m for m in fitting if _element(m) != _element(chosen)]
    others = others or [m for m in fitting if m.encoded != chosen.encoded]
    return chosen, max(others, key=lambda m: m.sqnr_db, default=None)


def gap_db(first: float, second: float) -> float:
    """first − second in dB; 0 if both are the same infinity."""
    return 0.0 if first == second else first - second


def why(chosen: Measured, runner_up: Measured | None, measured: Sequence[Measured], facts: Facts) -> str:
    """Sentences on what the weights look like, by how much the choice wins, and where. Every figure is measured."""
    parts = [_shape(facts)]
    if chosen.output_sqnr_db is None:
        parts.append("The layer did not run on the calibration data: judged by the weight's own error.")
    best = max((m for m in measured if m.format), key=lambda m: m.sqnr_db)
    if (gap := gap_db(best.sqnr_db, chosen.sqnr_db)) > 0:
        compared = zip(_preference(chosen), _preference(best), _PREFERRED, strict=True)
        reason = next(text for ours, theirs, text in compared if ours > theirs)
        parts.append(f"{best.format} is {gap:.2f} dB better, inside the margin; preferred because {reason}.")
    if runner_up is None:
        parts.append("No other candidate fits.")
    elif (lead := gap_db(chosen.sqnr_db, runner_up.sqnr_db)) > 0:
        parts.append(f"{lead:.2f} dB better than {runner_up.format}{_where(chosen, runner_up)}.")
    if facts.inputs_sqnr_db is not None and chosen.output_sqnr_db is not None:
        share = 100 * min(1.0, 10 ** ((chosen.output_sqnr_db - facts.inputs_sqnr_db) / 10))
        parts.append(f"Rounding the inputs alone makes {share:.0f} % of the error.")
    return " ".join(parts)


def _element(measured: Measured) -> str:
    return measured.format.partition(":")[0].partition("-")[0]


def _preference(measured: Measured) -> tuple[int, int, float]:
    rank = _RANK[measured.integer]
    return int(rank == 2), int(rank >= 1), -round(measured.bits, 2)


def _shape(facts: Facts) -> str:
    if facts.beyond == 0:
        text = f"No weight beyond four σ of its row (largest {facts.peak:.1f} σ)"
    else:
        text = f"{facts.beyond:.2g} % of weights beyond four σ of their row, the largest at {facts.peak:.1f} σ"
    if facts.pairs is None:
        return f"{text}."
    return f"{text}; {f'{facts.pairs:.2g} % of pairs hold' if facts.pairs else 'no pair holds'} an outlier."


def _where(chosen: Measured, other: Measured) -> str:
    """Which weights make the difference; or, if they do not, that the sum over columns does."""
    if chosen.zones is None or other.zones is None or chosen.output_sqnr_db is None:
        return ""
    gains = [theirs - ours for ours, theirs in zip(chosen.zones, other.zones, strict=True)]
    total, ours, theirs = sum(gains), sum(chosen.zones), sum(other.zones)
    if total <= 0:
        worse = 10 * math.log10(ours / theirs) if ours and theirs else 0.0
        return f", though column by column its weights err {worse:.2f} dB more: their sum at the output decides"
    main, lost = gains.index(max(gains)), gains.index(min(gains))
    share = gains[main] / total
    most = "all" if share >= 1 else f"{100 * share:.0f} %"
    text = f"; {most} of the gain is on weights {ZONES[main]} ({_lower(chosen, other, main)})"
    return f"{text}, {ZONES[lost]} it errs more ({_lower(chosen, other, lost)})" if gains[lost] < 0 else text


def _lower(chosen: Measured, other: Measured, zone: int) -> str:
    assert chosen.zones is not None and other.zones is not None
    ours, theirs = chosen.zones[zone], other.zones[zone]
    if not ours or not theirs:
        return "no error there" if not ours else "none in the other"
    return f"{10 * math.log10(ours / theirs):+.1f} dB"
