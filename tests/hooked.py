"""Models with every kind of parametrization and hook: a module that a command can be given as an architecture."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

__all__ = ["HOOKS", "KINDS", "LEGACY", "count", "net", "old_spectral_norm", "old_weight_norm", "pruned"]


class Doubled(nn.Module):
    """A user's own parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Noisy(nn.Module):
    """One whose value changes from one reading to the next."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is deprecated
        return weight_norm(layer)


def old_spectral_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return spectral_norm(layer)


def pruned(layer: nn.Module) -> nn.Module:
    """``layer`` without the smallest half of its weights."""
    return prune.l1_unstructured(layer, "weight", 0.5)


def count(module: nn.Module, args: Any) -> None:
    """A hook of a user's that computes no weight."""
    module.__dict__["count"] = module.__dict__.get("count", 0) + 1


def parametrized(kind: type[nn.Module]) -> Callable[[nn.Module], Any]:
    return lambda layer: parametrize.register_parametrization(layer, "weight", kind())


KINDS: dict[str, Callable[[Any], Any]] = {
    "weight norm, legacy": old_weight_norm,
    "weight norm": parametrizations.weight_norm,
    "spectral norm, legacy": spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "a user's": parametrized(Doubled),
    "two in a row": lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer)),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned filters": lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=0),
    "pruned twice": lambda layer: prune.random_unstructured(prune.l1_unstructured(layer, "weight", 0.5), "weight", 0.3),
    "pruned bias": lambda layer: prune.l1_unstructured(spectral_norm(layer), "bias", 0.5),
    "pruned direction": lambda layer: prune.l1_unstructured(old_weight_norm(layer), "weight_v", 0.5),
    "noisy": parametrized(Noisy),
    "a user's hook": lambda layer: layer.register_forward_pre_hook(count),
}
HOOKS = ["weight norm, legacy", "spectral norm, legacy", *(kind for kind in KINDS if kind.startswith("pruned"))]
"""The kinds that are torch's hooks."""
LEGACY = ("_orig", "_mask", "_g", "_v", "_u")
"""How the names of the tensors end that such hooks compute from."""


def net(kind: str = "", place: int = 0) -> nn.Module:
    """Return a trained model whose first layer, in front of a BatchNorm, or last layer, with none, is of ``kind``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
        model[1].weight.uniform_(0.5, 2)
        model[1].bias.normal_()
    if kind:
        KINDS[kind](model[place])
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 9, 9))  # a step of spectral norm's power iteration
    return model.eval()
