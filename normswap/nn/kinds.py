"""Which module is a layer, and of which class a module really is."""

from __future__ import annotations

from torch import nn

__all__ = ["LAYERS", "Answering", "class_of", "is_layer"]

LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


class Answering:
    """A base of modules that are no norm and say themselves what becomes of them in a deployed model, as norms do."""

    def deployed(self) -> nn.Module | str:
        """Return the module of torch.nn that computes the same in evaluation, or why there is none."""
        raise NotImplementedError


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the user's or torch's class of ``module``, seen through torch's parametrized classes."""
    for cls in type(module).__mro__:
        if cls.__module__ != "torch.nn.utils.parametrize":
            return cls
    raise AssertionError("a module's classes end in nn.Module")


def is_layer(module: nn.Module) -> bool:
    """Tell whether ``module`` is a convolution, transposed convolution or linear layer."""
    return isinstance(module, LAYERS)
