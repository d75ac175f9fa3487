"""A folded model becomes a verified ONNX file.

# Note [GroupNorm below opset 21]
torch writes GroupNorm as Reshape → InstanceNormalization → Reshape → Mul(γ) → Add(β): two passes over the
feature map for the affine alone. Here they become one ``BatchNormalization(γ, β, mean 0, var 1, epsilon 0)``,
which is ``γ (x − 0)/sqrt(1 + 0) + β``: the same function in one pass. A γ of ones with a β of zeros needs no
operator at all. From opset 21 on, torch writes GroupNormalization, which is left as it is; onnxruntime's CPU
runs that slower.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from normswap.checks.comparison import (
    TOLERANCES,
    Verification,
    as_arguments,
    named_leaves,
    training_modules,
    verify,
)
from normswap.checks.self_check import own_rounding
from normswap.deploy.affines import is_hooked
from normswap.errors import (
    ExportError,
    InputError,
    VerificationError,
    argument,
    first_line,
    full_cause,
    function,
    marked,
    parameter,
)
from normswap.norms import Affine, deployed
from normswap.storage.writing import check_target, reported, staged

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["ExportArtifact", "TensorSpec", "export_onnx", "weight_arithmetic"]

OLDEST_OPSET = 18  # the oldest that torch.onnx writes without a conversion that may fail
SINGLE_FILE_LIMIT = 1_900_000_000  # bytes of weights; a protobuf message ends at 2 GiB
SPATIAL = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
WEIGHTED = {"Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (1, 2), "MatMul": (0, 1)}


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


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    example_inputs: Any,
    opset: int = 18,
    dynamic_batch: bool = True,
    dynamic_spatial: bool = False,
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
        dynamic_batch: Whether axis 0 of every input may have any size.
        dynamic_spatial: Whether the axes from 2 on may have any size.
        verify_outputs: Whether to compare the file with the model, on the example batch and on another size.
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
    inputs = _bind(model, example_inputs)
    trials = {"": inputs}
    if dynamic_batch:
        batch = max(2, _batch_size(inputs))  # torch.export may take an example size of 1 for a constant
        inputs, trials[f"batch {batch + 1}"] = _resized(inputs, batch), _resized(inputs, batch + 1)
    if dynamic_spatial:
        trials["larger"] = pytree.tree_map_only(Tensor, _enlarged, inputs)
    dims = _dynamic_dims(inputs, dynamic_batch, dynamic_spatial)
    program = _to_onnx(model, inputs, dims, opset)
    _check_dims(program, dims)
    _lower_group_norms(program.model)
    _fold_weights(program.model)
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # names files of this machine

    with staged(path) as place:
        with reported(path):
            _write(program.model, place(path))
        verification = _verified(model, place(path), trials, rtol) if verify_outputs else None
        return _describe(program.model, path, verification)


def weight_arithmetic(model: onnx.ModelProto | ir.Model) -> list[str]:
    """Return the weights of Conv, ConvTranspose, Gemm and MatMul nodes that the file computes from constants.

    A weight that depends on the network's input (dynamic convolution) is none of these.

    Returns:
        One sentence for each, empty for a constant-folded graph.
    """
    import onnx_ir as ir

    graph = (model if isinstance(model, ir.Model) else ir.from_proto(model)).graph
    constant = {value for value in graph.initializers.values() if not value.is_graph_input()}
    found = []
    for node in graph.all_nodes():
        constant.update(value for sub in _subgraphs(node) for value in sub.initializers.values())
        # A body reads values of the graph around it that are no inputs of its node.
        pure = not node.op_type.startswith("Random") and not any(_subgraphs(node))
        if pure and all(value in constant for value in node.inputs if value is not None):
            constant.update(node.outputs)
        for position in WEIGHTED.get(node.op_type, ()):
            value = node.inputs[position] if position < len(node.inputs) else None
            producer = value.producer() if value else None
            if value in constant and producer is not None and producer.op_type != "Constant":
                found.append(f"{node.op_type} {node.name!r} has a weight computed by {producer.op_type}")
    return found


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    import onnx_ir as ir

    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()


def _refuse(model: nn.Module, path: Path, opset: int) -> None:
    """Raise ExportError for what must not be exported, before anything else happens."""
    import onnx

    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}", code="export-model", hint="give a torch.nn.Module")
    if training := training_modules(model):
        raise ExportError(
            f"the model is in train mode ({training[0]!r} and {len(training) - 1} more modules)",
            code="export-train-mode",
            hint="call model.eval() before export_onnx()",
        )
    for fqn, module in model.named_modules():
        if why := _unfolded(module):
            raise ExportError(
                f"{fqn!r} is not folded: {why}",
                code="export-unfolded",
                hint=f"fold it first: {function('fold')}",
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


def _unfolded(module: nn.Module) -> str:
    """Return what is still to fold in the module itself, or an empty string."""
    if parametrize.is_parametrized(module):
        return f"{', '.join(module.parametrizations)} is parametrized"  # type: ignore[arg-type]
    if any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values()):
        return "a torch.nn.utils.weight_norm hook computes its weight"
    answer = deployed(module)
    if not isinstance(answer, Affine) or answer.otherwise is not None or is_hooked(module):
        return ""
    needs = "" if answer.rank else f", which folding may leave without {argument('example_inputs')}"
    return f"it is a {type(module).__name__}{needs}"


def _bind(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Return the example inputs by the names of forward's parameters, in their order."""
    args, kwargs = as_arguments(example_inputs)
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as cause:
        raise InputError(
            f"the example inputs do not fit {type(model).__name__}.forward: {cause}",
            code="export-inputs",
            hint="give a tensor, a tuple of positional inputs, or a dict of keyword inputs",
        ) from cause
    for name in bound.arguments:
        parameter = bound.signature.parameters[name]
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ExportError(
                f"{type(model).__name__}.forward takes {parameter}: its inputs have no names",
                code="export-inputs",
                hint="wrap the model in a module whose forward names each input",
            )
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(bound.arguments)):
        raise InputError("the example inputs hold no tensor", code="export-inputs", hint="give at least one tensor")
    return dict(bound.arguments)


def _batch_size(inputs: Any) -> int:
    """Return the one size that axis 0 of all tensors has."""
    sizes = {name: len(x) for name, x in named_leaves(inputs) if isinstance(x, Tensor) and x.ndim}
    if len(set(sizes.values())) != 1:
        raise InputError(
            "the inputs have no common batch size on axis 0: "
            + (", ".join(f"{name} {size}" for name, size in sizes.items()) or "no axis at all"),
            code="export-batch",
            hint=f"pass {argument('dynamic_batch', False)}",
        )
    return next(iter(sizes.values()))


def _resized(inputs: Any, batch: int) -> Any:
    """Return the inputs with ``batch`` samples; a repeated one is rolled along its last axis: they differ."""

    def resize(x: Tensor) -> Tensor:
        if not x.ndim or len(x) == batch:
            return x
        samples = [x[i % len(x)] for i in range(batch)]
        return torch.stack([s.roll(i // len(x), -1) if s.ndim else s for i, s in enumerate(samples)])

    return pytree.tree_map_only(Tensor, resize, inputs)


def _enlarged(x: Tensor) -> Tensor:
    """Return ``x`` at twice the size on every axis from 2 on: a network that halves its maps allows that."""
    return x.repeat(1, 1, *(2,) * (x.ndim - 2)) if x.ndim > 2 else x


def _dynamic_dims(inputs: dict[str, Any], batch: bool, spatial: bool) -> Any:
    """Return, in the structure of the inputs, {axis: name} for each tensor and None for what is none."""
    known: dict[tuple[str, int], str] = {}

    def dims(x: Any) -> dict[int, str] | None:
        if not isinstance(x, Tensor):
            return None
        named = {0: "batch"} if batch and x.ndim else {}
        if spatial and x.ndim > 2:
            names = SPATIAL.get(x.ndim - 2) or [f"size{axis}" for axis in range(2, x.ndim)]
            for axis, base in enumerate(names, 2):
                size = (base, x.shape[axis])
                taken = sum(name == base for name, _ in known)
                named[axis] = known.setdefault(size, f"{base}{taken + 1}" if taken else base)
        return named

    return pytree.tree_map(dims, inputs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes, warnings and graph dumps; what matters comes as an exception."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        sink = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stderr(sink), contextlib.redirect_stdout(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _to_onnx(model: nn.Module, inputs: dict[str, Any], dims: Any, opset: int) -> torch.onnx.ONNXProgram:
    """Return torch's own ONNX form of the model, with readable names."""
    in_names = [name for name, x in named_leaves(inputs) if isinstance(x, Tensor)]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            out_names = [
                name if name not in in_names else f"{name}_out"
                for name, _ in named_leaves(model(**pytree.tree_map_only(Tensor, torch.clone, inputs)))
            ]
    except Exception as cause:
        raise InputError(
            f"{type(model).__name__} failed on the example inputs: {type(cause).__name__}: {first_line(cause)}",
            code="export-forward",
            hint="give inputs that model(...) accepts in eval mode, and with 2 samples for dynamic_batch",
        ) from cause
    try:
        with _quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
            program = torch.onnx.export(
                model,
                kwargs=inputs,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dims,
                input_names=in_names,
                output_names=out_names,
                verbose=False,
            )
    except Exception as failure:
        origin = failure.__cause__ or failure
        dynamic = any(pytree.tree_leaves(dims))
        raise ExportError(
            f"torch cannot export {type(model).__name__}: {first_line(origin)}",
            code="export-failed",
            hint=(f"pass {argument('dynamic_batch', False)} if it fixes the size; " if dynamic else "")
            + f"the whole reason: {full_cause()}",
        ) from origin
    assert program is not None  # only without dynamo
    if (got := program.model.opset_imports[""]) != opset:
        raise ExportError(
            f"torch wrote opset {got} and cannot convert it to {opset}",
            code="export-opset",
            hint=f"pass {argument('opset', got)}",
        )
    return program


def _check_dims(program: torch.onnx.ONNXProgram, dims: Any) -> None:
    """Give the dynamic axes their names; an axis that the exporter has fixed is an error."""
    import onnx_ir as ir

    wanted = [d for d in pytree.tree_leaves(dims, is_leaf=_is_axes) if d is not None]
    renamed: dict[str | ir.SymbolicDim, str] = {}
    for value, axes in zip(program.model.graph.inputs, wanted, strict=True):
        for axis, name in axes.items():
            size = value.shape[axis] if value.shape is not None else None
            if not isinstance(size, ir.SymbolicDim):
                raise ExportError(
                    f"the model fixes axis {axis} of {value.name!r} to {size}",
                    code="export-batch" if axis == 0 else "export-spatial",
                    hint=f"pass {argument('dynamic_batch' if axis == 0 else 'dynamic_spatial', False)}",
                )
            if size.value is not None and size.value != name and size.value.isidentifier():
                renamed[size.value] = name
    if renamed:
        program.rename_axes(renamed)


def _is_axes(leaf: Any) -> bool:
    return isinstance(leaf, dict) and all(isinstance(axis, int) for axis in leaf)


def _lower_group_norms(model: ir.Model) -> None:
    """Replace the Mul and Add after each normalization, in place, see Note [GroupNorm below opset 21]."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for norm in [node for node in model.graph if node.op_type == "InstanceNormalization"]:
        reshape = _only_consumer(norm, "Reshape")
        multiply = _only_consumer(reshape, "Mul")
        add = _only_consumer(multiply, "Add")
        if reshape and multiply and add:
            _merge_affine(model, reshape.outputs[0], multiply, add)
    RemoveUnusedNodesPass()(model)  # and the constants of what is gone


def _merge_affine(model: ir.Model, x: ir.Value, multiply: ir.Node, add: ir.Node) -> None:
    """Replace ``x · γ + β`` by one BatchNormalization where γ and β are constants per channel."""
    import numpy as np
    import onnx_ir as ir

    y, graph = add.outputs[0], model.graph
    gamma = _per_channel(multiply, x, y)
    beta = _per_channel(add, multiply.outputs[0], y)
    if gamma is None or beta is None or gamma.shape != beta.shape or gamma.dtype != np.float32:
        return
    if (gamma == 1).all() and (beta == 0).all() and not y.is_graph_output():
        y.replace_all_uses_with(x)
        x.shape, x.type = y.shape, y.type
        graph.remove([multiply, add], safe=True)
        return
    constants = []
    for name, array in {
        f"{y.name}/scale": gamma,
        f"{y.name}/bias": beta,
        f"zeros/{gamma.size}": np.zeros_like(gamma),  # shared by all norms of this width
        f"ones/{gamma.size}": np.ones_like(gamma),
    }.items():
        if name not in graph.initializers:
            tensor, shape = ir.tensor(array, name=name), ir.Shape(array.shape)
            graph.register_initializer(ir.Value(None, name=name, shape=shape, type=x.type, const_value=tensor))
        constants.append(graph.initializers[name])
    affine = ir.node("BatchNormalization", [x, *constants], {"epsilon": 0.0}, name=add.name)
    affine.metadata_props.update(add.metadata_props)
    out = affine.outputs[0]
    out.shape, out.type = y.shape, y.type
    ir.convenience.replace_nodes_and_values(graph, add, [multiply, add], [affine], [y], [out])


def _only_consumer(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """Return the one node that reads the node's output, if it is of this type and all that reads it."""
    if node is None or node.outputs[0].is_graph_output():
        return None
    uses = list(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 and uses[0].node.op_type == op_type else None


def _per_channel(node: ir.Node, x: ir.Value, y: ir.Value) -> Any:
    """Return the operand beside ``x`` as an array ``(C,)``, if it is a constant of axis 1 alone."""
    other = node.inputs[1] if node.inputs[0] is x else node.inputs[0]
    if other is None or other.const_value is None or y.shape is None or len(y.shape) < 2:
        return None
    array = other.const_value.numpy()
    channels = y.shape[1]
    trailing = (1,) * (len(y.shape) - 2)
    shape = array.shape[array.ndim - 1 - len(trailing) :]  # without leading ones
    if array.size != channels or shape != (channels, *trailing):
        return None
    return array.reshape(-1)


def _fold_weights(model: ir.Model) -> None:
    """Compute, in place, the weights that the graph still computes from constants.

    torch.onnx leaves those of more than 8,192 values to the runtime: a weight standardization written out in
    a user's own layer, the transpose of a tied weight.

    Raises:
        ExportError: Some are left.
    """
    if weight_arithmetic(model):
        _fold_constants(model)
    if left := weight_arithmetic(model):
        raise ExportError(
            f"{len(left)} weights are computed in the graph; the first: {left[0]}",
            code="export-weight-arithmetic",
            hint=f"make each weight a plain parameter first: {function('fold')}",
        )


def _fold_constants(model: ir.Model) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    with _quiet():
        fold_constants(model, input_size_limit=1 << 40, output_size_limit=1 << 40)
        RemoveUnusedNodesPass()(model)


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


def _verified(model: nn.Module, path: Path, trials: dict[str, Any], rtol: float | None) -> Verification:
    """Return one record of the comparisons on all trials; the path in it is the final one."""
    rows = []
    sizes = f"{argument('dynamic_batch', False)} or {argument('dynamic_spatial', False)}"
    fixed = f"pass {sizes} if the model needs a certain size"
    for trial, inputs in trials.items():
        where = f" ({trial})" if trial else ""
        try:
            found = verify(model, path, inputs, rtol=_export_rtol(model) if rtol is None else rtol)
            if rtol is None and not found.ok and (own := 10 * own_rounding(model, inputs)) > found.tolerance:
                found = verify(model, path, inputs, rtol=own)  # the model itself is no more precise
        except InputError as cause:
            raise ExportError(
                f"the export cannot be verified{where}: {marked(cause.message)}",
                code="export-unverified",
                hint=fixed if trial else cause.hint,
            ) from cause
        if not found.ok:
            raise VerificationError(
                f"onnxruntime does not compute what the model does{where}: {found.failure}",
                code="export-mismatch",
                hint=f"nothing was written; {fixed if trial else 'try another opset'}",
            )
        rows += [dataclasses.replace(r, name=r.name + where) for r in found.rows]
    return dataclasses.replace(found, rows=tuple(rows))


def _export_rtol(model: nn.Module) -> float:
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return 5 * max((TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=TOLERANCES[torch.float32])


def _describe(model: ir.Model, path: Path, verification: Verification | None) -> ExportArtifact:
    def spec(value: ir.Value) -> TensorSpec:
        shape = value.shape if value.shape is not None else ()
        sizes = tuple(size if isinstance(size, int) else str(size.value) for size in shape)
        return TensorSpec(value.name or "", value.dtype.numpy().name if value.dtype else "", sizes)

    graph = model.graph
    ops = dict(Counter(node.op_type for node in graph.all_nodes()).most_common())
    inputs, outputs = tuple(map(spec, graph.inputs)), tuple(map(spec, graph.outputs))
    return ExportArtifact(path, model.opset_imports[""], inputs, outputs, ops, verification)
