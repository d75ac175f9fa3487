"""Static analysis of bytecode: reads of a norm's attributes that no graph and no record of a run shows.

Note [Reads in the code]
A norm's tensors and numbers are gone once it is replaced, so a forward that reads ``self.bn.running_mean`` itself would
fail. A trace shows such a read where the tensor is computed with; it shows none of ``self.bn.num_features`` or
``self.bn.weight.dtype``, none behind a branch, and nothing at all of a forward that cannot be traced. The bytecode of
the forward, of the methods that it names and of the functions that it names holds them all. ``self.a.bn.running_mean``
names its norm, as does ``bn = self.a.bn``. In ``self.bns[0].running_mean`` the code does not tell which norm is read:
in a forward that cannot be traced this counts for each norm below that the code can name, unless the record of a run
shows which.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import fx, nn

from normswap.errors import Text, argument
from normswap.graph.ops import is_leaf
from normswap.graph.records import Capture
from normswap.nn.kinds import class_of
from normswap.norms import is_convertible

__all__ = ["has_code", "names_in_code", "reads_in_code"]

_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
_TENSORS = _STATISTICS | {"weight", "bias"}
_ATTRIBUTES = _TENSORS | {"num_features", "eps", "momentum", "affine", "track_running_stats", "_buffers", "_parameters"}
_WALKS = frozenset({"modules", "children", "named_modules", "named_children", "get_submodule", "_modules"})
_MOST_FUNCTIONS = 200
"""How many functions of one forward are looked into: a bound against a library that calls all of itself."""


@dataclass(frozen=True)
class _Read:
    """``base.path[0].path[1]….name``, where ``base`` is the function's first argument or anything else."""

    name: str
    path: tuple[str, ...]
    of_first: bool


@dataclass(frozen=True)
class _Code:
    """What a function reads, which attributes and globals it names, and what it holds as a string.

    ``values`` are the names of attributes that it does not just call: ``self.parts[0]``, ``for part in self.parts``.
    """

    reads: tuple[_Read, ...]
    names: frozenset[str]
    strings: frozenset[str]
    values: frozenset[str]


def reads_in_code(capture: Capture) -> dict[str, str]:
    """Return the norms whose attributes some forward reads, or may read, by fqn, each with the reason."""
    below: dict[str, list[tuple[str, str]]] = {}  # by a module's fqn: the path to each norm inside, and its first fqn
    for name, first in capture.aliases.items():
        if is_convertible(capture.modules[first]):
            parent = name
            while parent:
                parent = parent.rpartition(".")[0]
                below.setdefault(capture.aliases[parent], []).append((name[len(parent) :].lstrip("."), first))
    recorded = any(trace.recorded for trace in capture.traces)
    owners = [fqn for fqn in below if has_code(capture.modules[fqn])]
    called = frozenset().union(*(code.names for fqn in owners for code, _ in _codes(capture.modules[fqn])))
    found: dict[str, str] = {}
    for fqn in owners:
        module, norms = capture.modules[fqn], below[fqn]
        opaque = fqn in capture.opaque or any(capture.aliases[name] == fqn for name in capture.opaque)
        for norm, why in _reads_of(module, norms, called, guess=opaque and not recorded):
            found.setdefault(norm, why)
    return found


def has_code(module: nn.Module) -> bool:
    """Tell whether ``module``'s code is a user's, and not torch's or a graph's."""
    of_torch = class_of(module).__module__.startswith("torch.")
    return not (of_torch or is_leaf(module) or isinstance(module, fx.GraphModule))


def names_in_code(module: nn.Module) -> tuple[frozenset[str], frozenset[str]]:
    """Return the attributes and globals that ``module``'s forward names, and those that it does not just call."""
    codes = [code for code, _ in _codes(module)]
    return frozenset().union(*(code.names for code in codes)), frozenset().union(*(code.values for code in codes))


def _reads_of(
    module: nn.Module, norms: list[tuple[str, str]], called: frozenset[str], *, guess: bool
) -> Iterator[tuple[str, str]]:
    whose = f"the forward of {class_of(module).__name__}"
    codes = list(_codes(module, called))
    for code, is_method in codes:
        for read in code.reads:
            if read.path:
                dotted = ".".join(read.path)
                exact = read.of_first and is_method
                for path, norm in norms:
                    if path == dotted or (not exact and f".{path}".endswith(f".{dotted}")):
                        yield norm, f"{whose} reads its {read.name}, which a new norm does not have"
    if not guess:
        return
    names = frozenset().union(*(code.names for code, _ in codes))
    unknown = {r.name for c, is_method in codes for r in c.reads if not r.path and not (r.of_first and is_method)}
    unknown |= {string for code, _ in codes for string in code.strings}
    if seen := sorted(unknown & _TENSORS, reverse=True):
        for path, norm in norms:
            if names & _WALKS or all(part.isdigit() or part in names for part in path.split(".")):
                why = f"{whose} cannot be traced and reads the {seen[0]} of a module, which may be this one"
                yield norm, Text(f"{why}: give {argument('example_inputs')}, which show which one it is")


def _codes(module: nn.Module, called: frozenset[str] = frozenset()) -> Iterator[tuple[_Code, bool]]:
    """Yield the code of a forward and of what it names, each with whether its first argument is ``module``.

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
            read = _read(code)
            yield read, is_method and code is function.__code__
            for name in read.names:
                members = _members(type(module), name)
                pending += members
                if not members and isinstance(other := function.__globals__.get(name), FunctionType):
                    pending.append((other, False))
        for cell in function.__closure__ or ():
            try:
                pending.append((cell.cell_contents, False))
            except ValueError:  # not filled yet
                continue


def _members(cls: type, name: str) -> list[tuple[Any, bool]]:
    """Return the methods and properties called ``name`` of ``cls`` and its bases, which ``super()`` reaches."""
    tables = (vars(base) for base in cls.__mro__ if not base.__module__.startswith(("torch.", "builtins")))
    found = [table[name] for table in tables if name in table]
    return [(getattr(one, "__func__", one), not isinstance(one, staticmethod)) for one in found]


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    """Yield ``code`` and that of the lambdas, comprehensions and functions inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


_UNKNOWN: frozenset[tuple[tuple[str, ...], bool]] = frozenset({((), False)})


@lru_cache(maxsize=4096)
def _read(code: CodeType) -> _Code:
    loads = (step for step in dis.get_instructions(code) if step.opname == "LOAD_ATTR")
    values = frozenset(step.argval for step in loads if not step.argrepr.startswith("NULL"))
    if not _ATTRIBUTES & {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}:
        return _Code((), frozenset(code.co_names), frozenset(), values)
    first = code.co_varnames[0] if code.co_argcount else None
    held: dict[str, set[tuple[tuple[str, ...], bool]]] = {}  # what a variable may be: a path, and whether of the first
    reads: list[_Read] = []
    top = _UNKNOWN  # what the value on top of the stack may be
    for instruction in dis.get_instructions(code):
        operation, value = instruction.opname, instruction.argval
        if operation in ("LOAD_ATTR", "LOAD_METHOD"):
            if value in _ATTRIBUTES:
                reads += [_Read(value, path, of_first) for path, of_first in top]
            top = frozenset(((*path, value), of_first) for path, of_first in top)
        elif operation not in ("CACHE", "NOP", "EXTENDED_ARG"):
            # Newer interpreters store and load two variables at once.
            variables = value if isinstance(value, tuple) else (value,)
            if operation.startswith("STORE_FAST"):
                held.setdefault(variables[0], set()).update(top)
            loaded = variables[-1] if "LOAD_FAST" in operation else None
            if loaded == first and first is not None and first not in held:
                top = frozenset({((), True)})
            else:
                top = frozenset(held.get(loaded, _UNKNOWN)) if isinstance(loaded, str) else _UNKNOWN
    strings = frozenset(c for c in code.co_consts if isinstance(c, str))
    return _Code(tuple(reads), frozenset(code.co_names), strings & _STATISTICS, values)
