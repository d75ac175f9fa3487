"""Pitch of a waveform (Kim et al., "CREPE: A Convolutional Representation for Pitch Estimation", 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .padding import same_pad

__all__ = ["CrepeTiny"]


class CrepeTiny(nn.Module):
    """(N, 1024) frames to the activations (N, 360) of pitch bins; each norm comes *after* its ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 128, (512, 1), (4, 1))
        self.conv1_BN = nn.BatchNorm2d(128, eps=1e-3)
        self.conv2 = nn.Conv2d(128, 16, (64, 1))
        self.conv2_BN = nn.BatchNorm2d(16, eps=1e-3)
        self.conv3 = nn.Conv2d(16, 16, (64, 1))
        self.conv3_BN = nn.BatchNorm2d(16, eps=1e-3)
        self.conv4 = nn.Conv2d(16, 16, (64, 1))
        self.conv4_BN = nn.BatchNorm2d(16, eps=1e-3)
        self.conv5 = nn.Conv2d(16, 32, (64, 1))
        self.conv5_BN = nn.BatchNorm2d(32, eps=1e-3)
        self.conv6 = nn.Conv2d(32, 64, (64, 1))
        self.conv6_BN = nn.BatchNorm2d(64, eps=1e-3)
        self.classifier = nn.Linear(256, 360)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames[:, None, :, None]
        x = self._layer(x, self.conv1, self.conv1_BN, before=254, after=254)
        x = self._layer(x, self.conv2, self.conv2_BN)
        x = self._layer(x, self.conv3, self.conv3_BN)
        x = self._layer(x, self.conv4, self.conv4_BN)
        x = self._layer(x, self.conv5, self.conv5_BN)
        x = self._layer(x, self.conv6, self.conv6_BN)
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))

    @staticmethod
    def _layer(x: Tensor, conv: nn.Module, norm: nn.Module, before: int = 31, after: int = 32) -> Tensor:
        x = norm(F.relu(conv(same_pad(x, (0, 0, before, after)))))
        return F.max_pool2d(x, (2, 1))
