"""Rewrite: put a plan's modules into a model, and write values into them.

The user's classes stay: submodules are swapped in the module tree. Only a module whose own forward calls a norm
functionally gets a rewritten forward, in a subclass of its class (:mod:`normswap.stages.forwards`).
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normswap.errors import InputError, argument
from normswap.nn import ChannelAffine, FilterLayout, RankCheck
from normswap.nn.kinds import is_layer
from normswap.norms import Assignment, Bias, Takes, apply, tensor_in
from normswap.records import NormKind, Plan
from normswap.runs.guard import copy_of
from normswap.stages.bound import BoundPlan, BoundStep
from normswap.stages.forwards import replace_functional_norms
from normswap.stages.misfits import submodule
from normswap.stages.recurrent import carry_out
from normswap.stages.references import exchange

__all__ = ["Placed", "rewrite", "take_values", "target_for"]


@dataclass(frozen=True)
class Placed:
    """What one step put into the model.

    Args:
        bound: The step.
        layer: The layer that takes the statistics up, None where none does.
        reader: The layer behind the norm that takes it up, where that does.
        affine: The per-channel affine in front of the norm, where no layer takes it up.
        front: What else the norm has in front of it.
        norm: The new norm, or the old one where it stays; None where there is none.
        kept: The tensors of a norm that is a call and stays, by the names that they have in a BatchNorm.
    """

    bound: BoundStep
    layer: nn.Module | None
    reader: nn.Module | None
    affine: ChannelAffine | None
    norm: nn.Module | None
    kept: Mapping[str, Tensor]
    front: nn.Module | None = None

    @property
    def name(self) -> str:
        """The site's name."""
        return self.bound.site.norm

    @property
    def source(self) -> nn.Module | None:
        """The module whose filters give the norm its channels: the layer or the affine."""
        return self.layer if self.layer is not None else self.affine

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """The modules that the step has touched."""
        all_parts = (self.layer, self.reader, self.affine, self.front, self.norm)
        return tuple(part for part in all_parts if part is not None)

    def tensor(self, name: str) -> Tensor:
        """Return the tensor that an assignment calls ``layer.…``, or of another part by that part's name."""
        part, _, rest = name.partition(".")
        if part == "norm" and rest in self.kept:
            return self.kept[rest]
        module: nn.Module | None = getattr(self, part)
        assert module is not None, f"nothing was placed that has a tensor {name}"
        return tensor_in(module, rest)


def rewrite(
    model: nn.Module, bound: BoundPlan, values: Callable[[BoundStep], Assignment] | None = None
) -> tuple[Placed, ...]:
    """Carry a plan out on ``model``, in place.

    The new parts have the dtype, device, train/eval mode, ``requires_grad`` and forward hooks of what they replace.

    Args:
        model: The model that the plan was bound to, or a copy of it.
        bound: The plan.
        values: Gives the values of a step's new parts; it is asked before the step changes anything. Without it the
            new parts are as torch starts them.

    Raises:
        PlanError: The model is of another architecture.
    """
    plan = bound.plan
    placed: list[Placed] = []
    functional: dict[str, list[tuple[BoundStep, nn.Module]]] = defaultdict(list)
    replaced: dict[int, tuple[nn.Module, nn.Module]] = {}  # by the old norm's id, which it keeps while it is held here
    for step in bound.steps:
        assignment = {} if values is None else values(step)
        one = _place(model, plan, step)
        apply(assignment, one.tensor)
        placed.append(one)
        site = step.site
        if step.norm.bias is Bias.KEPT:
            if step.held_rank is not None and one.norm is not None:
                chain = _chain(one, ()).train(one.norm.training)
                replaced[id(one.norm)] = one.norm, chain
                _put(model, plan, step, chain)
        elif site.kind == NormKind.MODULE:
            old = submodule(model, site.norm, plan)
            replacement = _chain(one, step.source.after_in(old))
            _carry_over(old, replacement)
            replaced[id(old)] = old, replacement
            _put(model, plan, step, replacement)
        else:
            owner = _owner(step)
            replacement = _chain(one, step.source.after_in(None))
            replacement.train(submodule(model, owner, plan).training)
            functional[owner].append((step, replacement))
    for owner, replacements in functional.items():
        calls = {step.source.call.name: step.source.call for step, _ in replacements if step.source.call is not None}
        new = {step.source.call.name: module for step, module in replacements if step.source.call is not None}
        replace_functional_norms(submodule(model, owner, plan), new, calls)
    exchange(model, {key: new for key, (_, new) in replaced.items()})
    for recurrent in bound.recurrent:  # after the norms: one that a recurrent layer takes up goes into plain matrices
        carry_out(model, plan, recurrent)
    return tuple(placed)


def _put(model: nn.Module, plan: Plan, step: BoundStep, new: nn.Module) -> None:
    """Put ``new`` into the place of a step's norm, under each of its names."""
    for name in (step.site.norm, *step.site.aliases):
        parent, _, child = name.rpartition(".")
        submodule(model, parent, plan)._modules[child] = new


def _owner(step: BoundStep) -> str:
    """Return the fqn of the module whose forward calls a step's functional norm."""
    owner, _, name = step.site.norm.partition(":")
    return owner if name else owner.rpartition(".")[0]


def _place(model: nn.Module, plan: Plan, step: BoundStep) -> Placed:
    """Change the layer of one step, and make what goes into the norm's place; the norm itself is still there."""
    site, state = step.site, step.state
    stays = step.norm.bias is Bias.KEPT
    layer: nn.Module | None = None
    reader: nn.Module | None = None
    affine: ChannelAffine | None = None
    if site.layer is not None:
        layer = submodule(model, site.layer, plan)
        _prepare_bias(layer, step.norm.bias)
        step.weight.register(layer)
        if "parametrizations" in layer._modules:
            layer.get_submodule("parametrizations").train(layer.training)
    elif step.step.reader is not None:
        reader = submodule(model, step.step.reader, plan)
        if is_layer(reader):
            _prepare_bias(reader, step.norm.bias)
    elif step.norm.takes is not Takes.NOTHING:
        affine = ChannelAffine(
            state.num_features,
            site.rank,
            rank_by_example=site.rank_by_example,
            device=state.gamma.device,
            dtype=state.gamma.dtype,
        )
    if stays:
        owner = submodule(model, _owner(step), plan) if step.source.call is not None else None
        kept = {} if owner is None or step.source.call is None else step.source.call.tensors_of(owner)
        norm = submodule(model, site.norm, plan) if step.source.call is None else None
        return Placed(step, layer, reader, affine, norm, kept)
    new, front = step.norm.build(site, state.gamma), step.norm.in_front(site, state.gamma)
    for part in (affine, new):
        if part is not None and not state.trainable:
            part.requires_grad_(False)
    return Placed(step, layer, reader, affine, new, {}, front)


def _prepare_bias(layer: nn.Module, bias: Bias) -> None:
    weight = FilterLayout.weight(layer)
    if bias is Bias.REMOVED:
        layer.register_parameter("bias", None)
    elif bias is Bias.SET and layer._parameters["bias"] is None:
        zeros = weight.new_zeros(FilterLayout.of(layer).out_channels(weight))
        layer.register_parameter("bias", nn.Parameter(zeros, requires_grad=weight.requires_grad))


def _chain(placed: Placed, after: tuple[nn.Module, ...]) -> nn.Module:
    rank = placed.bound.held_rank
    named: list[tuple[str, nn.Module | None]] = [("rank", None if rank is None else RankCheck(rank))]
    named += [("affine", placed.affine), ("front", placed.front), ("norm", placed.norm)]
    named += [(f"after{i}" if i else "after", module) for i, module in enumerate(after)]
    parts = OrderedDict((name, module) for name, module in named if module is not None)
    if not parts:
        return nn.Identity()
    return next(iter(parts.values())) if len(parts) == 1 and not after else nn.Sequential(parts)


def target_for(model: nn.Module, source: nn.Module, *, inplace: bool, apart: bool) -> nn.Module:
    """Return the model to rewrite: ``model`` itself or a copy, and where the original must stay beside it, a copy.

    A source that is a copy already is rewritten itself.
    """
    if inplace and not apart:
        return model
    if source is not model and not apart:
        return source
    try:
        return copy_of(source)
    except Exception as cause:
        raise InputError(
            f"the model cannot be copied: {type(cause).__name__}: {cause}",
            code="not-copyable",
            hint=f"convert it in place ({argument('inplace', True)}), after saving its state dict",
        ) from cause


def take_values(model: nn.Module, source: nn.Module) -> None:
    """Give ``model`` the values of ``source``, a model of the same structure; a state dict may be a user's own."""
    with torch.no_grad():
        for tensors in ((model.parameters(), source.parameters()), (model.buffers(), source.buffers())):
            for mine, found in zip(*tensors, strict=True):
                mine.copy_(found)


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
