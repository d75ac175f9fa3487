"""The inputs of an export: by name, at several sizes, and which of their axes may have any size."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from normswap.errors import ExportError, InputError, argument
from normswap.runs.arguments import as_arguments, named_leaves

__all__ = ["axes_of", "batch_size", "bind_inputs", "dynamic_axes", "enlarged", "lengthened", "resized", "time_axes"]

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


def time_axes(inputs: Any, asked: bool | int | Mapping[str, int]) -> dict[str, int]:
    """Return the time axis of each tensor that has one, by its name.

    Args:
        inputs: The inputs by name.
        asked: False for none, True for axis 1, an axis, or the axes by name. Of an axis alone, a tensor has it where
            its size there is that of the first tensor that has so many axes.
    """
    if asked is False:
        return {}
    sizes = {name: x.shape for name, x in _tensors(inputs)}
    if isinstance(asked, Mapping):
        found = {str(name): axis for name, axis in asked.items()}
    else:
        having = {name: shape[int(asked)] for name, shape in sizes.items() if len(shape) > int(asked) >= 0}
        found = {name: int(asked) for name, size in having.items() if size == next(iter(having.values()))}
    wrong = [name for name, axis in found.items() if name not in sizes or not 0 <= axis < len(sizes[name])]
    lengths = {sizes[name][axis] for name, axis in found.items() if name not in wrong}
    if wrong or len(lengths) != 1:
        raise InputError(
            f"{argument('dynamic_time', asked)} does not fit the inputs "
            + ", ".join(f"{name} {tuple(shape)}" for name, shape in sizes.items()),
            code="export-time",
            hint="give the axis that time is on, 1 where the batch is on axis 0; or in Python the axis of each input "
            "that has one, by its name, all of one length",
        )
    _refuse_none("time", next(iter(lengths)))
    return found


def lengthened(inputs: Any, times: Mapping[str, int], times_as_long: int = 2) -> Any:
    """Return the inputs with each time axis so many times as long; every second part runs backwards."""

    def lengthen(name: str, x: Any) -> Any:
        if name not in times:
            return x
        return torch.cat([x.flip(times[name]) if i % 2 else x for i in range(times_as_long)], times[name])

    return _by_name(lengthen, inputs)


def _tensors(inputs: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors among the inputs' leaves with the names that they have in the file."""
    leaves = pytree.tree_flatten_with_path(inputs)[0]
    return [(named_leaves(_nested(path, x))[0][0], x) for path, x in leaves if isinstance(x, Tensor)]


def _nested(path: Any, leaf: Any) -> Any:
    for key in reversed(path):
        leaf = {str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))): leaf}
    return leaf


def _by_name(change: Callable[[str, Any], Any], inputs: Any) -> Any:
    """Return the inputs with each tensor changed by a function of its name and value."""
    names = iter([name for name, _ in _tensors(inputs)])
    return pytree.tree_map_only(Tensor, lambda x: change(next(names), x), inputs)


def batch_axis(name: str, times: Mapping[str, int]) -> int:
    """Return the axis of a tensor's samples: 0, or 1 where axis 0 is time."""
    return 1 if times.get(name) == 0 else 0


def batch_size(inputs: Any, times: Mapping[str, int]) -> int:
    """Return the one size that all tensors have on the axis of their samples."""
    tensors = [(name, x, batch_axis(name, times)) for name, x in _tensors(inputs)]
    sizes = {name: x.shape[axis] for name, x, axis in tensors if x.ndim > axis}
    if len(set(sizes.values())) != 1:
        raise InputError(
            f"the inputs have no common batch size on axis {1 if 0 in times.values() else 0}: "
            + (", ".join(f"{name} {size}" for name, size in sizes.items()) or "no axis at all"),
            code="export-batch",
            hint=f"pass {argument('dynamic_batch', False)}",
        )
    _refuse_none("batch", size := next(iter(sizes.values())))
    return size


def _refuse_none(axis: str, size: int) -> None:
    """Raise InputError for a dynamic axis on which the example has nothing."""
    if size == 0:
        raise InputError(
            f"the example inputs have size 0 on the {axis} axis: nothing can be exported or compared with them",
            code="export-inputs",
            hint="give at least one sample, and tensors without an axis of size 0",
        )


def resized(inputs: Any, batch: int, times: Mapping[str, int] | None = None) -> Any:
    """Return the inputs with ``batch`` samples; a repeated one is rolled along its last axis: they differ."""

    def resize(name: str, x: Tensor) -> Tensor:
        axis = batch_axis(name, times or {})
        if x.ndim <= axis or x.shape[axis] == batch:
            return x
        given = x.unbind(axis)
        samples = [given[i % len(given)] for i in range(batch)]
        return torch.stack([s.roll(i // len(given), -1) if s.ndim else s for i, s in enumerate(samples)], axis)

    return _by_name(resize, inputs)


def enlarged(x: Tensor) -> Tensor:
    """Return ``x`` at twice the size on every axis from 2 on: a network that halves its maps allows that."""
    return x.repeat(1, 1, *(2,) * (x.ndim - 2)) if x.ndim > 2 else x


def dynamic_axes(inputs: dict[str, Any], batch: bool, spatial: bool, times: Mapping[str, int]) -> Any:
    """Return, in the structure of the inputs, {axis: name} for each tensor and None for what is none."""
    known: dict[tuple[str, int], str] = {}

    def dims(name: str, x: Tensor) -> dict[int, str]:
        named = {batch_axis(name, times): "batch"} if batch and x.ndim > batch_axis(name, times) else {}
        if name in times:
            named[times[name]] = "time"
        if spatial and x.ndim > 2:
            names = SPATIAL.get(x.ndim - 2) or [f"size{axis}" for axis in range(2, x.ndim)]
            for axis, base in enumerate(names, 2):
                size = (base, x.shape[axis])
                taken = sum(name == base for name, _ in known)
                _refuse_none(base, x.shape[axis])
                named.setdefault(axis, known.setdefault(size, f"{base}{taken + 1}" if taken else base))
        return named

    return _by_name(dims, pytree.tree_map(lambda x: x if isinstance(x, Tensor) else None, inputs))


def axes_of(inputs: Any, dims: Any) -> list[tuple[Tensor, dict[int, str]]]:
    """Return each tensor with the names of its dynamic axes, see :func:`dynamic_axes`."""
    named = [axes for axes in pytree.tree_leaves(dims, is_leaf=_is_axes) if axes is not None]
    return list(zip([x for _, x in _tensors(inputs)], named, strict=True))


def _is_axes(leaf: Any) -> bool:
    return isinstance(leaf, dict) and all(isinstance(axis, int) for axis in leaf)
