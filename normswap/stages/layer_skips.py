"""Why a layer is at no site, and why a norm stays."""

from __future__ import annotations

from collections.abc import Mapping

from normswap.errors import Text, marked
from normswap.graph.dataflow import Dataflow
from normswap.nn.kinds import class_of, is_layer
from normswap.norms import norm_of
from normswap.records import Site, Skip

__all__ = ["layer_skips"]


def layer_skips(flow: Dataflow, sites: list[Site], refused: Mapping[str, str]) -> list[Skip]:
    """Return a skip for each layer, and for each norm that does not convert, that no site holds."""
    taken = {site.layer for site in sites}
    skips = []
    for fqn, module in flow.capture.modules.items():
        kind, norm = class_of(module).__name__, norm_of(module)
        if norm is not None and not norm.converts:
            skips.append(Skip(fqn, "norm", kind, "not-batch-norm", norm.why_kept(module)))
        elif is_layer(module) and fqn not in taken:
            hidden = flow.opaque_ancestor(fqn)
            if leaf := flow.enclosing_leaf(fqn):
                code, reason = "inside-leaf", f"it belongs to a {leaf}, whose own code calls it"
            elif fqn in refused:
                code, reason = "not-absorbed", Text(f"its weight is left as it is: {marked(refused[fqn])}")
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
