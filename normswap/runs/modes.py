"""Which modules are in train mode."""

from __future__ import annotations

from torch import nn

__all__ = ["training_modules"]


def training_modules(model: nn.Module) -> list[str]:
    """Return the fqns of the modules in train mode.

    An exported program has no modes, and a module without a forward none that means anything (a GraphModule's copy has
    such in train mode, whatever the original's).
    """
    if "train" in vars(model):  # torch.export overrides it in the instance: calling it raises
        return []
    return [fqn for fqn, module in model.named_modules() if module.training and type(module) is not nn.Module]
