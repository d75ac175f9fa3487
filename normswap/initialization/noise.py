"""Inputs of a data-free calibration: noise, which each BatchNorm shapes to the mean and variance it has recorded.

Note [Data-free moments]
Weight standardization takes each filter's mean away, which times an input that a ReLU made positive is a large signal.
Where to take it from depends on the covariance of the layer's input. Without data, smoothed Gaussian noise is pushed
through the model, and what reaches each BatchNorm is shifted and scaled, per channel, to the very mean and variance
that the BatchNorm has recorded of the real data: every layer then sees inputs whose channels have their true means and
variances; only the correlations are the noise's. No BatchNorm stands before a first layer: there the mean is corrected
by what the layer's own BatchNorm has recorded of its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.norms import norm_of
from normswap.runs.batches import sample_count
from normswap.runs.inputs import Inputs

__all__ = ["batch_for", "noise_like", "noises_like", "seen_by_statistics", "shaped_by_statistics"]

See = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Gets what reaches a BatchNorm, its recorded mean and variance, and gives what is to reach it."""

_SLOPES = 0.5, 2.5  # of the noise's amplitude over frequency, from the roughest sample to the smoothest
_MOST_VALUES = 2**22
_ROUNDING = 4.0  # of a channel's mean, in units of the last place


def noises_like(inputs: Inputs) -> tuple[Inputs, ...]:
    """Return what to try one after the other: noise like ``inputs``, two samples of it, and ``inputs`` themselves.

    A model may take no other number of samples than these.
    """
    return noise_like(inputs), noise_like(inputs, batch=2), inputs


def noise_like(example: Any, batch: int | None = None, seed: int = 0) -> Any:
    """Return Gaussian noise shaped as the example; what is no float is repeated.

    Samples are along the first axis of the first tensor, and of each that is as long there. Others, such as the state
    ``(layers, N, H)`` of a recurrent layer, get no other size: a model that takes no others either runs on none.

    Over space the noise has spectra like those of natural images, amplitudes of ``1/f^a``, which have no scale of their
    own and so suit any resolution. Images differ in how smooth they are, and what a network makes of them with it: a
    goes from 0.5 to 2.5 over the samples, in random order.

    Args:
        example: A tuple or dict of inputs.
        batch: The number of samples; default :func:`batch_for`.
        seed: Of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = batch_for(example) if batch is None else batch
    own = sample_count(example)

    def noise(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        of_samples = len(value) == own
        if not value.is_floating_point():
            return value[torch.arange(batch) % own] if of_samples else value
        x = torch.randn(batch if of_samples else len(value), *value.shape[1:], generator=generator)
        return (_as_natural_images(x, generator) if x.ndim > 2 else x).to(value)

    if isinstance(example, Mapping):
        return {name: noise(value) for name, value in example.items()}
    return tuple(noise(value) for value in example)


def batch_for(example: Any) -> int:
    """Return how many samples like the example run at once: 32, fewer where they are large, more of vectors."""
    values = list(example.values()) if isinstance(example, Mapping) else list(example)
    floats = [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 0]
    most = 32 if any(v.ndim > 2 for v in floats) else 1024
    return max(4, min(most, _MOST_VALUES // max(1, sum(v[:1].numel() for v in floats))))


def _as_natural_images(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return white noise ``(N, C, …)`` with spectra of ``1/f^a`` over space, each sample of standard deviation 1."""
    sides = x.shape[2:]
    grid = torch.meshgrid(*(torch.fft.fftfreq(side) for side in sides), indexing="ij")
    frequency = torch.stack([g.square() for g in grid]).sum(0).sqrt()
    lowest = 1 / max(sides)  # the mean of an image is as strong as its largest waves
    slopes = torch.linspace(*_SLOPES, len(x))[torch.randperm(len(x), generator=generator)]
    axes = list(range(2, x.ndim))
    amplitude = frequency.clamp(min=lowest) ** -slopes.view(-1, 1, *(1,) * len(sides))
    x = torch.fft.ifftn(torch.fft.fftn(x, dim=axes) * amplitude, dim=axes).real
    return x / x.square().mean(list(range(1, x.ndim)), keepdim=True).sqrt().clamp(min=1e-30)


@contextmanager
def shaped_by_statistics(model: nn.Module) -> Iterator[None]:
    """Give what reaches each BatchNorm of ``model`` the recorded mean and variance (Note [Data-free moments])."""
    with seen_by_statistics(model, _shaped):
        yield


@contextmanager
def seen_by_statistics(model: nn.Module, see: See) -> Iterator[None]:
    """Have ``see`` called on what reaches each BatchNorm of ``model`` that has statistics, and on these."""

    def see_frozen(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        norm = norm_of(module)
        assert norm is not None
        state = norm.read(module)
        if state.mean is None or state.var is None:
            return args
        return (see(args[0], state.mean, state.var), *args[1:])

    frozen = [m for m in model.modules() if (norm := norm_of(m)) is not None and norm.frozen(m)]
    handles = [module.register_forward_pre_hook(see_frozen) for module in frozen]
    try:
        with _SeenByStatistics(see):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _SeenByStatistics(TorchFunctionMode):
    """Calls ``see`` on what reaches ``batch_norm`` with statistics."""

    def __init__(self, see: See) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.batch_norm:
            names = ("input", "running_mean", "running_var")
            given = dict(zip(names, args, strict=False)) | kwargs
            if given.get("running_mean") is not None and given.get("running_var") is not None:
                x = self._see(given["input"], given["running_mean"], given["running_var"])
                args, kwargs = (x, *args[1:]) if args else args, kwargs if args else kwargs | {"input": x}
        return func(*args, **kwargs)


def _shaped(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Return ``(N, C, …)`` shifted and scaled to this mean and variance of each channel; a constant one to the mean."""
    axes = [0, *range(2, x.ndim)]
    shape = (1, -1, *(1,) * (x.ndim - 2))
    exact = x if x.dtype == torch.float64 else x.float()
    own_mean = exact.mean(axes, keepdim=True)
    centred = exact - own_mean
    own_var = centred.square().mean(axes, keepdim=True)  # torch.var_mean over inner axes is slow
    rounding = (_ROUNDING * torch.finfo(exact.dtype).eps * own_mean).square()  # what it leaves of a constant channel
    factor = torch.where(own_var > rounding, (var.view(shape) / own_var).sqrt(), torch.zeros_like(own_var))
    return centred.mul_(factor).add_(mean.view(shape)).to(x.dtype)
