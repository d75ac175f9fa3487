"""BatchNorm subclasses whose forward does more around the normalization, as graphs that show what.

Note [Opened norms]
A norm over the last axis is often written as a subclass: ``super().forward(x.transpose(1, 2)).transpose(1, 2)``. As one
step of the dataflow its channels would be on the wrong axis. So the forward is traced with torch's own forward in it as
the call of a plain BatchNorm, which holds the very tensors, and a ``GraphModule`` of that trace takes the subclass's
place: all that is known of norms in modules is known of it then. The graph must be the forward, whatever the input:
what branches on a value, has optional arguments, computes differently in train mode, reads the norm's tensors itself,
keeps state, has hooks, or works in a context (``no_grad``, ``autocast``), which no graph holds, is not opened.
"""

from __future__ import annotations

import dis
from typing import Any

from torch import fx, nn

from normswap.graph.after_norm import after_norm
from normswap.graph.bytecode import codes_of
from normswap.graph.records import has_optional_arguments
from normswap.graph.tracer import ScopeTracer
from normswap.nn.kinds import class_of
from normswap.norms import norm_of
from normswap.runs.guard import untouched
from normswap.runs.settings import seed_generators

__all__ = ["opened_form"]

_CONTEXTS = frozenset({"BEFORE_WITH", "SETUP_WITH", "BEFORE_ASYNC_WITH", "LOAD_SPECIAL"})


def opened_form(module: nn.Module) -> tuple[fx.GraphModule, str] | None:
    """Return what ``module`` computes around its normalization as a graph, and the name of the plain norm in it.

    None where ``module`` is no such norm, or where a graph would not be the same (Note [Opened norms]).
    """
    norm = norm_of(module)
    bare = None if norm is None else norm.bare(module)
    if bare is None or not isinstance(after_norm(module), str):
        return None
    hooked = any(hooks for table, hooks in vars(module).items() if "_hooks" in table)  # lost where a graph is copied
    if hooked or has_optional_arguments(module) or _has_contexts(module):
        return None
    name = next(name for name in ("norm", "batch_norm", "plain_norm") if not hasattr(module, name))
    # Twice in each mode: what the mode or chance decides differs.
    graphs = [_traced(module, type(bare), name, training=seed % 2 == 1, seed=seed) for seed in range(4)]
    if any(graph is None or _text(graph) != _text(graphs[0]) for graph in graphs):
        return None
    graph = graphs[0]
    assert graph is not None
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    if name not in calls or any(node.op == "get_attr" for node in graph.nodes):
        return None
    parts = {call: bare if call == name else module.get_submodule(call) for call in calls}
    found = fx.GraphModule(parts, graph, class_of(module).__name__)
    found.meta["opened"] = True
    found.training = module.training
    return found, name


def _traced(module: nn.Module, base: type[nn.Module], name: str, *, training: bool, seed: int) -> fx.Graph | None:
    """Trace ``module``'s forward with ``base``'s forward in it as the call of a module; None where that fails."""

    def forward(self: nn.Module, input: Any) -> Any:
        return input.tracer.create_proxy("call_module", name, (input,), {})

    try:
        # In the order in which super() looks, it stands between the user's classes and torch's.
        own_call = type("OwnCall", (base,), {"forward": forward})
        probe: nn.Module = nn.Module.__new__(type("Probe", (class_of(module), own_call), {}))
        probe.__dict__.update(vars(module))
        probe.__dict__["training"] = training
        with untouched(probe) as before:
            seed_generators(seed)
            graph = ScopeTracer(own_forward_only=True).trace(probe)
    except Exception:
        return None
    for node in graph.nodes:
        node.type = None  # annotations that are strings cannot be pickled
    return None if before.changed else graph


def _text(graph: fx.Graph | None) -> str:
    return "" if graph is None else graph.python_code("self").src


def _has_contexts(module: nn.Module) -> bool:
    """Tell whether the forward, or what it calls, works within a ``with`` or a decorator."""
    return any(
        hasattr(found.function, "__wrapped__")
        or any(step.opname in _CONTEXTS for step in dis.get_instructions(found.function.__code__))
        for found in codes_of(module)
    )
