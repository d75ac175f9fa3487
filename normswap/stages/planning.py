"""Plan: sites × recipe → what will happen at each, with the reason for everything that will not. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from normswap.errors import InputError, Text, argument, marked, parameter
from normswap.norms import Bias
from normswap.options import Options
from normswap.recipes import Recipe
from normswap.recipes.recurrent import RecurrentRecipe
from normswap.records import Plan, RecurrentSite, Site, Skip
from normswap.stages.bound import BoundPlan, BoundStep
from normswap.stages.find_sites import FoundSites
from normswap.stages.recurrent import bound_at

__all__ = ["make_plan"]


def make_plan(
    model_name: str,
    found: FoundSites,
    recipe: Recipe,
    options: Options,
    *,
    recurrent: RecurrentRecipe | None = None,
    has_data: bool = False,
) -> BoundPlan:
    """Decide what ``recipe`` does at each site, and ``recurrent`` at each recurrent layer.

    Args:
        model_name: The model's class.
        found: The sites and what is none.
        recipe: The recipe.
        options: Whose globs choose the norms and the recurrent layers.
        recurrent: The recipe for recurrent layers; None leaves them.
        has_data: Whether data will be there to measure the statistics of norms that store none.

    Raises:
        InputError: An option does not fit a site, or a glob matches nothing that could be converted or decides nothing.
    """
    layers = () if recurrent is None else found.recurrent
    _check_globs(found, (*options.include, *options.exclude), layers)
    _check_globs(found, recipe.patterns)
    _check_order(found, recipe.patterns)
    steps: list[BoundStep] = []
    skips = list(found.skips)
    for site in found.sites:
        chosen = _chosen(site, recipe, options, has_data)
        if isinstance(chosen, tuple):
            code, reason = chosen
            skips.append(Skip(site.norm, "norm", site.norm_type, code, reason))
            if site.layer is not None and site.layer_type is not None:
                skips.append(
                    Skip(site.layer, "layer", site.layer_type, code, Text(f"its norm stays: {marked(reason)}"))
                )
            continue
        step = BoundStep.at(site, chosen, chosen.groups_at(site), found.sources[site.norm])
        if step.held_rank is not None and step.source.call is not None and step.norm.bias is Bias.KEPT:
            why = "it is a call of batch_norm that stays, and only the example inputs show how many axes its input has"
            skips.append(Skip(site.norm, "norm", site.norm_type, "rank-of-call", why))
            continue
        steps.append(step)
    steps = _each_layer_once(steps)
    readers = {step.step.reader for step in steps}
    answers = [bound_at(site, recurrent, options, readers) for site in found.recurrent]
    skips += [one for one in answers if isinstance(one, Skip)]
    bound = tuple(one for one in answers if not isinstance(one, Skip))
    plan = Plan(
        model_name,
        recipe.name,
        recipe.options(),
        tuple(step.step for step in steps),
        tuple(skips),
        tuple(one.step for one in bound),
        "" if recurrent is None else recurrent.name,
        {} if recurrent is None else recurrent.options(),
    )
    return BoundPlan(plan, recipe, tuple(steps), bound)


def _each_layer_once(steps: list[BoundStep]) -> list[BoundStep]:
    """Return the steps such that a layer takes up one norm: that which it feeds before one that it reads."""
    taken = {step.site.layer for step in steps}
    found = []
    for step in steps:
        reader = step.step.reader
        found.append(step.without_reader() if reader is not None and reader in taken else step)
        taken.add(reader)
    return found


def _chosen(site: Site, recipe: Recipe, options: Options, has_data: bool) -> Recipe | tuple[str, str]:
    """Return the recipe that is used at ``site``, or the code and the words of why none is."""
    names = site.names
    if not any(_matches(names, glob) for glob in options.include):
        return "excluded", Text(f"no pattern of {parameter('include')} matches it")
    for glob in options.exclude:
        if _matches(names, glob):
            return "excluded", f"the pattern {glob!r} excludes it"
    chosen = recipe.at(site)
    if chosen is None:
        return "excluded", "no pattern gives it a recipe" if recipe.patterns else "the norms stay as they are"
    if not site.has_statistics and not has_data:
        return (
            "no-statistics",
            Text(f"it stores no running statistics, so there is nothing to take over: give {argument('calibration')}"),
        )
    reason = chosen.refuse(site)
    return chosen if reason is None else ("recipe-refuses", reason)


def _check_globs(found: FoundSites, globs: Sequence[str], layers: Sequence[RecurrentSite] = ()) -> None:
    names = [name for site in found.sites for name in site.names]
    names += [name for site in layers for name in site.names]
    names += [skip.name for skip in found.skips if skip.what == "norm"]
    for glob in globs:
        if glob != "*" and not any(fnmatchcase(name, glob) for name in names):
            raise InputError(
                f"the pattern {glob!r} matches no norm" + (" and no recurrent layer" if layers else ""),
                code="pattern-matches-nothing",
                hint=f"norms are named like {names[0]!r}" if names else "the model has no norms",
            )


def _check_order(found: FoundSites, patterns: Sequence[str]) -> None:
    """Refuse a pattern that decides nowhere, as those before it take what it matches; ``*`` at the end is the rest."""
    norms = [site.names for site in found.sites]
    norms += [(skip.name,) for skip in found.skips if skip.what == "norm"]
    for i, glob in enumerate(patterns):
        matched = [names for names in norms if _matches(names, glob)]
        before = [[one for one in patterns[:i] if _matches(names, one)][:1] for names in matched]
        rest = glob == "*" and i == len(patterns) - 1 and glob not in patterns[:i]
        if matched and all(before) and not rest:
            first = ", ".join(dict.fromkeys(repr(one) for taken in before for one in taken))
            raise InputError(
                f"the pattern {glob!r} decides nothing: {first} before it takes every norm that it matches",
                code="pattern-decides-nothing",
                hint="the first pattern that matches decides: put the narrower one first, or leave one out",
            )


def _matches(names: Sequence[str], glob: str) -> bool:
    return any(fnmatchcase(name, glob) for name in names)
