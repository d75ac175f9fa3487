"""Gradients of a model's output with respect to what its BatchNorms give, for random directions of the output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.runs.calling import Batch, call
from normswap.runs.guard import set_mode, untouched
from normswap.runs.tensors import tensors_of

__all__ = ["OutputGradients", "output_gradients"]

_DRAWS = 4


@dataclass(frozen=True)
class OutputGradients:
    """How a model's output answers to what its norms give, on one batch.

    Args:
        size: ``‖out‖²`` over all outputs that depend on a norm.
        of: By a norm's name the gradients of ``u·out`` for random u of independent standard normal values, each shaped
            as what the norm gives.
    """

    size: float
    of: Mapping[str, tuple[Tensor, ...]]

    def energy(self, name: str, error: Tensor) -> float | None:
        """Return what ``error`` in what the norm gives does to the output, to first order; None where it is not known.

        With J the Jacobian of the output, ``E_u (gᵀe)² = ‖J e‖²``, summed over the samples.
        """
        drawn = self.of.get(name)
        if drawn is None or drawn[0].shape != error.shape:
            return None
        along = [(g * error).flatten(1).sum(1, dtype=torch.float64).square().sum() for g in drawn]
        found = float(sum(along) / len(along))
        return found if math.isfinite(found) else None  # the root of 0 has no gradient


@dataclass
class _Probing(TorchFunctionMode):
    """Adds a zero of which the gradient can be asked to what each norm gives at its first call."""

    names: Mapping[int, str]
    probes: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.batch_norm:
            given = dict(zip(("input", "running_mean"), args, strict=False)) | kwargs
            name = self.names.get(id(given.get("running_mean")))
            if name is not None and name not in self.probes:
                self.probes[name] = torch.zeros_like(out, requires_grad=True)
                return out + self.probes[name]
        return out


def output_gradients(model: nn.Module, norms: Mapping[str, Tensor], batch: Batch, seed: int = 0) -> OutputGradients:
    """Run ``model``, which is only read, on ``batch`` and differentiate its outputs.

    A model that runs only without gradients (it may write to what a gradient needs) has none.

    Args:
        model: The model.
        norms: The running means of its norms, by the norms' names: norms are known by them.
        batch: The inputs.
        seed: That of the directions.
    """
    probing = _Probing({id(mean): name for name, mean in norms.items()})
    with untouched(model):
        set_mode(model, False)
        try:
            with torch.enable_grad(), probing:
                outputs = [out for out in tensors_of(call(model, batch)) if bool(out.isfinite().all())]
            outputs = [out for out in outputs if out.requires_grad]
            drawn = _draw(outputs, probing.probes, torch.Generator().manual_seed(seed))
        except Exception:  # whatever a user's forward raises
            return OutputGradients(0.0, {})
    return OutputGradients(sum(float(out.detach().double().square().sum()) for out in outputs), drawn)


def _draw(
    outputs: Sequence[Tensor], probes: Mapping[str, Tensor], generator: torch.Generator
) -> dict[str, tuple[Tensor, ...]]:
    """Return the gradients of random projections of the outputs with respect to those probes that reach them."""
    found: dict[str, tuple[Tensor, ...]] = {}
    for _ in range(_DRAWS if outputs and probes else 0):
        directions = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
        gradients = torch.autograd.grad(
            outputs, list(probes.values()), directions, retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(probes, gradients, strict=True):
            if gradient is not None:
                found[name] = (*found.get(name, ()), gradient)
    return found
