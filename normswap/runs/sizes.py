"""Conditions on the sizes of inputs, and sizes that break them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

__all__ = ["LARGEST", "Condition", "Sizes", "as_condition", "breaking"]

Sizes = Mapping[str, int]
"""The size of each axis that may have another, by its name."""

LARGEST = 1 << 18
"""How many values the inputs of a run may have that the example does not ask for."""

_ATTEMPTS = 4
"""At how many sizes that break a condition the model is tried."""
_PLACES = 8
"""At how many sizes a model is asked for its conditions."""


@dataclass(frozen=True)
class Condition:
    """What was taken for granted of the sizes.

    Args:
        text: The condition, for a person.
        holds: Whether it holds at given sizes.
    """

    text: str
    holds: Callable[[Sizes], bool]


def as_condition(expr: Any, names: Mapping[Any, str]) -> Condition | None:
    """Return a guard as a condition; None where it asks for something else than these axes' sizes."""
    from torch.utils._sympy.printers import PythonPrinter

    if not expr.free_symbols or not expr.free_symbols <= names.keys():
        return None
    import sympy  # type: ignore[import-untyped]

    plain = {symbol: sympy.Symbol(names[symbol], integer=True) for symbol in expr.free_symbols}
    text = PythonPrinter().doprint(expr.xreplace(plain))
    code = compile(text, "<guard>", "eval")
    return Condition(text, lambda sizes: bool(eval(code, {"math": math, "torch": torch}, dict(sizes))))


def breaking(
    conditions_at: Callable[[Sizes], Sequence[Condition]],
    traced: Sizes,
    tried: Sequence[Sizes],
    values: int,
    runs: Callable[[Sizes], bool],
) -> Iterator[tuple[Sizes, str]]:
    """Yield sizes at which a condition does not hold and the model runs, with the condition's text.

    Where one is broken the model may ask for more, as in ``height > 20 and width > 20``; so a few of those places are
    asked in their turn.

    Args:
        conditions_at: What is taken for granted where the model is run at given sizes.
        traced: The sizes to begin with.
        tried: Sizes that are tried already: what does not hold there needs no others, unless that is a size of 1, at
            which what a model computes may be the same by chance: a mean over one sample is the sample.
        values: How many values the inputs have at the traced sizes.
        runs: Whether the model runs at given sizes.
    """
    growth = max(LARGEST, 4 * values) // max(values, 1)
    failed: list[Sizes] = []
    done = list(tried)
    places: list[tuple[Sizes, tuple[Condition, ...]]] = [(traced, ())]  # with the conditions that led there
    for place, passed in places:  # which grow
        conditions = conditions_at(place)
        new = [sizes for sizes in tried if place is traced and any(not c.holds(sizes) for c in conditions)]
        for condition in conditions:
            alike = [sizes for sizes in done if all(c.holds(sizes) == c.holds(place) for c in passed)]
            if any(not (condition.holds(sizes) or _is_one(sizes, traced)) for sizes in alike):
                continue
            for sizes in islice(_breaking(condition, place, growth), _ATTEMPTS):
                if sizes in done:
                    break
                if sizes not in failed and runs(sizes):
                    done.append(sizes)
                    new.append(sizes)
                    yield sizes, condition.text
                    break
                failed.append(sizes)
        room = _PLACES - len(places)
        places += [(sizes, (*passed, *(c for c in conditions if not c.holds(sizes)))) for sizes in new[:room]]


def _is_one(sizes: Sizes, traced: Sizes) -> bool:
    """Tell whether an axis has the size 1 that had another."""
    return any(n == 1 != traced[name] for name, n in sizes.items())


def _breaking(condition: Condition, traced: Sizes, growth: int) -> Iterator[Sizes]:
    """Yield sizes that break the condition, of one axis: its double first, which halving allows, then the nearest."""
    near = range(1, 65)
    for pick in (lambda n: (2 * n,), lambda n: [m for d in near for m in (n + d, n - d)], lambda n: _far(n, growth)):
        for name, n in traced.items():
            for size in pick(n):
                if size > 0 and size <= growth * n and not condition.holds(sizes := {**traced, name: size}):
                    yield sizes
                    break


def _far(n: int, growth: int) -> Iterator[int]:
    """Yield the sizes around each power of two beyond ``n``: there lie the limits that people write."""
    size = 128
    while size <= growth * n:
        yield from (size, size + 1)
        size *= 2
