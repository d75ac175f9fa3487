"""Reads a call of ``batch_norm`` in a user's forward: which tensors it takes, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from normswap.graph.after_norm import BatchNormState, batch_norm_state
from normswap.graph.ops import STATISTICS_CALLS, is_norm, norm_argument

__all__ = ["FunctionalNorm", "read_functional_norm"]


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

    def state(self, owner: nn.Module, *, frozen: bool = False) -> BatchNormState:
        """Return the norm's values, read from ``owner``."""
        gamma, beta, mean, var = (None if name is None else _attribute(owner, name) for name in self.tensors)
        return batch_norm_state(None, (gamma, beta, mean, var), eps=self.eps, momentum=self.momentum, frozen=frozen)


def read_functional_norm(node: fx.Node, owner: nn.Module, prefix: str) -> FunctionalNorm | str:
    """Read a ``batch_norm`` call.

    Args:
        node: The call.
        owner: The module whose own forward calls it.
        prefix: The owner's fqn within the node's graph, '' for its root.

    Returns:
        The norm, or the reason why it cannot be replaced.
    """
    if node.target in STATISTICS_CALLS:
        return "its call returns the batch's statistics, too, and more than its output may be used"
    names: list[str | None] = []
    for argument in ("weight", "bias", "running_mean", "running_var"):
        value = norm_argument(node, argument)
        if value is None:
            names.append(None)
            continue
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return f"its {argument} is computed in the forward"
        target = str(value.target)
        if prefix and not target.startswith(prefix + "."):
            return f"its {argument} belongs to another module"
        names.append(target.removeprefix(prefix + ".") if prefix else target)
    constants: dict[str, Any] = {}
    for argument in ("training", "momentum", "eps"):
        constants[argument] = norm_argument(node, argument)
        if isinstance(constants[argument], fx.Node):
            return f"its {argument} is computed in the forward"
    gamma, beta, mean, var = names
    if mean is None or var is None:
        return "it stores no running statistics, so there is nothing to take over"
    child = mean.rpartition(".")[0]
    holder = bool(child) and is_norm(owner.get_submodule(child))
    return FunctionalNorm(
        child if holder else mean,
        holder,
        (gamma, beta, mean, var),
        bool(constants["training"]),
        None if constants["momentum"] is None else float(constants["momentum"]),
        float(constants["eps"]),
    )


def _attribute(owner: nn.Module, name: str) -> Tensor:
    child, _, attribute = name.rpartition(".")
    value = getattr(owner.get_submodule(child) if child else owner, attribute)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is no tensor")
    return value
