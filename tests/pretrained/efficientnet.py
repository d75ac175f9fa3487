"""EfficientNet-Lite0: image classification on ImageNet, of inverted residual blocks."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["EfficientNetLite0"]


def convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Module:
    """A convolution without bias and with TensorFlow's "same" padding of an even length."""
    if stride == 1:
        return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    before = (kernel - 2) // 2
    after = kernel - 2 - before
    conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
    return nn.Sequential(nn.ZeroPad2d((before, after, before, after)), conv)


class InvertedResidual(nn.Module):
    """A block of MobileNetV2 (Sandler et al. 2018): expand, depthwise, project, and a shortcut where shapes allow."""

    def __init__(self, inputs: int, outputs: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = inputs * expand
        expanding = [convolution(inputs, width), nn.BatchNorm2d(width, eps=1e-3), nn.ReLU6()] if expand > 1 else []
        self.conv = nn.Sequential(
            *expanding,
            convolution(width, width, kernel, stride, groups=width),
            nn.BatchNorm2d(width, eps=1e-3),
            nn.ReLU6(),
            convolution(width, outputs),
            nn.BatchNorm2d(outputs, eps=1e-3),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class EfficientNetLite0(nn.Module):
    """1000 classes of (N, 3, 224, 224) photographs, (RGB − 127)/128 (Tan & Le 2019, without squeeze-excitation)."""

    rows = (  # expand, channels, repeat, stride of the first, kernel
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 40, 2, 2, 5),
        (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    )

    def __init__(self) -> None:
        super().__init__()
        channels = 32
        self.stem = nn.Sequential(convolution(3, channels, 3, 2), nn.BatchNorm2d(channels, eps=1e-3), nn.ReLU6())
        blocks = []
        for expand, outputs, repeat, first, kernel in self.rows:
            for stride in (first, *(1,) * (repeat - 1)):
                blocks.append(InvertedResidual(channels, outputs, expand, kernel, stride))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(convolution(channels, 1280), nn.BatchNorm2d(1280, eps=1e-3), nn.ReLU6())
        self.fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.head(self.blocks(self.stem(x))).mean((2, 3)))
