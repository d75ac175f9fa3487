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
from normswap.errors import Text, argument
from normswap.initialization.absorb import Absorb
from normswap.initialization.base import Outcome, Work
from normswap.initialization.fitting import SiteRegression
from normswap.initialization.heads import find_heads
from normswap.initialization.targets import RegressionTarget
from normswap.records import Agreement, InitRow, NormKind
from normswap.runs.data import few_samples
from normswap.runs.paired_sites import PairedSite, SiteBatch
from normswap.runs.side_by_side import run_side_by_side
from normswap.stages.rewriting import Placed

__all__ = ["Fitted", "Match", "match_sites"]

_POOR = 0.3  # of the relative error of the output, where a classifier gives another class to about one in ten


Fitted = Callable[[PairedSite, RegressionTarget, Sequence[SiteBatch]], None]
"""Called with a site that has been fitted, what it was fitted to, and what all batches bring there."""


def match_sites(
    work: Work, converted: nn.Module, placed: Sequence[Placed], fitted: Fitted | None = None
) -> dict[str, InitRow]:
    """Fit ``converted``, whose sites hold the absorbed BatchNorms, to ``work.source``.

    Args:
        work: The original and how to match to it.
        converted: The rewritten copy; the values of its new parts are changed in place.
        placed: What was put into it.
        fitted: Called with each site once it is fitted.

    Returns:
        A row for each site that was reached, by its norm's name, and for each fitted head.
    """
    original, data = work.source, work.enough
    assert data is not None
    by_name = {one.name: one for one in placed}
    targets = {name: RegressionTarget.at(one, original, work.scales.get(name)) for name, one in by_name.items()}
    sites = _paired(original, placed)
    heads = find_heads(original, converted, {id(site.source) for site in sites}, few_samples(original, data[0]))
    targets |= {head.name: RegressionTarget.of_layer(head.source) for head in heads}
    sites += heads
    rows: dict[str, InitRow] = {}

    def regress(site: PairedSite, batches: Sequence[SiteBatch]) -> list[Tensor] | None:
        target = targets[site.name]
        one = by_name.get(site.name)
        least_group = one.bound.recipe.least_group if one is not None and work.choose_groups else None
        with torch.no_grad():
            regression = SiteRegression(site, target, batches, one, least_group, work.options.spread)
            rows[site.name] = regression.run(original)
            if fitted is not None:
                fitted(site, target, batches)
        if work.progress is not None:
            work.progress(site.name, len(rows), len(sites))
        if work.isolated:
            return [target.targets(batch)[1] for batch in batches]
        return regression.outputs if len(regression.batches) == len(batches) else None

    run_side_by_side(original, converted, sites, data, regress)
    for site in sites:  # no parameter, and so put back with all else that the forwards may have changed
        if (row := rows.get(site.name)) and row.fit and row.fit.num_groups is not None and site.norm is not None:
            by_name[site.name].bound.norm.regroup(site.norm, row.fit.num_groups)
    return rows


def _paired(original: nn.Module, placed: Sequence[Placed]) -> list[PairedSite]:
    """Return where the sites that can be fitted lie in both networks, in the plan's order."""
    sites = []
    for one in placed:
        source, name = one.source, one.name
        if not one.bound.norm.is_fitted or source is None:
            continue
        owner, _, buffer = name.partition(":")
        module = original.get_submodule(owner)
        if one.bound.site.kind == NormKind.MODULE:
            sites.append(PairedSite(name, source, one.norm, module, moved=one.bound.site.axis == -1, front=one.front))
        elif isinstance(mean := getattr(module, buffer or "running_mean", None), Tensor):
            sites.append(PairedSite(name, source, one.norm, None, mean, front=one.front))
    return sites


def _where_poor(agreed: Agreement | None, rows: Sequence[InitRow]) -> tuple[str, ...]:
    """Return a note on the sites of the largest errors, where the outputs agree poorly."""
    if agreed is None or agreed.relative_error <= _POOR:
        return ()
    fits = sorted(((row.fit.noise_after, row.name) for row in rows if row.fit), reverse=True)
    worst = ", ".join(f"{name} ({noise:.2f})" for noise, name in fits[:3])
    if not worst:
        return (Text(f"the outputs agree poorly: {argument('init', 'tune')} may help, or train on"),)
    return (
        Text(
            f"the outputs agree poorly; the errors are largest, as shares of the variance, at {worst}: give such sites "
            f"another recipe, as ln, leave them ({argument('exclude')}), take larger groups "
            f"({argument('num_groups', 1)}), or train on"
        ),
    )


class Match(Absorb):
    """Fit each site to the original on calibration data, in closed form, from what :class:`Absorb` gives it."""

    name = "match"
    fits = True

    def refine(self, target: nn.Module, placed: Sequence[Placed]) -> Outcome:
        """Fit, and measure how far the outputs agree."""
        fitted = match_sites(self.work, target, placed)
        notes = (*self.further(target, placed, fitted), *self.assumed)
        rows = [fitted.get(name, row) for name, row in self.rows.items()]
        rows += [row for name, row in fitted.items() if name not in self.rows]
        groups = {row.name: row.fit.num_groups for row in rows if row.fit and row.fit.num_groups is not None}
        assert self.work.enough is not None
        agreed = agreement(self.work.original, target, self.work.enough)
        return Outcome(tuple(rows), (*notes, *_where_poor(agreed, rows)), agreed, groups)

    def further(self, target: nn.Module, placed: Sequence[Placed], fitted: Mapping[str, InitRow]) -> tuple[str, ...]:
        """Do what comes after the fit, and say what came of it: nothing here."""
        return ()
