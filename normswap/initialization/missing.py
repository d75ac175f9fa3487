"""Statistics of norms that store none, measured on calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from normswap.errors import InputError, argument
from normswap.runs.calling import Batch
from normswap.runs.watching import Statistics, measure_statistics
from normswap.stages.bound import BoundPlan

__all__ = ["missing_statistics"]


def missing_statistics(model: nn.Module, bound: BoundPlan, batches: Iterable[Batch] | None) -> Mapping[str, Statistics]:
    """Return the statistics of the norms that store none, by fqn, measured on all batches.

    Raises:
        InputError: A norm stores none and there are no batches.
        InitializationError: They are not finite.
    """
    missing = [step.site.norm for step in bound.steps if not step.site.has_statistics]
    if not missing:
        return {}
    if batches is None:
        raise InputError(
            f"'{missing[0]}' stores no running statistics",
            code="no-statistics",
            hint=f"give {argument('calibration')}, data from which they are measured",
        )
    return measure_statistics(model, missing, batches)
