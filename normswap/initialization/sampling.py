"""Random subsampling of all batches' activations at one site, into rows to fit to and held-out rows to validate on.

A choice holds at most 2²⁴ values of patches (64 MB), or 2²² of outputs, or a few rows where rows are larger than that.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from normswap.initialization.regression import clamped
from normswap.initialization.targets import RegressionTarget
from normswap.runs.batches import LEAST_SAMPLES, held_out
from normswap.runs.paired_sites import SiteBatch
from normswap.runs.processes import mean_over_rows, objects, offsets, variance_over_rows
from normswap.runs.tensors import at_positions
from normswap.runs.watching import Statistics, over_processes

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
        squared = (clamped(outputs, self.threshold) - clamped(self.y, self.threshold)).square()
        return mean_over_rows("errors", squared)

    @property
    def size(self) -> Tensor:
        """The variance of what is passed on, per channel."""
        passed_on = self.y if self.threshold is None else (self.y - self.threshold).clamp(min=0)
        return variance_over_rows("what is passed on", passed_on)


@dataclass(frozen=True)
class Sample:
    """Rows to fit to, and rows to validate on: those of the samples held out, and where none is the same ones."""

    train: Rows
    validation: Rows

    def centred(self, mean: Tensor) -> Sample:
        """Subtract a mean from all patches, in place, for they are what takes most room. ``(G, p)``"""
        for values in {id(rows.values): rows.values for rows in (self.train, self.validation)}.values():
            values.sub_(mean.to(values.dtype))
        return self


class Sampling:
    """Random choices of the positions of one site, the same each time, whichever process has a sample.

    Args:
        batches: Each batch's activations there.
        target: What is wanted there.
        fan_in: How many values the patches of all groups hold at a position.
    """

    def __init__(self, batches: Sequence[SiteBatch], target: RegressionTarget, fan_in: int) -> None:
        self.batches, self.target, self.fan_in = batches, target, fan_in
        self._before, self.samples = offsets("samples", [len(batch.x) for batch in batches])
        self._in_all: int = sum(objects("values", sum(batch.reference.numel() for batch in batches)))
        self.holds_out = self.samples >= LEAST_SAMPLES

    def on(self, inputs: Sequence[Tensor]) -> Sampling:
        """Return the same choices of positions of the same batches with other inputs."""
        other = copy.copy(self)
        other.batches = [replace(batch, x=x) for batch, x in zip(self.batches, inputs, strict=True)]
        return other

    def patches(self, of: Callable[[Tensor, Tensor], Tensor]) -> Sample:
        """Return some patches. ``of`` maps a layer's input and a choice of positions to these, ``(n, G, p)``."""
        return self._sample(of, self.fan_in, _MOST_PATCHES)

    def outputs(self, of: Callable[[Tensor], Tensor], *, only_held_out: bool = False) -> Sample:
        """Return some outputs. ``of`` maps a layer's input to its output, ``(N, C, …)``, sample by sample.

        With ``only_held_out`` none of other samples is computed, where samples are held out.
        """
        return self._sample(lambda x, index: at_positions(of(x), index), 1, _MOST_OUTPUTS, only_held_out)

    def statistics(self) -> Statistics:
        """Return the statistics of what reaches the original's norm at some positions, held-out samples left out."""
        found = []
        for batch, held, before in self._held():
            x = batch.reference.flatten(2) if batch.reference.ndim > 2 else batch.reference[..., None]
            some = max(1, round(min(1, _MOST_OUTPUTS / self._in_all) * x.shape[2]))
            index = _random_order(x.shape[2], before)[:some].to(x.device)
            if not bool(held.all()):
                found.append(Statistics.of(x[:, :, index][~held]))
        return over_processes({"": reduce(operator.add, found)} if found else {})[""]

    def chunks(self) -> Iterator[tuple[SiteBatch, Tensor, int]]:
        """Yield some samples at a time, which of them are held out, and how many come before them."""
        for batch, held, before in self._held():
            positions = max(1, batch.reference[:1].numel() // batch.reference.shape[1])
            size = max(1, _MOST_PATCHES // (positions * self.fan_in))
            firsts = range(before, before + len(batch.x), size)
            yield from zip(batch.split(size), held.split(size), firsts, strict=True)

    def _held(self) -> Iterator[tuple[SiteBatch, Tensor, int]]:
        for batch, before in zip(self.batches, self._before, strict=True):
            yield batch, held_out(len(batch.x), before).to(batch.x.device) & self.holds_out, before

    def _sample(
        self, values: Callable[[Tensor, Tensor], Tensor], width: int, most: int, only_held_out: bool = False
    ) -> Sample:
        """Return a random choice of the positions.

        Args:
            values: Takes a chunk's input and which of its positions are wanted, and returns what is there, as rows.
            width: How many values such a row has; it has one of each channel at least.
            most: How many values are wanted at the most.
            only_held_out: Whether the rows to fit to may be left out.
        """
        channels = len(self.target.gain)
        share = max(most // max(width, channels), _LEAST_ROWS) / (self._in_all // channels)
        parts = []
        for chunk, held, before in self.chunks():
            positions = chunk.reference[0, 0].numel()
            index = torch.arange(len(chunk.x) * positions)
            if share < 1:
                some = _random_order(len(index), before)[: max(1, round(share * len(index)))]
                index = some.sort().values
            index = index.to(chunk.x.device)
            apart = held[index // positions]
            x, place = chunk.x, torch.cat((index[~apart], index[apart]))
            index = place
            if only_held_out and bool(held.any()):
                x, index = chunk.x[held], index[len(index) - int(apart.sum()) :]
                place = (held.cumsum(0) - 1)[index // positions] * positions + index % positions
            here = chunk.at(index)
            t, y = self.target.targets(here)
            threshold = None if here.threshold is None else here.threshold.to(y.dtype)
            rows = Rows(values(x, place).to(y.dtype), t, y, threshold)
            parts.append(rows.split(len(index) - int(apart.sum())))
        train, validation = (Rows.joined(several) for several in zip(*parts, strict=True))
        return Sample(train, validation if sum(objects("held-out rows", len(validation.y))) else train)


def _random_order(count: int, before: int) -> Tensor:
    """Return a random order of so many positions, of samples that come after ``before`` others."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(before))
