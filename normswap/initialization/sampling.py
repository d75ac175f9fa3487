"""What all batches bring to one site: a random choice of its positions, those of the samples that are held out apart.

A choice holds at most 2²⁴ values of patches (64 MB), or 2²² of outputs, or a few rows where rows are larger than that.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from normswap.initialization.moments import Statistics
from normswap.initialization.regression import seen
from normswap.initialization.targets import Goal
from normswap.runs.holdout import LEAST_SAMPLES, held_out
from normswap.runs.side_by_side import Visit, at_positions

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
        cut: Below what y is not seen; None where all of it is. ``(n, C)``
    """

    values: Tensor
    t: Tensor
    y: Tensor
    cut: Tensor | None

    def split(self, first: int) -> tuple[Rows, Rows]:
        """Return the first rows, and the others."""
        cuts = (None, None) if self.cut is None else (self.cut[:first], self.cut[first:])
        return (
            Rows(self.values[:first], self.t[:first], self.y[:first], cuts[0]),
            Rows(self.values[first:], self.t[first:], self.y[first:], cuts[1]),
        )

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Return the rows of all parts."""
        cuts = [rows.cut for rows in parts if rows.cut is not None]
        return cls(
            torch.cat([rows.values for rows in parts]),
            torch.cat([rows.t for rows in parts]),
            torch.cat([rows.y for rows in parts]),
            torch.cat(cuts) if len(cuts) == len(parts) else None,
        )

    def error(self, outputs: Tensor) -> Tensor:
        """Return the mean squared error of what is seen, per channel."""
        return (seen(outputs, self.cut) - seen(self.y, self.cut)).square().mean(0)

    @property
    def size(self) -> Tensor:
        """The variance of what is seen, per channel."""
        return (self.y if self.cut is None else (self.y - self.cut).clamp(min=0)).var(0, correction=0)


@dataclass(frozen=True)
class Sample:
    """Rows to fit to, and rows to judge by: those of the samples held out, and where none is the same ones."""

    fit: Rows
    judge: Rows


class Sampling:
    """Choices of the positions of one site, the same each time.

    Args:
        visits: What each batch brings there.
        goal: What is wanted there.
        fan_in: How many values the patches of all groups hold at a position.
    """

    def __init__(self, visits: Sequence[Visit], goal: Goal, fan_in: int) -> None:
        self.visits, self.goal, self.fan_in = visits, goal, fan_in
        self.samples = sum(len(visit.x) for visit in visits)
        self.holds_out = self.samples >= LEAST_SAMPLES

    def patches(self, of: Callable[[Tensor], Tensor]) -> Sample:
        """Return some patches. ``of`` gives all of a layer's input, ``(positions, G, p)``."""
        return self._sample(lambda x, index: of(x)[index], self.fan_in, _MOST_PATCHES)

    def outputs(self, of: Callable[[Tensor], Tensor]) -> Sample:
        """Return some outputs. ``of`` gives all to a layer's input, ``(N, C, …)``."""
        return self._sample(lambda x, index: at_positions(of(x), index), 1, _MOST_OUTPUTS)

    def statistics(self) -> Statistics:
        """Return what reaches the original's norm at some positions, but for the samples held out."""
        in_all = sum(visit.reference.numel() for visit in self.visits)
        generator = torch.Generator().manual_seed(0)
        found = []
        for visit, held in self._held():
            x = visit.reference.flatten(2) if visit.reference.ndim > 2 else visit.reference[..., None]
            some = max(1, round(min(1, _MOST_OUTPUTS / in_all) * x.shape[2]))
            index = torch.randperm(x.shape[2], generator=generator)[:some].to(x.device)
            if not bool(held.all()):
                found.append(Statistics.of(x[:, :, index][~held]))
        return reduce(operator.add, found)

    def chunks(self) -> Iterator[tuple[Visit, Tensor]]:
        """Yield some samples at a time, and which of them are held out."""
        for visit, held in self._held():
            positions = max(1, visit.reference[:1].numel() // visit.reference.shape[1])
            size = max(1, _MOST_PATCHES // (positions * self.fan_in))
            yield from zip(visit.split(size), held.split(size), strict=True)

    def _held(self) -> Iterator[tuple[Visit, Tensor]]:
        before = 0
        for visit in self.visits:
            yield visit, held_out(len(visit.x), before).to(visit.x.device) & self.holds_out
            before += len(visit.x)

    def _sample(self, values: Callable[[Tensor, Tensor], Tensor], width: int, most: int) -> Sample:
        """Return a random choice of the positions.

        Args:
            values: Takes a chunk's input and which of its positions are wanted, and returns what is there, as rows.
            width: How many values such a row has; it has one of each channel at least.
            most: How many values are wanted at the most.
        """
        channels = len(self.goal.gain)
        in_all = sum(visit.reference.numel() for visit in self.visits) // channels
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
            t, y = self.goal.targets(here)
            cut = None if here.cut is None else here.cut.to(y.dtype)
            rows = Rows(values(chunk.x, index).to(y.dtype), t, y, cut)
            parts.append(rows.split(len(index) - int(apart.sum())))
        fit, judge = (Rows.joined(several) for several in zip(*parts, strict=True))
        return Sample(fit, judge if len(judge.y) else fit)
