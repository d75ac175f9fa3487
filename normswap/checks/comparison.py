"""The one comparator: do two networks, or a network and its ONNX file, compute the same?

# Note [What counts as equal]
An output ``b`` equals the reference ``a`` if ``max |a − b| ≤ rtol · max |a| + atol``, the maxima over the
whole output: rounding errors scale with what was summed, not with the one value that is left of it. By
default atol is 0 and rtol comes from ``TOLERANCES``, by the coarser dtype of the two. A NaN is never equal,
not even to a NaN in the same place: two broken networks prove nothing. Infinities must agree in place and
sign (masks are made of them). Integers and booleans must be identical. A comparison of no outputs has failed, and so
has one of outputs without a value: a detector that finds nothing returns empty boxes, whatever its weights are.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from normswap.errors import InputError, VerificationError, first_line
from normswap.records import text_table

__all__ = [
    "TOLERANCES",
    "OnnxFile",
    "OutputRow",
    "Verification",
    "as_arguments",
    "named_leaves",
    "training_modules",
    "verify",
]

Comparable: TypeAlias = nn.Module | Callable[..., Any] | str | Path
Named: TypeAlias = list[tuple[str, Any]]
Runner: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], Named]

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The largest allowed difference of two outputs, relative to the output's largest value."""

ONNX_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


@dataclass(frozen=True)
class OutputRow:
    """How far one output of ``b`` is from the same output of ``a``.

    Args:
        name: Where the output stands in what the network returns.
        shape: Its shape in ``a``.
        dtype: Its dtype; both, as ``a/b``, where they differ.
        max_abs: ``max |a − b|``; infinite where the two cannot be compared.
        scale: ``max |a|`` over the finite values.
        max_rel: ``max_abs / scale``.
        tolerance: The ``rtol`` that was applied; 0 where the output must be identical.
        ok: Whether the two are equal, see Note [What counts as equal].
        reason: Why they are not; empty where they are.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    max_abs: float
    scale: float
    max_rel: float
    tolerance: float
    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class Verification:
    """What a comparison found, output by output; prints as a table.

    Args:
        a: The name of the reference.
        b: The name of what was compared with it.
        rows: One row per output.
        reason: Why the outputs could not be paired at all; empty where they could.
    """

    a: str
    b: str
    rows: tuple[OutputRow, ...]
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether there are outputs and all of them are equal."""
        return not self.reason and bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def max_abs(self) -> float:
        """The largest absolute difference; infinite where the outputs could not be compared."""
        return max((row.max_abs for row in self.rows), default=math.inf)

    @property
    def max_rel(self) -> float:
        """The largest difference relative to its output's magnitude."""
        return max((row.max_rel for row in self.rows), default=math.inf)

    @property
    def tolerance(self) -> float:
        """The largest relative difference that was allowed in any output."""
        return max((row.tolerance for row in self.rows), default=0.0)

    @property
    def failure(self) -> str:
        """Why the two do not compute the same, in one line; empty where they do."""
        if self.reason or self.ok:
            return self.reason
        return next((f"output {r.name!r} {r.reason}" for r in self.rows if not r.ok), "nothing was compared")

    def __str__(self) -> str:
        head = f"{self.a} and {self.b} {'agree' if self.ok else 'DIFFER'}"
        if not self.rows:
            return f"{head}: {self.reason}"
        if self.reason:
            head = f"{self.a} and {self.b} prove nothing: {self.reason}"
        else:
            head += f": {self.max_rel:.1e} of the output's magnitude (allowed {self.tolerance:.0e})"
        table = text_table(
            ("output", "shape", "dtype", "max |a−b|", "max |a|", "relative", "allowed", "result"),
            [
                (
                    row.name,
                    "×".join(map(str, row.shape)) or "scalar",
                    row.dtype,
                    f"{row.max_abs:.1e}",
                    f"{row.scale:.1e}",
                    f"{row.max_rel:.1e}",
                    f"{row.tolerance:.0e}" if row.tolerance else "exact",
                    row.reason or "ok",
                )
                for row in self.rows
            ],
        )
        return f"{head}\n\n{table}"

    def to_json(self, indent: int | None = 2) -> str:
        """Return the record as JSON; a difference that is not finite is null."""
        numbers = {"max_abs": self.max_abs, "max_rel": self.max_rel, "tolerance": self.tolerance}
        record = {"ok": self.ok, **numbers, **dataclasses.asdict(self)}
        return json.dumps(_finite(record), indent=indent, ensure_ascii=False, allow_nan=False)

    def raise_if_failed(self) -> None:
        """Do nothing where the two agree.

        Raises:
            VerificationError: They do not; the message names the first output that differs.
        """
        if not self.ok:
            raise VerificationError(
                f"{self.a} and {self.b} do not compute the same: {self.failure}",
                code="verification-failed",
                hint="print the verification for all outputs; do not put the second in the first's place",
            )


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
    empty = all(row.ok and 0 in row.shape for row in rows)
    return Verification(*names, rows, reason="all outputs are empty: nothing was compared" if empty else "")


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return ``inputs`` as positional and keyword arguments, NumPy arrays as tensors, all detached."""

    def tensor(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            return torch.from_numpy(leaf.copy())
        return leaf.detach() if isinstance(leaf, Tensor) else leaf

    inputs = pytree.tree_map(tensor, inputs)
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def named_leaves(tree: Any, root: str = "output") -> Named:
    """Return the leaves of nested dicts, sequences and dataclasses with their names, without None.

    A leaf's name is its keys joined by ``_``; it begins with ``root`` where it would begin with a position.
    """
    found: Named = []
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        if not path or isinstance(path[0], pytree.SequenceKey):
            keys.insert(0, root)
        fields: dict[str, Any] | None = None
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            fields = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
        elif isinstance(leaf, Mapping):  # of a class that torch does not know
            fields = dict(leaf)
        if fields is not None:
            prefix = "_".join(keys) + "_" if path else ""
            found += [(prefix + name, value) for name, value in named_leaves(fields, root)]
        elif leaf is not None:
            found.append(("_".join(keys), leaf))
    return found


def training_modules(model: nn.Module) -> list[str]:
    """Return the fqns of the modules in train mode.

    An exported program has no modes, and a module without a forward none that means anything (a GraphModule's copy has
    such in train mode, whatever the original's).
    """
    if "train" in vars(model):  # torch.export overrides it in the instance: calling it raises
        return []
    return [fqn for fqn, module in model.named_modules() if module.training and type(module) is not nn.Module]


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
        return named_leaves(thing(*args, **kwargs))

    return name, run


class OnnxFile:
    """An ONNX file as a callable: onnxruntime on the CPU, inputs bound by name or position."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        if path.suffix != ".onnx" or not path.is_file():
            raise InputError(
                f"{path} is no .onnx file" if path.exists() else f"there is no file {path}",
                code="onnx-missing",
                hint="check the path; it ends with .onnx",
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = min(2, torch.get_num_threads())
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors only; they are raised as well
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as cause:
            raise InputError(
                f"onnxruntime cannot load {path}: {first_line(cause)}",
                code="onnx-load",
                hint="check the file with onnx.checker; a newer opset needs a newer onnxruntime",
            ) from cause
        self.path = path

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Named:
        """Run the file and return its outputs by name."""
        feed = self.bind(args, kwargs)
        names = [output.name for output in self.session.get_outputs()]
        return list(zip(names, self.session.run(names, feed), strict=True))

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arrays by input name; what is no tensor is a constant in the file and is passed over."""
        expected = self.session.get_inputs()
        given = [(name, x) for name, x in named_leaves(kwargs or list(args)) if isinstance(x, Tensor)]
        if kwargs and {name for name, _ in given} != {node.name for node in expected}:
            raise self.misfit("got the inputs " + ", ".join(name for name, _ in given))
        if len(given) != len(expected):
            raise self.misfit(f"got {len(given)} input tensors")
        tensors = [x for _, x in given] if not kwargs else [dict(given)[node.name] for node in expected]
        for node, x in zip(expected, tensors, strict=True):
            fits = len(node.shape) == x.ndim and all(
                not isinstance(size, int) or size == n for size, n in zip(node.shape, x.shape, strict=True)
            )
            if not fits or ONNX_DTYPES.get(node.type) != x.dtype:
                raise self.misfit(f"got {_dtype(x)} {list(x.shape)} for {node.name!r}")
        return {node.name: x.cpu().numpy() for node, x in zip(expected, tensors, strict=True)}

    def example(self, batch: int = 2) -> tuple[Tensor, ...] | None:
        """Return seeded noise of the sizes that the file states; None where it leaves more than the first axis open."""
        generator = torch.Generator().manual_seed(0)
        inputs = []
        for node in self.session.get_inputs():
            sizes = [
                size if isinstance(size, int) else batch if not axis else 0 for axis, size in enumerate(node.shape)
            ]
            dtype = ONNX_DTYPES.get(node.type)
            if dtype is None or not dtype.is_floating_point or 0 in sizes:
                return None
            inputs.append(torch.randn(sizes, generator=generator).to(dtype))
        return tuple(inputs)

    def misfit(self, got: str) -> InputError:
        """Return the error that says what the file takes."""
        takes = ", ".join(
            f"{node.name}: {_dtype(ONNX_DTYPES[node.type]) if node.type in ONNX_DTYPES else node.type} "
            f"[{', '.join(map(str, node.shape))}]"
            for node in self.session.get_inputs()
        )
        return InputError(f"{self.path.name}: {got}", code="onnx-inputs", hint=f"the file takes {takes}")


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
    if x is None or y is None:
        kinds = f"{type(a).__name__} and {type(b).__name__}"
        return _incomparable(name, (), kinds, f"cannot be compared: {kinds}")
    shape, dtypes = tuple(x.shape), _dtype(x) if x.dtype == y.dtype else f"{_dtype(x)}/{_dtype(y)}"
    if x.shape != y.shape:
        return _incomparable(name, shape, dtypes, f"has shape {list(x.shape)} in a, {list(y.shape)} in b")
    if x.is_complex() and y.is_complex():
        x, y = torch.view_as_real(x), torch.view_as_real(y)
    if not (x.is_floating_point() and y.is_floating_point()):
        if x.dtype != y.dtype:
            return _incomparable(name, shape, dtypes, f"is {_dtype(x)} in a, {_dtype(y)} in b")
        tolerance = allowed = tiny = 0.0
    else:
        if nans := sum(int(t.isnan().sum()) for t in (x, y)):
            return _incomparable(name, shape, dtypes, f"holds NaN ({nans} in a and b together)")
        infinite = x.isinf() | y.isinf()
        if not torch.equal(x[infinite].double(), y[infinite].double()):
            return _incomparable(name, shape, dtypes, "is infinite in different places")
        tolerance = max(_tolerance(t.dtype) for t in (x, y)) if rtol is None else rtol
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


def _as_tensor(value: Any) -> Tensor | None:
    """Return a tensor on the CPU, or None where the value is none and cannot be made one."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    try:
        return torch.from_numpy(np.array(value))
    except TypeError:  # strings, objects
        return None


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])  # what is left are the 8-bit floats


def _dtype(x: Tensor | torch.dtype) -> str:
    return str(x.dtype if isinstance(x, Tensor) else x).removeprefix("torch.")


def _finite(value: Any) -> Any:
    """Return ``value`` with None for each float that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
