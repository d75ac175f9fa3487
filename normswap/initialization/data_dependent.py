"""Data-dependent initialization: each layer's output gets mean 0 and deviation 1 on one minibatch.

For the pre-activation t of a layer, in execution order, with mean μ[t] and deviation σ[t] per channel over the minibatch and
space (Salimans & Kingma 2016, eq. 5-6):

    g ← 1/σ[t],  b ← −μ[t]/σ[t],  so that t ← (t − μ[t])/σ[t].

Note [One pass]
The pass runs in evaluation mode, so that it can be repeated, and once: a layer's output is corrected on the spot, and
what follows sees the corrected value. A BatchNorm or mean-only BatchNorm takes the minibatch's statistics as its own when
it is first reached: evaluation on that minibatch then shows what training on it would.
"""

from __future__ import annotations

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

    A layer with a bias ends with |mean| < 1e-3 and |std − 1| < 1e-2 per channel on that minibatch. A bias-free layer gets
    its scale only; a shared layer is initialized at its first call; a channel that is constant keeps its scale. The report
    says which.

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
                    rows[name], out = _settle(name, layer, args, out, name in in_front_of_norm)
                    return out

                handles.append(module.register_forward_hook(settle))
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
            if not is_layer(module):
                continue
            v = _direction(module)
            v.copy_(torch.randn(v.shape, generator=generator).to(v) * _FRESH_STD)


def _direction(layer: nn.Module) -> Tensor:
    """Return the tensor of ``layer`` that holds its filters' directions: v, or the plain weight."""
    if not parametrize.is_parametrized(layer, "weight"):
        weight = layer.weight
    else:
        originals = layer.parametrizations["weight"]  # type: ignore[index,operator]
        kind = originals[0]
        if isinstance(kind, (_WeightNorm, FilterWeightNorm)):
            weight = originals.original1
        else:
            weight = originals.original0 if hasattr(originals, "original0") else originals.original
    assert isinstance(weight, Tensor)
    return weight


def _settle(
    name: str, layer: nn.Module, args: tuple[Any, ...], out: Tensor, feeds_norm: bool
) -> tuple[InitRow, Tensor]:
    """Scale and shift ``layer`` such that ``out``, its output, has mean 0 and deviation 1; return the new output."""
    axis = out.ndim - 1 if isinstance(layer, nn.Linear) else 1
    axes = [a for a in range(out.ndim) if a != axis]
    std, mean = torch.std_mean(out.double(), axes, correction=0)
    if not bool(torch.isfinite(std).all()):
        raise InitializationError(
            f"the output of '{name}' is not finite on this batch",
            code="initialize-not-finite",
            hint="check the batch and the weights; the model is as it was",
        )
    notes: list[str] = []
    # A constant channel has no deviation: rounding noise must not be blown up to one.
    constant = std <= 1e-6 * out.double().abs().amax().clamp(min=1e-30)
    if bool(constant.any()):
        notes.append(f"{int(constant.sum())} constant channels keep their scale")
    scale = torch.where(constant, torch.ones_like(std), 1 / std.clamp(min=1e-300))
    factor = _scale(layer, scale)
    if factor is None:
        return InitRow(name, "not initialized", ("its weight keeps no scale",)), out
    shift = torch.zeros_like(mean)
    bias = layer.bias
    if isinstance(bias, Tensor):
        shift = -mean * scale
        with torch.no_grad():
            bias.copy_(bias.double() * scale + shift)
    else:
        notes.append("bias-free in front of a norm: scale only" if feeds_norm else "bias-free: scale only")
    if scales_with_its_parameters(layer):
        shape = [1] * out.ndim
        shape[axis] = -1
        new = (out.double() * scale.view(shape) + shift.view(shape)).to(out.dtype)
    else:
        new = type(layer).forward(layer, *args)
        notes.append("its forward is its own: its output was computed anew")
    return InitRow(name, "scale and bias" if isinstance(bias, Tensor) else "scale", tuple(notes)), new


def _scale(layer: nn.Module, factor: Tensor) -> Tensor | None:
    """Multiply the filters of ``layer`` by ``factor``, through g or the gain where there is one; None if it has no scale."""
    layout = FilterLayout.of(layer)
    with torch.no_grad():
        if not parametrize.is_parametrized(layer, "weight"):
            weight = layer.weight
            assert isinstance(weight, Tensor)
            weight.copy_(layout.scale(weight.double(), factor))
            return factor
        originals = layer.parametrizations["weight"]  # type: ignore[index,operator]
        kind = originals[0]
        if isinstance(kind, (_WeightNorm, FilterWeightNorm)):
            g = originals.original0
            g.copy_(g.double() * factor.view(g.shape))
            return factor
        if isinstance(kind, WeightStandardization) and kind.gain:
            originals.original1.copy_(originals.original1.double() * factor)
            if kind.offset:
                originals.original2.copy_(originals.original2.double() * factor)
            return factor
    return None


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
        x = args[0].double()
        var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        for name, value in (("running_mean", mean), ("running_var", var)):
            buffer = getattr(norm, name, None)
            if isinstance(buffer, Tensor):
                buffer.copy_(value)
