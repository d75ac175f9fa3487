"""Match: find every norm in a capture and, where that is proven, the one layer that feeds it.

A pattern is proven, not guessed. A layer is absorbed where, in every run of the model, each of its calls feeds the norm
and nothing else, and the norm is fed by nothing else; where no one else reads its weight; and where its output channels
are the norm's. Names and the order of registration prove nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from normswap.capture import Capture, Trace
from normswap.capture.batch_norms import after_norm, read_batch_norm
from normswap.capture.functional import FunctionalNorm, read_functional_norm
from normswap.capture.ops import (
    class_of,
    is_functional_norm,
    is_layer,
    is_norm,
    is_other_norm,
    norm_argument,
    passes_through,
    rank_of,
)
from normswap.capture.probes import confirm_feeds, scales_with_its_parameters
from normswap.capture.symbolic import hook_barrier
from normswap.nn import FilterLayout
from normswap.records import NormKind, Proof, Site, Skip

__all__ = ["Matches", "match"]

_FUNCTIONAL_LAYERS: frozenset[Any] = frozenset(
    {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear}
)


@dataclass(frozen=True)
class Matches:
    """Every norm, convolution and linear layer of a model, each once: in a site or as a skip."""

    sites: tuple[Site, ...]
    skips: tuple[Skip, ...]


@dataclass(frozen=True)
class _Call:
    trace: Trace
    node: fx.Node


@dataclass
class _Evidence:
    """The calls that a capture holds, by what is called."""

    calls: dict[str, dict[int, list[_Call]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    functional: dict[str, tuple[str, FunctionalNorm]] = field(default_factory=dict)  # key -> owner, norm
    refused: dict[str, str] = field(default_factory=dict)  # functional norms that cannot be read: key -> why
    functional_layers: dict[str, str] = field(default_factory=dict)
    reads: set[int] = field(default_factory=set)  # ids of tensors that some forward reads itself
    frozen: set[str] = field(default_factory=set)  # functional norms that take no part in training
    owners: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))  # who holds a parameter, by id
    places: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))  # the same by address
    order: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Finding:
    """The layer that feeds a norm; with a reason, why it may not be absorbed; with a gap, what is not proven."""

    layer: str | None = None
    reason: str | None = None
    gap: str | None = None


def match(
    capture: Capture,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    *,
    has_data: bool = False,
) -> Matches:
    """Find the sites of a captured model, in execution order, and the reason for everything that is none.

    Args:
        capture: The model's dataflow.
        example_inputs: Inputs of the model; with them, absorptions that the graph leaves open are checked by running.
        has_data: Whether the statistics of norms that store none will be measured.
    """
    evidence = _collect(capture)
    sites: list[Site] = []
    skips: list[Skip] = []
    conditional: dict[str, str] = {}
    holders = {key for key, (_, norm) in evidence.functional.items() if norm.holder}
    for fqn, module in capture.modules.items():
        if not is_norm(module) or fqn in holders:
            continue
        found = _module_site(capture, evidence, fqn, module)
        (skips if isinstance(found, Skip) else sites).append(found)  # type: ignore[arg-type]
    for key in evidence.functional:
        sites.append(_functional_site(capture, evidence, key))
    for key, why in evidence.refused.items():
        skips.append(Skip(key, "norm", "batch_norm", "functional-norm", why))

    matched: list[Site] = []
    refused: dict[str, str] = {}
    for site in sites:
        found = _find_layer(capture, evidence, site, has_data)
        if found.reason or found.layer is None:
            matched.append(replace(site, reason=found.reason))
            if found.layer:
                refused.setdefault(found.layer, found.reason or "")
            continue
        layer = capture.modules[found.layer]
        matched.append(
            replace(
                site,
                layer=found.layer,
                layer_type=class_of(layer).__name__,
                fan_in=FilterLayout.of(layer).fan_in(layer.weight),  # type: ignore[arg-type]
                proof=Proof.PROVEN,
            )
        )
        if found.gap:
            conditional[site.norm] = found.gap
    matched = _close_gaps(capture, matched, conditional, example_inputs)
    matched.sort(key=lambda site: evidence.order.get(site.norm, len(evidence.order)))
    skips.extend(_layer_skips(capture, evidence, matched, refused))
    skips.extend(Skip(fqn, "scope", _name(capture, fqn), "opaque", why) for fqn, why in capture.opaque.items())
    return Matches(tuple(matched), tuple(skips))


def _collect(capture: Capture) -> _Evidence:
    """Sort the nodes of every graph by what they call."""
    evidence = _Evidence()
    for fqn, module in capture.modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None and not is_lazy(parameter):
                evidence.owners[id(parameter)].append(f"{fqn}.{name}")
                if not parameter.is_meta and parameter.numel():
                    evidence.places[parameter.data_ptr()].append(f"{fqn}.{name}")
    trained: dict[str, set[bool]] = defaultdict(set)
    for trace in capture.traces:
        for node in trace.graph.nodes:
            if node.op == "call_module":
                fqn = capture.aliases[trace.fqn(str(node.target))]
                evidence.calls[fqn][trace.run].append(_Call(trace, node))
                evidence.order.setdefault(fqn, len(evidence.order))
            elif node.op == "get_attr":
                for name in _read_tensor(capture, trace, node):
                    evidence.reads.add(name)
            elif is_functional_norm(node):
                owner = capture.aliases[node.meta["owner"]]
                prefix = node.meta["owner"].removeprefix(trace.scope).lstrip(".")
                norm = read_functional_norm(node, capture.modules[owner], prefix)
                if isinstance(norm, str):
                    evidence.refused.setdefault(f"{owner}:batch_norm", norm)
                    continue
                key = f"{owner}.{norm.name}".lstrip(".") if norm.holder else f"{owner}:{norm.name}"
                evidence.functional.setdefault(key, (owner, norm))
                evidence.calls[key][trace.run].append(_Call(trace, node))
                evidence.order.setdefault(key, len(evidence.order))
                trained[key].add(norm.training)
            elif node.target in _FUNCTIONAL_LAYERS:
                owner = capture.aliases[node.meta["owner"]]
                evidence.functional_layers.setdefault(f"{owner}:{node.target.__name__}", node.target.__name__)
    for key, flags in trained.items():
        if flags == {True}:
            evidence.refused[key] = "it uses the batch's statistics in eval mode, too, so it has none to take over"
            del evidence.functional[key]
        elif flags == {False}:
            evidence.frozen.add(key)
    return evidence


def _read_tensor(capture: Capture, trace: Trace, node: fx.Node) -> list[int]:
    """Return the id of the tensor that a ``get_attr`` node reads; a norm's own functional call is no reader."""
    if all(is_functional_norm(user) for user in node.users):
        return []
    holder, _, name = trace.fqn(str(node.target)).rpartition(".")
    module = capture.modules.get(capture.aliases.get(holder, holder))
    value = None if module is None else getattr(module, name, None)
    return [id(value)] if isinstance(value, Tensor) else []


def _module_site(capture: Capture, evidence: _Evidence, fqn: str, module: nn.Module) -> Site | Skip:
    """Return the site of a norm module, still without a layer, or why it is none."""
    kind = class_of(module).__name__

    def skip(code: str, reason: str) -> Skip:
        return Skip(fqn, "norm", kind, code, reason)

    if any(is_lazy(p) for p in (*module._parameters.values(), *module._buffers.values()) if p is not None):
        return skip("uninitialized", "its size is not known yet: run the model once, then convert")
    if leaf := _enclosing_leaf(capture, fqn):
        return skip("inside-leaf", f"it belongs to {leaf}, whose own code calls it")
    tensors = (*module._parameters.values(), *module._buffers.values())
    if any(id(t) in evidence.reads for t in tensors if t is not None):
        return skip("read-elsewhere", "the model reads its parameters or statistics outside of its call")
    after = after_norm(module)
    if isinstance(after, str):
        return skip("unknown-forward", after)
    state = read_batch_norm(module)
    shape = _only(capture.shapes.get(fqn))
    return Site(
        fqn,
        NormKind.MODULE,
        kind,
        state.num_features,
        state.eps,
        state.momentum,
        rank=_rank(capture, evidence, fqn, module, shape),
        spatial=shape[1] if shape else None,
        frozen=state.frozen,
        synchronized=state.synchronized,
        has_statistics=state.mean is not None,
        aliases=tuple(name for name in capture.names[fqn] if name != fqn),
    )


def _functional_site(capture: Capture, evidence: _Evidence, key: str) -> Site:
    owner, norm = evidence.functional[key]
    state = norm.state(capture.modules[owner])
    mean = f"{owner}.{norm.tensors[2]}".lstrip(".")
    shape = _only(capture.shapes.get(mean))
    return Site(
        key,
        NormKind.FUNCTIONAL,
        "batch_norm",
        state.num_features,
        state.eps,
        state.momentum,
        rank=_rank(capture, evidence, key, None, shape),
        spatial=shape[1] if shape else None,
        frozen=key in evidence.frozen,
    )


def _only(shapes: frozenset[tuple[int, int]] | None) -> tuple[int, int] | None:
    """Return the axes and the least number of positions, where all shapes seen have the same axes."""
    if not shapes or len({axes for axes, _ in shapes}) != 1:
        return None
    return min(shapes)


def _rank(
    capture: Capture, evidence: _Evidence, key: str, module: nn.Module | None, shape: tuple[int, int] | None
) -> int | None:
    """Return the number of axes of the norm's input: by its class, by what was seen, or by the graph."""
    if isinstance(module, nn.BatchNorm2d):
        return 4
    if isinstance(module, nn.BatchNorm3d):
        return 5
    if shape:
        return shape[0]
    ranks = set()
    for call in (call for calls in evidence.calls.get(key, {}).values() for call in calls):
        source = norm_argument(call.node, "input") if is_functional_norm(call.node) else _first_argument(call.node)
        trace = call.trace
        ranks.add(rank_of(source, lambda n, t=trace: capture.module_of(t, n)) if isinstance(source, fx.Node) else None)  # type: ignore[misc]
    return ranks.pop() if len(ranks) == 1 else None


def _first_argument(node: fx.Node) -> Any:
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def _find_layer(capture: Capture, evidence: _Evidence, site: Site, has_data: bool) -> _Finding:
    """Find the layer that feeds ``site``'s norm in every run, and whether that is proven."""
    if not (site.has_statistics or has_data):
        return _Finding(reason="the norm stores no statistics")
    runs = evidence.calls.get(site.norm, {})
    if not runs:
        hidden = _opaque_ancestor(capture, site.norm)
        return _Finding(reason=f"{hidden} could not be traced" if hidden else "no traced forward calls it")
    layers: set[str] = set()
    for run, calls in runs.items():
        for call in calls:
            found = _producer(capture, call)
            if found.reason or found.layer is None:
                return found
            layers.add(found.layer)
        if len(layers) > 1:
            return _Finding(reason=f"it normalizes the outputs of several layers ({', '.join(sorted(layers)[:3])})")
        (layer,) = layers
        made = evidence.calls[layer].get(run, [])
        if len(made) != len(calls):
            return _Finding(layer, f"{layer} is called {len(made)} times and the norm {len(calls)} times")
    (layer,) = layers
    if set(evidence.calls[layer]) - set(runs):
        return _Finding(layer, f"{layer} is also called where the norm is not, in train mode or with other arguments")
    if reason := _unfit(capture, evidence, site, layer):
        return _Finding(layer, reason)
    hidden = _opaque_ancestor(capture, layer) or _opaque_ancestor(capture, site.norm)
    return _Finding(layer, gap=f"{hidden} could not be traced and might use {layer}, too" if hidden else None)


def _producer(capture: Capture, call: _Call) -> _Finding:
    """Find the layer whose output is this call's input, and whether it goes nowhere else."""
    source = norm_argument(call.node, "input") if is_functional_norm(call.node) else _first_argument(call.node)
    consumer = call.node
    forks: list[str] = []
    while isinstance(source, fx.Node):
        module = capture.module_of(call.trace, source)
        forks += [_describe(call.trace, user) for user in source.users if user is not consumer]
        if module is not None and is_layer(module):
            layer = capture.aliases[call.trace.fqn(str(source.target))]
            reason = f"the output of {layer} is also used by {forks[0]}" if forks else None
            return _Finding(layer, reason)
        if not passes_through(source, module):
            break
        consumer, source = source, _first_argument(source)
    if not isinstance(source, fx.Node):
        return _Finding(reason="its input is no traced value")
    if source.op == "placeholder":
        return _Finding(reason="its input is an input of its scope")
    if source.target is hook_barrier:
        return _Finding(reason="a forward hook sees its input")
    return _Finding(reason=f"its input comes from {_describe(call.trace, source)}")


def _describe(trace: Trace, node: fx.Node) -> str:
    if node.op == "call_module":
        return trace.fqn(str(node.target))
    if node.op == "output":
        return "the output"
    return getattr(node.target, "__name__", str(node.target))


def _unfit(capture: Capture, evidence: _Evidence, site: Site, fqn: str) -> str | None:
    """Return why ``fqn``, which feeds the norm, cannot take its statistics up; None if it can."""
    layer = capture.modules[fqn]
    if parametrize.is_parametrized(layer) or not isinstance(layer._parameters.get("weight"), Tensor):
        return f"the weight of {fqn} is already parametrized"
    weight = layer._parameters["weight"]
    assert weight is not None
    if is_lazy(weight):
        return f"{fqn} is not initialized yet: run the model once, then convert"
    for name, parameter in layer._parameters.items():
        if parameter is None:
            continue
        if owner := _shared_with(evidence, parameter, f"{fqn}.{name}"):
            return f"the {name} of {fqn} is tied to {owner}"
        if id(parameter) in evidence.reads:
            return f"the model reads the {name} of {fqn} outside of its call"
    channels = FilterLayout.of(layer).out_channels(weight)
    if channels != site.num_features:
        return f"{fqn} has {channels} output channels and the norm {site.num_features}"
    if isinstance(layer, nn.Linear) and site.rank != 2:
        if site.rank is None:
            return f"whether the norm's channels are those of {fqn} hangs on its input's rank: give example inputs"
        return f"the norm's channels are not those of {fqn}: its input has {site.rank} axes"
    if not isinstance(layer, nn.Linear) and site.rank == 2:
        return f"the norm's channels are not those of {fqn}: its input has 2 axes, so it is not batched"
    if not scales_with_its_parameters(layer):
        return f"the forward of {class_of(layer).__name__} is not linear in its weight, or could not be tried"
    return None


def _shared_with(evidence: _Evidence, parameter: Tensor, name: str) -> str | None:
    """Return another owner of ``parameter``, by identity or, where it has memory, by that."""
    owners = evidence.owners[id(parameter)]
    if not parameter.is_meta and parameter.numel():
        owners = owners + evidence.places[parameter.data_ptr()]
    return next((owner for owner in owners if owner != name), None)


def _close_gaps(
    capture: Capture,
    sites: list[Site],
    conditional: dict[str, str],
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None,
) -> list[Site]:
    """Decide the absorptions whose evidence has a gap, by running the model; without inputs, absorb nothing there."""
    pairs = [(s.layer, s.norm) for s in sites if s.norm in conditional and s.layer and s.kind == NormKind.MODULE]
    confirmed: frozenset[tuple[str, str]] = frozenset()
    if pairs and example_inputs is not None:
        confirmed = confirm_feeds(capture.model, pairs, example_inputs)
    closed = []
    for site in sites:
        if gap := conditional.get(site.norm):
            if (site.layer, site.norm) in confirmed:
                site = replace(site, proof=Proof.CHECKED)
            else:
                tail = "example inputs show that it does" if example_inputs else "give example inputs to have it checked"
                site = replace(
                    site, layer=None, layer_type=None, fan_in=0, proof=Proof.NONE, reason=f"{gap}: {tail}"
                )
        closed.append(site)
    return closed


def _layer_skips(
    capture: Capture, evidence: _Evidence, sites: list[Site], refused: Mapping[str, str]
) -> list[Skip]:
    """Return a skip for each layer, and for each norm that is no BatchNorm, that no site holds."""
    taken = {site.layer for site in sites}
    skips = []
    for fqn, module in capture.modules.items():
        kind = class_of(module).__name__
        if is_other_norm(module):
            skips.append(Skip(fqn, "norm", kind, "not-batch-norm", f"it is a {kind}, not a BatchNorm"))
        elif is_layer(module) and fqn not in taken:
            hidden = _opaque_ancestor(capture, fqn)
            if leaf := _enclosing_leaf(capture, fqn):
                code, reason = "inside-leaf", f"it belongs to a {leaf}, whose own code calls it"
            elif fqn in refused:
                code, reason = "not-absorbed", f"its weight is left as it is: {refused[fqn]}"
            elif not evidence.calls.get(fqn):
                code, reason = (
                    ("opaque", f"{hidden} could not be traced") if hidden else ("never-called", "no traced forward calls it")
                )
            else:
                code, reason = "no-norm", "no BatchNorm follows it directly"
            skips.append(Skip(fqn, "layer", kind, code, reason))
    for key, name in evidence.functional_layers.items():
        skips.append(Skip(key, "layer", name, "functional-layer", "it is called functionally: its weight is left as it is"))
    return skips


def _enclosing_leaf(capture: Capture, fqn: str) -> str | None:
    """Return the class of the torch module, or norm or layer subclass, inside which ``fqn`` lies."""
    parent = fqn.rpartition(".")[0]
    while parent:
        module = capture.modules[capture.aliases[parent]]
        cls = class_of(module)
        containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        if is_layer(module) or is_norm(module):
            return cls.__name__
        if cls.__module__.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(module, containers):
            return cls.__name__
        parent = parent.rpartition(".")[0]
    return None


def _opaque_ancestor(capture: Capture, key: str) -> str | None:
    """Return an opaque module inside which ``key``, under any of its names, lies."""
    fqn = key.partition(":")[0]
    names = capture.names[fqn]
    for opaque in capture.opaque:
        if any(opaque == "" or name.startswith(opaque + ".") or name == opaque for name in names):
            return opaque or "the model"
    return None


def _name(capture: Capture, fqn: str) -> str:
    return class_of(capture.modules[capture.aliases[fqn]]).__name__


