"""Quadratic forms as sums of squares, whose matrix is never made, and that of an inverse covariance.

The inverse of a ridged covariance ``S + ρI`` of n channels is never made either. With as many samples as channels, and
``S + ρI = LLᵀ``, it is ``vᵀ(S + ρI)⁻¹v = ‖L⁻¹v‖²``. With fewer, X the p centred samples, ``S = XᵀX/p``, Woodbury's
identity gives it from a matrix of p rows: ``(‖v‖² − ‖L⁻¹Xv‖²)/ρ`` with ``XXᵀ + pρI = LLᵀ``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from normswap.initialization.symmetric import gram, ridged_factor

__all__ = ["CovarianceSums", "QuadraticForm"]

Values = npt.NDArray[np.float64]
_RIDGE = 1e-3  # of the mean variance


@dataclass(frozen=True)
class QuadraticForm:
    """``Σ_i d_i v_i² ± ‖Σ_i v_i r_i‖²`` of a vector v of n values.

    Args:
        rows: The vectors r_i. ``(n, k)``
        diagonal: d. ``(n,)``
        sign: The sign of the second term, 1 or -1.
    """

    rows: Values
    diagonal: Values
    sign: float = 1.0

    @classmethod
    def of_rows(cls, rows: Tensor, diagonal: float = 0.0, sign: float = 1.0) -> QuadraticForm:
        """Return the form of these r_i, ``(n, k)``, and of one d for all i."""
        return cls(rows.contiguous().numpy(), np.full(len(rows), diagonal), sign)

    def __call__(self, v: Values) -> float:
        """Return the form of v. ``(n,)``"""
        total = v @ self.rows
        return float(self.diagonal @ (v * v) + self.sign * (total @ total))

    @property
    def squares(self) -> Values:
        """The form of each unit vector. ``(n,)``"""
        found: Values = self.diagonal + self.sign * np.einsum("ik,ik->i", self.rows, self.rows)
        return found

    def joined(self, index: npt.NDArray[np.int64], count: int) -> QuadraticForm:
        """Return the form of ``count`` values of which the i-th of v is that at ``index[i]``."""
        if count == len(index):  # each stands for itself
            order = np.argsort(index)
            same = bool((order == np.arange(count)).all())
            return self if same else QuadraticForm(self.rows[order], self.diagonal[order], self.sign)
        rows, diagonal = np.zeros((count, self.rows.shape[1])), np.zeros(count)
        np.add.at(rows, index, self.rows)
        np.add.at(diagonal, index, self.diagonal)
        return QuadraticForm(rows, diagonal, self.sign)


class CovarianceSums:
    """What the covariance of samples is made of: the samples themselves while they are few, and else sums.

    Args:
        sums: What :attr:`sums` told of earlier samples.
    """

    def __init__(self, sums: Sequence[Tensor] = ()) -> None:
        self._sums, self._few = list(sums), list[Tensor]()

    def add(self, rows: Tensor) -> None:
        """Add samples of n channels, for each group. ``(groups, samples, n)``"""
        self._few.append(rows)
        # Once they take more room than the sums of their products do, they are added up.
        if self._sums or sum(one.shape[1] for one in self._few) >= rows.shape[2]:
            self._sums, self._few = self.sums, []

    @property
    def sums(self) -> list[Tensor]:
        """Their number, their sum, ``(groups, n)``, and the sum of their products, ``(groups, n, n)``, in float64."""
        found = self._sums
        for rows in self._few:
            x = rows.double()
            own = [torch.tensor(float(x.shape[1]), dtype=x.dtype), x.sum(1), gram(x.mT)]
            found = [a + b for a, b in zip(found, own, strict=True)] if found else own
        return found

    def inverse(self) -> list[QuadraticForm] | None:
        """Return ``vᵀ(S + ρI)⁻¹v`` for each group, S the covariance; None where the samples are not finite."""
        if not self._few:
            count, first, second = self._sums
            mean = first / count
            covariance = (second / count - mean[:, :, None] * mean[:, None]).cpu()
            return _inverse_of_covariance(covariance) if bool(covariance.isfinite().all()) else None
        x = torch.cat(self._few, 1).double().cpu()
        x = x - x.mean(1, keepdim=True)
        return _inverse_of_samples(x) if bool(x.isfinite().all()) else None


def _inverse_of_covariance(covariance: Tensor) -> list[QuadraticForm]:
    factor, _ = ridged_factor(covariance, _ridge(covariance.diagonal(dim1=1, dim2=2).mean(1)))
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
    inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    return [QuadraticForm.of_rows(one.mT) for one in inverse]


def _inverse_of_samples(x: Tensor) -> list[QuadraticForm]:
    count = x.shape[1]
    factor, ridge = ridged_factor(gram(x), count * _ridge(x.square().mean((1, 2))))
    ridge = ridge / count
    solved = torch.linalg.solve_triangular(factor, x, upper=False) / ridge.sqrt()[:, None, None]
    return [QuadraticForm.of_rows(one.mT, 1 / own, -1.0) for one, own in zip(solved, ridge.tolist(), strict=True)]


def _ridge(variance: Tensor) -> Tensor:
    return (_RIDGE * variance).clamp(min=_RIDGE * 1e-30)
