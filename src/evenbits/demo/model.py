"""The demo networks: a byte-level language model and a digit classifier, small, trained and shipped with the package.

Why two. `ByteLM` has what makes language models hard to quantize: norms that feed several Linear layers at once, a
gated MLP, and, after `plant_outliers`, channels far larger than the rest. `DigitNet` has what convnets bring:
convolutions followed by BatchNorm, a depthwise layer with unlike channels, and pooling.

Shape suffixes: B batch, T positions, D model width, H heads, E width of one head, F hidden width of the MLP,
V vocabulary (256 byte values), N images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources

import torch
import torch.fx
import torch.nn.functional as F
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from evenbits.errors import EvenbitsError

VOCABULARY = 256


@dataclass(frozen=True)
class ByteLMConfig:
    """Sizes of a `ByteLM`. `dim` must be divisible by `heads`, and `dim / heads` must be even (rotary pairs)."""

    dim: int = 192
    layers: int = 4
    heads: int = 6
    hidden: int = 512
    context: int = 256

    def __post_init__(self) -> None:
        if min(self.dim, self.layers, self.heads, self.hidden, self.context) < 1:
            raise EvenbitsError(f"every size of {self} must be at least 1")
        if self.dim % (2 * self.heads):
            raise EvenbitsError(f"dim {self.dim} must be a multiple of twice the number of heads, {2 * self.heads}")


class RMSNorm(nn.Module):
    """`weight * x / rms(x)`: every position is scaled to unit mean square, then each channel by its own weight."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Float [B, T, D] in and out."""
        x_hat_BTD = x_BTD * torch.rsqrt(x_BTD.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * x_hat_BTD


class Attention(nn.Module):
    """Causal self-attention with rotary position embeddings and four projections without bias."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        """Float [B, T, D] in and out; `cos_TE` and `sin_TE` are the rotary tables, float [T, E]."""
        q_BHTE = _rotate(self._split_heads(self.q_proj(x_BTD)), cos_TE, sin_TE)
        k_BHTE = _rotate(self._split_heads(self.k_proj(x_BTD)), cos_TE, sin_TE)
        v_BHTE = self._split_heads(self.v_proj(x_BTD))
        mixed_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, is_causal=True)
        out_BTD: Tensor = self.o_proj(mixed_BHTE.transpose(1, 2).flatten(2))
        return out_BTD

    def _split_heads(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        return x_BTD.view(B, T, self.heads, -1).transpose(1, 2)


class GatedMLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Float [B, T, D] in and out."""
        hidden_BTF = F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD)
        out_BTD: Tensor = self.down_proj(hidden_BTF)
        return out_BTD


class Block(nn.Module):
    """One decoder layer: attention, then MLP, each after its own norm and added to the residual stream."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.dim)
        self.attention = Attention(config)
        self.post_norm = RMSNorm(config.dim)
        self.mlp = GatedMLP(config)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        """Float [B, T, D] in and out."""
        x_BTD = x_BTD + self.attention(self.input_norm(x_BTD), cos_TE, sin_TE)
        out_BTD: Tensor = x_BTD + self.mlp(self.post_norm(x_BTD))
        return out_BTD


class ByteLM(nn.Module):
    """A Llama-style decoder over bytes: it predicts the next of 256 values from up to `config.context` bytes before."""

    cos_TE: Tensor
    sin_TE: Tensor

    def __init__(self, config: ByteLMConfig | None = None) -> None:
        super().__init__()
        self.config = config or ByteLMConfig()
        self.embed = nn.Embedding(VOCABULARY, self.config.dim)
        self.layers = nn.ModuleList(Block(self.config) for _ in range(self.config.layers))
        self.norm = RMSNorm(self.config.dim)
        self.lm_head = nn.Linear(self.config.dim, VOCABULARY, bias=False)
        cos_TE, sin_TE = _rotary_tables(self.config.context, self.config.dim // self.config.heads)
        self.register_buffer("cos_TE", cos_TE, persistent=False)
        self.register_buffer("sin_TE", sin_TE, persistent=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits of the byte after each position: int64 [B, T], T <= context, to float [B, T, 256]."""
        _, T = ids_BT.shape
        cos_TE, sin_TE = _first_positions(self.cos_TE, T), _first_positions(self.sin_TE, T)
        x_BTD = self.embed(ids_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos_TE, sin_TE)
        logits_BTV: Tensor = self.lm_head(self.norm(x_BTD))
        return logits_BTV


class DigitNet(nn.Module):
    """A convnet for 8x8 grey digits: two convolutions with BatchNorm, a depthwise-separable one, a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 48, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(48)
        self.pool = nn.MaxPool2d(2)
        self.depthwise = nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.pointwise = nn.Conv2d(48, 96, 1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(96 * 4 * 4, 10)

    def forward(self, x_N1YX: Tensor) -> Tensor:
        """Logits of the ten digits: float32 [N, 1, 8, 8] in 0..1 (ink is bright) to float32 [N, 10]."""
        x = self.relu(self.bn1(self.conv1(x_N1YX)))
        x = self.pool(self.relu(self.bn2(self.conv2(x))))
        x = self.relu(self.pointwise(self.depthwise(x)))
        logits_NC: Tensor = self.fc(x.flatten(1))
        return logits_NC


def plant_outliers(model: ByteLM, factor: float = 64.0, channels: int = 3, seed: int = 0) -> list[str]:
    """Give `model` the outlier channels of a large language model, in place, without changing what it computes.

    In every norm that feeds attention or an MLP, `channels` weights are multiplied by `factor`, and the matching input
    columns of all consumers (q, k, v or gate, up) are divided by it. A power of two only moves exponents, so the
    products, and with them the logits, stay bit for bit the same. Yet one scale for the whole activation tensor must
    now span `factor` times the range, and the other channels keep few of its steps.

    Returns one line per norm that says which channels were scaled.
    """
    if not (math.isfinite(factor) and factor > 0 and math.frexp(factor)[0] == 0.5):
        raise EvenbitsError(f"factor {factor} is not a power of two; only a power of two is exact, for example 64")
    dim = model.config.dim
    if not 0 < channels <= dim:
        raise EvenbitsError(f"channels is {channels}; the model has {dim}, so it must be 1 to {dim}")
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        attention, mlp = layer.attention, layer.mlp
        for name, norm, consumers in (
            ("input_norm", layer.input_norm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            ("post_norm", layer.post_norm, (mlp.gate_proj, mlp.up_proj)),
        ):
            picked = torch.randperm(dim, generator=generator)[:channels].sort().values.to(norm.weight.device)
            with torch.no_grad():
                norm.weight[picked] *= factor
                for consumer in consumers:
                    consumer.weight[:, picked] /= factor
            lines.append(f"layers.{index}.{name}: channels {picked.tolist()} x {factor:g}")
    return lines


@torch.no_grad()
def generate(model: ByteLM, prompt: bytes, n: int, temperature: float = 0.0, seed: int = 0) -> bytes:
    """The `n` bytes that `model` writes after `prompt` (which is not part of the result).

    `temperature` 0 takes the likeliest byte each time; above 0 it samples, the same for the same `seed`. Only the last
    `context` bytes are seen at each step.
    """
    if not prompt:
        raise EvenbitsError("the prompt is empty; give at least one byte to continue")
    if n < 0 or temperature < 0:
        raise EvenbitsError(f"n ({n}) and temperature ({temperature}) must not be negative")
    device = model.lm_head.weight.device
    generator = torch.Generator().manual_seed(seed)
    written = list(prompt)
    for _ in range(n):
        window_BT = torch.tensor([written[-model.config.context :]], device=device)
        logits_V = model(window_BT)[0, -1].float().cpu()
        if temperature == 0:
            written.append(int(logits_V.argmax()))
        else:
            probabilities_V = torch.softmax(logits_V / temperature, dim=0)
            written.append(int(torch.multinomial(probabilities_V, 1, generator=generator)))
    return bytes(written[len(prompt) :])


def load_byte_lm() -> ByteLM:
    """The trained language model: float32 on the CPU, in eval mode. Its weights are fp16 values, widened."""
    model = ByteLM()
    model.load_state_dict(_stored("byte_lm."))
    return model.eval()


def load_digit_net() -> DigitNet:
    """The trained digit classifier: float32 on the CPU, in eval mode. Its weights are fp16 values, widened."""
    model = DigitNet()
    model.load_state_dict(_stored("digit_net."))
    return model.eval()


def evaluation_text() -> bytes:
    """About 48 KB of the Python documentation that `ByteLM` was not trained on: measure perplexity on this."""
    return _file("text.txt")


def calibration_text() -> bytes:
    """About 16 KB more, in neither the training nor the evaluation text: calibrate on this."""
    return _file("calibration.txt")


def evaluation_digits() -> tuple[Tensor, Tensor]:
    """500 held-out digits: images float32 [N, 1, 8, 8] in 0..1 and labels int64 [N]."""
    return _digits("eval")


def calibration_digits() -> tuple[Tensor, Tensor]:
    """128 more digits, in neither the training nor the evaluation set; same form as `evaluation_digits`."""
    return _digits("calibration")


def _digits(part: str) -> tuple[Tensor, Tensor]:
    stored = _stored("digits.")
    images_N1YX = stored[f"{part}_images"].float().div(255).unsqueeze(1)
    return images_N1YX, stored[f"{part}_labels"].long()


def _stored(prefix: str) -> dict[str, Tensor]:
    """The tensors of weights.safetensors whose name starts with `prefix`, the prefix cut off, fp16 made float32."""
    tensors: dict[str, Tensor] = load_tensors(_file("weights.safetensors"))
    return {
        name.removeprefix(prefix): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _file(name: str) -> bytes:
    return resources.files("evenbits.demo").joinpath(name).read_bytes()


@torch.fx.wrap  # a symbolic trace keeps this as one call instead of failing at the `if`
def _first_positions(table_TE: Tensor, length: int) -> Tensor:
    """The first `length` rows of a rotary table, which has one row for each position that the model can see."""
    if length > table_TE.shape[0]:
        raise EvenbitsError(f"the input is {length} bytes long; this model sees at most {table_TE.shape[0]} at once")
    return table_TE[:length]


def _rotary_tables(context: int, width: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position x frequency, float32 [T, E] each; both halves of E hold the same frequencies."""
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle_TE = torch.outer(torch.arange(context, dtype=torch.float64), frequency).repeat(1, 2)
    return angle_TE.cos().float(), angle_TE.sin().float()


def _rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Turn each pair (i, i + E/2) of a head by its position's angle, so that q.k depends on the distance alone."""
    first, second = x_BHTE.chunk(2, dim=-1)
    return x_BHTE * cos_TE + torch.cat((-second, first), dim=-1) * sin_TE
