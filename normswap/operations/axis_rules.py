"""Axis rules: how many axes a reshaping operation leaves, as its arguments tell (a function of those bound)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["flattened", "viewed"]


def flattened(arguments: Mapping[str, Any]) -> int | None:
    """Return 2 where everything behind the samples becomes one axis; how many axes others leave is not known."""
    return 2 if (arguments["start_dim"], arguments["end_dim"]) == (1, -1) else None


def viewed(arguments: Mapping[str, Any]) -> int | None:
    """Return how many sizes a view was given, be it one by one or as a list."""
    sizes = arguments["size"]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        return len(sizes[0])
    return len(sizes) if len(sizes) > 1 else None
