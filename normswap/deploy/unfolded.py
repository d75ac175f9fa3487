"""What is still to fold in a model, and which of its modules only normswap has."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from normswap.nn import ChannelLayerNorm

__all__ = ["is_own", "unfolded"]

KEPT_BY_FOLD = (ChannelLayerNorm,)
"""Plain modules without parametrizations that have no equal in torch.nn."""


def unfolded(module: nn.Module) -> str:
    """Return what is still to fold in the module itself, or an empty string."""
    if parametrize.is_parametrized(module):
        return f"{', '.join(module.parametrizations)} is parametrized"  # type: ignore[arg-type]
    if any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values()):
        return "a torch.nn.utils.weight_norm hook computes its weight"
    return f"it is a {type(module).__name__}" if is_own(module) and not isinstance(module, KEPT_BY_FOLD) else ""


def is_own(module: nn.Module) -> bool:
    """Tell whether the module's class, or one that it derives from, is of this package and not of its demo."""
    names = [cls.__module__.split(".") for cls in type(module).__mro__]
    return any(name[0] == "normswap" and name[1:2] != ["demo"] for name in names)
