"""Speech enhancement with grouped convolutions and recurrences (Rong et al., "GTCRN", ICASSP 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GTCRN"]

LOW, BANDS, BINS = (
    65,
    64,
    257,
)  # bins kept as they are, bands for the other 192, bins of a 512-point transform


def with_neighbours(x: Tensor) -> Tensor:
    """(N, C, T, F) to (N, 3C, T, F): every channel with its bins shifted by −1, 0 and 1."""
    padded = F.pad(x, (1, 1))
    return torch.stack((padded[..., :-2], x, padded[..., 2:]), 2).flatten(1, 2)


class Bands(nn.Module):
    """Fixed linear maps between the bins above `LOW` and bands of equal perceived width."""

    def __init__(self) -> None:
        super().__init__()
        self.erb_fc = nn.Linear(BINS - LOW, BANDS, bias=False)
        self.ierb_fc = nn.Linear(BANDS, BINS - LOW, bias=False)

    def merge(self, x: Tensor) -> Tensor:
        return torch.cat((x[..., :LOW], self.erb_fc(x[..., LOW:])), -1)

    def split(self, x: Tensor) -> Tensor:
        return torch.cat((x[..., :LOW], self.ierb_fc(x[..., LOW:])), -1)


class ConvBlock(nn.Module):
    """act(bn(conv(x))), 1 × 5, half as many bins (twice as many where transposed)."""

    def __init__(
        self, inputs: int, outputs: int, groups: int = 1, transposed: bool = False, last: bool = False
    ) -> None:
        super().__init__()
        layer = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.conv = layer(inputs, outputs, (1, 5), (1, 2), (0, 2), groups=groups)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.Tanh() if last else nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class TemporalAttention(nn.Module):
    """x times σ(W GRU(mean over the bins of x²))"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.att_gru = nn.GRU(channels, 2 * channels, batch_first=True)
        self.att_fc = nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        energy = x.square().mean(3).transpose(1, 2)
        gate = torch.sigmoid(self.att_fc(self.att_gru(energy)[0]))
        return x * gate.transpose(1, 2).unsqueeze(3)


class GroupedTemporalBlock(nn.Module):
    """A causal, dilated, depthwise-separable block on half of the channels; then both halves interleaved."""

    def __init__(self, dilation: int, transposed: bool = False) -> None:
        super().__init__()
        layer = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.past = 2 * dilation
        # A transposed convolution lengthens its input: what it adds is cut off again by its own padding.
        padding = (self.past if transposed else 0, 1)
        self.point_conv1 = layer(24, 16, 1)
        self.point_bn1 = nn.BatchNorm2d(16)
        self.point_act = nn.PReLU()
        self.depth_conv = layer(16, 16, 3, padding=padding, groups=16, dilation=(dilation, 1))
        self.depth_bn = nn.BatchNorm2d(16)
        self.depth_act = nn.PReLU()
        self.point_conv2 = layer(16, 8, 1)
        self.point_bn2 = nn.BatchNorm2d(8)
        self.tra = TemporalAttention(8)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        y = self.point_act(self.point_bn1(self.point_conv1(with_neighbours(first))))
        y = self.depth_act(self.depth_bn(self.depth_conv(F.pad(y, (0, 0, self.past, 0)))))
        y = self.tra(self.point_bn2(self.point_conv2(y)))
        return torch.stack((y, second), 2).flatten(1, 2)


class GroupedGRU(nn.Module):
    """One GRU for each half of the features."""

    def __init__(self, inputs: int, hidden: int, bidirectional: bool = False) -> None:
        super().__init__()
        self.rnn1 = nn.GRU(inputs // 2, hidden // 2, batch_first=True, bidirectional=bidirectional)
        self.rnn2 = nn.GRU(inputs // 2, hidden // 2, batch_first=True, bidirectional=bidirectional)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 2)
        return torch.cat((self.rnn1(first)[0], self.rnn2(second)[0]), 2)


class DualPath(nn.Module):
    """Recurrence over the bins of a frame in both directions, then over the frames of a bin."""

    def __init__(self) -> None:
        super().__init__()
        self.intra_rnn = GroupedGRU(16, 8, bidirectional=True)
        self.intra_fc = nn.Linear(16, 16)
        self.intra_ln = nn.LayerNorm((33, 16), eps=1e-8)
        self.inter_rnn = GroupedGRU(16, 16)
        self.inter_fc = nn.Linear(16, 16)
        self.inter_ln = nn.LayerNorm((33, 16), eps=1e-8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (N, T, F, C)
        x = x + self.intra_ln(self.intra_fc(self.intra_rnn(x.flatten(0, 1))).reshape_as(x))
        frames = x.transpose(1, 2)
        y = self.inter_fc(self.inter_rnn(frames.flatten(0, 1))).reshape_as(frames).transpose(1, 2)
        return (x + self.inter_ln(y)).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = (ConvBlock(9, 16), ConvBlock(16, 16, groups=2), *map(GroupedTemporalBlock, (1, 2, 5)))
        self.en_convs = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for block in self.en_convs:
            x = block(x)
            outputs.append(x)
        return outputs


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.de_convs = nn.ModuleList(
            (
                *(GroupedTemporalBlock(dilation, transposed=True) for dilation in (5, 2, 1)),
                ConvBlock(16, 16, groups=2, transposed=True),
                ConvBlock(16, 2, transposed=True, last=True),
            )
        )

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        for block, skip in zip(self.de_convs, reversed(skips), strict=True):
            x = block(x + skip)
        return x


class GTCRN(nn.Module):
    """(N, 2, T, 257) spectra, real and imaginary part, to those of the speech in them, by a complex mask."""

    def __init__(self) -> None:
        super().__init__()
        self.erb = Bands()
        self.encoder = Encoder()
        self.dpgrnn1 = DualPath()
        self.dpgrnn2 = DualPath()
        self.decoder = Decoder()

    def forward(self, spectrum: Tensor) -> Tensor:
        real, imaginary = spectrum[:, 0], spectrum[:, 1]
        magnitude = torch.sqrt(real.square() + imaginary.square() + 1e-12)
        features = torch.stack((magnitude, real, imaginary), 1)
        skips = self.encoder(with_neighbours(self.erb.merge(features)))
        mask = self.erb.split(self.decoder(self.dpgrnn2(self.dpgrnn1(skips[-1])), skips))
        a, b = mask[:, 0], mask[:, 1]
        return torch.stack((real * a - imaginary * b, real * b + imaginary * a), 1)
