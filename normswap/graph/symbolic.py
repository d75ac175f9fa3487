"""Symbolic capture: ``torch.fx`` graphs of everything in a model that can be traced, in train and in eval mode."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import nn

from normswap.graph.ops import is_leaf
from normswap.graph.records import Capture, Trace, model_names, refuse_wrappers
from normswap.graph.tracer import ScopeTracer, why_untraceable
from normswap.runs.guard import set_mode, untouched
from normswap.runs.wrappers import entry_of

__all__ = ["capture_symbolic"]


def capture_symbolic(model: nn.Module, modes: tuple[bool, ...] = (False, True)) -> Capture:
    """Trace ``model`` in every way it may run: in eval and train mode, with and without optional arguments; read-only.

    A module that cannot be traced becomes an opaque leaf and its children are traced as scopes of their own, so that
    one data-dependent branch hides its own module's dataflow and nothing else.

    Args:
        model: The model.
        modes: The values of the train flag to trace with.

    Raises:
        InputError: ``model`` is a wrapper that hides its modules (DataParallel, a compiled model, TorchScript).
    """
    refuse_wrappers(model)
    modules, aliases, names = model_names(model)
    traces: list[Trace] = []
    opaque: dict[str, str] = {}
    with untouched(model):
        start, entry = entry_of(model)
        defaults = _defaults(entry)
        for run, (training, arguments) in enumerate(product(modes, _ways(defaults))):
            set_mode(model, training)
            hidden: dict[str, str] = {}
            scopes = list(_trace_scopes(start, entry, run, arguments, hidden))
            # Where a trace with optional arguments fails, it is no evidence, and the run is dropped.
            if arguments == defaults or start not in hidden:
                traces.extend(_of_the_model(trace) if trace.scope == start else trace for trace in scopes)
                opaque.update(hidden)
    return Capture(model, tuple(traces), opaque, modules, aliases, names)


def _defaults(module: nn.Module) -> dict[str, Any]:
    """Return the optional arguments of ``module``'s forward, with their defaults."""
    try:
        parameters = inspect.signature(type(module).forward).parameters.values()
    except (TypeError, ValueError):
        return {}
    constants = (type(None), bool, int, float, str)
    return {p.name: p.default for p in parameters if p.default is not p.empty and isinstance(p.default, constants)}


def _ways(defaults: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the ways to call a forward: with optional arguments given, left out, and with each flag turned."""
    if not defaults:
        return ({},)
    flags = (name for name, value in defaults.items() if isinstance(value, bool))
    return ({}, defaults, *({**defaults, flag: not defaults[flag]} for flag in flags))


def _of_the_model(trace: Trace) -> Trace:
    """Return the trace of a model's entry as one of the model: the wrappers around it do nothing."""
    for node in trace.graph.nodes if trace.scope else ():
        if node.op in ("call_module", "get_attr"):
            node.target = trace.fqn(str(node.target))
    return dataclasses.replace(trace, scope="")


def _trace_scopes(
    start: str, model: nn.Module, run: int, arguments: dict[str, Any], opaque: dict[str, str]
) -> Iterator[Trace]:
    pending = [(start, model)]
    done: set[int] = set()
    while pending:
        scope, module = pending.pop(0)
        if id(module) in done:
            continue
        done.add(id(module))
        tracer = ScopeTracer(scope)
        refused: list[tuple[str, nn.Module, str]] = []
        if reason := _no_forward(module):
            # A container (ModuleList) has no dataflow of its own and hides none.
            if module._modules and reason != "container":
                refused.append((scope, module, reason))
            else:
                pending.extend(_children(scope, module))
        else:
            try:
                graph = tracer.trace(module, (arguments if scope == start else _defaults(module)) or None)
            except Exception as cause:
                refused.append((scope, module, why_untraceable(cause)))
            else:
                yield Trace(run, scope, graph)
                refused.extend(tracer.refused)
        for fqn, hidden, why in refused:
            opaque.setdefault(fqn, why)
            pending.extend(_children(fqn, hidden))


def _children(scope: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the children worth a scope of their own: leaves have no dataflow to trace."""
    named = [(f"{scope}.{name}" if scope else name, child) for name, child in module.named_children()]
    return [(fqn, child) for fqn, child in named if not is_leaf(child)]


def _no_forward(module: nn.Module) -> str | None:
    """Return why ``module``'s forward is not the one of its class, or that it has none."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if type(module).forward is nn.Module.forward:
        return "container"
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript cannot be traced"
    return None
