"""The one comparator: do two networks, or a network and its ONNX file, compute the same?

# Note [What counts as equal]
An output ``b`` equals the reference ``a`` if ``max |a − b| ≤ rtol · max |a| + atol``, the maxima over the
whole output: rounding errors scale with what was summed, not with the one value that is left of it. By
default atol is 0 and rtol comes from ``TOLERANCES``, by the coarser dtype of the two. A NaN is never equal,
not even to a NaN in the same place: two broken networks prove nothing. Infinities must agree in place and
sign (masks are made of them). Integers and booleans must be identical. A comparison of no outputs has failed, and so
has one of outputs without a value that could differ. A detector that finds nothing returns empty boxes, a network that
overflows infinities, and one whose last activation is never reached zeros, whatever their weights are: at least one
output must hold a floating point value that is finite and not 0, or an integer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from normswap.checks.onnx_file import OnnxFile
from normswap.checks.verification import OutputRow, Verification
from normswap.errors import InputError, argument, first_line
from normswap.runs.arguments import Named, as_arguments, dtype_name, named_leaves
from normswap.runs.guard import untouched
from normswap.runs.modes import training_modules

__all__ = ["TOLERANCES", "verify"]

Comparable: TypeAlias = nn.Module | Callable[..., Any] | str | Path
Runner: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], Named]

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The largest allowed difference of two outputs, relative to the output's largest value."""


def verify(
    a: Comparable, b: Comparable, inputs: Any, *, rtol: float | None = None, atol: float | None = None
) -> Verification:
    """Run ``a`` and ``b`` on the same inputs and compare all outputs, see Note [What counts as equal].

    Both start from the same random state and get their own copy of the inputs; modules must be in eval mode.
    The modules and the global random state are left as they were. Outputs may be nested in dicts, sequences
    and dataclasses; None is passed over. They are paired by name where both have the same names; those of an
    ONNX file otherwise by position.

    Args:
        a: The reference: a module, a callable, or the path of an ``.onnx`` file (run by onnxruntime, on CPU).
        b: What is compared with it.
        inputs: A tensor, a tuple or list of positional inputs, or a dict of keyword inputs; arrays, too.
        rtol: Allowed difference relative to the output's magnitude; by default ``TOLERANCES``.
        atol: Allowed absolute difference on top of it.

    Returns:
        The record; outputs of a different number, name or shape make it a failed one.

    Raises:
        InputError: A module is in train mode, a file cannot be read, or the inputs do not fit.
    """
    tolerances: dict[str, Any] = {"rtol": rtol, "atol": atol}
    for name, value in tolerances.items():
        number = isinstance(value, Real) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= float(value) < math.inf):  # all would be equal within infinity
            raise InputError(
                f"{argument(name)} must be a finite number ≥ 0, got {value!r}",
                code="option-type",
                hint="without it the tolerance goes by the outputs' dtype",
            )
    args, kwargs = as_arguments(inputs)
    runners = [_runner(a, "a"), _runner(b, "b")]
    outputs = []
    for name, run in runners:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                outputs.append(run(*pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))))
            except InputError:
                raise
            except Exception as cause:
                raise InputError(
                    f"{name} failed on the given inputs: {type(cause).__name__}: {first_line(cause)}",
                    code="verify-forward",
                    hint="give the inputs as forward takes them: a tensor, a tuple, or a dict of keywords",
                ) from cause
    names = runners[0][0], runners[1][0]
    if not outputs[0] and not outputs[1]:
        return Verification(*names, rows=(), reason="neither returned anything to compare")
    by_position = isinstance(a, str | Path) or isinstance(b, str | Path)
    pairs = _paired(outputs[0], outputs[1], by_position=by_position)
    if isinstance(pairs, str):
        return Verification(*names, rows=(), reason=pairs)
    rows = tuple(_compare(name, x, y, rtol, atol) for name, x, y in pairs)
    return Verification(*names, rows, reason=_proves_nothing(rows))


def _proves_nothing(rows: tuple[OutputRow, ...]) -> str:
    """Return why outputs that are all equal hold nothing that was compared; empty where they hold something."""
    if all(row.ok and 0 in row.shape for row in rows):
        return "all outputs are empty: nothing was compared"
    if all(row.ok and (0 in row.shape or (row.scale == 0 and not _counts(row.dtype))) for row in rows):
        return "all outputs are zero or infinite: nothing was compared"
    return ""


def _counts(dtype: str) -> bool:
    """Whether 0 is a value like any other: the number of a class is."""
    return not any(kind in dtype for kind in ("float", "complex"))


def _runner(thing: Comparable, role: str) -> tuple[str, Runner]:
    """Return the name of a module, callable or file and the function that runs it."""
    if isinstance(thing, str | Path):
        return Path(thing).name, OnnxFile(Path(thing))
    if not callable(thing):
        raise InputError(
            f"{role} is a {type(thing).__name__}, which cannot be run",
            code="verify-argument",
            hint="give a module, a callable, or the path of an .onnx file",
        )
    if not isinstance(thing, nn.Module):
        return getattr(thing, "__name__", type(thing).__name__), lambda args, kwargs: named_leaves(
            thing(*args, **kwargs)
        )
    name = type(thing).__name__
    if training := training_modules(thing):
        raise InputError(
            f"{name} is in train mode ({training[0]!r} and {len(training) - 1} more modules), "
            "where the output depends on chance and on the other samples",
            code="verify-train-mode",
            hint="call model.eval() before verify()",
        )
    device = next((t.device for t in (*thing.parameters(), *thing.buffers())), torch.device("cpu"))

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Named:
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))
        with untouched(thing):  # an output may be a tensor that the model holds, and is put back
            return [(name, _own(leaf)) for name, leaf in named_leaves(thing(*args, **kwargs))]

    return name, run


def _own(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _paired(a: Named, b: Named, *, by_position: bool) -> list[tuple[str, Any, Any]] | str:
    """Return (name, a, b) per output, or why the outputs cannot be paired."""
    names_a, names_b = [name for name, _ in a], [name for name, _ in b]
    if sorted(names_a) == sorted(names_b) and len(set(names_a)) == len(names_a):
        return [(name, x, dict(b)[name]) for name, x in a]
    if by_position and len(a) == len(b):
        return [(name, x, y) for (name, x), (_, y) in zip(a, b, strict=True)]
    return f"a returns {len(a)} outputs ({', '.join(names_a)}), b {len(b)} ({', '.join(names_b)})"


def _compare(name: str, a: Any, b: Any, rtol: float | None, atol: float | None) -> OutputRow:
    """Return how far ``b`` is from ``a``, see Note [What counts as equal]."""
    x, y = _as_tensor(a), _as_tensor(b)
    if isinstance(x, str) or isinstance(y, str):
        both = [t if isinstance(t, str) else type(v).__name__ for t, v in ((x, a), (y, b))]
        kinds = " and ".join(both)
        return _incomparable(name, (), kinds, f"cannot be compared: {kinds}")
    shape, dtypes = tuple(x.shape), dtype_name(x) if x.dtype == y.dtype else f"{dtype_name(x)}/{dtype_name(y)}"
    if x.shape != y.shape:
        return _incomparable(name, shape, dtypes, f"has shape {list(x.shape)} in a, {list(y.shape)} in b")
    if x.is_complex() and y.is_complex():
        x, y = torch.view_as_real(x), torch.view_as_real(y)
    tolerances = _tolerance(x.dtype), _tolerance(y.dtype)
    x, y = (t.float() if t.is_floating_point() and t.itemsize == 1 else t for t in (x, y))  # float8 has few operations
    if not (x.is_floating_point() and y.is_floating_point()):
        if x.dtype != y.dtype:
            return _incomparable(name, shape, dtypes, f"is {dtype_name(x)} in a, {dtype_name(y)} in b")
        tolerance = allowed = tiny = 0.0
    else:
        if nans := sum(int(t.isnan().sum()) for t in (x, y)):
            return _incomparable(name, shape, dtypes, f"holds NaN ({nans} in a and b together)")
        infinite = x.isinf() | y.isinf()
        if not torch.equal(x[infinite].double(), y[infinite].double()):
            return _incomparable(name, shape, dtypes, "is infinite in different places")
        tolerance = max(tolerances) if rtol is None else rtol
        allowed, tiny = atol or 0.0, torch.finfo(x.dtype).tiny
        x, y = x[~infinite], y[~infinite]
    different = int((x != y).sum())
    x, y = x.double(), y.double()
    max_abs, scale = (float(t.abs().max()) if t.numel() else 0.0 for t in (x - y, x))
    max_rel = max_abs / scale if scale else (math.inf if max_abs else 0.0)
    ok = max_abs <= tolerance * max(scale, tiny) + allowed and (tolerance + allowed > 0 or not different)
    reason = ""
    if not ok and tolerance + allowed == 0:
        reason = f"differs in {different} of {x.numel()} values, which must be identical"
    elif not ok:
        reason = f"differs by {max_abs:.1e}, {max_rel:.1e} of its magnitude (allowed {tolerance:.0e}"
        reason += f" + {allowed:.0e} absolute)" if allowed else ")"
    return OutputRow(name, shape, dtypes, max_abs, scale, max_rel, tolerance, ok, reason)


def _incomparable(name: str, shape: tuple[int, ...], dtype: str, reason: str) -> OutputRow:
    return OutputRow(name, shape, dtype, math.inf, math.nan, math.inf, 0.0, ok=False, reason=reason)


def _as_tensor(value: Any) -> Tensor | str:
    """Return a plain tensor on the CPU, or what the value is where it is none and cannot be made one."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return "a tensor on the meta device, without values"
        if value.is_nested:
            return "a nested tensor (return its parts: .unbind())"
        plain = value.detach().cpu()
        plain = plain.dequantize() if plain.is_quantized else plain
        plain = plain if plain.layout is torch.strided else plain.to_dense()
        return plain.resolve_conj().resolve_neg()
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    try:
        return torch.from_numpy(np.array(value))
    except TypeError:  # strings, objects
        return type(value).__name__


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])  # what is left are the 8-bit floats
