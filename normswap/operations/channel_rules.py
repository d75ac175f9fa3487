"""Channel rules: what an operation does to channels that are scaled (:mod:`normswap.graph.channels`).

A rule takes what is known of an operation's arguments and returns what is then known of its result; None says that
nothing is, and that the channels of its arguments must stay as they are. So a rule that asks for too much costs little,
and one that asks for too little makes a network wrong: in doubt it is None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "Numbering",
    "Rule",
    "Value",
    "add",
    "chunk",
    "divide",
    "fix",
    "flatten",
    "gate",
    "item",
    "join",
    "max_pool",
    "multiply",
    "multiply_in_place",
    "over_space",
    "pad",
    "pad_space",
    "reduce",
    "same",
    "split",
    "values_in",
]


@dataclass(frozen=True)
class Value:
    """What is known of a tensor ``(N, C, …)``.

    Args:
        numbers: The numbers of its channels.
        rank: How many axes it has.
        gate: Whether its channels are fixed: multiplied with it, another value keeps its scales.
        flat: Whether each channel stands several times in a row, as flattening leaves it.
    """

    numbers: Tensor
    rank: int
    gate: bool = False
    flat: bool = False


class Numbering(Protocol):
    """What rules may do to the numbers of channels."""

    def new(self, channels: int) -> Tensor:
        """Return numbers that nobody has."""

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Let channels of ``a`` and ``b`` have one scale, one by one."""

    def fix(self, value: Any) -> None:
        """Let the channels of ``value``, or of several, stay as they are."""


def values_in(value: Any) -> list[Value]:
    """Return what is known of a value, or of those in a list or tuple."""
    if isinstance(value, Value):
        return [value]
    return [one for item in value for one in values_in(item)] if isinstance(value, (list, tuple)) else []


Rule = Callable[..., Any]
"""Called with a :class:`Numbering` and the operation's arguments, in the order of its signature."""


def fix(*_: Any) -> None:
    """Anything: the channels of all arguments stay as they are, and nothing is known of the result."""


def same(_: Numbering, x: Any, *options: Any) -> Any:
    """An operation on each channel by itself that keeps a positive factor, and all axes."""
    return x if isinstance(x, Value) and not values_in(options) else None


def over_space(axes: int) -> Rule:
    """Return the same over so many axes of space: with one less the channels would be taken for space."""

    def rule(_: Numbering, x: Any, *options: Any) -> Any:
        return x if isinstance(x, Value) and x.rank == axes + 2 and not values_in(options) else None

    return rule


def max_pool(axes: int) -> Rule:
    """Return the same for an operation whose last argument asks for the places of the maxima, too."""
    pool = over_space(axes)

    def rule(numbering: Numbering, x: Any, *options: Any) -> Any:
        return None if options[-1] else pool(numbering, x, *options)

    return rule


def pad_space(axes: int) -> Rule:
    """Return the same for an operation whose last argument is the value that is put around the space."""
    padded = over_space(axes)

    def rule(numbering: Numbering, x: Any, *options: Any) -> Any:
        return padded(numbering, x, *options) if options[-1] in (None, 0) else None

    return rule


def gate(numbering: Numbering, x: Any, *options: Any) -> Any:
    """An operation on each value by itself that keeps no factor."""
    numbering.fix([x, *options])
    return replace(x, gate=True) if isinstance(x, Value) else None


def _aligned(a: Any, b: Any) -> bool:
    """Tell whether both are values whose channels meet one by one, whatever is broadcast over space."""
    both = isinstance(a, Value) and isinstance(b, Value)
    return both and a.rank == b.rank and len(a.numbers) == len(b.numbers) and not (a.flat or b.flat)


def add(numbering: Numbering, a: Any, b: Any, alpha: Any = None) -> Any:
    """A sum or difference of two values: their channels have one scale."""
    if not _aligned(a, b) or values_in(alpha):
        return None
    numbering.tie(a.numbers, b.numbers)
    return replace(a, gate=a.gate and b.gate)


def multiply(numbering: Numbering, a: Any, b: Any) -> Any:
    """A product with a number, or with a value whose channels are fixed."""
    if isinstance(a, (int, float)):
        a, b = b, a
    if isinstance(a, Value) and a.gate and _aligned(a, b):
        return b
    return multiply_in_place(numbering, a, b)


def multiply_in_place(_: Numbering, a: Any, b: Any) -> Any:
    """The same, written to ``a``: a gate that is written to would no longer be one, wherever else it is used."""
    if isinstance(a, Value) and isinstance(b, (int, float)) and not isinstance(b, bool):
        return a
    return a if _aligned(a, b) and b.gate else None


def divide(_: Numbering, a: Any, b: Any) -> Any:
    """A division by a number."""
    return a if isinstance(a, Value) and isinstance(b, (int, float)) else None


def join(_: Numbering, parts: Any, axis: Any) -> Any:
    """A concatenation along the channels."""
    known = isinstance(parts, (list, tuple)) and all(isinstance(part, Value) and not part.flat for part in parts)
    if not known or not parts or len({part.rank for part in parts}) > 1 or axis not in (1, 1 - parts[0].rank):
        return None
    return Value(torch.cat([part.numbers for part in parts]), parts[0].rank, all(part.gate for part in parts))


def reduce(_: Numbering, x: Any, axes: Any, keep: Any) -> Any:
    """A mean, sum or maximum over all of space or some of it."""
    axes = (axes,) if isinstance(axes, int) else axes
    if not isinstance(x, Value) or not axes or not _integers(axes) or not isinstance(keep, bool):
        return None
    if any(axis % x.rank < 2 for axis in axes):
        return None
    return x if keep else replace(x, rank=x.rank - len(axes))


def flatten(_: Numbering, x: Any, start: Any, end: Any) -> Any:
    """All axes behind the samples, or all of space, as one."""
    if not isinstance(x, Value) or not _integers((start, end)):
        return None
    if (start, end % x.rank) == (2, x.rank - 1) and x.rank > 2:
        return replace(x, rank=3)
    return replace(x, rank=2, flat=x.flat or x.rank > 2) if (start, end % x.rank) == (1, x.rank - 1) else None


def pad(numbering: Numbering, x: Any, sides: Any, mode: Any, value: Any) -> Any:
    """Zeros, or copies of values, around the space, and perhaps further channels of zeros."""
    if not isinstance(x, Value) or x.flat or not _integers(sides) or (mode == "constant" and value not in (None, 0)):
        return None
    space = 2 * (x.rank - 2)
    before, after = sides[space : space + 2] if len(sides) == space + 2 else (0, 0)
    if len(sides) > space + 2 or min(before, after) < 0:
        return None
    return replace(x, numbers=torch.cat([numbering.new(before), x.numbers, numbering.new(after)]), gate=False)


def item(_: Numbering, x: Any, index: Any) -> Any:
    """A choice of samples, channels and positions that leaves all axes, or a part of a value that was split."""
    if isinstance(x, (list, tuple)) and isinstance(index, int):
        return x[index]
    index = index if isinstance(index, tuple) else (index,)
    if not isinstance(x, Value) or not all(isinstance(i, slice) for i in index):
        return None
    if len(index) < 2 or index[1] == slice(None):
        return x
    ends = (index[1].start, index[1].stop, index[1].step)
    if x.flat or not _integers([end for end in ends if end is not None]):
        return None
    return replace(x, numbers=x.numbers[index[1]])


def _parts(cut: Callable[..., Any]) -> Rule:
    def rule(_: Numbering, x: Any, sizes: Any, axis: Any) -> Any:
        sizes = list(sizes) if isinstance(sizes, (list, tuple)) else sizes
        if not isinstance(x, Value) or x.flat or axis not in (1, 1 - x.rank):
            return None
        if not _integers(sizes if isinstance(sizes, list) else [sizes]):
            return None
        return [replace(x, numbers=numbers) for numbers in cut(x.numbers, sizes)]

    return rule


split, chunk = _parts(torch.split), _parts(torch.chunk)
"""Parts of a value, cut along its channels."""


def _integers(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
