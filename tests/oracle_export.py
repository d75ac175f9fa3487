"""What feeds what, read from torch.export's graph: an oracle that knows nothing of the package's captures.

``torch.export`` runs the model's own code on example inputs and writes down ATen operators on the very parameters and
buffers that the model holds. From it follows, by tensors alone and by no module's name, which convolution or linear
layer feeds which norm, who else sees its output, and who else reads its weight. :func:`compare` holds a plan against
that.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from normswap.records import Plan

aten = torch.ops.aten
_LAYERS = {
    aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution, aten.linear,
    aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d,
}  # fmt: skip
_BATCH_NORMS = {
    aten.batch_norm, aten._native_batch_norm_legit, aten.native_batch_norm, aten._batch_norm_with_update,
    aten._batch_norm_with_update_functional, aten._native_batch_norm_legit_no_training, aten.cudnn_batch_norm,
}  # fmt: skip
# Value for value and place for place the first argument; `dropout` only where its train flag is off.
_SAME = {aten.contiguous, aten.clone, aten.alias, aten.detach, aten.lift_fresh, aten.dropout, aten.feature_dropout}
# Moves axes, and changes nothing else.
_MOVES = {aten.permute, aten.transpose, aten.movedim, aten.moveaxis, aten.swapaxes, aten.swapdims}
_NO_VALUE = {aten.sym_size, aten.sym_stride, aten.sym_numel, aten._assert_tensor_metadata}


@dataclass(frozen=True)
class Pair:
    """A norm as the exported graphs show it.

    Args:
        norm: The fqn of its running mean, or of its γ where it has no statistics.
        calls: How often it is called, over all graphs.
        layer: The fqn of the layer that may take its statistics up; None where the graphs show that none may.
        why: Why none may.
    """

    norm: str
    calls: int
    layer: str | None = None
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """A plan held against the exported graphs.

    Args:
        wrong: The sites whose layer the graphs contradict, each with the contradiction.
        right: How many sites have a layer that the graphs confirm.
        missed: The norms that the graphs show with a layer of their own while the plan has none: (norm, layer, reason).
        unseen: The norms of the plan that no graph calls.
    """

    wrong: tuple[str, ...]
    right: int
    missed: tuple[tuple[str, str, str], ...]
    unseen: tuple[str, ...]

    @property
    def unexplained(self) -> tuple[str, ...]:
        """The missed norms for which the plan gives no reason."""
        return tuple(norm for norm, _, reason in self.missed if not reason)

    @property
    def ok(self) -> bool:
        return not self.wrong and not self.unexplained


@dataclass
class Exported:
    """The graphs of one model, in eval and, where that can be exported, in train mode."""

    model: nn.Module
    graphs: dict[bool, Graph] = field(default_factory=dict)
    failed: dict[bool, str] = field(default_factory=dict)


@dataclass
class Graph:
    """One exported graph, its placeholders resolved to the tensors of the model."""

    nodes: list[fx.Node]
    tensors: dict[fx.Node, int]  # placeholder → id of the model's tensor
    static: set[fx.Node]  # what depends on no input of the model
    sources: dict[fx.Node, frozenset[int]]  # which tensors a static node was computed from


def export(
    model: nn.Module,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    modes: Iterable[bool] = (False, True),
) -> Exported:
    """Export ``model`` in the given modes; a mode in which it cannot be exported is named in ``failed``.

    The model is left in eval mode. Exporting in train mode runs no operator on real values.
    """
    found = Exported(model)
    for training in modes:
        # A copy: exporting some models caches tensors of the trace in them. Parameters keep their place by name.
        clone = copy.deepcopy(model).train(training)
        try:
            with _quiet(), torch.no_grad():
                program = torch.export.export(clone, tuple(inputs), dict(kwargs or {}), strict=False)
        except Exception as cause:
            found.failed[training] = f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}"[:120]
        else:
            found.graphs[training] = _read(program, model)
    model.eval()
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch.export tells of a model that it cannot export: the reason is in the exception."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _read(program: torch.export.ExportedProgram, model: nn.Module) -> Graph:
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    ids = {name: id(tensor) for name, tensor in _tensors(model)}
    nodes = list(program.graph.nodes)
    tensors = {node: ids[names[node.name]] for node in nodes if node.op == "placeholder" and node.name in names}
    constants = set(signature.inputs_to_lifted_tensor_constants) | set(signature.inputs_to_lifted_custom_objs)
    static: set[fx.Node] = set()
    sources: dict[fx.Node, frozenset[int]] = {}
    for node in nodes:
        if node.op == "placeholder":
            inside = node in tensors or node.name in constants
            own = frozenset({tensors[node]}) if node in tensors else frozenset()
        else:
            inside = node.op != "output" and all(n in static for n in node.all_input_nodes)
            own = frozenset().union(*(sources[n] for n in node.all_input_nodes if n in static))
        if inside:
            static.add(node)
            sources[node] = own
    return Graph(nodes, tensors, static, sources)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _op(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


# ------------------------------------------------------------------------------------------------- one norm


def find_pair(exported: Exported, norm: str) -> Pair:
    """Tell from the graphs which layer feeds a norm and nothing else.

    Args:
        exported: The graphs.
        norm: The norm, as a plan names it.
    """
    model = exported.model
    name, anchors = _anchors(model, norm)
    count, layers, feeding = 0, set(), defaultdict(set)
    for mode, graph in exported.graphs.items():
        for value in _entries(graph, anchors):
            count += 1
            layer, why = _producer(graph, value)
            if layer is None:
                return Pair(name, count, None, why)
            layers.add(graph.tensors[layer.args[1]])
            feeding[mode].add(layer)
    if not count:
        return Pair(name, 0, None, "no graph calls it")
    if len(layers) > 1:
        return Pair(name, count, None, "several layers feed it")
    (weight,) = layers
    for mode, graph in exported.graphs.items():
        if why := _other_reader(graph, weight, feeding[mode]):
            return Pair(name, count, None, why)
    owners = [fqn for fqn, module in model.named_modules() if id(module._parameters.get("weight")) == weight]
    if len(owners) != 1 or not isinstance(model.get_submodule(owners[0]), (_ConvNd, nn.Linear)):
        return Pair(name, count, None, f"{len(owners)} modules hold the weight, or one that is no layer does")
    return Pair(name, count, owners[0])


def _anchors(model: nn.Module, norm: str) -> tuple[str, set[int]]:
    """Return the name of the norm's first tensor, and its statistics (without, its γ and β), which are its own."""
    owner, _, name = norm.partition(":")
    if name:
        holder, _, leaf = name.rpartition(".")
        module = model.get_submodule(".".join(part for part in (owner, holder) if part))
        return f"{owner}.{name}".lstrip("."), {id(t) for t in (getattr(module, leaf, None),) if t is not None}
    module = model.get_submodule(owner)
    for names in (("running_mean", "running_var"), ("weight", "bias")):
        found = {id(tensor) for n in names if isinstance(tensor := getattr(module, n, None), Tensor)}
        if found:
            return f"{owner}.{names[0]}".lstrip("."), found
    return owner, set()


def _entries(graph: Graph, anchors: set[int]) -> list[Any]:
    """Return what each call of a norm takes: where a value of the model meets the norm's statistics.

    A frozen BatchNorm is arithmetic: of the operators that take its statistics those count that take no result of
    another.
    """
    meets = [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and node not in graph.static
        and any(n in graph.static and graph.sources[n] & anchors for n in node.all_input_nodes)
    ]
    arithmetic = {node for node in meets if _op(node) not in _BATCH_NORMS}
    entries: list[Any] = [node.args[0] for node in meets if node not in arithmetic]
    for node in arithmetic:
        entries += [n for n in node.all_input_nodes if n not in graph.static and n not in arithmetic]
    return entries


def _producer(graph: Graph, value: Any) -> tuple[Any, str]:
    """Return the call of a layer whose output is ``value`` and goes nowhere else, or None and why there is none."""
    axis = 1  # of ``value``, on which the norm has its channels
    while True:
        if not isinstance(value, fx.Node) or value.op != "call_function":
            return None, "an input of the model feeds it"
        consumers = [user for user in value.users if _op(user) not in _NO_VALUE]
        if len(consumers) != 1 or sum(n is value for n in _uses(consumers[0])) != 1:
            return None, f"{value.name} goes to {', '.join(user.name for user in consumers)}"
        if _op(value) not in _SAME and _op(value) not in _MOVES:
            break
        if _op(value) in (aten.dropout, aten.feature_dropout) and value.args[2]:
            return None, "dropout is in between"
        axis = _axis_before(value, axis)
        value = value.args[0]
    if _op(value) not in _LAYERS:
        return None, f"{value.target} feeds it"
    if value.args[1] not in graph.tensors:
        return None, f"the weight of {value.name} is computed"
    given, weight = value.meta["val"].ndim, value.args[1].meta["val"]
    channels = given - 1 if _op(value) is aten.linear else 1 - (weight.ndim - given)  # a sample alone has them first
    if axis != channels:
        return None, f"the channels of {value.name} are not the norm's: it has {given} axes"
    return value, ""


def _axis_before(node: fx.Node, axis: int) -> int:
    """Return which axis of its argument the axis of ``node``'s value was, as torch moves those of another tensor."""
    if _op(node) not in _MOVES:
        return axis
    sizes = range(2, 2 + node.args[0].meta["val"].ndim)
    return sizes.index(node.target(torch.empty(*sizes, device="meta"), *node.args[1:], **node.kwargs).shape[axis])


def _uses(node: fx.Node) -> list[fx.Node]:
    """Return every use that ``node`` makes of another, one that it makes twice being there twice."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)
    return found


def _other_reader(graph: Graph, weight: int, feeding: set[fx.Node]) -> str:
    """Return who reads the weight, or the bias beside it, but for the calls that feed the norm."""
    biases = {graph.tensors.get(call.args[2]) for call in feeding if len(call.args) > 2} - {None}
    for placeholder, tensor in graph.tensors.items():
        if tensor == weight or tensor in biases:
            for user in placeholder.users:
                own = user in feeding and sum(n is placeholder for n in _uses(user)) == 1
                if not own and _op(user) not in _NO_VALUE:
                    return f"{user.name} reads {placeholder.name}, too"
    return ""


# -------------------------------------------------------------------------------------------------- a plan


def name_in(model: nn.Module, norm: str) -> str:
    """The name in the original of a plan's norm: inside a subclass that was opened it has that of the subclass."""
    outer, names = norm.rpartition(".")[0], dict(model.named_modules(remove_duplicate=False))
    return norm if ":" in norm or norm in names or not outer else outer


def compare(plan: Plan, exported: Exported) -> Comparison:
    """Hold every site and every skipped norm of ``plan`` against the graphs."""
    wrong, missed, unseen = [], [], []
    right = 0
    model = exported.model
    for step in plan.steps:
        pair = find_pair(exported, name_in(model, step.site.norm))
        if not pair.calls:
            unseen.append(step.site.norm)
        elif step.site.layer is not None:
            if pair.layer is None or model.get_submodule(pair.layer) is not model.get_submodule(step.site.layer):
                truth = pair.layer or f"no layer, for {pair.why}"
                wrong.append(f"{step.site.norm}: the plan says {step.site.layer}, the graph says {truth}")
            else:
                right += 1
        elif pair.layer is not None:
            missed.append((step.site.norm, pair.layer, step.site.reason or ""))
    for skip in plan.skips:
        if skip.what != "norm" or skip.code in ("not-batch-norm", "functional-norm"):
            continue
        pair = find_pair(exported, name_in(model, skip.name))
        if pair.layer is not None:
            missed.append((skip.name, pair.layer, skip.reason))
        elif not pair.calls:
            unseen.append(skip.name)
    return Comparison(tuple(wrong), right, tuple(missed), tuple(unseen))
