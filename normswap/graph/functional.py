"""Reads a call of ``batch_norm`` in a user's forward: which tensors it takes, and how."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from normswap.graph.ops import STATISTICS_CALLS, norm_argument
from normswap.norms import is_convertible
from normswap.norms.functional import FunctionalNorm

__all__ = ["read_functional_norm"]


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
    holder = bool(child) and is_convertible(owner.get_submodule(child))
    return FunctionalNorm(
        child if holder else mean,
        holder,
        (gamma, beta, mean, var),
        bool(constants["training"]),
        None if constants["momentum"] is None else float(constants["momentum"]),
        float(constants["eps"]),
    )
