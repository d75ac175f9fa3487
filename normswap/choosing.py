"""A recipe for each site, chosen by what it does to the model's output.

Note [Errors at the output]
Each admitted recipe is matched at each site with the original's own values before it, and so are known, on held-out
samples, the errors ``e = y' − y`` of what the new norm gives. The original is differentiated once: with J its output's
Jacobian at the site, ``E_u ((Jᵀu)·e)² = ‖J e‖²`` for random u (Hutchinson). The errors of several sites are added in
squares, as if they were independent. That is an estimate: it says which recipe is the best for a site, and the
agreement that a conversion reports says what came of it.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normswap.checks.conversion import refuse_unfit
from normswap.errors import NothingToConvertError
from normswap.graph import capture
from normswap.graph.dataflow import Dataflow
from normswap.graph.records import refuse_wrappers
from normswap.initialization.base import Progress, Work
from normswap.initialization.match import Match
from normswap.initialization.targets import RegressionTarget
from normswap.options import Options
from normswap.preparation import asked, planned, prepared
from normswap.ranking import each_alone
from normswap.recipes import Auto, PerSite, Recipe
from normswap.records import Choice, SiteChoice
from normswap.runs.batches import LEAST_SAMPLES, held_out, sample_count, take
from normswap.runs.calling import Batch
from normswap.runs.data import Data
from normswap.runs.gradients import OutputGradients, output_gradients
from normswap.runs.paired_sites import PairedSite, SiteBatch
from normswap.runs.processes import offsets, summed_by_name, together
from normswap.runs.wrappers import unwrapped
from normswap.stages.opened import opened

__all__ = ["choose", "choose_recipes", "pick"]

_SAMPLES = 16  # whose errors are followed to the output
_TIE = 1.05  # a recipe that stands earlier is taken where its error is larger by no more than this factor


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
    recipe, chosen = asked("auto", None, options)
    assert isinstance(recipe, Auto)
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
    labels = _labels(recipe.recipes)
    found: dict[str, dict[str, _Measured]] = {}
    refusal: NothingToConvertError | None = None
    with opened(model):
        for i, part in enumerate(recipe.recipes):
            shown = None if progress is None else _counted(progress, labels[i], i, len(labels))
            try:
                measured = _measured(model, part, options, data, shown)
            except NothingToConvertError as cause:
                refusal = cause
                continue
            for norm, one in measured.items():
                found.setdefault(norm, {})[labels[i]] = one
    if not found and refusal is not None:
        raise refusal
    energies = {norm: {label: one.energy for label, one in by.items()} for norm, by in found.items()}
    picked = pick(energies, recipe)
    parts = dict(zip(labels, recipe.recipes, strict=True))
    sites, chosen = [], []
    for norm, label in picked.items():
        errors = {name: math.sqrt(energy) for name, energy in energies[norm].items()}
        groups = None if label is None else found[norm][label].num_groups
        sites.append(SiteChoice(norm, errors, label, groups))
        chosen.append((norm, None if label is None else _with_groups(parts[label], groups)))
    made = _combined(chosen) if chosen else PerSite((("*", recipe.without_data),))
    choice = Choice(tuple(labels), tuple(sites), made.options()["at"], _notes(found, recipe, sites))
    return PerSite.combined(made.parts), choice


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
) -> dict[str, _Measured]:
    """Return what ``part`` does at each site that the data reaches, by the norms' names in the plan's order."""
    if part.exact:
        bound = planned(Dataflow(capture(model, data.example)), part, options, data)
        return {step.site.norm: _Measured(0.0) for step in bound.steps}
    work = dataclasses.replace(prepared(model, part, options, data, None, initializer=Match), progress=progress)
    effects = _Effects.of(work)
    rows = each_alone(work, effects.fitted)
    found = effects.over_processes()
    known = [
        found[name] / row.fit.noise_after
        for name, row in rows.items()
        if row.fit and name in found and row.fit.noise_after > 0
    ]
    usual = statistics.median(known) if known else 1 / max(len(work.bound.steps), 1)
    measured = {}
    for step in work.bound.steps:
        name = step.site.norm
        row = rows.get(name)
        if row is not None and row.fit is not None:
            at_output = name in found
            energy = found[name] if at_output else usual * row.fit.noise_after
            measured[name] = _Measured(energy, row.fit.num_groups if step.recipe.least_group else None, at_output)
    return measured


@dataclass(frozen=True)
class _Effects:
    """What the sites' errors do to the output (Note [Errors at the output]).

    Args:
        parts: The batches that the original was differentiated on: which of the data's it is, which of its samples,
            and the gradients.
        batches: How many batches the data has.
        found: The energy at the output by the norm's name, as far as it is known.
    """

    parts: Sequence[tuple[int, Tensor, OutputGradients]]
    batches: int
    found: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, work: Work) -> _Effects:
        """Differentiate the original on some held-out samples, on the first ones where there are too few."""
        batches = work.enough or ()
        means = {}
        for step in work.bound.steps:
            owner, _, buffer = step.site.norm.partition(":")
            mean = getattr(work.source.get_submodule(owner), buffer or "running_mean", None)
            if isinstance(mean, Tensor):
                means[step.site.norm] = mean
        parts = [(i, rows, output_gradients(work.source, means, inputs)) for i, rows, inputs in _some_held(batches)]
        return cls(parts, len(batches))

    def fitted(self, site: PairedSite, target: RegressionTarget, batches: Sequence[SiteBatch]) -> None:
        """Follow the error of a site that was fitted to the output."""
        size = sum(gradients.size for _, _, gradients in self.parts)
        if len(batches) != self.batches or not 0 < size < math.inf:
            return
        energy = 0.0
        for i, rows, gradients in self.parts:
            x, reference = batches[i].x, batches[i].reference
            if len(x) != len(rows) or len(reference) != len(rows):
                return
            here = SiteBatch(x[rows], reference[rows])
            at_output = gradients.energy(site.name, site.output(here.x).float() - target.targets(here)[1])
            if at_output is None:
                return
            energy += at_output
        self.found[site.name] = energy / size

    def over_processes(self) -> dict[str, float]:
        """Return the mean of what all processes have found, each on samples of its own."""
        values = {name: [torch.tensor([energy, 1.0], dtype=torch.float64)] for name, energy in self.found.items()}
        sums = summed_by_name("the effects of errors", values)
        return {name: float(energy / count) for name, ((energy, count),) in sums.items()}


def _some_held(batches: Sequence[Batch]) -> list[tuple[int, Tensor, Batch]]:
    """Return some held-out samples: the batch that they are of, which of its samples they are, and their inputs."""
    counts = [sample_count(batch) for batch in batches]
    firsts, samples = offsets("samples", counts)
    found: list[tuple[int, Tensor, Batch]] = []
    wanted = 0
    for i, (batch, count, first) in enumerate(zip(batches, counts, firsts, strict=True)):
        rows = torch.ones(count, dtype=torch.bool) if samples < LEAST_SAMPLES else held_out(count, first)
        rows &= rows.cumsum(0) <= _SAMPLES - wanted
        part = take(batch, rows)
        if part is not None and bool(rows.any()):
            found.append((i, rows, part))
            wanted += int(rows.sum())
        if wanted >= _SAMPLES:
            break
    return found


def pick(energies: Mapping[str, Mapping[str, float]], recipe: Auto) -> dict[str, str | None]:
    """Return the label of the recipe for each site, None where the norm stays.

    Args:
        energies: By site and label ``‖y' − y‖²/‖y‖²`` of the output, the labels in the order of the recipe's parts.
        recipe: What is wanted.
    """
    best: dict[str, str] = {}
    for norm, by in energies.items():
        least = min(by.values())
        best[norm] = next(label for label, energy in by.items() if energy <= least * _TIE**2)
    picked: dict[str, str | None] = dict(best)
    allowed = math.inf if recipe.max_error is None else recipe.max_error**2

    def total() -> float:
        return sum(energies[norm][label] for norm, label in picked.items() if label is not None)

    if recipe.max_error is not None:
        picked = {norm: next(iter(by)) for norm, by in energies.items()}
        gains = {norm: by[next(iter(by))] - by[best[norm]] for norm, by in energies.items()}
        for norm in sorted(gains, key=gains.__getitem__, reverse=True):
            if total() <= allowed:
                break
            picked[norm] = best[norm]
    costly = sorted(picked, key=lambda norm: energies[norm][picked[norm] or ""], reverse=True)
    for norm in costly[: recipe.leave]:
        if recipe.max_error is None or total() > allowed:
            picked[norm] = None
    return picked


def _combined(chosen: Sequence[tuple[str, Recipe | None]]) -> PerSite:
    """Return the recipe that gives each norm its own, with the commonest one for all that are not named."""
    common = Counter(part for _, part in chosen if part is not None).most_common(1)
    usual = common[0][0] if common else None
    return PerSite((*((glob.escape(norm), part) for norm, part in chosen if part != usual), ("*", usual)))


def _with_groups(part: Recipe, count: int | None) -> Recipe:
    return part.with_groups(count) if part.least_group is not None else part


def _labels(parts: Sequence[Recipe]) -> list[str]:
    """Return what each recipe is called: its name, with its options where another has the same name."""
    several = Counter(part.name for part in parts)
    return [
        part.name if several[part.name] == 1 else f"{part.name} {part.options() or 'as it comes'}" for part in parts
    ]


def _notes(found: Mapping[str, Mapping[str, _Measured]], recipe: Auto, sites: Sequence[SiteChoice]) -> tuple[str, ...]:
    notes = []
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
