"""A BatchNorm that is no module: a call of ``batch_norm`` with tensors of the module that makes it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from normswap.norms.records import NormState

__all__ = ["FunctionalNorm"]


@dataclass(frozen=True)
class FunctionalNorm:
    """One functional norm of a module.

    Args:
        name: Its name within the owning module: the child that holds its tensors where that is a BatchNorm, else
            the attribute that holds its running mean.
        holder: Whether ``name`` is such a child.
        tensors: The attributes, within the owner, of (γ, β, μ, var); None for those not given.
        training: The flag, as the forward gave it in this run.
        momentum: The momentum.
        eps: The eps.
    """

    name: str
    holder: bool
    tensors: tuple[str | None, str | None, str | None, str | None]
    training: bool
    momentum: float | None
    eps: float

    def read(self, owner: nn.Module, *, frozen: bool = False) -> NormState:
        """Return the norm's values, read from ``owner``. Tensors are not copied."""
        tensors = self.tensors_of(owner)
        given = (tensors.get("weight"), tensors.get("bias"), tensors.get("running_mean"), tensors.get("running_var"))
        return NormState.of(None, given, eps=self.eps, momentum=self.momentum, frozen=frozen)

    def tensors_of(self, owner: nn.Module) -> dict[str, Tensor]:
        """Return the norm's tensors by the names that they have in a BatchNorm."""
        names = zip(("weight", "bias", "running_mean", "running_var"), self.tensors, strict=True)
        return {name: _attribute(owner, path) for name, path in names if path is not None}


def _attribute(owner: nn.Module, name: str) -> Tensor:
    child, _, attribute = name.rpartition(".")
    value = getattr(owner.get_submodule(child) if child else owner, attribute)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is not a tensor")
    return value
