"""What one eager run on example inputs tells: the shapes that reach each norm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.capture.guard import set_mode, untouched
from normswap.capture.ops import is_norm
from normswap.errors import InputError, NormswapError

__all__ = ["Batch", "call", "first_input", "norm_input_shapes", "run_on", "run_on_data"]

Batch = tuple[Any, ...] | Mapping[str, Any] | Callable[[nn.Module], Any]
"""What a model is run on: positional inputs, inputs by keyword, or a function that calls it."""


def run_on(model: nn.Module, inputs: Batch) -> Any:
    """Call ``model`` on ``inputs``, without gradient."""
    with torch.no_grad():
        return call(model, inputs)


def call(model: nn.Module, inputs: Batch) -> Any:
    """Call ``model`` on copies of ``inputs``: a forward may change what it is given in place."""
    if callable(inputs):
        return inputs(model)
    if isinstance(inputs, Mapping):
        return model(**{name: _copies(value) for name, value in inputs.items()})
    return model(*map(_copies, inputs))


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
        first = (str(cause).splitlines() or [""])[0]
        raise InputError(
            f"the model does not run on the inputs it was given: {type(cause).__name__}: {first}",
            code="inputs-do-not-run",
            hint="give inputs of the shapes and dtypes that the model's forward takes",
        ) from cause


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what a hook's module is called on: torch's layers and norms name it ``input``."""
    return args[0] if args else kwargs.get("input")


def _copies(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:
        return {key: _copies(item) for key, item in value.items()}
    return type(value)(map(_copies, value)) if type(value) in (tuple, list) else value


def norm_input_shapes(
    model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]
) -> dict[str, frozenset[tuple[int, int]]]:
    """Return the (axes, positions per channel) seen at each norm's input in one eval run, by fqn; read-only.

    A functional norm is known by its running mean's name.

    Raises:
        InputError: The model does not run on ``inputs``.
    """
    seen: dict[str, set[tuple[int, int]]] = defaultdict(set)
    names = {id(buffer): name for name, buffer in model.named_buffers()}
    with untouched(model, values=True):
        set_mode(model, False)
        handles = []
        for fqn, module in model.named_modules():
            if is_norm(module):

                def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], fqn: str = fqn) -> None:
                    seen[fqn].add(_shape(first_input(args, kwargs)))

                handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        try:
            with _FunctionalNorms(names, seen):
                run_on_data(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
    return {fqn: frozenset(shapes) for fqn, shapes in seen.items()}


class _FunctionalNorms(TorchFunctionMode):
    """Notes the input's shape at every call of ``batch_norm``, by the running mean's name."""

    def __init__(self, names: dict[int, str], seen: dict[str, set[tuple[int, int]]]) -> None:
        super().__init__()
        self.names, self.seen = names, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.batch_norm:
            mean = args[1] if len(args) > 1 else kwargs.get("running_mean")
            if id(mean) in self.names:
                self.seen[self.names[id(mean)]].add(_shape(args[0] if args else kwargs["input"]))
        return func(*args, **kwargs)


def _shape(x: Tensor) -> tuple[int, int]:
    return x.ndim, prod(x.shape[2:])
