"""Captures: the graphs of a model's forwards, by scope and run, with the names of its modules."""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from normswap.errors import InputError
from normswap.nn.kinds import class_of
from normswap.runs.wrappers import refuse_script, refuse_sharded

__all__ = ["Capture", "Trace", "has_optional_arguments", "model_names", "refuse_wrappers"]


@dataclass(frozen=True)
class Trace:
    """The graph of one scope in one run.

    Args:
        run: The number of the run that the graph belongs to. A run is one way in which the model may execute: in
            eval or in train mode, with its optional arguments left out or given.
        scope: The fqn of the module whose forward was traced; '' is the model.
        graph: Its nodes' module and attribute targets are fqns *within the scope*; ``node.meta["owner"]`` is the
            fqn, within the model, of the module whose own forward made the node.
        recorded: Whether the graph is the record of a run on example inputs, and so an observation and no proof.
    """

    run: int
    scope: str
    graph: fx.Graph
    recorded: bool = False

    def fqn(self, target: str) -> str:
        """Return a target of this graph as a name within the model."""
        return f"{self.scope}.{target}" if self.scope and target else self.scope or target


@dataclass(frozen=True)
class Capture:
    """What was seen of a model's dataflow.

    Args:
        model: The model, as it was.
        traces: One graph per scope and run. A scope is the model itself or a child of an opaque module.
        opaque: The fqns of the modules that could not be traced, each with the reason.
        modules: Each module under its first fqn.
        aliases: The fqn under which ``modules`` holds a module, for each of its names.
        names: All names of a module, by its first fqn.
        shapes: The shapes seen at each norm's input on the example inputs, as (axes, positions per channel), by the
            norm's fqn or key.
        modes: The values of the train flag that were traced with.
    """

    model: nn.Module
    traces: tuple[Trace, ...]
    opaque: dict[str, str]
    modules: dict[str, nn.Module]
    aliases: dict[str, str]
    names: dict[str, tuple[str, ...]]
    shapes: dict[str, frozenset[tuple[int, int]]] = field(default_factory=dict)
    modes: tuple[bool, ...] = (False, True)

    def module_of(self, trace: Trace, node: fx.Node) -> nn.Module | None:
        """Return the module that ``node`` calls, None where it calls none."""
        if node.op != "call_module":
            return None
        return self.modules[self.aliases[trace.fqn(str(node.target))]]


def model_names(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str], dict[str, tuple[str, ...]]]:
    """Return ``modules``, ``aliases`` and ``names`` of a :class:`Capture` of ``model``."""
    modules = dict(model.named_modules())
    first = {id(module): fqn for fqn, module in modules.items()}
    aliases = {fqn: first[id(module)] for fqn, module in model.named_modules(remove_duplicate=False)}
    names: dict[str, tuple[str, ...]] = defaultdict(tuple)
    for alias, fqn in aliases.items():
        names[fqn] += (alias,)
    return modules, aliases, dict(names)


def has_optional_arguments(module: nn.Module) -> bool:
    """Tell whether ``module``'s forward may be called in more than one way."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def refuse_wrappers(model: nn.Module) -> None:
    """Raise an error if ``model`` is a wrapper whose modules cannot be replaced, or sharded."""
    refuse_sharded(model)
    refuse_script(model)
    if isinstance(model, torch._dynamo.OptimizedModule):
        what, hint = "a compiled model", "convert the model before torch.compile (here: model._orig_mod)"
    elif class_of(model).__module__.startswith("torch.nn.parallel"):
        what, hint = f"wrapped in {class_of(model).__name__}", "convert model.module, and wrap the result again"
    elif "validate_inputs" in vars(model):
        what, hint = "an exported program", "convert normswap.from_exported(program)"
    else:
        return
    raise InputError(f"the model is {what}; its modules cannot be replaced", code="wrapped-model", hint=hint)
