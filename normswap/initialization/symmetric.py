"""Products of matrices with their own transposes, which are symmetric: half of one need not be computed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["gram"]


def gram(x: Tensor) -> Tensor:
    """Return ``x xᵀ``, ``(…, n, n)``, of matrices ``(…, n, k)``.

    NumPy sees on a CPU that both factors are one and asks BLAS for the half of it (``syrk``), which torch does not.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return x @ x.mT
    rows = x.detach().numpy()
    return torch.from_numpy(np.matmul(rows, rows.swapaxes(-1, -2)))
