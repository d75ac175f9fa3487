"""Match a converted network to its original on unlabelled data, site after site, in closed form.

At a site the original computes ``y = γ (x − μ)/σ + β`` and the converted network ``y' = γ' N(W u + b) + β'``, u its own
input, which carries the errors of all sites before. How a site is fitted stands in
:mod:`normswap.initialization.fitting`, how both networks are run in :mod:`normswap.runs.side_by_side`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from normswap.checks.agreement import agreement
from normswap.initialization.absorb import Absorb
from normswap.initialization.base import Outcome
from normswap.initialization.fitting import Fitting
from normswap.initialization.heads import find_heads
from normswap.initialization.steadying import SPREAD
from normswap.initialization.targets import Goal
from normswap.norms import Takes
from normswap.records import InitRow, NormKind
from normswap.runs.calling import Batch
from normswap.runs.side_by_side import Place, Visit, run_side_by_side
from normswap.stages.rewriting import Placed

__all__ = ["Match", "match_to"]


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
    sites = {one.name: one for one in placed}
    goals = {name: Goal.at(one, original, (scales or {}).get(name)) for name, one in sites.items()}
    places = _places(original, placed)
    heads = find_heads(original, converted, {id(place.source) for place in places}, batches[0])
    goals |= {place.name: Goal.of_layer(place.source) for place in heads}
    places += heads
    rows: dict[str, InitRow] = {}

    def fit(place: Place, visits: Sequence[Visit]) -> list[Tensor] | None:
        goal = goals[place.name]
        with torch.no_grad():
            fitting = Fitting(place, goal, visits, sites.get(place.name), least_group, spread)
            rows[place.name] = fitting.run(original)
        if progress is not None:
            progress(place.name, len(rows), len(places))
        return [goal.targets(visit)[1] for visit in visits] if isolated else None

    run_side_by_side(original, converted, places, batches, fit)
    for place in places:  # no parameter, and so put back with all else that the forwards may have changed
        if (row := rows.get(place.name)) and row.fit and row.fit.num_groups is not None and place.norm is not None:
            sites[place.name].bound.norm.regroup(place.norm, row.fit.num_groups)
    return rows


def _places(original: nn.Module, placed: Sequence[Placed]) -> list[Place]:
    """Return where the sites that can be fitted lie in both networks, in the plan's order."""
    places = []
    for one in placed:
        source, name = one.source, one.name
        if one.bound.norm.takes is not Takes.NORMALIZATION or source is None or one.norm is None:
            continue
        owner, _, buffer = name.partition(":")
        module = original.get_submodule(owner)
        if one.bound.site.kind == NormKind.MODULE:
            places.append(Place(name, source, one.norm, module))
        elif isinstance(mean := getattr(module, buffer or "running_mean", None), Tensor):
            places.append(Place(name, source, one.norm, None, mean))
    return places


class Match(Absorb):
    """Fit each site to the original on calibration data, in closed form, from what :class:`Absorb` gives it."""

    name = "match"
    fits = True

    def fit(self, target: nn.Module, placed: Sequence[Placed]) -> dict[str, InitRow]:
        """Fit the sites of ``target``, and the layers without a norm that give its output; return their rows."""
        work = self.work
        assert work.enough is not None
        return match_to(
            work.source,
            target,
            placed,
            work.enough,
            scales=work.scales,
            least_group=work.least_group,
            spread=work.options.spread,
            isolated=work.isolated,
            progress=work.progress,
        )

    def refine(self, target: nn.Module, placed: Sequence[Placed]) -> Outcome:
        """Fit, and measure how far the outputs agree."""
        fitted = self.fit(target, placed)
        notes = (*self.further(target, placed, fitted), *self.assumed)
        rows = [fitted.get(name, row) for name, row in self.rows.items()]
        rows += [row for name, row in fitted.items() if name not in self.rows]
        groups = {row.name: row.fit.num_groups for row in rows if row.fit and row.fit.num_groups is not None}
        assert self.work.enough is not None
        return Outcome(tuple(rows), notes, agreement(self.work.source, target, self.work.enough), groups)

    def further(self, target: nn.Module, placed: Sequence[Placed], fitted: Mapping[str, InitRow]) -> tuple[str, ...]:
        """Do what comes after the fit, and say what came of it: nothing here."""
        return ()
