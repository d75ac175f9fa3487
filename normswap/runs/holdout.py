"""Which samples of the calibration data are held out, to choose by and to report on."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LEAST_SAMPLES", "held_out"]

_EVERY = 5
LEAST_SAMPLES = 2 * _EVERY
"""With fewer samples none is held out."""


def held_out(samples: int, seen: int) -> Tensor:
    """Return which of ``samples`` samples, that come after ``seen`` others, are held out: every fifth."""
    return (torch.arange(samples) + seen) % _EVERY == _EVERY - 1
