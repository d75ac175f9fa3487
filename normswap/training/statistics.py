"""Estimate running statistics anew: the mean and variance over all of a loader's samples, in one pass.

``μ = E[x]`` and ``var = n/(n − 1) · E[(x − μ)²]`` over all n values of a channel that reach a norm, merged exactly from
batch to batch (Chan, Golub, LeVeque 1979). A mean of the batches' variances, which ``update_bn`` of torch takes, leaves
out how the batches' means vary: at batch size 2 that is about half of the variance between samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import InputError
from normswap.nn.batch_normalized import BatchNormalized
from normswap.norms import norm_of
from normswap.runs.batches import bind_batches
from normswap.runs.calling import Batch, first_input, run_on_data
from normswap.runs.equal_models import make_equal, refuse_different_models
from normswap.runs.guard import set_mode, untouched
from normswap.runs.modes import held_modules
from normswap.runs.processes import alone, in_step, objects, together
from normswap.runs.watching import Statistics, not_finite, over_processes
from normswap.runs.wrappers import refuse_no_module, refuse_script

__all__ = ["StatisticsUpdate", "update_statistics"]


@dataclass(frozen=True)
class StatisticsUpdate:
    """What :func:`update_statistics` did.

    Args:
        updated: The norms that have new statistics, by fqn.
        left: Those that kept theirs, each with the reason.
        samples: How many samples reached the first one.
        notes: What a person should know of the data.
    """

    updated: tuple[str, ...]
    left: tuple[tuple[str, str], ...]
    samples: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"running statistics of {len(self.updated)} norms over {self.samples} samples"]
        return "\n".join([*lines, *(f"{name} left: {why}" for name, why in self.left), *self.notes])


def update_statistics(
    model: nn.Module,
    loader: Any,
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    processes: bool = True,
) -> StatisticsUpdate:
    """Give the BatchNorms and mean-only norms of ``model`` the exact statistics of a loader's data, in place.

    For weights that were averaged (SWA, EMA), or trained with batches too small for running statistics. While the data
    goes through, these norms normalize as in training, and all else is in evaluation: no dropout. Afterwards modes and
    all else are as before, and ``num_batches_tracked`` is the number of batches.

    Args:
        model: The model.
        loader: Unlabelled data as for ``convert(calibration=…)``: a tensor, tuple or dict of inputs, or an iterable of
            those, such as a DataLoader. All of it is used.
        forward_fn: Called as ``forward_fn(model, batch)`` for each batch, for data that this does not fit.
        processes: Whether all processes of an initialized ``torch.distributed`` group call this, each with data of its
            own: the statistics are then those of all of it. False works alone.

    Returns:
        Which norms have new statistics, and why others were left: frozen, without statistics, or not reached.

    Raises:
        InputError: The data does not fit, or the model has no norm with running statistics.
        InitializationError: What reaches a norm is not finite. The model is as it was then.
    """
    refuse_no_module(model)
    refuse_script(model)
    with together(processes):
        refuse_different_models(model, buffers=False)
        report = _updated(model, loader, forward_fn)
        make_equal(model)
    return report


def _updated(model: nn.Module, loader: Any, forward_fn: Callable[[nn.Module, Any], Any] | None) -> StatisticsUpdate:
    tables, left = _tables(model)
    if not tables:
        raise InputError(
            f"no norm of the {type(model).__name__} has running statistics to estimate",
            code="no-statistics",
            hint="; ".join(f"'{name}' {why}" for name, why in left[:3])
            or "group and layer norms need none: their statistics are each sample's own",
        )
    notes: list[str] = []
    found: dict[str, Statistics] = {}
    calls: dict[str, int] = dict.fromkeys(tables, 0)

    def watch(name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_input(args, kwargs)
            if isinstance(x, Tensor) and x.numel():
                x = x if x.ndim > 1 else x[None]
                calls[name] += 1
                one = Statistics.of(x.detach())
                found[name] = found[name] + one if name in found else one

        return see

    with untouched(model), torch.no_grad():
        set_mode(model, False)
        handles = []
        for name in tables:
            module = model.get_submodule(name)
            module.__dict__["training"] = True
            handles.append(module.register_forward_pre_hook(watch(name), with_kwargs=True))
        try:
            batches = bind_batches(model, loader, notes, forward_fn)
            stream = in_step(batches) if not alone() and _any_synchronizes(model, tables) else batches
            for number, batch in enumerate(stream):
                _run(model, batch, number)
        finally:
            for handle in handles:
                handle.remove()
    found = over_processes(found)
    every = objects("calls", calls)
    calls = {name: sum(one[name] for one in every) for name in tables}
    for name, one in found.items():
        if not bool((one.mean + one.var).isfinite().all()):
            raise not_finite(f"'{name}'")
    left += [(name, "the data does not reach it") for name in tables if name not in found]
    with torch.no_grad():
        for name, one in found.items():
            _write(tables[name], one, calls[name])
    samples = next((one.samples for one in found.values()), 0)
    return StatisticsUpdate(tuple(found), tuple(left), samples, tuple(notes))


def _run(model: nn.Module, batch: Batch, number: int) -> None:
    """Run ``model``, whose norms are in train mode; an error about a batch of one sample names the batch."""
    try:
        run_on_data(model, batch)
    except InputError as error:
        if "Expected more than 1 value per channel" not in str(error.__cause__):
            raise
        raise InputError(
            f"batch {number} gives a norm one value per channel, which has no deviation",
            code="one-sample",
            hint="leave a last batch of one sample out, as a DataLoader with drop_last=True does",
        ) from error.__cause__


def _any_synchronizes(model: nn.Module, names: Iterable[str]) -> bool:
    modules = [model.get_submodule(name) for name in names]
    return any(norm.synchronizes(module) for module in modules if (norm := norm_of(module)) is not None)


def _write(table: dict[str, Tensor], found: Statistics, batches: int) -> None:
    values = {
        "running_mean": found.mean,
        "running_var": found.var * (found.values / max(found.values - 1, 1)),
        "num_batches_tracked": torch.tensor(batches),
    }
    for name, tensor in table.items():
        tensor.copy_(values[name])


def _tables(model: nn.Module) -> tuple[dict[str, dict[str, Tensor]], list[tuple[str, str]]]:
    """Return the buffers of the norms whose statistics are estimated, by fqn, and the other norms with the reasons."""
    held = held_modules(model).in_eval
    tables: dict[str, dict[str, Tensor]] = {}
    left: list[tuple[str, str]] = []
    for fqn, module in model.named_modules():
        norm = norm_of(module)
        if isinstance(module, BatchNormalized):
            left.append((fqn, "is a recurrent layer, whose statistics follow its training alone"))
        if norm is None or not norm.follows_batches:
            continue
        own = {
            name: tensor
            for name in ("running_mean", "running_var", "num_batches_tracked")
            if (tensor := module._buffers.get(name)) is not None
        }
        if norm.frozen(module) or id(module) in held or (model.training and not module.training):
            left.append((fqn, "is frozen"))
        elif "running_mean" not in own:
            left.append((fqn, "stores no statistics"))
        elif own["running_mean"].is_meta:
            left.append((fqn, "is on the meta device"))
        else:
            tables[fqn] = own
    return tables, left
