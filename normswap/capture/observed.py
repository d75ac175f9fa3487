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
from normswap.errors import InputError

__all__ = ["Batch", "norm_input_shapes", "run_on"]

Batch = tuple[Any, ...] | Mapping[str, Any] | Callable[[nn.Module], Any]
"""What a model is run on: positional inputs, inputs by keyword, or a function that calls it."""


def run_on(model: nn.Module, inputs: Batch) -> Any:
    """Run ``model`` on ``inputs``, without gradient."""
    with torch.no_grad():
        if callable(inputs):
            return inputs(model)
        return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


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

                def note(_: nn.Module, args: tuple[Any, ...], fqn: str = fqn) -> None:
                    seen[fqn].add(_shape(args[0]))

                handles.append(module.register_forward_pre_hook(note))
        try:
            with _FunctionalNorms(names, seen):
                run_on(model, inputs)
        except InputError:
            raise
        except Exception as cause:
            first = (str(cause).splitlines() or [""])[0]
            raise InputError(
                f"the model does not run on the inputs it was given: {type(cause).__name__}: {first}",
                code="inputs-do-not-run",
                hint="give inputs of the shapes and dtypes that the model's forward takes",
            ) from cause
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
