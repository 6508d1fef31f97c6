"""The search for alpha on small models, against losses computed here in float64 from the definition of the formats."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import evenbits
from evenbits.errors import EvenbitsError
from evenbits.pipeline import tuning as tuning_module
from evenbits.pipeline.result import RegionRow, Result
from evenbits.pipeline.trials import Trials

GRID = "auto:0.1:0.9:0.1"
POINTS = [round(0.1 * i, 1) for i in range(1, 10)]
STATIC, DYNAMIC = "W8A8_STATIC", "W8A8"


def rounded(x: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    step = absmax / 127
    return (x / step).round().clamp(-127, 127) * step


def by_row(x: torch.Tensor) -> torch.Tensor:
    """x rounded with one scale for each entry of the first dimension."""
    return rounded(x, x.abs().flatten(1).amax(1).view(-1, *(1,) * (x.ndim - 1)))


def by_input_channel(weight: torch.Tensor) -> torch.Tensor:
    return rounded(weight, weight.abs().amax((0, 2, 3), keepdim=True))


def factors(layer: nn.Module, xs: list[torch.Tensor], alpha: float) -> torch.Tensor:
    """The paper's formula, one factor per input channel (dimension 1 of input and weight)."""
    others = [0, *range(2, xs[0].ndim)]
    act = torch.stack([x.double().abs().amax(others) for x in xs]).amax(0)
    weight = layer.weight.detach().double()
    return act**alpha / weight.abs().amax([0, *range(2, weight.ndim)]) ** (1 - alpha)


def loss_at(layer: nn.Module, xs: list[torch.Tensor], alpha: float, scheme: str, encode: Any = by_row) -> float:
    """Relative squared error of the layer's output: its weight by output rows, its input by tensor or by row."""
    s = factors(layer, xs, alpha).view(1, -1, *(1,) * (xs[0].ndim - 2))
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    apply = F.conv2d if weight.ndim == 4 else F.linear
    even = [x.double() / s for x in xs]
    largest = torch.stack([x.abs().max() for x in even]).max()
    codes = [rounded(x, largest) if scheme == STATIC else by_row(x) for x in even]
    exact = [apply(x.double(), weight, bias) for x in xs]
    quiet = encode(weight * s)
    error = sum(float((apply(x, quiet, bias) - y).square().sum()) for x, y in zip(codes, exact, strict=True))
    return error / sum(float(y.square().sum()) for y in exact)


def layer_and_data(kind: str, seed: int, batches: int = 3) -> tuple[nn.Module, list[torch.Tensor]]:
    """Loud channels, and quiet weights for them, as trained models have."""
    generator = torch.Generator().manual_seed(seed)
    loud = 10 ** (torch.randn(16, generator=generator) * 0.6)
    if kind == "linear":
        layer: nn.Module = nn.Linear(16, 12)
        xs = [torch.randn(20, 16, generator=generator) * loud for _ in range(batches)]
    else:
        layer = nn.Conv2d(16, 12, 3)
        xs = [torch.randn(2, 16, 6, 6, generator=generator) * loud.view(-1, 1, 1) for _ in range(batches)]
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        layer.weight /= loud.sqrt().view(1, -1, *(1,) * (layer.weight.ndim - 2))
    return layer, xs


def tuned(model: nn.Module, data: Any, scheme: Any = STATIC, alpha: str = GRID, **options: Any) -> Result:
    return evenbits.quantize(model.eval(), scheme=scheme, method="smoothquant", data=data, alpha=alpha, **options)


@pytest.mark.parametrize("scheme", [STATIC, DYNAMIC])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("seed", range(4))
def test_no_alpha_of_the_grid_would_have_been_better(seed: int, kind: str, scheme: str) -> None:
    layer, xs = layer_and_data(kind, seed)
    (row,) = tuned(nn.Sequential(copy.deepcopy(layer)), xs, scheme).regions
    assert row.alpha is not None and row.status == "multiplied"
    ours = {alpha: loss_at(layer, xs, alpha, scheme) for alpha in POINTS}
    curve = dict(row.curve)
    assert [curve[alpha] for alpha in POINTS] == pytest.approx(list(ours.values()), rel=2e-2)
    assert loss_at(layer, xs, row.alpha, scheme) <= min(ours.values()) * 1.02  # ties of rounding in float32
    assert curve[row.alpha] == min(curve.values())
    assert [alpha for alpha, _ in row.curve] == sorted(curve) and len(curve) == len(POINTS) + 5


@pytest.mark.parametrize("seed", range(3))
def test_weights_rounded_by_input_channel_would_draw_alpha_to_one(seed: int) -> None:
    """A published search does that for convolutions: smoothing looks free, and the true loss there is several times
    that of the best alpha."""
    torch.manual_seed(seed)
    layer, gains = nn.Conv2d(32, 16, 3), 10 ** (torch.randn(32) * 0.3)
    gains[[3, 20]] = torch.tensor([200.0, 60.0])
    xs = [torch.randn(2, 32, 8, 8) * gains.view(-1, 1, 1) for _ in range(3)]
    every = [round(0.05 * i, 2) for i in range(21)]
    true = {alpha: loss_at(layer, xs, alpha, STATIC) for alpha in every}
    wrong = {alpha: loss_at(layer, xs, alpha, STATIC, by_input_channel) for alpha in every}
    drawn = min(wrong, key=wrong.__getitem__)
    (row,) = tuned(nn.Sequential(copy.deepcopy(layer)), xs, alpha="auto:0:1:0.05").regions
    assert drawn >= 0.95
    assert row.alpha is not None and 0.45 <= row.alpha <= 0.7
    assert true[drawn] > 4 * loss_at(layer, xs, row.alpha, STATIC)


class Block(nn.Module):
    """Two regions: what the norm gives, and what is between the layers."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        with torch.no_grad():
            self.norm.weight *= 10 ** torch.randn(width)
            self.up.weight[:6] *= 20

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks; what reaches each is shown to whoever listens."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.blocks, self.listen = nn.ModuleList(Block() for _ in range(count)), lambda index, x: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            self.listen(index, x)
            x = block(x)
        return x


def tokens(count: int, size: int = 10) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randn(size, 12, generator=generator) for _ in range(count)]


def by_block(rows: tuple[RegionRow, ...]) -> dict[str, set[float | None]]:
    found: dict[str, set[float | None]] = {}
    for row in rows:
        found.setdefault(row.layers[0].rpartition(".")[0], set()).add(row.alpha)
    return found


@pytest.mark.parametrize("sequential", [False, True])
def test_a_block_has_one_alpha(sequential: bool) -> None:
    found = by_block(tuned(Net(), tokens(2), scope="block", sequential=sequential).regions)
    assert set(found) == {"blocks.0", "blocks.1", "blocks.2"}
    assert all(len(alphas) == 1 for alphas in found.values())
    apart = by_block(tuned(Net(), tokens(2), sequential=sequential).regions)
    assert any(len(alphas) == 2 for alphas in apart.values())


@pytest.mark.parametrize("scope", ["region", "block"])
def test_sequential_tuning_sees_quantized_inputs(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for sequential in (False, True):
        model, data, phase = Net(), tokens(2), [0]
        reference: list[list[torch.Tensor]] = [[], [], []]
        model.listen = lambda index, x: reference[index].append(x.clone())  # noqa: B023
        with torch.no_grad():
            for batch in data:
                model(batch)
        seen: dict[int, list[tuple[int, bool]]] = {}

        def listen(index: int, x: torch.Tensor) -> None:
            known = any(x.equal(y) for y in reference[index])  # noqa: B023
            seen.setdefault(phase[0], []).append((index, known))  # noqa: B023

        rounds = tuning_module._rounds

        def counted(*args: Any, **kwargs: Any) -> Any:
            phase[0] += 1  # noqa: B023
            found = rounds(*args, **kwargs)  # noqa: B023
            phase.append(phase[0])  # noqa: B023
            return found

        model.listen = listen
        with monkeypatch.context() as patch:
            patch.setattr(tuning_module, "_rounds", counted)
            patch.setattr("evenbits.pipeline.balance.prove", lambda *args, **kwargs: phase.__setitem__(0, 99) or {})  # noqa: B023
            tuned(model, data, scope=scope, sequential=sequential)
        tuning = {number: facts for number, facts in seen.items() if 0 < number < 99}
        if sequential:
            assert set(tuning) == {1, 2, 3}
            for number, facts in tuning.items():
                assert all(known is (index == 0 or number == 1) for index, known in facts)
        else:
            assert all(known for facts in tuning.values() for _, known in facts)


@pytest.mark.parametrize("scheme", [STATIC, DYNAMIC])
@pytest.mark.parametrize("options", [{}, {"scope": "block"}, {"criterion": "mean"}], ids=str)
def test_how_the_data_is_split_does_not_matter(scheme: str, options: dict[str, Any]) -> None:
    """In float64: in float32 a product's last bit depends on how many rows it has, and now and then a code does."""
    whole = torch.cat(tokens(6)).double()
    torch.manual_seed(1)
    model, found = Net(2).double(), []
    for data in ([whole], list(whole.split(7)), list(whole.split(30))):
        found.append(tuned(copy.deepcopy(model), data, scheme, **options).regions)
    for rows in found[1:]:
        for one, other in zip(found[0], rows, strict=True):
            losses, others = dict(one.curve), dict(other.curve)
            assert [losses[a] for a in POINTS] == pytest.approx([others[a] for a in POINTS], rel=1e-5)
            assert one.alpha == pytest.approx(other.alpha, abs=1e-6)


def test_data_that_can_be_walked_once_tunes_on_the_kept_batches_and_says_so() -> None:
    data = tokens(7)
    once = tuned(Net(2), iter(data))
    assert any("α was tuned on the first 4 batches" in note for note in once.notes)
    assert once.calibration_batches == 7
    for whole in (tuned(Net(2), data), tuned(Net(2), iter(data[:3])), tuned(Net(2), iter(data), alpha=0.5)):
        assert not any("tuned on" in note for note in whole.notes)


class Walk:
    """Batches made as they are asked for. `shown`: the most bytes that were alive while the model ran."""

    def __init__(self, count: int) -> None:
        self.count, self.walks = count, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.walks += 1
        generator = torch.Generator().manual_seed(8)
        return (torch.randn(400, 12, generator=generator) for _ in range(self.count))


def live_bytes() -> int:
    storages = {}
    for found in gc.get_objects():
        # Packed convolution weights that other tests left behind have no storage to ask for.
        if type(found) in (torch.Tensor, nn.Parameter) and found.layout is torch.strided:
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("options", [{}, {"scope": "block"}, {"sequential": True}], ids=str)
def test_memory_does_not_grow_with_the_number_of_batches(options: dict[str, Any]) -> None:
    peaks = []
    for count in (5, 15):
        model, data, peak = Net(2), Walk(count), [0, 0]
        gc.collect()
        before = live_bytes()

        def listen(index: int, x: torch.Tensor) -> None:
            peak[1] += index  # noqa: B023
            if index == 1 and peak[1] % 5 == 0:  # noqa: B023
                peak[0] = max(peak[0], live_bytes() - before)  # noqa: B023

        model.listen = listen
        tuned(model, data, alpha="auto:0.5:0.5:0.1", **options)
        assert data.walks > 1 and peak[0] > 0
        peaks.append(peak[0])
    assert peaks[1] <= peaks[0] + 400 * 12 * 4  # ten batches more are ten times that


def test_a_search_inside_a_search_is_refused() -> None:
    model = Net(1).eval()
    before = copy.deepcopy(model.state_dict())
    scheme = {"weights": "int8:row", "input_activations": "int8:tensor:mse", "dynamic": False}
    with pytest.raises(EvenbitsError, match=r"a search for alpha needs dynamic activations.*Give alpha as a number"):
        tuned(model, tokens(1), scheme)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert tuned(model, tokens(1), scheme, alpha=0.5).regions  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"scope": "block"}, {"sequential": True}], ids=str)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, EvenbitsError])
def test_an_error_in_the_middle_leaves_the_model(
    options: dict[str, Any], error: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, count = Net(3).eval(), [0]
    before = copy.deepcopy(model.state_dict())
    modules = [(name, id(module)) for name, module in model.named_modules()]
    build = Trials.build

    def fail(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == 25:  # in sequential tuning the first block's layers are replaced by then
            raise error("now")
        return build(*args, **kwargs)

    monkeypatch.setattr(Trials, "build", fail)
    with pytest.raises(error, match="now"):
        tuned(model, tokens(2), **options)
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_two_runs_are_the_same_to_the_bit() -> None:
    model, data = Net(2), tokens(3)
    copies = [copy.deepcopy(model) for _ in range(2)]
    first, second = (tuned(each, data, sequential=True) for each in copies)
    assert [(row.alpha, row.curve) for row in first.regions] == [(row.alpha, row.curve) for row in second.regions]
    pairs = zip(copies[0].state_dict().values(), copies[1].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
