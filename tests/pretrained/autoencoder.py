"""Anomaly detection by reconstruction error (Koizumi et al., DCASE 2020 task 2 baseline)."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Autoencoder"]


class Autoencoder(nn.Module):
    """(N, 640) log-mel windows to their reconstruction, through a code of eight numbers."""

    widths = (640, 128, 128, 128, 128, 8, 128, 128, 128, 128)

    def __init__(self) -> None:
        super().__init__()
        pairs = zip(self.widths, self.widths[1:], strict=False)
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b, eps=1e-3), nn.ReLU()) for a, b in pairs)
        )
        self.out = nn.Linear(self.widths[-1], self.widths[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(x))
