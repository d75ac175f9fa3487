"""The graph of a model's forward in which some arguments are inputs and the others are held at their values."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from normswap.errors import FoldError, argument
from normswap.graph.tracer import ScopeTracer, hook_barrier
from normswap.runs.guard import untouched

__all__ = ["free_arguments", "graph_of", "no_graph"]

_PLAIN = (type(None), bool, int, float, complex, str, Enum, torch.dtype, torch.device)


def free_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a graph takes as inputs: tensors, what may hold some, and numbers.

    The others are None, flags, words and the like, and lists of such. A forward branches on them, and a trace that has
    them as inputs takes one branch unseen: ``skip is not None`` is true of every value of a graph.
    """
    number = {key for key, value in given.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    return {key: value for key, value in given.items() if key in number or not _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN)


def graph_of(model: nn.Module, given: Mapping[str, Any]) -> fx.Graph:
    """Return the graph of a model's forward, its layers and norms as leaves.

    Its inputs are :func:`free_arguments` of ``given``, none with a default. The other arguments of ``given`` are held
    at their values, and those that it does not give at their defaults.

    Raises:
        FoldError: The forward cannot be written as a graph.
    """
    signature = inspect.signature(model.forward)
    try:
        with _held(model, signature, given), untouched(model) as before:
            graph = ScopeTracer(in_place=True).trace(model)
    except Exception as cause:
        raise no_graph(model, f"{type(cause).__name__}: {cause}") from cause
    if before.changed:
        raise no_graph(model, "its forward keeps state")
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    for fqn, module in model.named_modules():
        inside = any(fqn.startswith(f"{leaf}.") for leaf in called)
        if (module._forward_hooks or module._forward_pre_hooks) and fqn not in called and not inside:
            raise no_graph(model, f"a forward hook is on '{fqn}', which would not be called")
    for node in list(graph.nodes):
        if node.target is hook_barrier:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph


def no_graph(model: nn.Module, why: str) -> FoldError:
    """Return the error for a model that no graph is a model at one class of."""
    return FoldError(
        f"{type(model).__name__} cannot be written as a graph: {why}",
        code="fold-condition",
        hint=f"fold it without {argument('condition')}, and give the class in each call",
    )


@contextmanager
def _held(model: nn.Module, signature: inspect.Signature, given: Mapping[str, Any]) -> Iterator[None]:
    """Give ``model``, for as long, a class whose forward takes the free arguments of ``given`` alone."""
    own, cls = model.forward, type(model)
    free = free_arguments(given)
    held = {key: value for key, value in given.items() if key not in free}

    def call(values: dict[str, Any]) -> Any:
        bound = inspect.BoundArguments(signature, {**held, **values})
        return own(*bound.args, **bound.kwargs)

    # A trace takes a forward's arguments from its code. What it wraps it finds in the globals of that code.
    scope: dict[str, Any] = {}
    values = ", ".join(f"{name!r}: {name}" for name in free)
    code = f"def make(_call):\n    def forward(_self, {', '.join(free)}):\n        return _call({{{values}}})\n"
    exec(f"{code}    return forward\n", scope)
    made = scope["make"](call)
    found = getattr(inspect.unwrap(own), "__globals__", scope)
    forward = FunctionType(made.__code__, found, "forward", None, made.__closure__)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "forward": forward}
    object.__setattr__(model, "__class__", type(cls.__name__, (cls,), names))
    try:
        yield
    finally:
        object.__setattr__(model, "__class__", cls)
