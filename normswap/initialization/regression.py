"""Ridge regression of a layer's weight, from second moments that are accumulated in a stream.

For patches u of a layer's input and a target t per output channel, over all samples and positions:

    minimise  E‖W u + b − t‖² + λ d ‖W − W₀‖²,  d the mean variance of u,

whose solution is ``W = W₀ + (C_tu − W₀ C_uu)(C_uu + λ d I)⁻¹``, ``b = E[t] − W E[u]``. Under the constraint that every
filter sums to zero (weight standardization) the ridge solution W is projected in the metric of ``A = C_uu + λ d I``:
``W − (W 1) 1ᵀA⁻¹ / (1ᵀA⁻¹1)``, which is the constrained minimum.

Note [Regression through a ReLU]
Many norms are followed by a ReLU: of a value y it passes ``max(y, c)`` on, with the threshold c = 0, or minus a
shortcut that is added before. How far below c a value lies makes no difference, and weights that fit it would be
wasted. The error ``E (max(y', c) − max(y, c))²`` has no minimum in closed form. Majorization-minimization lowers an
upper bound of it by repeated regression: where y lies below c, the target is the present prediction, as long as that is
below c, too, and else c (:func:`surrogate_target`). The bound counts the whole of ``(y' − y)²`` where y lies above c
and y' below; elsewhere it is the error itself. No step increases it.
After X. Zhang et al., *Accelerating Very Deep Convolutional Networks*, 2015, whose targets weigh a penalty instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from normswap.initialization.symmetric import gram
from normswap.runs.processes import alone, mean_over_rows, summed

__all__ = ["CHUNK", "Covariances", "SecondMoments", "Solution", "clamped", "solve", "surrogate_target"]


CHUNK = 2**14
"""Of rows that are multiplied at once."""


class SecondMoments:
    """Means and covariances of patches and targets, accumulated in float64 chunk by chunk.

    With G the convolution's groups, p the fan-in and C the channels it holds ``G·p² + C·p`` numbers, whatever the
    amount of data. Products are in float64, too: in float32 they depend on how the data is cut into chunks, by some
    1e-7 of the largest direction's variance, which the inverse of a small one enlarges to 1e-3 of a weight.
    """

    def __init__(self) -> None:
        self.count = 0
        self._origin: tuple[Tensor, Tensor] | None = None
        self._sums: tuple[Tensor, ...] = ()

    def add(self, patches: Tensor, target: Tensor) -> None:
        """Take in a chunk.

        Args:
            patches: ``(n, G, p)``.
            target: ``(n, C)``.
        """
        if not len(patches):
            return
        groups = patches.shape[1]
        # (G, n, p), (G, n, C/G)
        u, t = (v.transpose(0, 1).double() for v in (patches, target.unflatten(1, (groups, -1))))
        if self._origin is None:
            self._origin = u.mean(1, keepdim=True), t.mean(1, keepdim=True)
        u, t = u - self._origin[0], t - self._origin[1]
        sums = (u.sum(1), t.sum(1), gram(u.mT), t.mT @ u, t.square().sum(1))
        self.count += patches.shape[0]
        if self._sums:
            for total, value in zip(self._sums, sums, strict=True):
                total.add_(value)
        else:
            self._sums = sums

    def read(self) -> Covariances:
        """Return what was accumulated.

        Raises:
            ValueError: Nothing was.
        """
        if self._origin is None:
            raise ValueError("there is no data")
        u, t, tt = (self._sums[i] / self.count for i in (0, 1, 4))

        def about_mean(total: Tensor, mean: Tensor) -> Tensor:
            return torch.baddbmm(total, mean[:, :, None], u[:, None], beta=1 / self.count, alpha=-1)

        return Covariances(
            self.count,
            self._origin[0][:, 0].double() + u,
            self._origin[1][:, 0].double() + t,
            about_mean(self._sums[2], u),
            about_mean(self._sums[3], t),
            (tt - t.square()).clamp(min=0),
        )


@dataclass(frozen=True)
class Covariances:
    """Means and covariances; G groups, fan-in p, o channels per group; float64.

    Args:
        count: The number of patches.
        input_mean: ``(G, p)``
        target_mean: ``(G, o)``
        inputs: C_uu. ``(G, p, p)``
        cross: C_tu. ``(G, o, p)``
        targets: The targets' variances. ``(G, o)``
    """

    count: int
    input_mean: Tensor
    target_mean: Tensor
    inputs: Tensor
    cross: Tensor
    targets: Tensor

    @classmethod
    def of(cls, patches: Tensor, target: Tensor) -> Covariances:
        """Return those of all processes' patches, ``(n, G, p)``, and targets, ``(n, C)``."""
        moments = SecondMoments()
        for u, t in zip(patches.split(CHUNK), target.split(CHUNK), strict=True):
            moments.add(u, t)
        own = moments.read() if len(target) else cls.of_nothing(patches, target)
        return own.over_processes()

    @classmethod
    def of_nothing(cls, patches: Tensor, target: Tensor) -> Covariances:
        """Return those of no patch, shaped as those of such patches and targets would be."""
        groups, fan_in = patches.shape[1:]
        u = patches.new_zeros(groups, fan_in, dtype=torch.float64)
        t = u.new_zeros(groups, target.shape[1] // groups)
        return cls(0, u, t, u.new_zeros(groups, fan_in, fan_in), u.new_zeros(*t.shape, fan_in), t)

    def over_processes(self) -> Covariances:
        """Return the same of all processes' patches."""
        if alone():
            return self
        own = self.input_mean.new_tensor(float(self.count))
        count, u, t = summed("means of patches", own, own * self.input_mean, own * self.target_mean)
        u, t = u / count, t / count
        du, dt = self.input_mean - u, self.target_mean - t
        inputs, cross, targets = summed(
            "covariances of patches",
            own * (self.inputs + du[:, :, None] * du[:, None]),
            own * (self.cross + dt[:, :, None] * du[:, None]),
            own * (self.targets + dt.square()),
        )
        return Covariances(int(count), u, t, inputs / count, cross / count, targets / count)

    @property
    def mean_variance(self) -> Tensor:
        """d, the mean variance of the inputs, a positive number. ``(G, 1, 1)``"""
        d = self.inputs.diagonal(dim1=1, dim2=2).mean(1)
        return torch.where(d > 0, d, torch.ones_like(d))[:, None, None]

    def best_scale(self, weight: Tensor) -> Tensor:
        """Return the factor of a weight, ``(G, o, p)``, for each group, with which it comes nearest the targets.

        Shape: ``(G, 1, 1)``.
        """
        power = torch.einsum("gop,gpq,goq->g", weight, self.inputs, weight)
        scale = torch.einsum("gop,gop->g", weight, self.cross) / power
        return torch.where(power > 0, scale, torch.ones_like(scale))[:, None, None]

    @property
    def finite(self) -> bool:
        """Whether the inputs' covariances are: where one is not, one of its two variances is not either."""
        return bool(self.inputs.diagonal(dim1=1, dim2=2).isfinite().all())

    def retargeted(self, centred: Tensor, target: Tensor) -> Covariances:
        """Return the same with other targets of the same patches, ``(n, G, p)`` less their mean, and ``(n, C)``."""
        mean = mean_over_rows("means of targets", target)
        target = target - mean
        own = torch.zeros_like(self.cross)
        for t, u in zip(target.split(CHUNK), centred.split(CHUNK), strict=True):
            t, u = (v.transpose(0, 1).double() for v in (t.unflatten(1, self.target_mean.shape), u))  # (G, n, …)
            own.baddbmm_(t.mT, u)
        count, cross = summed("targets", self.target_mean.new_tensor(float(len(target))), own)
        return replace(
            self,
            target_mean=mean.double().view_as(self.target_mean),
            cross=cross / count,
            targets=mean_over_rows("variances of targets", target.square()).double().view_as(self.targets),
        )


@dataclass(frozen=True)
class Solution:
    """A layer's weight and bias, ``(G, o, p)`` and ``(G, o)``, and what it was computed from.

    Args:
        weight: W.
        bias: b.
        centre: ``W E[u] + b``, which is E[t].
        ridge: λ.
        factor: The Cholesky factor of A.
        of_ones: ``1ᵀA⁻¹``. ``(G, 1, p)``
        of_anchor: ``W₀C_uu``.
    """

    weight: Tensor
    bias: Tensor
    centre: Tensor
    ridge: float
    factor: Tensor
    of_ones: Tensor
    of_anchor: Tensor

    def apply(self, centred: Tensor) -> Tensor:
        """Return ``W u + b`` of patches ``(n, G, p)`` that are given less their mean. ``(n, C)``"""
        weight, centre = self.weight.to(centred.dtype), self.centre.to(centred.dtype)
        return torch.baddbmm(centre[:, None], centred.transpose(0, 1), weight.mT).transpose(0, 1).flatten(1)


_MOST_RIDGE = 1e6


def solve(
    data: Covariances, anchor: Tensor, ridge: float, *, zero_sum: bool = False, like: Solution | None = None
) -> Solution:
    """Return the weight and bias that predict the targets best, at ridge λ towards ``anchor``.

    The covariance is factored by Cholesky; where rounding leaves it not positive definite, λ grows tenfold until it is.

    Args:
        data: The moments.
        anchor: W₀. ``(G, o, p)``
        ridge: λ, relative to the inputs' mean variance.
        zero_sum: Whether every filter must sum to zero.
        like: A solution with the same patches and anchor: what depends on neither λ nor the targets is taken from it,
            and where λ is the same, the factor.
    """
    of_anchor = anchor @ data.inputs if like is None else like.of_anchor
    if like is not None and like.ridge == ridge:
        factor, of_ones = like.factor, like.of_ones
    else:
        factor, ridge = _factor(data, ridge)
        of_ones = torch.cholesky_solve(torch.ones_like(anchor[:, :1]).mT, factor).mT
    weight = anchor + torch.cholesky_solve((data.cross - of_anchor).mT, factor).mT
    if zero_sum:
        weight = weight - weight.sum(-1, keepdim=True) * (of_ones / of_ones.sum(-1, keepdim=True))
    bias = data.target_mean - (weight @ data.input_mean[..., None])[..., 0]
    return Solution(weight, bias, data.target_mean, ridge, factor, of_ones, of_anchor)


def _factor(data: Covariances, ridge: float) -> tuple[Tensor, float]:
    while True:
        ridged = data.inputs.clone()
        ridged.diagonal(dim1=1, dim2=2).add_(ridge * data.mean_variance[..., 0])
        factor, failed = torch.linalg.cholesky_ex(ridged)
        if not bool(failed.any()) or ridge > _MOST_RIDGE:
            return factor, ridge
        ridge = max(10 * ridge, 1e-12)


def clamped(value: Tensor, threshold: Tensor | None) -> Tensor:
    """Return what a ReLU with this threshold passes on, ``max(value, threshold)``; without a ReLU all of it."""
    return value if threshold is None else torch.maximum(value, threshold)


def surrogate_target(predicted: Tensor, target: Tensor, threshold: Tensor | None) -> Tensor:
    """Return the next regression's target where ``target`` is wanted (Note [Regression through a ReLU])."""
    return target if threshold is None else torch.where(target > threshold, target, torch.minimum(predicted, threshold))
