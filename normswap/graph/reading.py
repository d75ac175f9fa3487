"""Readers: which layer reads a norm's output, and whether nothing else does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from normswap.errors import Text, argument
from normswap.graph.calls import Call
from normswap.graph.dataflow import Dataflow
from normswap.graph.ops import order_of
from normswap.nn import FilterLayout
from normswap.nn.kinds import is_layer
from normswap.nn.readers import input_channels, is_plain, is_reader, reads_last_axis, why_no_affine
from normswap.norms import norm_of
from normswap.operations.table import reads_no_value

__all__ = ["Reading", "reader_of"]


@dataclass(frozen=True)
class Reading:
    """The layer that reads a norm's output and alone does; with a reason, why it may not take the norm up."""

    layer: str | None = None
    reason: str | None = None


def reader_of(flow: Dataflow, key: str, channels: int, rank: int | None) -> Reading:
    """Find the layer that reads the output of the norm ``key`` in every run; only what is proven counts.

    Args:
        flow: The model's dataflow.
        key: The norm's fqn or key.
        channels: The norm's channels.
        rank: The number of axes of its output, None where unknown.
    """
    found: set[tuple[str, int]] = set()
    runs = flow.calls.get(key, {})
    for run, calls in runs.items():
        for call in calls:
            reader = _read_by(flow, call, rank)
            if reader is None:
                return Reading()
            found.add(reader)
        if {len(flow.calls[layer].get(run, [])) for layer, _ in found} != {len(calls)}:
            return Reading()
    if len(found) != 1:
        return Reading()
    ((layer, axis),) = found
    if set(flow.calls[layer]) != set(runs) or flow.opaque_ancestor(layer) or flow.opaque_ancestor(key):
        return Reading()
    if all(call.trace.recorded for calls in runs.values() for call in calls):
        return Reading()
    if flow.choices.why_not_always(key, layer, channels):
        return Reading()
    reason = _unfit(flow, layer, channels, rank, axis)
    if reason is None and any(_may_be_written(flow, call, layer) for calls in runs.values() for call in calls):
        reason = "without the norm it would see what is written to the norm's input in between"
    return Reading(layer, None if reason is None else Text(f"{layer}, which reads it, cannot take it up: {reason}"))


def _read_by(flow: Dataflow, call: Call, rank: int | None) -> tuple[str, int] | None:
    """Return the layer that one call's output goes into, and the axis of its input that the norm's axis 1 is there."""
    node = call.node
    order: Sequence[int] = range(rank or 0)
    while len(node.users) == 1:
        (user,) = node.users
        if _first_argument(user) is not node or sum(given is node for given in user.all_input_nodes) != 1:
            return None
        module = flow.capture.module_of(call.trace, user)
        if module is not None and is_reader(module):
            axis = order.index(1) if rank else 1
            return flow.capture.aliases[call.trace.fqn(str(user.target))], axis
        before = order_of(user, module, rank)
        if before is None:
            return None
        order = [order[axis] for axis in before]
        node = user
    return None


def _may_be_written(flow: Dataflow, call: Call, layer: str) -> bool:
    """Tell whether the norm's input may be written to, by whatever name, before ``layer`` reads the norm's output.

    A norm gives a new tensor; where it is gone its input stands there itself. Layers and norms write to no input.
    """
    path, sizes, node = {call.node}, set[fx.Node](), call.node.next
    while True:
        module = flow.capture.module_of(call.trace, node)
        if module is not None and flow.capture.aliases[call.trace.fqn(str(node.target))] == layer:
            return False
        plain = module is not None and (is_layer(module) or norm_of(module) is not None)
        if _first_argument(node) in path:
            path.add(node)  # what moves the axes, as is known by now
        elif reads_no_value(node) or (node.all_input_nodes and sizes.issuperset(node.all_input_nodes)):
            sizes.add(node)
        elif not (plain or node.op == "get_attr"):
            return True
        node = node.next


def _first_argument(node: fx.Node) -> object:
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def _unfit(flow: Dataflow, fqn: str, channels: int, rank: int | None, axis: int) -> str | None:
    layer = flow.capture.modules[fqn]
    if reason := flow.why_shared(fqn):
        return reason
    if layer._forward_hooks:
        return "a forward hook sees its input"
    if not is_plain(layer):
        return "its forward is not torch's own"
    if rank is None:
        return Text(f"the number of axes between them is not known: give {argument('example_inputs')}")
    there = rank - 1 if reads_last_axis(layer) else 1
    takes = rank if not is_layer(layer) or reads_last_axis(layer) else FilterLayout.weight(layer).ndim
    if axis != there or rank != takes or input_channels(layer) != channels:
        return "its input channels are not the norm's"
    return why_no_affine(layer)
