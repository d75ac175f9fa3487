"""The sizes at which an exported file may be wrong though it is right at those that it was exported and compared at.

Note [What torch took for granted]
torch.export runs the model once. Where Python branches on a size (``if x.shape[0] >= 4``), it follows the branch that
the example takes and notes the condition: as a guard, as a bound of the size (``batch ≤ 3``), or by giving two axes one
symbol (``height = width``). The file has none of these conditions. So for each of them, sizes are looked for that break
it and on which the model itself runs: there the file must compute what the model does, or the axes are not dynamic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from normswap.deploy.onnx.inputs import axes_of, resized
from normswap.runs.sizes import Condition, Sizes, as_condition

__all__ = ["assumptions", "at_sizes", "recorded", "sizes_of"]


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
    return found + [c for expr in guards if (c := as_condition(expr, by_name)) is not None]


def _bound(name: str, bound: int, *, above: bool) -> Condition:
    if above:
        return Condition(f"{name} ≤ {bound}", lambda sizes: sizes[name] <= bound)
    return Condition(f"{name} ≥ {bound}", lambda sizes: sizes[name] >= bound)
