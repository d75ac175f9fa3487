"""A check of how many axes an input has, where weights are right for one number of axes alone.

Note [Ranks that an example decided]
A BatchNorm1d takes ``(N, C)`` and ``(N, C, L)``, and other norms take anything. Behind ``Linear(8, 8)`` the norm's
channels are the layer's outputs on inputs ``(N, 8)``, and the positions on inputs ``(N, 8, 8)``. Where the graph does
not tell which it is, the example inputs decide, and what is absorbed then is right for inputs like them alone: others
would run and give wrong values. So they are refused, where the norm stood.
"""

from __future__ import annotations

import torch.fx
from torch import Tensor, nn

__all__ = ["RankCheck"]


def checked(x: Tensor, rank: int) -> Tensor:
    """Return ``x``, which has ``rank`` axes.

    Raises:
        ValueError: It has another number of axes.
    """
    if x.ndim != rank:
        raise ValueError(
            f"expected an input with {rank} axes, as the example inputs had when the norm here was converted, "
            f"got {x.ndim}, {tuple(x.shape)}: convert the model with example inputs of that many axes"
        )
    return x


torch.fx.wrap("checked")  # a proxy has no rank: a trace calls the function as a whole


class RankCheck(nn.Module):
    """Return the input unchanged, and raise ValueError where it has not ``rank`` axes.

    ``torch.export`` and ``torch.compile`` know the number of axes: in what they make nothing is left of it.

    Args:
        rank: The number of axes of the input.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return checked(x, self.rank)

    def plain(self) -> nn.Flatten:
        """Return the module of torch.nn that passes inputs of as many axes alone.

        From the last axis to axis ``rank − 1`` there is one axis where that is the last one. Where there are more,
        the first of the two comes after the second, and where there are fewer, the second is missing: torch raises.
        """
        return nn.Flatten(-1, self.rank - 1)

    def extra_repr(self) -> str:
        return f"{self.rank}"
