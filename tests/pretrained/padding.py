"""TensorFlow's "same" padding, from sizes known at construction: a traced graph holds only constants."""

from __future__ import annotations

from math import ceil

from torch import Tensor
from torch.nn import functional as F


def same_output(size: int, stride: int) -> int:
    """⌈size / stride⌉, the length that "same" padding leaves."""
    return ceil(size / stride)


def same_padding(size: int, kernel: int, stride: int = 1) -> tuple[int, int]:
    """(before, after) of one axis: total = max((⌈n/s⌉ − 1)·s + k − n, 0), the smaller half first."""
    total = max((same_output(size, stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def same_pad(x: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Pad with zeros; `padding` as in `F.pad`: the last axis first."""
    return F.pad(x, padding)
