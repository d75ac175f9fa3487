"""The tensors of a nested output, and the positions of a feature map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["at_positions", "tensors_of"]


def tensors_of(value: Any) -> list[Tensor]:
    """Return the floating-point tensors in a nested output, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors_of(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_of(v)]
    return []


def at_positions(value: Tensor, index: Tensor) -> Tensor:
    """Return the channels of ``(N, C, …)`` at some positions, counted through all samples. ``(len(index), C)``"""
    if value.ndim == 2:
        return value[index]
    value = value.flatten(2)
    positions = value.shape[2]
    return value[index // positions, :, index % positions]
