"""What counts as a block when α is tuned by block or in sequence: every list of modules, not the first one alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

import evenbits
from evenbits.errors import EvenbitsError
from evenbits.graph.regions import Region
from evenbits.pipeline.methods import Methods
from evenbits.pipeline.tuning import blocks


def region(*layers: str) -> Region:
    return Region(layers, 1, {}, {})


def names(model: nn.Module, regions: Sequence[Region]) -> list[tuple[str, list[str]]]:
    return [(block, [r.name for r in members]) for block, members in blocks(model, regions)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(torch.tanh(x))))


def stack(count: int) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(count))


def each(*blocks: str) -> list[Region]:
    return [region(f"{block}.{layer}") for block in blocks for layer in ("up", "down")]


def test_an_encoder_and_a_decoder_and_stages_are_all_lists_of_blocks() -> None:
    model = nn.Module()
    model.encoder, model.decoder = nn.Module(), nn.Module()
    model.encoder.layers, model.decoder.layers, model.stage = stack(2), stack(2), nn.Sequential(Block(), Block())
    found = ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1", "stage.0", "stage.1"]
    assert names(model, each(*found)) == [(block, [f"{block}.up", f"{block}.down"]) for block in found]


def test_a_stage_of_one_block_is_a_list_too_and_lists_inside_blocks_are_not() -> None:
    model = nn.Module()
    model.one, model.two = nn.Sequential(Block()), stack(2)
    for block in model.two:
        block.extra = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    given = [*each("one.0", "two.0"), region("two.0.extra.0"), region("two.0.extra.1"), *each("two.1")]
    assert [block for block, _ in blocks(model, given)] == ["one.0", "two.0", "two.1"]


def test_a_wrapper_with_one_child_and_a_list_of_lists_are_looked_through() -> None:
    model = nn.Module()
    inner = nn.Module()
    inner.layers = stack(2)
    model.wrapper, model.stages = nn.Sequential(inner), nn.ModuleList([stack(2), stack(1)])
    found = ["wrapper.0.layers.0", "wrapper.0.layers.1", "stages.0.0", "stages.0.1", "stages.1.0"]
    assert [block for block, _ in blocks(model, each(*found))] == found


def test_what_lies_in_no_block_or_in_several_is_a_block_of_its_own() -> None:
    model = nn.Module()
    model.stem, model.layers, model.head = nn.Linear(6, 6), stack(2), nn.Linear(6, 6)
    given = [region("stem"), region("layers.0.up", "layers.1.up"), region("layers.1.down"), region("head")]
    assert [block for block, _ in blocks(model, given)] == ["", "", "layers.1", ""]
    assert [block for block, _ in blocks(nn.Linear(6, 6), [region(""), region("")])] == ["", ""]


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


def test_each_block_of_every_stage_has_one_alpha() -> None:
    loud = torch.logspace(-1, 1, 6)
    result = evenbits.quantize(
        Stages().eval(), scheme="W8A8_STATIC", method="smoothquant", alpha="auto:0.2:0.8:0.2", scope="block",
        data=[torch.randn(8, 6) * loud],
    )  # fmt: skip
    alphas: dict[str, set[float | None]] = {}
    for row in result.regions:
        alphas.setdefault(row.name.rpartition(".")[0], set()).add(row.alpha)
    assert list(alphas) == ["one.0", "one.1", "two.0", "two.1"] and all(len(found) == 1 for found in alphas.values())


@pytest.mark.parametrize("criterion", ["min", "max", "mean"])
def test_a_criterion_over_layers_has_no_meaning_for_a_block(criterion: str) -> None:
    with pytest.raises(EvenbitsError, match=f"criterion '{criterion}' .*scope 'block' has none"):
        Methods.parse("smoothquant", {"alpha": "auto", "scope": "block", "criterion": criterion})
    Methods.parse("smoothquant", {"alpha": "auto", "scope": "block", "criterion": "loss"})
    Methods.parse("smoothquant", {"alpha": "auto", "criterion": criterion})
