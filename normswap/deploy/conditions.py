"""A class-conditional model at one class: the argument that gives the class becomes a constant.

Conditional BatchNorm is ``y = γ_k (x − μ)/σ + β_k`` with k the sample's class. At one class γ_k and β_k are one factor
and one summand of each channel, which folding merges into a neighbour. Here the model is traced, the class is written
into the graph, and each product, sum, difference and quotient of what depends on data with what depends on the class
alone becomes a per-channel affine. What the class gives otherwise stays as it is, computed in each call.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from normswap.checks.self_check import eval_output
from normswap.deploy.affines import is_hooked
from normswap.deploy.class_affines import class_affines
from normswap.deploy.class_values import kinds_of, meetings, writes
from normswap.deploy.held_arguments import free_arguments, graph_of, no_graph
from normswap.deploy.in_place import out_of_place
from normswap.deploy.other_inputs import other_data, with_samples
from normswap.deploy.rows import FoldRow
from normswap.errors import InputError, argument, first_line
from normswap.nn import ChannelAffine
from normswap.runs.inputs import Inputs

__all__ = ["AtClass", "at_class", "without_identities"]


@dataclass(frozen=True)
class AtClass:
    """A model at one class.

    Args:
        model: A graph of the model without the argument that gave the class; its modules are the model's own.
        original: The inputs of the model as it was, of that class.
        inputs: The inputs of the model at the class.
        held: Which other arguments are held at a value that is not their default.
        left: What of the class is still computed in each call, and why.
    """

    model: fx.GraphModule
    original: Inputs
    inputs: Inputs
    held: tuple[FoldRow, ...]
    left: tuple[FoldRow, ...]


def at_class(model: nn.Module, condition: Mapping[str, int], inputs: Inputs | None) -> AtClass:
    """Return ``model``, in eval mode, at one class.

    Args:
        model: The model. It loses nothing but to the graph that is returned, which holds its modules.
        condition: The name of the argument that gives the class, and the class.
        inputs: Example inputs, with the class as a whole number for each sample, or one for all.

    Raises:
        InputError: There is no such argument, it gives no class, or there are no example inputs.
        FoldError: The model's forward cannot be written as a graph.
    """
    name, index = _condition(condition)
    if inputs is None:
        raise InputError(
            f"{argument('condition')} needs inputs, which show what the class gives",
            code="fold-condition",
            hint=f"give {argument('example_inputs')}, the class among them",
        )
    whole = _bound(model, inputs, name)
    label = _of_class(name, whole[name], index)
    whole[name] = label
    eval_output(model, whole)  # it has such a class
    graph, given = graph_of(model, whole), free_arguments(whole)
    if label.ndim and not with_samples(given, name):
        raise InputError(
            f"no other argument of {type(model).__name__} has as many samples as '{name}'",
            code="fold-condition",
            hint="give example inputs of one batch size",
        )
    traced = fx.GraphModule(model, graph, class_name=type(model).__name__).eval()
    try:
        out_of_place(traced, given, other_data(given, name))
        shown = class_affines(traced, given, name, meetings(graph, kinds_of(graph, name)))
    except Exception as cause:
        raise no_graph(model, f"its graph does not run: {type(cause).__name__}: {first_line(cause)}") from cause
    _fix(traced, name, index, label, (*shown.batch, *with_samples(given, name))[0] if label.ndim else None)
    for node, affine in shown.found.items():
        _put_affine(traced, node, shown.calls[node].place, affine)
    graph.eliminate_dead_code(lambda node: node.is_impure() or writes(node))
    traced.delete_all_unused_submodules()
    traced.recompile()
    rest = {key: value for key, value in given.items() if key != name}
    return AtClass(traced, whole, rest, tuple(_held(model, whole)), tuple(_left(name, shown.left, model)))


def _held(model: nn.Module, given: Mapping[str, Any]) -> Iterator[FoldRow]:
    """Yield a row for each argument that the model at the class does not take and is called with in the example."""
    parameters = inspect.signature(model.forward).parameters
    for name, value in given.items():
        default = parameters[name].default
        if name not in free_arguments(given) and (type(value), value) != (type(default), default):
            yield FoldRow(name, f"held at {value!r}")


def _left(name: str, why: Mapping[fx.Node, str], model: nn.Module) -> Iterator[FoldRow]:
    """Yield a row for each reason for which something of the class stays."""
    for reason in dict.fromkeys(why.values()):
        where = ", ".join(dict.fromkeys(_place(node, model) for node in why if why[node] == reason))
        yield FoldRow(name, "computed in each call", f"what it gives to {where} {reason}")


def without_identities(model: fx.GraphModule) -> None:
    """Take what folding has left nothing of out of a graph."""
    for node in list(model.graph.nodes):
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(module) is nn.Identity and not is_hooked(module):
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
    model.delete_all_unused_submodules()
    model.recompile()


def _place(node: fx.Node, model: nn.Module) -> str:
    found = node.target if node.op == "call_module" else node.meta.get("owner")
    return f"'{found}'" if found else f"the {type(model).__name__}"


def _condition(condition: Any) -> tuple[str, int]:
    pairs: list[tuple[Any, Any]] = [*condition.items()] if isinstance(condition, Mapping) else []
    if len(pairs) == 1 and isinstance(pairs[0][0], str) and pairs[0][0]:
        name, index = pairs[0]
        if isinstance(index, (int, np.integer)) and not isinstance(index, bool) and index >= 0:
            return name, int(index)
    given = dict(pairs) if isinstance(condition, Mapping) else condition
    raise InputError(
        f"{argument('condition', given)} is no class",
        code="fold-condition",
        hint=f"give the argument's name and the class's number: {argument('condition', {'label': 3})}",
    )


def _of_class(name: str, label: Any, index: int) -> Tensor:
    """Return labels as ``label``, all of the class ``index``."""
    whole = isinstance(label, Tensor) and not label.is_floating_point() and not label.is_complex()
    if not whole or label.ndim > 1 or label.dtype is torch.bool:
        what = f"{label.dtype} of shape {tuple(label.shape)}" if isinstance(label, Tensor) else type(label).__name__
        raise InputError(
            f"'{name}' is no class of each sample: it is a {what}",
            code="fold-condition",
            hint="only a whole number for each sample can be held at one value: of a map, a vector or a mixture of "
            "classes γ and β differ from sample to sample",
        )
    if index > torch.iinfo(label.dtype).max:
        raise InputError(
            f"{index} is no class that '{name}' can give: its numbers are {label.dtype}",
            code="fold-condition",
            hint="give a class that the model has",
        )
    return torch.full_like(label, index)


def _bound(model: nn.Module, inputs: Inputs, name: str) -> dict[str, Any]:
    """Return the arguments of a call on ``inputs`` by name."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(**inputs) if isinstance(inputs, Mapping) else signature.bind(*inputs)
    except TypeError as cause:
        raise InputError(
            f"the inputs do not fit {type(model).__name__}: {cause}", code="model-does-not-run", hint="give others"
        ) from cause
    if name not in bound.arguments:
        raise InputError(
            f"the example inputs give {type(model).__name__} no '{name}'",
            code="fold-condition",
            hint=f"its arguments are {', '.join(signature.parameters)}",
        )
    kinds = {signature.parameters[key].kind for key in bound.arguments}
    if kinds - {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}:
        raise no_graph(model, "it is given arguments without a name, or any number of them")
    return dict(bound.arguments)


def _fix(traced: fx.GraphModule, name: str, index: int, label: Tensor, batch: str | None) -> None:
    """Write the class into the graph, for as many samples as the argument ``batch`` has."""
    graph = traced.graph
    places = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    last = [*places.values()][-1]
    with graph.inserting_after(last):
        if batch is None:
            new = graph.call_function(torch.full, ((), index), {"dtype": label.dtype, "device": label.device})
        else:
            size = graph.call_method("size", (places[batch], 0))
            device = graph.call_function(getattr, (places[batch], "device"))
            new = graph.call_function(torch.full, ((size,), index), {"dtype": label.dtype, "device": device})
            last.append(size)
            size.append(device)
            device.append(new)
    places[name].replace_all_uses_with(new)
    graph.erase_node(places[name])


def _put_affine(traced: fx.GraphModule, node: fx.Node, place: int, affine: ChannelAffine) -> None:
    """Put an affine in the place of ``node``, whose data is the argument at ``place``."""
    stem = f"{node.meta.get('owner') or 'model'}_affine".replace(".", "_")
    name = next(name for n in itertools.count() if not hasattr(traced, name := f"{stem}{n or ''}"))
    traced.add_submodule(name, affine.eval())
    with traced.graph.inserting_after(node):
        call = traced.graph.call_module(name, (node.args[place],))
    node.replace_all_uses_with(call)
