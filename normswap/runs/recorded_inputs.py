"""The inputs that an exported program was made with, which its model carries along."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

__all__ = ["RECORD", "by_name", "fixed_sizes", "has_fixed_batch", "record_of", "recorded_inputs"]

RECORD = "normswap_inputs"
"""Where a model's ``meta`` holds them."""


def recorded_inputs(model: nn.Module) -> tuple[Any, ...] | dict[str, Any] | None:
    """Return the inputs that ``model`` was exported with; None for a model that does not come from a program."""
    record = record_of(model)
    if record is None:
        return None
    args, kwargs = _moved((record["args"], record["kwargs"]), record["dtype"], model)
    return by_name(model, args, kwargs) if kwargs else args


def _moved(inputs: Any, dtype: torch.dtype | None, model: nn.Module) -> Any:
    """Return ``inputs`` where ``model`` is now, and as wide as it is, if it was of ``dtype``."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        return inputs
    return pytree.tree_map_only(Tensor, lambda v: v.to(like) if v.dtype is dtype else v.to(like.device), inputs)


def fixed_sizes(model: nn.Module) -> dict[str, str]:
    """Return the inputs that must keep sizes of their program, as ``2x3x*x*`` with ``*`` for any size."""
    record = record_of(model)
    if record is None:
        return {}
    values, free = by_name(model, record["args"], record["kwargs"]), by_name(model, *record["dynamic_shapes"])
    return {
        name: "x".join("*" if axis in (free[name] or ()) else str(size) for axis, size in enumerate(value.shape))
        for name, value in values.items()
        if isinstance(value, Tensor) and len(free[name] or ()) < value.ndim
    }


def has_fixed_batch(model: nn.Module) -> bool:
    """Tell whether ``model`` comes from a program that takes no other number of samples than its example's."""
    return any(not sizes.startswith("*") for sizes in fixed_sizes(model).values())


def record_of(model: nn.Module) -> dict[str, Any] | None:
    """Return what a model carries along of its program; None for one that does not come from a program."""
    return model.meta.get(RECORD) if isinstance(model, fx.GraphModule) else None


def by_name(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's inputs by the names that the forward of ``model`` gives them."""
    return {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
