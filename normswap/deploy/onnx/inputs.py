"""The inputs of an export: by name, at several sizes, and which of their axes may have any size."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from normswap.errors import ExportError, InputError, argument
from normswap.runs.arguments import as_arguments, named_leaves

__all__ = ["batch_size", "bind_inputs", "dynamic_axes", "enlarged", "resized"]

SPATIAL = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


def bind_inputs(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Return the example inputs by the names of forward's parameters, in their order."""
    args, kwargs = as_arguments(example_inputs)
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as cause:
        raise InputError(
            f"the example inputs do not fit {type(model).__name__}.forward: {cause}",
            code="export-inputs",
            hint="give a tensor, a tuple of positional inputs, or a dict of keyword inputs",
        ) from cause
    for name in bound.arguments:
        parameter = bound.signature.parameters[name]
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ExportError(
                f"{type(model).__name__}.forward takes {parameter}: its inputs have no names",
                code="export-inputs",
                hint="wrap the model in a module whose forward names each input",
            )
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(bound.arguments)):
        raise InputError("the example inputs hold no tensor", code="export-inputs", hint="give at least one tensor")
    return dict(bound.arguments)


def batch_size(inputs: Any) -> int:
    """Return the one size that axis 0 of all tensors has."""
    sizes = {name: len(x) for name, x in named_leaves(inputs) if isinstance(x, Tensor) and x.ndim}
    if len(set(sizes.values())) != 1:
        raise InputError(
            "the inputs have no common batch size on axis 0: "
            + (", ".join(f"{name} {size}" for name, size in sizes.items()) or "no axis at all"),
            code="export-batch",
            hint=f"pass {argument('dynamic_batch', False)}",
        )
    return next(iter(sizes.values()))


def resized(inputs: Any, batch: int) -> Any:
    """Return the inputs with ``batch`` samples; a repeated one is rolled along its last axis: they differ."""

    def resize(x: Tensor) -> Tensor:
        if not x.ndim or len(x) == batch:
            return x
        samples = [x[i % len(x)] for i in range(batch)]
        return torch.stack([s.roll(i // len(x), -1) if s.ndim else s for i, s in enumerate(samples)])

    return pytree.tree_map_only(Tensor, resize, inputs)


def enlarged(x: Tensor) -> Tensor:
    """Return ``x`` at twice the size on every axis from 2 on: a network that halves its maps allows that."""
    return x.repeat(1, 1, *(2,) * (x.ndim - 2)) if x.ndim > 2 else x


def dynamic_axes(inputs: dict[str, Any], batch: bool, spatial: bool) -> Any:
    """Return, in the structure of the inputs, {axis: name} for each tensor and None for what is none."""
    known: dict[tuple[str, int], str] = {}

    def dims(x: Any) -> dict[int, str] | None:
        if not isinstance(x, Tensor):
            return None
        named = {0: "batch"} if batch and x.ndim else {}
        if spatial and x.ndim > 2:
            names = SPATIAL.get(x.ndim - 2) or [f"size{axis}" for axis in range(2, x.ndim)]
            for axis, base in enumerate(names, 2):
                size = (base, x.shape[axis])
                taken = sum(name == base for name, _ in known)
                named[axis] = known.setdefault(size, f"{base}{taken + 1}" if taken else base)
        return named

    return pytree.tree_map(dims, inputs)
