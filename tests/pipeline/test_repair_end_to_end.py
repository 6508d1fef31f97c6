"""Re-pairing through `quantize`: folded where rows can be moved, indexed elsewhere, the same function either way."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import evenbits
from evenbits.errors import EvenbitsError


class Mlp(nn.Module):
    """fc1 → activation → fc2: fc2's channels are fc1's rows; fc1's channels come from a norm."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)
        self.gate = nn.Linear(32, 64) if gated else None
        with torch.no_grad():
            self.norm.weight[[4, 5, 16, 17]] *= 60  # two pairs of hot channels in fc1's input
            self.fc1.weight[[10, 11, 40, 41]] *= 40  # and in fc2's
            self.fc1.weight[:, [4, 5, 16, 17]] /= 60

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        up = self.fc1(h)
        hidden = nn.functional.gelu(up) if self.gate is None else nn.functional.silu(self.gate(h)) * up
        y: torch.Tensor = self.fc2(hidden)
        return y


def batches() -> list[torch.Tensor]:
    return [torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


@pytest.mark.parametrize("gated", [False, True])
def test_hot_pairs_are_parted_and_the_error_falls(gated: bool) -> None:
    model = Mlp(gated).eval()
    x, errors = torch.cat(batches()), {}
    with torch.no_grad():
        exact = model(x)
    for method in ("olive", "repair+olive"):
        twin = copy.deepcopy(model)
        result = evenbits.quantize(twin, scheme="W4A4_OVP_DYNAMIC", method=method, data=batches())
        with torch.no_grad():
            errors[method] = float((twin(x) - exact).norm() / exact.norm())
    statuses = {region.name: region.status for region in result.regions}
    assert statuses["fc2"] == "folded"
    first = "{fc1,gate}" if gated else "fc1"
    assert statuses[first] == "indexed"
    assert twin.fc1.input_permutation is not None
    assert twin.fc2.input_permutation is None
    assert errors["repair+olive"] < 0.85 * errors["olive"]


def test_the_permutation_alone_changes_nothing() -> None:
    model = Mlp().eval()
    twin = copy.deepcopy(model)
    evenbits.quantize(twin, scheme={"weights": "fp8:row"}, method="repair", data=batches())
    plain = copy.deepcopy(model)
    evenbits.quantize(plain, scheme={"weights": "fp8:row"}, method="rtn", data=batches())
    x = torch.cat(batches())
    with torch.no_grad():
        assert torch.allclose(twin(x), plain(x), rtol=1e-4, atol=1e-4)


def test_reload_is_exact(tmp_path: Path) -> None:
    model = Mlp().eval()
    evenbits.quantize(model, scheme="W4A8_OVP", method="repair+olive", data=batches())
    loaded = evenbits.load(evenbits.save(model, tmp_path / "out"), Mlp())
    x = batches()[0]
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))
    assert torch.equal(model.fc1.input_permutation, loaded.fc1.input_permutation)


def test_a_second_reader_of_the_rows_prevents_the_fold() -> None:
    class Residual(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            up = self.fc1(self.norm(x))
            y: torch.Tensor = self.fc2(nn.functional.gelu(up)) + up.mean(dim=-1, keepdim=True)
            return y

    result = evenbits.quantize(Residual().eval(), scheme="W4A16_OVP", method="repair+olive", data=batches())
    assert {r.name: r.status for r in result.regions} == {"fc1": "indexed", "fc2": "indexed"}


def test_nothing_collides_nothing_moves() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)).eval()
    data = [torch.randn(4, 16)]
    result = evenbits.quantize(model, scheme="W4A16_OVP", method="repair+olive", data=data)
    assert [region.status for region in result.regions] == ["skipped"]
    assert model[1].input_permutation is None


def test_a_threshold_that_says_nothing_is_refused() -> None:
    with pytest.raises(EvenbitsError, match="above 1"):
        evenbits.quantize(Mlp().eval(), scheme="W4A16_OVP", method="repair+olive", data=batches(), threshold=1.0)
