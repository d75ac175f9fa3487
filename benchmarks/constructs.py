"""Networks whose forward does more with its norms than call them in a row, and what each computes with other norms.

Each holds norms as a person would write it, and :meth:`Construct.by_hand`, the same forward in which the norms are
called as the BatchNorms were, whatever they are: what a network with swapped norms has to compute. Sizes are such that
channels and positions are as many, so that who takes one for the other is wrong, and does not crash.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm

__all__ = ["CONSTRUCTS", "Construct"]

SIZE = 8


class Construct(nn.Module):
    """A network of the table.

    Attributes:
        what: What it does.
        domain: The argument ``which`` of a second call, None where it takes none.
    """

    what = ""
    domain: int | None = None

    def by_hand(self, x: Tensor, which: int | None = None) -> Tensor:
        """Return the output, the modules that stand in the norms' places called as the BatchNorms were."""
        raise NotImplementedError

    def sample(self) -> Tensor:
        return torch.randn(4, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class WritesParameters(Construct):
    """A momentum copy of a layer that each forward moves, and uses."""

    what = "the forward writes a parameter"

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(SIZE, SIZE, 1), nn.BatchNorm2d(SIZE), nn.Conv2d(SIZE, 3, 1)
        self.slow = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.slow.mul_(0.9).add_(0.5)
        return self.head(torch.relu(self.bn(self.conv(x)))) * self.slow.view(1, -1, 1, 1)

    def by_hand(self, x: Tensor, which: int | None = None) -> Tensor:
        with torch.no_grad():
            self.slow.mul_(0.9).add_(0.5)
        return self.head(torch.relu(self.bn(self.conv(x)))) * self.slow.view(1, -1, 1, 1)


class ChosenByArgument(Construct):
    what = "a norm is chosen by an argument"
    domain = 1

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(SIZE, SIZE, 1), nn.Conv2d(SIZE, 3, 1)
        self.bns = nn.ModuleList([nn.BatchNorm2d(SIZE), nn.BatchNorm2d(SIZE)])

    def forward(self, x: Tensor, which: int = 0) -> Tensor:
        return self.head(torch.relu(self.bns[which](self.conv(x))))

    def by_hand(self, x: Tensor, which: int | None = None) -> Tensor:
        return self.head(torch.relu(self.bns[which or 0](self.conv(x))))


class HeldByTrain(Construct):
    """Its ``train()`` freezes the norms, as the backbones of detectors do."""

    what = "train() holds the norms in eval mode"

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(SIZE, SIZE, 1), nn.BatchNorm2d(SIZE), nn.Conv2d(SIZE, 3, 1)

    def train(self, mode: bool = True) -> HeldByTrain:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.bn(self.conv(x))))

    def by_hand(self, x: Tensor, which: int | None = None) -> Tensor:
        return self.head(torch.relu(self.bn(self.conv(x))))


class BranchesOnClass(Construct):
    what = "the forward branches on the norm's class"

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(SIZE, SIZE), nn.BatchNorm2d(SIZE), nn.ReLU(), nn.Linear(SIZE, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            last = isinstance(layer, nn.BatchNorm2d)
            x = layer(x.movedim(-1, 1)).movedim(1, -1) if last else layer(x)
        return x

    def by_hand(self, x: Tensor, which: int | None = None) -> Tensor:
        for place, layer in enumerate(self.layers):
            x = layer(x.movedim(-1, 1)).movedim(1, -1) if place == 1 else layer(x)
        return x


class LastAxisNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class OverLastAxis(Construct):
    what = "a subclass normalizes the last axis"

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.head = nn.Linear(SIZE, SIZE), LastAxisNorm(SIZE), nn.Linear(SIZE, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.bn(self.fc(x))))

    def by_hand(self, x: Tensor, which: int | None = None) -> Tensor:
        # The new norm itself: what stands in the subclass's place, or inside of what does.
        norm = getattr(self.bn, "norm", self.bn) if isinstance(self.bn, torch.fx.GraphModule) else self.bn
        y = self.fc(x)
        y = norm(y) if isinstance(norm, LastAxisNorm) else norm(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.head(torch.relu(y))


class LegacyHook(Construct):
    what = "torch's old weight_norm at the layer"

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.conv = weight_norm(nn.Conv2d(SIZE, SIZE, 1))
        self.bn, self.head = nn.BatchNorm2d(SIZE), nn.Conv2d(SIZE, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.bn(self.conv(x))))

    def by_hand(self, x: Tensor, which: int | None = None) -> Tensor:
        return self.head(torch.relu(self.bn(self.conv(x))))


CONSTRUCTS: Sequence[type[Construct]] = (
    WritesParameters,
    ChosenByArgument,
    HeldByTrain,
    BranchesOnClass,
    OverLastAxis,
    LegacyHook,
)
