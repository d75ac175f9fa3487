"""The sizes at which an exported file may be wrong though it is right at those that it was exported and compared at.

Note [What torch took for granted]
torch.export runs the model once. Where Python branches on a size (``if x.shape[0] >= 4``), it follows the branch that
the example takes and notes the condition: as a guard, as a bound of the size (``batch ≤ 3``), or by giving two axes one
symbol (``height = width``). The file has none of these conditions. So for each of them, sizes are looked for that break
it and on which the model itself runs: there the file must compute what the model does, or the axes are not dynamic.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from normswap.deploy.onnx.inputs import axes_of, resized

__all__ = ["Condition", "assumptions", "at_sizes", "breaking", "recorded", "sizes_of"]

Sizes = Mapping[str, int]
"""The size of each dynamic axis by its name."""

LARGEST = 1 << 18
"""How many values the inputs of a comparison may have that the example does not ask for."""

_ATTEMPTS = 4
"""At how many sizes that break a condition the model is tried."""


@dataclass(frozen=True)
class Condition:
    """What torch took for granted of the sizes.

    Args:
        text: The condition, for a person.
        holds: Whether it holds at given sizes.
    """

    text: str
    holds: Callable[[Sizes], bool]


@contextlib.contextmanager
def recorded() -> Iterator[list[torch.export.ExportedProgram]]:
    """Give a list that gets each program that torch.export returns meanwhile: later passes drop what it noted."""
    programs: list[torch.export.ExportedProgram] = []
    export = torch.export.export

    def noted(*args: Any, **kwargs: Any) -> Any:
        programs.append(export(*args, **kwargs))
        return programs[-1]

    with mock.patch.object(torch.export, "export", noted):
        yield programs


def sizes_of(inputs: Any, dims: Any) -> dict[str, int]:
    """Return the size of each dynamic axis by its name, of inputs with those axes."""
    return {name: x.shape[axis] for x, axes in axes_of(inputs, dims) for axis, name in axes.items()}


def at_sizes(inputs: Any, dims: Any, times: Mapping[str, int], sizes: Sizes) -> Any:
    """Return the inputs with other sizes on their dynamic axes: samples as of :func:`resized`, the rest mirrored."""
    if "batch" in sizes:
        inputs = resized(inputs, sizes["batch"], times)
    axes = iter([axes for _, axes in axes_of(inputs, dims)])

    def mirrored(x: Tensor) -> Tensor:
        for axis, name in next(axes).items():
            if name != "batch" and sizes.get(name, x.shape[axis]) != x.shape[axis]:
                n = x.shape[axis]
                places = torch.arange(sizes[name], device=x.device) % (2 * n)
                x = x.index_select(axis, torch.where(places < n, places, 2 * n - 1 - places))
        return x

    return pytree.tree_map_only(Tensor, mirrored, inputs)


def assumptions(program: torch.export.ExportedProgram, inputs: Any, dims: Any) -> list[Condition]:
    """Return what ``program``, the form of the inputs' model, takes for granted of the dynamic axes' sizes.

    What this version of torch does not tell is left out: comparisons at other sizes are made in any case.
    """
    try:
        return _assumptions(program, inputs, dims)
    except Exception:  # torch's records of sizes are no public interface
        return []


def _assumptions(program: torch.export.ExportedProgram, inputs: Any, dims: Any) -> list[Condition]:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    taken = [values[name] for name in program.graph_signature.user_inputs if isinstance(values.get(str(name)), Tensor)]
    symbols: dict[Any, list[str]] = {}
    env: Any = None
    for value, (_, axes) in zip(taken, axes_of(inputs, dims), strict=True):
        for axis, name in axes.items():
            size: Any = value.shape[axis]
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                env = size.node.shape_env
                names = symbols.setdefault(size.node.expr, [])
                names += [name] if name not in names else []
    found = [
        Condition(f"{names[0]} = {other}", lambda sizes, a=names[0], b=other: sizes[a] == sizes[b])  # type: ignore[misc]
        for names in symbols.values()
        for other in names[1:]
    ]
    for symbol, names in symbols.items():
        bounds = program.range_constraints.get(symbol)
        if bounds is not None and bounds.upper.is_Integer:
            found.append(_bound(names[0], int(bounds.upper), above=True))
        if bounds is not None and bounds.lower.is_Integer and bounds.lower > 1:
            found.append(_bound(names[0], int(bounds.lower), above=False))
    by_name = {symbol: names[0] for symbol, names in symbols.items()}
    asserts = [one for several in getattr(env, "deferred_runtime_asserts", {}).values() for one in several]
    guards = [guard.expr for guard in (*getattr(env, "guards", ()), *asserts)]
    return found + [c for expr in guards if (c := _guard(expr, by_name)) is not None]


def _bound(name: str, bound: int, *, above: bool) -> Condition:
    if above:
        return Condition(f"{name} ≤ {bound}", lambda sizes: sizes[name] <= bound)
    return Condition(f"{name} ≥ {bound}", lambda sizes: sizes[name] >= bound)


def _guard(expr: Any, names: Mapping[Any, str]) -> Condition | None:
    """Return a guard as a condition; None where it asks for something else than the dynamic axes' sizes."""
    from torch.utils._sympy.printers import PythonPrinter

    if not expr.free_symbols or not expr.free_symbols <= names.keys():
        return None
    import sympy  # type: ignore[import-untyped]

    plain = {symbol: sympy.Symbol(names[symbol], integer=True) for symbol in expr.free_symbols}
    text = PythonPrinter().doprint(expr.xreplace(plain))
    code = compile(text, "<guard>", "eval")
    return Condition(text, lambda sizes: bool(eval(code, {"math": math, "torch": torch}, dict(sizes))))


def breaking(
    conditions: Sequence[Condition], traced: Sizes, tried: Sequence[Sizes], values: int, runs: Callable[[Sizes], bool]
) -> Iterator[tuple[Sizes, str]]:
    """Yield sizes at which a condition does not hold and the model runs, with the condition's text.

    Args:
        conditions: What torch took for granted.
        traced: The sizes of the export.
        tried: Sizes at which the file is compared already: what does not hold there needs no others.
        values: How many values the inputs have at the traced sizes.
        runs: Whether the model runs at given sizes.
    """
    limit = max(LARGEST, 4 * values)
    done, failed = list(tried), list[Sizes]()
    for condition in conditions:
        if any(not condition.holds(sizes) for sizes in done):
            continue
        for attempt, sizes in enumerate(_breaking(condition, traced, limit // max(values, 1))):
            if attempt == _ATTEMPTS:
                break
            if sizes not in failed and runs(sizes):
                done.append(sizes)
                yield sizes, condition.text
                break
            failed.append(sizes)


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
