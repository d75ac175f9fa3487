"""One vocabulary: which module or call is a layer, a norm or neither, however the user wrote it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.export._unlift import GuardsFn

from normswap.nn import RankCheck
from normswap.nn.kinds import LAYERS, class_of, is_layer
from normswap.norms import norm_of
from normswap.operations.table import TABLE, lifted_from, named, of_call, of_module

__all__ = [
    "LAYER_CALLS",
    "STATISTICS_CALLS",
    "is_functional_norm",
    "is_leaf",
    "norm_argument",
    "order_of",
    "passes_through",
]

_LAYERS = tuple(row for row in TABLE.rows if set(row.modules) & set(LAYERS))
LAYER_CALLS: frozenset[Any] = lifted_from(*_LAYERS).union(*(row.functions for row in _LAYERS))
"""The functions that apply a convolution or a linear layer to a weight that they are given."""
STATISTICS_CALLS: frozenset[Any] = frozenset(
    overload for overload in lifted_from(named("batch_norm")) if len(overload._schema.returns) > 1
)
"""The functions that return the statistics of a batch norm, too."""
_BATCH_NORM_CALLS = lifted_from(named("batch_norm")).union(named("batch_norm").functions)
_BATCH_NORM_PARAMETERS = (
    "input",
    "running_mean",
    "running_var",
    "weight",
    "bias",
    "training",
    "momentum",
    "eps",
)
# torch.batch_norm takes its tensors in another order than F.batch_norm.
_ATEN_PARAMETERS = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")


def is_leaf(module: nn.Module) -> bool:
    """Tell whether a call of ``module`` is one step of the dataflow: a layer, a norm or another module of torch.nn.

    So is a module that the table of operations knows, and a program's check of its inputs' sizes.
    """
    known = norm_of(module) is not None or of_module(module) is not None
    if is_layer(module) or known or isinstance(module, GuardsFn):
        return True
    cls = class_of(module)
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    ours = cls.__module__.startswith("normswap.nn.")
    torchs = cls.__module__.startswith(("torch.nn.", "torch.ao.nn.")) and cls is not nn.Module
    return ours or (torchs and not isinstance(module, containers))


def is_functional_norm(node: fx.Node) -> bool:
    """Tell whether ``node`` is a call of ``batch_norm``."""
    return node.op == "call_function" and node.target in _BATCH_NORM_CALLS


def norm_argument(node: fx.Node, name: str) -> Any:
    """Return the argument ``name`` of a ``batch_norm`` call, None where it was not given."""
    if name in node.kwargs:
        return node.kwargs[name]
    order = _BATCH_NORM_PARAMETERS if node.target is F.batch_norm else _ATEN_PARAMETERS
    place = order.index(name)
    if place < len(node.args):
        return node.args[place]
    return {"training": False, "momentum": 0.1, "eps": 1e-5}.get(name)


def passes_through(node: fx.Node, module: nn.Module | None) -> bool:
    """Tell whether ``node``'s output is its first argument, value for value and axis for axis."""
    if node.op == "call_module":
        return type(module) in (nn.Identity, RankCheck)
    return node.op == "call_method" and node.target == "contiguous"


def order_of(node: fx.Node, module: nn.Module | None, rank: int | None) -> tuple[int, ...] | None:
    """Return, for each axis of ``node``'s value, which axis of its first argument it is; None where it does more.

    Args:
        node: A call.
        module: The module that it calls, if any.
        rank: How many axes its value has, None where that is not known: then only what moves none counts.
    """
    if passes_through(node, module):
        return tuple(range(rank or 0))
    operation = of_call(node)
    if rank is None or operation is None or operation.order is None:
        return None
    arguments = operation.bind(node.args, node.kwargs)
    return None if arguments is None else operation.order(arguments, rank)
