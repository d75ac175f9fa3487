"""Signs and offsets of a group norm's channels, which are free: chosen to keep its statistics steady between samples.

A norm that divides a group of n channels by the group's own mean and deviation undoes, per sample, whatever those
statistics vary by. Two things about the channels z₁ … zₙ that reach it are free, as the norm's γ' and the layer's
filters and bias can take them back: each channel's sign s, and its offset o. With z' = s z + o, ⟨·⟩ a sample's own mean
over positions and Var, Cov taken from sample to sample:

- the group's mean varies by ``Var[Σ ⟨z'_c⟩]/n² = sᵀΣs/n²``, Σ the covariance of the channels' ⟨z⟩: signs are chosen to
  make it small;
- its variance is, with offsets that are orthogonal to 1, ``(q + 2 oᵀm + ‖o‖²)/n``, where ``q = Σ ⟨z_c²⟩ − n⟨z'⟩²`` is
  what it is without them and m holds the signed ⟨z_c⟩. Samples of strong contrast have large q, and their channels'
  means lie apart in their own way: offsets of the length ``‖o‖² = spread²·Σ Var z_c`` are chosen to make the sum vary
  least, ``min oᵀΣo + oᵀCov(q, m)``. So they cancel what of q can be told from the means, and ``‖o‖²`` never varies.

At ``spread`` k a share of 1/(1 + k²) of the variance that the norm divides by is the sample's own: all of it at 0, a
fifth at 2, the default. The larger it is, the steadier the statistics, the closer the swap, and the less is normalized:
activations far beyond the calibration data's are scaled down at any k. A deviation that varies by a share d moves the
output by ``d k/(1 + k²)`` times a constant per sample and channel, which is largest at k = 1: a small k does not help.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["SPREAD", "steady"]

SPREAD = 2.0
_BISECTIONS = 60  # of an interval that is exact to float64's last digits then


def steady(means: Tensor, squares: Tensor, groups: int, spread: float = SPREAD) -> tuple[Tensor, Tensor]:
    """Return signs and offsets, ``(C,)`` each.

    Args:
        means: The mean of each channel in each sample (or whatever the norm takes its statistics of). ``(samples, C)``
        squares: The mean of its square there. ``(samples, C)``
        groups: The number of groups.
        spread: The root mean square of a group's offsets, in units of that of its channels' standard deviations.
    """
    size = means.shape[1] // groups
    if size == 1:
        return torch.ones_like(means[0]), torch.zeros_like(means[0])
    m = means.double().view(-1, groups, size).transpose(0, 1)  # (groups, samples, size)
    energy = squares.double().view(-1, groups, size).transpose(0, 1)
    variance = (energy.mean(1) - m.mean(1).square()).clamp(min=0).sum(1)
    signs = _balancing_signs(_covariance(m, m))
    m = m * signs[:, None]
    q = energy.sum(2, keepdim=True) - size * m.mean(2, keepdim=True).square()
    # Among the vectors that sum to zero: whatever they have in common the group's mean would take away.
    basis = _orthogonal_to_ones(size).to(m)  # (size, size − 1)
    m = m @ basis
    offsets = _least_on_sphere(_covariance(m, m), _covariance(q, m)[:, 0] / 2, spread * variance.sqrt())
    return signs.flatten().to(means.dtype), (offsets @ basis.T).flatten().to(means.dtype)


def _covariance(a: Tensor, b: Tensor) -> Tensor:
    """Return the covariances over the second axis, ``(groups, columns of a, columns of b)``."""
    return (a - a.mean(1, keepdim=True)).mT @ (b - b.mean(1, keepdim=True)) / a.shape[1]


def _least_on_sphere(quadratic: Tensor, linear: Tensor, radius: Tensor) -> Tensor:
    """Return, per group, the v of length ``radius`` that has the least ``vᵀQv + 2 bᵀv``.

    It is ``v = −(Q + λ1)⁻¹b`` with the λ above minus the least eigenvalue that gives the length, found by bisection.
    Where b has no part along the least eigenvector no λ may be large enough: that direction then takes what is missing.
    """
    values, vectors = torch.linalg.eigh(quadratic)  # ascending
    b = (linear[:, None] @ vectors)[:, 0]
    # Counted from the least eigenvalue; λ cannot exceed what b alone would need at that eigenvalue.
    above, radius = values - values[:, :1], radius[:, None]
    tiny = torch.finfo(b.dtype).tiny
    low, high = torch.zeros_like(radius), b.norm(dim=1, keepdim=True) / radius.clamp(min=tiny)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        long = (b / (above + middle).clamp(min=tiny)).norm(dim=1, keepdim=True) > radius
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    v = -b / (above + high).clamp(min=tiny)
    missing = (radius.square() - v.square().sum(1, keepdim=True)).clamp(min=0)
    # Its own sign means nothing where b leaves it open; fixed by the vector's largest entry, a rerun gives the same.
    first = vectors[:, :, 0]
    fixed = first.gather(1, first.abs().argmax(1, keepdim=True)).sign()
    turn = torch.where(v[:, :1] == 0, fixed, v[:, :1].sign())
    v[:, :1] = turn * (v[:, :1].square() + missing).sqrt()
    v = v * (radius / v.norm(dim=1, keepdim=True).clamp(min=tiny))
    found: Tensor = vectors @ v[:, :, None]
    return found[..., 0]


def _balancing_signs(covariance: Tensor) -> Tensor:
    """Return, per group, signs under which ``sᵀΣs`` is small: from all ones, the best single flip until none helps."""
    signs = covariance.new_ones(covariance.shape[:2])
    products = (covariance @ signs[:, :, None])[..., 0].cpu().numpy()
    for i, (cov, product) in enumerate(zip(covariance.cpu().numpy(), products, strict=True)):
        sign, own = np.ones(len(cov)), cov.diagonal()  # short vectors: a step costs a third of torch's
        enough = 1e-12 * own.sum()
        for _ in range(2 * len(sign)):
            gain = sign * product - own
            best = int(gain.argmax())
            if gain[best] <= enough:
                break
            product -= 2 * sign[best] * cov[:, best]
            sign[best] = -sign[best]
        signs[i] = torch.from_numpy(sign).to(signs)
    return signs


def _orthogonal_to_ones(size: int) -> Tensor:
    """Return an orthonormal basis of the vectors that sum to zero (Helmert's). ``(size, size − 1)``"""
    k = torch.arange(1, size, dtype=torch.float64)
    basis = torch.triu(torch.ones(size, size - 1, dtype=torch.float64))
    basis[torch.arange(1, size), torch.arange(size - 1)] = -k
    return basis / (k * (k + 1)).sqrt()
