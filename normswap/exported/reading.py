"""Reading ATen calls: which calls of a program a module of torch.nn computes, with which tensors and settings."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from normswap.graph.ops import LAYER_CALLS
from normswap.operations.table import lifted_from, named

__all__ = [
    "DROPOUT_CALLS",
    "FEATURE_DROPOUT_CALLS",
    "NORM_CALLS",
    "Call",
    "dropout_call",
    "is_constant",
    "layer_call",
    "norm_call",
    "transposed_weight",
    "writes_to_input",
]

aten = torch.ops.aten
NORM_CALLS = lifted_from(named("batch_norm"))
FEATURE_DROPOUT_CALLS = lifted_from(named("dropout1d"), named("dropout2d"), named("dropout3d"))
DROPOUT_CALLS = lifted_from(named("dropout")) | FEATURE_DROPOUT_CALLS
_TRANSPOSED_CALLS = lifted_from(*(named(f"conv_transpose{axes}d") for axes in (1, 2, 3))) - {aten.convolution.default}
_TENSORS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Call:
    """One call that a module may take the place of.

    Args:
        operation: The call itself.
        result: The node whose value the module is going to compute.
        done: The nodes that go away, users first.
        argument: The name of the operation's argument that is the module's input.
        tensors: The fqns of its tensors by argument, None where one is not given.
        settings: Its other arguments.
    """

    operation: fx.Node
    result: fx.Node
    done: tuple[fx.Node, ...]
    argument: str
    tensors: dict[str, str | None]
    settings: dict[str, Any]

    @property
    def input(self) -> fx.Node:
        """The module's input, as the graph has it now."""
        found = _arguments(self.operation)[self.argument]
        assert isinstance(found, fx.Node)
        return found


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return all arguments of an ATen call by name, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given: dict[str, Any] = {a.name: a.default_value for a in schema if a.has_default_value()}
    given.update(zip((a.name for a in schema), node.args, strict=False))
    return given | node.kwargs


def is_constant(value: Any) -> bool:
    """Tell whether ``value`` holds nothing that a run computes."""
    return not any(isinstance(leaf, (fx.Node, torch.SymInt)) for leaf in pytree.tree_leaves(value))


def _tensor_names(given: dict[str, Any], names: Sequence[str]) -> dict[str, str | None] | None:
    """Return the fqns of the tensor arguments; None where one is computed."""
    found: dict[str, str | None] = {}
    for name in names:
        value = given.get(name)
        if value is not None and not (isinstance(value, fx.Node) and value.op == "get_attr"):
            return None
        found[name] = None if value is None else str(value.target)
    return found


def transposed_weight(node: Any) -> fx.Node | None:
    """Return what ``node`` is the matrix transpose of."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    swaps: dict[Any, tuple[list[Any], ...]] = {
        aten.t.default: ([],),
        aten.permute.default: ([[1, 0]], [[-1, -2]]),
        aten.transpose.int: ([0, 1], [1, 0], [-1, -2], [-2, -1]),
    }
    source = node.args[0] if node.args else None
    rest = [list(a) if isinstance(a, (list, tuple)) else a for a in node.args[1:]]
    return source if isinstance(source, fx.Node) and rest in swaps.get(node.target, ()) else None


def layer_call(node: fx.Node) -> Call | None:
    """Return a call of a convolution or linear layer on tensors of the program; None for any other."""
    argument = "input"
    if node.target in LAYER_CALLS:
        given = _arguments(node)
        if node.target in _TRANSPOSED_CALLS:
            given["transposed"] = True
    elif node.target in (aten.addmm.default, aten.mm.default):
        named = _arguments(node)
        with_bias = node.target is aten.addmm.default
        if with_bias and (named["beta"], named["alpha"]) != (1, 1):
            return None
        argument = "mat1" if with_bias else "self"
        given = {
            "weight": transposed_weight(named["mat2"]),
            "bias": named["self"] if with_bias else None,
        }
    else:
        return None
    tensors = _tensor_names(given, ("weight", "bias"))
    settings = {name: value for name, value in given.items() if name not in ("input", "weight", "bias")}
    if tensors is None or tensors["weight"] is None or not is_constant(settings):
        return None
    return Call(node, node, (node,), argument, tensors, settings)


def norm_call(node: fx.Node) -> Call | None:
    """Return a call of a batch norm that a module can take the place of; None for any other."""
    if node.target not in NORM_CALLS:
        return None
    given = {"training": False, **_arguments(node)}
    tensors = _tensor_names(given, _TENSORS)
    settings = {name: given[name] for name in ("training", "momentum", "eps")}
    if tensors is None or (tensors["running_mean"] is None) != (tensors["running_var"] is None):
        return None
    if (tensors["weight"] is None) != (tensors["bias"] is None) or not any(tensors.values()):
        return None
    if not is_constant(settings) or (tensors["running_mean"] is None and not settings["training"]):
        return None
    found = _first_result(node, tensors)
    if found is None:
        return None
    return Call(node, *found, "input", tensors, settings)


def _first_result(node: fx.Node, tensors: dict[str, str | None]) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """Return the node that holds a call's output, and those that go away with it: the updates of statistics.

    None where something else is made of the call's further results.
    """
    if len(node.target._schema.returns) == 1:  # type: ignore[union-attr]
        return node, (node,)
    result: fx.Node | None = None
    done: list[fx.Node] = []
    updated: dict[Any, str | None] = {3: tensors.get("running_mean"), 4: tensors.get("running_var")}
    for user in node.users:
        if user.target is not operator.getitem:
            return None
        if user.args[1] == 0:
            if result is not None:
                return None
            result = user
            continue
        for write in user.users:
            target = write.args[0]
            if write.target is not aten.copy_.default or write.users or not isinstance(target, fx.Node):
                return None
            if target.op != "get_attr" or target.target != updated.get(user.args[1]):
                return None
            done.append(write)
        done.append(user)
    return None if result is None else (result, (*done, result, node))


def dropout_call(node: fx.Node) -> Call | None:
    """Return a call of a dropout; None for any other."""
    if node.target not in DROPOUT_CALLS:
        return None
    given = _arguments(node)
    settings = {"p": given["p"], "train": given["train"]}
    found = _first_result(node, {})
    if found is None or not is_constant(settings):
        return None
    return Call(node, *found, "self" if writes_to_input(node) else "input", {}, settings)


def writes_to_input(node: fx.Node) -> bool:
    """Tell whether an ATen call works in place."""
    return bool(node.target._schema.is_mutable)  # type: ignore[union-attr]
