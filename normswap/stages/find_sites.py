"""Sites: every norm and every layer of a captured model, each once, in a site or as a skip."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from torch import fx, nn
from torch.nn.parameter import is_lazy

from normswap.errors import PlanError
from normswap.graph import Capture
from normswap.graph.after_norm import after_norm
from normswap.graph.code_reads import reads_in_code
from normswap.graph.dataflow import Dataflow
from normswap.graph.first_layers import reads_input
from normswap.graph.reading import reader_of
from normswap.graph.residual import residual_branches
from normswap.nn import FilterLayout
from normswap.nn.kinds import class_of
from normswap.norms import is_convertible, norm_of
from normswap.records import FoundBy, NormKind, Proof, RecurrentSite, Site, Skip
from normswap.runs.inputs import Inputs
from normswap.runs.modes import held_modules
from normswap.stages.bound import NormSource
from normswap.stages.forwards import trace_own_forward
from normswap.stages.gaps import close_gaps
from normswap.stages.layer_skips import layer_skips
from normswap.stages.other_methods import refuse_by_mode, with_methods
from normswap.stages.recurrent import find_recurrent

__all__ = ["FoundSites", "find_sites"]


@dataclass(frozen=True)
class FoundSites:
    """Every norm, convolution, linear and recurrent layer of a model, each once: in a site or as a skip.

    Args:
        sites: The sites, in execution order.
        skips: What is none, each with the reason.
        sources: The norm of each site, by its name in the plan.
        recurrent: The recurrent layers, which are at no norm.
    """

    sites: tuple[Site, ...]
    skips: tuple[Skip, ...]
    sources: Mapping[str, NormSource]
    recurrent: tuple[RecurrentSite, ...] = ()


def find_sites(flow: Dataflow, example_inputs: Inputs | None = None, *, has_data: bool = False) -> FoundSites:
    """Find the sites of a captured model, in execution order, and the reason for everything that is none.

    Args:
        flow: The model's dataflow.
        example_inputs: Inputs of the model; with them, absorptions that the graph leaves open are checked by running.
        has_data: Whether the statistics of norms that store none will be measured.
    """
    capture = flow.capture
    sites, skips, sources = _norms(flow)
    ends = {end for branch in residual_branches(capture, through_norms=True) for end in branch.ends}
    found = [_with_layer(flow, _with_reader(flow, site), has_data, ends) for site in sites]
    gaps = {one.site.norm: one.gap for one in found if one.gap}
    refused: dict[str, str] = {}
    for one in found:
        if one.refused:
            refused.setdefault(one.refused, one.site.reason or "")
    placed = close_gaps(capture, [one.site for one in found], gaps, example_inputs)
    placed.sort(key=lambda site: flow.order.get(site.norm, len(flow.order)))
    skips += layer_skips(flow, placed, refused)
    skips += [
        Skip(fqn, "scope", class_of(capture.modules[capture.aliases[fqn]]).__name__, "opaque", why)
        for fqn, why in capture.opaque.items()
    ]
    recurrent = list(find_recurrent(flow))
    skips += [one for one in recurrent if isinstance(one, Skip)]
    layers = tuple(one for one in recurrent if isinstance(one, RecurrentSite))
    return FoundSites(tuple(placed), tuple(skips), sources, layers)


def _norms(flow: Dataflow) -> tuple[list[Site], list[Skip], dict[str, NormSource]]:
    """Return the sites of all norms that convert, still without a layer, a skip for each other, and what they are."""
    sites: list[Site] = []
    skips: list[Skip] = []
    sources: dict[str, NormSource] = {}
    named, held = reads_in_code(flow.capture), held_modules(flow.capture.model)
    _refuse_unwritable(flow)
    refuse_by_mode(flow, held)
    holders = {key for key, (_, norm) in flow.functional.items() if norm.holder} | set(flow.refused)
    for fqn, module in flow.capture.modules.items():
        if not is_convertible(module) or fqn in holders:
            continue
        found = _module_site(flow, fqn, module, named)
        if isinstance(found, Skip):
            skips.append(found)
        else:
            site, sources[fqn] = found
            sites.append(site)
    for key in flow.functional:
        site, sources[key] = _functional_site(flow, key)
        sites.append(site)
    skips += [Skip(key, "norm", "batch_norm", "functional-norm", why) for key, why in flow.refused.items()]
    sites, batchwise = with_methods(flow, sites, held)
    return sites, [*skips, *batchwise], sources


@dataclass(frozen=True)
class _Placed:
    """A site with its layer, and what is open.

    Args:
        site: The site.
        gap: What is not proven about the layer, where a run may close it.
        refused: The layer that feeds the norm and may not be changed.
    """

    site: Site
    gap: str | None = None
    refused: str | None = None


def _with_reader(flow: Dataflow, site: Site) -> Site:
    """Return the site with the layer that reads its norm, where one does and nothing else."""
    found = reader_of(flow, site.norm, site.num_features, site.rank)
    return replace(site, readers=(found.layer,) if found.layer and not found.reason else (), unread=found.reason)


def _with_layer(flow: Dataflow, site: Site, has_data: bool, ends: Set[str]) -> _Placed:
    if not (site.has_statistics or has_data):
        return _Placed(replace(site, reason="the norm stores no statistics"))
    found = flow.layer_feeding(site.norm, site.num_features, site.rank)
    if found.recorded:
        site = replace(site, found_by=FoundBy.RECORDED)
    if found.reason or found.layer is None:
        return _Placed(replace(site, reason=found.reason), refused=found.layer)
    layer = flow.capture.modules[found.layer]
    layout, weight = FilterLayout.of(layer), FilterLayout.weight(layer)
    site = replace(
        site,
        layer=found.layer,
        layer_type=class_of(layer).__name__,
        fan_in=layout.fan_in(weight),
        depthwise=layout.groups == layout.in_channels(weight) > 1,
        proof=Proof.PROVEN,
        axis=found.axis,
        reads_input=reads_input(flow, found.layer),
        ends_branch=found.layer in ends,
    )
    return _Placed(site, found.gap)


def _refuse_unwritable(flow: Dataflow) -> None:
    """Refuse the functional norms of forwards that were traced as a part of the model and cannot be rewritten."""
    capture = flow.capture
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
            continue
        for key, norm in [(key, norm) for key, (of, norm) in flow.functional.items() if of == fqn]:
            if why := flow.choices.why_unwritable(fqn, norm.read(owner, frozen=False).num_features):
                flow.refuse(key, f"{why}: make it a BatchNorm module")


def _module_site(
    flow: Dataflow, fqn: str, module: nn.Module, named: Mapping[str, str]
) -> tuple[Site, NormSource] | Skip:
    """Return the site of a norm module, still without a layer, or why it is none."""
    capture, kind = flow.capture, class_of(module).__name__

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
    source, norm = NormSource.of(module, after), norm_of(module)
    assert norm is not None
    state = source.state
    shape = _only(capture.shapes.get(fqn))
    site = Site(
        fqn,
        NormKind.MODULE,
        kind,
        state.num_features,
        state.eps,
        state.momentum,
        rank=flow.rank(fqn, shape),
        rank_by_example=shape is not None and len(norm.axes(module)) != 1 and flow.rank(fqn) != shape[0],
        spatial=shape[1] if shape else None,
        frozen=state.frozen,
        synchronized=state.synchronized,
        has_statistics=state.mean is not None,
        aliases=tuple(name for name in capture.names[fqn] if name != fqn),
        inside=_opened_around(capture, fqn),
    )
    return site, source


def _opened_around(capture: Capture, fqn: str) -> str | None:
    """Return the BatchNorm subclass that was opened and holds the norm ``fqn``, where one does."""
    parent = fqn.rpartition(".")[0]
    holder = capture.modules.get(capture.aliases.get(parent, parent))
    return parent if isinstance(holder, fx.GraphModule) and holder.meta.get("opened") else None


def _functional_site(flow: Dataflow, key: str) -> tuple[Site, NormSource]:
    capture = flow.capture
    owner, norm = flow.functional[key]
    state = norm.read(capture.modules[owner], frozen=key in flow.frozen)
    mean = f"{owner}.{norm.tensors[2]}".lstrip(".")
    shape = _only(capture.shapes.get(mean))
    site = Site(
        key,
        NormKind.FUNCTIONAL,
        "batch_norm",
        state.num_features,
        state.eps,
        state.momentum,
        rank=flow.rank(key, shape),
        rank_by_example=shape is not None and flow.rank(key) != shape[0],
        spatial=shape[1] if shape else None,
        frozen=key in flow.frozen,
    )
    return site, NormSource(state, call=norm)


def _only(shapes: frozenset[tuple[int, int]] | None) -> tuple[int, int] | None:
    """Return the axes and the least number of positions, where all shapes seen have the same axes."""
    if not shapes or len({axes for axes, _ in shapes}) != 1:
        return None
    return min(shapes)
