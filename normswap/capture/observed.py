"""One eager run of a model on inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["run_on"]


def run_on(model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]) -> Any:
    """Run ``model`` on ``inputs``, positional or by keyword, without gradient."""
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
