"""New norms as torch starts them: what the network has learnt is lost."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from normswap.initialization.base import Initializer, Outcome
from normswap.norms import Assignment
from normswap.records import InitRow
from normswap.stages.bound import BoundStep
from normswap.stages.rewriting import Placed

__all__ = ["Fresh"]


class Fresh(Initializer):
    """Leave the new parts as torch starts them."""

    name = "fresh"
    keeps_function = False

    def values(self, step: BoundStep) -> Assignment:
        """Return no values."""
        return {}

    def refine(self, target: nn.Module, placed: Sequence[Placed]) -> Outcome:
        """Say that the parts are fresh."""
        return Outcome(tuple(InitRow(one.name, "fresh") for one in placed))
