"""CodecStage under torch's own schedules, in real processes."""

from __future__ import annotations

import pytest
import stage_work
from pipelines import SCHEDULES
from ranks import run, values


def test_raw_is_bit_identical_to_the_stock_stage_under_every_schedule() -> None:
    for by_schedule in values(run(stage_work.against_stock, 2, list(SCHEDULES), 2)):
        assert set(by_schedule) == set(SCHEDULES)
        for name, (stock, coded) in by_schedule.items():
            assert stock == coded, name


def test_raw_is_bit_identical_on_four_ranks() -> None:
    results = values(run(stage_work.against_stock, 4, ["1F1B"], 2))
    assert any(stock[0][0] for result in results for stock, _ in result.values())
    for result in results:
        stock, coded = result["1F1B"]
        assert stock == coded
