"""Static analysis of bytecode: methods of a model, beside its forward, that look for BatchNorms.

Note [Lookups by class]
``train()`` of a detection backbone freezes every ``_BatchNorm``, ``fuse()`` of a detector reads ``bn.running_var``, a
third method groups parameters by ``isinstance``. Once a norm is replaced such code may pass it by, and no run of the
forward shows it. A method counts where its code, or that of what it names, compares a class with one whose name has
``BatchNorm`` in it, or asks for running statistics. What only ``__init__`` calls does not count: it has run.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from normswap.nn.kinds import class_of
from normswap.norms import norm_of

__all__ = ["class_lookups"]

_STATISTICS = frozenset({"running_mean", "running_var"})
_QUESTIONS = frozenset({"isinstance", "issubclass", "type", "hasattr", "getattr"})
_NAMES_OF_CLASSES = frozenset({"__class__", "__name__", "_get_name"})
_ENDS = ("POP_", "STORE_", "RETURN_", "FOR_ITER", "YIELD_", "JUMP_")
"""Where an expression ends: its value is tested, kept, returned or dropped."""
_MOST_FUNCTIONS = 200


def class_lookups(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return, by the fqn of each module that has such methods, their names: ``Detector.fuse``."""
    found = {}
    for fqn, module in model.named_modules():
        kind = class_of(module)
        if kind.__module__.startswith(("torch.", "normswap.")) or norm_of(module) is not None:
            continue
        if methods := _lookups_of(kind):  # type: ignore[arg-type]
            found[fqn] = tuple(f"{kind.__name__}.{name}" for name in methods)
    return found


@lru_cache(maxsize=1024)
def _lookups_of(cls: Any) -> tuple[str, ...]:
    """Return the methods of a class that look for BatchNorms and are called from outside of it."""
    methods: dict[str, FunctionType] = {}
    for base in cls.__mro__:
        if not base.__module__.startswith(("torch.", "builtins")):
            for name, value in vars(base).items():
                function = getattr(value, "__func__", value)
                if isinstance(function, FunctionType):
                    methods.setdefault(name, function)
    called = {name: _names(method) for name, method in methods.items()}
    # Called by no other method; a method that calls itself goes down the module tree.
    inner = {name for caller, names in called.items() for name in names if name != caller}
    outer = [name for name in methods if name in ("train", "eval") or name not in inner]
    outer = [name for name in outer if name != "forward" and not name.startswith("__")]
    return tuple(name for name in outer if any(_looks(code, scope) for code, scope in _reached(methods, name)))


def _names(function: FunctionType) -> frozenset[str]:
    return frozenset().union(*(code.co_names for code in _with_inner(function.__code__)))


def _reached(methods: dict[str, FunctionType], name: str) -> Iterator[tuple[CodeType, dict[str, Any]]]:
    """Yield the code of a method and of all methods and functions that it names, each with its globals."""
    pending, done = [methods[name]], set[CodeType]()
    while pending and len(done) < _MOST_FUNCTIONS:
        function = pending.pop()
        if function.__code__ in done or (function.__module__ or "").partition(".")[0] == "torch":
            continue
        done.add(function.__code__)
        for code in _with_inner(function.__code__):
            yield code, function.__globals__
        for called in _names(function) - {"forward", "__init__"}:
            other = methods.get(called, function.__globals__.get(called))
            if isinstance(other, FunctionType):
                pending.append(other)


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


def _looks(code: CodeType, scope: dict[str, Any]) -> bool:
    """Tell whether some expression of ``code`` asks for a class of BatchNorms or reads running statistics."""
    asked = False
    for instruction in dis.get_instructions(code):
        operation, value = instruction.opname, instruction.argval
        attribute = operation in ("LOAD_ATTR", "LOAD_METHOD")
        if attribute and value in _STATISTICS:
            return True
        if value in (_NAMES_OF_CLASSES if attribute else _QUESTIONS if operation == "LOAD_GLOBAL" else ()):
            asked = True
        elif operation.startswith(_ENDS):
            asked = False
        elif asked and operation.startswith("LOAD_") and _means_norms(value, scope, operation == "LOAD_CONST"):
            return True
    return False


def _means_norms(value: Any, scope: dict[str, Any], constant: bool) -> bool:
    """Tell whether what is loaded, a constant or what goes by a name, stands for a class of BatchNorms."""
    if constant:
        texts = value if isinstance(value, (tuple, frozenset)) else (value,)
        return any(isinstance(text, str) and ("BatchNorm" in text or text in _STATISTICS) for text in texts)
    if not isinstance(value, str):
        return False
    known = scope.get(value)
    classes = known if isinstance(known, tuple) else (known,)
    return "BatchNorm" in value or any(isinstance(one, type) and "BatchNorm" in one.__name__ for one in classes)
