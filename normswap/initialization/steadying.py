"""Keep a group's statistics steady from sample to sample: the signs and offsets of its channels, which are free.

A norm that divides a group of n channels by the group's own mean and deviation undoes, per sample, whatever those
statistics vary by. Two things about the channels z₁ … zₙ that reach it are free, as the norm's γ' and the layer's
filters and bias can take them back: each channel's sign s, and its offset o. With z' = s z + o

- the group's mean varies by ``Var[mean z'] = sᵀΣs/n²``, Σ the covariance of the channels' per-sample means: signs are
  chosen to make it small;
- its second moment is ``E z² + 2/n Σ o_c z'_c + ‖o‖²/n``: with offsets along the direction, orthogonal to 1, in which
  Σ varies least, the middle term is as steady as can be, and ``‖o‖²/n = spread²`` is the part of it that never varies.

At ``spread`` k a share of 1/(1 + k²) of the variance that the norm divides by is the sample's own: all of it at 0, a
fifth at 2, the default. The larger it is, the steadier the statistics, the closer the swap, and the less is normalized:
activations far beyond the calibration data's are brought back by any. What varies in the deviation by a share d moves
the output by ``d k/(1 + k²)`` times a constant per sample and channel, which is worst at 1: a little is no good.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SPREAD", "steady"]

SPREAD = 2.0


def steady(means: Tensor, groups: int, spread: float = SPREAD) -> tuple[Tensor, Tensor]:
    """Return signs and offsets, ``(C,)`` each, of channels of about unit variance.

    Args:
        means: The mean of each channel in each sample (or whatever the norm takes its statistics of). ``(samples, C)``
        groups: The number of groups.
        spread: The root mean square of the offsets.
    """
    channels = means.shape[1]
    size = channels // groups
    signs, offsets = means.new_ones(channels), means.new_zeros(channels)
    if size == 1:
        return signs, offsets
    by_group = means.view(-1, groups, size).transpose(0, 1)
    centred = by_group - by_group.mean(1, keepdim=True)
    covariance = (centred.mT @ centred / max(1, means.shape[0])).double()  # (groups, size, size)
    s = _balancing_signs(covariance)
    covariance = covariance * s[:, :, None] * s[:, None]
    # The direction of least variance among those orthogonal to 1, which the group's mean would take away.
    basis = _orthogonal_to_ones(size).to(covariance)  # (size, size − 1)
    _, vectors = torch.linalg.eigh(basis.mT @ covariance @ basis)
    direction = (basis @ vectors[:, :, 0, None])[..., 0]  # (groups, size), of length 1
    # Its own sign means nothing; fixed, a rerun gives the same.
    first = direction.gather(1, direction.abs().argmax(1, keepdim=True)).sign()
    offset = direction * first * spread * size**0.5
    return s.flatten().to(means.dtype), offset.flatten().to(means.dtype)


def _balancing_signs(covariance: Tensor) -> Tensor:
    """Return, per group, signs under which ``sᵀΣs`` is small: from all ones, the best single flip until none helps."""
    signs = covariance.new_ones(covariance.shape[:2])
    for sign, cov in zip(signs, covariance, strict=True):
        product = cov @ sign
        for _ in range(2 * len(sign)):
            gain = sign * product - cov.diagonal()
            best = int(gain.argmax())
            if gain[best] <= 1e-12 * cov.diagonal().sum():
                break
            product -= 2 * sign[best] * cov[:, best]
            sign[best] = -sign[best]
    return signs


def _orthogonal_to_ones(size: int) -> Tensor:
    """Return an orthonormal basis of the vectors that sum to zero (Helmert's). ``(size, size − 1)``"""
    k = torch.arange(1, size, dtype=torch.float64)
    basis = torch.triu(torch.ones(size, size - 1, dtype=torch.float64))
    basis[torch.arange(1, size), torch.arange(size - 1)] = -k
    return basis / (k * (k + 1)).sqrt()
