"""The values of one site of a converted network, while it is fitted: tried, measured with, and put back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from normswap.initialization.patches import patches_at
from normswap.initialization.targets import RegressionTarget
from normswap.nn import FilterLayout
from normswap.norms import Takes, apply, tensor_in
from normswap.runs.paired_sites import PairedSite
from normswap.stages.rewriting import Placed

__all__ = ["Candidate", "SiteValues"]


@dataclass(frozen=True)
class Candidate:
    """What a site may get.

    Args:
        weight: The source's filters, but for their signs. ``(C, fan_in)``
        bias: Its bias, likewise. ``(C,)``
        signs: The signs of the channels. ``(C,)``
        offsets: What the bias exceeds that by, in units of what the source really gives. ``(C,)``
        prior: The norm's gain, times what it divides by. ``(C,)``
        num_groups: The norm's groups.
        ridge: The ridge that gave all this.
    """

    weight: Tensor
    bias: Tensor
    signs: Tensor
    offsets: Tensor
    prior: Tensor
    num_groups: int | None
    ridge: float


class SiteValues:
    """A site of the converted network: its layer or affine, its norm, and what they hold.

    Args:
        site: Where it lies.
        target: What the original gives there.
        placed: What was put there; None for a layer without a norm.
    """

    def __init__(self, site: PairedSite, target: RegressionTarget, placed: Placed | None) -> None:
        self.site, self.target, self.placed = site, target, placed
        self.groups = None if placed is None else placed.bound.norm.groups
        norm = () if site.norm is None else site.norm.parameters()
        estimates = () if site.front is None else [b for b in site.front.buffers() if b.is_floating_point()]
        self.parameters = (*site.source.parameters(), *norm, *estimates)

    @property
    def channel_wise(self) -> bool:
        """Whether the source is a per-channel affine: a layer of one input value per output channel."""
        return self.placed is not None and self.placed.layer is None

    @property
    def layout(self) -> FilterLayout:
        """Where the source's filters lie in its weight."""
        return FilterLayout(groups=len(self.target.gain)) if self.channel_wise else FilterLayout.of(self.site.source)

    @property
    def weight(self) -> Tensor:
        """The source's weight, of an affine as one filter of one value per channel."""
        weight = FilterLayout.weight(self.site.source)
        return weight[:, None] if self.channel_wise else weight

    def patches(self, x: Tensor, index: Tensor) -> Tensor:
        """Return what each of the source's filters is multiplied with at some positions, counted through all samples.

        Shape: ``(len(index), groups, fan_in)``.
        """
        if self.channel_wise:
            return x.movedim(1, -1).flatten(0, -2)[index, :, None]
        return patches_at(self.site.source, x, index)

    def load(self, candidate: Candidate) -> None:
        """Give the source the candidate's weight and bias, and the norm its groups."""
        self.regroup(candidate.num_groups)
        filters, bias = candidate.weight * candidate.signs[:, None], candidate.bias * candidate.signs
        if self.placed is not None and self.placed.bound.norm.takes is Takes.AFFINE:  # no norm behind has a gain
            gain = self.target.gain.to(bias)
            filters, bias = filters * gain[:, None], bias * gain + self.target.shift
        weight = self.layout.unflatten(filters, self.weight)
        excess = torch.ones_like(bias)
        if self.channel_wise:
            self.weight.copy_(weight)
        else:
            stretch = self._stretch(candidate) if self.target.weight.free_length else 1.0
            dtype = self.weight.dtype
            encoded = self.target.weight.encode(self.layout, weight * stretch, excess / stretch, dtype)
            apply(encoded.values, partial(tensor_in, self.site.source))
            excess = encoded.excess
        if isinstance(self.site.source.bias, Tensor):
            self.site.source.bias.copy_(excess * bias + candidate.offsets)

    def _stretch(self, candidate: Candidate) -> Tensor:
        """Return the factor that gives the filters, whose lengths are free, the length of the original's in the mean.

        A filter's length decides what a learning rate does to it.
        """
        length = (self.target.anchor.norm(dim=1) / self.target.inverse_std.double()).square().mean().sqrt()
        found = candidate.weight.norm(dim=1).square().mean().sqrt()
        return length / found if bool(length > 0) and bool(found > 0) else torch.ones_like(found)

    def restore(self, values: tuple[Tensor, ...], groups: int | None) -> None:
        """Put values of all parameters, and the group count, back."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
        self.regroup(groups)

    def regroup(self, count: int | None) -> None:
        """Give the norm another number of groups, where it has groups."""
        if count is not None and self.placed is not None and self.site.norm is not None:
            self.groups = count
            self.placed.bound.norm.regroup(self.site.norm, count)

    def set_affine(self, gain: Tensor, shift: Tensor) -> None:
        """Give the norm its γ and β. ``(C,)`` each"""
        norm = self.site.norm
        if norm is not None:
            norm.weight.copy_(gain)  # type: ignore[operator]
            norm.bias.copy_(shift)  # type: ignore[operator]
