"""The pipeline: capture, match, plan, rewrite, initialize. Each stage is a module of its own."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normswap.checks.agreement import agreement
from normswap.checks.comparison import Verification
from normswap.checks.self_check import eval_output, keeps_output
from normswap.errors import InitializationError, InputError, NothingToConvertError, VerificationError
from normswap.graph import Capture, capture
from normswap.initialization.absorb import absorb
from normswap.initialization.centring import moments_for
from normswap.initialization.equalization import EQUALIZED, equalize
from normswap.initialization.match import match_to
from normswap.initialization.moments import Moments
from normswap.initialization.steadying import SPREAD
from normswap.initialization.tune import tune_to
from normswap.recipes import Recipe, all_recipes, make_recipe
from normswap.recipes.base import AUTO_GROUPS, GroupedRecipe
from normswap.records import InitReport, InitRow, NormKind, Plan, SiteCost
from normswap.runs.batches import bind_batches, sample_count, some_samples
from normswap.runs.calling import Batch
from normswap.runs.guard import copy_of
from normswap.runs.inputs import Inputs, example_of, make_up_inputs
from normswap.runs.watching import Statistics, measure_statistics
from normswap.stages.find_sites import match
from normswap.stages.planning import make_plan, step_at
from normswap.stages.rewriting import Placed, rewrite
from normswap.storage.origin import Origin, remember, skeleton_of

__all__ = ["Conversion", "convert", "plan", "rank_sites", "swap_norms"]

Progress = Callable[[str, int, int], None]
ENOUGH_SAMPLES = 1000
METHODS = ("absorb", "match", "tune", "none")
FITTED = ("match", "tune")


@dataclass(frozen=True, repr=False)
class Conversion:
    """What a conversion gave; prints as its plan and how the new parts got their values.

    Args:
        model: The converted model.
        plan: What was done.
        init: How the new parts got their values.
        check: For an exact recipe, the comparison of both models' outputs; None where there were no inputs for it.
    """

    model: nn.Module
    plan: Plan
    init: InitReport
    check: Verification | None

    def __repr__(self) -> str:
        return f"<Conversion of {self.plan.model} to {self.plan.recipe}: {self.plan.summary()}>"

    def __str__(self) -> str:
        check = [] if self.check is None else [str(self.check)]
        return "\n\n".join([str(self.plan), str(self.init), *check])

    @property
    def heads(self) -> tuple[str, ...]:
        """The layers without a norm that were fitted because what they give is the model's output."""
        norms = {step.site.norm for step in self.plan.steps}
        return tuple(row.name for row in self.init.rows if row.fit is not None and row.name not in norms)


def swap_norms(model: nn.Module, to: str | Recipe = "gn+ws", **options: Any) -> nn.Module:
    """Return ``model`` with its BatchNorms swapped for the recipe ``to``; what it has learnt is kept.

    The arguments are those of :func:`convert`, which also returns the plan and the reports.
    """
    return convert(model, to, **options).model


def plan(
    model: nn.Module,
    to: str | Recipe = "gn+ws",
    *,
    example_inputs: Any = None,
    calibration: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    **options: Any,
) -> Plan:
    """Return what :func:`convert` would do; the model is only read, and may be on the meta device."""
    recipe = make_recipe(to, options)
    example = example_of(model, example_inputs)
    if example is None and calibration is not None and not isinstance(calibration, Iterator):  # which would be used up
        example = some_samples(next(bind_batches(model, calibration)))
    return _plan(capture(model, example), recipe, example, include, exclude, calibration is not None)


def convert(
    model: nn.Module,
    to: str | Recipe = "gn+ws",
    *,
    example_inputs: Any = None,
    calibration: Any = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    init: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    plan: Plan | None = None,
    inplace: bool = False,
    check: bool = True,
    scale: bool = True,
    spread: float = SPREAD,
    tune_steps: int = 300,
    progress: Progress | None = None,
    **options: Any,
) -> Conversion:
    """Swap a model's BatchNorms for another normalization.

    Args:
        model: The model; left as it is unless ``inplace``.
        to: A recipe's name, or a recipe.
        example_inputs: Inputs of the model: a tensor, a tuple, or a dict by keyword. They decide what the graph leaves
            open (ranks, hidden consumers) and serve the check of exact recipes. Default: the first calibration samples.
        calibration: Unlabelled data: a tensor, tuple or dict of inputs, or an iterable of those, such as a DataLoader.
            Entries that ``forward`` does not require (labels) are left out. Closed forms use the first 1000 samples.
        forward_fn: Called as ``forward_fn(model, batch)`` for each batch of ``calibration``, for data that the rule
            above does not fit.
        init: ``"absorb"`` keeps the model's function by what its BatchNorms know, exactly under an exact recipe and
            closely under the others, with the statistics of the data where there is some; ``"match"``, the default
            where there is calibration data, then fits each site to the original in closed form; ``"tune"`` then takes
            gradient steps towards the original's own values, without labels; ``"none"`` leaves the new norms fresh.
        include: Globs of the norms to convert; default all.
        exclude: Globs of norms to leave as they are.
        plan: A plan to replay instead of making one.
        inplace: Convert ``model`` itself, for models that fill the memory; a failed self-check leaves it so.
        check: Whether an exact recipe verifies that the output stayed, on ``example_inputs`` or on inputs made up.
        scale: Whether channels between layers may be scaled, where the recipe standardizes weights and then takes less
            away (:mod:`normswap.initialization.equalization`). The model is the same function, but features taken from
            within it differ from the original's by a factor per channel; those that go into a linear layer do not.
        spread: How far apart ``"match"`` sets the offsets of a group's channels, in their standard deviations. 0 leaves
            a group's statistics to the sample alone; with more they are steadier, the swap closer, and less is
            normalized (:mod:`normswap.initialization.steadying`).
        tune_steps: How many steps ``"tune"`` takes, of one batch each.
        progress: Called by ``"match"`` and ``"tune"`` with what is done, how much of it is, and how much there is.
        **options: Options of the recipe.

    Returns:
        The converted model with its plan and reports.

    Raises:
        NothingToConvertError: No norm of the model can be converted.
        VerificationError: An exact recipe moved the output.
        InputError: An argument does not fit.
    """
    if plan is not None and not isinstance(to, Recipe):
        to, options = plan.recipe, dict(plan.options)
    recipe = make_recipe(to, options)
    method = _method(init, recipe, calibration is not None)
    _check_numbers(spread, tune_steps)
    notes: list[str] = []
    _refuse_unfit(model)
    batches = None if calibration is None else list(bind_batches(model, calibration, notes, forward_fn))
    example = example_of(model, example_inputs)
    if example is None and batches is not None:
        example = some_samples(batches[0])
    least_group = _least_group(recipe) if plan is None else None
    if least_group is not None and method not in FITTED:
        raise InputError(
            "num_groups='auto' chooses by calibration data and none is used",
            code="no-calibration",
            hint="give calibration=, some hundred unlabelled samples, or a number",
        )
    captured = capture(model, example)
    skeleton = skeleton_of(model)
    if plan is None:
        plan = _plan(captured, recipe, example, include, exclude, calibration is not None)
    elif skeleton is not None:  # a plan that does not fit must not leave half of itself behind
        rewrite(copy.deepcopy(skeleton), plan, recipe)
    _refuse_empty(plan)
    statistics = _missing_statistics(model, plan, batches)
    enough = None if batches is None else _enough(batches, notes)
    fits = method in FITTED
    original, assumption = model, ""
    scales: dict[str, Tensor] = {}
    moments: dict[str, Moments] = {}
    data: dict[str, Statistics] = {}
    if method != "none":
        if scale:
            original, scales = equalize(plan, recipe, captured, enough, example, statistics)
        notes += [EQUALIZED] if original is not model else []
        moments, assumption = moments_for(plan, recipe, original, enough, example, fitted=fits)
        if enough is not None and not recipe.exact and not fits:  # a fit measures its own
            data = measure_statistics(original, _modules(plan), enough)
    reference = _reference(model, recipe, example, check and method != "none")
    trial = _trial(model, plan, example) if check else None
    # Matching needs the original beside the copy, also where the model itself is to become the converted one.
    if inplace and not fits:
        target = model
        if original is not model:
            _take_values(model, original)
    else:
        target = original if original is not model and not fits else _copy(original)
    placed = [_with_statistics(p, statistics) for p in rewrite(target, plan, recipe)]
    agreed = None
    if method == "none":
        rows = [InitRow(p.step.site.norm, "fresh") for p in placed]
    else:
        rows = [absorb(p, moments, data.get(p.step.site.norm)) for p in placed]
    if fits:
        assert batches is not None
        assert enough is not None
        choices: dict[str, Any] = {"scales": scales, "least_group": least_group, "spread": spread}
        fitted = match_to(original, target, placed, enough, **choices, progress=progress)
        sites = {row.name for row in rows}
        rows = [fitted.get(row.name, row) for row in rows] + [r for name, r in fitted.items() if name not in sites]
        if method == "tune":
            notes.append(_tune(original, target, placed, fitted, batches, tune_steps, progress))
        agreed = agreement(model, target, enough)
        plan = _with_groups(plan, recipe, placed)
        if inplace:
            rewrite(model, plan, recipe)
            _take_values(model, target)
            target = model
    remember(target, Origin(plan, recipe, skeleton))
    report = InitReport(method, tuple(rows), tuple(n for n in (*notes, assumption) if n), agreed)
    if trial is not None:
        _refuse_broken(target, trial)
    return Conversion(target, plan, report, _self_check(target, reference))


def rank_sites(
    model: nn.Module,
    to: str | Recipe = "gn+ws",
    *,
    calibration: Any,
    example_inputs: Any = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    scale: bool = True,
    spread: float = SPREAD,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[SiteCost, ...]:
    """Return what the swap of each site costs by itself, the dearest first.

    Each site is matched as by :func:`convert`, but the original's values go on after it: its error is its own alone,
    whatever lies before it. The sites at the top are those to leave out (``exclude``), or to give another recipe.

    Args:
        model: The model; left as it is.
        to: A recipe's name, or a recipe.
        calibration: As for :func:`convert`.
        example_inputs: As for :func:`convert`.
        forward_fn: As for :func:`convert`.
        include: Globs of the norms to rank; default all.
        exclude: Globs of norms to leave out.
        scale: As for :func:`convert`.
        spread: As for :func:`convert`.
        progress: As for :func:`convert`.
        **options: Options of the recipe.

    Returns:
        A row for each site that the data reaches.

    Raises:
        NothingToConvertError: No norm of the model can be converted.
        InputError: The recipe is exact, or an argument does not fit.
    """
    recipe = make_recipe(to, options)
    if recipe.exact:
        inexact = ", ".join(name for name, other in all_recipes().items() if not other.exact)
        raise InputError(
            f"'{recipe.name}' is exact: no site has an error",
            code="exact-recipe",
            hint=f"choose from {inexact}",
        )
    _refuse_unfit(model)
    batches = list(bind_batches(model, calibration, [], forward_fn))
    example = example_of(model, example_inputs) or some_samples(batches[0])
    captured = capture(model, example)
    plan = _plan(captured, recipe, example, include, exclude, True)
    _refuse_empty(plan)
    statistics = _missing_statistics(model, plan, batches)
    batches = list(_enough(batches, []))
    scales: dict[str, Tensor] = {}
    original = model
    if scale:
        original, scales = equalize(plan, recipe, captured, batches, example, statistics)
    target = _copy(original)
    placed = [_with_statistics(one, statistics) for one in rewrite(target, plan, recipe)]
    for one in placed:
        absorb(one, {})
    rows = match_to(
        original,
        target,
        placed,
        batches,
        scales=scales,
        least_group=_least_group(recipe),
        spread=spread,
        isolated=True,
        progress=progress,
    )
    found = [(step.site, fit) for step in plan.steps if (row := rows.get(step.site.norm)) and (fit := row.fit)]
    total = sum(fit.noise_after for _, fit in found) or 1.0
    costs = (
        SiteCost(site.norm, site.layer, fit.noise_after, fit.noise_before, fit.noise_after / total)
        for site, fit in found
    )
    return tuple(sorted(costs, key=lambda cost: cost.error, reverse=True))


def _refuse_empty(plan: Plan) -> None:
    if not plan.steps:
        raise NothingToConvertError(
            f"no norm of the {plan.model} can be converted by '{plan.recipe}'",
            code="nothing-to-convert",
            hint=_first_reason(plan),
        )


def _enough(batches: Sequence[Batch], notes: list[str]) -> Sequence[Batch]:
    """Return the first batches that hold enough samples for closed forms, which have few parameters to find."""
    samples = 0
    for i, batch in enumerate(batches):
        if samples >= ENOUGH_SAMPLES:
            notes.append(f"closed forms were fitted to the first {samples} samples")
            return batches[:i]
        samples += sample_count(batch)
    return batches


def _take_values(model: nn.Module, source: nn.Module) -> None:
    """Give ``model`` the values of ``source``, a model of the same structure; a state dict may be a user's own."""
    with torch.no_grad():
        for tensors in ((model.parameters(), source.parameters()), (model.buffers(), source.buffers())):
            for mine, found in zip(*tensors, strict=True):
                mine.copy_(found)


def _least_group(recipe: Recipe) -> int | None:
    """Return the fewest channels of a group where ``recipe`` leaves the group counts to the data, else None."""
    if isinstance(recipe, GroupedRecipe) and recipe.num_groups == AUTO_GROUPS:
        return recipe.group_size or 2
    return None


def _tune(
    model: nn.Module,
    target: nn.Module,
    placed: Sequence[Placed],
    fitted: Mapping[str, InitRow],
    batches: Sequence[Batch],
    steps: int,
    progress: Progress | None,
) -> str:
    """Tune all parameters that the swap has touched, and say what came of it."""
    heads = [target.get_submodule(name) for name in fitted.keys() - {one.step.site.norm for one in placed}]
    parts = [m for one in placed for m in (one.layer, one.affine, one.norm) if m is not None]
    parameters = {id(p): p for part in (*parts, *heads) for p in part.parameters()}
    places = [name for name in fitted if ":" not in name]
    before, after = tune_to(model, target, places, list(parameters.values()), batches, steps=steps, progress=progress)
    if after < before:
        return f"{steps} gradient steps took the held-out error from {before:.3g} to {after:.3g}"
    return f"{steps} gradient steps did not lessen the held-out error of {before:.3g}: the matched values were kept"


def _with_groups(plan: Plan, recipe: Recipe, placed: Sequence[Placed]) -> Plan:
    """Return ``plan`` with the group counts that its norms have now."""
    counts = {one.step.site.norm: getattr(one.norm, "num_groups", None) for one in placed}
    steps = (step_at(step.site, recipe, counts.get(step.site.norm, step.num_groups)) for step in plan.steps)
    return dataclasses.replace(plan, steps=tuple(steps))


def _check_numbers(spread: float, tune_steps: int) -> None:
    if not 0 <= spread < math.inf:
        hint = f"give 0 or more; the default is {SPREAD:g}"
        raise InputError(f"spread={spread} is no distance", code="spread", hint=hint)
    if tune_steps < 0:
        raise InputError(f"tune_steps={tune_steps} is no number of steps", code="tune-steps", hint="give 0 or more")


def _method(init: str | None, recipe: Recipe, has_data: bool) -> str:
    """Return how the new parts get their values."""
    if init is None:
        return "match" if has_data and not recipe.exact else "absorb"
    if init not in METHODS:
        raise InputError(f"init={init!r} is unknown", code="unknown-init", hint=f"choose from {', '.join(METHODS)}")
    if init in FITTED and not has_data:
        raise InputError(
            f"init={init!r} fits to data and none was given",
            code="no-calibration",
            hint="give calibration=, some hundred unlabelled samples",
        )
    return "absorb" if init in FITTED and recipe.exact else init


def _plan(
    captured: Capture,
    recipe: Recipe,
    example: Inputs | None,
    include: Sequence[str],
    exclude: Sequence[str],
    has_data: bool,
) -> Plan:
    matches = match(captured, example, has_data=has_data)
    name = type(captured.model).__name__
    return make_plan(name, matches, recipe, include=include, exclude=exclude, has_data=has_data)


def _refuse_unfit(model: nn.Module) -> None:
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(value):
            raise InputError(
                f"'{name}' has neither shape nor values yet: its layer is lazy and was never called",
                code="lazy-layer",
                hint="run the model on a batch first, and remove layers that it never calls",
            )
        if value.is_meta or not value.is_floating_point():
            continue
        # A buffer may be infinite for good reasons: attention masks are.
        mask = not isinstance(value, nn.Parameter) and not name.rpartition(".")[2].startswith("running_")
        if not bool((~value.isnan() if mask else value.isfinite()).all()):
            raise InputError(
                f"'{name}' holds NaN or infinite values",
                code="weights-not-finite",
                hint="convert a checkpoint from before the training diverged",
            )
        if name.rpartition(".")[2] == "running_var" and bool((value < 0).any()):
            raise InputError(
                f"'{name}' holds negative values, which no variance has",
                code="negative-variance",
                hint="convert a checkpoint whose BatchNorm statistics are sound",
            )


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy_of(model)
    except Exception as cause:
        raise InputError(
            f"the model cannot be copied: {type(cause).__name__}: {cause}",
            code="not-copyable",
            hint="convert it in place (inplace=True), after saving its state dict",
        ) from cause


def _first_reason(plan: Plan) -> str:
    norms = [skip for skip in plan.skips if skip.what == "norm"]
    return f"'{norms[0].name}': {norms[0].reason}" if norms else "the model has no BatchNorm"


def _missing_statistics(model: nn.Module, plan: Plan, batches: Sequence[Batch] | None) -> dict[str, Statistics]:
    missing = [s.site.norm for s in plan.steps if not s.site.has_statistics]
    if not missing:
        return {}
    if batches is None:
        raise InputError(
            f"'{missing[0]}' stores no running statistics",
            code="no-statistics",
            hint="give calibration data, from which they are measured",
        )
    return measure_statistics(model, missing, batches)


def _modules(plan: Plan) -> list[str]:
    """Return the norms that are submodules."""
    return [step.site.norm for step in plan.steps if step.site.kind == NormKind.MODULE]


def _with_statistics(placed: Placed, statistics: Mapping[str, Statistics]) -> Placed:
    measured = statistics.get(placed.step.site.norm)
    if measured is None:
        if placed.state.mean is None:
            raise InitializationError(
                f"the calibration data never reaches '{placed.step.site.norm}', which stores no statistics",
                code="no-statistics",
                hint="exclude it, or give data that reaches it",
            )
        return placed
    return dataclasses.replace(placed, state=dataclasses.replace(placed.state, mean=measured.mean, var=measured.var))


def _reference(model: nn.Module, recipe: Recipe, example: Inputs | None, check: bool) -> tuple[Any, Inputs] | None:
    """Return the model's eval output on inputs to check an exact recipe with; None where there is nothing to check."""
    if not (recipe.exact and check):
        return None
    inputs = example if example is not None else make_up_inputs(model)
    return None if inputs is None else (eval_output(model, inputs), inputs)


def _trial(model: nn.Module, plan: Plan, example: Inputs | None) -> Inputs | None:
    """Return inputs on which the converted model must run, if part of the model could not be traced; else None.

    What such a part asks a norm for, nothing else may tell (Note [Reads in the code]).
    """
    if not any(skip.what == "scope" for skip in plan.skips):
        return None
    return example if example is not None else make_up_inputs(model)


def _refuse_broken(model: nn.Module, inputs: Inputs) -> None:
    try:
        eval_output(model, inputs)
    except Exception as cause:
        raise VerificationError(
            f"the original runs and the converted model does not: {type(cause).__name__}: {cause}",
            code="does-not-run",
            hint="its forward asks a norm for what a new one does not have: leave that norm out (exclude=['NAME'])",
        ) from cause


def _self_check(model: nn.Module, reference: tuple[Any, Inputs] | None) -> Verification | None:
    """Compare the converted model with the original's output; raises where an exact recipe moved it."""
    if reference is None:
        return None
    expected, inputs = reference
    result = keeps_output(expected, model, inputs)
    if result is not None and not result.ok:
        raise VerificationError(
            f"the converted model's output moved by {result.max_rel:.1e} of its size; an exact recipe must keep it",
            code="self-check",
            hint="report this model; check=False converts it nevertheless",
        )
    return result
