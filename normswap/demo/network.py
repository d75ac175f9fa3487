"""The demo network: an ordinary residual network with BatchNorm, written as a user would write it."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["DigitsResNet", "ResidualBlock"]


class ResidualBlock(nn.Module):
    """``y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``.

    The shortcut is the identity, or a 1×1 convolution with BatchNorm where the shape changes.

    Shapes:
        ``(N, in_channels, H, W)`` → ``(N, out_channels, H/stride, W/stride)``

    Args:
        in_channels: channels of the input
        out_channels: channels of the output
        stride: stride of ``conv1`` and of the shortcut

    He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), figure 2, option B.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the two convolutions and add the shortcut."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + self.shortcut(x))
        return out


class DigitsResNet(nn.Module):
    """A stem, one residual block for each of 16, 32 and 64 channels, global average pooling, a linear head.

    77,754 parameters, nine convolutions, each with a BatchNorm.

    Shapes:
        images ``(N, 1, 8, 8)`` in [0, 1] → logits ``(N, 10)``; the stages run at 8×8, 4×4 and 2×2

    He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), the CIFAR-10 network of
    section 4.2 at n = 1, with shortcuts of option B.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = ResidualBlock(16, 16)
        self.layer2 = ResidualBlock(16, 32, stride=2)
        self.layer3 = ResidualBlock(32, 64, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the ten classes."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits
