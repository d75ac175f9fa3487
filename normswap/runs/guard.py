"""Snapshot and restore: a model's state, mode and hooks, and the random generators, are put back whatever happens."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["copy_of", "set_mode", "untouched"]


@contextmanager
def untouched(model: nn.Module, *, values: bool = False) -> Iterator[None]:
    """Restore ``model`` and the random generators on leaving, also after an exception.

    Restored are every module's attributes, train/eval flag, tables of parameters, buffers, submodules and hooks, the
    contents of its own dicts, lists and sets, and the state of torch's, Python's and NumPy's generators; with
    ``values`` also the values of the buffers (a forward pass may write them, a symbolic trace does not).
    """
    modules = list(model.modules())
    attributes = [dict(m.__dict__) for m in modules]
    # Tables of parameters, submodules and hooks, and whatever a user's forward keeps its caches in.
    containers = [(c, c.copy()) for m in modules for c in m.__dict__.values() if isinstance(c, (dict, list, set))]
    buffers: list[tuple[Tensor, Tensor]] = []
    if values:
        buffers = [(b, b.detach().clone()) for b in model.buffers() if b is not None]
    cuda = list(range(torch.cuda.device_count())) if values and torch.cuda.is_initialized() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, before in zip(modules, attributes, strict=True):
            module.__dict__.clear()
            module.__dict__.update(before)
        for container, copy in containers:
            container.clear()
            container.extend(copy) if isinstance(container, list) else container.update(copy)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def set_mode(model: nn.Module, training: bool) -> None:
    """Set the train/eval flag of every module; ``train()`` is passed by, as user classes override it."""
    for module in model.modules():
        module.__dict__["training"] = training


def copy_of(model: nn.Module) -> nn.Module:
    """Return a deep copy of ``model``, also where it holds what torch refuses to copy: results with a gradient.

    Such are a stashed activation, and the weight under ``torch.nn.utils.weight_norm``, which each call computes anew.
    """
    held = (leaf for m in model.modules() for leaf in pytree.tree_leaves(dict(vars(m))) if isinstance(leaf, Tensor))
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in held if t.grad_fn is not None})
