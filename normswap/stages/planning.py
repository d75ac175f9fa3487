"""Plan: sites × recipe → what will happen at each, with the reason for everything that will not. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from normswap.errors import InputError, Text, argument, marked, parameter
from normswap.recipes import Recipe
from normswap.records import Plan, Site, Skip, Step
from normswap.stages.find_sites import Matches

__all__ = ["make_plan", "step_at"]


def make_plan(
    model_name: str,
    matches: Matches,
    recipe: Recipe,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    has_data: bool = False,
) -> Plan:
    """Decide what ``recipe`` does at each site.

    Args:
        model_name: The model's class.
        matches: The sites and what is none.
        recipe: The recipe.
        include: Globs of norms to convert; empty means all.
        exclude: Globs of norms to leave as they are.
        has_data: Whether data will be there to measure the statistics of norms that store none.

    Raises:
        InputError: An option does not fit a site, or a glob matches no norm.
    """
    _check_globs(matches, (*include, *exclude))
    steps: list[Step] = []
    skips = list(matches.skips)
    for site in matches.sites:
        if refusal := _refusal(site, recipe, include, exclude, has_data):
            code, reason = refusal
            skips.append(Skip(site.norm, "norm", site.norm_type, code, reason))
            if site.layer is not None and site.layer_type is not None:
                skips.append(
                    Skip(site.layer, "layer", site.layer_type, code, Text(f"its norm stays: {marked(reason)}"))
                )
            continue
        steps.append(step_at(site, recipe, recipe.groups_at(site)))
    return Plan(model_name, recipe.name, recipe.options(), tuple(steps), tuple(skips))


def _refusal(
    site: Site, recipe: Recipe, include: Sequence[str], exclude: Sequence[str], has_data: bool
) -> tuple[str, str] | None:
    names = (site.norm, *site.aliases)
    if include and not any(fnmatchcase(name, glob) for name in names for glob in include):
        return "excluded", Text(f"no pattern of {parameter('include')} matches it")
    for glob in exclude:
        if any(fnmatchcase(name, glob) for name in names):
            return "excluded", f"the pattern {glob!r} excludes it"
    if not site.has_statistics and not has_data:
        return (
            "no-statistics",
            Text(f"it stores no running statistics, so there is nothing to take over: give {argument('calibration')}"),
        )
    reason = recipe.refuse(site)
    return None if reason is None else ("recipe-refuses", reason)


def step_at(site: Site, recipe: Recipe, groups: int | None) -> Step:
    """Return what ``recipe`` does at ``site`` with so many groups, None where its norm has none."""
    weight = recipe.weight(site) if site.layer is not None else None
    norm = str(recipe.norm(site, groups))
    if groups is not None:
        norm += f" of {site.num_features // groups}"
    return Step(site, weight.name if weight else None, norm, groups, recipe.notes(site))


def _check_globs(matches: Matches, globs: Sequence[str]) -> None:
    names = [name for site in matches.sites for name in (site.norm, *site.aliases)]
    names += [skip.name for skip in matches.skips if skip.what == "norm"]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise InputError(
                f"the pattern {glob!r} matches no norm",
                code="pattern-matches-nothing",
                hint=f"norms are named like {names[0]!r}" if names else "the model has no norms",
            )
