"""A plan that does not fit a model: the error that says why, and the look-up that raises it."""

from __future__ import annotations

from torch import nn

from normswap.errors import PlanError
from normswap.records import Plan

__all__ = ["misfit", "submodule"]


def submodule(model: nn.Module, fqn: str, plan: Plan) -> nn.Module:
    """Return a submodule that ``plan`` names.

    Raises:
        PlanError: There is none.
    """
    try:
        return model.get_submodule(fqn)
    except AttributeError:
        raise misfit(plan, f"the model has no module '{fqn}'") from None


def misfit(plan: Plan, what: str) -> PlanError:
    """Return the error that says why ``plan`` does not fit a model."""
    return PlanError(
        f"the plan, made for a {plan.model}, does not fit this model: {what}",
        code="plan-does-not-fit",
        hint="replay a plan on a model of the same architecture, or make a new plan",
    )
