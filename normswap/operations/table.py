"""The table of operations: a row for each, and which row a call, a module or an overload of ATen belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from normswap.operations.activations import ACTIVATIONS
from normswap.operations.operation import Operation
from normswap.operations.structure import STRUCTURE

__all__ = [
    "TABLE",
    "Table",
    "called_by",
    "lifted_from",
    "named",
    "of_call",
    "of_module",
    "reads_no_value",
    "value_free_names",
    "written_by",
]


class Table:
    """Rows, and where each is found.

    Args:
        rows: The operations; no two may claim the same name, function, method or class.
    """

    def __init__(self, rows: Iterable[Operation]) -> None:
        self.rows = tuple(rows)
        self.by_name = _index(self.rows, lambda row: (row.name,))
        self.by_function = _index(self.rows, lambda row: row.functions)
        self.by_method = _index(self.rows, lambda row: row.methods)
        self.by_attribute = _index(self.rows, lambda row: row.attributes)
        self.by_module = _index(self.rows, lambda row: row.modules)


def _index(rows: Iterable[Operation], keys: Callable[[Operation], Iterable[Any]]) -> Mapping[Any, Operation]:
    found: dict[Any, Operation] = {}
    for row in rows:
        for key in dict.fromkeys(keys(row)):  # torch.special.expit may be torch.sigmoid under a second name
            if key in found:
                raise ValueError(f"{key} belongs to two operations, {found[key].name!r} and {row.name!r}")
            found[key] = row
    return found


TABLE = Table((*ACTIVATIONS, *STRUCTURE))
"""All operations that normswap knows. To add one, add its row."""


def of_call(node: fx.Node, target: Any = None) -> Operation | None:
    """Return the operation that ``node`` calls as a function or method, None where it is not known.

    Args:
        node: A node of a graph.
        target: What it is taken to call, where that is not its own target.
    """
    table = TABLE.by_function if node.op == "call_function" else TABLE.by_method
    return table.get(target or node.target) if node.op in ("call_function", "call_method") else None


def of_module(module: nn.Module, *, inherited: bool = False) -> Operation | None:
    """Return the operation that ``module`` computes by its class, None where it is not known.

    Args:
        module: The module.
        inherited: Ask the classes that its class is derived from, too. What a derived class computes is its own
            matter; it is taken to keep the number of axes that its base class leaves.
    """
    classes = type(module).__mro__ if inherited else (type(module),)
    return next((TABLE.by_module[cls] for cls in classes if cls in TABLE.by_module), None)


def named(name: str) -> Operation:
    """Return the operation called ``name``."""
    return TABLE.by_name[name]


def called_by(operation: Operation) -> frozenset[Any]:
    """Return what a ``TorchFunctionMode`` sees where ``operation`` is called: functions, and the methods themselves."""
    return frozenset((*operation.functions, *(getattr(Tensor, name) for name in operation.methods)))


def written_by(operation: Operation) -> frozenset[Any]:
    """Return the methods among :func:`called_by` that write their result to the tensor that they are called on.

    torch's names for such end in one underscore, Python's begin with ``__i``.
    """
    names = (name for name in operation.methods if (name[-1] == "_" != name[-2]) or name.startswith("__i"))
    return frozenset(getattr(Tensor, name) for name in names)


def lifted_from(*operations: Operation) -> frozenset[Any]:
    """Return the overloads of ATen that stand for ``operations`` in an exported program."""
    return frozenset(overload for row in operations for overload in row.lifted_from)


def reads_no_value(node: fx.Node) -> bool:
    """Tell whether ``node`` asks for a tensor's form, and so tells nothing of its values."""
    if node.target is getattr:
        return node.args[1] in TABLE.by_attribute
    operation = of_call(node)
    return operation is not None and operation.value_free


def value_free_names() -> frozenset[str]:
    """Return the names of the methods and attributes of tensors that tell nothing of values."""
    methods = (name for row in TABLE.rows if row.value_free for name in row.methods)
    return frozenset((*methods, *TABLE.by_attribute))
