"""The pipeline: capture, find sites, plan, rewrite, initialize, check. Each stage is a module of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, cast

from torch import nn
from typing_extensions import TypeVar

from normswap.checks.conversion import Promise, refuse_unfit
from normswap.checks.verification import Verification
from normswap.choosing import choose
from normswap.errors import InputError, argument
from normswap.graph import capture
from normswap.graph.dataflow import Dataflow
from normswap.graph.records import refuse_wrappers
from normswap.initialization.base import Progress, initializer_for
from normswap.initialization.equalization import EQUALIZED
from normswap.options import check_callable
from normswap.preparation import asked, data_chooses_groups, planned, prepared, recurrent_of
from normswap.recipes import Auto, To
from normswap.records import Choice, InitReport, Plan
from normswap.runs.data import Data
from normswap.runs.equal_models import make_equal
from normswap.runs.processes import together
from normswap.runs.wrappers import unwrapped
from normswap.stages.moves import Recording
from normswap.stages.opened import opened
from normswap.stages.rewriting import rewrite, take_values, target_for
from normswap.storage.origin import Origin, remember, skeleton_of
from normswap.training.held import notes_on_optimizers

__all__ = ["Conversion", "convert", "plan", "swap_norms"]

Model = TypeVar("Model", bound=nn.Module, default=nn.Module)


@dataclass(frozen=True, repr=False)
class Conversion(Generic[Model]):
    """What a conversion gave; prints as its plan and how the new parts got their values.

    Args:
        model: The converted model.
        plan: What was done.
        init: How the new parts got their values.
        check: For an exact recipe, the comparison of both models' outputs; None where there were no inputs for it.
        exact: Whether every site has a recipe that is exact.
        choice: With ``to="auto"``, what each recipe would do at each site, and which was chosen.
    """

    model: Model
    plan: Plan
    init: InitReport
    check: Verification | None
    exact: bool = False
    choice: Choice | None = None

    def __repr__(self) -> str:
        return f"<Conversion of {self.plan.model} to {self.plan.recipe}: {self.plan.summary()}>"

    def __str__(self) -> str:
        check = [] if self.check is None else [str(self.check)]
        choice = [] if self.choice is None else [str(self.choice)]
        return "\n\n".join([*choice, str(self.plan), str(self.init), *check])

    @property
    def heads(self) -> tuple[str, ...]:
        """The layers without a norm that were fitted because what they give is the model's output."""
        norms = {step.site.norm for step in self.plan.steps}
        return tuple(row.name for row in self.init.rows if row.fit is not None and row.name not in norms)


def swap_norms(model: Model, to: To = "gn+ws", **options: Any) -> Model:
    """Return ``model`` with its BatchNorms swapped for the recipe ``to``; what it has learnt is kept.

    The arguments are those of :func:`convert`, which also returns the plan and the reports.
    """
    return convert(model, to, **options).model


def plan(
    model: nn.Module, to: To = "gn+ws", *, example_inputs: Any = None, calibration: Any = None, **options: Any
) -> Plan:
    """Return what :func:`convert` would do; the model is only read, and may be on the meta device.

    The arguments are those of :func:`convert`.
    """
    recipe, chosen = asked(to, None, options, has_data=calibration is not None)
    if isinstance(recipe, Auto):
        raise InputError(
            f"{argument('to', 'auto')} chooses by fitting each recipe to the calibration data, which a plan does not",
            code="plan-auto",
            hint="plan(model, choose_recipes(model, calibration=...).to) plans what it chooses",
        )
    model, _ = unwrapped(model)
    data = Data.to_plan(model, example_inputs, calibration)
    refuse_wrappers(model)
    with opened(model):
        return planned(Dataflow(capture(model, data.example)), recipe, chosen, data).plan


def convert(
    model: Model,
    to: To = "gn+ws",
    *,
    example_inputs: Any = None,
    calibration: Any = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    plan: Plan | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Conversion[Model]:
    """Swap a model's BatchNorms for another normalization.

    Args:
        model: The model; left as it is unless ``inplace``. Of a ``torch.optim.swa_utils.AveragedModel`` its module is
            converted and returned.
        to: A recipe's name, or a recipe; or a mapping that gives each norm the recipe of the first glob that matches
            its name, and leaves those that none matches or that have None: ``{"stem.*": "gn+aws", "*": "gn+ws"}``.
            The options of recipes go to those that have them; ``{"recipe": "gn+ws", "num_groups": 1}`` in place of a
            name gives a recipe some of its own. None leaves all norms, for a conversion of recurrent layers alone.
            ``"auto"`` gives each norm the recipe that changes the output least on the calibration data
            (:func:`choose_recipes`).
        example_inputs: Inputs of the model: a tensor, a tuple, or a dict by keyword. They decide what the graph leaves
            open (ranks, hidden consumers) and serve the check of exact recipes. Default: the first calibration samples.
        calibration: Unlabelled data: a tensor, tuple or dict of inputs, or an iterable of those, such as a DataLoader.
            Entries that ``forward`` does not require (labels) are left out. Closed forms use the first 1000 samples.
        forward_fn: Called as ``forward_fn(model, batch)`` for each batch of ``calibration``, for data that the rule
            above does not fit.
        plan: A plan to replay instead of making one.
        progress: Called by a match and by tuning with what is done, how much of it is, and how much there is.
        **options: The options of every conversion (:class:`normswap.options.Options`: ``include``, ``exclude``,
            ``init``, ``scale``, ``spread``, ``tune_steps``, ``check``, ``inplace``, ``processes``) and those of the
            recipe (``num_groups`` and others).

    Returns:
        The converted model with its plan and reports.

    Raises:
        NothingToConvertError: No norm of the model can be converted.
        VerificationError: An exact recipe moved the output.
        InputError: An argument does not fit.
    """
    check_callable("progress", progress)
    has_data = calibration is not None
    recipe, chosen = asked(to, plan, options, has_data=has_data)
    recurrent = recurrent_of(chosen, plan)
    initializer = initializer_for(chosen.init, recipe, has_data, recurrent)
    choose_groups = data_chooses_groups(recipe, plan, initializer)
    model, notes = cast("tuple[Model, tuple[str, ...]]", unwrapped(model))
    refuse_wrappers(model)
    refuse_unfit(model)
    with together(chosen.processes and has_data):
        data = Data.of(model, example_inputs, calibration, forward_fn)
        recipe, choice = choose(model, recipe, chosen, data, progress) if isinstance(recipe, Auto) else (recipe, None)
        initializer = initializer_for(chosen.init, recipe, has_data, recurrent)
        skeleton = skeleton_of(model)
        with opened(model) as norms:
            work = prepared(model, recipe, chosen, data, plan, initializer=initializer)
            exact = work.bound.exact and initializer.keeps_function
            promise = Promise.of(model, work.bound.plan, data.example, exact=exact) if chosen.check else Promise()
            target = target_for(model, work.source, inplace=chosen.inplace, apart=initializer.fits)
            source = work.source if initializer.fits else target  # a site's values are asked for before it is changed
            work = dataclasses.replace(work, source=source, choose_groups=choose_groups, progress=progress)
            recording = Recording(model, work.source, target, work.bound, work.factors)
            with work.scaling():
                method = initializer(work)
            placed = rewrite(target, work.bound, recording.noting(method.values))
            outcome = method.refine(target, placed)
            make_equal(target)
            moves = recording.moves(target, placed, outcome.rows)
            bound = work.bound.with_groups(outcome.groups)
            if chosen.inplace and target is not model:
                rewrite(model, bound)
                take_values(model, target)
                target = model
            norms.close(target)
        remember(target, Origin(bound.plan, recipe, skeleton, moves))
        check = promise.keep(target)

    scaled = (EQUALIZED,) if work.factors else ()
    report = InitReport(
        method.name,
        (*outcome.rows, *(one.row for one in bound.recurrent)),
        (*notes, *data.notes, *scaled, *outcome.notes, *notes_on_optimizers(target)),
        outcome.agreement,
    )
    return Conversion(cast(Model, target), bound.plan, report, check, bound.exact, choice)
