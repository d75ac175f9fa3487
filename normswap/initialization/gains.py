"""What a layer's output is proportional to: its weight or, where that is parametrized, the gains of its filters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm

from normswap.nn import FilterLayout, FilterWeightNorm, ScalarMultiplier, WeightStandardization

__all__ = ["Gains", "gains_of"]


@dataclass(frozen=True)
class Gains:
    """The tensor that holds a layer's filters' directions, and those that its output is proportional to.

    Args:
        direction: The directions.
        gains: What the output is proportional to, the directions themselves in a plain weight.
        logarithms: Whether the gains are stored as their logarithms.
    """

    direction: Tensor
    gains: tuple[Tensor, ...]
    logarithms: bool = False

    def reset(self) -> None:
        """Make the first gain one, in place; a plain weight stays."""
        for gain in self.gains[:1]:
            if gain is not self.direction:
                gain.fill_(0.0 if self.logarithms else 1.0)

    def multiply(self, layout: FilterLayout, factor: Tensor) -> None:
        """Multiply the layer's filters by ``factor``, in place. ``(C,)``"""
        for tensor in self.gains:
            own = factor.to(tensor.dtype)
            if tensor is self.direction:
                tensor.mul_(layout.per_output(tensor, own))
            elif self.logarithms:
                tensor.add_(own.log())
            else:
                tensor.mul_(own.view(_like(tensor)))


def gains_of(layer: nn.Module, name: str = "weight") -> Gains:
    """Return the tensors of ``layer``, whichever way its weight of this name is written."""
    if isinstance(layer._parameters.get(f"{name}_g"), Tensor):  # torch's older weight norm, a hook
        return Gains(getattr(layer, f"{name}_v"), (getattr(layer, f"{name}_g"),))
    if not parametrize.is_parametrized(layer, name):
        weight = getattr(layer, name)
        assert isinstance(weight, Tensor)
        return Gains(weight, (weight,))
    originals = layer.get_submodule(f"parametrizations.{name}")
    assert isinstance(originals, parametrize.ParametrizationList)
    tensors = [
        getattr(originals, n) for n in ("original", "original0", "original1", "original2") if hasattr(originals, n)
    ]
    kind = originals[0]
    if isinstance(kind, (_WeightNorm, FilterWeightNorm)):
        return Gains(tensors[1], (tensors[0],), getattr(kind, "log_gain", False))
    if isinstance(kind, ScalarMultiplier):
        return Gains(tensors[1], (tensors[1],))
    return Gains(tensors[0], tuple(tensors[1:]) if isinstance(kind, WeightStandardization) else ())


def _like(g: Tensor) -> list[int]:
    """Return the shape in which one value per channel fits ``g``: all its axes are 1 but one."""
    return [-1 if size > 1 else 1 for size in g.shape] if g.numel() > 1 else list(g.shape)
