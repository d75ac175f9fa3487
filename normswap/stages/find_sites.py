"""Match: every norm, convolution and linear layer of a captured model, each once, in a site or as a skip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn
from torch.nn.parameter import is_lazy

from normswap.errors import PlanError, Text, argument, marked
from normswap.graph import Capture
from normswap.graph.after_norm import after_norm, read_batch_norm
from normswap.graph.code_reads import reads_in_code
from normswap.graph.dataflow import Dataflow
from normswap.graph.ops import is_norm, is_other_norm
from normswap.graph.perturbation import confirm_feeds
from normswap.nn import FilterLayout
from normswap.nn.kinds import class_of, is_layer
from normswap.records import FoundBy, NormKind, Proof, Site, Skip
from normswap.stages.forwards import trace_own_forward

__all__ = ["Matches", "match"]


@dataclass(frozen=True)
class Matches:
    """Every norm, convolution and linear layer of a model, each once: in a site or as a skip."""

    sites: tuple[Site, ...]
    skips: tuple[Skip, ...]


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
    flow = Dataflow(capture)
    sites: list[Site] = []
    skips: list[Skip] = []
    conditional: dict[str, str] = {}
    named = reads_in_code(capture)
    _refuse_unwritable(capture, flow)
    holders = {key for key, (_, norm) in flow.functional.items() if norm.holder} | set(flow.refused)
    for fqn, module in capture.modules.items():
        if not is_norm(module) or fqn in holders:
            continue
        site_or_skip = _module_site(capture, flow, fqn, module, named)
        if isinstance(site_or_skip, Skip):
            skips.append(site_or_skip)
        else:
            sites.append(site_or_skip)
    for key in flow.functional:
        sites.append(_functional_site(capture, flow, key))
    for key, why in flow.refused.items():
        skips.append(Skip(key, "norm", "batch_norm", "functional-norm", why))

    matched: list[Site] = []
    refused: dict[str, str] = {}
    for site in sites:
        if not (site.has_statistics or has_data):
            matched.append(replace(site, reason="the norm stores no statistics"))
            continue
        found = flow.layer_feeding(site.norm, site.num_features, site.rank)
        if found.recorded:
            site = replace(site, found_by=FoundBy.RECORDED)
        if found.reason or found.layer is None:
            matched.append(replace(site, reason=found.reason))
            if found.layer:
                refused.setdefault(found.layer, found.reason or "")
            continue
        layer = capture.modules[found.layer]
        layout, weight = FilterLayout.of(layer), FilterLayout.weight(layer)
        matched.append(
            replace(
                site,
                layer=found.layer,
                layer_type=class_of(layer).__name__,
                fan_in=layout.fan_in(weight),
                depthwise=layout.groups == layout.in_channels(weight) > 1,
                proof=Proof.PROVEN,
            )
        )
        if found.gap:
            conditional[site.norm] = found.gap
    matched = _close_gaps(capture, matched, conditional, example_inputs)
    matched.sort(key=lambda site: flow.order.get(site.norm, len(flow.order)))
    skips.extend(_layer_skips(capture, flow, matched, refused))
    skips.extend(
        Skip(fqn, "scope", class_of(capture.modules[capture.aliases[fqn]]).__name__, "opaque", why)
        for fqn, why in capture.opaque.items()
    )
    return Matches(tuple(matched), tuple(skips))


def _refuse_unwritable(capture: Capture, flow: Dataflow) -> None:
    """Refuse the functional norms of forwards that were traced as a part of the model and cannot be rewritten."""
    for fqn in {owner for owner, _ in flow.functional.values()}:
        owner = capture.modules[fqn]
        if isinstance(owner, fx.GraphModule):
            continue
        try:
            for training in (False, True):
                trace_own_forward(owner, training)
        except PlanError as cause:
            for key in [key for key, (of, _) in flow.functional.items() if of == fqn]:
                flow.refuse(key, f"{cause.message}: make it a BatchNorm module")


def _module_site(
    capture: Capture, flow: Dataflow, fqn: str, module: nn.Module, named: Mapping[str, str]
) -> Site | Skip:
    """Return the site of a norm module, still without a layer, or why it is none."""
    kind = class_of(module).__name__

    def skip(code: str, reason: str) -> Skip:
        return Skip(fqn, "norm", kind, code, reason)

    if any(is_lazy(p) for p in (*module._parameters.values(), *module._buffers.values()) if p is not None):
        return skip("uninitialized", "its size is not known yet: run the model once, then convert")
    if leaf := flow.enclosing_leaf(fqn):
        return skip("inside-leaf", f"it belongs to {leaf}, whose own code calls it")
    tensors = (*module._parameters.values(), *module._buffers.values())
    if any(flow.reads(t) for t in tensors if t is not None):
        return skip("read-elsewhere", "the model reads its parameters or statistics outside of its call")
    if why := named.get(fqn):
        return skip("read-elsewhere", why)
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
        rank=flow.rank(fqn, shape),
        spatial=shape[1] if shape else None,
        frozen=state.frozen,
        synchronized=state.synchronized,
        has_statistics=state.mean is not None,
        aliases=tuple(name for name in capture.names[fqn] if name != fqn),
    )


def _functional_site(capture: Capture, flow: Dataflow, key: str) -> Site:
    owner, norm = flow.functional[key]
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
        rank=flow.rank(key, shape),
        spatial=shape[1] if shape else None,
        frozen=key in flow.frozen,
    )


def _only(shapes: frozenset[tuple[int, int]] | None) -> tuple[int, int] | None:
    """Return the axes and the least number of positions, where all shapes seen have the same axes."""
    if not shapes or len({axes for axes, _ in shapes}) != 1:
        return None
    return min(shapes)


def _close_gaps(
    capture: Capture,
    sites: list[Site],
    conditional: dict[str, str],
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None,
) -> list[Site]:
    """Decide the absorptions whose flow has a gap, by running the model; without inputs, absorb nothing there."""
    pairs = [(s.layer, s.norm) for s in sites if s.norm in conditional and s.layer and s.kind == NormKind.MODULE]
    confirmed: dict[tuple[str, str], frozenset[bool]] = {}
    if pairs and example_inputs is not None:
        confirmed = confirm_feeds(capture.model, pairs, example_inputs)
    closed = []
    for site in sites:
        if gap := conditional.get(site.norm):
            modes = confirmed.get((site.layer or "", site.norm))
            if modes is not None:
                site = replace(site, proof=Proof.CHECKED, caveat=_CAVEATS.get(modes))
            else:
                tail = (
                    "example inputs show that it does, or do not come there"
                    if example_inputs is not None
                    else f"give {argument('example_inputs')} to have it checked"
                )
                site = replace(
                    site,
                    layer=None,
                    layer_type=None,
                    fan_in=0,
                    depthwise=False,
                    proof=Proof.NONE,
                    reason=Text(f"{marked(gap)}: {tail}"),
                )
        closed.append(site)
    return closed


_CAVEATS = {
    frozenset({False}): "checked in eval mode only: in train mode the example inputs do not come there",
    frozenset({True}): "checked in train mode only: in eval mode the example inputs do not come there",
}


def _layer_skips(capture: Capture, flow: Dataflow, sites: list[Site], refused: Mapping[str, str]) -> list[Skip]:
    """Return a skip for each layer, and for each norm that is no BatchNorm, that no site holds."""
    taken = {site.layer for site in sites}
    skips = []
    for fqn, module in capture.modules.items():
        kind = class_of(module).__name__
        if is_other_norm(module):
            skips.append(Skip(fqn, "norm", kind, "not-batch-norm", f"it is a {kind}, not a BatchNorm"))
        elif is_layer(module) and fqn not in taken:
            hidden = flow.opaque_ancestor(fqn)
            if leaf := flow.enclosing_leaf(fqn):
                code, reason = "inside-leaf", f"it belongs to a {leaf}, whose own code calls it"
            elif fqn in refused:
                code, reason = "not-absorbed", f"its weight is left as it is: {refused[fqn]}"
            elif not flow.calls.get(fqn):
                code, reason = (
                    ("opaque", f"{hidden} could not be traced")
                    if hidden
                    else ("never-called", "no traced forward calls it")
                )
            else:
                code, reason = "no-norm", "no BatchNorm follows it directly"
            skips.append(Skip(fqn, "layer", kind, code, reason))
    for key, name in flow.functional_layers.items():
        skips.append(
            Skip(key, "layer", name, "functional-layer", "it is called functionally: its weight is left as it is")
        )
    return skips
