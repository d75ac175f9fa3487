"""Give a converted model's values back to the BatchNorms that were there; exact recipes alone.

With W' and c' the weight and the whole bias that the converted layer has in evaluation, a BatchNorm behind ``W·u + b``
is the same function where ``γ/σ·W = W'`` and ``β + γ (b − μ)/σ = c'``. One equation for several unknowns: σ, b and,
without a mean-only norm, μ are the old ones, which the conversion remembers, and

- under weight normalization ``W = v`` and ``γ = g σ/‖v‖``, signs included;
- else γ is the old one, and ``W = W' σ/γ``, 1 where the old one is 0;
- a mean-only norm's running mean m gives ``μ = b + m σ/γ``, as it did when BatchNorm's gave it;
- β is what is left.

A norm that has all of a BatchNorm's values gives them back as they are, with b added to the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import InputError
from normswap.nn import FilterLayout
from normswap.nn.readers import fused_inputs
from normswap.norms import Affine, Bias, NormState, deployed, is_convertible, norm_of
from normswap.stages.bound import BoundStep, bind
from normswap.stages.moves import old_tensors
from normswap.stages.opened import opened
from normswap.storage.origin import Origin
from normswap.weights import WeightNorm

__all__ = ["restored"]


class _Old:
    """The old tensors of one step: their names, what is remembered of them, and what they become."""

    def __init__(
        self, skeleton: nn.Module, known: Mapping[int, str], step: BoundStep, before: Mapping[str, Tensor]
    ) -> None:
        self.names = {part: known[id(t)] for part, t in old_tensors(skeleton, step).items() if id(t) in known}
        self.before, self.step = before, step
        self.new: dict[str, Tensor] = {}

    def get(self, part: str, default: float) -> Tensor:
        """Return a remembered value per channel, ``default`` where there is none. ``(C,)`` float64"""
        name = self.names.get(part)
        if name is not None and name in self.before:
            return self.before[name].double().cpu()
        return torch.full((self.step.site.num_features,), default, dtype=torch.float64)

    def set(self, part: str, value: Tensor) -> None:
        """Give an old tensor its value, where there was one."""
        if part in self.names:
            self.new[self.names[part]] = value


def restored(model: nn.Module, origin: Origin) -> tuple[dict[str, Any], list[str]]:
    """Return the state dict of ``origin``'s skeleton that is the same function as ``model``, and notes.

    Raises:
        InputError: A norm without γ and β cannot compute what was trained in its place.
    """
    skeleton = origin.skeleton
    assert skeleton is not None
    current = dict(model.state_dict())
    state: dict[str, Any] = {name: current.get(name) for name in skeleton.state_dict(keep_vars=True)}
    before = {} if origin.moves is None else origin.moves.before
    notes = [] if before else ["the old statistics are not remembered: μ = 0 and σ = 1 stand for them"]
    given: dict[str, Tensor] = {}
    known = {id(t): name for name, t in (*skeleton.named_buffers(), *skeleton.named_parameters())}
    with opened(skeleton):
        bound = bind(origin.plan, origin.recipe, skeleton)
        found = [(step, _Old(skeleton, known, step, before)) for step in bound.steps]
    for recurrent in bound.recurrent:
        module, name = model.get_submodule(recurrent.site.name), recurrent.site.name
        answer = deployed(module)
        of_torch = answer if isinstance(answer, nn.Module) else None
        if of_torch is not None and not recurrent.site.bias:
            raise InputError(
                f"'{name}' had no biases, which its statistics have become since",
                code="not-representable",
                hint="go on with the converted model",
            )
        names = recurrent.matrices if of_torch is None else [own for own, _ in of_torch.named_parameters()]
        for own in names:
            computed: Tensor = getattr(module if of_torch is None else of_torch, own)
            state[f"{name}.{own}"] = computed.detach().clone()
    for step, old in found:
        _restore(model, step, old)
        for name, value in old.new.items():
            if name in given and not torch.allclose(given[name], value, rtol=1e-5):
                raise InputError(
                    f"'{name}' belongs to several norms, which have been trained apart since",
                    code="not-representable",
                    hint="go on with the converted model",
                )
        given |= old.new
        state.update(old.new)
        count = old.names.get("norm.num_batches_tracked")
        if count is not None and state.get(count) is None:
            state[count] = before.get(count, torch.tensor(0))
    tensors = skeleton.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in tensors.items():  # the values of a module that has several names
        own = first.setdefault(id(tensor), name)
        state[name] = state[own] if state[name] is None or own in given else state[name]
    if missing := [name for name, value in state.items() if value is None]:
        raise InputError(
            f"nothing in the converted model says what '{missing[0]}' is",
            code="not-representable",
            hint="take the BatchNorm checkpoint from before the conversion",
        )
    return state, notes


def _restore(model: nn.Module, step: BoundStep, old: _Old) -> None:
    """Give one step's old tensors their values."""
    site, parts = step.site, _parts(model, step)
    if (whole := next(filter(is_convertible, parts), None)) is not None:
        norm = norm_of(whole)
        assert norm is not None
        _restore_values(model, step, old, norm.read(whole))
        return
    sigma = (old.get("norm.running_var", 1.0 - step.state.eps) + step.state.eps).sqrt()
    gamma, mean = old.get("norm.weight", 1.0), old.get("norm.running_mean", 0.0)
    old.set("norm.running_var", sigma.square() - step.state.eps)
    subtracted = next((value for part in parts if (value := _running_mean(part)) is not None), None)
    after = [found for part in parts if isinstance(found := deployed(part), Affine)]
    if step.step.reader is not None:
        _restore_reader(model.get_submodule(step.step.reader), old, gamma, sigma, mean)
        return
    bias = old.get("layer.bias", 0.0)
    if site.layer is None:
        factor, shift = torch.ones_like(gamma), torch.zeros_like(gamma)
        for one in after:
            factor, shift = one.factor * factor, one.factor * shift + one.shift
        gamma = _gain(old, factor * sigma, step)
    else:
        layer = model.get_submodule(site.layer)
        weight, gamma = _weight_and_gamma(layer, step, old, gamma, sigma)
        old.set("layer.weight", weight)
        own = layer._parameters.get("bias")
        shift = torch.zeros_like(gamma) if own is None else own.detach().double()
        for one in after:
            shift = shift + one.shift
        if "layer.bias" in old.names:
            old.set("layer.bias", bias)
        else:
            bias = torch.zeros_like(bias)
    if subtracted is not None and site.layer is not None:
        mean = torch.where(gamma == 0, mean, bias + subtracted * sigma / gamma)
    offset = bias if site.layer is not None else torch.zeros_like(mean)
    beta = shift + gamma * (mean - offset) / sigma
    _set_norm(old, gamma, beta, mean, sigma)


def _restore_values(model: nn.Module, step: BoundStep, old: _Old, state: NormState) -> None:
    """Give the values of a norm that has all of a BatchNorm's."""
    if step.norm.bias is Bias.KEPT:
        return  # it is the old norm itself, and so is its layer's bias
    assert state.mean is not None
    assert state.var is not None
    var, bias = state.var.double(), old.get("layer.bias", 0.0)
    if step.site.layer is not None:
        old.set("layer.weight", FilterLayout.weight(model.get_submodule(step.site.layer)).detach().double())
        old.set("layer.bias", bias)
    old.set("norm.running_var", var)
    gamma = _gain(old, state.gamma.double(), step)
    mean = state.mean.double() + (bias if "layer.bias" in old.names else torch.zeros_like(bias))
    _set_norm(old, gamma, state.beta.double(), mean, (var + state.eps).sqrt())


def _set_norm(old: _Old, gamma: Tensor, beta: Tensor, mean: Tensor, sigma: Tensor) -> None:
    if "norm.bias" not in old.names:  # μ has to make up for it
        mean, beta = mean - beta * sigma / gamma, torch.zeros_like(beta)
    old.set("norm.running_mean", mean)
    old.set("norm.weight", gamma)
    old.set("norm.bias", beta)


def _gain(old: _Old, gamma: Tensor, step: BoundStep) -> Tensor:
    """Return γ, which a norm without one cannot have unless it is 1."""
    if "norm.weight" not in old.names and not torch.allclose(gamma, torch.ones_like(gamma), rtol=1e-5):
        raise InputError(
            f"'{step.site.norm}' has no γ, and its scale has been trained since",
            code="not-representable",
            hint="give the old model's norm affine=True, or go on with the converted model",
        )
    return gamma if "norm.weight" in old.names else torch.ones_like(gamma)


def _weight_and_gamma(
    layer: nn.Module, step: BoundStep, old: _Old, gamma: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Return W and γ with ``γ/σ·W`` the converted layer's weight."""
    layout = FilterLayout.of(layer)
    if isinstance(step.weight, WeightNorm):
        g, v = _length_and_direction(layer, step.weight)
        factor = g * sigma / layout.flatten(v).norm(dim=1)
        if "norm.weight" in old.names:
            return v, factor
        return layout.multiply_outputs(v, factor), torch.ones_like(gamma)
    gamma = torch.ones_like(gamma) if "norm.weight" not in old.names else torch.where(gamma == 0, 1.0, gamma)
    return layout.multiply_outputs(FilterLayout.weight(layer).detach().double(), sigma / gamma), gamma


def _restore_reader(reader: nn.Module, old: _Old, gamma: Tensor, sigma: Tensor, mean: Tensor) -> None:
    """Give a layer behind the norm its own weight and bias back; the norm is as it was."""
    gamma = torch.where(gamma == 0, torch.ones_like(gamma), gamma)
    beta = old.get("norm.bias", 0.0)
    for part, value in (("norm.weight", gamma), ("norm.bias", beta), ("norm.running_mean", mean)):
        old.set(part, value)
    for name, value in fused_inputs(reader, sigma / gamma, mean - beta * sigma / gamma):
        old.set(f"reader.{name}", value)
        lost = f"reader.{name}" not in old.names
        if lost and float(value.abs().max()) > 1e-5 * float(1 + beta.abs().max()):
            raise InputError(
                f"'{old.step.step.reader}' has a bias now that the old one did not have, and it has been trained since",
                code="not-representable",
                hint="give the old model's layer a bias, or go on with the converted model",
            )


def _parts(model: nn.Module, step: BoundStep) -> list[nn.Module]:
    """Return the modules that stand in a norm's place, in order."""
    module = next(filter(None, (_submodule(model, path) for path in _paths(step))), None)
    if module is None:
        return []
    children = [module] if not isinstance(module, nn.Sequential) else list(module)
    return [child for child in children if deployed(child) is not None]


def _paths(step: BoundStep) -> list[str]:
    """Return where a norm's successor may stand: in its own place or, of a call, beside its running mean."""
    owner, _, name = step.site.norm.partition(":")
    if step.source.call is None or step.source.call.holder:
        return [f"{owner}.{name}" if owner and name else owner or name]
    parent, _, leaf = name.rpartition(".")
    place = ".".join(part for part in (owner, parent) if part)
    stem = leaf.replace("running_mean", "").strip("_")
    base = f"{place}.{stem}_norm" if stem else f"{place}.norm"
    return [f"{base}{count or ''}".lstrip(".") for count in range(4)]


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _running_mean(module: nn.Module) -> Tensor | None:
    mean = module._buffers.get("running_mean")
    return None if mean is None else mean.detach().double()


def _length_and_direction(layer: nn.Module, form: WeightNorm) -> tuple[Tensor, Tensor]:
    """Return g and v of a layer's weight normalization."""
    g, v = (layer.get_parameter(f"parametrizations.weight.original{i}").detach().double() for i in (0, 1))
    return form.lengths(g.flatten()), v
