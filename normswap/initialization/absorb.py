"""Initialize from the BatchNorm itself: exact where the recipe is a reparameterization, absorbed where it is not.

With BatchNorm in evaluation, per channel, ``y = γ (x − μ)/σ + β``, ``σ = sqrt(var + eps)``, ``x = W·u + b``:

- a recipe without division (``wn+mobn``, ``wn``, ``mobn``, ``none``) takes γ/σ into the weight: the same function;
- a per-sample norm gets t = ±(x − μ)/σ + o out of the layer, of mean o and variance ``r = var/(var + eps)`` over the
  data, and takes ``±γ·sqrt(r_g + eps')`` and β ∓ γo: with each new norm replaced by its own affine at those expected
  statistics, the converted model *is* the original. The signs and offsets are those of
  :mod:`normswap.initialization.steadied`.

What BatchNorm has recorded may not be what the data at hand has, after a change of domain or of preprocessing. Where
there is data, t's mean and variance are its own: the n samples' and those of 16 more that are as recorded, so that a
single sample, or constant ones, cannot decide alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from normswap.initialization.base import Initializer, Outcome, Work
from normswap.initialization.centring import moments_for
from normswap.initialization.moments import Moments, centre
from normswap.initialization.steadied import Steadied, steadied
from normswap.nn import FilterLayout
from normswap.nn.readers import fused_inputs
from normswap.norms import Along, Assignment, Bias, Incoming, LinearOf, NewValue, NormState, Takes, named, of_present
from normswap.records import InitRow
from normswap.runs.watching import Statistics, measure_statistics
from normswap.stages.bound import BoundStep
from normswap.stages.rewriting import Placed

__all__ = ["Absorb", "Absorbed", "absorb"]


_WITHOUT_INPUTS = {
    True: "no inputs could be had: the filters' means were removed evenly, which loses most of the model",
    False: "no inputs could be had: what the layer reads was taken to have the length 1",
}
"""A note where moments are not known, by whether the filters lose their means."""

_RECORDED_SAMPLES = 16  # that what the BatchNorm has recorded counts for, beside the data's


@dataclass(frozen=True)
class Absorbed:
    """The values of a site's new parts, ``layer.…``, ``affine.…`` and ``norm.…``, and the site's row of the report."""

    values: Assignment
    row: InitRow


@dataclass(frozen=True)
class _Handed:
    """What the layer, or the affine, gets, and what it hands on to the norm.

    Args:
        values: Its new values, but for the bias.
        excess: The factor by which its output exceeds the one asked for. ``(C,)``
        mean: The mean of its output, before any bias and before ``excess`` and the factor asked for. ``(C,)``
        notes: What a person should know.
    """

    values: Assignment
    excess: Tensor
    mean: Tensor
    notes: tuple[str, ...] = ()


def absorb(
    step: BoundStep,
    layer: nn.Module | None,
    moments: Mapping[str, Moments],
    data: Statistics | None = None,
    steadied: Steadied | None = None,
) -> Absorbed:
    """Return the values of one site's new parts. Pure: nothing is changed.

    Args:
        step: What is done there.
        layer: The layer that takes the norm up, as it is before the step; None where none does.
        moments: The input moments of layers whose weight is standardized, by fqn.
        data: What reaches the BatchNorm on data at hand.
        steadied: The signs and offsets of its channels; None for none.
    """
    site, state, norm = step.site, step.state, step.norm
    if state.gamma.is_meta:
        return Absorbed({}, InitRow(site.norm, "nothing", ("on the meta device: structure only",)))
    factor = _factor(norm.takes, state)
    sign, offset = (torch.ones_like(factor), torch.zeros_like(factor)) if steadied is None else steadied
    factor = sign * factor
    if step.step.reader is not None:
        assert layer is not None
        values = _with_known_terms(_by_reader(step, layer, factor), state, layer, "reader")
        return Absorbed(values, InitRow(site.norm, "exact"))
    handed = _by_affine(step, factor) if layer is None else _by_layer(step, layer, factor, moments)
    level, ratio = _expected(state, data)
    total = handed.excess * factor
    encoded = norm.encode(
        Incoming(
            state,
            sign * level + offset,
            ratio,
            total * handed.mean,
            handed.excess,
            total,
            handed.mean,
            sign,
            offset,
        )
    )
    values = dict(handed.values) | named("front", encoded.front) | named("norm", encoded.values)
    bias = encoded.bias
    old = None if layer is None else layer._parameters.get("bias")
    if norm.bias is Bias.KEPT and old is not None:
        bias = NewValue(handed.excess * old.detach().double(), (LinearOf("layer.bias", handed.excess),))
    if bias is not None:
        values[f"{'affine' if layer is None else 'layer'}.bias"] = bias
    method = "exact" if step.recipe.exact else "absorbed"
    return Absorbed(_with_known_terms(values, state, layer, "layer"), InitRow(site.norm, method, handed.notes))


def _factor(takes: Takes, state: NormState) -> Tensor:
    """Return what the layer's filters are multiplied with. ``(C,)`` float64"""
    if takes is Takes.NOTHING:
        return torch.ones_like(state.inverse_std)
    return state.inverse_std if takes is Takes.NORMALIZATION else state.gamma.double() * state.inverse_std


def _by_affine(step: BoundStep, factor: Tensor) -> _Handed:
    state = step.state
    assert state.mean is not None
    terms = (LinearOf("norm.weight", state.inverse_std),) if step.norm.takes is Takes.AFFINE else ()
    values = {} if step.norm.takes is Takes.NOTHING else {"affine.weight": NewValue(factor, terms)}
    return _Handed(values, torch.ones_like(factor), state.mean.double())


def _by_reader(step: BoundStep, reader: nn.Module, factor: Tensor) -> Assignment:
    """Return the values of the layer behind the norm: ``γ/σ·x + (β − γμ/σ)`` goes into its weight and bias."""
    state = step.state
    assert state.mean is not None
    shift = state.beta.double() - factor * state.mean.double()
    values = {}
    for name, value in fused_inputs(reader, factor, shift):
        scaled = name.startswith("weight")
        terms = [LinearOf(f"reader.{name}", factor if scaled else None, over_inputs=scaled)]
        if scaled:
            share = torch.where(factor == 0, torch.zeros_like(factor), state.inverse_std / factor)
            terms.append(LinearOf("norm.weight", share, over_inputs=True, along=Along.FILTERS))
        values[name] = NewValue(value, tuple(terms))
    return named("reader", values)


def _by_layer(step: BoundStep, layer: nn.Module, factor: Tensor, moments: Mapping[str, Moments]) -> _Handed:
    assert step.state.mean is not None
    layout = FilterLayout.of(layer)
    weight = FilterLayout.weight(layer).detach()
    dtype, weight = weight.dtype, weight.double()
    bias = layer._parameters.get("bias")
    mean = step.state.mean.double()
    if bias is not None and step.norm.bias is not Bias.KEPT:
        mean = mean - bias.detach().double()
    notes: tuple[str, ...] = ()
    form, known = step.weight, moments.get(step.site.layer or "")
    if known is None:
        notes = (_WITHOUT_INPUTS[form.centres],) if form.reads_inputs else ()
        known = _even(layout, weight)
    form = form.for_inputs(known.square)
    if form.centres:
        if known.assumed:
            own = step.state.mean.double() - (0 if bias is None else bias.detach().double())
            known = known.corrected(layout, weight, own)
        weight, shift = centre(layout, weight, known)
        mean = mean - shift
    encoded = form.encode(layout, weight, factor, dtype)
    values = {name: _of_gamma(new, step) for name, new in encoded.values.items()}
    return _Handed(named("layer", values), encoded.excess, mean, notes)


def _of_gamma(new: NewValue, step: BoundStep) -> NewValue:
    """Return a value with its terms of the factor as terms of γ, where γ/σ is the factor, and else without them."""
    terms = [term for term in new.terms if term.old != "factor"]
    if step.norm.takes is Takes.AFFINE:
        for term in new.terms:
            if term.old == "factor" and term.factor is not None:
                terms.append(replace(term, old="norm.weight", factor=term.factor * step.state.inverse_std))
    return NewValue(new.value, tuple(terms))


def _with_known_terms(values: Assignment, state: NormState, layer: nn.Module | None, part: str) -> Assignment:
    """Return ``values`` with the terms of those old parameters that there are."""
    present = {f"norm.{name}" for name, own in zip(("weight", "bias"), state.affine, strict=True) if own}
    if layer is not None:
        present |= {f"{part}.{name}" for name, parameter in layer._parameters.items() if parameter is not None}
    return {name: NewValue(new.value, of_present(new.terms, present)) for name, new in values.items()}


def _expected(state: NormState, data: Statistics | None) -> tuple[Tensor, Tensor]:
    """Return mean and variance of (x − μ)/σ."""
    assert state.mean is not None
    assert state.var is not None
    level, ratio = torch.zeros_like(state.inverse_std), state.var.double() * state.inverse_std.square()
    if data is None:
        return level, ratio
    share = data.samples / (data.samples + _RECORDED_SAMPLES)
    found = (data.mean - state.mean.double()) * state.inverse_std
    square = (1 - share) * ratio + share * (data.var * state.inverse_std.square() + found.square())
    level = share * found
    return level, square - level.square()


def _even(layout: FilterLayout, weight: Tensor) -> Moments:
    fan_in = layout.fan_in(weight)
    uniform = weight.new_full((layout.groups, fan_in), 1 / fan_in)
    return Moments(torch.zeros_like(uniform), uniform, weight.new_ones(layout.groups))


class Absorb(Initializer):
    """Keep the model's function by what its BatchNorms know, at the statistics of the data where there is some."""

    name = "absorb"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.rows: dict[str, InitRow] = {}
        self.moments, self.assumption = moments_for(
            work.bound, work.source, work.enough, work.example, fitted=self.fits
        )
        self.data: Mapping[str, Statistics] = {}
        self.steadied: Mapping[str, Steadied] = {}
        if not work.bound.recipe.exact and not self.fits:  # a fit measures its own
            norms = [step.site.norm for step in work.bound.modules]
            if work.enough is not None:
                self.data = measure_statistics(work.source, norms, work.enough)
            if work.options.spread:
                self.steadied = steadied(work.bound, work.source, work.enough, work.example, work.options.spread)

    def values(self, step: BoundStep) -> Assignment:
        """Return the values that keep the site's function."""
        site = step.site
        fqn = step.step.taken_up_by
        layer = None if fqn is None else self.work.source.get_submodule(fqn)
        data = None if step.recipe.exact else self.data.get(site.norm)
        found = absorb(step, layer, self.moments, data, self.steadied.get(site.norm))
        self.rows[site.norm] = found.row
        return found.values

    def refine(self, target: nn.Module, placed: Sequence[Placed]) -> Outcome:
        """Return what :meth:`values` has done: nothing is left to do."""
        return Outcome(tuple(self.rows.values()), self.assumed)

    @property
    def assumed(self) -> tuple[str, ...]:
        """What was assumed of data that was not given."""
        return (self.assumption,) if self.assumption else ()
