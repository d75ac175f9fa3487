"""A recipe for each site, chosen by what it does to the model's output."""

from __future__ import annotations

import dataclasses
import glob
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from normswap.checks.conversion import refuse_unfit
from normswap.errors import InputError, NothingToConvertError, argument
from normswap.graph import capture
from normswap.graph.dataflow import Dataflow
from normswap.graph.records import refuse_wrappers
from normswap.initialization.base import Progress
from normswap.initialization.match import Match
from normswap.initialization.output_effects import OutputEffects
from normswap.options import Options, check_callable
from normswap.preparation import asked, planned, prepared
from normswap.ranking import each_alone
from normswap.recipes import Auto, PerSite, Recipe, all_recipes
from normswap.recipes.auto import pick
from normswap.records import Choice, SiteChoice
from normswap.runs.batches import LEAST_SAMPLES, sample_count, take
from normswap.runs.calling import Batch
from normswap.runs.data import Data
from normswap.runs.processes import offsets, share, together
from normswap.runs.wrappers import unwrapped
from normswap.stages.opened import opened

__all__ = ["choose", "choose_recipes"]

_ENOUGH = 128  # samples to choose by: recipes differ by more than they do from sample to sample


def choose_recipes(
    model: nn.Module,
    *,
    calibration: Any,
    example_inputs: Any = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Choice:
    """Return what ``convert(model, "auto")`` would choose for each site, and what each other recipe would cost there.

    The arguments are those of :func:`convert` with ``to="auto"``: ``recipes``, the admitted recipes from the most
    wanted to the most faithful; ``max_error``, the largest relative error of the output that is wanted; ``leave``, how
    many norms may stay; and the options of the recipes. The model is left as it is. ``convert(model, choice.to)``
    carries the choice out.

    Raises:
        NothingToConvertError: No norm of the model can be converted.
        InputError: An argument does not fit.
    """
    check_callable("progress", progress)
    recipe, chosen = asked("auto", None, options)
    assert isinstance(recipe, Auto)
    if calibration is None:
        raise InputError(
            "there is nothing to choose by",
            code="no-calibration",
            hint=f"give {argument('calibration')}, some hundred unlabelled samples",
        )
    model, _ = unwrapped(model)
    refuse_wrappers(model)
    refuse_unfit(model)
    with together(chosen.processes):
        return choose(model, recipe, chosen, Data.of(model, example_inputs, calibration, forward_fn), progress)[1]


def choose(
    model: nn.Module, recipe: Auto, options: Options, data: Data, progress: Progress | None = None
) -> tuple[Recipe, Choice]:
    """Return the recipe that was chosen for ``model``, which is only read, and how it was chosen."""
    options = dataclasses.replace(options, recurrent=None)
    few = _first(data.enough or (), share(_ENOUGH))
    data = dataclasses.replace(data, enough=few, batches=few)
    labels = _labels(recipe.recipes)
    found: dict[str, dict[str, _Measured]] = {}
    faithful: dict[str, Recipe] = {}
    refusal: NothingToConvertError | None = None
    with opened(model):
        for i, part in enumerate(recipe.recipes):
            shown = None if progress is None else _counted(progress, labels[i], i, len(labels))
            try:
                measured = _measured(model, part, options, data, shown)
            except NothingToConvertError as cause:
                refusal = cause
                continue
            faithful |= dict.fromkeys(measured, part)
            for norm, one in measured.items():
                if one is not None:
                    found.setdefault(norm, {})[labels[i]] = one
    if not faithful and refusal is not None:
        raise refusal
    energies = {norm: {label: one.energy for label, one in by.items()} for norm, by in found.items()}
    picked = pick(energies, recipe)
    parts = dict(zip(labels, recipe.recipes, strict=True))
    unseen = {norm: part.without_data for norm, part in faithful.items() if norm not in found}
    sites: list[SiteChoice] = []
    chosen: list[tuple[str, Recipe | None]] = [*unseen.items()]
    for norm, label in picked.items():
        errors = {name: math.sqrt(energy) for name, energy in energies[norm].items()}
        groups = None if label is None else found[norm][label].num_groups
        sites.append(SiteChoice(norm, errors, label, groups))
        own = None if label is None else parts[label]
        chosen.append((norm, own and (own.without_data if groups is None else own.with_groups(groups))))
    if not any(part for _, part in chosen):
        raise InputError(
            f"{argument('leave', recipe.leave)} leaves every norm: there are {len(chosen)}",
            code="auto-leave",
            hint="leave fewer",
        )
    made = _combined(chosen)
    foreign = {glob: part for glob, part in made.parts if part and type(part) not in all_recipes().values()}
    notes = _notes(found, unseen, recipe, sites, data)
    return PerSite.combined(made.parts), Choice(tuple(labels), tuple(sites), made.options()["at"] | foreign, notes)


@dataclass(frozen=True)
class _Measured:
    """What one recipe does at one site.

    Args:
        energy: ``‖y' − y‖²/‖y‖²`` of the model's output, as far as this site causes it.
        num_groups: The group count of least error, where the norm has groups.
        at_output: Whether the error was followed to the output, and not taken from the norm's own.
    """

    energy: float
    num_groups: int | None = None
    at_output: bool = True


def _measured(
    model: nn.Module, part: Recipe, options: Options, data: Data, progress: Progress | None
) -> dict[str, _Measured | None]:
    """Return what ``part`` does at each site, by the norms' names in the plan's order; None where no data reaches."""
    if part.exact:
        bound = planned(Dataflow(capture(model, data.example)), part, options, data)
        return {step.site.norm: _Measured(0.0) for step in bound.steps}
    work = dataclasses.replace(prepared(model, part, options, data, None, initializer=Match), progress=progress)
    effects = OutputEffects.of(work)
    rows = each_alone(work, effects.fitted)
    found = effects.over_processes()
    known = [
        found[name] / row.fit.noise_after
        for name, row in rows.items()
        if row.fit and name in found and row.fit.noise_after > 0
    ]
    usual = statistics.median(known) if known else 1 / max(len(work.bound.steps), 1)
    measured: dict[str, _Measured | None] = {}
    for step in work.bound.steps:
        name = step.site.norm
        row, measured[name] = rows.get(name), None
        if row is not None and row.fit is not None:
            at_output = name in found
            energy = found[name] if at_output else usual * row.fit.noise_after
            measured[name] = _Measured(energy, row.fit.num_groups if step.recipe.least_group else None, at_output)
    return measured


def _first(batches: Sequence[Batch], count: int) -> list[Batch]:
    """Return the first ``count`` samples, or a few more where a batch cannot be taken apart."""
    found: list[Batch] = []
    for batch in batches:
        if count <= 0:
            break
        found.append(take(batch, slice(count)) or batch)
        count -= sample_count(batch)
    return found


def _combined(chosen: Sequence[tuple[str, Recipe | None]]) -> PerSite:
    """Return the recipe that gives each norm its own, with the commonest one for all that are not named."""
    common = Counter(part for _, part in chosen if part is not None).most_common(1)
    usual = common[0][0] if common else None
    return PerSite((*((glob.escape(norm), part) for norm, part in chosen if part != usual), ("*", usual)))


def _labels(parts: Sequence[Recipe]) -> list[str]:
    """Return what each recipe is called: its name, with its options where another has the same name."""
    several = Counter(part.name for part in parts)
    options = [", ".join(f"{k}={v}" for k, v in part.options().items()) for part in parts]
    return [
        part.name if several[part.name] == 1 else f"{part.name} {own}".strip()
        for part, own in zip(parts, options, strict=True)
    ]


def _notes(
    found: Mapping[str, Mapping[str, _Measured]],
    unseen: Mapping[str, Recipe],
    recipe: Auto,
    sites: Sequence[SiteChoice],
    data: Data,
) -> tuple[str, ...]:
    notes = []
    _, samples = offsets("samples", [sample_count(batch) for batch in data.batches])
    if found and samples < LEAST_SAMPLES and all(take(batch, slice(1)) is not None for batch in data.batches):
        notes.append("too few samples to hold any out: the errors are on the samples that were fitted to, too small")
    if unseen:
        given = ", ".join(dict.fromkeys(part.name for part in unseen.values()))
        notes.append(f"no error could be measured at {', '.join(unseen)}, as if there were no data: {given} there")
    if silent := [
        label for label in _labels(recipe.recipes) if found and not any(label in by for by in found.values())
    ]:
        notes.append(f"no error of {', '.join(silent)} could be measured: not chosen")
    inner = [norm for norm, by in found.items() if not all(one.at_output for one in by.values())]
    if inner:
        notes.append(
            f"at {len(inner)} of {len(found)} norms the error could not be followed to the output: estimated by the "
            "norm's own error"
        )
    expected = math.hypot(*(site.error for site in sites))
    if recipe.max_error is not None and expected > recipe.max_error:
        notes.append(
            f"the expected relative error, {expected:.3f}, is larger than the {recipe.max_error:g} that was wanted: "
            "admit more faithful recipes, or leave more norms"
        )
    return tuple(notes)


def _counted(progress: Progress, label: str, i: int, parts: int) -> Progress:
    return lambda name, done, of: progress(f"{label} at {name}", i * of + done, parts * of)
