"""Regression target: what the original gives at a site, and so what the converted network is fitted to give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normswap.nn import FilterLayout
from normswap.runs.paired_sites import SiteBatch
from normswap.stages.rewriting import Placed
from normswap.weights import PlainWeight, Weight

__all__ = ["RegressionTarget"]

_INVERSE_FLOOR = 1e-2  # of the mean |γ|: a channel with less is not asked to make good an error of y


@dataclass(frozen=True)
class RegressionTarget:
    """What the original does at a site, per channel ``(C,)``: ``y = gain·t + shift``, ``t = (x − mean)·inverse_std``.

    ``anchor`` are the filters that give t on the original's own input, ``(C, fan_in)``; ``weight`` is the form of the
    layer's weight. ``unit`` turns y into what the user's own model gives: 1 over the scale that a channel was
    given (:mod:`normswap.initialization.equalization`); errors are told in its terms.
    """

    gain: Tensor
    shift: Tensor
    mean: Tensor
    inverse_std: Tensor
    anchor: Tensor
    weight: Weight
    unit: Tensor

    @classmethod
    def at(cls, placed: Placed, original: nn.Module, scale: Tensor | None) -> RegressionTarget:
        """Return the target of a new norm: what ``original`` gives there, whose channels have this scale."""
        state = placed.bound.state
        assert state.mean is not None
        anchor = state.inverse_std[:, None]
        if placed.bound.site.layer is not None:
            layer = original.get_submodule(placed.bound.site.layer)
            anchor = FilterLayout.of(layer).flatten(FilterLayout.weight(layer).detach().double()) * anchor
        gain, shift, mean = state.gamma.float(), state.beta.float(), state.mean.float()
        unit = torch.ones_like(gain) if scale is None else (1 / scale).to(gain)
        return cls(gain, shift, mean, state.inverse_std.float(), anchor, placed.bound.weight, unit)

    @classmethod
    def of_layer(cls, layer: nn.Module) -> RegressionTarget:
        """Return the target of a layer that is fitted alone: to give what the original's gives."""
        weight = FilterLayout.weight(layer).detach()
        anchor = FilterLayout.of(layer).flatten(weight.double())
        ones, zeros = (f(len(anchor), device=weight.device) for f in (torch.ones, torch.zeros))
        return cls(ones, zeros, zeros, ones, anchor, PlainWeight(), ones)

    @property
    def inverse_gain(self) -> Tensor:
        """How far t must go for a step of y: ``1/gain``, less where the gain is near zero. ``(C,)``"""
        floor = _INVERSE_FLOOR * self.gain.abs().mean()
        return self.gain / (self.gain.square() + floor.square()).clamp(min=1e-30)

    def targets(self, batch: SiteBatch) -> tuple[Tensor, Tensor]:
        """Return t, which the source is to give, and y, which the norm is to give, shaped as the original's output."""
        shape = (1, -1, *(1,) * (batch.reference.ndim - 2))
        t = (batch.reference.float() - self.mean.view(shape)).mul_(self.inverse_std.view(shape))
        y = (self.gain.view(shape) * t).add_(self.shift.view(shape))
        if batch.shortcut is not None:
            error = batch.shortcut[0].float() - batch.shortcut[1].float()
            y.add_(error)
            t.add_(error.mul_(self.inverse_gain.view(shape)))
        return t, y
