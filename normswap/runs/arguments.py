"""The arguments of a call, and the named tensors in what it takes and returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

__all__ = ["Named", "as_arguments", "dtype_name", "named_leaves"]

Named: TypeAlias = list[tuple[str, Any]]
"""Values with their names."""


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return ``inputs`` as positional and keyword arguments, NumPy arrays as tensors, all detached."""

    def tensor(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            return torch.from_numpy(leaf.copy())
        return leaf.detach() if isinstance(leaf, Tensor) else leaf

    inputs = pytree.tree_map(tensor, inputs)
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def named_leaves(tree: Any, root: str = "output") -> Named:
    """Return the leaves of nested dicts, sequences and dataclasses with their names, without None.

    A leaf's name is its keys joined by ``_``; it begins with ``root`` where it would begin with a position.
    """
    found: Named = []
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        if not path or isinstance(path[0], pytree.SequenceKey):
            keys.insert(0, root)
        fields: dict[str, Any] | None = None
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            fields = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
        elif isinstance(leaf, Mapping):  # of a class that torch does not know
            fields = dict(leaf)
        if fields is not None:
            prefix = "_".join(keys) + "_" if path else ""
            found += [(prefix + name, value) for name, value in named_leaves(fields, root)]
        elif leaf is not None:
            found.append(("_".join(keys), leaf))
    return found


def dtype_name(x: Tensor | torch.dtype) -> str:
    """Return the name of a dtype, or of a tensor's: ``float32``."""
    return str(x.dtype if isinstance(x, Tensor) else x).removeprefix("torch.")
