"""Forwards that branch on the class of a submodule, or on what attributes it has: a new norm answers otherwise.

Note [Tests of a class]
``isinstance(layer, nn.BatchNorm1d) and x.dim() == 3`` takes another branch once the BatchNorm is replaced, and no trace
shows that it does. So the bytecode of a forward, and of what it calls, is searched for such questions: ``isinstance``,
``issubclass``, ``type``, ``__class__``, ``_get_name``, a class pattern; ``hasattr`` and ``getattr``. A question counts
where that code also names a class that answers otherwise (itself, in a tuple or in a table), the name of one, or an
attribute of BatchNorm. Where the code tells which module is asked, as in ``isinstance(self.bn, …)``, that norm stays;
where it does not (a variable of a loop), each norm does that the code can name. A class that a norm is of before and
after, such as Module, and one that it is never of, such as Tensor, are no matter.
"""

from __future__ import annotations

import builtins
import inspect
import typing
from collections.abc import Iterable, Iterator, Sequence
from types import FunctionType, ModuleType, UnionType
from typing import Any

from torch import nn

from normswap.graph.bytecode import NORM_ATTRIBUTES, STATISTICS, Found, Operand, codes_of, is_named
from normswap.nn.kinds import class_of

__all__ = ["class_tests_of"]

_REPLACING = (nn.GroupNorm, nn.LayerNorm)
_NEW = (*_REPLACING, nn.Identity, nn.Sequential)
"""What may stand in a norm's place: a question for one of these may be answered yes where it was no."""
_OF_ATTRIBUTES = frozenset({"hasattr", "getattr"})
_OF_NAMES = frozenset({"type", "__class__", "_get_name"})
_SURE = STATISTICS | {"num_features", "track_running_stats"}
"""The attributes that hardly another module has than a BatchNorm."""


def class_tests_of(
    module: nn.Module, norms: Sequence[tuple[str, str]], called: frozenset[str]
) -> Iterator[tuple[str, str]]:
    """Yield the norms of whose class the code of ``module`` asks, or may ask, each with the reason.

    Args:
        module: A module with code of its own.
        norms: The path inside it of each norm, and its name.
        called: Names that others call: a method of ``module`` with such a name counts, too.
    """
    codes = list(codes_of(module, called))
    names = frozenset().union(*(one.code.names for one in codes))
    values = frozenset().union(*(one.code.values for one in codes))
    whose = f"the forward of {class_of(module).__name__}"
    for one in codes:
        if not one.code.questions:
            continue
        classes, strings = _named_by(one, module)
        for kind, operands in one.code.questions:
            for path, norm in norms:
                exact = _is_asked(path, operands, one.is_method)
                if exact is None or not (exact or _may_be_asked(module, path, names, values)):
                    continue
                if kind in _OF_ATTRIBUTES:
                    if asked := sorted(strings & (NORM_ATTRIBUTES if exact else _SURE), reverse=True):
                        yield norm, f"{whose} asks whether it has a {asked[0]}, which a new norm does not have"
                elif _answers_otherwise(module.get_submodule(path), kind, classes, strings, exact):
                    yield norm, f"{whose} asks for its class, and a new norm is of another one"


def _is_asked(path: str, operands: Iterable[Operand], is_method: bool) -> bool | None:
    """Tell whether the norm at ``path`` is one of ``operands``; False where it may be, None where it cannot be."""
    unknown = False
    for parts, of_first in operands:
        dotted = ".".join(parts)
        if not parts:
            unknown |= not (of_first and is_method)
        elif not (of_first and is_method):
            unknown |= f".{path}.".find(f".{dotted}.") >= 0
        elif path == dotted:
            return True
        else:  # it, or an element of it: self.layers[0]
            unknown |= path.startswith(f"{dotted}.")
    return False if unknown else None


def _may_be_asked(module: nn.Module, path: str, names: frozenset[str], values: frozenset[str]) -> bool:
    """Tell whether the code can have the norm at ``path`` in a variable: what it just calls, it has not."""
    named = [part for part in path.split(".") if part in names]
    return is_named(module, path, names) and (not named or named[-1] in values)


def _answers_otherwise(
    norm: nn.Module, kind: str, classes: Iterable[type], strings: Iterable[str], exact: bool
) -> bool:
    """Tell whether a question that names ``classes`` or ``strings`` is answered otherwise of what replaces ``norm``."""
    for cls in classes:
        of_norms = issubclass(class_of(norm), cls) and not issubclass(nn.Module, cls)
        of_new = any(issubclass(new, cls) for new in (_NEW if exact else _REPLACING)) and not issubclass(nn.Module, cls)
        if of_norms or of_new:
            return True
    if kind not in _OF_NAMES:
        return False
    name = class_of(norm).__name__.lower()
    likely = (string.lower() for string in strings if string.isidentifier())
    return any(string == "bn" or (len(string) >= 4 and (string in name or name in string)) for string in likely)


def _named_by(found: Found, module: nn.Module) -> tuple[set[type], set[str]]:
    """Return the classes that a piece of code names, and its strings; those inside tuples and tables, too."""
    function, names = found.function, found.code.names
    scope = {**vars(builtins), **function.__globals__, **_closure(function)}
    values: list[Any] = list(found.code.strings)
    for name in names | {*_closure(function)}:
        if name in scope:
            values += _members(scope[name], names)
        elif hasattr(nn, name):  # imported inside the function
            values.append(getattr(nn, name))
        values.append(inspect.getattr_static(module, name, None))
    classes: set[type] = set()
    strings: set[str] = set()
    while values:
        value = values.pop()
        if isinstance(value, type):
            classes.add(value)
        elif isinstance(value, str):
            strings.add(value)
        elif isinstance(value, (tuple, list, set, frozenset)) and len(value) < 100:
            values += value
        elif isinstance(value, dict) and len(value) < 100:
            values += [*value.keys()]
        elif isinstance(value, UnionType):
            values += typing.get_args(value)
    return {cls for cls in classes if cls not in (object, type, nn.Module)}, strings


def _members(value: Any, names: frozenset[str]) -> list[Any]:
    """Return ``value``, or what the code names of it where it is a Python module: ``nn.BatchNorm2d``."""
    if not isinstance(value, ModuleType):
        return [value]
    inside = [vars(value)[name] for name in names if name in vars(value)]
    nested = [one for one in inside if isinstance(one, ModuleType) and one is not value]
    return [one for one in inside if not isinstance(one, ModuleType)] + [
        vars(one)[name] for one in nested for name in names if name in vars(one)
    ]


def _closure(function: FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return found
