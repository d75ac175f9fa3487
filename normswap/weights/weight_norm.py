"""Weight normalization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normswap.nn import FilterLayout, parametrize_weight_norm
from normswap.norms.assignment import Along, LinearOf, NewValue
from normswap.weights.base import Weight, WeightEncoding

__all__ = ["WeightNorm"]


@dataclass(frozen=True)
class WeightNorm(Weight):
    """``W = g v/‖v‖`` (Salimans & Kingma 2016, eq. 2).

    Args:
        log_gain: Whether s in ``g = exp(s)`` is the parameter (section 2.1).
    """

    log_gain: bool = False

    name = "wn"
    free_length = True

    def register(self, layer: nn.Module, name: str = "weight") -> None:
        parametrize_weight_norm(layer, name, log_gain=self.log_gain)

    def lengths(self, original: Tensor) -> Tensor:
        """Return g of what is stored for it. ``(C,)``"""
        return original.exp() if self.log_gain else original

    def encode(self, layout: FilterLayout, weight: Tensor, factor: Tensor, dtype: torch.dtype) -> WeightEncoding:
        filters = layout.flatten(weight)
        norm = filters.norm(dim=1)
        # v = w, but for two kinds of filter. A zero v has no direction: g = 0 makes the filter zero for any other v, in
        # value and finitely in gradient. And the squares of a tiny v vanish in its dtype: it is stretched to length 1.
        tiny = norm < 1e3 * torch.finfo(dtype).tiny ** 0.5
        v = torch.where(tiny[:, None], filters / norm.clamp(min=1e-300)[:, None], filters)
        v = layout.unflatten(torch.where((norm == 0)[:, None], torch.ones_like(filters), v), weight)
        stretch = torch.where(tiny, 1 / norm.clamp(min=1e-300), torch.ones_like(norm))
        if self.log_gain:
            return self._with_logarithms(layout, weight, v, stretch, norm, factor, dtype)
        values = {
            "parametrizations.weight.original0": NewValue(
                _shaped(norm * factor, layout, weight),
                (LinearOf("factor", norm), LinearOf("layer.weight", factor, along=Along.DIRECTION)),
            ),
            "parametrizations.weight.original1": NewValue(v, (LinearOf("layer.weight", stretch),)),
        }
        return WeightEncoding(values, torch.ones_like(factor))

    def _with_logarithms(
        self,
        layout: FilterLayout,
        weight: Tensor,
        v: Tensor,
        stretch: Tensor,
        norm: Tensor,
        factor: Tensor,
        dtype: torch.dtype,
    ) -> WeightEncoding:
        """Return s = log‖w‖|factor| and v with the factor's sign; zero becomes the smallest number that dtype has."""
        sign = torch.where(factor < 0, -torch.ones_like(factor), torch.ones_like(factor))
        length = norm * factor.abs()
        dead = length < torch.finfo(dtype).tiny
        s = length.clamp(min=torch.finfo(dtype).tiny).log()
        zero = torch.zeros_like(s)
        terms = (
            LinearOf("factor", torch.where(dead, zero, 1 / factor)),
            LinearOf("layer.weight", torch.where(dead, zero, sign / norm), along=Along.DIRECTION),
        )
        values = {
            "parametrizations.weight.original0": NewValue(s, terms),
            "parametrizations.weight.original1": NewValue(
                layout.multiply_outputs(v, sign), (LinearOf("layer.weight", sign * stretch),)
            ),
        }
        return WeightEncoding(values, torch.ones_like(factor))


def _shaped(g: Tensor, layout: FilterLayout, weight: Tensor) -> Tensor:
    """Return g in the shape that torch's weight norm gives it, or as it is where the filters lie along no one axis."""
    if layout.axis is None:
        return g
    shape = [1] * weight.ndim
    shape[layout.axis] = -1
    return g.view(shape)
