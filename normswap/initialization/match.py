"""Match a converted network to its original on unlabelled data, site after site, in closed form.

At a site the original computes ``y = γ (x − μ)/σ + β`` and the converted network ``y' = γ' N(W u + b) + β'``, u its own
input, which carries the errors of all sites before. How a site is fitted stands in
:mod:`normswap.initialization.fitting`, how both networks are run in :mod:`normswap.runs.side_by_side`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from normswap.initialization.fitting import Fitting
from normswap.initialization.heads import find_heads
from normswap.initialization.steadying import SPREAD
from normswap.initialization.targets import Goal
from normswap.nn import FilterLayout
from normswap.recipes.parts import Takes
from normswap.records import InitRow, NormKind
from normswap.runs.calling import Batch
from normswap.runs.paired_sites import PairedSite, SiteBatch
from normswap.runs.side_by_side import run_side_by_side
from normswap.stages.rewriting import Placed

__all__ = ["match_to"]


def match_to(
    original: nn.Module,
    converted: nn.Module,
    placed: Sequence[Placed],
    batches: Sequence[Batch],
    *,
    scales: Mapping[str, Tensor] | None = None,
    least_group: int | None = None,
    spread: float = SPREAD,
    isolated: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, InitRow]:
    """Fit ``converted``, whose sites hold the absorbed BatchNorms, to ``original``.

    Args:
        original: The original; left as it is.
        converted: The rewritten copy; the values of its new parts are changed in place.
        placed: What was put into it.
        batches: Unlabelled inputs.
        scales: Of the channels that norms of ``original`` give, by fqn, where it is the user's model scaled.
        least_group: Give each group normalization the number of groups that has the least error, of those with at least
            so many channels in a group; None leaves them as they are.
        spread: See :mod:`normswap.initialization.steadying`.
        isolated: Let the original's values go on after each site, such that each site's error is its own alone.
        progress: Called with a site's name, how many were fitted, and how many there are.

    Returns:
        A row for each site that was reached, by its norm's name, and for each fitted head.
    """
    sites = {one.step.site.norm: _with_originals(one, original) for one in placed}
    goals = {name: Goal.at(one, original, (scales or {}).get(name)) for name, one in sites.items()}
    places = _places(original, placed)
    heads = find_heads(original, converted, {id(place.source) for place in places}, batches[0])
    goals |= {place.name: Goal.of_layer(place.source) for place in heads}
    places += heads
    rows: dict[str, InitRow] = {}

    def fit(place: PairedSite, visits: Sequence[SiteBatch]) -> list[Tensor] | None:
        goal = goals[place.name]
        with torch.no_grad():
            fitting = Fitting(place, goal, visits, least_group, spread)
            rows[place.name] = fitting.run(sites.get(place.name))
        if progress is not None:
            progress(place.name, len(rows), len(places))
        return [goal.targets(visit)[1] for visit in visits] if isolated else None

    run_side_by_side(original, converted, places, batches, fit)
    for place in places:  # no parameter, and so put back with all else that the forwards may have changed
        if (row := rows.get(place.name)) and row.fit and row.fit.num_groups is not None and place.norm is not None:
            place.norm.__dict__["num_groups"] = row.fit.num_groups
    return rows


def _with_originals(placed: Placed, original: nn.Module) -> Placed:
    """Return ``placed`` with the original's weight and bias: the copy's own were overwritten when it absorbed."""
    if placed.step.site.layer is None:
        return placed
    layer = original.get_submodule(placed.step.site.layer)
    bias = layer.bias.detach() if isinstance(layer.bias, Tensor) else None
    return dataclasses.replace(placed, weight=FilterLayout.weight(layer).detach(), bias=bias)


def _places(original: nn.Module, placed: Sequence[Placed]) -> list[PairedSite]:
    """Return where the sites that can be fitted lie in both networks, in the plan's order."""
    places = []
    for one in placed:
        source = one.layer if one.layer is not None else one.affine
        if one.norm_part.takes is not Takes.NORMALIZATION or source is None or one.norm is None:
            continue
        name = one.step.site.norm
        owner, _, buffer = name.partition(":")
        module = original.get_submodule(owner)
        if one.step.site.kind == NormKind.MODULE:
            places.append(PairedSite(name, source, one.norm, module))
        elif isinstance(mean := getattr(module, buffer or "running_mean", None), Tensor):
            places.append(PairedSite(name, source, one.norm, None, mean))
    return places
