"""Mean and covariance of a layer's input patches, on data or, without any, on noise that BatchNorm's statistics shape.

Note [Data-free moments]
Weight standardization takes each filter's mean away, which times an input that a ReLU made positive is a large signal.
Where to take it from depends on the covariance of the layer's input. Without data, smoothed Gaussian noise is pushed
through the model, and what reaches each BatchNorm is shifted and scaled, per channel, to the very mean and variance
that the BatchNorm has recorded of the real data: every layer then sees inputs whose channels have their true means and
variances; only the correlations are the noise's. No BatchNorm stands before a first layer: there the mean is corrected
by what the layer's own BatchNorm has recorded of its output.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.errors import InitializationError, InputError
from normswap.nn import FilterLayout
from normswap.nn.kinds import class_of
from normswap.norms import norm_of
from normswap.runs.calling import Batch, first_input, run_on, run_on_data
from normswap.runs.guard import set_mode, untouched
from normswap.runs.statistics import Statistics
from normswap.stages.bound import BoundPlan

__all__ = [
    "Moments",
    "centre",
    "input_moments",
    "measure_statistics",
    "missing_statistics",
    "moments_of_covariance",
    "noise_like",
    "patches",
    "watch_inputs",
    "with_filters",
]

_MAX_SAMPLES = 4096
_DATA_RIDGE, _NOISE_RIDGE, _MEAN_RIDGE = 1e-3, 3e-2, 1e-2
_SLOPE = 1.5  # of the noise's amplitude over frequency
_MAX_VALUES = 2**24  # 128 MB of float64 patches at one layer


@dataclass(frozen=True)
class Moments:
    """What centring a layer's filters needs to know of its input patches.

    Args:
        mean: E[x]. ``(groups, fan_in)``, float64.
        direction: ``C⁻¹1 / (1ᵀC⁻¹1)``, C the ridged covariance. ``(groups, fan_in)``, float64.
        assumed: Whether they are those of noise.
    """

    mean: Tensor
    direction: Tensor
    assumed: bool = False

    def corrected(self, layout: FilterLayout, weight: Tensor, output_mean: Tensor) -> Moments:
        """Return moments whose mean agrees better with what the layer's own BatchNorm has recorded of its output.

        Of all changes d of E[x] the one that ``min ‖W(E[x] + d) − m‖² + λ‖d‖²``, m the recorded mean less the bias: it
        matters where no BatchNorm has shaped the layer's input, as in a first layer.
        """
        filters = layout.flatten(weight).unflatten(0, (layout.groups, -1))  # (groups, out/groups, fan_in)
        missing = output_mean.view(layout.groups, -1, 1) - filters @ self.mean[:, :, None]
        gram = filters @ filters.mT
        size = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp(min=1e-30)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        change = filters.mT @ torch.linalg.solve(gram + _MEAN_RIDGE * size * eye, missing)
        return Moments(self.mean + change[..., 0], self.direction, self.assumed)


def centre(layout: FilterLayout, weight: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """Project each filter to zero mean where that costs least: min Var[(w − w₀)·x] subject to 1ᵀw = 0.

    ``w = w₀ − C⁻¹1 (1ᵀw₀)/(1ᵀC⁻¹1)``.

    Returns:
        The weight, and per filter ``E[(w₀ − w)·x]``, which the bias must make good. ``(C,)``
    """
    filters = layout.flatten(weight).unflatten(0, (layout.groups, -1))  # (groups, out/groups, fan_in)
    removed = filters.sum(-1, keepdim=True) * moments.direction[:, None]
    shift = (removed * moments.mean[:, None]).sum(-1).flatten()
    return layout.unflatten((filters - removed).flatten(0, 1), weight), shift


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the patches of ``x`` that each of ``layer``'s filters is multiplied with. ``(samples, groups, fan_in)``

    The layer itself makes them, from unit filters: so padding, stride, dilation, transposition and a user's subclass
    are all the layer's own. The commonest layer, a plain 2-D convolution, has a faster way.
    """
    layout = FilterLayout.of(layer)
    weight = layout.weight(layer)
    kind = class_of(layer)
    plain = kind is nn.Conv2d and layer.padding_mode == "zeros" and weight.is_contiguous()
    if plain and isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str) and x.ndim == 4:
        columns = F.unfold(
            x, layer.kernel_size, layer.dilation, layer.padding, layer.stride
        )  # (N, in·kernel, positions)
        return columns.movedim(1, -1).reshape(-1, layout.groups, layout.fan_in(weight))
    rows: Tensor = with_filters(layer, layout.unit_filters(weight))(x)
    rows = rows.movedim(1, -1) if not isinstance(layer, nn.Linear) else rows
    return rows.reshape(-1, layout.groups, layout.fan_in(weight))


def with_filters(layer: nn.Module, weight: Tensor, groups: int | None = None) -> nn.Module:
    """Return a layer of the plain class, where ``layer`` is parametrized, with another weight and without a bias."""
    kind = class_of(layer)
    probe = kind.__new__(kind)
    probe.__dict__.update(layer.__dict__, _modules={}, _forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
    probe.__dict__.update(_parameters={"weight": nn.Parameter(weight, requires_grad=False), "bias": None})
    if groups is not None:
        probe.__dict__["groups"] = groups
    return probe


def moments_of(samples: Tensor, assumed: bool = False) -> Moments:
    """Return the moments of patches, ``(samples, groups, fan_in)``.

    The ridge, relative to the mean variance, grows to a tenth of fan_in/samples where samples are few.
    """
    x = samples.double().transpose(0, 1)  # (groups, samples, fan_in)
    n, fan_in = x.shape[1:]
    mean = x.mean(1)
    x = x - mean[:, None]
    if n >= fan_in or not bool(x.isfinite().all()):
        return moments_of_covariance(mean, x.mT @ x / n, n, assumed)
    # Woodbury: the same solution out of the samples' smaller Gram matrix
    ridge = _ridge(x.square().mean((1, 2)), fan_in / n, assumed)
    ones = x.new_ones(x.shape[0], fan_in, 1)
    factor = torch.linalg.cholesky(x @ x.mT + n * ridge * torch.eye(n, dtype=x.dtype, device=x.device))
    return _moments(mean, (ones - x.mT @ torch.cholesky_solve(x @ ones, factor)) / ridge, assumed)


def moments_of_covariance(mean: Tensor, covariance: Tensor, samples: int, assumed: bool = False) -> Moments:
    """Return the moments of so many patches whose mean, ``(groups, fan_in)``, and covariance are known.

    Raises:
        InitializationError: They are not finite.
    """
    if not bool(covariance.isfinite().all()):
        raise _not_finite("a layer")
    fan_in = covariance.shape[-1]
    ridge = _ridge(covariance.diagonal(dim1=1, dim2=2).mean(1), fan_in / samples, assumed)
    ridged = covariance.clone()
    ridged.diagonal(dim1=1, dim2=2).add_(ridge[..., 0])
    factor = torch.linalg.cholesky(ridged)
    return _moments(mean, torch.cholesky_solve(torch.ones_like(mean)[..., None], factor), assumed)


def _not_finite(where: str) -> InitializationError:
    """Return the error about what reaches ``where``."""
    return InitializationError(
        f"the values that reach {where} are not finite",
        code="not-finite",
        hint="check the inputs, and what the model gives for them",
    )


def _ridge(variance: Tensor, fan_in_per_sample: float, assumed: bool) -> Tensor:
    ridge = variance * max(_NOISE_RIDGE if assumed else _DATA_RIDGE, 0.1 * fan_in_per_sample)
    return torch.where(variance > 0, ridge, torch.ones_like(ridge))[:, None, None]


def _moments(mean: Tensor, solved: Tensor, assumed: bool) -> Moments:
    return Moments(mean, solved[..., 0] / solved.sum(1), assumed)


def input_moments(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Batch],
    *,
    shaped: bool,
) -> dict[str, Moments]:
    """Return the moments at the inputs of ``layers``, by fqn; read-only.

    Args:
        model: The model, before the swap.
        layers: The layers' fqns.
        batches: Inputs of the model.
        shaped: Whether the inputs are noise, to be shaped by each BatchNorm (Note [Data-free moments]).
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    generator = torch.Generator().manual_seed(0)

    def collect(name: str, layer: nn.Module, x: Tensor) -> None:
        kept[name].append(_sample(layer, x, sum(map(len, kept[name])), generator))

    watch_inputs(model, layers, batches, collect, shaped=shaped)
    return {name: moments_of(torch.cat(rows), shaped) for name, rows in kept.items() if sum(map(len, rows)) > 1}


def watch_inputs(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Batch],
    see: Callable[[str, nn.Module, Tensor], None],
    *,
    shaped: bool,
) -> None:
    """Run ``model`` in evaluation and call ``see(name, module, input)`` at each call of these; read-only."""
    with untouched(model, values=True), torch.no_grad():
        set_mode(model, False)
        handles = []
        for name in names:

            def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                see(name, module, first_input(args, kwargs))

            handles.append(model.get_submodule(name).register_forward_pre_hook(show, with_kwargs=True))
        if shaped:
            handles += [
                m.register_forward_pre_hook(_shape_frozen)
                for m in model.modules()
                if (norm := norm_of(m)) is not None and norm.frozen(m)
            ]
        try:
            for inputs in batches:
                if shaped:
                    with _ShapedByStatistics():
                        run_on(model, inputs)
                else:
                    run_on_data(model, inputs)
        finally:
            for handle in handles:
                handle.remove()


def _sample(layer: nn.Module, x: Tensor, have: int, generator: torch.Generator) -> Tensor:
    """Return a random choice of the patches of ``x``, as many as are still wanted."""
    layout = FilterLayout.of(layer)
    weight = layout.weight(layer)
    width = layout.groups * layout.fan_in(weight)
    limit = min(_MAX_SAMPLES, max(64, _MAX_VALUES // width))
    wanted = limit - have
    if wanted <= 0:
        return x.new_empty(0, layout.groups, layout.fan_in(weight))
    rows = []
    for one in x.split(max(1, _MAX_VALUES // (4 * width * max(1, x[:1].numel() // max(1, x.shape[1]))))):
        found = patches(layer, one)
        share = max(1, -(-limit * len(one) // len(x)))
        if len(found) > share:
            found = found[torch.randperm(len(found), generator=generator)[:share].to(found.device)]
        rows.append(found)
        wanted -= len(found)
        if wanted <= 0:
            break
    return torch.cat(rows)[:limit]


class _ShapedByStatistics(TorchFunctionMode):
    """Gives what reaches ``batch_norm`` the mean and variance that it has recorded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.batch_norm:
            names = ("input", "running_mean", "running_var")
            given = dict(zip(names, args, strict=False)) | kwargs
            if given.get("running_mean") is not None and given.get("running_var") is not None:
                x = _shaped(given["input"], given["running_mean"], given["running_var"])
                args, kwargs = (x, *args[1:]) if args else args, kwargs if args else kwargs | {"input": x}
        return func(*args, **kwargs)


def _shape_frozen(norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    kind = norm_of(norm)
    assert kind is not None
    state = kind.read(norm)
    if state.mean is None or state.var is None:
        return args
    return (_shaped(args[0], state.mean, state.var), *args[1:])


def _shaped(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    axes = [0, *range(2, x.ndim)]
    shape = (1, -1, *(1,) * (x.ndim - 2))
    spread, centre_ = torch.var_mean(x, axes, correction=0, keepdim=True)
    scale = torch.where(spread > 0, (var.view(shape) / spread.clamp(min=1e-30)).sqrt(), torch.zeros_like(spread))
    return ((x - centre_) * scale + mean.view(shape)).to(x.dtype)


def noise_like(example: Any, batch: int | None = None) -> Any:
    """Return Gaussian noise shaped as the example; what is no float is repeated.

    Over space the noise has a spectrum like that of natural images, an amplitude of ``1/f^1.5``, which has no scale of
    its own and so suits any resolution.

    Args:
        example: A tuple or dict of inputs.
        batch: The number of samples; default 32, fewer where they are large and more where they are vectors.
    """
    generator = torch.Generator().manual_seed(0)
    values = list(example.values()) if isinstance(example, Mapping) else list(example)
    floats = [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 0]
    if batch is None:
        most = 32 if any(v.ndim > 2 for v in floats) else 1024
        batch = max(4, min(most, _MAX_VALUES // (4 * max(1, sum(v[:1].numel() for v in floats)))))

    def noise(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if not value.is_floating_point():
            return value[torch.arange(batch) % len(value)]
        x = torch.randn(batch, *value.shape[1:], generator=generator)
        return (_as_natural_images(x) if x.ndim > 2 else x).to(value)

    if isinstance(example, Mapping):
        return {name: noise(value) for name, value in example.items()}
    return tuple(noise(value) for value in example)


def _as_natural_images(x: Tensor) -> Tensor:
    sides = x.shape[2:]
    grid = torch.meshgrid(*(torch.fft.fftfreq(side) for side in sides), indexing="ij")
    frequency = torch.stack([g.square() for g in grid]).sum(0).sqrt()
    lowest = 1 / max(sides)  # the mean of an image is as strong as its largest waves
    axes = list(range(2, x.ndim))
    x = torch.fft.ifftn(torch.fft.fftn(x, dim=axes) / frequency.clamp(min=lowest) ** _SLOPE, dim=axes).real
    return x / x.std()


def measure_statistics(model: nn.Module, norms: Sequence[str], batches: Iterable[Batch]) -> dict[str, Statistics]:
    """Return the statistics at the inputs of ``norms`` over all batches, by fqn; read-only.

    Raises:
        InitializationError: They are not finite.
    """
    found: dict[str, Statistics] = {}

    def add(name: str, _: nn.Module, x: Tensor) -> None:
        if x.numel():
            found[name] = found[name] + Statistics.of(x) if name in found else Statistics.of(x)

    watch_inputs(model, norms, batches, add, shaped=False)
    for name, one in found.items():
        if not bool((one.mean + one.var).isfinite().all()):
            raise _not_finite(f"'{name}'")
    return found


def missing_statistics(model: nn.Module, bound: BoundPlan, batches: Sequence[Batch] | None) -> Mapping[str, Statistics]:
    """Return the statistics of the norms that store none, by fqn, measured on all batches.

    Raises:
        InputError: A norm stores none and there are no batches.
        InitializationError: They are not finite.
    """
    missing = [step.site.norm for step in bound.steps if not step.site.has_statistics]
    if not missing:
        return {}
    if batches is None:
        raise InputError(
            f"'{missing[0]}' stores no running statistics",
            code="no-statistics",
            hint="give calibration data, from which they are measured",
        )
    return measure_statistics(model, missing, batches)
