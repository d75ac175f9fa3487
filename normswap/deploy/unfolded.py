"""What is still to fold in a module: the question that export asks before it writes anything."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from normswap.norms import Affine, deployed

__all__ = ["unfolded"]


def unfolded(module: nn.Module) -> str:
    """Return what is still to fold in the module itself, or an empty string."""
    if parametrize.is_parametrized(module):
        return f"{', '.join(module.parametrizations)} is parametrized"  # type: ignore[arg-type]
    if any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values()):
        return "a torch.nn.utils.weight_norm hook computes its weight"
    answer = deployed(module)
    ours = isinstance(answer, Affine) and answer.otherwise is None
    return f"it is a {type(module).__name__}" if ours else ""
