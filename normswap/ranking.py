"""What the swap of each site costs by itself, with the original's own values before and after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from normswap.checks.conversion import refuse_unfit
from normswap.errors import InputError, argument
from normswap.graph.records import refuse_wrappers
from normswap.initialization.base import Progress, Work
from normswap.initialization.match import Fitted, Match, match_sites
from normswap.options import check_callable
from normswap.preparation import asked, prepared
from normswap.recipes import To, all_recipes
from normswap.recipes.auto import Auto
from normswap.records import InitRow, SiteCost
from normswap.runs.data import Data
from normswap.runs.guard import copy_of
from normswap.runs.processes import together
from normswap.runs.wrappers import unwrapped
from normswap.stages.opened import opened
from normswap.stages.rewriting import rewrite

__all__ = ["each_alone", "rank_sites"]


def rank_sites(
    model: nn.Module,
    to: To = "gn+ws",
    *,
    calibration: Any,
    example_inputs: Any = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[SiteCost, ...]:
    """Return what the swap of each site costs by itself, largest error first.

    Each site is matched as by :func:`convert`, but the original's values go on after it: its error is its own alone,
    whatever lies before it. The sites at the top are those to leave out (``exclude``), or to give another recipe.

    The arguments are those of :func:`convert`; the model is left as it is.

    Returns:
        A row for each site that the data reaches.

    Raises:
        NothingToConvertError: No norm of the model can be converted.
        InputError: The recipe is exact, or an argument does not fit.
    """
    check_callable("progress", progress)
    recipe, chosen = asked(to, None, options)
    chosen = dataclasses.replace(chosen, recurrent=None)
    if isinstance(recipe, Auto):
        raise InputError(
            f"{argument('to', recipe.name)} chooses a recipe at each norm, and has no error of its own",
            code="auto-recipe",
            hint="choose_recipes gives the errors of each recipe at each norm; to rank the norms, name one recipe",
        )
    if recipe.exact:
        inexact = ", ".join(name for name, other in all_recipes().items() if not other.exact)
        raise InputError(
            f"'{recipe.name}' is exact: no site has an error", code="exact-recipe", hint=f"choose from {inexact}"
        )
    model, _ = unwrapped(model)
    refuse_wrappers(model)
    refuse_unfit(model)
    with together(chosen.processes):
        data = Data.of(model, example_inputs, calibration, forward_fn)
        with opened(model):
            work = prepared(model, recipe, chosen, data, None, initializer=Match)
            rows = each_alone(dataclasses.replace(work, progress=progress))
    found = [(step.site, fit) for step in work.bound.steps if (row := rows.get(step.site.norm)) and (fit := row.fit)]
    total = sum(fit.noise_after for _, fit in found) or 1.0
    costs = (
        SiteCost(site.norm, site.layer, fit.noise_after, fit.noise_before, fit.noise_after / total)
        for site, fit in found
    )
    return tuple(sorted(costs, key=lambda cost: cost.error, reverse=True))


def each_alone(work: Work, fitted: Fitted | None = None) -> Mapping[str, InitRow]:
    """Match each site by itself, in a copy, and return their rows by the norms' names.

    Args:
        work: What is converted, and how.
        fitted: Called with each site once it is fitted.
    """
    work = dataclasses.replace(work, choose_groups=True, isolated=True)
    target, method = copy_of(work.source), Match(work)
    return match_sites(work, target, rewrite(target, work.bound, method.values), fitted)
