"""What recipes are made of: weight parts (a layer's parametrization) and norm parts (what stands where the norm stood).

A part says how to build its module and how to give it values. With BatchNorm in evaluation, per channel,

    y = γ (x − μ)/σ + β,  σ = sqrt(var + eps),  x = W·u + b,

the layer (or, where none may be absorbed, a per-channel affine in front of the norm) hands ``s·W·u`` on, with s one of
1, 1/σ and γ/σ (:class:`Takes`), and the norm part takes up the rest, of which it may leave a bias to the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normswap.nn import (
    ChannelLayerNorm,
    FilterLayout,
    FilterWeightNorm,
    MeanOnlyBatchNorm,
    WeightStandardization,
    parametrize_weight_norm,
    row_moments,
)
from normswap.records import Site

__all__ = [
    "Bias",
    "Groups",
    "Incoming",
    "Keep",
    "LayerNormChannels",
    "MeanOnly",
    "NormPart",
    "Nothing",
    "Takes",
    "WeightNorm",
    "WeightPart",
    "WeightStd",
]


class Takes(Enum):
    """How much of the BatchNorm goes into the layer's weight, and so what the new norm still has to do."""

    NORMALIZATION = "1/σ"
    """The new norm normalizes each sample by its own statistics and has γ and β."""
    AFFINE = "γ/σ"
    """Nothing is divided by a deviation any more."""
    NOTHING = "1"
    """The BatchNorm stays."""


class Bias(Enum):
    """What becomes of the layer's bias."""

    SET = "set"
    REMOVED = "removed"
    KEPT = "kept"


@dataclass(frozen=True)
class Incoming:
    """What reaches the new norm, per channel, and what it has to make of it. All ``(C,)`` in float64.

    Args:
        gamma: γ.
        beta: β.
        level: The mean of (x − μ)/σ: 0, unless data at hand has another.
        ratio: The variance of (x − μ)/σ: ``r = var/(var + eps)`` of the BatchNorm, 1 but for dead channels, unless data
            at hand has another.
        mean: The mean of the layer's output before any bias.
        scale: The factor by which the layer's output exceeds the one asked for; 1 but where the weight keeps no scale.
    """

    gamma: Tensor
    beta: Tensor
    level: Tensor
    ratio: Tensor
    mean: Tensor
    scale: Tensor

    def over_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Return the mean and the mean square of what a channel's group brings, ``scale·(x − μ)/σ``. Each ``(C,)``"""

        def mean(value: Tensor) -> Tensor:
            return value.view(groups, -1).mean(1).repeat_interleave(value.numel() // groups)

        return mean(self.scale * self.level), mean(self.scale.square() * (self.ratio + self.level.square()))

    def affine(self, groups: int, eps: float) -> tuple[Tensor, Tensor]:
        """Return γ' and β' with which a norm at its expected statistics is ``γ (x − μ)/σ + β``.

        ``γ' = γ·sqrt(r_g + eps)/scale`` and ``β' = β + γ·l_g/scale``, with l_g and r_g the mean and the variance of all
        that the channel's group brings.
        """
        mean, square = self.over_groups(groups)
        root = (square - mean.square() + eps).sqrt()
        return self.gamma * root / self.scale, self.beta + self.gamma * mean / self.scale


class NormPart:
    """What stands where the norm stood. Subclasses are frozen dataclasses."""

    takes: Takes = Takes.NORMALIZATION
    bias: Bias = Bias.SET

    def build(self, site: Site, like: Tensor) -> nn.Module | None:
        """Return the module, on the device and with the dtype of ``like``; None for no module."""
        raise NotImplementedError

    def load(self, module: nn.Module | None, incoming: Incoming) -> Tensor | None:
        """Give ``module`` its values and return the bias that the layer must add, where it is to be set."""
        raise NotImplementedError

    def __str__(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class Groups(NormPart):
    """``torch.nn.GroupNorm`` with ``num_groups`` groups."""

    num_groups: int
    eps: float

    def build(self, site: Site, like: Tensor) -> nn.Module:
        return nn.GroupNorm(self.num_groups, site.num_features, self.eps, device=like.device, dtype=like.dtype)

    def load(self, module: nn.Module | None, incoming: Incoming) -> Tensor:
        return _load_affine(module, incoming, self.num_groups, self.eps)

    def __str__(self) -> str:
        return f"GroupNorm, {self.num_groups} group{'s' if self.num_groups > 1 else ''}"


@dataclass(frozen=True)
class LayerNormChannels(NormPart):
    """Layer normalization over the channels of each position."""

    eps: float

    def build(self, site: Site, like: Tensor) -> nn.Module:
        return ChannelLayerNorm(site.num_features, self.eps, device=like.device, dtype=like.dtype)

    def load(self, module: nn.Module | None, incoming: Incoming) -> Tensor:
        return _load_affine(module, incoming, 1, self.eps)

    def __str__(self) -> str:
        return "LayerNorm over channels"


def _load_affine(module: nn.Module | None, incoming: Incoming, groups: int, eps: float) -> Tensor:
    assert isinstance(module, (nn.GroupNorm, nn.LayerNorm))
    gain, shift = incoming.affine(groups, eps)
    with torch.no_grad():
        module.weight.copy_(gain)
        module.bias.copy_(shift)
    return -incoming.mean


@dataclass(frozen=True)
class MeanOnly(NormPart):
    """Mean-only batch normalization."""

    momentum: float | None = 0.1
    synchronized: bool = False
    takes = Takes.AFFINE
    bias = Bias.REMOVED

    def build(self, site: Site, like: Tensor) -> nn.Module:
        return MeanOnlyBatchNorm(
            site.num_features,
            self.momentum,
            site.rank,
            synchronized=self.synchronized,
            device=like.device,
            dtype=like.dtype,
        )

    def load(self, module: nn.Module | None, incoming: Incoming) -> None:
        assert isinstance(module, MeanOnlyBatchNorm)
        with torch.no_grad():
            module.running_mean.copy_(incoming.mean)
            module.bias.copy_(incoming.beta)

    def __str__(self) -> str:
        return "MeanOnlyBatchNorm"


@dataclass(frozen=True)
class Nothing(NormPart):
    """No norm: the layer's bias takes the rest."""

    takes = Takes.AFFINE

    def build(self, site: Site, like: Tensor) -> None:
        return None

    def load(self, module: nn.Module | None, incoming: Incoming) -> Tensor:
        return incoming.beta - incoming.mean

    def __str__(self) -> str:
        return "nothing"


@dataclass(frozen=True)
class Keep(NormPart):
    """The BatchNorm itself, whose statistics follow the weight where that has changed."""

    takes = Takes.NOTHING
    bias = Bias.KEPT

    def build(self, site: Site, like: Tensor) -> None:
        return None

    def load(self, module: nn.Module | None, incoming: Incoming) -> None:
        """Do nothing: the norm, which may be functional, is adjusted where its statistics are known."""

    def __str__(self) -> str:
        return "itself"


class WeightPart:
    """A layer's weight parametrization. Subclasses are frozen dataclasses."""

    name: str
    centres: bool = False
    """Whether a filter's mean is lost, so that the weight must be projected first."""

    def register(self, layer: nn.Module) -> None:
        """Parametrize ``layer``'s weight, whose values are the originals' until :meth:`load`."""
        raise NotImplementedError

    def load(self, layer: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
        """Give the originals values such that the layer's weight is ``scale_c · weight_c``.

        Args:
            layer: A layer on which :meth:`register` was called.
            weight: The weight before the swap, in float64.
            scale: One factor per output channel, of any sign. ``(C,)`` float64.

        Returns:
            The factor by which each channel's weight exceeds the one asked for, ones unless the form keeps no scale.
        """
        raise NotImplementedError


def _originals(layer: nn.Module) -> parametrize.ParametrizationList:
    found = layer.get_submodule("parametrizations.weight")
    assert isinstance(found, parametrize.ParametrizationList)
    return found


@dataclass(frozen=True)
class WeightNorm(WeightPart):
    """``W = g v/‖v‖`` (Salimans & Kingma 2016, eq. 2)."""

    name = "wn"

    def register(self, layer: nn.Module) -> None:
        parametrize_weight_norm(layer)

    def load(self, layer: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
        layout = FilterLayout.of(layer)
        filters = layout.flatten(weight)
        norm = filters.norm(dim=1)
        # v = w, but for two kinds of filter. A zero v has no direction: g = 0 makes the filter zero for any other v, in
        # value and finitely in gradient. And the squares of a tiny v vanish in its dtype: it is stretched to length 1.
        originals = _originals(layer)
        dtype = FilterLayout.weight(layer).dtype
        tiny = norm < 1e3 * torch.finfo(dtype).tiny ** 0.5
        v = torch.where(tiny[:, None], filters / norm.clamp(min=1e-300)[:, None], filters)
        v = layout.unflatten(torch.where((norm == 0)[:, None], torch.ones_like(filters), v), weight)
        g = norm * scale
        with torch.no_grad():
            originals.original1.copy_(v)  # type: ignore[operator]
            if isinstance(originals[0], FilterWeightNorm):
                originals.original0.copy_(g)  # type: ignore[operator]
            else:
                originals.original0.copy_(g.view_as(originals.original0))  # type: ignore[operator]
        return torch.ones_like(scale)


@dataclass(frozen=True)
class WeightStd(WeightPart):
    """``W = (gain (v − mean v)/sqrt(var v + eps) + offset)/sqrt(n)``, n values in a filter; see the parametrization."""

    gain: bool = True
    offset: bool = False
    eps: float = 1e-5

    @property
    def name(self) -> str:  # type: ignore[override]
        return "aws" if self.offset else "ws"

    @property
    def centres(self) -> bool:  # type: ignore[override]
        return not self.offset

    def register(self, layer: nn.Module) -> None:
        ws = WeightStandardization(FilterLayout.of(layer), gain=self.gain, offset=self.offset, eps=self.eps)
        parametrize.register_parametrization(layer, "weight", ws)

    def load(self, layer: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
        layout = FilterLayout.of(layer)
        filters = layout.flatten(weight)
        originals = _originals(layer)
        if self.gain:
            # The length of v is free, and the gradient grows as it shrinks: a dead channel's filter, near zero, would
            # be flung about by any rate that the others need. None is left shorter than they are in the mean.
            length = filters.norm(dim=1)
            stretch = (length.square().mean().sqrt() / length).clamp(min=1)
            stretch = torch.where(stretch.isfinite(), stretch, torch.ones_like(stretch))
            filters, scale = filters * stretch[:, None], scale / stretch
            weight = layout.unflatten(filters, weight)
        mean, var = row_moments(filters)
        std = (var + self.eps).sqrt()
        unit = filters.shape[1] ** 0.5
        with torch.no_grad():
            if not self.gain:
                originals.original.copy_(weight)
                return 1 / (std * scale)
            originals.original0.copy_(weight)  # type: ignore[operator]
            originals.original1.copy_(std * scale * unit)  # type: ignore[operator]
            if self.offset:
                originals.original2.copy_(mean * scale * unit)  # type: ignore[operator]
        return torch.ones_like(scale)
