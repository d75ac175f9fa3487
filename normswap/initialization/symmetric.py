"""Symmetric matrices: products with a matrix's own transpose, and factors of covariances with a ridge."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["gram", "ridged_factor"]


def gram(x: Tensor) -> Tensor:
    """Return ``x xᵀ``, ``(…, n, n)``, of matrices ``(…, n, k)``.

    NumPy sees on a CPU that both factors are one and asks BLAS for the half of it (``syrk``), which torch does not.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return x @ x.mT
    rows = x.detach().numpy()
    return torch.from_numpy(np.matmul(rows, rows.swapaxes(-1, -2)))


def ridged_factor(matrix: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factor of ``S + ρI``, and ρ, of finite matrices.

    A covariance that is the difference of two sums has the last places of these, which far from 0 are more than a small
    variance. Where they leave it not positive definite, ρ grows tenfold until it is.

    Args:
        matrix: S. ``(groups, n, n)``
        ridge: ρ. ``(groups,)``
    """
    last_place = torch.finfo(matrix.dtype).eps * matrix.diagonal(dim1=1, dim2=2).abs().amax(1)
    least = torch.maximum(last_place, torch.full_like(last_place, torch.finfo(matrix.dtype).tiny))
    while True:
        ridged = matrix.clone()
        ridged.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        factor, failed = torch.linalg.cholesky_ex(ridged)
        if not bool(failed.any()):
            return factor, ridge
        ridge = torch.where(failed > 0, torch.maximum(10 * ridge, least), ridge)
