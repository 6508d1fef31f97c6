"""Per-channel statistics of activations as calibration collects them: every layer, every memory format, every cut.

And the note's mistake: x.view(-1, C) on [N, C, H, W] reads rows of neighbouring pixels, not channels. Any positive s
leaves the float model as it is, so no equivalence test notices; planted channels do.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from evenbits.nn.layout import layout_of
from evenbits.observers.calibrate import channel_ranges

C = 6
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear [N, C]": (lambda: nn.Linear(C, 2), (7, C)),
    "Linear [N, T, C]": (lambda: nn.Linear(C, 2), (2, 3, C)),
    "Linear [C]": (lambda: nn.Linear(C, 2), (C,)),
    "Conv1D [N, T, C]": (lambda: Conv1D(2, C), (2, 3, C)),
    "Conv1d [N, C, L]": (lambda: nn.Conv1d(C, 2, 2), (2, C, 5)),
    "Conv1d [C, L]": (lambda: nn.Conv1d(C, 2, 2), (C, 5)),
    "Conv2d [N, C, H, W]": (lambda: nn.Conv2d(C, 2, 2), (2, C, 4, 5)),
    "Conv2d [N, C, C, C]": (lambda: nn.Conv2d(C, 2, 2), (C, C, C, C)),
    "Conv2d [C, H, W]": (lambda: nn.Conv2d(C, 2, 2), (C, 4, 5)),
    "Conv2d, grouped": (lambda: nn.Conv2d(C, 4, 2, groups=2), (2, C, 4, 5)),
    "Conv2d, depthwise": (lambda: nn.Conv2d(C, 2 * C, 2, groups=C), (2, C, 4, 5)),
    "Conv3d [N, C, D, H, W]": (lambda: nn.Conv3d(C, 2, 2), (2, C, 3, 4, 5)),
    "Conv3d [C, D, H, W]": (lambda: nn.Conv3d(C, 2, 2), (C, 3, 4, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(C, 2, 2), (2, C, 5)),
    "ConvTranspose2d, grouped": (lambda: nn.ConvTranspose2d(C, 2, 2, groups=2), (2, C, 4, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(C, 2, 2), (2, C, 3, 4, 5)),
}


def absmax(module: nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    """The statistic as the pipeline collects it: a hook on the layer inside a model, channels from its layout."""
    model, layout = nn.Sequential(module).to(batches[0].dtype).eval(), layout_of(module)
    assert layout is not None

    def run_all() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    return channel_ranges(model, {"0": layout.channel_dim}, run_all)["0"].absmax


def along(x: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """A view of x with the channels first, by the words in the layer's name: C is where they are."""
    words = name.partition("[")[2].rstrip("]").split(", ")
    dim = words.index("C") if "C" in words else 1
    return x.movedim(dim, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_planted_channels_are_recovered(name: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    x = torch.rand(shape) * 0.5
    channels = along(x, shape, name)
    planted = torch.tensor([1.0, -80.0, 2.0, 30.0, -3.0, 0.0])  # outliers of both signs, and a dead channel
    for channel, value in zip(channels, planted, strict=True):
        channel[(-1,) * channel.ndim] = value
    channels[5].zero_()
    found = absmax(make(), [x.to(dtype)])
    assert found.dtype == torch.float32 and torch.equal(found, planted.abs())


FORMATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "every second pixel": lambda x: x[:, :, ::2, 1:],
    "every second picture": lambda x: x[::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "channels permuted and back": lambda x: x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
}


@pytest.mark.parametrize("name", FORMATS)
def test_memory_has_no_say_in_it(name: str) -> None:
    x = FORMATS[name](torch.randn(4, C, 6, 6) * torch.logspace(-1, 1, C).view(1, C, 1, 1))
    found = absmax(nn.Conv2d(C, 2, 2), [x])
    assert torch.equal(found, torch.stack([x[:, c].abs().max() for c in range(C)]))


@given(cuts=st.lists(st.integers(1, 15), max_size=5), seed=st.integers(0, 2**16), order=st.randoms())
def test_the_cut_into_batches_and_their_order_have_no_say_in_it(cuts: list[int], seed: int, order: object) -> None:
    x = torch.randn(16, C, 3, 3, generator=torch.Generator().manual_seed(seed))
    parts = [part for part in x.tensor_split(sorted(cuts)) if len(part)]
    order.shuffle(parts)  # type: ignore[attr-defined]
    assert torch.equal(absmax(nn.Conv2d(C, 2, 2), parts), absmax(nn.Conv2d(C, 2, 2), [x]))


def test_a_lone_negative_outlier_counts() -> None:
    """max(x) and the absolute value afterwards would say 0.5."""
    x = torch.full((2, C, 4, 4), 0.5)
    x[1, 3, 2, 2] = -80.0
    assert absmax(nn.Conv2d(C, 2, 2), [x])[3] == 80.0


SHAPE = (4, 256, 182, 182)


def test_rows_of_a_view_are_not_channels_at_the_shape_of_the_note() -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    x[:, 17] *= 80.0
    x[:, 200] *= 30.0
    truth = torch.stack([x[:, c].abs().max() for c in range(SHAPE[1])])
    found = absmax(nn.Conv2d(256, 1, 1), [x])
    wrong = x.view(-1, SHAPE[1]).abs().amax(0)

    def correlation(a: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack([a, truth]).double())[0, 1])

    assert torch.equal(found, truth) and correlation(found) == pytest.approx(1.0)
    assert abs(correlation(wrong)) < 0.2
    assert int((truth > 20).sum()) == 2 and int((wrong > 20).sum()) == 256
    assert float(truth.max() / truth.median()) > 60 and float(wrong.max() / wrong.median()) < 2


def test_rows_of_a_view_are_not_channels_of_a_weight() -> None:
    """Only 1×1 kernels happen to agree."""
    for kernel, agrees in ((1, True), (3, False)):
        conv = nn.Conv2d(256, 256, kernel)
        weight, layout = torch.randn_like(conv.weight), layout_of(conv)
        weight[:, 17] *= 80.0
        weight[:, 200] *= 30.0
        assert layout is not None
        found, mixed = layout.input_absmax(weight), weight.reshape(-1, 256).abs().amax(0)
        assert set(found.topk(2).indices.tolist()) == {17, 200} and int((found > 20).sum()) == 2
        correlation = float(torch.corrcoef(torch.stack([found, mixed]))[0, 1])
        assert (correlation > 0.999) if agrees else (abs(correlation) < 0.2)
