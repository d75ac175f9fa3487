"""Forward passes: a model is called eagerly on copies of its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import InputError, NormswapError
from normswap.runs.argument_values import other_ways
from normswap.runs.wrappers import entry_of

__all__ = ["Batch", "call", "does_not_run", "first_input", "other_arguments", "run_on", "run_on_data"]

Batch = tuple[Any, ...] | Mapping[str, Any] | Callable[[nn.Module], Any]
"""What a model is run on: positional inputs, inputs by keyword, or a function that calls it."""


def run_on(model: nn.Module, inputs: Batch, flags: Mapping[str, Any] | None = None) -> Any:
    """Call ``model`` on ``inputs``, without gradient."""
    with torch.no_grad():
        return call(model, inputs, flags)


def call(model: nn.Module, inputs: Batch, flags: Mapping[str, Any] | None = None) -> Any:
    """Call ``model`` on copies of ``inputs``: a forward may change what it is given in place."""
    if callable(inputs):
        return inputs(model)
    if isinstance(inputs, Mapping):
        return model(**{name: _copies(value) for name, value in inputs.items()}, **(flags or {}))
    return model(*map(_copies, inputs), **(flags or {}))


def other_arguments(model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return further ways to call ``model``: other values of the arguments that ``inputs`` leave at their default."""
    model = entry_of(model)[1]
    try:
        signature = inspect.signature(type(model).forward)
        given = signature.bind_partial(model, **inputs) if isinstance(inputs, Mapping) else None
        given = given or signature.bind_partial(model, *inputs)
    except (TypeError, ValueError):
        return ()
    optional = (p for p in signature.parameters.values() if p.default is not p.empty)
    return other_ways(model, {p.name: p.default for p in optional if p.name not in given.arguments})


def run_on_data(model: nn.Module, inputs: Batch) -> Any:
    """Run ``model`` on ``inputs`` as :func:`run_on` does.

    Raises:
        InputError: The model does not run on ``inputs``.
    """
    try:
        return run_on(model, inputs)
    except NormswapError:
        raise
    except Exception as cause:
        raise does_not_run(cause) from cause


def does_not_run(cause: Exception) -> InputError:
    """Return the error that tells a user why the model does not run on the inputs given."""
    first = (str(cause).splitlines() or [""])[0]
    return InputError(
        f"the model does not run on the inputs it was given: {type(cause).__name__}: {first}",
        code="inputs-do-not-run",
        hint="give inputs of the shapes and dtypes that the model's forward takes",
    )


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what a hook's module is called on: torch's layers and norms name it ``input``."""
    return args[0] if args else kwargs.get("input")


def _copies(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:
        return {key: _copies(item) for key, item in value.items()}
    return type(value)(map(_copies, value)) if type(value) in (tuple, list) else value
