"""Data for docs/calibration-size.md: training pictures to calibrate on, test pictures and stories to score.

    evenbits diagnose benchmarks/vision.py:resnet20 -o OUT --scheme W8A8_STATIC --orders 2 \\
        --calibration benchmarks/calibration_size.py:calibration --sizes 25,50,100,200,400,800,1500 \\
        --task classification --data benchmarks/calibration_size.py:scored

    evenbits diagnose $EVENBITS_TEST_DATA/stories260k_llama -o OUT --scheme W8A8_STATIC --orders 2 \\
        --calibration $EVENBITS_TEST_DATA/caltext/tiny.utf8 --sequence-length 64 --sizes 25,50,100,200,400,800,1500 \\
        --task perplexity --data benchmarks/calibration_size.py:stories

EVENBITS_TEST_DATA names the folder of models and data sets. Both picture sets take pictures at equal distances from
files that are sorted by class, so that all classes are there alike, and mix them by a fixed order.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from vision import cifar10

from evenbits.data.text import Documents, read_text

CALIBRATION, BATCH, STORIES = 1500, 10, 20


def _mixed(split: str, every: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, labels = cifar10(split, slice(0, None, every))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(x)[order].float() / 255, torch.from_numpy(labels)[order]


def calibration() -> list[torch.Tensor]:
    """1500 training pictures, [10, 3, 32, 32] in 0..1 each."""
    return list(_mixed("train", 33)[0][:CALIBRATION].split(BATCH))


def scored() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """2000 test pictures with their classes, in batches of 50."""
    x, labels = _mixed("test", 5)
    return list(zip(x.split(50), labels.split(50), strict=True))


def stories() -> Documents:
    """The last 20 stories of the text; 1500 blocks of 64 tokens end before them."""
    return Documents(read_text(Path(os.environ["EVENBITS_TEST_DATA"]) / "caltext" / "tiny.utf8").texts[-STORIES:], None)
