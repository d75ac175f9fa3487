"""What a recipe for recurrent layers is: its options, the form of the matrices, and where it comes from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import ClassVar

from torch import nn

from normswap.recipes.described import Described
from normswap.records import RecurrentSite
from normswap.weights import Weight

__all__ = ["RecurrentRecipe", "Start", "why_no_deviation"]


class Start(Enum):
    """What gives a layer its values."""

    WEIGHTS = auto()
    """The old matrices alone."""
    CENTRED_ROWS = auto()
    """The old matrices without the means of their rows, taken away where data show that it costs least."""
    NULL_SPACE = auto()
    """Row scales and offsets in the null space of the old matrices, of the size that data show."""
    STATISTICS = auto()
    """The old matrices, and the statistics of what they give on data."""


@dataclass(frozen=True)
class RecurrentRecipe(Described):
    """How the matrices of recurrent layers are parametrized. A frozen dataclass whose fields are its options.

    Each row of a matrix (``weight_ih_l0``, ``weight_hh_l0``, the projection ``weight_hr_l0``, …) makes one value of one
    gate, as a filter makes one channel: it is what a filter is to :mod:`normswap.weights`.

    To add one, subclass this in a file of this folder, set the class attributes, and implement :meth:`weight`,
    or :meth:`replacement` where another layer is to come in the layer's place.
    """

    start: ClassVar[Start] = Start.WEIGHTS
    """What gives the layer its values."""

    @property
    def needs_data(self) -> bool:
        """Whether the layer gets its values from calibration data."""
        return self.start is not Start.WEIGHTS

    @property
    def reads_cell(self) -> bool:
        """Whether the layer gets values that follow from its c, beside those of its matrices."""
        return False

    def refuse(self, site: RecurrentSite) -> str | None:
        """Return why this recipe cannot be used at ``site``, or None."""
        return None

    def matrices(self, site: RecurrentSite) -> tuple[str, ...]:
        """Return the names of the matrices that get the form."""
        return site.matrices

    def weight(self) -> Weight | None:
        """Return the form of each matrix; None where another layer comes in the layer's place."""
        return None

    def replacement(self, old: nn.Module) -> nn.Module:
        """Return the layer that comes in the place of ``old``, with any values."""
        raise NotImplementedError


def why_no_deviation(site: RecurrentSite, matrices: Iterable[str]) -> str | None:
    """Return which of ``matrices`` has rows of one value each, which have no deviation, or None."""
    found = next((name for name in matrices if site.fan_in(name) == 1), None)
    return None if found is None else f"a row of one value, as its {found} has, has no deviation to divide by"
