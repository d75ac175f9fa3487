"""What an export gives: the file, what it takes, returns and holds, and how it was verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from normswap.checks.verification import Verification

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ExportArtifact", "TensorSpec", "describe"]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of an ONNX file: name, dtype, and shape, where a name stands for a dynamic size."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class ExportArtifact:
    """An ONNX file and what is known of it.

    Args:
        path: The file.
        opset: Its operator set.
        inputs: Its inputs.
        outputs: Its outputs.
        ops: How often it has which operator.
        verification: onnxruntime against torch, on the example batch and on a second size; None without.
    """

    path: Path
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ops: Mapping[str, int]
    verification: Verification | None

    def __str__(self) -> str:
        lines = [
            f"{self.path} (opset {self.opset})",
            *(f"  in   {spec}" for spec in self.inputs),
            *(f"  out  {spec}" for spec in self.outputs),
            "  ops  " + ", ".join(f"{op} {n}" for op, n in self.ops.items()),
        ]
        if {"InstanceNormalization", "BatchNormalization"} <= self.ops.keys():
            lines.append(
                "       InstanceNormalization with BatchNormalization (mean 0, variance 1) is GroupNorm with γ, β"
            )
        return "\n".join([*lines, *(["", str(self.verification)] if self.verification else [])])


def describe(model: ir.Model, path: Path, verification: Verification | None) -> ExportArtifact:
    """Return what is known of the file at ``path`` that holds ``model``."""

    def spec(value: ir.Value) -> TensorSpec:
        shape = value.shape if value.shape is not None else ()
        sizes = tuple(size if isinstance(size, int) else str(size.value) for size in shape)
        return TensorSpec(value.name or "", value.dtype.numpy().name if value.dtype else "", sizes)

    graph = model.graph
    ops = dict(Counter(node.op_type for node in graph.all_nodes()).most_common())
    inputs, outputs = tuple(map(spec, graph.inputs)), tuple(map(spec, graph.outputs))
    return ExportArtifact(path, model.opset_imports[""], inputs, outputs, ops, verification)
