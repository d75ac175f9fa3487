"""The bytecode of a forward and of what it calls: the attributes that it reads, the names that it has, what it asks."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import fx, nn

from normswap.graph.branches import left_out
from normswap.graph.ops import is_leaf
from normswap.nn.kinds import class_of

__all__ = [
    "NORM_ATTRIBUTES",
    "STATISTICS",
    "Code",
    "Found",
    "Operand",
    "codes_of",
    "has_code",
    "is_named",
    "names_in_code",
]

STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
NORM_ATTRIBUTES = STATISTICS | {"weight", "bias", "num_features", "eps", "momentum", "affine", "track_running_stats"}
_ATTRIBUTES = NORM_ATTRIBUTES | {"_buffers", "_parameters"}
_WALKS = frozenset({"modules", "children", "named_modules", "named_children", "get_submodule", "_modules"})
_ASKING = frozenset({"isinstance", "issubclass", "type", "hasattr", "getattr"})
_ASKED = frozenset({"__class__", "_get_name"})
_MOST_FUNCTIONS = 200
"""How many functions of one forward are looked into: a bound against a library that calls all of itself."""
_NOTHING = frozenset({"CACHE", "NOP", "EXTENDED_ARG", "PRECALL", "PUSH_NULL", "RESUME"})
Operand = tuple[tuple[str, ...], bool]
"""A value as a path of attributes, and whether that starts at the function's first argument."""


@dataclass(frozen=True)
class Read:
    """``base.path[0].path[1]….name``, where ``base`` is the function's first argument or anything else."""

    name: str
    path: tuple[str, ...]
    of_first: bool


@dataclass(frozen=True)
class Code:
    """What a function reads, which attributes and globals it names, and what it holds as a string.

    ``values`` are the names of attributes that it does not just call: ``self.parts[0]``, ``for part in self.parts``.
    ``questions`` are what it asks of which value: ``isinstance``, ``type``, ``__class__``, ``hasattr`` and the like.
    """

    reads: tuple[Read, ...]
    names: frozenset[str]
    strings: frozenset[str]
    values: frozenset[str]
    questions: tuple[tuple[str, frozenset[Operand]], ...]


@dataclass(frozen=True)
class Found:
    """A piece of code, whether its first argument is the module, and the function that it is in."""

    code: Code
    is_method: bool
    function: FunctionType


def has_code(module: nn.Module) -> bool:
    """Tell whether ``module``'s code is a user's, and not torch's or a graph's."""
    of_torch = class_of(module).__module__.startswith("torch.")
    return not (of_torch or is_leaf(module) or isinstance(module, fx.GraphModule))


def names_in_code(module: nn.Module) -> tuple[frozenset[str], frozenset[str]]:
    """Return the attributes and globals that ``module``'s forward names, and those that it does not just call."""
    codes = [found.code for found in codes_of(module)]
    return frozenset().union(*(code.names for code in codes)), frozenset().union(*(code.values for code in codes))


def is_named(module: nn.Module, path: str, names: frozenset[str]) -> bool:
    """Tell whether code inside ``module`` that has these names can name ``path``; places in containers have no name."""
    holder = module
    for part in path.split("."):
        containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential, fx.GraphModule)
        free = isinstance(holder, containers) or part.isdigit()
        if not (free or part in names or names & _WALKS):
            return False
        holder = holder.get_submodule(part)
    return True


def codes_of(module: nn.Module, called: frozenset[str] = frozenset()) -> Iterator[Found]:
    """Yield the code of a forward and of what it names.

    ``called`` are names that others call: a method of ``module`` with such a name counts, too.
    """
    pending: list[tuple[Any, bool]] = [(vars(module).get("forward"), True)]
    for name in ("forward", *called):
        pending += _members(type(module), name)
    done: set[CodeType] = set()
    while pending and len(done) < _MOST_FUNCTIONS:
        function, is_method = pending.pop()
        if isinstance(function, MethodType):
            is_method, function = function.__self__ is module, function.__func__
        if isinstance(function, property):
            function = function.fget
        if isinstance(function, (cached_property, partial)):
            function = function.func
        if not isinstance(function, FunctionType):
            continue
        if (inner := inspect.unwrap(function)) is not function:  # what a decorator wraps
            pending.append((inner, is_method))
        if function.__code__ in done or (function.__module__ or "").partition(".")[0] == "torch":
            continue
        done.add(function.__code__)
        for code in _with_inner(function.__code__):
            own = is_method and code is function.__code__
            read = _read(code, _flags(module, code) if own else frozenset())
            yield Found(read, own, function)
            for name in read.names:
                pending += _members(type(module), name)
                pending += [(other, False) for other in _functions(function, name, read.names)]
        for cell in function.__closure__ or ():
            try:
                pending.append((cell.cell_contents, False))
            except ValueError:  # not filled yet
                continue


def _functions(function: FunctionType, name: str, names: frozenset[str]) -> list[FunctionType]:
    """Return the function that is ``name`` to ``function``, or those that it names of a module called ``name``."""
    found = function.__globals__.get(name)
    of_torch = getattr(found, "__name__", "torch").partition(".")[0] == "torch"
    inside = [vars(found).get(one) for one in names] if isinstance(found, ModuleType) and not of_torch else [found]
    return [one for one in inside if isinstance(one, FunctionType)]


def _members(cls: type, name: str) -> list[tuple[Any, bool]]:
    """Return the methods and properties called ``name`` of ``cls`` and its bases, which ``super()`` reaches.

    But ``__init__``: it has run, whatever else is made while the forward runs.
    """
    if name == "__init__":
        return []
    tables = (vars(base) for base in cls.__mro__ if not base.__module__.startswith(("torch.", "builtins")))
    found = [table[name] for table in tables if name in table]
    return [(getattr(one, "__func__", one), not isinstance(one, staticmethod)) for one in found]


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    """Yield ``code`` and that of the lambdas, comprehensions and functions inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


_UNKNOWN: frozenset[Operand] = frozenset({((), False)})


def _flags(module: nn.Module, code: CodeType) -> frozenset[tuple[str, bool]]:
    """Return the flags of ``module`` that ``code`` names; that of its mode may have either value."""
    named = ((name, vars(module).get(name)) for name in code.co_names if name != "training")
    return frozenset((name, value) for name, value in named if isinstance(value, bool))


@lru_cache(maxsize=4096)
def _read(code: CodeType, flags: frozenset[tuple[str, bool]]) -> Code:
    """Return what ``code`` reads, but for what the flags of its first argument leave out."""
    names, steps = frozenset(code.co_names), [s for s in dis.get_instructions(code) if s.opname not in _NOTHING]
    strings = frozenset(c for c in code.co_consts if isinstance(c, str))
    loads = (step for step in steps if step.opname == "LOAD_ATTR")
    values = frozenset(step.argval for step in loads if not step.argrepr.startswith("NULL"))
    first = code.co_varnames[0] if code.co_argcount else None
    held: dict[str, set[Operand]] = {}  # what a variable may be
    reads: list[Read] = []
    questions: list[tuple[str, frozenset[Operand]]] = []
    asking: str | None = None  # what is asked of the value that is being loaded
    top = _UNKNOWN  # what the value on top of the stack may be
    loaded_it = False
    skipped = left_out(code, dict(flags))
    for step in steps:
        if step.offset in skipped:
            continue
        operation, value = step.opname, step.argval
        if operation in ("LOAD_ATTR", "LOAD_METHOD"):
            if value in _ATTRIBUTES:
                reads += [Read(value, path, of_first) for path, of_first in top]
            if value in _ASKED:
                questions.append((value, top))
            top = frozenset(((*path, value), of_first) for path, of_first in top)
            continue
        if asking and loaded_it:
            questions.append((asking, top))
            asking = None
        loaded_it = asking is not None
        # Newer interpreters store and load two variables at once.
        variables = value if isinstance(value, tuple) else (value,)
        if operation.startswith("STORE_FAST"):
            held.setdefault(variables[0], set()).update(top)
        loaded = variables[-1] if "LOAD_FAST" in operation else None
        if loaded == first and first is not None and first not in held:
            top = frozenset({((), True)})
        else:
            top = frozenset(held.get(loaded, _UNKNOWN)) if isinstance(loaded, str) else _UNKNOWN
        if operation in ("LOAD_GLOBAL", "LOAD_NAME") and value in _ASKING:
            asking, loaded_it = value, False
        if operation == "MATCH_CLASS":
            questions.append(("isinstance", _UNKNOWN))
    return Code(tuple(reads), names, strings, values, tuple(questions))
