"""Samples made from what a network's BatchNorms have recorded, for a calibration where there is no data.

Note [Synthetic samples]
A batch x of noise is moved, with the network fixed, until each BatchNorm l sees the mean μ̂ and the deviation σ̂ that it
has recorded of the training data:

    mismatch(x) = mean over l and channels c of  (μ_lc(x) − μ̂_lc)² / σ̂_lc²  +  (σ_lc(x)/σ̂_lc − 1)²

So ZeroQ (Cai et al. 2020) and DeepInversion (Yin et al. 2020) make data to quantize a network and to distil it. Noise
that is only shaped at each norm (Note [Data-free moments]) has the right variances and the correlations of noise; these
samples have the correlations, too, with which the network gives the right variances by itself.

They begin as noise with the spectrum of natural images, in the units of the data: its scale is what gives the first
BatchNorm its recorded deviation. Then Adam moves the pixels and, as these could not move far together, an offset and a
gain of each channel. The rate falls to zero along a cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normswap.checks.conversion import refuse_unfit
from normswap.errors import InitializationError, InputError, argument, first_line
from normswap.graph.records import refuse_wrappers
from normswap.initialization.noise import batch_for, noise_like, seen_by_statistics
from normswap.options import check_callable
from normswap.records import SyntheticSamples
from normswap.runs.batches import sample_count
from normswap.runs.calling import call, does_not_run, run_on_data
from normswap.runs.guard import set_mode, untouched
from normswap.runs.inputs import Inputs, example_of, make_up_inputs
from normswap.runs.watching import not_finite

__all__ = ["synthesize_samples"]

_RATE = 0.1  # per step, in units of the noise's deviation; of offsets and logarithms of gains, too
_UNNAMED = "a BatchNorm"
_LEAST_VARIANCE = 1e-3  # of a norm's mean variance: a dead channel's deviation is rounding


def synthesize_samples(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    count: int = 64,
    steps: int = 100,
    progress: Callable[[str, int, int], None] | None = None,
) -> SyntheticSamples:
    """Make samples on which the BatchNorms of ``model`` see the statistics that they have recorded.

    For a calibration without data: ``convert(model, "gn+ws", calibration=synthesize_samples(model, x))``. It takes
    ``steps`` forward and backward passes over ``count`` samples. What it brings, and where it brings nothing, is in the
    documentation's *Calibration*.

    Args:
        model: A trained network with BatchNorms; only read.
        example_inputs: Inputs of the right shapes and dtypes, as for ``convert``; their values do not matter, but of
            integers, which are kept. Default: those that a program was exported with, or made-up ones.
        count: How many samples.
        steps: Steps of Adam per batch.
        progress: Called with a word, the number of steps taken and of all.

    Returns:
        The samples in batches, and their mismatch.

    Raises:
        InputError: The model does not run on the inputs, none could be made up, they hold no floating-point numbers, or
            no BatchNorm with statistics depends on them; or the model is no module, or a TorchScript one.
        InitializationError: What reaches a norm is not finite, or the model gives no gradients.
    """
    for name, value in (("count", count), ("steps", steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(
                f"{argument(name, value)} is no number of {'samples' if name == 'count' else 'steps'}",
                code="option-value",
                hint="give a whole number of at least 1",
            )
    check_callable("progress", progress)
    refuse_wrappers(model)
    refuse_unfit(model)
    example = example_of(model, example_inputs)
    if example is None:
        example = make_up_inputs(model)
    if example is None:
        raise InputError(
            "no inputs are given, and none could be made up that the model takes",
            code="inputs-missing",
            hint=f"give {argument('example_inputs')}",
        )
    made = []
    with untouched(model), torch.inference_mode(False), torch.enable_grad():
        set_mode(model, False)
        for parameter in model.parameters():
            if not is_lazy(parameter):
                parameter.requires_grad_(False)
        sizes = _sizes(model, example, count)
        for number, batch in enumerate(sizes):

            def tell(step: int, done: int = number * steps) -> None:
                if progress is not None:
                    progress("synthetic samples", done + step, steps * len(sizes))

            made.append(_moved(model, _Start.of(example, batch, number), steps, tell))
    batches, before, after = zip(*made, strict=True)
    return SyntheticSamples(batches, sum(before) / len(made), sum(after) / len(made))


def _sizes(model: nn.Module, example: Inputs, count: int) -> list[int]:
    """Return how many samples are in each batch; as many as in the example where ``model`` takes no other number."""
    parts = -(-count // batch_for(example))
    sizes = [count // parts + (number < count % parts) for number in range(parts)]
    try:
        run_on_data(model, noise_like(example, sizes[0]))
    except InputError:
        own = sample_count(example)
        run_on_data(model, noise_like(example, own))
        return [own] * -(-count // own)
    return sizes


@dataclass(frozen=True)
class _Start:
    """The noise that a batch begins as, by position or keyword, and the keys of what is moved."""

    values: dict[Any, Any]
    by_name: bool
    moved: tuple[Any, ...]

    @classmethod
    def of(cls, example: Inputs, batch: int, seed: int) -> _Start:
        noise = noise_like(example, batch, seed)
        values = dict(noise) if isinstance(noise, Mapping) else dict(enumerate(noise))
        moved = tuple(k for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 1)
        if not moved:
            raise InputError(
                "no input is a batch of floating-point numbers, which could be changed",
                code="inputs-type",
                hint="samples can be made of images, sound and other numbers in one tensor, not of words or lists of "
                "images; calibrate with data",
            )
        return cls(values, isinstance(noise, Mapping), moved)

    def inputs(self, moved: Mapping[Any, Tensor]) -> Inputs:
        values = self.values | dict(moved)
        return values if self.by_name else tuple(values.values())


class _Mismatch:
    """The mismatch of one call, and the scale that would give the first BatchNorm its recorded deviation."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._terms: list[Tensor] = []
        self._names = {id(tensor): name.rpartition(".")[0] for name, tensor in model.named_buffers()}
        self._seen: list[str] = []
        self._sound: set[int] = set()
        self.scale = 1.0

    def __call__(self, inputs: Inputs) -> Tensor:
        self._terms, self._seen = [], []
        with seen_by_statistics(self.model, self._see):
            try:
                call(self.model, inputs)
            except InitializationError:
                raise
            except Exception as cause:
                raise does_not_run(cause) from cause
        if not self._terms:
            raise InputError(
                "no BatchNorm with statistics is reached by the inputs",
                code="no-statistics",
                hint="calibrate with data: there is nothing that samples could be made from",
            )
        return torch.stack(self._terms).mean()

    @property
    def where(self) -> str:
        """The first norm whose term is not finite."""
        return next((name for name, term in zip(self._seen, self._terms, strict=True) if not term.isfinite()), _UNNAMED)

    def derived(self, inputs: Inputs, leaves: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Return the mismatch and its gradients."""
        loss = self(inputs)
        _refuse_unusable(loss, self)
        try:
            return loss.detach(), torch.autograd.grad(loss, leaves, allow_unused=True)
        except Exception as cause:  # as of gradient checkpointing, which does not see again what was seen at the norms
            raise InitializationError(
                f"the gradients of the model failed: {type(cause).__name__}: {first_line(cause)}",
                code="no-gradient",
                hint="turn gradient checkpointing off, or calibrate with data",
            ) from cause

    def _see(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        name = self._names.get(id(mean))
        self._seen.append(_UNNAMED if name is None else f"'{name}'")
        if id(mean) not in self._sound and bool((var == 0).all()):
            raise _no_deviation(self._seen[-1])
        self._sound.add(id(mean))
        y = x if x.dtype == torch.float64 else x.float()
        own_var, own_mean = torch.var_mean(y, [0, *range(2, y.ndim)], correction=0)
        mean, var = mean.to(y), var.to(y)
        floor = _LEAST_VARIANCE * var.mean().clamp(min=torch.finfo(torch.float32).tiny)
        if not self._terms:
            self.scale = float(((var + floor) / (own_var.detach() + floor)).log().median().div(2).exp())
        deviation, own = (v.clamp(min=0).add(floor).sqrt() for v in (var, own_var))
        self._terms.append(((own_mean - mean) / deviation).square().mean() + (own / deviation - 1).square().mean())
        return x


def _moved(model: nn.Module, start: _Start, steps: int, tell: Callable[[int], None]) -> tuple[Inputs, float, float]:
    """Return a batch that was moved from its noise, and the mismatch before and after."""
    mismatch = _Mismatch(model)
    with torch.no_grad():
        mismatch(start.inputs({}))
    scale = mismatch.scale
    noise = {key: start.values[key].detach().float().requires_grad_() for key in start.moved}
    affine = {
        key: [x.new_zeros(1, x.shape[1], *(1,) * (x.ndim - 2), requires_grad=True) for _ in ("gain", "offset")]
        for key, x in noise.items()
    }
    leaves = [*noise.values(), *(one for pair in affine.values() for one in pair)]

    def samples() -> Inputs:
        made = {}
        for key, x in noise.items():
            gain, offset = affine[key]
            made[key] = (scale * (x * gain.exp() + offset)).to(start.values[key])
        return start.inputs(made)

    optimizer = torch.optim.Adam(leaves, lr=_RATE)
    first = math.nan
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _RATE * (1 + math.cos(math.pi * step / steps)) / 2
        loss, gradients = mismatch.derived(samples(), leaves)
        first = float(loss) if step == 0 else first
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()
        tell(step + 1)
    with torch.no_grad():
        made = samples()
        return made, first, float(mismatch(made))


def _refuse_unusable(loss: Tensor, mismatch: _Mismatch) -> None:
    if not loss.requires_grad:
        raise InputError(
            "no BatchNorm depends on the inputs by way of gradients",
            code="no-gradient",
            hint="calibrate with data: the model's forward records no gradients from its inputs to its norms",
        )
    if not bool(loss.isfinite()):
        raise not_finite(mismatch.where)


def _no_deviation(where: str) -> InitializationError:
    """Return the error about what the norm ``where`` has recorded."""
    text = f"the running variance of {where} is 0 in all channels: there is no deviation that samples could have"
    return InitializationError(text, code="no-statistics", hint="calibrate with data")
