"""Axis rules: how many axes an operation leaves, and where it moves them, as its bound arguments tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["flattened", "held", "moved", "permuted", "permuted_axes", "transposed", "viewed"]

Order = tuple[int, ...]
"""For each axis of the result, the axis of the argument that it was."""


def flattened(arguments: Mapping[str, Any]) -> int | None:
    """Return 2 where everything behind the samples becomes one axis; how many axes others leave is not known."""
    return 2 if (arguments["start_dim"], arguments["end_dim"]) == (1, -1) else None


def held(arguments: Mapping[str, Any]) -> int | None:
    """Return the number of axes that a check of it lets through."""
    rank = arguments["rank"]
    return rank if isinstance(rank, int) else None


def viewed(arguments: Mapping[str, Any]) -> int | None:
    """Return how many sizes a view was given, be it one by one or as a list."""
    sizes = arguments["size"]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        return len(sizes[0])
    return len(sizes) if len(sizes) > 1 else None


def permuted_axes(arguments: Mapping[str, Any]) -> int | None:
    """Return how many axes a permutation was given, be it one by one or as a list."""
    order = _numbers(arguments["dims"])
    return None if order is None else len(order)


def permuted(arguments: Mapping[str, Any], rank: int) -> Order | None:
    """Return the order that a permutation was given."""
    order = _numbers(arguments["dims"])
    return None if order is None or len(order) != rank else tuple(axis % rank for axis in order)


def transposed(arguments: Mapping[str, Any], rank: int) -> Order | None:
    """Return the order in which two axes have changed places."""
    pair = _numbers((arguments["dim0"], arguments["dim1"]))
    if pair is None or not all(-rank <= axis < rank for axis in pair):
        return None
    order = list(range(rank))
    a, b = pair[0] % rank, pair[1] % rank
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def moved(arguments: Mapping[str, Any], rank: int) -> Order | None:
    """Return the order in which one axis has gone to another place."""
    pair = _numbers((arguments["source"], arguments["destination"]))
    if pair is None or not all(-rank <= axis < rank for axis in pair):
        return None
    order = list(range(rank))
    order.insert(pair[1] % rank, order.pop(pair[0] % rank))
    return tuple(order)


def _numbers(values: Any) -> tuple[int, ...] | None:
    if len(values) == 1 and isinstance(values[0], (tuple, list)):
        values = values[0]
    return tuple(values) if all(isinstance(v, int) and not isinstance(v, bool) for v in values) else None
