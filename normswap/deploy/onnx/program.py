"""torch's own ONNX form of a model, with readable names and the dynamic axes that were asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from normswap.deploy.onnx.inputs import axes_of
from normswap.deploy.onnx.normalized import lower_normalized, write_scans
from normswap.deploy.onnx.quiet import quiet
from normswap.deploy.onnx.recurrent import TRANSLATIONS, lower_recurrent
from normswap.deploy.onnx.sizes import assumptions, recorded
from normswap.errors import ExportError, InputError, argument, first_line, full_cause
from normswap.nn.plain import made_torchs
from normswap.runs.arguments import named_leaves
from normswap.runs.guard import copy_of, untouched
from normswap.runs.settings import seed_generators
from normswap.runs.sizes import Condition

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["lowered", "name_axes", "to_onnx"]

_PLAIN = (int, float, complex, str, bool, type(None))


def to_onnx(
    model: nn.Module, inputs: dict[str, Any], dims: Any, opset: int
) -> tuple[torch.onnx.ONNXProgram, list[Condition]]:
    """Return torch's own ONNX form of the model, with readable names, and what it takes for granted of the sizes."""
    in_names = [name for name, x in named_leaves(inputs) if isinstance(x, Tensor)]
    try:
        with untouched(model), torch.no_grad():
            output, again = (_seeded_call(model, inputs) for _ in range(2))
            out_names = [name if name not in in_names else f"{name}_out" for name, _ in named_leaves(output)]
    except Exception as cause:
        raise InputError(
            f"{type(model).__name__} failed on the example inputs: {type(cause).__name__}: {first_line(cause)}",
            code="export-forward",
            hint="give inputs that model(...) accepts in eval mode, and with 2 samples for dynamic_batch",
        ) from cause
    if not _equal(output, again):
        raise ExportError(
            f"{type(model).__name__} keeps state from call to call: on the same inputs a second call returns something "
            "else, and a file computes what the first call does",
            code="export-state",
            hint="let forward take that state as an input and return it, or leave it out in eval mode",
        )
    form = lowered(model)
    try:
        with quiet(), untouched(form), recorded() as traced, torch.no_grad():
            program = torch.onnx.export(
                form,
                kwargs=inputs,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dims,
                input_names=in_names,
                output_names=out_names,
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
    except Exception as failure:
        origin = failure.__cause__ or failure
        dynamic = any(pytree.tree_leaves(dims))
        unknown = [type(x).__name__ for x in pytree.tree_leaves(output) if not isinstance(x, (Tensor, *_PLAIN))]
        raise ExportError(
            f"torch cannot export {type(model).__name__}: {first_line(origin)}",
            code="export-failed",
            hint=(
                f"let forward return its tensors in a tuple or a dict instead of {unknown[0]}; "
                if unknown  # to torch's pytree, which cannot look into them
                else f"pass {argument('dynamic_batch', False)} if it fixes the size; "
                if dynamic
                else ""
            )
            + f"the whole reason: {full_cause()}",
        ) from origin
    assert program is not None  # only without dynamo
    write_scans(program.model)
    if (got := program.model.opset_imports[""]) != opset:
        raise ExportError(
            f"torch wrote opset {got} and cannot convert it to {opset}",
            code="export-opset",
            hint=f"pass {argument('opset', got)}",
        )
    return program, assumptions(traced[-1], inputs, dims) if traced else []


def _seeded_call(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """Return copies of what ``model`` gives; random numbers are the same in each call."""
    seed_generators(0)
    return pytree.tree_map_only(Tensor, torch.clone, model(**pytree.tree_map_only(Tensor, torch.clone, inputs)))


def _equal(a: Any, b: Any) -> bool:
    """Tell whether two outputs hold the same values, NaN and others; 1e-5 for sums in no fixed order."""
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=False)
    tensors = [(x, y) for x, y in pairs if isinstance(x, Tensor) and isinstance(y, Tensor)]
    return all(x.shape == y.shape and torch.allclose(x, y, 1e-5, 1e-5, equal_nan=True) for x, y in tensors)


def lowered(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` whose recurrent layers have forms of their own; ``model`` itself if there are none."""
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return model
    copied = copy_of(model)
    for module in copied.modules():
        made_torchs(module)
    lower_recurrent(copied)
    lower_normalized(copied)
    return copied


def name_axes(program: torch.onnx.ONNXProgram, inputs: Any, dims: Any) -> None:
    """Give the dynamic axes their names; an axis that the exporter has fixed is an error."""
    import onnx_ir as ir

    renamed: dict[str | ir.SymbolicDim, str] = {}
    for value, (_, axes) in zip(program.model.graph.inputs, axes_of(inputs, dims), strict=True):
        for axis, name in axes.items():
            size = value.shape[axis] if value.shape is not None else None
            if not isinstance(size, ir.SymbolicDim):
                raise ExportError(
                    f"the model fixes axis {axis} of {value.name!r} to {size}",
                    code=_FIXED.get(name, "export-spatial"),
                    hint=f"leave {argument('dynamic_time')} out"
                    if name == "time"
                    else f"pass {argument('dynamic_batch' if name == 'batch' else 'dynamic_spatial', False)}",
                )
            if size.value is not None and size.value != name and size.value.isidentifier():
                renamed[size.value] = name
    if renamed:
        program.rename_axes(renamed)


_FIXED = {"batch": "export-batch", "time": "export-time"}
"""The error's code, by the name of the axis."""
