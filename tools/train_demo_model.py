"""Train the demo networks and write their weights and frozen data: weights.safetensors, text.txt, calibration.txt.

Language model: the text is `pydoc_data.topics` of the Python that runs this tool, the language reference that
`help("topics")` shows (Python Software Foundation licence). It differs between Python versions, and so would the
weights; the evaluation and calibration slices are therefore frozen as files beside the weights. Topics quote each
other, so every paragraph is kept once only: a held-out paragraph was never seen in training.

Digits: drawn here, from strokes with random affine distortion, thickness, blur and noise. No data set is involved.

Seeds are fixed, but float sums taken by several threads may still differ in their last bits from run to run, and
training magnifies that: a second run reproduces the quality, not necessarily the bytes. The shipped weights were made
with Python 3.11.7, PyTorch 2.13 and two threads: held-out perplexity 3.619 per byte, digit accuracy 0.978.

    python tools/train_demo_model.py                    # about ten minutes on two cores
    python tools/train_demo_model.py --smoke            # twenty steps into a temporary folder

The files are written under temporary names and renamed at the end, so an interrupted run leaves the old ones whole.

Shape suffixes: B batch, T positions, V vocabulary, N images, Y rows, X columns, S stroke segments.
"""

from __future__ import annotations

import argparse
import math
import re
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evenbits.demo.model import Attention, ByteLM, DigitNet, GatedMLP, generate

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]

SEED = 20240
DROPOUT = 0.2  # the text is small and seen many times over: without it, held-out perplexity turns up half way
CHUNK = 4096  # bytes of text that go to one part of the split together
EVALUATION_BYTES, CALIBRATION_BYTES = 48 * 1024, 16 * 1024
ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "ß": "ss", "°": "deg"})
GRID, SIDE = 32, 8  # digits are drawn on GRID x GRID points, then averaged to SIDE x SIDE pixels

# Each digit as polylines in a unit square, x to the right and y down. "arc" points come from `_arc`.
Polyline = list[tuple[float, float]]


# ---------------------------------------------------------------------------------------------------------------- text


def split_text() -> dict[str, bytes]:
    """The topics, each paragraph once, cut into chunks and dealt out to train, evaluation and calibration."""
    seen: set[str] = set()
    paragraphs = []
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name].translate(ASCII)):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph.rstrip().encode("ascii", "replace").decode("ascii"))
    chunks = [""]
    for paragraph in paragraphs:
        if len(chunks[-1]) >= CHUNK:
            chunks.append("")
        chunks[-1] += paragraph + "\n\n"
    order = np.random.default_rng(SEED).permutation(len(chunks)).tolist()
    picked: dict[str, list[int]] = {"evaluation": [], "calibration": [], "train": []}
    for part, size in (("evaluation", EVALUATION_BYTES), ("calibration", CALIBRATION_BYTES)):
        while sum(len(chunks[index]) for index in picked[part]) < size:
            picked[part].append(order.pop())
    picked["train"] = order
    joined = {part: "".join(chunks[index] for index in sorted(indices)).encode() for part, indices in picked.items()}
    joined["evaluation"] = joined["evaluation"][:EVALUATION_BYTES]
    joined["calibration"] = joined["calibration"][:CALIBRATION_BYTES]
    return joined


def initialise(model: ByteLM) -> None:
    """Small embeddings, and smaller still what each layer adds to the residual stream at the start."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.normal_(parameter, std=0.04 / math.sqrt(2 * model.config.layers))
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.04)


def add_dropout(model: ByteLM) -> list[RemovableHandle]:
    """Dropout on the embedding and on what each layer adds, as hooks: it belongs to training, not to the model."""

    def drop(module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return F.dropout(output, DROPOUT, training=module.training)

    places = [module for module in model.modules() if isinstance(module, (nn.Embedding, Attention, GatedMLP))]
    return [place.register_forward_hook(drop) for place in places]


def train_byte_lm(text: bytes, steps: int, batch: int, peak: float) -> ByteLM:
    """A ByteLM trained on windows drawn at random from `text`, AdamW, linear warm-up, then cosine to a twentieth."""
    torch.manual_seed(SEED)
    model = ByteLM()
    initialise(model)
    context = model.config.context
    data_L = torch.tensor(list(text), dtype=torch.int64)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    warm = max(1, min(60, steps // 10))

    def factor(step: int) -> float:
        done = (step - warm) / max(1, steps - warm)
        return (step + 1) / warm if step < warm else 0.05 + 0.475 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    hooks = add_dropout(model)
    started = time.monotonic()
    for step in range(steps):
        starts_B1 = torch.randint(len(data_L) - context, (batch, 1))
        window_BT = data_L[starts_B1 + torch.arange(context + 1)]
        logits_BTV = model(window_BT[:, :-1])
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), window_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s", flush=True)
    for hook in hooks:
        hook.remove()
    return model.eval()


@torch.no_grad()
def perplexity(model: ByteLM, text: bytes) -> float:
    """Per-byte perplexity of `text`, in windows of one context that do not overlap."""
    context = model.config.context
    data_L = torch.tensor(list(text), dtype=torch.int64)
    windows_BT = data_L[: (len(data_L) - 1) // context * context + 1].unfold(0, context + 1, context)
    total = 0.0
    for window_BT in windows_BT.split(16):
        logits_BTV = model(window_BT[:, :-1])
        total += F.cross_entropy(logits_BTV.flatten(0, 1), window_BT[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (len(windows_BT) * context))


# -------------------------------------------------------------------------------------------------------------- digits


def _arc(x: float, y: float, wide: float, high: float, start: float, end: float) -> Polyline:
    """Points on an ellipse from angle `start` to `end` in degrees: 0 is right, 90 below (y points down), 270 above."""
    angles = np.radians(np.linspace(start, end, max(4, int(abs(end - start) / 24))))
    return [(x + wide * math.cos(angle), y + high * math.sin(angle)) for angle in angles]


STROKES: dict[int, list[Polyline]] = {
    0: [_arc(0.5, 0.5, 0.28, 0.4, 0, 360)],
    1: [[(0.33, 0.28), (0.55, 0.1), (0.55, 0.9)]],
    2: [[*_arc(0.5, 0.32, 0.27, 0.22, 190, 400), (0.22, 0.9), (0.8, 0.9)]],
    3: [_arc(0.47, 0.3, 0.25, 0.2, 200, 450), _arc(0.47, 0.7, 0.28, 0.2, 270, 520)],
    4: [[(0.62, 0.9), (0.62, 0.1), (0.2, 0.65), (0.84, 0.65)]],
    5: [[(0.75, 0.1), (0.3, 0.1), (0.27, 0.48), *_arc(0.48, 0.65, 0.27, 0.25, 225, 500)]],
    6: [[(0.68, 0.1), (0.42, 0.3), (0.27, 0.6)], _arc(0.5, 0.68, 0.24, 0.22, 0, 360)],
    7: [[(0.2, 0.1), (0.8, 0.1), (0.42, 0.9)]],
    8: [_arc(0.5, 0.3, 0.21, 0.2, 0, 360), _arc(0.5, 0.71, 0.26, 0.21, 0, 360)],
    9: [_arc(0.5, 0.32, 0.24, 0.22, 0, 360), [(0.74, 0.35), (0.68, 0.65), (0.5, 0.9)]],
}


def _distort(points_S2: Floats, random: np.random.Generator) -> Floats:
    """A hand's variation, [S, 2] to [S, 2]: a slow wave, then scale, shear, rotation and shift about the middle."""
    centred_S2 = points_S2 - 0.5
    phase, wave = random.uniform(0, 2 * np.pi, 2), random.uniform(0, 0.06, 2)
    centred_S2 = centred_S2 + wave * np.sin(4 * centred_S2[:, ::-1] + phase)
    turn, shear = random.uniform(-0.4, 0.4), random.uniform(-0.3, 0.3)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    affine = rotation @ np.array([[1, shear], [0, 1]]) @ np.diag(random.uniform(0.65, 1.05, 2))
    return centred_S2 @ affine.T + 0.5 + random.uniform(-0.09, 0.09, 2)


def _ink(starts_S2: Floats, ends_S2: Floats, thickness: float) -> Floats:
    """How much ink lies on each of the GRID x GRID points, 0..1: full within half a thickness of a segment."""
    axis = (np.arange(GRID) + 0.5) / GRID
    points_YX12 = np.stack(np.meshgrid(axis, axis), axis=-1)[:, :, None]
    along_S2 = ends_S2 - starts_S2
    lengths_S = np.maximum((along_S2**2).sum(-1), 1e-9)
    place_YXS = np.clip(((points_YX12 - starts_S2) * along_S2).sum(-1) / lengths_S, 0, 1)
    offsets_YXS2 = points_YX12 - starts_S2 - place_YXS[..., None] * along_S2
    distance_YX = np.sqrt((offsets_YXS2**2).sum(-1).min(-1))
    return np.clip((thickness / 2 - distance_YX) * GRID + 0.5, 0, 1)


def draw_digit(digit: int, random: np.random.Generator) -> Bytes:
    """One grey digit, uint8 [8, 8]: drawn fine, blurred by averaging 4x4 points, dimmed, and covered with noise."""
    lines = [np.array(line) for line in STROKES[digit]]
    joints = _distort(np.concatenate(lines), random)
    breaks = np.cumsum([len(line) for line in lines])[:-1]
    pieces = np.split(joints, breaks)
    starts_S2, ends_S2 = np.concatenate([p[:-1] for p in pieces]), np.concatenate([p[1:] for p in pieces])
    fine_YX = _ink(starts_S2, ends_S2, thickness=random.uniform(0.06, 0.17))
    step = GRID // SIDE
    grey_YX = fine_YX.reshape(SIDE, step, SIDE, step).mean((1, 3))
    noisy_YX = grey_YX * random.uniform(0.55, 1.0) + random.normal(0, random.uniform(0.02, 0.14), grey_YX.shape)
    return (np.clip(noisy_YX, 0, 1) * 255).round().astype(np.uint8)


def draw_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` digits, the ten kinds equally often, in random order: images uint8 [N, 8, 8], labels uint8 [N]."""
    random = np.random.default_rng([SEED, seed])
    labels = random.permutation(np.arange(count) % 10)
    images = np.stack([draw_digit(int(label), random) for label in labels])
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.uint8))


def train_digit_net(images_NYX: Tensor, labels_N: Tensor, epochs: int, batch: int = 128) -> DigitNet:
    """A DigitNet trained with AdamW and a cosine schedule on uint8 images [N, 8, 8]."""
    torch.manual_seed(SEED)
    model = DigitNet().train()
    steps = epochs * (len(labels_N) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for picked in torch.randperm(len(labels_N)).split(batch)[: len(labels_N) // batch]:
            logits_NC = model(images_NYX[picked].float().div(255).unsqueeze(1))
            loss = F.cross_entropy(logits_NC, labels_N[picked].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: DigitNet, images_NYX: Tensor, labels_N: Tensor) -> float:
    """The share of digits classified rightly, 0..1."""
    logits_NC = model(images_NYX.float().div(255).unsqueeze(1))
    return float((logits_NC.argmax(1) == labels_N.long()).float().mean())


# --------------------------------------------------------------------------------------------------------------- files


def as_half(model: nn.Module) -> None:
    """Round every float parameter and buffer to fp16 and back, in place: the metrics are those of the stored file."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())


def write_all(folder: Path, files: dict[str, bytes]) -> None:
    """Write every file under a temporary name first, then rename them all: an interruption leaves the old ones."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.tmp" for name in files}
    try:
        for name, content in files.items():
            temporary[name].write_bytes(content)
        for name in files:
            temporary[name].replace(folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo networks and write their weights and frozen data.")
    parser.add_argument("--steps", type=int, default=1100, help="training steps of the language model")
    parser.add_argument("--batch", type=int, default=16, help="windows of 256 bytes per step")
    parser.add_argument("--peak", type=float, default=2.5e-3, help="highest learning rate of the language model")
    parser.add_argument("--digits", type=int, default=10_000, help="digits to train on")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the digits")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "src" / "evenbits" / "demo")
    parser.add_argument("--smoke", action="store_true", help="20 steps and few digits, into a new temporary folder")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.digits, options.epochs = 20, 1280, 1
        options.output = Path(tempfile.mkdtemp(prefix="evenbits-demo-"))
    run(options)


def run(options: argparse.Namespace) -> None:
    """Train both networks, print their metrics, and write the three files."""
    text = split_text()
    print({part: len(content) for part, content in text.items()}, flush=True)
    digits = {
        name: draw_digits(count, seed)
        for seed, (name, count) in enumerate((("train", options.digits), ("eval", 500), ("calibration", 128)))
    }
    net = train_digit_net(*digits["train"], options.epochs)
    as_half(net)
    print(f"digits: accuracy {accuracy(net, *digits['eval']):.4f} on {len(digits['eval'][1])} held out", flush=True)
    model = train_byte_lm(text["train"], options.steps, options.batch, options.peak)
    as_half(model)
    print(f"text: perplexity {perplexity(model, text['evaluation']):.4f} per byte, held out")
    print(generate(model, b"The assignment statement", 300, temperature=0.5).decode("utf-8", "replace"))
    tensors: dict[str, Tensor] = {}
    for prefix, module in (("byte_lm", model), ("digit_net", net)):
        for name, value in module.state_dict().items():
            tensors[f"{prefix}.{name}"] = (value.half() if value.is_floating_point() else value).contiguous()
    for part in ("eval", "calibration"):
        tensors[f"digits.{part}_images"], tensors[f"digits.{part}_labels"] = digits[part]
    files = {
        "weights.safetensors": save(tensors),
        "text.txt": text["evaluation"],
        "calibration.txt": text["calibration"],
    }
    write_all(options.output, files)
    print(f"wrote {', '.join(files)} to {options.output}")


if __name__ == "__main__":
    main()
