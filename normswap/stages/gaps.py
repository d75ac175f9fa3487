"""Gaps in what a trace shows between a layer and a norm, closed by running the model on example inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from normswap.errors import Text, argument, marked
from normswap.graph import Capture
from normswap.graph.perturbation import confirm_feeds
from normswap.records import NormKind, Proof, Site
from normswap.runs.inputs import Inputs

__all__ = ["close_gaps"]

_CAVEATS = {
    frozenset({False}): "checked in eval mode only: in train mode the example inputs do not come there",
    frozenset({True}): "checked in train mode only: in eval mode the example inputs do not come there",
}


def close_gaps(
    capture: Capture,
    sites: Sequence[Site],
    conditional: Mapping[str, str],
    example_inputs: Inputs | None,
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
