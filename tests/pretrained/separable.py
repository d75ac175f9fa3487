"""Networks of depthwise-separable convolutions: keyword spotting, visual wake words, one wake word."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .padding import same_output, same_pad, same_padding

__all__ = ["DSCNN", "MobileNetV1", "WakeWordNet"]

Pair = tuple[int, int]


class ConvBNReLU(nn.Module):
    """relu(bn(conv(x))), biased, "same" padding for inputs of `size` (height, width)."""

    def __init__(
        self, inputs: int, outputs: int, size: Pair, kernel: Pair = (3, 3), stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        top_bottom, left_right = (same_padding(n, k, stride) for n, k in zip(size, kernel, strict=True))
        self.pad = left_right + top_bottom
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(same_pad(x, self.pad))))


class Pointwise(nn.Module):
    """relu(bn(conv(x))), biased, 1 × 1."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def separable(inputs: int, outputs: int, size: Pair, stride: int = 1) -> nn.Sequential:
    """A 3 × 3 convolution of every channel by itself, then a 1 × 1 across the channels."""
    return nn.Sequential(ConvBNReLU(inputs, inputs, size, stride=stride, groups=inputs), Pointwise(inputs, outputs))


class DSCNN(nn.Module):
    """Keyword spotting on (N, 1, 49, 10) MFCC maps (Zhang et al., "Hello Edge", 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBNReLU(1, 64, size=(49, 10), kernel=(10, 4), stride=2)
        self.blocks = nn.Sequential(*(separable(64, 64, size=(25, 5)) for _ in range(4)))
        self.fc = nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.fc(x[:, :, :24].mean((2, 3)))  # the pooling window is 24 × 5 and leaves the last step out


class MobileNetV1(nn.Module):
    """Person or not on (N, 3, 96, 96) images; width 0.25 (Howard et al., "MobileNets", 2017)."""

    widths = (16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256)
    halved_at = (1, 3, 5, 11)

    def __init__(self) -> None:
        super().__init__()
        size, channels = 96, 8
        self.stem = ConvBNReLU(3, channels, (size, size), stride=2)
        size = same_output(size, 2)
        blocks = []
        for i, width in enumerate(self.widths):
            stride = 2 if i in self.halved_at else 1
            blocks.append(separable(channels, width, (size, size), stride))
            size, channels = same_output(size, stride), width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class WakeWordNet(nn.Module):
    """One wake word on (N, 40, 30) spectrograms, channel × time: four unpadded separable 1-D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        shapes = ((40, 128, 3), (128, 128, 5), (128, 128, 10), (128, 32, 15))
        self.blocks = nn.Sequential(*(self._block(*shape) for shape in shapes))
        self.fc = nn.Linear(32, 3)

    @staticmethod
    def _block(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv1d(inputs, inputs, kernel, groups=inputs, bias=False),
            nn.Conv1d(inputs, outputs, 1, bias=False),
            nn.BatchNorm1d(outputs, eps=1e-3),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).squeeze(2))
