"""What of a graph depends on the class alone, and where it meets what depends on data.

Note [What the class alone gives]
A value depends on the class alone where it is computed from the class and the model's tensors. It may have the batch's
size or a map's, as in ``gain(y).view(x.size(0), -1, 1, 1)``, but must not be computed with these. Runs show whether it
is an affine (:mod:`normswap.deploy.class_affines`).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from normswap.operations.table import reads_no_value

__all__ = ["PARTS", "Kind", "Meeting", "kinds_of", "meetings", "writes"]


class Kind(Enum):
    """What a value of the graph depends on."""

    NOTHING = auto()
    """The model's tensors alone."""
    CLASS = auto()
    """The class as well (Note [What the class alone gives])."""
    FORM = auto()
    """It is a size or the like, and no value."""
    DATA = auto()
    """More than that."""


_FORMS = ("view", "reshape", "expand", "repeat", "expand_as", "view_as", "reshape_as", "type_as", "to")
_FORMED = {F.interpolate, *_FORMS}
"""What gives a value another form: arguments behind the first tell nothing of its values."""

_IN_PLACE = ("iadd", "isub", "imul", "itruediv")

PARTS: Mapping[Any, str] = {
    target: name
    for name, targets in {
        "mul": (operator.mul, torch.mul, "mul"),
        "add": (operator.add, torch.add, "add"),
        "sub": (operator.sub, torch.sub, "sub"),
        "div": (operator.truediv, torch.div, torch.true_divide, "div"),
    }.items()
    for target in targets
}
"""The operations of two values that may be affines."""


def kinds_of(graph: fx.Graph, name: str) -> dict[fx.Node, Kind]:
    """Return what each value of a graph depends on; the argument ``name`` gives the class."""
    found: dict[fx.Node, Kind] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            found[node] = Kind.CLASS if node.target == name else Kind.DATA
        elif node.op == "get_attr":
            found[node] = Kind.NOTHING
        elif reads_no_value(node):
            found[node] = Kind.FORM
        else:
            found[node] = _kind(node, found)
    return found


def _kind(node: fx.Node, known: Mapping[fx.Node, Kind]) -> Kind:
    kinds = {known[one] for one in node.all_input_nodes}
    if Kind.CLASS in kinds and writes(node):
        return Kind.DATA
    if kinds <= {Kind.NOTHING, Kind.CLASS}:
        return Kind.CLASS if Kind.CLASS in kinds else Kind.NOTHING
    first = node.args[0] if node.args else None
    if node.target in _FORMED and isinstance(first, fx.Node) and known[first] in (Kind.NOTHING, Kind.CLASS):
        return known[first]
    sizes = kinds <= {Kind.NOTHING, Kind.FORM} and getattr(node.target, "__module__", "") == "_operator"
    return Kind.FORM if sizes else Kind.DATA


def writes(node: fx.Node) -> bool:
    """Tell whether a call may write to what it is given."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name in ("setitem", *_IN_PLACE) or (name.endswith("_") and not name.endswith("__"))
    return (node.op in ("call_method", "call_function") and in_place) or bool(node.kwargs.get("inplace"))


@dataclass(frozen=True)
class Meeting:
    """A call of two values, as it stands in the graph before anything in it is replaced.

    Args:
        part: What is called, of :data:`PARTS`.
        of_class: What the class gives.
        data: What depends on data.
        place: The place of the data among the call's arguments: 0 in ``x − β``, 1 in ``β − x``.
    """

    part: str
    of_class: fx.Node
    data: fx.Node
    place: int


def meetings(graph: fx.Graph, kinds: Mapping[fx.Node, Kind]) -> dict[fx.Node, Meeting | None]:
    """Return the calls in which data meets the class: those of the two alone as a meeting, others as None."""
    written = {one for node in graph.nodes if writes(node) for one in node.all_input_nodes}
    found: dict[fx.Node, Meeting | None] = {}
    for node in graph.nodes:
        of = [one for one in node.all_input_nodes if kinds[one] is Kind.CLASS]
        if not of or (kinds[node] is not Kind.DATA and node.op != "output"):
            continue
        others = [one for one in node.all_input_nodes if kinds[one] is Kind.DATA]
        plain = node.target in PARTS and len(node.args) == 2 and not node.kwargs
        alone = plain and len(of) == len(others) == 1 and of[0] not in written
        if alone:
            found[node] = Meeting(PARTS[node.target], of[0], others[0], node.args.index(others[0]))
        else:
            found[node] = None
    return found
