"""Random subsampling of all batches' activations at one site, into rows to fit to and held-out rows to validate on.

A choice holds at most 2²⁴ values of patches (64 MB), or 2²² of outputs, or a few rows where rows are larger than that.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from normswap.initialization.regression import clamped
from normswap.initialization.targets import RegressionTarget
from normswap.runs.batches import LEAST_SAMPLES, held_out
from normswap.runs.paired_sites import SiteBatch
from normswap.runs.tensors import at_positions
from normswap.runs.watching import Statistics

__all__ = ["Rows", "Sample", "Sampling"]

_MOST_PATCHES = 2**24  # values of them, at once and of those that are kept
_MOST_OUTPUTS = 2**22
_LEAST_ROWS = 64


@dataclass(frozen=True)
class Rows:
    """Some positions, one a row.

    Args:
        values: What is there: patches ``(n, G, p)`` or outputs ``(n, C)``.
        t: What the layer is to give there. ``(n, C)``
        y: What the norm is to give there. ``(n, C)``
        threshold: What a ReLU behind y clamps it at; None where there is none. ``(n, C)``
    """

    values: Tensor
    t: Tensor
    y: Tensor
    threshold: Tensor | None

    def split(self, first: int) -> tuple[Rows, Rows]:
        """Return the first rows, and the others."""
        thresholds = (None, None) if self.threshold is None else (self.threshold[:first], self.threshold[first:])
        return (
            Rows(self.values[:first], self.t[:first], self.y[:first], thresholds[0]),
            Rows(self.values[first:], self.t[first:], self.y[first:], thresholds[1]),
        )

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Return the rows of all parts."""
        thresholds = [rows.threshold for rows in parts if rows.threshold is not None]
        return cls(
            torch.cat([rows.values for rows in parts]),
            torch.cat([rows.t for rows in parts]),
            torch.cat([rows.y for rows in parts]),
            torch.cat(thresholds) if len(thresholds) == len(parts) else None,
        )

    def error(self, outputs: Tensor) -> Tensor:
        """Return the mean squared error of what is passed on, per channel."""
        return (clamped(outputs, self.threshold) - clamped(self.y, self.threshold)).square().mean(0)

    @property
    def size(self) -> Tensor:
        """The variance of what is passed on, per channel."""
        return (self.y if self.threshold is None else (self.y - self.threshold).clamp(min=0)).var(0, correction=0)


@dataclass(frozen=True)
class Sample:
    """Rows to fit to, and rows to validate on: those of the samples held out, and where none is the same ones."""

    train: Rows
    validation: Rows


class Sampling:
    """Random choices of the positions of one site, the same each time.

    Args:
        batches: Each batch's activations there.
        target: What is wanted there.
        fan_in: How many values the patches of all groups hold at a position.
    """

    def __init__(self, batches: Sequence[SiteBatch], target: RegressionTarget, fan_in: int) -> None:
        self.batches, self.target, self.fan_in = batches, target, fan_in
        self.samples = sum(len(batch.x) for batch in batches)
        self.holds_out = self.samples >= LEAST_SAMPLES

    def patches(self, of: Callable[[Tensor, Tensor], Tensor]) -> Sample:
        """Return some patches. ``of`` maps a layer's input and a choice of positions to these, ``(n, G, p)``."""
        return self._sample(of, self.fan_in, _MOST_PATCHES)

    def outputs(self, of: Callable[[Tensor], Tensor]) -> Sample:
        """Return some outputs. ``of`` maps a layer's input to its output, ``(N, C, …)``."""
        return self._sample(lambda x, index: at_positions(of(x), index), 1, _MOST_OUTPUTS)

    def statistics(self) -> Statistics:
        """Return the statistics of what reaches the original's norm at some positions, held-out samples left out."""
        in_all = sum(batch.reference.numel() for batch in self.batches)
        generator = torch.Generator().manual_seed(0)
        found = []
        for batch, held in self._held():
            x = batch.reference.flatten(2) if batch.reference.ndim > 2 else batch.reference[..., None]
            some = max(1, round(min(1, _MOST_OUTPUTS / in_all) * x.shape[2]))
            index = torch.randperm(x.shape[2], generator=generator)[:some].to(x.device)
            if not bool(held.all()):
                found.append(Statistics.of(x[:, :, index][~held]))
        return reduce(operator.add, found)

    def chunks(self) -> Iterator[tuple[SiteBatch, Tensor]]:
        """Yield some samples at a time, and which of them are held out."""
        for batch, held in self._held():
            positions = max(1, batch.reference[:1].numel() // batch.reference.shape[1])
            size = max(1, _MOST_PATCHES // (positions * self.fan_in))
            yield from zip(batch.split(size), held.split(size), strict=True)

    def _held(self) -> Iterator[tuple[SiteBatch, Tensor]]:
        before = 0
        for batch in self.batches:
            yield batch, held_out(len(batch.x), before).to(batch.x.device) & self.holds_out
            before += len(batch.x)

    def _sample(self, values: Callable[[Tensor, Tensor], Tensor], width: int, most: int) -> Sample:
        """Return a random choice of the positions.

        Args:
            values: Takes a chunk's input and which of its positions are wanted, and returns what is there, as rows.
            width: How many values such a row has; it has one of each channel at least.
            most: How many values are wanted at the most.
        """
        channels = len(self.target.gain)
        in_all = sum(batch.reference.numel() for batch in self.batches) // channels
        share = max(most // max(width, channels), _LEAST_ROWS) / in_all
        generator = torch.Generator().manual_seed(0)
        parts = []
        for chunk, held in self.chunks():
            positions = chunk.reference[0, 0].numel()
            index = torch.arange(len(chunk.x) * positions)
            if share < 1:
                some = torch.randperm(len(index), generator=generator)[: max(1, round(share * len(index)))]
                index = some.sort().values
            index = index.to(chunk.x.device)
            apart = held[index // positions]
            index = torch.cat((index[~apart], index[apart]))
            here = chunk.at(index)
            t, y = self.target.targets(here)
            threshold = None if here.threshold is None else here.threshold.to(y.dtype)
            rows = Rows(values(chunk.x, index).to(y.dtype), t, y, threshold)
            parts.append(rows.split(len(index) - int(apart.sum())))
        train, validation = (Rows.joined(several) for several in zip(*parts, strict=True))
        return Sample(train, validation if len(validation.y) else train)
