"""One eager run of a model on inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["Batch", "run_on"]

Batch = tuple[Any, ...] | Mapping[str, Any] | Callable[[nn.Module], Any]
"""What a model is run on: positional inputs, inputs by keyword, or a function that calls it."""


def run_on(model: nn.Module, inputs: Batch) -> Any:
    """Run ``model`` on ``inputs``, without gradient."""
    with torch.no_grad():
        if callable(inputs):
            return inputs(model)
        return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
