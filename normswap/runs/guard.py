"""A model is only read: whatever its forward writes is put back, whatever happens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normswap.runs.settings import settings_kept
from normswap.runs.snapshot import Snapshot
from normswap.runs.writes import Watched

__all__ = ["copy_of", "set_mode", "untouched"]


@contextmanager
def untouched(model: nn.Module) -> Iterator[Snapshot]:
    """Restore ``model`` and all that its forward may write on leaving, also after an exception.

    Restored are what hangs on the model (:class:`~normswap.runs.snapshot.Snapshot`): values, shapes and gradients of
    tensors, attributes, modes, tables and hooks of modules, containers, counters; the random generators and torch's
    settings. What is written within :func:`~normswap.runs.writes.kept` stays. The snapshot that is given tells
    afterwards whether anything had changed.
    """
    with settings_kept():
        before = Snapshot(model)
        try:
            with Watched(before.values):
                yield before
        finally:
            before.restore()


def set_mode(model: nn.Module, training: bool) -> None:
    """Set the train/eval flag of every module; ``train()`` is passed by, as user classes override it."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):  # its code reads no attribute of Python's
            module.training = training
        else:
            module.__dict__["training"] = training


def copy_of(model: nn.Module) -> nn.Module:
    """Return a deep copy of ``model``, also where it holds what torch refuses to copy: results with a gradient.

    Such are a stashed activation, and the weight under ``torch.nn.utils.weight_norm``, which each call computes anew.
    """
    held = (leaf for m in model.modules() for leaf in pytree.tree_leaves(dict(vars(m))) if isinstance(leaf, Tensor))
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in held if t.grad_fn is not None})
