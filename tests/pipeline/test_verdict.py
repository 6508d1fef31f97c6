"""The choice among measured formats, and words that say no more than was measured."""

from __future__ import annotations

import math
from typing import Any

import pytest

from evenbits.errors import EvenbitsError
from evenbits.pipeline.advice import Facts, Measured
from evenbits.pipeline.verdict import choose, gap_db, why

FACTS = Facts(peak=5.25, beyond=0.012, pairs=0.5)


def line(name: str, sqnr_db: float | None, **given: Any) -> Measured:
    filled = {"bits": 4.25, "weight_sqnr_db": 20.0, "output_sqnr_db": sqnr_db, **given}
    return Measured(name, name, name, **filled)


def test_the_least_error_wins_and_the_runner_up_is_of_another_type() -> None:
    lines = [line("nf4:g32:mse", 21.0), line("nf4:g64", 20.8), line("ovp4:g32", 20.0), line("int4:g64:mse", 19.5)]
    chosen, runner_up = choose(lines, 0.1)
    assert (chosen.format, runner_up and runner_up.format) == ("nf4:g32:mse", "ovp4:g32")
    assert choose(lines[::-1], 0.1) == (chosen, runner_up)


def test_kinds_of_pairs_are_one_type() -> None:
    lines = [line("ovp4-mix:g32", 22.0), line("ovp4:g32", 21.9), line("ovp4-i8:row", 21.8), line("nf4:g32", 15.0)]
    assert choose(lines, 0.0)[1] == lines[3]


def test_the_runner_up_of_one_type_is_its_second_best_and_of_one_line_none() -> None:
    lines = [line("int4:g64:mse", 20.0), line("int4:g64:7.5:mse", 20.5)]
    assert choose(lines, 0.1) == (lines[1], lines[0])
    assert choose(lines[:1], 0.1) == (lines[0], None)
    assert choose([*lines[:1], Measured("mxfp4", "", "", 4.7, reason="takes more")], 0.1) == (lines[0], None)


@pytest.mark.parametrize(
    ("other", "preferred"),
    [
        (line("int4:row:mse", 20.95, integer="product", bits=4.04), True),
        (line("int4:g64:mse", 20.95, integer="values"), True),
        (line("ovp4:row", 20.95, bits=4.04), True),
        (line("ovp4:row", 20.95, bits=4.247), False),  # the same bits to a hundredth
        (line("ovp4:g32", 20.95), False),
        (line("int4:row:mse", 20.85, integer="product", bits=4.04), False),  # 0.15 dB are no tie
    ],
)
def test_ties_go_to_what_engines_like(other: Measured, preferred: bool) -> None:
    best = line("nf4:g32:mse", 21.0)
    assert (choose([best, other], 0.1)[0] is other) is preferred
    assert choose([best, other], 0.0)[0] is best


def test_among_equals_integer_products_come_before_integer_values_before_bits() -> None:
    lines = [line("nf4:row", 21.0, bits=4.0), line("int4:g64:mse", 20.95, integer="values", bits=4.25),
             line("ovp4-i8:row", 20.91, integer="product", bits=4.3)]  # fmt: skip
    assert [choose(lines[:n], 0.1)[0] for n in (1, 2, 3)] == lines


def test_a_wide_margin_buys_integer_products() -> None:
    lines = [line("nf4:g32:mse", 23.0), line("ovp4-i8:row", 20.6, integer="product")]
    assert (choose(lines, 2.0)[0], choose(lines, 3.0)[0]) == (lines[0], lines[1])


def test_infinite_figures_are_compared() -> None:
    lines = [line("nf4:g32", math.inf), line("int4:g64", math.inf, integer="values"), line("ovp4:g32", 20.0)]
    assert choose(lines, 0.1)[0] is lines[1]
    lines = [line("nf4:g32", -math.inf), line("int4:g64", -math.inf, integer="values")]
    assert choose(lines, 0.1)[0] is lines[1]
    assert gap_db(math.inf, math.inf) == 0 and gap_db(3.0, 1.0) == 2


def test_without_outputs_the_weights_decide() -> None:
    lines = [line("nf4:g32", None, weight_sqnr_db=20.0), line("ovp4:g32", None, weight_sqnr_db=21.0)]
    chosen, runner_up = choose(lines, 0.1)
    assert chosen is lines[1]
    assert "did not run on the calibration data" in why(chosen, runner_up, lines, FACTS)
    with pytest.raises(EvenbitsError, match="takes more"):
        _ = Measured("mxfp4", "", "", 4.7, reason="takes more").sqnr_db


def told(winner: tuple[float, ...], loser: tuple[float, ...], facts: Facts = FACTS, lead: float = 0.93) -> str:
    lines = [line("nf4:g32:mse", 20.0 + lead, zones=winner), line("ovp4:g32", 20.0, zones=loser)]
    return why(*choose(lines, 0.1), lines, facts)


def test_the_zone_that_makes_the_gain_is_named_with_its_share() -> None:
    text = told((1e-3, 2e-3, 1e-3), (2e-3, 2.5e-3, 1e-3))
    assert "0.93 dB better than ovp4:g32; 67 % of the gain is on weights within one σ (-3.0 dB)." in text
    text = told((1e-3, 2e-3, 1e-3), (1.1e-3, 1.9e-3, 9e-3))
    assert "all of the gain is on weights beyond three σ (-9.5 dB), one to three σ it errs more (+0.2 dB)." in text
    assert "no error there" in told((0.0, 1e-3, 0.0), (1e-3, 1e-3, 0.0))


def test_where_weights_do_not_explain_it_the_words_say_so() -> None:
    text = told((2e-3, 2e-3, 0.0), (1e-3, 1e-3, 0.0))
    assert "though column by column its weights err 3.01 dB more: their sum at the output decides" in text
    assert "of the gain" not in text


def test_the_shape_of_the_weights_is_told_as_measured() -> None:
    zones = (1e-3, 1e-3, 0.0)
    assert (
        "0.012 % of weights beyond four σ of their row, the largest at 5.2 σ; 0.5 % of pairs hold an outlier."
        in told(zones, zones)
    )
    assert "No weight beyond four σ of its row (largest 3.2 σ); no pair holds an outlier." in told(
        zones, zones, Facts(3.2, 0.0, 0.0)
    )
    assert "pair" not in told(zones, zones, Facts(23.0, 1.5, None)).split("0.93")[0]


def test_the_inputs_share_is_told_where_inputs_are_rounded() -> None:
    zones = (1e-3, 1e-3, 0.0)
    assert "Rounding the inputs alone makes 10 % of the error." in told(
        zones, (2e-3, 1e-3, 0.0), Facts(5.0, 0.1, 0.5, inputs_sqnr_db=30.93)
    )
    assert "inputs" not in told(zones, zones)


def test_a_tie_names_the_better_format_and_the_reason() -> None:
    lines = [line("nf4:g32:mse", 20.05), line("int4:g64:mse", 20.0, integer="values"), line("ovp4:g32", 18.0)]
    chosen, runner_up = choose(lines, 0.1)
    text = why(chosen, runner_up, lines, FACTS)
    assert chosen is lines[1] and runner_up is lines[0]
    assert "nf4:g32:mse is 0.05 dB better, inside the margin; preferred because int8 holds its values." in text
    assert "better than" not in text
    assert why(lines[0], None, lines[:1], FACTS).endswith("No other candidate fits.")
