"""How many axes a norm's input has, as far as the graph shows it.

Note [Ranks]
A BatchNorm1d takes (N, C) and (N, C, L), a Linear (…, C): whether the channels of a Linear are those of the norm
depends on the rank of the value between them. The graph often tells it: what gives the value (a flatten, a convolution
upstream) leaves so many axes; or what gives or takes it moves axes, as ``transpose(1, 2)`` does, which no value of two
axes has. Where the graph does not tell and no example input was given, the rank is unknown and nothing is absorbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import fx, nn

from normswap.graph.ops import is_functional_norm, norm_argument, order_of
from normswap.operations.operation import Operation
from normswap.operations.table import of_call, of_module

__all__ = ["input_of", "only_rank", "rank_of"]

ModuleOf = Callable[[fx.Node], nn.Module | None]
_MOST_STEPS = 1000
"""A bound against a malformed graph."""


def input_of(node: fx.Node) -> Any:
    """Return what ``node`` is called on: its first argument."""
    if is_functional_norm(node):
        return norm_argument(node, "input")
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def rank_of(node: fx.Node, module_of: ModuleOf) -> int | None:
    """Return the number of axes of ``node``'s value where what gives it shows it, else None (Note [Ranks]).

    ``module_of`` gives the module that a ``call_module`` node calls.
    """
    for _ in range(_MOST_STEPS):  # walk towards the inputs
        source = input_of(node)
        module, operation = module_of(node), _operation(node, module_of)
        if operation is None:
            return None
        if isinstance(operation.axes, int):
            return operation.axes
        if callable(operation.axes):
            bound = operation.bind(node.args, node.kwargs)
            arguments = bound if module is None else operation.bind_module(module, source)
            return None if arguments is None else operation.axes(arguments)
        if not operation.keeps_axes or not isinstance(source, fx.Node):
            return None
        node = source
    return None


def only_rank(norm: fx.Node, able: Sequence[int], module_of: ModuleOf) -> int | None:
    """Return the one of ``able`` that the input of a call of a norm may have, by the axes that are moved around it.

    Args:
        norm: The call.
        able: The numbers of axes that the norm takes.
        module_of: Gives the module that a ``call_module`` node calls.
    """
    moves = [*_moves_before(norm, module_of), *_moves_behind(norm, module_of)]
    left = [rank for rank in able if all(order_of(node, None, rank) is not None for node in moves)]
    return left[0] if moves and len(left) == 1 else None


def _moves_before(node: fx.Node, module_of: ModuleOf) -> Iterator[fx.Node]:
    """Yield the calls that move axes on the way to ``node``'s input, which has as many axes as their values."""
    for _ in range(_MOST_STEPS):
        source = input_of(node)
        operation = _operation(source, module_of) if isinstance(source, fx.Node) else None
        if operation is None or not (operation.keeps_axes or operation.order is not None):
            return
        node = source
        if operation.order is not None:
            yield node


def _moves_behind(norm: fx.Node, module_of: ModuleOf) -> Iterator[fx.Node]:
    """Yield the calls that move axes of the norm's output, or of a value that has as many axes and follows from it."""
    pending, seen = [norm], set[fx.Node]()
    while pending:
        node = pending.pop()
        for user in node.users:
            operation = _operation(user, module_of)
            if user in seen or operation is None or input_of(user) is not node:
                continue
            seen.add(user)
            if operation.order is not None:
                yield user
            if operation.keeps_axes or operation.order is not None:
                pending.append(user)


def _operation(node: fx.Node, module_of: ModuleOf) -> Operation | None:
    module = module_of(node)
    return of_call(node) if module is None else of_module(module, inherited=True)
