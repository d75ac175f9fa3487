"""A layer normalization that starts as nearly affine: row scales and offsets in the null space of a matrix.

``LN(D W x + o)`` with D the diagonal of row scales s. W is ``(n, R)`` with n > R + 2, so there are s with ``sᵀW = 0``:
then the mean over the units is that of o, whatever x is. And there are o with ``1ᵀo = 0`` and ``oᵀD W = 0``: then the
mean is 0, and the variance ``(|o|² + |D W x|²)/n`` has no mixed term. The larger o is, the less x changes it. With the
gain ``σ₀/s`` and the shift ``b − o/s``, ``σ₀² = (|o|² + E|D W x|²)/n + eps``,

    ``LN = (σ₀/σ(x)) (W x + o/s) − o/s + b  →  W x + b``.

|o| is ``spread`` times the root of ``E|D W x|²``; the difference falls with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Offsets", "offsets"]

_LEAST_SCALE = 0.02
"""How small, beside the root mean square of all, a row's scale may be: its gain is as large as the scale is small."""
_ROUNDS = 300


@dataclass(frozen=True)
class Offsets:
    """The tensors of a matrix and of the norm behind it, which begin as ``W x + b``.

    Args:
        weight: D W. ``(n, R)``
        inner: o. ``(n,)``
        gain: σ₀/s. ``(n,)``
        shift: −o/s, to which b is added. ``(n,)``
    """

    weight: Tensor
    inner: Tensor
    gain: Tensor
    shift: Tensor


def offsets(weight: Tensor, products: Tensor, spread: float, eps: float) -> Offsets | None:
    """Return the tensors that begin as nearly ``W x``; None where the null space has no such scales.

    Args:
        weight: W. ``(n, R)`` float64.
        products: E[x xᵀ]. ``(R, R)`` float64.
        spread: |o| as a multiple of the root of ``E|D W x|²``.
        eps: The norm's.
    """
    n = weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(2, (2, n), generator=generator) * 2 - 1).to(weight)
    scale = _spread_out(weight, signs[0])
    if scale is None:
        return None
    scaled = scale[:, None] * weight
    inner = _spread_out(torch.cat([scaled, torch.ones_like(weight[:, :1])], 1), signs[1], least=0.0)
    if inner is None:
        return None
    power = torch.einsum("ij,jk,ik->", scaled, products, scaled) / n
    power = torch.where(power > 0, power, torch.ones_like(power))
    inner = inner * (spread * power.sqrt() / inner.square().mean().sqrt())
    sigma = (inner.square().mean() + power + eps).sqrt()
    return Offsets(scaled, inner, sigma / scale, -inner / scale)


def _spread_out(columns: Tensor, start: Tensor, least: float = _LEAST_SCALE) -> Tensor | None:
    """Return a vector orthogonal to all columns whose entries are of about one size; None where there is none.

    Projections onto the null space and onto the vectors with entries of at least half the size, in turns.
    """
    basis, values, _ = torch.linalg.svd(columns, full_matrices=False)
    basis = basis[:, values > values.max().clamp(min=1e-300) * 1e-12]
    found = start
    for _ in range(_ROUNDS):
        found = found - basis @ (basis.mT @ found)
        size = found.square().mean().sqrt()
        if not size > 1e-9:
            return None
        found = found / size
        if not least or bool(found.abs().min() >= 0.5):
            break
        found = torch.where(found < 0, -1.0, 1.0) * found.abs().clamp(min=0.6)
    found = found - basis @ (basis.mT @ found)
    found = found - basis @ (basis.mT @ found)  # once more for the rounding of the first
    return found if bool(found.abs().min() >= least * found.square().mean().sqrt()) else None
