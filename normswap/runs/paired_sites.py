"""A site in both networks, the original and the converted one, and the activations that one batch has there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normswap.runs.tensors import at_positions

__all__ = ["PairedSite", "SiteBatch"]


@dataclass(frozen=True)
class PairedSite:
    """The modules of one site in both networks.

    Args:
        name: The site's name.
        source: The converted network's module whose weights are fitted: a layer or a per-channel affine.
        norm: The converted network's norm behind it; None where there is none.
        original: The original's norm module, or the layer where it is fitted alone; None for a functional norm.
        running_mean: The functional norm's buffer, by which its calls are known.
        moved: Whether the last axis of the source's output is moved to the norm's axis 1.
        front: What stands between the source and the norm, if anything.
        alone: Whether it is a layer without a norm in the original, too.
    """

    name: str
    source: nn.Module
    norm: nn.Module | None
    original: nn.Module | None
    running_mean: Tensor | None = None
    moved: bool = False
    front: nn.Module | None = None
    alone: bool = False

    @property
    def end(self) -> nn.Module:
        """The converted network's module whose output is the site's."""
        return self.source if self.norm is None else self.norm

    def channels(self, x: Tensor) -> Tensor:
        """Return what reaches the norm, or what is in front of it; the source's output where there is neither."""
        y: Tensor = self.source(x)
        return y.movedim(-1, 1) if self.moved else y

    def output(self, x: Tensor) -> Tensor:
        """Return what the converted network gives here for the source's input ``x``."""
        return self.normalized(self.channels(x))

    def normalized(self, y: Tensor) -> Tensor:
        """Return what the converted network gives here where :meth:`channels` has given ``y``."""
        y = y if self.front is None else self.front(y)
        return y if self.norm is None else self.norm(y)


@dataclass(frozen=True)
class SiteBatch:
    """One batch's activations at a site.

    Args:
        x: The source's input in the converted network.
        reference: The input of the original's norm; its output where a layer is fitted alone.
        shortcut: Where the site's output goes into a residual addition, the other addend in the original and in the
            converted network.
        into_relu: Whether the site's output, or that sum, goes into ReLUs and nowhere else.
    """

    x: Tensor
    reference: Tensor
    shortcut: tuple[Tensor, Tensor] | None = None
    into_relu: bool = False

    @property
    def threshold(self) -> Tensor | None:
        """The value of the site's output below which a ReLU gives zero, shaped as it; None where there is no ReLU."""
        if not self.into_relu:
            return None
        return torch.zeros_like(self.reference) if self.shortcut is None else -self.shortcut[1]

    def at(self, index: Tensor) -> SiteBatch:
        """Return the same at some positions, counted through all samples, as if each were a sample of its own."""
        shortcut = None
        if self.shortcut is not None:
            shortcut = at_positions(self.shortcut[0], index), at_positions(self.shortcut[1], index)
        return SiteBatch(self.x, at_positions(self.reference, index), shortcut, self.into_relu)

    def split(self, size: int) -> Iterator[SiteBatch]:
        """Return the same for at most ``size`` samples at a time."""
        for first in range(0, len(self.x), size):
            part = slice(first, first + size)
            shortcut = None if self.shortcut is None else (self.shortcut[0][part], self.shortcut[1][part])
            yield SiteBatch(self.x[part], self.reference[part], shortcut, self.into_relu)
