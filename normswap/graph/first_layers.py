"""Which layers read the model's input: no other layer lies between."""

from __future__ import annotations

from torch import fx

from normswap.graph.calls import Call
from normswap.graph.dataflow import Dataflow
from normswap.graph.ops import LAYER_CALLS

__all__ = ["reads_input"]


def reads_input(flow: Dataflow, fqn: str) -> bool:
    """Tell whether, in every run, all that the layer ``fqn`` is given is an input of the model.

    Padding, scaling by constants and the like may come between, but nothing that has parameters.
    """
    calls = [call for run in flow.calls.get(fqn, {}).values() for call in run]
    return bool(calls) and all(_is_of_input(flow, call) for call in calls)


def _is_of_input(flow: Dataflow, call: Call) -> bool:
    if call.trace.scope:
        return False  # a part of the model: its inputs are another part's outputs
    seen: set[fx.Node] = set()
    ahead = list(call.node.all_input_nodes)
    inputs = False
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        module = flow.capture.module_of(call.trace, node)
        if node.target in LAYER_CALLS or (module is not None and any(True for _ in module.parameters())):
            return False
        inputs |= node.op == "placeholder"
        ahead += node.all_input_nodes
    return inputs
