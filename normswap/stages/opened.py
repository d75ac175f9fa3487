"""A model with its BatchNorm subclasses opened, for as long as it is planned and converted (Note [Opened norms])."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import fx, nn

from normswap.graph.bytecode import codes_of, has_code
from normswap.graph.calls import Calls
from normswap.graph.code_reads import reads_in_code
from normswap.graph.opening import opened_form
from normswap.graph.symbolic import capture_symbolic
from normswap.runs.modes import held_modules
from normswap.stages.references import referenced

__all__ = ["Opened", "opened"]

_Forms = dict[int, tuple[fx.GraphModule, str]]
"""What stands for a norm, and the name of the plain norm in it, by the norm's id."""


@dataclass
class Opened:
    """The norms of a model that were opened.

    Args:
        norms: Each as it was, and the name of the plain norm in what stands there now, by each of its fqns.
    """

    norms: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)

    def close(self, model: nn.Module) -> None:
        """Put back each norm that nothing has taken the place of, in the model that was opened or in a copy of it."""
        closed: dict[int, nn.Module] = {}
        for fqn, (norm, name) in self.norms.items():
            parent, _, child = fqn.rpartition(".")
            holder = model.get_submodule(parent)
            form = holder._modules[child]
            plain = form._modules.get(name) if isinstance(form, fx.GraphModule) else None
            if plain is None or not isinstance(norm, type(plain)):  # it was made as one of a base of the norm's class
                continue
            if id(form) not in closed:
                closed[id(form)] = _with_tensors_of(norm, plain)
            holder._modules[child] = closed[id(form)]


def _with_tensors_of(norm: nn.Module, plain: nn.Module) -> nn.Module:
    """Return ``norm`` itself where ``plain`` was made of it, else a copy that has the tensors of ``plain``."""
    if plain._parameters is not norm._parameters:
        tensors = {id(t): t for t in (*norm._parameters.values(), *norm._buffers.values()) if t is not None}
        norm = copy.deepcopy(norm, dict(tensors))
        norm.__dict__["_parameters"], norm.__dict__["_buffers"] = plain._parameters, plain._buffers
    norm.__dict__["training"] = plain.training
    return norm


@contextmanager
def opened(model: nn.Module) -> Iterator[Opened]:
    """Open the norms of ``model`` that can be, in place; on leaving, those that nothing has replaced are put back."""
    found = Opened()
    forms = {id(m): form for m in model.modules() if m is not model and (form := opened_form(m)) is not None}
    if forms:
        forms = _with_the_same_mode(model, forms)
        for id_of_norm in _seen_from_outside(model, forms):
            del forms[id_of_norm]
    _place(model, forms, found)
    try:
        yield found
    finally:
        found.close(model)


def _place(model: nn.Module, forms: _Forms, found: Opened) -> None:
    for fqn, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in forms:
            graph, name = forms[id(module)]
            found.norms[fqn] = module, name
            parent, _, child = fqn.rpartition(".")
            model.get_submodule(parent)._modules[child] = graph


def _with_the_same_mode(model: nn.Module, forms: _Forms) -> _Forms:
    """Return those of ``forms`` that the model keeps in one mode, by a ``train()`` of its own, as it does the norms.

    What a norm has inside would not follow: those that are kept and have modules of their own are left out.
    """
    before, found = held_modules(model), Opened()
    norms = {id(module): module for module in model.modules() if id(module) in forms}
    _place(model, forms, found)
    try:
        after = held_modules(model)
    finally:
        found.close(model)
    same = {}
    for key, (graph, name) in forms.items():
        plain = id(graph.get_submodule(name))
        is_held = key in before.in_eval | before.in_train
        agree = (key in before.in_eval, key in before.in_train) == (plain in after.in_eval, plain in after.in_train)
        if agree and not (is_held and norms[key]._modules):
            same[key] = graph, name
    return same


def _seen_from_outside(model: nn.Module, forms: _Forms) -> list[int]:
    """Return the ids of the norms of which the model's code has, or may have, more than the call."""
    capture = capture_symbolic(model)
    calls, named = Calls(capture), reads_in_code(capture)
    modules = [module for module in capture.modules.values() if has_code(module)]
    codes = [found.code for module in modules for found in codes_of(module)]
    strings = frozenset[str]().union(*(code.strings for code in codes))  # getattr(norm, "axes")
    just_named = strings.union(*(code.names for code in codes))
    values = strings.union(*(code.values for code in codes))
    elsewhere = referenced(model)
    plain = nn.SyncBatchNorm(1)  # has what any of torch's has
    functional = {key for key, (_, norm) in calls.functional.items() if norm.holder} | {*calls.refused}
    seen = []
    for fqn, module in capture.modules.items():
        if id(module) not in forms:
            continue
        methods = {name for kind in type(module).__mro__ for name in vars(kind)} - {*dir(plain)}
        tensors = (*module._parameters.values(), *module._buffers.values())
        if (
            fqn in named
            or id(module) in elsewhere
            or fqn in functional
            or any(calls.reads(tensor) for tensor in tensors if tensor is not None)
            or methods & just_named
            or ({*vars(module)} - {*vars(plain)}) & values
        ):
            seen.append(id(module))
    return seen
