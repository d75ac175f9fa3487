"""Exported programs: an ``ExportedProgram`` becomes an ordinary module again, of torch.nn's layers and norms."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.graph import CodeGen, _PyTreeCodeGen
from torch.utils import _pytree as pytree

from normswap.errors import CaptureError, InputError, first_line
from normswap.exported.lifting import Lifter, refuse_control_flow
from normswap.exported.reading import is_constant
from normswap.norms import is_convertible
from normswap.runs.recorded_inputs import RECORD, by_name, record_of

__all__ = ["from_exported", "to_exported"]


def from_exported(program: ExportedProgram) -> fx.GraphModule:
    """Return an exported program as an ordinary module, to convert, train, fold and export again.

    Layers, BatchNorms and dropouts are modules of torch.nn under their own names, which obey ``train()`` and ``eval()``
    (Note [Lifting], in lifting.py); the mode is that of the export. The sizes that the export fixed stay fixed: other
    inputs are refused when the module runs. The tensors are copies: the program stays as it is.

    Args:
        program: What ``torch.export.export`` or ``torch.export.load`` returned.

    Raises:
        InputError: ``program`` is not an exported program.
        CaptureError: It has BatchNorms, convolutions or linear layers inside a control-flow operation.
    """
    if not isinstance(program, ExportedProgram):
        raise InputError(
            f"from_exported was given a {type(program).__name__}",
            code="not-exported",
            hint="give what torch.export.export or torch.export.load returned",
        )
    with _quietly():
        module = program.module()
    assert isinstance(module, fx.GraphModule)
    refuse_control_flow(module)
    lifter = Lifter(module)
    training = lifter.lift()
    if program.example_inputs is None:
        lifter.notes.append("it holds no example inputs, so the sizes of other inputs are not checked")
    for text in lifter.notes:
        warnings.warn(f"exported program: {text}", stacklevel=2)
    _flatten_signature(module.graph)
    rebuilt = copy.deepcopy(fx.GraphModule(module, module.graph))
    type(rebuilt).__name__ = _name_of(program)  # each GraphModule has a class of its own
    norms = {n: m.training for n, m in rebuilt.named_modules() if is_convertible(m)}
    rebuilt.train(training)
    for name, mode in norms.items():
        rebuilt.get_submodule(name).training = mode
    rebuilt.meta = {RECORD: record} if (record := _record(program)) else {}
    return rebuilt


def to_exported(model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]) -> ExportedProgram:
    """Return ``model``, in the mode in which it is, as a program.

    The axes that may have any size are those of the program that the model comes from, else the first of each input.

    Args:
        model: The model.
        inputs: Inputs to export it with.

    Raises:
        CaptureError: torch cannot export the model.
    """
    args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), dict(inputs))
    record = record_of(model)
    if record is not None:
        shapes: Any = by_name(model, *record["dynamic_shapes"])
    else:
        named = by_name(model, args, kwargs)
        shapes = pytree.tree_map(lambda v: {0: Dim.AUTO} if isinstance(v, Tensor) and v.ndim else None, named)
    try:
        with _quietly():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as cause:
        raise CaptureError(
            f"torch.export refuses the {type(model).__name__}: {type(cause).__name__}: {first_line(cause)}",
            code="not-exportable",
            hint="give inputs of the sizes that it takes, or write another format",
        ) from cause


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep torch's warnings about its own internals from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _record(program: ExportedProgram) -> dict[str, Any] | None:
    """Return the program's example inputs, and as ``dynamic_shapes`` which of their axes may have other sizes.

    Plain data, so that a model which holds it is pickled without this package.
    """
    spec, given = program.call_spec.in_spec, program.example_inputs
    if given is None or spec is None:
        return None
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    specs = program.graph_signature.input_specs
    leaves = [values.get(getattr(s.arg, "name", "")) for s in specs if s.kind is InputKind.USER_INPUT]
    axes = [
        {i: Dim.AUTO for i, size in enumerate(leaf.shape) if not is_constant(size)}
        if isinstance(leaf, Tensor)
        else None
        for leaf in leaves
    ]
    if len(leaves) != spec.num_leaves:
        return None
    args, kwargs = given
    floating = (p.dtype for p in program.state_dict.values() if p.is_floating_point())
    shapes = pytree.tree_unflatten(axes, spec)
    return {"args": tuple(args), "kwargs": dict(kwargs), "dynamic_shapes": shapes, "dtype": next(floating, None)}


def _flatten_signature(graph: fx.Graph) -> None:
    """Let the graph take and return its values as they are, where they are tensors, tuples, lists and dicts.

    torch wraps a program's graph in code that flattens its inputs and builds its outputs anew.
    """
    code = graph._codegen
    if not isinstance(code, _PyTreeCodeGen):
        return
    inputs, outputs = code.pytree_info.in_spec, code.pytree_info.out_spec
    (output,) = graph.find_nodes(op="output")
    flat = all(child.is_leaf() for part in inputs.children() for child in part.children())
    if flat and outputs is not None and _is_plain(outputs):
        output.args = (pytree.tree_unflatten(list(output.args[0]), outputs),)
        graph.set_codegen(CodeGen())


def _is_plain(spec: pytree.TreeSpec) -> bool:
    return spec.is_leaf() or (spec.type in (tuple, list, dict) and all(map(_is_plain, spec.children())))


def _name_of(program: ExportedProgram) -> str:
    """Return the name of the class that was exported, as the program's stack traces have it."""
    for node in program.graph.nodes:
        for fqn, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
            if fqn == "" and name.isidentifier():
                return name
            break
    return "ExportedProgram"
