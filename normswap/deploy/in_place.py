"""Operators in place, ``h *= γ``, as operators that give a new tensor where the two give one output.

An operator in place changes every name and view of its tensor. A trace that knows no difference writes ``h = h γ``, and
``r = h; h *= γ; return h + r`` becomes h γ + h. Here the graph has the operators in place at first, and loses those for
which runs on several inputs give the same outputs to the last bit without: dataflow shows what a new tensor depends on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from normswap.runs.guard import untouched
from normswap.runs.settings import seed_generators

__all__ = ["out_of_place"]

_Inputs = Mapping[str, Any]

_NEW: dict[Any, Callable[..., Any]] = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
} | {operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor}


def out_of_place(traced: fx.GraphModule, example: _Inputs, others: Iterable[_Inputs]) -> None:
    """Let operators in place give new tensors where the outputs stay the same.

    Args:
        traced: The graph. It is changed.
        example: Inputs by name, on which it runs.
        others: Inputs on which it may run.
    """
    nodes = [node for node in traced.graph.nodes if node.op == "call_function" and node.target in _NEW]
    if not nodes:
        return
    expected = [(example, _output(traced, example))]
    for one in others:
        with suppress(Exception):  # it does not take such values
            expected.append((one, _output(traced, one)))
    if not _replaced(traced, nodes, expected):
        for node in nodes:
            _replaced(traced, [node], expected)
    traced.recompile()


def _replaced(traced: fx.GraphModule, nodes: list[fx.Node], expected: list[tuple[_Inputs, list[Any]]]) -> bool:
    """Replace the operators ``nodes``, and put them back if an output is another: tell whether none is."""
    before = [node.target for node in nodes]
    for node in nodes:
        node.target = _NEW[node.target]
    with suppress(Exception):  # of a new tensor a later operator may not take the dtype or the shape
        if all(_same(_output(traced, inputs), output) for inputs, output in expected):
            return True
    for node, target in zip(nodes, before, strict=True):
        node.target = target
    return False


def _output(traced: fx.GraphModule, given: _Inputs) -> list[Any]:
    args = [given[str(node.target)] for node in traced.graph.nodes if node.op == "placeholder"]
    with untouched(traced), torch.no_grad():
        seed_generators(0)
        found = fx.Interpreter(traced).run(*pytree.tree_map_only(Tensor, torch.clone, args))
        return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in pytree.tree_leaves(found)]


def _same(found: list[Any], expected: list[Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        tensors = isinstance(a, Tensor) and isinstance(b, Tensor)
        return a.dtype == b.dtype and torch.equal(a, b) if tensors else bool(a == b)

    return all(map(same, found, expected)) and len(found) == len(expected)
