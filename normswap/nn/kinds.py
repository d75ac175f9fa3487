"""Which module is a layer, and of which class a module really is."""

from __future__ import annotations

from torch import nn

__all__ = ["LAYERS", "class_of", "is_layer"]

LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the user's or torch's class of ``module``, seen through torch's parametrized classes."""
    for cls in type(module).__mro__:
        if cls.__module__ != "torch.nn.utils.parametrize":
            return cls
    raise AssertionError("a module's classes end in nn.Module")


def is_layer(module: nn.Module) -> bool:
    """Tell whether ``module`` is a convolution, transposed convolution or linear layer."""
    return isinstance(module, LAYERS)
