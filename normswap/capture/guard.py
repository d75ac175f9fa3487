"""Read-only, whatever happens: a model's state, mode, hooks and the random generators are put back as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["set_mode", "untouched"]

_TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


@contextmanager
def untouched(model: nn.Module, *, values: bool = False) -> Iterator[None]:
    """Restore ``model`` and the random generators on leaving, also after an exception.

    Restored are every module's attributes, train/eval flag, parameter, buffer, submodule and forward-hook tables and
    the state of torch's, Python's and NumPy's generators; with ``values`` also the values of the buffers (a forward
    pass may write them, a symbolic trace does not).
    """
    modules = list(model.modules())
    attributes = [dict(m.__dict__) for m in modules]
    tables = [(m.__dict__[name], m.__dict__[name].copy()) for m in modules for name in _TABLES]
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
        for table, copy in tables:
            table.clear()
            table.update(copy)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def set_mode(model: nn.Module, training: bool) -> None:
    """Set the train/eval flag of every module; ``train()`` is passed by, as user classes override it."""
    for module in model.modules():
        module.__dict__["training"] = training
