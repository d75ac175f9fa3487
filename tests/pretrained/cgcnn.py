"""Energies of crystals (Xie & Grossman, "Crystal Graph Convolutional Neural Networks", PRL 120, 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CGCNN"]

NEIGHBOURS = 12
MEAN, STD = -1.699178719088435, 1.0563029540802564  # of the training targets, in eV/atom
STEP = 0.2  # Å between the centres of the distance features


class GraphConv(nn.Module):
    """x_i ← softplus(x_i + bn(Σ_j σ(g_ij) · softplus(c_ij))), with (g_ij, c_ij) = bn(W [x_i, x_j, e_ij])"""

    def __init__(self, features: int = 64, edges: int = 41) -> None:
        super().__init__()
        self.fc_full = nn.Linear(2 * features + edges, 2 * features)
        self.bn1 = nn.BatchNorm1d(2 * features)
        self.bn2 = nn.BatchNorm1d(features)

    def forward(self, x: Tensor, edges: Tensor, neighbours: Tensor) -> Tensor:
        own = x.repeat_interleave(NEIGHBOURS, 0)
        pairs = torch.cat((own, x[neighbours.flatten()], edges.flatten(0, 1)), 1)
        gate, core = self.bn1(self.fc_full(pairs)).chunk(2, 1)
        messages = torch.sigmoid(gate) * F.softplus(core)
        return F.softplus(x + self.bn2(messages.unflatten(0, (-1, NEIGHBOURS)).sum(1)))


class CGCNN(nn.Module):
    """Formation energies (crystals,) in eV/atom.

    Args of forward:
        atoms: (atoms, 92) element features.
        distances: (atoms, 12) to the nearest neighbours, in Å.
        neighbours: (atoms, 12) their rows.
        pooling: (crystals, atoms), 1/n at the atoms of a crystal.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centres", STEP * torch.arange(41), persistent=False)
        self.embedding = nn.Linear(92, 64)
        self.convs = nn.ModuleList(GraphConv() for _ in range(4))
        self.conv_to_fc = nn.Linear(64, 32)
        self.fc_out = nn.Linear(32, 1)

    def forward(self, atoms: Tensor, distances: Tensor, neighbours: Tensor, pooling: Tensor) -> Tensor:
        edges = torch.exp(-(((distances.unsqueeze(-1) - self.centres) / STEP) ** 2))
        x = self.embedding(atoms)
        for conv in self.convs:
            x = conv(x, edges, neighbours)
        x = F.softplus(self.conv_to_fc(F.softplus(pooling @ x)))
        return STD * self.fc_out(x).squeeze(1) + MEAN
