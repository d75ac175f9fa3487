"""Symbolic capture: ``torch.fx`` graphs of everything in a model that can be traced, in train and in eval mode."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from itertools import count
from typing import Any

import torch
from torch import nn

from normswap.graph.ops import is_leaf
from normswap.graph.records import Capture, Trace, model_names, refuse_wrappers
from normswap.graph.tracer import ScopeTracer, why_untraceable
from normswap.runs.argument_values import other_ways
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
    numbers = count()
    with untouched(model):
        for training in modes:
            set_mode(model, training)
            for run in _runs(model, numbers):
                traces.extend(run.scopes)
                opaque.update(run.hidden)
    return Capture(model, tuple(traces), opaque, modules, aliases, names, modes=modes)


@dataclass(frozen=True)
class _Run:
    """The graphs of one way to call the model, by scope, and the modules that could not be traced, with the reason."""

    scopes: tuple[Trace, ...]
    hidden: Mapping[str, str]


def _runs(model: nn.Module, numbers: Iterator[int]) -> Iterator[_Run]:
    """Trace ``model`` with its optional arguments left out, given, and with other values.

    They are those of the module behind wrappers that pass all on. Where a trace fails, it is no evidence, and the run
    is dropped; but not the one with the defaults.
    """
    start, entry = entry_of(model)

    def trace(arguments: dict[str, Any]) -> _Run:
        hidden: dict[str, str] = {}
        scopes = _trace_scopes(start, entry, next(numbers), arguments, hidden)
        return _Run(tuple(_of_the_model(one) if one.scope == start else one for one in scopes), hidden)

    defaults = _defaults(entry)
    if not defaults:
        yield trace({})
        return
    left_out, usual = trace({}), trace(defaults)
    if followed := start not in left_out.hidden:
        yield left_out
    yield usual
    for way in other_ways(entry, defaults):
        flag = all(isinstance(value, bool) for value in way.values())
        if followed and not flag:  # a trace that left it out shows the same for every value
            continue
        run = trace({**defaults, **way})
        # A value that is none of the argument's fails somewhere inside.
        if start not in run.hidden if flag else run.hidden.keys() <= usual.hidden.keys():
            yield run


def _defaults(module: nn.Module) -> dict[str, Any]:
    """Return the optional arguments of ``module``'s forward, with their defaults."""
    try:
        parameters = inspect.signature(type(module).forward).parameters.values()
    except (TypeError, ValueError):
        return {}
    constants = (type(None), bool, int, float, str, Enum)
    return {p.name: p.default for p in parameters if p.default is not p.empty and isinstance(p.default, constants)}


def _of_the_model(trace: Trace) -> Trace:
    """Return the trace of a model's entry as one of the model: the wrappers around it do nothing."""
    for node in trace.graph.nodes if trace.scope else ():
        if node.op in ("call_module", "get_attr"):
            node.target = trace.fqn(str(node.target))
    return replace(trace, scope="")


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
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Was not able to add assertion")  # of an Enum's value
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
    if isinstance(module, torch.jit.ScriptModule):  # asked first: such a class has no forward to look at
        return "TorchScript cannot be traced"
    if type(module).forward is nn.Module.forward:
        return "container"
    return None
