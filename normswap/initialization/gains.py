"""What a layer's output is proportional to: its weight or, where that is parametrized, the gains of its filters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm

from normswap.nn import FilterWeightNorm, WeightStandardization

__all__ = ["Gains", "gains_of", "shape_like"]


@dataclass(frozen=True)
class Gains:
    """The tensor that holds a layer's filters' directions, and those that its output is proportional to."""

    direction: Tensor
    gains: tuple[Tensor, ...]


def gains_of(layer: nn.Module) -> Gains:
    """Return the tensors of ``layer``, whichever way its weight is written."""
    if isinstance(layer._parameters.get("weight_g"), Tensor):  # torch's older weight norm, a hook
        return Gains(layer.weight_v, (layer.weight_g,))  # type: ignore[arg-type]
    if not parametrize.is_parametrized(layer, "weight"):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return Gains(weight, (weight,))
    originals = layer.get_submodule("parametrizations.weight")
    assert isinstance(originals, parametrize.ParametrizationList)
    tensors = [
        getattr(originals, n) for n in ("original", "original0", "original1", "original2") if hasattr(originals, n)
    ]
    kind = originals[0]
    if isinstance(kind, (_WeightNorm, FilterWeightNorm)):
        return Gains(tensors[1], (tensors[0],))
    return Gains(tensors[0], tuple(tensors[1:]) if isinstance(kind, WeightStandardization) else ())


def shape_like(g: Tensor) -> list[int]:
    """Return the shape in which one value per channel fits ``g``: all its axes are 1 but one."""
    return [-1 if size > 1 else 1 for size in g.shape] if g.numel() > 1 else list(g.shape)
