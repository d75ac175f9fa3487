"""The values that an optional argument of a forward may have, where they are few: flags, members, places in a list."""

from __future__ import annotations

import dis
import enum
import inspect
import typing
from collections.abc import Iterator, Mapping
from itertools import islice, product
from math import prod
from types import FunctionType
from typing import Any

from torch import nn

__all__ = ["other_ways"]

_MOST = 12
"""How many values of one argument are tried, and how many of several together."""


def other_ways(model: nn.Module, defaults: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return further ways to call ``model``, each as the arguments that are not at their default.

    Each flag is turned, by itself. Of other arguments the values are the members of an Enum or Literal, the keys of a
    ModuleDict that has the default among its keys, the places in a ModuleList, and what a forward compares an argument
    of that name with; of several such arguments they are combined where that gives few ways.

    Args:
        model: The model.
        defaults: The arguments that may be given, with their defaults.
    """
    flags = [{name: not default} for name, default in defaults.items() if isinstance(default, bool)]
    hints = _hints(model)
    sets = {name: _values(model, name, default, hints.get(name)) for name, default in defaults.items()}
    sets = {name: values for name, values in sets.items() if values and not isinstance(defaults[name], bool)}
    if prod(len(values) + 1 for values in sets.values()) <= _MOST:
        choices = product(*([defaults[name], *values] for name, values in sets.items()))
        ways = [dict(zip(sets, chosen, strict=True)) for chosen in choices][1:]
    else:
        ways = [{name: value} for name, values in sets.items() for value in values]
    return (*flags, *ways)


def _hints(model: nn.Module) -> dict[str, Any]:
    try:
        return typing.get_type_hints(type(model).forward)
    except Exception:  # a name that is imported for type checkers alone
        return {}


def _values(model: nn.Module, name: str, default: Any, hint: Any) -> list[Any]:
    """Return the values of the argument ``name`` beside its default."""
    found: dict[Any, None] = {}
    for kind in (type(default), hint, *typing.get_args(hint)):
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            found.update(dict.fromkeys(kind))
        elif typing.get_origin(kind) is typing.Literal:
            found.update(dict.fromkeys(typing.get_args(kind)))
        elif kind is bool:
            found.update(dict.fromkeys((False, True)))
        elif kind is int:
            lists = [len(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) <= _MOST]
            found.update(dict.fromkeys(range(max(lists, default=0))))
            found.update(dict.fromkeys(c for c in _compared(model, name) if isinstance(c, int)))
        elif kind is str:
            tables = (m for m in model.modules() if isinstance(m, nn.ModuleDict))
            keys = (key for table in tables if default is None or default in table for key in table)
            constants = [c for c in _compared(model, name) if isinstance(c, str)]
            found.update(dict.fromkeys((*keys, *constants, *("",) * bool(constants))))  # '' is none of them
    return list(islice((v for v in found if v is not default and v != default), _MOST))


def _compared(model: nn.Module, name: str) -> Iterator[Any]:
    """Yield the constants that some forward compares its argument ``name`` with, and the neighbours of numbers."""
    for cls in {type(module) for module in model.modules()}:
        forward = inspect.unwrap(cls.forward)
        if not isinstance(forward, FunctionType) or name not in forward.__code__.co_varnames:
            continue
        steps = [step for step in dis.get_instructions(forward) if step.opname not in ("CACHE", "EXTENDED_ARG")]
        for first, second, third in zip(steps, steps[1:], steps[2:], strict=False):
            if third.opname in ("COMPARE_OP", "CONTAINS_OP", "IS_OP"):
                values = (first.argval, second.argval)
                if name in values and "LOAD_CONST" in (first.opname, second.opname):
                    other = values[1 - values.index(name)]
                    for constant in other if isinstance(other, (tuple, frozenset)) else (other,):
                        numeric = isinstance(constant, int) and not isinstance(constant, bool)
                        yield from (constant, constant + 1, constant - 1) if numeric else (constant,)
