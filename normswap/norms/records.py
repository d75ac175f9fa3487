"""What is handed to a norm and what it answers: the old norm's values, what reaches the new one, and its values."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import PlanError, argument
from normswap.norms.assignment import Assignment, LinearOf, NewValue

__all__ = ["Affine", "Bias", "Encoding", "Incoming", "NormState", "Stays", "Takes"]


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
class NormState:
    """``y = γ (x − μ)/sqrt(var + eps) + β`` with all its values, per channel.

    Args:
        gamma: γ, ones where the norm is not affine. ``(C,)``
        beta: β, zeros where the norm is not affine. ``(C,)``
        mean: μ, None where the norm stores no statistics. ``(C,)``
        var: The variance, None where the norm stores no statistics. ``(C,)``
        eps: Added to the variance.
        momentum: How running statistics follow the batches; None is the plain average.
        frozen: The stored statistics are used in training, too.
        trainable: γ and β are parameters that take a gradient.
        synchronized: Statistics are those of all processes (SyncBatchNorm).
        batches: How many batches the statistics have seen.
        affine: Whether γ and β are tensors of the norm's own.
        stored: Whether the mean and the variance are.
    """

    gamma: Tensor
    beta: Tensor
    mean: Tensor | None
    var: Tensor | None
    eps: float
    momentum: float | None
    frozen: bool = False
    trainable: bool = True
    synchronized: bool = False
    batches: Tensor | None = None
    affine: tuple[bool, bool] = (True, True)
    stored: bool = True

    @property
    def num_features(self) -> int:
        """C."""
        return self.gamma.numel()

    @property
    def inverse_std(self) -> Tensor:
        """1/σ = 1/sqrt(var + eps), in float64. ``(C,)``"""
        if self.var is None:
            raise PlanError(
                "the norm stores no statistics", code="no-statistics", hint=f"give {argument('calibration')}"
            )
        return (self.var.double() + self.eps).rsqrt()

    def scaled(self, factor: Tensor) -> NormState:
        """Return the state of the norm whose output is ``factor_c`` times this one's. ``(C,)``"""

        def times(value: Tensor) -> Tensor:
            return (value.double() * factor.to(value.device)).to(value.dtype)

        return replace(self, gamma=times(self.gamma), beta=times(self.beta))

    @classmethod
    def of(
        cls,
        num_features: int | None,
        tensors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
        **options: Any,
    ) -> NormState:
        """Return the state of a norm with the given (γ, β, μ, var), each None where the norm has none."""
        weight, bias, mean, var = tensors
        like = next((t for t in tensors if t is not None), None)
        size = num_features if like is None else like.numel()
        device = None if like is None else like.device
        dtype = torch.get_default_dtype() if like is None else like.dtype
        trainable = any(isinstance(t, nn.Parameter) and t.requires_grad for t in (weight, bias))
        return cls(
            torch.ones(size or 0, device=device, dtype=dtype) if weight is None else weight.detach(),
            torch.zeros(size or 0, device=device, dtype=dtype) if bias is None else bias.detach(),
            None if mean is None or var is None else mean.detach(),
            None if mean is None or var is None else var.detach(),
            trainable=trainable,
            affine=(weight is not None, bias is not None),
            stored=mean is not None and var is not None,
            **options,
        )


@dataclass(frozen=True)
class Incoming:
    """What reaches the new norm, per channel, and what it has to make of it. All ``(C,)`` in float64.

    It is ``excess·t``, ``t = sign·(x − μ)/σ + offset``, and is to become ``gamma·t + beta``.

    Args:
        state: The BatchNorm's values.
        level: The mean of t: the offset, unless data at hand has another mean than the BatchNorm has recorded.
        ratio: The variance of t: ``r = var/(var + eps)`` of the BatchNorm, 1 but for dead channels, unless data at hand
            has another.
        mean: The mean of the layer's output before any bias.
        excess: The factor by which the layer's output exceeds the one asked for; 1 but where the weight keeps no scale.
        factor: The factor by which the layer's output, bias included, was multiplied in all.
        centre: The mean of the old layer's output before any bias: ``mean`` before it was multiplied.
        sign: 1 or −1: free where the norm subtracts a mean, whose γ undoes it.
        offset: Likewise, and β undoes it.
    """

    state: NormState
    level: Tensor
    ratio: Tensor
    mean: Tensor
    excess: Tensor
    factor: Tensor
    centre: Tensor
    sign: Tensor
    offset: Tensor

    @property
    def gamma(self) -> Tensor:
        """γ, with the sign that the channel was given."""
        return self.sign * self.state.gamma.double()

    @property
    def beta(self) -> Tensor:
        """β, less what γ makes of the offset."""
        return self.state.beta.double() - self.gamma * self.offset

    def over_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Return the mean and the mean square of what a channel's group brings, ``excess·t``. Each ``(C,)``"""

        def mean(value: Tensor) -> Tensor:
            return value.view(groups, -1).mean(1).repeat_interleave(value.numel() // groups)

        return mean(self.excess * self.level), mean(self.excess.square() * (self.ratio + self.level.square()))

    def normalized(self, groups: int, eps: float) -> Encoding:
        """Return γ' and β' of a norm that takes its mean and its deviation over groups, and the layer's bias.

        ``γ' = gamma·sqrt(r_g + eps)/excess`` and ``β' = beta + gamma·l_g/excess``, with l_g and r_g the mean and the
        variance of all that the channel's group brings: with them a norm at its expected statistics is
        ``γ (x − μ)/σ + β``.
        """
        mean, square = self.over_groups(groups)
        return self.affine((square - mean.square() + eps).sqrt(), mean)

    def affine(self, divisor: Tensor, subtracted: Tensor) -> Encoding:
        """Return γ' and β' of a norm that is expected to subtract and divide by these, ``(C,)`` each."""
        gain = self.sign * divisor / self.excess
        shift = self.sign * (subtracted / self.excess - self.offset)
        gamma, beta = self.state.gamma.double(), self.state.beta.double()
        values = {
            "weight": NewValue(gamma * gain, (LinearOf("norm.weight", gain),)),
            "bias": NewValue(beta + gamma * shift, (LinearOf("norm.bias"), LinearOf("norm.weight", shift))),
        }
        return Encoding(values, self.bias())

    def bias(self) -> NewValue:
        """Return the bias that gives the layer's output, whose mean was recorded, a mean of ``excess·offset``."""
        return NewValue(self.excess * self.offset - self.mean, (LinearOf("layer.bias", self.factor),))


@dataclass(frozen=True)
class Encoding:
    """The values of a new norm's tensors, by their names, and of the bias that the layer must add, where it is set.

    ``front`` are those of the module that stands in front of the norm, where it has one.
    """

    values: Assignment = field(default_factory=dict)
    bias: NewValue | None = None
    front: Assignment = field(default_factory=dict)


@dataclass(frozen=True)
class Affine:
    """What a norm is in evaluation: ``y = factor·x + shift`` per channel. ``(C,)`` each, float64.

    Args:
        factor: The factors.
        shift: The summands.
        rank: The number of axes of x, where the module knows it.
        rank_by_example: Whether example inputs alone show that, and the module takes others as well.
        otherwise: The module that stands where no neighbour takes the affine up; None for a 1×1 convolution of each
            channel by itself.
    """

    factor: Tensor
    shift: Tensor
    rank: int | None = None
    rank_by_example: bool = False
    otherwise: nn.Module | None = None


@dataclass(frozen=True)
class Stays:
    """A module that a deployed model keeps although it is none of torch.nn's, and why."""

    reason: str
