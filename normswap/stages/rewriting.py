"""Rewrite: put a plan's modules into a model. Structure only; values come with initialization.

The user's classes stay: submodules are swapped in the module tree. Only a module whose own forward calls a norm
functionally gets a rewritten forward, in a subclass of its class (:mod:`normswap.stages.forwards`).
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass

from torch import Tensor, nn

from normswap.errors import PlanError
from normswap.graph.after_norm import BatchNormState, after_norm, read_batch_norm
from normswap.graph.functional import FunctionalNorm
from normswap.graph.ops import is_norm
from normswap.nn import ChannelAffine, FilterLayout
from normswap.recipes import Recipe
from normswap.recipes.parts import Bias, NormPart, WeightPart
from normswap.records import NormKind, Plan, Step
from normswap.stages.forwards import find_functional_norms, replace_functional_norms

__all__ = ["Placed", "rewrite"]


@dataclass(frozen=True)
class Placed:
    """What one step put into the model, and what was there before.

    Args:
        step: The step.
        state: The BatchNorm's values; its tensors are the original's own.
        layer: The layer that takes the statistics up, None where none does.
        weight: The layer's weight before the step.
        bias: The layer's bias before the step.
        weight_part: The layer's parametrization.
        norm_part: What the norm was replaced with.
        affine: The per-channel affine in front of the norm, where there is no layer.
        norm: The new norm, or the old one where it stays; None where there is none.
    """

    step: Step
    state: BatchNormState
    layer: nn.Module | None
    weight: Tensor | None
    bias: Tensor | None
    weight_part: WeightPart | None
    norm_part: NormPart
    affine: ChannelAffine | None
    norm: nn.Module | None


def rewrite(model: nn.Module, plan: Plan, recipe: Recipe) -> tuple[Placed, ...]:
    """Carry ``plan`` out on ``model``, in place.

    The new parts have the dtype, device, train/eval mode, ``requires_grad`` and forward hooks of what they replace.

    Raises:
        PlanError: The plan was made for another architecture.
    """
    _refuse_distributed(model)
    placed: list[Placed] = []
    functional: dict[str, list[tuple[str, nn.Module]]] = defaultdict(list)
    found: dict[str, dict[str, FunctionalNorm]] = {}
    for step in plan.steps:
        site = step.site
        owner, _, name = site.norm.partition(":")
        if site.kind == NormKind.MODULE:
            old = _submodule(model, owner, plan)
            if not is_norm(old):
                raise _misfit(plan, f"'{owner}' is a {type(old).__name__} and no BatchNorm")
            state, after = read_batch_norm(old), after_norm(old)
            if isinstance(after, str):
                raise _misfit(plan, after)
        else:
            if not name:  # the tensors lie in a child that is a BatchNorm
                owner, _, name = owner.rpartition(".")
            if owner not in found:
                found[owner] = find_functional_norms(_submodule(model, owner, plan))
            if name not in found[owner]:
                raise _misfit(plan, f"the forward of '{owner}' calls no norm with '{name}'")
            state = found[owner][name].state(_submodule(model, owner, plan), frozen=site.frozen)
            old, after = None, ()
        one, replacement = _place(model, plan, step, recipe, state, old, after)
        placed.append(one)
        if replacement is None:
            continue
        if old is not None:
            _carry_over(old, replacement)
            for alias in (site.norm, *site.aliases):
                parent, _, child = alias.rpartition(".")
                _submodule(model, parent, plan)._modules[child] = replacement
        else:
            replacement.train(_submodule(model, owner, plan).training)
            functional[owner].append((name, replacement))
    for owner, replacements in functional.items():
        replace_functional_norms(_submodule(model, owner, plan), dict(replacements), found[owner])
    return tuple(placed)


def _place(
    model: nn.Module,
    plan: Plan,
    step: Step,
    recipe: Recipe,
    state: BatchNormState,
    old: nn.Module | None,
    after: tuple[nn.Module, ...],
) -> tuple[Placed, nn.Module | None]:
    """Change the layer of one step, and return what goes into the norm's place (None: the norm stays)."""
    site = step.site
    if site.num_features != state.num_features:
        raise _misfit(plan, f"'{site.norm}' has {state.num_features} channels, the plan says {site.num_features}")
    norm_part = recipe.norm(site, step.num_groups)
    layer, weight, bias, weight_part, affine = None, None, None, None, None
    if site.layer is not None:
        layer = _submodule(model, site.layer, plan)
        weight = FilterLayout.weight(layer).detach()
        bias = None if layer._parameters["bias"] is None else layer._parameters["bias"].detach()
        _prepare_bias(layer, norm_part.bias)
        weight_part = recipe.weight(site)
        if weight_part is not None:
            weight_part.register(layer)
            layer.get_submodule("parametrizations").train(layer.training)
    elif norm_part.bias is not Bias.KEPT:
        affine = ChannelAffine(state.num_features, site.rank, device=state.gamma.device, dtype=state.gamma.dtype)
    norm = old if norm_part.bias is Bias.KEPT else norm_part.build(site, state.gamma)
    one = Placed(step, state, layer, weight, bias, weight_part, norm_part, affine, norm)
    if norm_part.bias is Bias.KEPT:
        return one, None
    for part in (affine, norm):
        if part is not None and not state.trainable:
            part.requires_grad_(False)
    return one, _chain(affine, norm, after)


def _prepare_bias(layer: nn.Module, bias: Bias) -> None:
    weight = FilterLayout.weight(layer)
    if bias is Bias.REMOVED:
        layer.register_parameter("bias", None)
    elif bias is Bias.SET and layer._parameters["bias"] is None:
        zeros = weight.new_zeros(FilterLayout.of(layer).out_channels(weight))
        layer.register_parameter("bias", nn.Parameter(zeros, requires_grad=weight.requires_grad))


def _chain(affine: nn.Module | None, norm: nn.Module | None, after: tuple[nn.Module, ...]) -> nn.Module:
    named = [("affine", affine), ("norm", norm)]
    named += [(f"after{i}" if i else "after", module) for i, module in enumerate(after)]
    parts = OrderedDict((name, module) for name, module in named if module is not None)
    if not parts:
        return nn.Identity()
    return next(iter(parts.values())) if len(parts) == 1 and not after else nn.Sequential(parts)


_NORM_FIELDS = {*vars(nn.SyncBatchNorm(1)), "training"}


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the mode of ``old``, its forward and backward hooks, and the attributes that its user has set."""
    own = set(map(id, old.modules()))
    for module in new.modules():
        if id(module) not in own:
            module.training = old.training
    for name, value in vars(old).items():
        if name.endswith(
            ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
        ) or name.startswith(("_forward_hooks_", "_forward_pre_hooks_")):
            vars(new)[name].update(value)
        elif name not in _NORM_FIELDS and name not in vars(new):
            vars(new)[name] = value


def _refuse_distributed(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise PlanError(
                f"the parameter '{name}' is sharded (a DTensor)",
                code="sharded-model",
                hint="convert first, shard afterwards",
            )


def _submodule(model: nn.Module, fqn: str, plan: Plan) -> nn.Module:
    try:
        return model.get_submodule(fqn)
    except AttributeError:
        raise _misfit(plan, f"the model has no module '{fqn}'") from None


def _misfit(plan: Plan, what: str) -> PlanError:
    return PlanError(
        f"the plan, made for a {plan.model}, does not fit this model: {what}",
        code="plan-does-not-fit",
        hint="replay a plan on a model of the same architecture, or make a new plan",
    )
