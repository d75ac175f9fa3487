"""Samples that were made from a network's own statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SyntheticSamples"]


@dataclass(frozen=True)
class SyntheticSamples:
    """What :func:`~normswap.synthesize_samples` made: an iterable of batches, to be given as ``calibration=``.

    Args:
        batches: Inputs, as the example's: positional or by keyword.
        before: How far the noise that they began as was from the recorded statistics, in the mean over the batches.
        after: How far they are.
    """

    batches: tuple[Any, ...] = field(repr=False)
    before: float
    after: float

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __str__(self) -> str:
        return (
            f"{len(self)} {'batch' if len(self) == 1 else 'batches'} of synthetic samples, whose mismatch to the "
            f"recorded statistics fell from {self.before:.3f} to {self.after:.3f}"
        )
