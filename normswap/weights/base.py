"""What a weight parametrization answers for itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normswap.nn import FilterLayout
from normswap.norms.assignment import Assignment

__all__ = ["Weight", "WeightEncoding"]


@dataclass(frozen=True)
class WeightEncoding:
    """Values of a parametrization's tensors, by their names within the layer, and what they make of the filters.

    Args:
        values: The values. A term of theirs may be of ``factor``, the argument of :meth:`Weight.encode`.
        excess: The factor by which each filter exceeds the one asked for; ones where the form keeps a scale. ``(C,)``
    """

    values: Assignment
    excess: Tensor


class Weight:
    """A form of a layer's weight. Subclasses are frozen dataclasses."""

    name: str | None
    """How a plan names it; None for a plain one."""
    centres: bool = False
    """Whether a filter's mean is lost, so that the weight must be projected first."""

    reads_inputs: bool = False
    """Whether its values need to be known what the layer reads, so that moments of that are taken."""

    free_length: bool = False
    """Whether the length of a stored filter is of no account for the weight."""

    def for_inputs(self, squares: Tensor) -> Weight:
        """Return the form for a layer whose filters read patches of these mean squared lengths. ``(groups,)``"""
        return self

    def register(self, layer: nn.Module, name: str = "weight") -> None:
        """Parametrize ``layer``'s weight of this name, whose values are then the originals'."""
        raise NotImplementedError

    def encode(self, layout: FilterLayout, weight: Tensor, factor: Tensor, dtype: torch.dtype) -> WeightEncoding:
        """Return values such that the layer's weight is ``factor_c · weight_c``. Pure.

        Args:
            layout: Where the layer's filters lie.
            weight: The weight before the swap, in float64.
            factor: One factor per output channel, of any sign. ``(C,)`` float64.
            dtype: The dtype that the values are going to have.
        """
        raise NotImplementedError
