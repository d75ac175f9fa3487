"""A folded model becomes a verified ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from normswap.deploy.onnx.artifact import ExportArtifact, describe
from normswap.deploy.onnx.inputs import batch_size, bind_inputs, dynamic_axes, enlarged, lengthened, resized, time_axes
from normswap.deploy.onnx.lowering import lower_group_norms
from normswap.deploy.onnx.program import name_axes, to_onnx
from normswap.deploy.onnx.quiet import quiet
from normswap.deploy.onnx.sizes import sizes_of
from normswap.deploy.onnx.trials import Dynamic, verified, verify_beyond
from normswap.deploy.onnx.weights import fold_weights
from normswap.deploy.unfolded import needs_inputs, unfolded
from normswap.errors import ExportError, InputError, argument, first_line, function, parameter
from normswap.runs.modes import training_modules
from normswap.runs.wrappers import refuse_script
from normswap.storage.writing import check_target, reported, staged

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["export_onnx"]

OLDEST_OPSET = 18  # the oldest that torch.onnx writes without a conversion that may fail
SINGLE_FILE_LIMIT = 1_900_000_000  # bytes of weights; a protobuf message ends at 2 GiB


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    example_inputs: Any,
    opset: int = 18,
    dynamic_batch: bool = True,
    dynamic_spatial: bool = False,
    dynamic_time: bool | int | Mapping[str, int] = False,
    verify_outputs: bool = True,
    rtol: float | None = None,
) -> ExportArtifact:
    """Write a folded model to an ONNX file that onnxruntime runs fast and that computes what the model does.

    The file appears, complete and checked, or not at all; a file that was at ``path`` stays until then.
    Weights of more than 1.9 GB go to a second file, ``path`` with ``.data`` appended.

    Args:
        model: In eval mode and folded; is not changed.
        path: Where to write; the name ends with ``.onnx``.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
        opset: The operator set, 18 or newer; see Note [GroupNorm below opset 21].
        dynamic_batch: Whether axis 0 of every input may have any size; axis 1 where axis 0 is time.
        dynamic_spatial: Whether the axes from 2 on may have any size.
        dynamic_time: Whether sequences may have any length: True where time is on axis 1, else the axis, or the axis
            of each input that has one by its name. A file that is right for the example's length alone is refused.
        verify_outputs: Whether to compare the file with the model, on the example and on other sizes: another batch,
            and where they may vary, larger maps and sequences twice as long. A size of 1, and sizes at which the
            model branches, are compared as well where the model itself runs on them.
        rtol: The difference to allow, relative to each output's largest value; default five times that of ``verify``,
            because another library sums in another order, layer after layer.

    Returns:
        What was written, with the comparison.

    Raises:
        ExportError: The model is in train mode, is not folded, or has no ONNX form.
        VerificationError: The file computes something else.
        InputError: The example inputs do not fit the model.
    """
    path = Path(path)
    _refuse(model, path, opset)
    inputs = bind_inputs(model, example_inputs)
    times = time_axes(inputs, dynamic_time)
    trials = {"": inputs}
    if times:
        inputs = lengthened(inputs, times, 2)  # torch.export may take an example size of 1 for a constant
        trials["twice as long"] = inputs
    example = inputs
    if dynamic_batch:
        batch = max(2, batch_size(inputs, times))  # the same
        inputs, trials[f"batch {batch + 1}"] = resized(inputs, batch, times), resized(inputs, batch + 1, times)
    if dynamic_spatial:
        trials["larger"] = pytree.tree_map_only(Tensor, enlarged, inputs)
    dims = dynamic_axes(inputs, dynamic_batch, dynamic_spatial, times)
    program, conditions = to_onnx(model, inputs, dims, opset)
    name_axes(program, inputs, dims)
    lower_group_norms(program.model)
    fold_weights(program.model)
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # names files of this machine

    with staged(path) as place:
        with reported(path):
            _write(program.model, place(path))
        verification = verified(model, place(path), trials, rtol) if verify_outputs else None
        if verify_outputs:
            dynamic = Dynamic(example, dims, times, sizes_of(inputs, dims))
            with quiet():  # of sizes that nobody asked for, nobody wants to read warnings
                verify_beyond(model, place(path), dynamic, trials, conditions, rtol)
        return describe(program.model, path, verification)


def _refuse(model: nn.Module, path: Path, opset: int) -> None:
    """Raise ExportError for what must not be exported, before anything else happens."""
    import onnx

    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}", code="export-model", hint="give a torch.nn.Module")
    refuse_script(model)
    if training := training_modules(model):
        raise ExportError(
            f"the model is in train mode ({training[0]!r} and {len(training) - 1} more modules)",
            code="export-train-mode",
            hint="call model.eval() before export_onnx()",
        )
    for fqn, module in model.named_modules():
        if why := unfolded(module):
            raise ExportError(
                f"{fqn!r} is not folded: {why}",
                code="export-unfolded",
                hint=f"fold it first: {function('fold')}"
                + (f", with {argument('example_inputs')}" if needs_inputs(module) else ""),
            )
        if isinstance(module, nn.LSTM) and type(module) is not nn.LSTM and module.proj_size:
            raise ExportError(
                f"{fqn!r} is an {type(module).__name__} with proj_size={module.proj_size}, and the LSTM of ONNX has no "
                "projection",
                code="export-projection",
                hint="deploy it as a program (torch.export, `normswap fold -o MODEL.pt2`), or train an LSTM without "
                "proj_size with a Linear behind it",
            )
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise ExportError(
            f"opset {opset} cannot be written (this torch and onnx: {OLDEST_OPSET} to {newest})",
            code="export-opset",
            hint=f"leave {parameter('opset')} at its default, 18, which runs fastest in onnxruntime",
        )
    if path.suffix != ".onnx":
        raise ExportError(f"{str(path)!r} does not end with .onnx", code="export-path", hint=f"write {path.stem}.onnx")
    check_target(path)


def _write(model: ir.Model, path: Path) -> None:
    """Write the file and check it."""
    import onnx
    import onnx_ir as ir

    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if size > SINGLE_FILE_LIMIT else None)
    try:
        onnx.checker.check_model(path, full_check=True)
    except Exception as cause:
        raise ExportError(
            f"the exported graph is not valid ONNX: {first_line(cause)}",
            code="export-invalid",
            hint="try another opset",
        ) from cause
