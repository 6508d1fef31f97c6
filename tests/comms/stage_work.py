"""What the ranks do in tests/comms/test_stages.py. No pytest here: the processes import this file."""

from __future__ import annotations

from typing import Any

from pipelines import Pipeline, batch


def train(rank: int, world: int, schedule: str, steps: int, stock: bool, options: dict[str, Any]) -> Any:
    """Losses of every step, a digest of gradients and parameters, and bytes sent."""
    line = Pipeline(schedule, rank, world, stock=stock, **options)
    losses = [line.step(*batch(step)) for step in range(steps)]
    sent = 0 if stock else sum(stage.bytes_sent() for stage in line.stages)
    return losses, line.fingerprint(), sent


def against_stock(rank: int, world: int, schedules: list[str], steps: int) -> Any:
    """Per schedule: the stock stage's run and the raw codec's."""
    return {
        name: [train(rank, world, name, steps, stock, {} if stock else {"codec": "raw"})[:2] for stock in (True, False)]
        for name in schedules
    }
