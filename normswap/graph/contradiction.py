"""Whether the record of a run shows calls that no trace shows: then the record is right, and counts."""

from __future__ import annotations

from collections import Counter, defaultdict

from torch import fx

from normswap.graph.ops import is_functional_norm, norm_argument, passes_through
from normswap.graph.records import Capture, Trace
from normswap.nn.kinds import is_layer
from normswap.norms import norm_of

__all__ = ["contradicts"]

_Calls = Counter[tuple[str, str | None]]
"""How often each norm and layer is called on the output of which module, None where an operation is between."""


def contradicts(record: Capture, traced: Capture) -> bool:
    """Tell whether some run of ``record`` is none of those that ``traced`` shows.

    A trace takes attributes and optional arguments as they are when it is made. The run on example inputs may have
    been another one.

    Args:
        record: The record of runs.
        traced: Symbolic traces of the same model.
    """
    known: dict[int, _Calls] = defaultdict(Counter)
    for trace in traced.traces:
        known[trace.run].update(_calls(traced, trace))
    return any(_calls(record, trace) not in known.values() for trace in record.traces)


def _calls(capture: Capture, trace: Trace) -> _Calls:
    found: _Calls = Counter()
    for node in trace.graph.nodes:
        module = capture.module_of(trace, node)
        if is_functional_norm(node):
            found[str(getattr(norm_argument(node, "running_mean"), "target", None)), None] += 1
        elif module is not None and (is_layer(module) or norm_of(module) is not None):
            found[_name(capture, trace, node), _source(capture, trace, node)] += 1
    return found


def _source(capture: Capture, trace: Trace, node: fx.Node) -> str | None:
    """Return the module whose output a call takes."""
    source = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    while isinstance(source, fx.Node) and passes_through(source, capture.module_of(trace, source)):
        source = source.args[0] if source.args else None
    return _name(capture, trace, source) if isinstance(source, fx.Node) and source.op == "call_module" else None


def _name(capture: Capture, trace: Trace, node: fx.Node) -> str:
    return capture.aliases[trace.fqn(str(node.target))]
