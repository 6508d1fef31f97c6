"""The demo networks: their shapes, that planting changes nothing, and that the shipped weights are any good."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evenbits.demo.model import (
    ByteLM,
    ByteLMConfig,
    DigitNet,
    RMSNorm,
    calibration_digits,
    calibration_text,
    evaluation_digits,
    evaluation_text,
    generate,
    load_byte_lm,
    load_digit_net,
    plant_outliers,
)
from evenbits.errors import EvenbitsError

PERPLEXITY_BOUND = 3.6  # the shipped weights gave 3.324 on these 8 KB
SMALL = ByteLMConfig(dim=32, layers=2, heads=4, hidden=48, context=24)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A fixed thread count, so that sums are taken in the same order on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small() -> ByteLM:
    torch.manual_seed(3)
    return ByteLM(SMALL).eval()


@pytest.fixture(scope="module")
def shipped() -> ByteLM:
    return load_byte_lm()


def random_ids(batch: int, length: int) -> Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(5))


def norm_outputs(model: ByteLM, ids_BT: Tensor) -> dict[str, Tensor]:
    """The output [B, T, D] of every norm of `model`, by name."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):

            def keep(_module: torch.nn.Module, _inputs: object, output: Tensor, name: str = name) -> None:
                seen[name] = output

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(ids_BT)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def perplexity(model: ByteLM, text: bytes) -> float:
    data_L = torch.tensor(list(text))
    windows_BT = data_L.unfold(0, 257, 256)
    logits_BTV = model(windows_BT[:, :-1])
    return math.exp(F.cross_entropy(logits_BTV.flatten(0, 1), windows_BT[:, 1:].flatten()).item())


# --- ByteLM


def test_byte_lm_gives_a_logit_per_byte_value(small: ByteLM) -> None:
    logits_BTV = small(random_ids(3, 10))
    assert logits_BTV.shape == (3, 10, 256)
    assert logits_BTV.dtype == torch.float32


def test_byte_lm_never_looks_ahead(small: ByteLM) -> None:
    ids_BT = random_ids(1, 16)
    changed_BT = ids_BT.clone()
    changed_BT[0, 9] = (changed_BT[0, 9] + 1) % 256
    before, after = small(ids_BT), small(changed_BT)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_byte_lm_tells_positions_apart(small: ByteLM) -> None:
    """Without positions, attention over the same bytes in another order would give the same last logits."""
    small.double()
    one, other = small(torch.tensor([[1, 2, 3, 4]])), small(torch.tensor([[2, 1, 3, 4]]))
    assert not torch.allclose(one[:, -1], other[:, -1])


def test_too_long_an_input_is_a_plain_error(small: ByteLM) -> None:
    with pytest.raises(EvenbitsError, match="25 bytes long; this model sees at most 24"):
        small(random_ids(1, 25))


@pytest.mark.parametrize("sizes", [{"heads": 5}, {"dim": 12, "heads": 4}, {"layers": 0}])
def test_impossible_sizes_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(EvenbitsError, match=r"multiple of twice|at least 1"):
        ByteLMConfig(**sizes)


def test_byte_lm_can_be_traced(small: ByteLM) -> None:
    ids_BT = random_ids(2, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(small)(ids_BT), small(ids_BT))


def test_generate_slides_its_window_and_repeats_itself(small: ByteLM) -> None:
    greedy = generate(small, b"abc", 40)
    assert len(greedy) == 40
    assert generate(small, b"abc", 40) == greedy
    sampled = generate(small, b"abc", 40, temperature=1.0, seed=1)
    assert sampled == generate(small, b"abc", 40, temperature=1.0, seed=1)
    assert sampled != generate(small, b"abc", 40, temperature=1.0, seed=2)


def test_generate_refuses_an_empty_prompt_and_negative_numbers(small: ByteLM) -> None:
    with pytest.raises(EvenbitsError, match="prompt is empty"):
        generate(small, b"", 1)
    with pytest.raises(EvenbitsError, match="must not be negative"):
        generate(small, b"a", 1, temperature=-1.0)


# --- plant_outliers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planting_leaves_every_logit_bit_for_bit(dtype: torch.dtype) -> None:
    model = load_byte_lm().to(dtype)
    ids_BT = torch.tensor([list(evaluation_text()[:200])])
    with torch.no_grad():
        before = model(ids_BT)
        lines = plant_outliers(model)
        after = model(ids_BT)
    assert len(lines) == 2 * model.config.layers
    assert before.dtype == dtype
    assert torch.equal(after, before)


def test_planted_channels_tower_over_the_others() -> None:
    model = load_byte_lm()
    plant_outliers(model, channels=3)
    outputs = norm_outputs(model, torch.tensor([list(evaluation_text()[:256])]))
    assert len(outputs) == 9  # two per layer and the last one, which is not planted
    for name, y_BTD in outputs.items():
        peaks = y_BTD.abs().amax((0, 1)).tolist()
        ratio = sorted(peaks)[-3] / median(peaks)
        assert ratio > 20 if name != "norm" else ratio < 10, (name, ratio)


def test_planting_names_its_channels_and_follows_its_seed(small: ByteLM) -> None:
    lines = plant_outliers(small, factor=8.0, channels=2, seed=1)
    assert lines[0].startswith("layers.0.input_norm: channels [")
    assert lines[0].endswith("] x 8")
    assert lines == plant_outliers(small, factor=8.0, channels=2, seed=1)
    assert lines != plant_outliers(small, factor=8.0, channels=2, seed=2)


@pytest.mark.parametrize("factor", [3.0, 0.0, -2.0, 65.0, math.inf, math.nan])
def test_planting_needs_a_power_of_two(small: ByteLM, factor: float) -> None:
    with pytest.raises(EvenbitsError, match="not a power of two"):
        plant_outliers(small, factor=factor)


@pytest.mark.parametrize("channels", [0, 33])
def test_planting_needs_channels_that_exist(small: ByteLM, channels: int) -> None:
    with pytest.raises(EvenbitsError, match="the model has 32"):
        plant_outliers(small, channels=channels)


# --- shipped weights and data


def test_shipped_byte_lm_predicts_held_out_text(shipped: ByteLM) -> None:
    """A uniform guess would be at 256 and single-byte frequencies at 25.7; text from this model reads like its kind."""
    assert not shipped.training
    assert sum(parameter.numel() for parameter in shipped.parameters()) == 1_869_504
    assert perplexity(shipped, evaluation_text()[: 8 * 1024 + 1]) < PERPLEXITY_BOUND


def test_shipped_weights_are_widened_halves(shipped: ByteLM) -> None:
    for parameter in (*shipped.parameters(), *load_digit_net().parameters()):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, parameter.half().float())


def test_shipped_byte_lm_writes_words(shipped: ByteLM) -> None:
    written = generate(shipped, b"The value of the ", 60)
    assert all(byte == 10 or 32 <= byte < 127 for byte in written)
    assert b" " in written


def test_shipped_digit_net_reads_digits() -> None:
    model = load_digit_net()
    images_N1YX, labels_N = evaluation_digits()
    assert images_N1YX.shape == (500, 1, 8, 8)
    assert images_N1YX.dtype == torch.float32
    assert labels_N.dtype == torch.int64
    assert 0 <= float(images_N1YX.min()) < 0.1 < 0.9 < float(images_N1YX.max()) <= 1
    assert labels_N.bincount().tolist() == [50] * 10
    with torch.no_grad():
        logits_NC = model(images_N1YX)
    assert logits_NC.shape == (500, 10)
    right = float((logits_NC.argmax(1) == labels_N).float().mean())
    assert 0.95 < right < 1


def test_digit_net_takes_any_number_of_images() -> None:
    assert DigitNet().eval()(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_frozen_texts_share_no_paragraph() -> None:
    evaluation, calibration = evaluation_text(), calibration_text()
    assert len(evaluation) == 48 * 1024
    assert len(calibration) == 16 * 1024
    assert evaluation.isascii()
    assert calibration.isascii()
    assert set(evaluation.split(b"\n\n")) & set(calibration.split(b"\n\n")) <= {b""}


def test_frozen_digits_share_no_image() -> None:
    calibration, labels_N = calibration_digits()
    assert calibration.shape == (128, 1, 8, 8)
    assert labels_N.shape == (128,)
    distinct = torch.cat((evaluation_digits()[0], calibration)).flatten(1).unique(dim=0)
    assert len(distinct) == 628
