"""Prepare a conversion: read what is asked for, find and plan the sites, and scale the channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from normswap.checks.conversion import refuse_empty
from normswap.errors import InputError, argument
from normswap.graph import capture
from normswap.graph.dataflow import Dataflow
from normswap.initialization.base import Initializer, Work
from normswap.initialization.equalization import Equalized, equalize
from normswap.initialization.missing import missing_statistics
from normswap.initialization.recurrent import centred
from normswap.options import Options
from normswap.recipes import Auto, Recipe, To, make_recipe, option_types
from normswap.recipes.recurrent import RecurrentRecipe, make_recurrent
from normswap.records import Plan
from normswap.runs.data import Data
from normswap.runs.equal_models import refuse_different, refuse_different_models
from normswap.stages.bound import BoundPlan, bind
from normswap.stages.find_sites import find_sites
from normswap.stages.planning import make_plan

__all__ = ["asked", "data_chooses_groups", "planned", "prepared", "recurrent_of"]


def asked(to: To, plan: Plan | None, given: Mapping[str, Any], *, has_data: bool = True) -> tuple[Recipe, Options]:
    """Return the recipe and the options that the arguments ask for.

    A plan brings its own recipe; where there is no data to choose by, a recipe that chooses is the one that it falls
    back on.
    """
    if plan is not None and not isinstance(plan, Plan):
        raise InputError(
            f"{argument('plan')} is of type {type(plan).__name__}",
            code="option-type",
            hint="give what normswap.plan returned; Plan.from_json reads a stored one",
        )
    if plan is not None and not isinstance(to, Recipe):
        to, given = plan.recipe, {**given, **plan.options}
    if plan is not None and given.get("recurrent") is not None:
        raise InputError(
            f"{argument('recurrent', given['recurrent'])} is given beside a plan, which says what becomes of the "
            "recurrent layers",
            code="plan-options",
            hint="leave it out, or make the plan anew",
        )
    options, own = Options.split(
        given, tuple(option_types(to)), ("example_inputs", "calibration", "forward_fn", "progress")
    )
    recipe = make_recipe(to, own)
    return recipe.without_data if isinstance(recipe, Auto) and not has_data else recipe, options


def recurrent_of(options: Options, plan: Plan | None) -> RecurrentRecipe | None:
    """Return the recipe for recurrent layers: that of a plan made before, where there is one."""
    if plan is None:
        return make_recurrent(options.recurrent)
    return make_recurrent(plan.recurrent_recipe or None, plan.recurrent_options)


def data_chooses_groups(recipe: Recipe, plan: Plan | None, initializer: type[Initializer]) -> bool:
    """Tell whether the group counts are left to the data.

    Raises:
        InputError: They are, and no data is used.
    """
    found = recipe.least_group is not None and plan is None
    if found and not initializer.fits:
        raise InputError(
            f"{argument('num_groups', 'auto')} chooses by calibration data and none is used",
            code="no-calibration",
            hint=f"give {argument('calibration')}, some hundred unlabelled samples, or a number",
        )
    return found


def planned(flow: Dataflow, recipe: Recipe, options: Options, data: Data) -> BoundPlan:
    """Return the plan for a model, bound to it."""
    has_data = data.enough is not None
    found = find_sites(flow, data.example, has_data=has_data)
    recurrent = make_recurrent(options.recurrent)
    name = type(flow.capture.model).__name__
    return make_plan(name, found, recipe, options, recurrent=recurrent, has_data=has_data)


def prepared(
    model: nn.Module, recipe: Recipe, options: Options, data: Data, plan: Plan | None, *, initializer: type[Initializer]
) -> Work:
    """Plan the conversion, or bind its plan, and choose the channels' scales where that is wanted and gains something.

    The model is as it was.
    """
    flow = Dataflow(capture(model, data.example))
    bound = planned(flow, recipe, options, data) if plan is None else bind(plan, recipe, model)
    refuse_empty(bound.plan)
    refuse_different_models(model)
    refuse_different("plans", bound.plan.to_json(), "give the same example_inputs and options in all of them")
    batches = list(data.batches) if initializer.revisits else data.batches
    bound = bound.with_statistics(missing_statistics(model, bound, None if data.enough is None else batches))
    if initializer.keeps_function:
        bound = centred(bound, model, data.enough)
    equalized = Equalized(model)
    if options.scale and initializer.keeps_function:
        inplace = options.inplace and not initializer.fits
        equalized = equalize(bound, flow, data.enough, data.example, inplace=inplace)
    bound = bound.with_scales(equalized.scales)
    return Work(
        model,
        equalized.source,
        bound,
        options,
        data.example,
        data.enough,
        batches,
        equalized.scales,
        equalized.factors,
        equalized.in_place,
    )
