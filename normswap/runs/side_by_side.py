"""Run a model and its converted copy side by side: all batches together, site after site, each layer computed once.

Note [Side by side]
Fitting a site needs what reaches it in the converted network, which depends on how all sites before it were fitted, and
what the original gives there. Running both networks from the start for every site would cost depth squared. Here each
batch runs through each network in a pass that pauses where a site's output is made (:mod:`normswap.runs.pausing`). When
all batches have arrived the site is fitted, its output is computed anew, and they go on. What is alive is what the
forwards hold at one site. No graph is needed: a model that cannot be traced runs as well as any other.

Note [Residual additions]
In a residual network the norm's output is added to a shortcut on which the converted network's errors travel along.
Where a norm's output goes into an addition and nowhere else, the site is therefore fitted there, when both addends are
known: its output can then correct the shortcut's error. A first run of both networks finds these additions, and also
where a norm's output, or that sum, goes into a ReLU and nowhere else: differences below zero then make no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import InitializationError, argument
from normswap.runs.calling import Batch, run_on
from normswap.runs.data import few_samples
from normswap.runs.guard import set_mode, untouched
from normswap.runs.paired_sites import PairedSite, SiteBatch
from normswap.runs.pausing import PausableRun, Pause, pausing_converted, pausing_original
from normswap.runs.tensors import tensors_of
from normswap.runs.uses import Uses, find_uses
from normswap.runs.writes import kept

__all__ = ["run_side_by_side"]

FitSite = Callable[[PairedSite, Sequence[SiteBatch]], Sequence[Tensor] | None]
"""Fits one site, and returns what the converted network goes on with; see :func:`run_side_by_side`."""


def run_side_by_side(
    original: nn.Module,
    converted: nn.Module,
    sites: Sequence[PairedSite],
    batches: Sequence[Batch],
    fit_site: FitSite,
) -> None:
    """Run both networks over ``batches`` and call ``fit_site`` once for each site, in the order of execution.

    Args:
        original: The original; left as it was.
        converted: The converted network, of which only what ``fit_site`` changes of its parameters in place stays
            changed.
        sites: The sites, in execution order as far as it is known.
        batches: The inputs of each forward pass.
        fit_site: Fits one site to what all batches have there, and returns what the converted network goes on with in
            each of them; None lets it go on with what the site gives now. A site that is called more than once is
            fitted at its first call.

    Raises:
        InputError: The forward fails.
        InitializationError: The forward computes otherwise when it is paused.
    """
    with ExitStack() as stack:
        stack.enter_context(untouched(original))
        stack.enter_context(untouched(converted))
        set_mode(original, False)
        set_mode(converted, False)
        at_addition, uses = _find_uses(original, converted, sites, few_samples(original, batches[0]))
        functional = {id(site.running_mean): site for site in sites if site.original is None}
        originals = [PausableRun(original, inputs, functional) for inputs in batches]
        converteds = [PausableRun(converted, inputs) for inputs in batches]
        for run in (*originals, *converteds):
            stack.callback(run.close)
        for site in sites:
            stack.enter_context(pausing_original(site, site.name in at_addition))
            stack.enter_context(pausing_converted(site, site.name in at_addition))
        _advance(list(zip(originals, converteds, strict=True)), sites, uses, fit_site)
        output = originals[0].finish()
    _check_undisturbed(original, batches[0], output)


def _find_uses(
    original: nn.Module, converted: nn.Module, sites: Sequence[PairedSite], inputs: Batch
) -> tuple[frozenset[str], Uses]:
    """Return the sites that go into an addition in both networks, and all uses in the converted one.

    In both: what a BatchNorm with an activation gives is not what the new norm before it gives.
    """
    added = find_uses(original, {s.name: s.original for s in sites if not s.alone and s.original is not None}, inputs)
    uses = find_uses(converted, {s.name: s.end for s in sites if not s.alone}, inputs)
    return added.into_addition & uses.into_addition, uses


def _advance(
    runs: Sequence[tuple[PausableRun, PausableRun]], sites: Sequence[PairedSite], uses: Uses, fit_site: FitSite
) -> None:
    """Advance all runs, of the original and of the converted network, to the converted network's end.

    Of the sites at which runs are paused, the one that comes first in ``sites`` is fitted, once all runs that reach it
    without another site in between are there.
    """
    rank = {site.name: i for i, site in enumerate(sites)}
    by_name = {site.name: site for site in sites}
    fitted: set[str] = set()
    for _, second in runs:
        second.advance()
    while paused := [second.paused.name for _, second in runs if second.paused is not None]:
        name = min(paused, key=rank.__getitem__)
        arrived = [(first, second) for first, second in runs if second.paused and second.paused.name == name]
        if name not in fitted and _fit_arrived(by_name[name], arrived, uses, fit_site):
            fitted.add(name)
        for first, second in arrived:
            first.passed.pop(name, None)
            second.advance()


def _fit_arrived(
    site: PairedSite, arrived: Sequence[tuple[PausableRun, PausableRun]], uses: Uses, fit_site: FitSite
) -> bool:
    """Fit ``site`` to the batches whose runs have arrived there; return whether there were any that count."""
    site_batches, pauses = [], []
    for first, second in arrived:
        here, there = second.paused, first.until(site.name)
        assert here is not None
        if there is None or not there.valid:
            continue
        site_batches.append(_site_batch(site.name, there, here, uses))
        pauses.append(here)
    if not site_batches:
        return False
    with kept():
        outputs = fit_site(site, site_batches)
    for here, output in zip(pauses, outputs or (), strict=outputs is not None):
        here.output = output
    return True


def _site_batch(name: str, there: Pause, here: Pause, uses: Uses) -> SiteBatch:
    """Return what one batch has at a site, ``there`` in the original and ``here`` in the converted network."""
    shortcut = None
    if there.shortcut is not None and here.shortcut is not None:
        one_shape = here.shortcut.shape == there.shortcut.shape == there.x.shape
        shortcut = (there.shortcut, here.shortcut) if one_shape else None
    into_relu = name in (uses.sum_into_relu if shortcut is not None else uses.into_relu)
    return SiteBatch(here.x, there.x, shortcut, into_relu)


def _check_undisturbed(model: nn.Module, inputs: Batch, output: Any) -> None:
    """Refuse a model whose forward keeps state of its own between its layers: paused batches would mix it up.

    One that draws random numbers is refused, too: both networks would draw others.
    """
    with untouched(model):
        set_mode(model, False)
        plain = run_on(model, inputs)
    expected, found = tensors_of(plain), tensors_of(output)
    if len(expected) != len(found) or not all(map(_same, expected, found)):
        raise InitializationError(
            "the model gives another output when it is paused between its layers: its forward keeps state or is random",
            code="calibration-state",
            hint=f"calibrate with one batch if it keeps state, or convert with {argument('init', 'absorb')}",
        )


def _same(a: Tensor, b: Tensor) -> bool:
    finite = a[a.isfinite()].abs()
    size = float(finite.amax()) if finite.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3 * size, equal_nan=True)
