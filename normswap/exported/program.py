"""Exported programs: an ``ExportedProgram`` becomes an ordinary module again, of torch.nn's layers and norms.

Note [Lifting]
A program calls ``aten.conv2d``, ``aten.batch_norm``, ``aten.dropout``, … on tensors that bare modules hold, and its
train flags are constants. Here such calls become calls of ``nn.Conv2d``, ``nn.BatchNorm2d``, ``nn.Dropout``, … which
take the holders' places and their very tensors. So whatever follows sees a model as a user would have written it:
names stay, and norms and dropout obey ``train()`` and ``eval()`` again. A call is lifted only where a module computes
the very same, in all calls that share its tensors. What is not lifted stays an operation, and is treated as one.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.graph import CodeGen, _PyTreeCodeGen
from torch.utils import _pytree as pytree

from normswap.errors import CaptureError, InputError, first_line
from normswap.graph.ops import LAYER_CALLS, STATISTICS_CALLS
from normswap.runs.recorded_inputs import RECORD, by_name, record_of

__all__ = ["from_exported", "to_exported"]

aten = torch.ops.aten


def from_exported(program: ExportedProgram) -> fx.GraphModule:
    """Return an exported program as an ordinary module, to convert, train, fold and export again.

    Layers, BatchNorms and dropouts are modules of torch.nn under their own names, which obey ``train()`` and ``eval()``
    (Note [Lifting]); the mode is that of the export. The sizes that the export fixed stay fixed: other inputs are
    refused when the module runs. The tensors are copies: the program stays as it is.

    Args:
        program: What ``torch.export.export`` or ``torch.export.load`` returned.

    Raises:
        InputError: ``program`` is no exported program.
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
    _refuse_control_flow(module)
    lifter = _Lifter(module)
    training = lifter.lift()
    if program.example_inputs is None:
        lifter.notes.append("it holds no example inputs: that others have the sizes which it fixed is not checked")
    for text in lifter.notes:
        warnings.warn(f"exported program: {text}", stacklevel=2)
    _flatten_signature(module.graph)
    rebuilt = copy.deepcopy(fx.GraphModule(module, module.graph))
    type(rebuilt).__name__ = _name_of(program)  # each GraphModule has a class of its own
    norms = {n: m.training for n, m in rebuilt.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
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
        {i: Dim.AUTO for i, size in enumerate(leaf.shape) if not _is_constant(size)}
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


# --------------------------------------------------------------------------------------------------- reading calls

_Build = Callable[[dict[str, Any], Tensor], nn.Module]


def _axes(value: Any, count: int) -> Any:
    """Return a setting per axis: ATen takes one value for all."""
    return value if isinstance(value, str) else tuple(value) * (count if len(value) == 1 else 1)


def _build_conv(given: dict[str, Any], weight: Tensor) -> nn.Module:
    axes = weight.ndim - 2
    transposed = bool(given.get("transposed"))
    make: Any = _CONVS[transposed][axes - 1]
    groups = int(given["groups"])
    inside, outside = (
        (weight.shape[0], weight.shape[1] * groups) if transposed else (weight.shape[1] * groups, weight.shape[0])
    )
    settings = {name: _axes(given[name], axes) for name in ("stride", "padding", "dilation")}
    if transposed:
        settings["output_padding"] = _axes(given["output_padding"], axes)
    module: nn.Module = make(
        inside, outside, tuple(weight.shape[2:]), groups=groups, bias=False, device="meta", **settings
    )
    return module


def _build_linear(given: dict[str, Any], weight: Tensor) -> nn.Module:
    return nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")


_CONVS: tuple[Any, Any] = (
    (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_TRANSPOSED_CALLS = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
_NORM_CALLS = STATISTICS_CALLS | {aten.batch_norm.default}
_DROPOUT_CALLS = {
    aten.dropout.default: False,
    aten.dropout_.default: True,
    aten.native_dropout.default: False,
    aten.feature_dropout.default: False,
    aten.feature_dropout_.default: True,
}
_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_FEATURE_DROPOUTS = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}
_TENSORS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class _Call:
    """One call that a module may take the place of.

    Args:
        operation: The call itself.
        result: The node whose value the module is going to compute.
        done: The nodes that go away, users first.
        argument: The name of the operation's argument that is the module's input.
        tensors: The fqns of its tensors by argument, None where one is not given.
        settings: Its other arguments.
    """

    operation: fx.Node
    result: fx.Node
    done: tuple[fx.Node, ...]
    argument: str
    tensors: dict[str, str | None]
    settings: dict[str, Any]

    @property
    def input(self) -> fx.Node:
        """The module's input, as the graph has it now."""
        found = _arguments(self.operation)[self.argument]
        assert isinstance(found, fx.Node)
        return found


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return all arguments of an ATen call by name, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given: dict[str, Any] = {a.name: a.default_value for a in schema if a.has_default_value()}
    given.update(zip((a.name for a in schema), node.args, strict=False))
    return given | node.kwargs


def _is_constant(value: Any) -> bool:
    return not any(isinstance(leaf, (fx.Node, torch.SymInt)) for leaf in pytree.tree_leaves(value))


def _tensor_names(given: dict[str, Any], names: Sequence[str]) -> dict[str, str | None] | None:
    """Return the fqns of the tensor arguments; None where one is computed."""
    found: dict[str, str | None] = {}
    for name in names:
        value = given.get(name)
        if value is not None and not (isinstance(value, fx.Node) and value.op == "get_attr"):
            return None
        found[name] = None if value is None else str(value.target)
    return found


def _transposed_weight(node: Any) -> fx.Node | None:
    """Return what ``node`` is the matrix transpose of."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    swaps: dict[Any, tuple[list[Any], ...]] = {
        aten.t.default: ([],),
        aten.permute.default: ([[1, 0]], [[-1, -2]]),
        aten.transpose.int: ([0, 1], [1, 0], [-1, -2], [-2, -1]),
    }
    source = node.args[0] if node.args else None
    rest = [list(a) if isinstance(a, (list, tuple)) else a for a in node.args[1:]]
    return source if isinstance(source, fx.Node) and rest in swaps.get(node.target, ()) else None


def _layer_call(node: fx.Node) -> _Call | None:
    argument = "input"
    if node.target in LAYER_CALLS:
        given = _arguments(node)
        if node.target in _TRANSPOSED_CALLS:
            given["transposed"] = True
    elif node.target in (aten.addmm.default, aten.mm.default):
        named = _arguments(node)
        with_bias = node.target is aten.addmm.default
        if with_bias and (named["beta"], named["alpha"]) != (1, 1):
            return None
        argument = "mat1" if with_bias else "self"
        given = {
            "weight": _transposed_weight(named["mat2"]),
            "bias": named["self"] if with_bias else None,
        }
    else:
        return None
    tensors = _tensor_names(given, ("weight", "bias"))
    settings = {name: value for name, value in given.items() if name not in ("input", "weight", "bias")}
    if tensors is None or tensors["weight"] is None or not _is_constant(settings):
        return None
    return _Call(node, node, (node,), argument, tensors, settings)


def _norm_call(node: fx.Node) -> _Call | None:
    if node.target not in _NORM_CALLS:
        return None
    given = {"training": False, **_arguments(node)}
    tensors = _tensor_names(given, _TENSORS)
    settings = {name: given[name] for name in ("training", "momentum", "eps")}
    if tensors is None or (tensors["running_mean"] is None) != (tensors["running_var"] is None):
        return None
    if (tensors["weight"] is None) != (tensors["bias"] is None) or not any(tensors.values()):
        return None
    if not _is_constant(settings) or (tensors["running_mean"] is None and not settings["training"]):
        return None
    found = _first_result(node, tensors)
    if found is None:
        return None
    return _Call(node, *found, "input", tensors, settings)


def _first_result(node: fx.Node, tensors: dict[str, str | None]) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """Return the node that holds a call's output, and those that go away with it: the updates of statistics.

    None where something else is made of the call's further results.
    """
    if len(node.target._schema.returns) == 1:  # type: ignore[union-attr]
        return node, (node,)
    result: fx.Node | None = None
    done: list[fx.Node] = []
    updated: dict[Any, str | None] = {3: tensors.get("running_mean"), 4: tensors.get("running_var")}
    for user in node.users:
        if user.target is not operator.getitem:
            return None
        if user.args[1] == 0:
            if result is not None:
                return None
            result = user
            continue
        for write in user.users:
            target = write.args[0]
            if write.target is not aten.copy_.default or write.users or not isinstance(target, fx.Node):
                return None
            if target.op != "get_attr" or target.target != updated.get(user.args[1]):
                return None
            done.append(write)
        done.append(user)
    return None if result is None else (result, (*done, result, node))


def _dropout_call(node: fx.Node) -> _Call | None:
    if node.target not in _DROPOUT_CALLS:
        return None
    given = _arguments(node)
    settings = {"p": given["p"], "train": given["train"]}
    found = _first_result(node, {})
    if found is None or not _is_constant(settings):
        return None
    argument = "self" if _DROPOUT_CALLS[node.target] else "input"  # in place
    return _Call(node, *found, argument, {}, settings)


# --------------------------------------------------------------------------------------------------------- lifting


class _Lifter:
    """Replaces calls by calls of modules, in the graph and the module tree of ``root``."""

    def __init__(self, root: fx.GraphModule) -> None:
        self.root, self.graph = root, root.graph
        self.notes: list[str] = []

    def lift(self) -> bool:
        """Lift what can be lifted; return whether the program was exported in train mode."""
        norms = self._calls(_norm_call)
        mode = any(call.settings["training"] for call in norms)
        for group in self._groups(self._calls(_layer_call)):
            self._lift_layer(group)
        for group in self._groups(norms):
            self._lift_norm(group)
        for call in self._calls(_dropout_call):
            if call.settings["train"] == mode:  # else it is one that the model always, or never, applies
                self._lift_dropout(call)
        if left := sum(node.target in _NORM_CALLS for node in self.graph.nodes):
            what = "1 batch norm stays" if left == 1 else f"{left} batch norms stay"
            self.notes.append(f"{what} an operation, with the batch's statistics or the stored ones as exported")
        if left := sum(node.target in _DROPOUT_CALLS for node in self.graph.nodes):
            what = "1 dropout stays" if left == 1 else f"{left} dropouts stay"
            self.notes.append(f"{what} on, or off, as exported, and cannot follow train() and eval()")
        self._erase_unread()
        self.graph.lint()
        return mode

    def _calls(self, read: Callable[[fx.Node], _Call | None]) -> list[_Call]:
        found = (read(node) for node in self.graph.nodes if node.op == "call_function")
        return [call for call in found if call is not None]

    def _groups(self, calls: list[_Call]) -> Iterator[list[_Call]]:
        """Yield the calls on the same tensors, where all agree in everything else."""
        groups: dict[tuple[str | None, ...], list[_Call]] = defaultdict(list)
        for call in calls:
            groups[tuple(call.tensors.values())].append(call)
        for group in groups.values():
            if all(call.settings == group[0].settings for call in group):
                yield group

    def _lift_layer(self, group: list[_Call]) -> None:
        call = group[0]
        holder = self._holder(call.tensors)
        if holder is None:
            return
        weight, bias = (self._tensor(call.tensors[name]) for name in ("weight", "bias"))
        if not isinstance(weight, nn.Parameter) or not isinstance(bias, nn.Parameter | None):
            return
        linear = not call.settings
        if linear and (weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1])):
            return  # a product with a vector, or a sum with a matrix
        module = (_build_linear if linear else _build_conv)(call.settings, weight)
        module.register_parameter("weight", weight)
        module.register_parameter("bias", bias)
        self._put(holder, module, group)

    def _lift_norm(self, group: list[_Call]) -> None:
        call = group[0]
        value = call.input.meta.get("val")
        tensors = {name: self._tensor(fqn) for name, fqn in call.tensors.items()}
        like = next(t for t in tensors.values() if t is not None)
        if not isinstance(value, Tensor) or value.ndim not in _NORMS:
            return
        holder = self._holder(call.tensors, ("num_batches_tracked",))
        counter = f"{holder}.num_batches_tracked" if holder else ""
        counting = self._counting(counter)
        if counting is None:
            return
        tracked = tensors["running_mean"] is not None
        module = _NORMS[value.ndim](
            like.numel(),
            eps=call.settings["eps"],
            momentum=call.settings["momentum"],
            affine=tensors["weight"] is not None,
            track_running_stats=tracked,
            device=like.device,
            dtype=like.dtype,
        )
        for name in ("weight", "bias"):
            if tensors[name] is not None:
                if not isinstance(tensors[name], nn.Parameter):
                    return
                module.register_parameter(name, tensors[name])
        if tracked:
            module.register_buffer("running_mean", tensors["running_mean"])
            module.register_buffer("running_var", tensors["running_var"])
            if holder and isinstance(found := self._find(counter), Tensor):
                module.register_buffer("num_batches_tracked", found)
        module.training = bool(call.settings["training"])
        for node in counting:
            self.graph.erase_node(node)
        fqn = holder or self._free_name("norm")
        self._put(fqn, module, group)
        if holder is None:
            first = next(name for name in call.tensors.values() if name is not None)
            self.notes.append(
                f"'{fqn}', a call with {first!r}, now follows train() and eval(): whether it did is not in the program"
            )

    def _lift_dropout(self, call: _Call) -> None:
        node = call.operation
        value = call.input.meta.get("val")
        make: Any = nn.Dropout
        if node.target in (aten.feature_dropout.default, aten.feature_dropout_.default):
            make = _FEATURE_DROPOUTS.get(value.ndim if isinstance(value, Tensor) else 0)
        if make is not None:
            module = make(call.settings["p"], inplace=_DROPOUT_CALLS[node.target])  # type: ignore[index]
            self._put(self._free_name("dropout"), module, [call])

    def _put(self, fqn: str, module: nn.Module, group: list[_Call]) -> None:
        """Put ``module`` into the tree at ``fqn`` and call it instead of the operations of ``group``."""
        parent, _, name = fqn.rpartition(".")
        self.root.get_submodule(parent)._modules[name] = module
        for call in group:
            with self.graph.inserting_before(call.result):
                made = self.graph.call_module(fqn, (call.input,))
            made.meta = dict(call.result.meta)
            call.result.replace_all_uses_with(made)
            for node in call.done:
                self.graph.erase_node(node)

    def _holder(self, tensors: dict[str, str | None], further: tuple[str, ...] = ()) -> str | None:
        """Return the fqn of the bare module that holds ``tensors`` under their own names, and nothing but them.

        A tensor that is tied goes by one of its names everywhere, so the last tensor tells the module: a bias or
        statistics are rarely tied.
        """
        given = {name: self._find(fqn) for name, fqn in tensors.items() if fqn is not None}
        holder = [fqn for fqn in tensors.values() if fqn is not None][-1].rpartition(".")[0]
        module = self.root.get_submodule(holder)
        held = {n: t for table in (module._parameters, module._buffers) for n, t in table.items() if n not in further}
        bare = type(module) is nn.Module and not module._modules
        same = {id(t) for t in held.values() if t is not None} == {id(t) for t in given.values()}
        return holder if holder and bare and same and all(held.get(n) is t for n, t in given.items()) else None

    def _find(self, fqn: str) -> Any:
        parent, _, name = fqn.rpartition(".")
        return getattr(self.root.get_submodule(parent), name, None)

    def _tensor(self, fqn: str | None) -> Any:
        return None if fqn is None else self._find(fqn)

    def _counting(self, counter: str) -> list[fx.Node] | None:
        """Return the nodes that count the batches in ``counter``, users first; None where it serves something else."""
        pending = [node for node in self.graph.nodes if node.op == "get_attr" and node.target == counter]
        found: dict[fx.Node, None] = {}
        while pending:
            for user in pending.pop().users:
                adds = user.target in (aten.add_.Tensor, aten.add.Tensor) and user.args[1] == 1
                written = user.args[0] if user.target is aten.copy_.default else None
                back = isinstance(written, fx.Node) and written.op == "get_attr" and written.target == counter
                if not adds and not back:
                    return None
                if user not in found:
                    found[user] = None
                    pending.append(user)
        return [node for node in reversed(list(self.graph.nodes)) if node in found]

    def _free_name(self, stem: str) -> str:
        name, count = stem, 0
        while hasattr(self.root, name):
            count += 1
            name = f"{stem}_{count}"
        return name

    def _erase_unread(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            moved = node.op == "call_function" and _transposed_weight(node) is not None
            if (node.op == "get_attr" or moved) and not node.users:
                self.graph.erase_node(node)


def _refuse_control_flow(module: fx.GraphModule) -> None:
    for name, child in module.named_modules():
        if child is module or not isinstance(child, fx.GraphModule):
            continue
        for node in child.graph.nodes:
            if node.target in _NORM_CALLS | LAYER_CALLS:
                raise CaptureError(
                    f"the program calls {node.target} inside a control-flow operation ('{name}')",
                    code="exported-control-flow",
                    hint="export the model without torch.no_grad, autocast, cond or map around its layers",
                )
