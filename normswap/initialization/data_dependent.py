"""Data-dependent initialization: each layer's output gets mean 0 and deviation 1 on one minibatch.

For the pre-activation t of a layer, in execution order, with mean μ[t] and deviation σ[t] per channel over minibatch
and space (Salimans & Kingma 2016, eq. 5-6):

    g ← 1/σ[t],  b ← −μ[t]/σ[t],  so that t ← (t − μ[t])/σ[t].

Note [One pass]
The pass runs in evaluation mode, so that it can be repeated, and once: a layer's output is corrected on the spot, and
what follows sees the corrected value. A BatchNorm or mean-only BatchNorm takes the minibatch's statistics as its own
when it is first reached: evaluation on that minibatch then shows what training on it would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm

from normswap.capture import capture_symbolic
from normswap.capture.dataflow import Dataflow
from normswap.capture.guard import set_mode
from normswap.capture.observed import run_on
from normswap.capture.ops import is_layer
from normswap.capture.probes import scales_with_its_parameters
from normswap.errors import InitializationError, InputError
from normswap.inputs import bind_batches
from normswap.nn import FilterLayout, FilterWeightNorm, MeanOnlyBatchNorm, WeightStandardization
from normswap.records import InitReport, InitRow

__all__ = ["initialize"]

_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm, MeanOnlyBatchNorm)
_FRESH_STD = 0.05


def initialize(
    model: nn.Module,
    batch: Any,
    *,
    method: str = "data-dependent",
    fresh: bool = False,
    seed: int = 0,
) -> InitReport:
    """Initialize ``model`` in place from one minibatch, in one forward pass; converted or not.

    A layer with a bias ends with |mean| < 1e-3 and |std − 1| < 1e-2 per channel on that minibatch. A bias-free layer
    gets its scale only; a shared layer is initialized at its first call; a channel that is constant keeps its scale.
    The report says which.

    Args:
        model: The model; left as it was if anything fails.
        batch: A minibatch: a tensor, a tuple or dict of inputs, or an iterable of which the first is taken.
        method: ``"data-dependent"``, the only one.
        fresh: Whether to draw the weights anew first, from N(0, 0.05²).
        seed: The seed of that draw.

    Raises:
        InputError: The minibatch does not fit.
        InitializationError: The forward pass failed, or the model became infinite.

    Source: T. Salimans, D. Kingma, *Weight Normalization*, 2016, section 3.
    """
    if method != "data-dependent":
        raise InputError(f"method={method!r} is unknown", code="unknown-method", hint="give 'data-dependent'")
    inputs = next(bind_batches(model, batch))
    before = {name: value.detach().clone() for name, value in _tensors(model).items()}
    modes = [(module, module.training) for module in model.modules()]
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    in_front_of_norm = _feeding_norms(model)
    if fresh:
        _draw(model, torch.Generator().manual_seed(seed))
    rows: dict[str, InitRow] = {}
    scaled: set[int] = set()  # the tensors that hold a layer's scale: a tied one is set once
    handles = []
    done = False
    try:
        for module in model.modules():
            name = names[id(module)]
            if is_layer(module):

                def settle(layer: nn.Module, args: tuple[Any, ...], out: Tensor, name: str = name) -> Tensor:
                    if name in rows:
                        rows[name] = _again(rows[name])
                        return out
                    rows[name], out = _settle(name, layer, args, out, name in in_front_of_norm, scaled)
                    return out

                handles.append(module.register_forward_hook(settle, prepend=True))
            elif isinstance(module, (_BatchNorm, MeanOnlyBatchNorm)):
                handles.append(module.register_forward_pre_hook(_Adopt()))
        set_mode(model, False)
        run_on(model, inputs)
        done = True
    except Exception as cause:
        if isinstance(cause, InitializationError):
            raise
        raise InitializationError(
            f"the forward pass failed: {type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}",
            code="initialize-forward",
            hint="give a batch that the model takes; the model is as it was",
        ) from cause
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.__dict__["training"] = training
        if not done:
            with torch.no_grad():
                for name, value in _tensors(model).items():
                    value.copy_(before[name])
    missed = [names[id(m)] for m in model.modules() if is_layer(m) and names[id(m)] not in rows]
    never = tuple(InitRow(name, "not initialized", ("the batch never reached it",)) for name in missed)
    return InitReport(method, (*rows.values(), *never))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **{f"buffer {n}": b for n, b in model.named_buffers()}}


def _feeding_norms(model: nn.Module) -> set[str]:
    """Return the layers whose output the graph shows to go into a norm and nowhere else."""
    flow = Dataflow(capture_symbolic(model, modes=(False,)))
    feeding = set()
    for key in flow.calls:
        module = flow.capture.modules.get(key)
        if isinstance(module, _NORMS) or key in flow.functional:
            feeding |= flow.sources_of(key)
    return feeding


def _draw(model: nn.Module, generator: torch.Generator) -> None:
    """Draw each layer's direction v from N(0, 0.05²)."""
    with torch.no_grad():
        for module in model.modules():
            if is_layer(module):
                weight = _weight_of(module)
                v = weight.direction
                v.copy_(torch.randn(v.shape, generator=generator).to(v) * _FRESH_STD)
                for scale in weight.scales[:1]:
                    if scale is not v:  # g and the gain start at one: a channel that was dead is alive again
                        scale.fill_(1.0)


@dataclass(frozen=True)
class _Weight:
    """The tensors of a layer that hold its filters' directions, and those that all scale with its output."""

    direction: Tensor
    scales: tuple[Tensor, ...]


def _weight_of(layer: nn.Module) -> _Weight:
    if isinstance(layer._parameters.get("weight_g"), Tensor):  # torch's older weight norm, a hook
        return _Weight(layer.weight_v, (layer.weight_g,))  # type: ignore[arg-type]
    if not parametrize.is_parametrized(layer, "weight"):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return _Weight(weight, (weight,))
    originals = layer.get_submodule("parametrizations.weight")
    assert isinstance(originals, parametrize.ParametrizationList)
    tensors = [
        getattr(originals, n) for n in ("original", "original0", "original1", "original2") if hasattr(originals, n)
    ]
    kind = originals[0]
    if isinstance(kind, (_WeightNorm, FilterWeightNorm)):
        return _Weight(tensors[1], (tensors[0],))
    return _Weight(tensors[0], tuple(tensors[1:]) if isinstance(kind, WeightStandardization) else ())


def _settle(
    name: str, layer: nn.Module, args: tuple[Any, ...], out: Tensor, feeds_norm: bool, scaled: set[int]
) -> tuple[InitRow, Tensor]:
    """Scale and shift ``layer`` such that ``out``, its output, has mean 0 and deviation 1; return the new output."""
    weight = _weight_of(layer)
    # The channels are the last axis of a linear layer's output and the first but for the batch of a convolution's.
    axis = out.ndim - (1 if isinstance(layer, nn.Linear) else weight.direction.ndim - 1)
    if out.ndim < 2:
        return InitRow(name, "not initialized", ("its output is a single vector: there is no batch",)), out
    values = out if out.dtype in (torch.float32, torch.float64) else out.float()
    std, mean = (v.double() for v in torch.std_mean(values, [a for a in range(out.ndim) if a != axis], correction=0))
    if not bool(torch.isfinite(std).all() and torch.isfinite(mean).all()):
        raise InitializationError(
            f"the output of '{name}' is not finite on this batch",
            code="initialize-not-finite",
            hint="check the batch and the weights; the model is as it was",
        )
    if not weight.scales:
        return InitRow(name, "not initialized", ("its weight keeps no scale",)), out
    notes: list[str] = []
    # A constant channel has no deviation: rounding noise must not be blown up to one.
    constant = std <= 1e-6 * torch.maximum(mean.abs(), std.amax())
    if bool(constant.any()):
        notes.append(f"{int(constant.sum())} constant channels keep their scale")
    scale = torch.where(constant, torch.ones_like(std), 1 / std.clamp(min=1e-300))
    if scaled & set(map(id, weight.scales)):
        scale = torch.ones_like(scale)
        notes.append("its weight is tied to one that is initialized already")
    bias = layer.bias if isinstance(layer.bias, Tensor) else None
    if bias is None:
        notes.append("bias-free in front of a norm: scale only" if feeds_norm else "bias-free: scale only")
    shift = torch.zeros_like(mean) if bias is None else -mean * scale
    before = [t.detach().clone() for t in (*weight.scales, *([] if bias is None else [bias]))]
    layout = FilterLayout.of(layer)
    with torch.no_grad():
        for tensor in weight.scales:
            full = tensor is weight.direction
            tensor.copy_(layout.scale(tensor.double(), scale) if full else tensor.double() * scale.view(_like(tensor)))
        if bias is not None:
            bias.copy_(bias.double() * scale + shift)
    if scales_with_its_parameters(layer):
        shape = [1] * out.ndim
        shape[axis] = -1
        new = torch.addcmul(shift.to(values).view(shape), values, scale.to(values).view(shape)).to(out.dtype)
    else:
        new = _rerun(layer, args)
        found = torch.std_mean(new.double(), [a for a in range(out.ndim) if a != axis], correction=0)
        if not bool(((found[0] - 1).abs() < 1e-2).logical_or(constant).all()):
            with torch.no_grad():
                for tensor, value in zip((*weight.scales, *([] if bias is None else [bias])), before, strict=True):
                    tensor.copy_(value)
            return InitRow(name, "not initialized", ("its output does not scale with its weight",)), out
        notes.append("its forward is its own: its output was computed anew")
    scaled.update(map(id, weight.scales))
    return InitRow(name, "scale" if bias is None else "scale and bias", tuple(notes)), new


def _like(g: Tensor) -> list[int]:
    """Return the shape in which one value per channel fits ``g``: all its axes are 1 but one."""
    return [-1 if size > 1 else 1 for size in g.shape] if g.numel() > 1 else list(g.shape)


def _rerun(layer: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """Return what ``layer`` gives on ``args`` now, without its hooks."""
    value = layer.forward(*args)
    assert isinstance(value, Tensor)
    return value


def _again(row: InitRow) -> InitRow:
    note = "shared: initialized at its first call"
    return row if note in row.notes else InitRow(row.name, row.method, (*row.notes, note))


class _Adopt:
    """Gives a norm with running statistics those of the minibatch, at its first call."""

    def __init__(self) -> None:
        self.done = False

    def __call__(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        if self.done or norm.running_mean is None:
            return
        self.done = True
        x = args[0] if args[0].dtype in (torch.float32, torch.float64) else args[0].float()
        var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        for name, value in (("running_mean", mean), ("running_var", var)):
            buffer = getattr(norm, name, None)
            if isinstance(buffer, Tensor):
                buffer.copy_(value)
