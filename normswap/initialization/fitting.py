"""Fit one site in closed form to what the original gives there.

The original computes ``y = γ (x − μ)/σ + β`` and the converted network ``y' = γ' N(W u + b) + β'``, u its own input.
Without a gradient are fitted, in this order:

1. W and b, by ridge regression (:mod:`normswap.initialization.regression`) towards the original's ``(x − μ)/σ``;
   where y is added to a shortcut, towards what makes the shortcut's error good, too; and where a ReLU follows, towards
   what of it is seen (:mod:`normswap.runs.side_by_side` tells both);
2. the signs and offsets of the channels, which are free (:mod:`normswap.initialization.steadying`);
3. γ' and β' per channel, by least squares of y on ``N(W u + b)``. Of all of it: fitted to what a ReLU lets through of
   a poor prediction, they would lift most of it above zero, and the network would be nearly linear.

All is computed on a choice of the positions (:mod:`normswap.initialization.sampling`). Every fifth sample is held
out: it chooses the ridge, and among the candidates, of which the absorbed BatchNorm is one, so that on those samples no
site is worse than without the fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from normswap.errors import InitializationError
from normswap.initialization.absorb import absorb
from normswap.initialization.moments import moments_of_covariance
from normswap.initialization.regression import Covariances, Solution, solve, surrogate_target
from normswap.initialization.sampling import Rows, Sample, Sampling
from normswap.initialization.site_values import Candidate, SiteValues
from normswap.initialization.source_outputs import SourceOutputs
from normswap.initialization.steadying import steady
from normswap.initialization.targets import RegressionTarget
from normswap.norms import apply
from normswap.records import Fit, InitRow
from normswap.runs.paired_sites import PairedSite, SiteBatch
from normswap.runs.processes import (
    agreed,
    everywhere,
    gathered,
    mean_over_rows,
    objects,
    variance_over_rows,
)
from normswap.stages.rewriting import Placed

__all__ = ["SiteRegression"]

_RIDGES = (1.0, 1e-2, 1e-4)
_ROUNDS = 6  # of regression on what is seen
_WORTH = 0.01  # the share of the error that another round must take away
_FLOOR = 1e-3  # of the mean variance: a channel that varies less keeps about the gain it had


@dataclass(frozen=True)
class _Result:
    """How a candidate did on the held-out samples, and the values that the site has with it.

    ``noise`` is ``E‖y' − y‖² / Var y`` of what is seen; ``mean`` and ``std`` are those of y', ``target`` those of y.
    """

    noise: float
    mean: float
    std: float
    target: tuple[float, float]
    values: tuple[Tensor, ...]
    num_groups: int | None
    candidate: Candidate | None


class SiteRegression:
    """The fit of one site to what all batches bring there."""

    def __init__(
        self,
        site: PairedSite,
        target: RegressionTarget,
        batches: Sequence[SiteBatch],
        placed: Placed | None,
        least_group: int | None,
        spread: float,
    ) -> None:
        self.site, self.target, self.placed = site, target, placed
        self.least_group, self.spread = least_group, spread
        self.values = SiteValues(site, target, placed)
        self.batches = [batch for batch in batches if batch.x.numel() and batch.reference.numel()]
        reached = objects(f"'{site.name}'", bool(self.batches))
        if any(reached) and not all(reached):
            raise InitializationError(
                f"the data of process {reached.index(False)} never reaches '{site.name}', that of others does",
                code="processes-differ",
                hint="give each process data that reaches the same modules",
            )
        layout = self.values.layout
        self.sampling = Sampling(self.batches, target, layout.groups * layout.fan_in(self.values.weight))
        self.given = SourceOutputs(site, self.sampling)
        self.outputs: list[Tensor] | None = None

    def run(self, original: nn.Module) -> InitRow:
        """Fit the site of ``original``, and return its row; ``outputs`` are then what it gives, where that is known."""
        name = self.site.name
        if not self.batches:
            return InitRow(name, "absorbed", ("no sample reaches it: not fitted",))
        if not everywhere("shapes", all(self._agrees(batch) for batch in self.batches)):
            return InitRow(name, "absorbed", ("the networks' shapes differ here: not fitted",))
        sample = self.sampling.patches(self.values.patches)
        fit = Covariances.of(sample.train.values, sample.train.t)
        statistics = self.sampling.statistics()
        if not (fit.finite and bool(statistics.var.isfinite().all())):
            return InitRow(name, "absorbed", ("its values are not finite: not fitted",))
        if (
            self.placed is not None and self.placed.bound.measured_by_fit
        ):  # absorbed anew, now that it is known what reaches the layer and the norm
            fqn, known = self.placed.bound.site.layer, {}
            if fqn is not None and self.target.weight.centres:
                known[fqn] = moments_of_covariance(fit.input_mean, fit.inputs, fit.count)
            layer = None if fqn is None else original.get_submodule(fqn)
            apply(absorb(self.placed.bound, layer, known, statistics).values, self.placed.tensor)
        before = best = self._measure(None)
        if not math.isfinite(before.noise):
            return InitRow(name, "absorbed", ("its values are not finite: not fitted",))
        solution = self._regress(sample.centred(fit.input_mean), fit)
        del sample
        for candidate in () if solution is None else self._candidates(solution):
            found = self._measure(candidate)
            best = found if found.noise < best.noise else best
            self.values.restore(before.values, before.num_groups)
        self.values.restore(best.values, best.num_groups)
        if best.candidate is not None:
            self.outputs = self.given.outputs(best.candidate)
        notes = [] if self.sampling.holds_out else [f"{self.sampling.samples} samples: none was held out"]
        if self.batches[0].shortcut is not None:
            notes.append("compensates the error of its shortcut")
        fitted = Fit(
            samples=self.sampling.samples,
            mean=best.target[0],
            std=best.target[1],
            mean_before=before.mean,
            std_before=before.std,
            noise_before=before.noise,
            mean_after=best.mean,
            std_after=best.std,
            noise_after=best.noise,
            num_groups=best.num_groups,
            ridge=None if best.candidate is None else best.candidate.ridge,
        )
        return InitRow(name, "absorbed" if best is before else "matched", tuple(notes), fitted)

    # ------------------------------------------------------------------------------------------------- the data

    def _agrees(self, batch: SiteBatch) -> bool:
        return len(batch.x) == len(batch.reference) and (
            self.site.channels(batch.x[:1]).shape[1:] == batch.reference.shape[1:]
        )

    # --------------------------------------------------------------------------------------- the layer's weights

    def _regress(self, sample: Sample, fit: Covariances) -> Solution | None:
        """Return the source's weights by ridge regression; None where the moments are not finite.

        Args:
            sample: Patches, less the mean of those to fit to.
            fit: The moments of those.
        """
        groups = self.values.layout.groups
        anchor = self.target.anchor.unflatten(0, (groups, -1))
        if self.target.weight.reads_inputs and not self.target.weight.centres:
            anchor = anchor * fit.best_scale(anchor)
        zero_sum = self.target.weight.centres
        judging, fitting = sample.validation, sample.train
        importance = self.target.gain.double().square()
        solution: Solution | None = None
        least = math.inf
        # Where no sample is held out a weaker ridge would always seem better.
        for ridge in _RIDGES if self.sampling.holds_out else _RIDGES[:2]:
            found = solve(fit, anchor, ridge, zero_sum=zero_sum, like=solution)
            missed = mean_over_rows("errors", (found.apply(judging.values) - judging.t).square())
            error = agreed("a ridge", float((missed * importance).sum()))
            if error >= least:
                break
            solution, least = found, error
        if solution is None or sample.train.threshold is None:
            return solution
        best, least = solution, math.inf
        for _ in range(_ROUNDS + 1):
            error = agreed("a round", float(judging.error(self._predicted(solution, judging)).sum()))
            if not error < least:
                break
            worth, best, least = error < (1 - _WORTH) * least, solution, error
            if not worth:
                break
            wanted = surrogate_target(self._predicted(solution, fitting), fitting.y, fitting.threshold)
            t = fitting.t + (wanted - fitting.y) * self.target.inverse_gain
            moments = fit.retargeted(fitting.values, t)
            solution = solve(moments, anchor, solution.ridge, zero_sum=zero_sum, like=solution)
        return best

    def _predicted(self, solution: Solution, rows: Rows) -> Tensor:
        """Return y' as it would be if the norm took nothing away."""
        return self.target.gain * solution.apply(rows.values) + self.target.shift

    # -------------------------------------------------------------------------- signs, offsets and the norm's affine

    def _candidates(self, solution: Solution) -> Iterator[Candidate]:
        weight, bias = solution.weight.flatten(0, 1), solution.bias.flatten()
        ones, prior = torch.ones_like(bias), self.target.gain.double()
        plain = Candidate(weight, bias, ones, torch.zeros_like(bias), prior, self.values.groups, solution.ridge)
        self.values.load(plain)
        self.given.compute()
        if self.placed is None:
            yield plain
            return
        means, squares = self._units(plain)
        norm = self.placed.bound.norm
        deviation = norm.divisor(means, squares)
        for count in self._group_counts():
            if not norm.removes_mean:  # its statistics are no steadier for other signs and offsets
                yield replace(plain, prior=prior * deviation, num_groups=count)
                continue
            signs, offsets = (v.double() for v in steady(means, squares, count or 1, self.spread))
            yield replace(plain, signs=signs, offsets=offsets, prior=prior * signs * deviation, num_groups=count)

    def _units(self, candidate: Candidate) -> tuple[Tensor, Tensor]:
        """Return the mean and the mean square, per channel, of all that the norm takes one mean over. ``(n, C)``"""
        turn = self.given.turned(candidate.signs)
        if self.placed is not None and self.placed.bound.norm.per_position:
            z = gathered("outputs", self.given.sampling.outputs(turn).train.values)
            return z, z.square()
        means, squares = [], []
        for chunk, held, _ in self.given.sampling.chunks():
            z = turn(chunk.x).float()
            z = z.flatten(2) if z.ndim > 2 else z[..., None]
            means.append(z.mean(2)[~held])
            squares.append(torch.linalg.vector_norm(z, dim=2)[~held].square() / z.shape[2])
        return gathered("means", torch.cat(means)), gathered("mean squares", torch.cat(squares))

    def _group_counts(self) -> list[int | None]:
        if self.placed is None or self.least_group is None:
            return [self.values.groups]
        return [*self.placed.bound.norm.group_counts(len(self.target.gain), self.least_group)] or [self.values.groups]

    def _measure(self, candidate: Candidate | None) -> _Result:
        """Give the site the candidate's values, fit the norm's affine, and measure the held-out error.

        None is what the site has, its affine included.
        """
        if candidate is not None:
            self.values.load(candidate)
            if self.placed is not None and self.site.front is not None:
                self.placed.bound.norm.follow(self.site.front, *self._units(candidate))
            self.values.set_affine(torch.ones_like(self.target.gain), torch.zeros_like(self.target.gain))
        fits_affine = candidate is not None and self.site.norm is not None
        if candidate is None:
            sample = self.sampling.outputs(self.site.output, only_held_out=True)
        else:
            turn = self.given.turned(candidate.signs)
            sample = self.given.sampling.outputs(lambda z: self.site.normalized(turn(z)), only_held_out=not fits_affine)
        judging = sample.validation
        outputs = judging.values
        if candidate is not None and fits_affine:
            gain, shift = _affine(sample.train, candidate.prior.float())
            self.values.set_affine(gain, shift)
            outputs = gain * outputs + shift
        unit = self.target.unit
        mean, std = _mean_and_std(outputs * unit)
        error, size = ((v * unit.square()).double().sum() for v in (judging.error(outputs), judging.size))
        return _Result(
            noise=agreed("an error", float(error / size.clamp(min=1e-30))),
            mean=mean,
            std=std,
            target=_mean_and_std(judging.y * unit),
            values=tuple(p.detach().clone() for p in self.values.parameters),
            num_groups=self.values.groups,
            candidate=candidate,
        )


def _affine(rows: Rows, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Return γ' and β' by least squares; a channel that hardly varies keeps the gain that ``prior`` gives."""
    mean = mean_over_rows("outputs", rows.values)
    h = rows.values - mean
    variance = mean_over_rows("variances", h.square())
    whole = variance.mean().clamp(min=1e-30)
    floor, prior = _FLOOR * whole, prior / whole.sqrt()
    centre = mean_over_rows("targets", rows.y)
    gain = (mean_over_rows("covariances", h * (rows.y - centre)) + floor * prior) / (variance + floor)
    return gain, centre - gain * mean


def _mean_and_std(value: Tensor) -> tuple[float, float]:
    value = value.double().flatten()
    return float(mean_over_rows("outputs", value)), float(variance_over_rows("outputs", value).sqrt())
