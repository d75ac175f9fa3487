"""BatchNorms over the last axis of (N, L, C), as people write them: subclasses, and modules around one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = [
    "SPELLINGS", "Around", "AroundFlat", "Derived", "Flattened", "Moved", "Permuted", "Reshaped", "Transposed",
    "Unsqueezed", "ViewedAs", "WithAttribute",
]  # fmt: skip


class Transposed(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Permuted(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(torch.permute(input, (0, 2, 1))).permute(0, 2, 1)


class Moved(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class Reshaped(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, self.num_features)).reshape(x.shape)


class ViewedAs(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous().view(-1, x.shape[-1])).view_as(x)


class Flattened(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, (x.size(0), x.size(1)))


class Unsqueezed(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)


class WithAttribute(nn.BatchNorm1d):
    """Its axes are attributes, it has a method and a module of its own, and an activation on top."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.axes, self.act = (1, 2), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(self.turned(x)).transpose(*self.axes))

    def turned(self, x: Tensor) -> Tensor:
        return x.transpose(*self.axes)


class Derived(Transposed):
    """What it does is in its base class."""


class Around(nn.Module):
    """The same as a module around a plain BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.transpose(1, 2)).transpose(1, 2)


class AroundFlat(nn.Module):
    """Over the samples and positions as one axis."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.reshape(-1, x.shape[-1])).reshape(x.shape)


SPELLINGS: tuple[type[nn.Module], ...] = (
    Transposed, Permuted, Moved, Derived, WithAttribute, Reshaped, ViewedAs, Flattened, Unsqueezed,
)  # fmt: skip
