"""Pictures for docs/calibration-size.md: 1500 training pictures to calibrate on, 2000 test pictures to score.

    evenbits diagnose benchmarks/vision.py:resnet20 -o OUT --scheme W8A8_STATIC \\
        --calibration benchmarks/calibration_size.py:calibration --sizes 25,50,100,200,400,800,1500 \\
        --task classification --data benchmarks/calibration_size.py:scored

EVENBITS_TEST_DATA names the folder of models and data sets. Both sets take every so-manieth picture of files that are
sorted by class, so that all classes are there alike, and mix them by a fixed order.
"""

from __future__ import annotations

import torch
from vision import cifar10

CALIBRATION, BATCH = 1500, 10


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
