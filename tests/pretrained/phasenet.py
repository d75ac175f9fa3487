"""Arrival times of seismic waves (Zhu & Beroza, "PhaseNet", Geophysical Journal International 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .padding import same_output, same_pad, same_padding

__all__ = ["PhaseNet"]

KERNEL, STRIDE = 7, 4


class ConvBNReLU(nn.Module):
    """relu(bn(conv(x))) with "same" padding for inputs of `size` samples."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.pad = same_padding(size, KERNEL, stride)
        self.conv = nn.Conv1d(inputs, outputs, KERNEL, stride, bias=bias)
        self.bn = nn.BatchNorm1d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(same_pad(x, self.pad))))


class UpBNReLU(nn.Module):
    """relu(bn(conv(x))), four times as long, cropped to the skip connection's `size`.

    The network was trained with the crop of "same" padding (1 left, 2 right) between convolution and norm:
    that is `crop_first`. Behind the norm, as one usually writes it, the three border samples enter the
    statistics of a training step and nothing else.
    """

    def __init__(self, inputs: int, outputs: int, coarse: int, size: int, crop_first: bool) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(inputs, outputs, KERNEL, STRIDE, bias=False)
        self.bn = nn.BatchNorm1d(outputs, eps=1e-3)
        self.crop_first = crop_first
        self.same = slice(1, 1 + STRIDE * coarse)
        start = (STRIDE * coarse - size) // 2
        self.centre = slice(start, start + size)

    def forward(self, x: Tensor) -> Tensor:
        if self.crop_first:
            x = F.relu(self.bn(self.conv(x)[:, :, self.same]))
        else:
            x = F.relu(self.bn(self.conv(x)))[:, :, self.same]
        return x[:, :, self.centre]


class PhaseNet(nn.Module):
    """(N, 3, 3000) z-scored waveforms to scores (N, 3, 3000) of noise, P and S: a 1-D U-Net.

    Args:
        size: samples of a waveform.
        crop_first: crop before the norm of an upward layer and not behind it.
    """

    widths = (8, 16, 32, 64, 128)

    def __init__(self, size: int = 3000, crop_first: bool = False) -> None:
        super().__init__()
        sizes = [size]
        for _ in self.widths[1:]:
            sizes.append(same_output(sizes[-1], STRIDE))
        w = self.widths
        self.inp = ConvBNReLU(3, w[0], size, bias=True)
        self.enc = nn.ModuleList(ConvBNReLU(w[max(i - 1, 0)], w[i], sizes[i]) for i in range(5))
        self.down = nn.ModuleList(ConvBNReLU(w[i], w[i], sizes[i], STRIDE) for i in range(4))
        self.up = nn.ModuleList(UpBNReLU(w[i + 1], w[i], sizes[i + 1], sizes[i], crop_first) for i in range(4))
        self.dec = nn.ModuleList(ConvBNReLU(2 * w[i], w[i], sizes[i]) for i in range(4))
        self.out = nn.Conv1d(w[0], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.inp(x), []
        for enc, down in zip(self.enc, self.down, strict=False):  # the deepest encoder has no way down
            skips.append(enc(x))
            x = down(skips[-1])
        x = self.enc[4](x)
        for i in (3, 2, 1, 0):
            x = self.dec[i](torch.cat((skips[i], self.up[i](x)), 1))
        return self.out(x)
