"""Initialize from the BatchNorm itself: exact where the recipe is a reparameterization, absorbed where it is not.

With BatchNorm in evaluation, per channel, ``y = γ (x − μ)/σ + β``, ``σ = sqrt(var + eps)``, ``x = W·u + b``:

- a recipe without division (``wn+mobn``, ``wn``, ``mobn``, ``none``) takes γ/σ into the weight: the same function;
- a per-sample norm gets t = (x − μ)/σ out of the layer, of mean 0 and variance ``r = var/(var + eps)`` over the data,
  and takes ``γ·sqrt(r_g + eps')`` and β: with each new norm replaced by its own affine at those expected statistics,
  the converted model *is* the original.

What BatchNorm has recorded may not be what the data at hand has, after a change of domain or of preprocessing. Where
there is data, t's mean and variance are its own: the n samples' and those of 16 more that are as recorded, so that a
single sample, or constant ones, cannot decide alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from normswap.graph.after_norm import BatchNormState
from normswap.initialization.moments import Moments, centre
from normswap.nn import FilterLayout
from normswap.recipes.parts import Bias, Incoming, Takes
from normswap.records import InitRow
from normswap.runs.watching import Statistics
from normswap.stages.rewriting import Placed

__all__ = ["absorb"]


_RECORDED_SAMPLES = 16  # that what the BatchNorm has recorded counts for, beside the data's


def absorb(placed: Placed, moments: Mapping[str, Moments], data: Statistics | None = None) -> InitRow:
    """Give one site's new parts their values.

    Args:
        placed: What was put there.
        moments: The input moments of layers whose weight is standardized, by fqn.
        data: What reaches the BatchNorm on data at hand.
    """
    site, state, part = placed.step.site, placed.state, placed.norm_part
    if state.gamma.is_meta:
        return InitRow(site.norm, "nothing", ("on the meta device: structure only",))
    assert state.mean is not None
    assert state.var is not None
    gamma, beta, mean = state.gamma.double(), state.beta.double(), state.mean.double()
    inverse_std = state.inverse_std
    scale = {
        Takes.NOTHING: torch.ones_like(gamma),
        Takes.NORMALIZATION: inverse_std,
        Takes.AFFINE: gamma * inverse_std,
    }[part.takes]
    level, ratio = _expected(state, data)
    notes: list[str] = []
    excess = torch.ones_like(gamma)
    if placed.layer is not None:
        assert placed.weight is not None
        weight = placed.weight.double()
        if placed.bias is not None and part.bias is not Bias.KEPT:
            mean = mean - placed.bias.double()
        if placed.weight_part is not None and placed.weight_part.centres:
            known = moments.get(site.layer or "")
            if known is None:
                notes.append(
                    "no inputs could be had: the filters' means were removed evenly, which loses most of the model"
                )
                known = _even(placed.layer, weight)
            layout = FilterLayout.of(placed.layer)
            if known.assumed:
                own = state.mean.double() - (0 if placed.bias is None else placed.bias.double())
                known = known.corrected(layout, weight, own)
            weight, shift = centre(layout, weight, known)
            mean = mean - shift
        if placed.weight_part is not None:
            excess = placed.weight_part.load(placed.layer, weight, scale)
        else:
            _copy(placed.layer.weight, FilterLayout.of(placed.layer).scale(weight, scale))
    elif placed.affine is not None:
        _copy(placed.affine.weight, scale)
    incoming = Incoming(gamma, beta, level, ratio, excess * scale * mean, excess)
    if part.bias is Bias.KEPT:
        _follow(state, incoming)
        bias = None if placed.bias is None else excess * placed.bias.double()
    else:
        bias = part.load(placed.norm, incoming)
    if bias is not None:
        _copy(placed.layer.bias if placed.layer is not None else placed.affine.bias, bias)  # type: ignore[union-attr]
    _continue_count(placed)
    method = "exact" if part.takes is Takes.AFFINE else "absorbed"
    return InitRow(site.norm, method, tuple(notes))


def _expected(state: BatchNormState, data: Statistics | None) -> tuple[Tensor, Tensor]:
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


def _copy(target: Tensor | nn.Module, value: Tensor) -> None:
    assert isinstance(target, Tensor)
    with torch.no_grad():
        target.copy_(value)


def _follow(state: BatchNormState, incoming: Incoming) -> None:
    """Let a BatchNorm that stays follow its layer's new weight: its mean and, where no scale is kept, its variance."""
    assert state.mean is not None
    assert state.var is not None
    var = state.var.double()
    gain = (var * incoming.scale.square() + state.eps).sqrt() / (incoming.scale * (var + state.eps).sqrt())
    _copy(state.mean, incoming.mean)
    _copy(state.var, var * incoming.scale.square())
    _copy(state.gamma, incoming.gamma * gain)


def _continue_count(placed: Placed) -> None:
    """Let a running mean go on where the old one was: with ``momentum=None`` the count is its weight."""
    count = getattr(placed.norm, "num_batches_tracked", None)
    if isinstance(count, Tensor) and placed.state.batches is not None and count is not placed.state.batches:
        _copy(count, placed.state.batches)


def _even(layer: nn.Module, weight: Tensor) -> Moments:
    layout = FilterLayout.of(layer)
    fan_in = layout.fan_in(weight)
    uniform = weight.new_full((layout.groups, fan_in), 1 / fan_in)
    return Moments(torch.zeros_like(uniform), uniform)
