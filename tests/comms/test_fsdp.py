"""FSDP2 on gloo with coded collectives, in real processes, against the same algorithm in one process."""

from __future__ import annotations

from pathlib import Path

import fsdp_work
import pytest
import torch
from ranks import run, values

PARTS = ([0, 1], [2, 3])  # the parameters of the two sharded modules


@pytest.mark.parametrize(
    ("world", "codec", "feedback"), [(2, "int8:g16", False), (2, "int3:g16", True), (4, "int4:g16", True)]
)
def test_gradients_are_those_of_the_algorithm_bit_by_bit(world: int, codec: str, feedback: bool) -> None:
    shapes = [p.shape for p in fsdp_work.net().parameters()]
    results = values(run(fsdp_work.gradients, world, codec, feedback, 2))
    errors = {(rank, part): 0.0 for rank in range(world) for part in range(2)}
    for step in range(2):
        plain = [[torch.tensor(g).view(s) for g, s in zip(found[step][1], shapes, strict=True)] for found, _ in results]
        for part, members in enumerate(PARTS):
            sent, arrived = [], []
            for rank in range(world):
                cut = [fsdp_work.rows(plain[rank][i], world) for i in members]
                whole = torch.stack([torch.cat([c[r].flatten() for c in cut]) for r in range(world)])
                sent.append(whole + errors[rank, part])
                arrived.append(torch.stack([fsdp_work.through(codec, chunk) for chunk in sent[rank]]))
                errors[rank, part] = sent[rank] - arrived[rank] if feedback else 0.0
            mean = torch.stack(arrived).sum(0) / world
            for owner in range(world):
                made = torch.cat([torch.tensor(results[owner][0][step][0][i]) for i in members])
                # FSDP's own shards carry no padding: compare what is there, parameter by parameter.
                expected, place = [], 0
                for i in members:
                    height = -(-shapes[i][0] // world)
                    width = shapes[i].numel() // shapes[i][0]
                    there = max(0, min(height, shapes[i][0] - owner * height))
                    expected.append(mean[owner][place : place + there * width])
                    place += height * width
                assert torch.equal(made, torch.cat(expected)), (step, part, owner)


def test_coded_weights_are_the_decoded_shards_of_every_rank() -> None:
    one, two = values(run(fsdp_work.weights, 2, "int4:g16"))
    assert one == two
    model = fsdp_work.net()
    with torch.no_grad():
        for part in PARTS:
            members = [list(model.parameters())[i] for i in part]
            cut = [fsdp_work.rows(p, 2) for p in members]
            for r in range(2):
                shard = fsdp_work.through("int4:g16", torch.cat([c[r].flatten() for c in cut]))
                place = 0
                for c, p in zip(cut, members, strict=True):
                    height = c[r].shape[0]
                    there = min(height, p.shape[0] - r * height)
                    values_ = shard[place : place + c[r].numel()].view(c[r].shape)
                    p[r * height : r * height + there] = values_[:there]
                    place += c[r].numel()
        expected = model(fsdp_work.data(0, 0)[0]).flatten()
    assert torch.equal(torch.tensor(one), expected)


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    whole = values(run(fsdp_work.train, 2, 0, 5, str(tmp_path)))
    again = values(run(fsdp_work.train, 2, 2, 5, str(tmp_path)))
    for (losses, parameters), (losses2, parameters2) in zip(whole, again, strict=True):
        assert losses[2:] == losses2 and parameters == parameters2
        assert losses[-1] < losses[0]


def test_a_nan_on_one_rank_is_an_error_on_all_and_the_next_batch_goes_on() -> None:
    for steps in values(run(fsdp_work.nan, 2)):
        assert isinstance(steps[0], float) and isinstance(steps[2], float)
        name, text, seconds = steps[1]
        assert name == "AgreedError" and "rank(s) [1] could not code their gradients" in text and seconds < 10


def test_what_cannot_work_is_refused() -> None:
    for kind, text in run(fsdp_work.refused, 2, "differ"):
        assert kind == "AgreedError" and "differ in 'gradients'" in text
    for kind, text in run(fsdp_work.refused, 1, "plain"):
        assert kind == "EvenbitsError" and "call fully_shard before" in text
