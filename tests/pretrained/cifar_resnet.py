"""ResNets for 32 × 32 images (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, 4.2)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .padding import same_pad, same_padding

__all__ = ["CifarResNet", "ResNet8", "ResNet20", "ResNet32"]


class PaddedShortcut(nn.Module):
    """Option A: every second pixel, and zeros for the new channels, half of them in front; no parameters."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.pad = new_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))"""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else PaddedShortcut(outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """6n + 2 layers: three stages of n blocks with 16, 32 and 64 channels."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [BasicBlock(outputs, outputs) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class ResNet20(CifarResNet):
    def __init__(self) -> None:
        super().__init__(blocks=3)


class ResNet32(CifarResNet):
    def __init__(self) -> None:
        super().__init__(blocks=5)


class ConvBN(nn.Module):
    """A biased 3 × 3 convolution with "same" padding, and its norm."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.pad = 2 * same_padding(size, 3, stride)
        self.conv = nn.Conv2d(inputs, outputs, 3, stride)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(same_pad(x, self.pad)))


class ResNet8(nn.Module):
    """The image classifier of MLPerf Tiny; inputs are raw, 0..255 (Banbury et al., NeurIPS 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(3, 16, 32)
        self.s1a, self.s1b = ConvBN(16, 16, 32), ConvBN(16, 16, 32)
        self.s2a, self.s2b = ConvBN(16, 32, 32, stride=2), ConvBN(32, 32, 16)
        self.s2skip = nn.Conv2d(16, 32, 1, stride=2)
        self.s3a, self.s3b = ConvBN(32, 64, 16, stride=2), ConvBN(64, 64, 8)
        self.s3skip = nn.Conv2d(32, 64, 1, stride=2)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.s1b(F.relu(self.s1a(x))) + x)
        x = F.relu(self.s2b(F.relu(self.s2a(x))) + self.s2skip(x))
        x = F.relu(self.s3b(F.relu(self.s3a(x))) + self.s3skip(x))
        return self.fc(x.mean((2, 3)))
