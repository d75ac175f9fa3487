"""The proof of an export: onnxruntime computes with the file what torch computes with the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from normswap.checks.comparison import TOLERANCES, verify
from normswap.checks.self_check import eval_output, holds_nan, own_rounding
from normswap.checks.verification import Verification
from normswap.deploy.onnx.inputs import axes_of
from normswap.deploy.onnx.sizes import at_sizes, sizes_of
from normswap.errors import ExportError, InputError, VerificationError, argument, marked
from normswap.runs.other_sizes import asked_of_sizes
from normswap.runs.sizes import Condition, Sizes, breaking

__all__ = ["Dynamic", "verified", "verify_beyond"]


@dataclass(frozen=True)
class Dynamic:
    """The inputs of an export and which of their axes are dynamic.

    Args:
        inputs: The inputs by name, with the samples of the example.
        dims: In their structure, {axis: name} for each tensor.
        times: The time axis of each tensor that has one, by its name.
        traced: The size of each dynamic axis that torch exported the model at, by the axis's name.
    """

    inputs: Any
    dims: Any
    times: Mapping[str, int]
    traced: Sizes

    @property
    def names(self) -> list[dict[int, str]]:
        """The names of the dynamic axes by the axis, for each leaf of the inputs."""
        axes = iter([axes for _, axes in axes_of(self.inputs, self.dims)])
        return [next(axes) if isinstance(leaf, Tensor) else {} for leaf in pytree.tree_leaves(self.inputs)]

    def at(self, sizes: Sizes) -> Any:
        """Return the inputs at other sizes."""
        return at_sizes(self.inputs, self.dims, self.times, sizes)


def verified(model: nn.Module, path: Path, trials: dict[str, Any], rtol: float | None) -> Verification:
    """Return one record of the comparisons on all trials; the path in it is the final one."""
    rows, proofs = [], []
    sizes = f"{argument('dynamic_batch', False)} or {argument('dynamic_spatial', False)}"
    fixed = f"pass {sizes} if the model needs a certain size"
    for trial, inputs in trials.items():
        where = f" ({trial})" if trial else ""
        found = _compared(model, path, inputs, rtol, where, fixed if trial else None)
        if not (found.ok or found.proves_nothing):
            raise VerificationError(
                f"onnxruntime does not compute what the model does{where}: {found.failure}",
                code="export-mismatch",
                hint=f"nothing was written; {_cause(model, inputs) or (fixed if trial else 'try another opset')}",
            )
        rows += [dataclasses.replace(r, name=r.name + where) for r in found.rows]
        proofs.append(found)
    if all(proof.proves_nothing for proof in proofs):
        raise VerificationError(
            f"nothing shows that the file computes what the model does: {found.reason}",
            code="export-mismatch",
            hint="nothing was written; give example inputs on which the model returns something else (in Python, "
            "verify_outputs=False writes the file nevertheless)",
        )
    return dataclasses.replace(found, rows=tuple(rows), reason="")


def verify_beyond(
    model: nn.Module,
    path: Path,
    dynamic: Dynamic,
    trials: Mapping[str, Any],
    conditions: Sequence[Condition],
    rtol: float | None,
) -> None:
    """Compare the file with the model at further sizes, those on which the model itself runs.

    Those are one sample, some more than the example has, one step, maps of one position, and for each condition that
    torch took for granted sizes that break it, see Note [What torch took for granted].

    Raises:
        VerificationError: The file computes something else there.
        ExportError: It does not run there.
    """
    tried = [sizes_of(inputs, dynamic.dims) for inputs in trials.values()]
    for sizes, why in _further(model, dynamic, tried, conditions):
        changed = [name for name, size in sizes.items() if size != dynamic.traced[name]]
        where = f" ({', '.join(f'{name} {sizes[name]}' for name in changed)})"
        options = {
            "batch": f"pass {argument('dynamic_batch', False)}",
            "time": f"leave {argument('dynamic_time')} out",
        }
        spatial = f"pass {argument('dynamic_spatial', False)}"
        static = " and ".join(dict.fromkeys(options.get(name, spatial) for name in changed))
        fixed = f"{static}: the file then takes the example's size alone"
        found = _compared(model, path, dynamic.at(sizes), rtol, where, fixed)
        if not (found.ok or found.proves_nothing):
            raise VerificationError(
                f"the file would not compute what the model does at a size unlike the example's{where}: {found.failure}"
                + (f"; what torch exports of it holds where {why}" if why else ""),
                code="export-mismatch",
                hint=f"nothing was written; {fixed}",
            )


def _further(
    model: nn.Module, dynamic: Dynamic, tried: list[dict[str, int]], conditions: Sequence[Condition]
) -> Iterator[tuple[Sizes, str]]:
    """Yield the sizes of :func:`verify_beyond`, each with the condition that it breaks."""

    def runs(sizes: Sizes) -> bool:
        try:
            output = eval_output(model, dynamic.at(sizes))
        except InputError:
            return False
        return not holds_nan(output)

    traced = dynamic.traced
    done: list[Sizes] = list(tried)
    spatial = [name for name in traced if name not in ("batch", "time")]
    wanted: list[Sizes] = []
    if "batch" in traced:
        wanted += [{**traced, "batch": 1}, {**traced, "batch": traced["batch"] + 3}]
    if "time" in traced:
        wanted.append({**traced, "time": 1})
    if spatial:
        wanted.append({**traced, **dict.fromkeys(spatial, 1)})
    for sizes in wanted:
        if sizes not in done and runs(sizes):
            done.append(sizes)
            yield sizes, next((c.text for c in conditions if not c.holds(sizes)), "")
    values = sum(x.numel() for x in pytree.tree_leaves(dynamic.at(traced)) if isinstance(x, Tensor))

    def conditions_at(sizes: Sizes) -> list[Condition]:
        asked = asked_of_sizes(model, dynamic.at(sizes), dynamic.names)
        return [*conditions, *asked] if sizes == traced else asked

    yield from breaking(conditions_at, traced, done, values, runs)


def _cause(model: nn.Module, inputs: Any) -> str:
    """Return what in the model itself makes a comparison fail on these inputs; empty where nothing does."""
    outputs = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would leave seeds for other devices
            outputs.append(eval_output(model, inputs))
    if holds_nan(outputs):
        return "the model's own output holds NaN on these inputs: give others"
    pairs = zip(*(pytree.tree_leaves(output) for output in outputs), strict=True)
    if any(isinstance(x, Tensor) and not torch.equal(x, y) for x, y in pairs):
        return (
            "the model draws random numbers in eval mode too, and no file draws the same: F.dropout needs "
            "training=self.training"
        )
    return ""


def _compared(
    model: nn.Module, path: Path, inputs: Any, rtol: float | None, where: str, fixed: str | None
) -> Verification:
    """Return the comparison of the file with the model on some inputs."""
    try:
        found = verify(model, path, inputs, rtol=_export_rtol(model) if rtol is None else rtol)
        if rtol is None and not found.ok and (own := 10 * own_rounding(model, inputs)) > found.tolerance:
            found = verify(model, path, inputs, rtol=own)  # the model itself is no more precise
    except InputError as cause:
        raise ExportError(
            f"the export cannot be verified{where}: {marked(cause.message)}",
            code="export-unverified",
            hint=cause.hint if fixed is None else fixed,
        ) from cause
    return found


def _export_rtol(model: nn.Module) -> float:
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return 5 * max((TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=TOLERANCES[torch.float32])
