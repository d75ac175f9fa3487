"""A plan bound to a model: each norm's values and each site's parts, derived once and carried along."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from normswap.errors import InitializationError
from normswap.graph.after_norm import after_norm
from normswap.nn import FilterLayout
from normswap.nn.kinds import class_of, is_layer
from normswap.nn.readers import input_channels, is_reader, why_no_affine
from normswap.norms import Bias, Norm, NormState, Takes, is_convertible, norm_of
from normswap.norms.functional import FunctionalNorm
from normswap.recipes import Recipe
from normswap.records import NormKind, Plan, Site, Step
from normswap.runs.watching import Statistics
from normswap.stages.forwards import find_functional_norms
from normswap.stages.misfits import misfit, submodule
from normswap.stages.recurrent import BoundRecurrent, bind_recurrent
from normswap.weights import PlainWeight, Weight

__all__ = ["BoundPlan", "BoundStep", "NormSource", "bind"]


@dataclass(frozen=True)
class NormSource:
    """A norm as it was found in a model.

    Args:
        state: Its values; the tensors are the model's own.
        after: What its class does after normalizing: modules, by their names within the norm where they are its
            submodules.
        call: Where it is a call of ``batch_norm``, that call.
    """

    state: NormState
    after: tuple[tuple[str | None, nn.Module], ...] = ()
    call: FunctionalNorm | None = None

    @classmethod
    def of(cls, module: nn.Module, after: tuple[nn.Module, ...]) -> NormSource:
        """Return the source that ``module``, a norm that converts, is."""
        norm = norm_of(module)
        assert norm is not None
        names = {id(child): name for name, child in module.named_modules()}
        return cls(norm.read(module), tuple((names.get(id(one)), one) for one in after))

    def after_in(self, module: nn.Module | None) -> tuple[nn.Module, ...]:
        """Return the modules that come after, those of a copy of the norm where they are its submodules."""
        return tuple(
            copy.deepcopy(one) if name is None or module is None else module.get_submodule(name)
            for name, one in self.after
        )


@dataclass(frozen=True)
class BoundStep:
    """One step of a plan with its parts.

    Args:
        step: The step.
        weight: The form that the layer's weight gets.
        norm: What takes the norm's place.
        source: The norm that stands there.
        recipe: The recipe that is used there.
    """

    step: Step
    weight: Weight
    norm: Norm
    source: NormSource
    recipe: Recipe

    @property
    def site(self) -> Site:
        """The step's site."""
        return self.step.site

    @property
    def state(self) -> NormState:
        """The values of the norm that stands there."""
        return self.source.state

    @property
    def measured_by_fit(self) -> bool:
        """Whether a fit takes the values up anew, once it is known what reaches the layer and the norm."""
        return self.norm.is_fitted and self.norm.takes is not Takes.AFFINE

    @property
    def held_rank(self) -> int | None:
        """The number of axes that inputs are held to, as what a layer takes up is right for no other; None for any.

        See Note [Ranks that an example decided] in :mod:`normswap.nn.rank_check`.
        """
        absorbed = self.step.taken_up_by is not None
        same_function = self.norm.bias is Bias.KEPT and not self.weight.centres
        return self.site.rank if self.site.rank_by_example and absorbed and not same_function else None

    @classmethod
    def at(cls, site: Site, recipe: Recipe, groups: int | None, source: NormSource) -> BoundStep:
        """Return what ``recipe`` does at ``site`` with so many groups, None where its norm has none."""
        weight, norm = _weight(recipe, site), recipe.norm(site, groups)
        words = str(norm) if groups is None else f"{norm} of {site.num_features // groups}"
        forward = site.layer is None and norm.leaves_nothing and not source.after
        reader = site.readers[0] if forward and site.readers else None
        notes = recipe.notes(site)
        if reader is not None:
            notes += (f"goes into {reader}, which reads it",)
        elif forward and site.unread is not None:
            notes += (site.unread,)
        if site.looked_up_by and not (norm.is_batch_norm and (site.layer or norm.bias is Bias.KEPT)):
            notes += (f"{', '.join(site.looked_up_by)} will not find it as a BatchNorm",)
        found = cls(Step(site, weight.name, words, groups, notes, reader, recipe.name), weight, norm, source, recipe)
        if found.held_rank is None:
            return found
        notes += (f"takes inputs of {found.held_rank} axes alone, as the example inputs have",)
        return dataclasses.replace(found, step=dataclasses.replace(found.step, notes=notes))

    def without_reader(self) -> BoundStep:
        """Return the same with a per-channel affine of its own in place of the layer behind the norm."""
        return dataclasses.replace(self, step=dataclasses.replace(self.step, reader=None, notes=()))

    def with_state(self, state: NormState) -> BoundStep:
        """Return the same at a norm of other values."""
        return dataclasses.replace(self, source=dataclasses.replace(self.source, state=state))


@dataclass(frozen=True)
class BoundPlan:
    """A plan, its recipe, and what both come to at each site; ``plan`` is the part of it that is JSON.

    Args:
        plan: The plan.
        recipe: Its recipe, which may be made of several.
        steps: Its steps, in the plan's order.
        recurrent: Its steps for recurrent layers.
    """

    plan: Plan
    recipe: Recipe
    steps: tuple[BoundStep, ...]
    recurrent: tuple[BoundRecurrent, ...] = ()

    @property
    def modules(self) -> tuple[BoundStep, ...]:
        """The steps whose norm is a submodule."""
        return tuple(step for step in self.steps if step.site.kind == NormKind.MODULE)

    @property
    def exact(self) -> bool:
        """Whether every site, and every recurrent layer, has a recipe that is exact."""
        return all(one.recipe.exact for one in self.steps) and all(one.recipe.exact for one in self.recurrent)

    def with_statistics(self, measured: Mapping[str, Statistics]) -> BoundPlan:
        """Return the plan with statistics that were measured at norms which store none, by fqn.

        Raises:
            InitializationError: A norm stores none, and none were measured.
        """
        steps = []
        for step in self.steps:
            name = step.site.norm
            if (found := measured.get(name)) is not None:
                step = step.with_state(dataclasses.replace(step.state, mean=found.mean, var=found.var))
            elif step.state.mean is None:
                raise InitializationError(
                    f"the calibration data never reaches '{name}', which stores no statistics",
                    code="no-statistics",
                    hint="exclude it, or give data that reaches it",
                )
            steps.append(step)
        return dataclasses.replace(self, steps=tuple(steps))

    def with_scales(self, scales: Mapping[str, Tensor]) -> BoundPlan:
        """Return the plan for the model in which the channels that norms give were scaled, by fqn."""
        return dataclasses.replace(
            self,
            steps=tuple(
                step.with_state(step.state.scaled(scales[step.site.norm])) if step.site.norm in scales else step
                for step in self.steps
            ),
        )

    def with_groups(self, counts: Mapping[str, int]) -> BoundPlan:
        """Return the plan with other group counts, by fqn."""
        steps = tuple(
            BoundStep.at(step.site, step.recipe, counts[step.site.norm], step.source)
            if step.site.norm in counts
            else step
            for step in self.steps
        )
        plan = dataclasses.replace(self.plan, steps=tuple(step.step for step in steps))
        return dataclasses.replace(self, plan=plan, steps=steps)


def _weight(recipe: Recipe, site: Site) -> Weight:
    """Return the form of the weight of the site's layer, or of the affine that stands in front of the norm."""
    return PlainWeight() if site.layer is None else recipe.weight(site)


def bind(plan: Plan, recipe: Recipe, model: nn.Module) -> BoundPlan:
    """Return a plan that was made before, bound to ``model``, which is only read.

    Raises:
        PlanError: The plan was made for another architecture.
    """
    calls: dict[str, dict[str, FunctionalNorm]] = {}
    steps = []
    for step in plan.steps:
        source = _source(plan, step.site, model, calls)
        if step.site.num_features != source.state.num_features:
            what = (
                f"'{step.site.norm}' has {source.state.num_features} channels, the plan says {step.site.num_features}"
            )
            raise misfit(plan, what)
        for alias in step.site.aliases:
            submodule(model, alias.rpartition(".")[0], plan)
        _refuse_unfit_layers(plan, step, model)
        steps.append(_bound(plan, step, source, recipe))
    return BoundPlan(plan, recipe, tuple(steps), bind_recurrent(plan, model))


def _bound(plan: Plan, step: Step, source: NormSource, recipe: Recipe) -> BoundStep:
    chosen = recipe.at(step.site)
    if chosen is None:
        raise misfit(plan, f"its recipe has none for '{step.site.norm}'")
    return BoundStep(step, _weight(chosen, step.site), chosen.norm(step.site, step.num_groups), source, chosen)


def _refuse_unfit_layers(plan: Plan, step: Step, model: nn.Module) -> None:
    """Raise PlanError where the layer of a step, or the one that reads its norm, cannot take the norm up."""
    channels = step.site.num_features
    if step.site.layer is not None:
        layer = submodule(model, step.site.layer, plan)
        if reason := _why_no_weight(step.site.layer, layer, is_layer(layer)):
            raise misfit(plan, reason)
        own = FilterLayout.of(layer).out_channels(FilterLayout.weight(layer))
        if own != channels:
            raise misfit(plan, f"'{step.site.layer}' has {own} output channels and the norm {channels}")
    if step.reader is not None:
        reader = submodule(model, step.reader, plan)
        if reason := _why_no_weight(step.reader, reader, is_reader(reader)):
            raise misfit(plan, reason)
        own = input_channels(reader)
        if own != channels:
            raise misfit(plan, f"'{step.reader}' has {own} input channels and the norm {channels}")
        if reason := why_no_affine(reader):
            raise misfit(plan, f"'{step.reader}', which reads '{step.site.norm}', cannot take it up: {reason}")


def _why_no_weight(fqn: str, module: nn.Module, is_known: bool) -> str | None:
    """Return why ``module`` has no plain weight that could take a norm up, None where it has one."""
    if not is_known:
        return f"'{fqn}' is a {class_of(module).__name__}, which has no weight to take the norm up"
    if parametrize.is_parametrized(module):
        return f"the weight of '{fqn}' is already parametrized"
    if any(is_lazy(p) for p in module._parameters.values() if p is not None):
        return f"'{fqn}' is not initialized yet: run the model once"
    return None


def _source(plan: Plan, site: Site, model: nn.Module, calls: dict[str, dict[str, FunctionalNorm]]) -> NormSource:
    owner, _, name = site.norm.partition(":")
    if site.kind == NormKind.MODULE:
        module = submodule(model, owner, plan)
        if not is_convertible(module):
            raise misfit(plan, f"'{owner}' is a {type(module).__name__} and no BatchNorm")
        after = after_norm(module)
        if isinstance(after, str):
            raise misfit(plan, after)
        return NormSource.of(module, after)
    if not name:  # the tensors lie in a child that is a BatchNorm
        owner, _, name = owner.rpartition(".")
    holder = submodule(model, owner, plan)
    if owner not in calls:
        calls[owner] = find_functional_norms(holder)
    if name not in calls[owner]:
        raise misfit(plan, f"the forward of '{owner}' calls no norm with '{name}'")
    call = calls[owner][name]
    return NormSource(call.read(holder, frozen=site.frozen), call=call)
