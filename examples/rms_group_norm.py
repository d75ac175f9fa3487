"""A norm and a recipe of your own, in one file outside of normswap: root mean square normalization over groups.

    y = γ x / sqrt(mean_g(x²) + eps) + β,  mean_g over each group of channels and all positions of a sample

Run it: it swaps the BatchNorms of a small network, absorbs and matches, lets the data choose the groups, saves, loads,
folds, exports and verifies. Nothing of normswap is edited for it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import normswap as ns
from normswap.norms import Encoding, Incoming, Norm
from normswap.recipes.base import GroupedRecipe
from normswap.records import Site


class RMSGroupNorm(nn.Module):
    """The module that stands in the converted network. Shape: ``(N, C, ...)`` to the same."""

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight = nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Divide each group by its root mean square."""
        grouped = x.unflatten(1, (self.num_groups, -1)).flatten(2)
        normalized = grouped * (grouped.square().mean(2, keepdim=True) + self.eps).rsqrt()
        shape = (1, -1, *(1,) * (x.ndim - 2))
        return normalized.view(x.shape) * self.weight.view(shape) + self.bias.view(shape)


@dataclass(frozen=True)
class RMSGroups(Norm):
    """What normswap has to know of it."""

    num_groups: int
    eps: float

    modules = (RMSGroupNorm,)
    removes_mean = False

    @property
    def groups(self) -> int:
        """The number of groups."""
        return self.num_groups

    def build(self, site: Site, like: Tensor) -> nn.Module:
        """Return the module, fresh."""
        return RMSGroupNorm(self.num_groups, site.num_features, self.eps, like.device, like.dtype)

    def encode(self, incoming: Incoming) -> Encoding:
        """Return γ' and β' with which the norm, at its expected statistics, does what the BatchNorm did."""
        _, square = incoming.over_groups(self.num_groups)
        return incoming.affine((square + self.eps).sqrt(), torch.zeros_like(square))

    def __str__(self) -> str:
        return f"RMSGroupNorm, {self.num_groups} group{'s' if self.num_groups > 1 else ''}"


@dataclass(frozen=True)
class RMSGroupNormalization(GroupedRecipe):
    """Root mean square normalization over groups, in the BatchNorm's place; the weights stay plain."""

    name = "rms"
    equation = "γ x/sqrt(mean_g x² + eps) + β"
    paper = "Zhang & Sennrich 2019, over groups"
    exact = False

    def norm(self, site: Site, num_groups: int | None) -> Norm:
        """Return what stands in the BatchNorm's place."""
        assert num_groups is not None
        return RMSGroups(num_groups, site.eps if self.eps is None else self.eps)


def main() -> None:
    """Put the recipe through everything that normswap does."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    images = torch.randn(256, 3, 16, 16) + torch.randn(256, 3, 1, 1)
    for _ in range(20):  # the BatchNorms see the data
        model(images)
    model.eval()

    absorbed = ns.convert(model, RMSGroupNormalization(), example_inputs=images[:2])
    matched = ns.convert(model, RMSGroupNormalization(num_groups="auto"), calibration=images)
    print(matched.plan)
    with torch.no_grad():
        expected = model(images)
        for name, found in (("absorbed", absorbed.model), ("matched", matched.model)):
            error = (found(images) - expected).norm() / expected.norm()
            print(f"{name}: relative error of the output {float(error):.3f}")

    with tempfile.TemporaryDirectory() as folder:
        ns.save(matched.model, Path(folder) / "rms.safetensors")
        loaded = ns.load(Path(folder) / "rms.safetensors", recipe=RMSGroupNormalization(num_groups="auto"))
        folding = ns.fold_with_report(loaded.eval(), example_inputs=images[:2])
        print(folding)
        artifact = ns.export_onnx(folding.model, Path(folder) / "rms.onnx", example_inputs=images[:2])
        print(artifact.verification)


if __name__ == "__main__":
    main()
