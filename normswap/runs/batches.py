"""Batches of calibration data: bound to a forward's signature, counted, cut, and which samples of them are held out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import InputError
from normswap.runs.calling import Batch
from normswap.runs.inputs import Inputs, as_inputs
from normswap.runs.wrappers import entry_of

__all__ = ["LEAST_SAMPLES", "bind_batches", "held_out", "sample_count", "some_samples", "take"]

_EVERY = 5
LEAST_SAMPLES = 2 * _EVERY
"""With fewer samples none is held out."""


def bind_batches(
    model: nn.Module,
    data: Any,
    notes: list[str] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
) -> Iterator[Batch]:
    """Yield one call's inputs per batch of ``data``; with ``forward_fn`` what calls ``forward_fn(model, batch)``.

    A tensor, tuple or dict is one batch; anything else is iterated over, as a DataLoader is. Of a loader's batch only
    what ``forward`` requires is used, in order: the labels of an (inputs, targets) pair are left out.

    Raises:
        InputError: There is no batch, or one is empty, holds NaN or is no tensor.
    """
    if isinstance(data, (Tensor, tuple, Mapping)):
        batches: Iterable[Any] = [data]
        single = True
    elif isinstance(data, Iterable):
        batches, single = data, False
    else:
        raise InputError(
            f"the data is a {type(data).__name__}",
            code="inputs-type",
            hint="give a tensor, a tuple or dict of inputs, or an iterable of those, such as a DataLoader",
        )
    wanted = _required(model)
    count = 0
    for batch in batches:
        if forward_fn is not None:
            count += 1
            yield partial(_call, forward_fn, batch)
            continue
        inputs = as_inputs(batch, "a batch")
        if not single and isinstance(inputs, tuple) and wanted is not None and len(inputs) > max(wanted, 1):
            if not count and notes is not None:
                used = "was" if wanted < 2 else f"{wanted} were"
                notes.append(f"of each batch's {len(inputs)} entries the first {used} used")
            inputs = inputs[: max(wanted, 1)]
        if isinstance(inputs, dict):
            inputs = _known(model, inputs, notes if not count else None)
        _check_finite(inputs, count)
        count += 1
        yield inputs
    if not count:
        raise InputError(
            "the data holds no batch", code="no-data", hint="give a fresh iterable with at least one batch"
        )


def sample_count(batch: Batch) -> int:
    """Return how many samples a batch holds: the first axis of its first tensor, 1 where that is not known."""
    values = () if callable(batch) else batch.values() if isinstance(batch, Mapping) else batch
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim > 0), 1)


def some_samples(batch: Batch, count: int = 2) -> Inputs | None:
    """Return the first samples of a batch, the whole batch where its tensors share no first axis.

    Of a function that calls the model, which holds a batch of its own, None.
    """
    if callable(batch):
        return None
    found = take(batch, slice(count))
    return batch if found is None else found


def take(batch: Batch, chosen: slice | Tensor) -> Inputs | None:
    """Return the chosen samples of a batch; None where that is a function, or its tensors share no first axis."""
    if callable(batch):
        return None
    values = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    sizes = {len(value) if isinstance(value, Tensor) and value.ndim > 0 else None for value in values}
    if len(sizes) != 1 or None in sizes:
        return None
    if isinstance(batch, Mapping):
        return {name: value[chosen] for name, value in batch.items()}
    return tuple(value[chosen] for value in batch)


def held_out(count: int, before: int) -> Tensor:
    """Return which of ``count`` samples, that come after ``before`` others, are held out: every fifth."""
    return (torch.arange(count) + before) % _EVERY == _EVERY - 1


def _call(forward_fn: Callable[[nn.Module, Any], Any], batch: Any, model: nn.Module) -> Any:
    return forward_fn(model, batch)


def _known(model: nn.Module, inputs: dict[str, Any], notes: list[str] | None) -> dict[str, Any]:
    """Return the entries that ``forward`` has arguments for."""
    parameters = inspect.signature(entry_of(model)[1].forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return inputs
    names = [p.name for p in parameters]
    known = {name: value for name, value in inputs.items() if name in names}
    if not known:
        raise InputError(
            f"the data has entries {', '.join(map(repr, inputs))}; forward takes {', '.join(map(repr, names))}",
            code="inputs-names",
            hint=f"name the one with the inputs {names[0]!r}, or give it alone, as one tensor or array"
            if _required(model) == 1
            else "name the entries after forward's arguments, or give the inputs alone",
        )
    if len(known) < len(inputs) and notes is not None:
        notes.append(f"entries left out: {', '.join(name for name in inputs if name not in known)}")
    return known


def _required(model: nn.Module) -> int | None:
    """Return how many positional arguments ``forward`` requires, None where it takes any number."""
    parameters = inspect.signature(entry_of(model)[1].forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _check_finite(inputs: Inputs, index: int) -> None:
    named = list(inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs))
    tensors = [value for _, value in named if isinstance(value, Tensor)]
    if tensors and not any(value.numel() for value in tensors):
        raise InputError(
            f"batch {index} holds no values: its shape is {tuple(tensors[0].shape)}",
            code="no-data",
            hint="leave empty batches out",
        )
    for name, value in named:
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(
                f"input {name!r} of batch {index} holds NaN or infinite values",
                code="inputs-not-finite",
                hint="leave such samples out, or replace the values",
            )
