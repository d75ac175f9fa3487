"""A recurrent layer in whose place one of another class comes: when it may not, and what goes along."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from normswap.errors import PlanError, argument
from normswap.graph.bytecode import codes_of, has_code
from normswap.nn.kinds import class_of
from normswap.nn.recurrent import additions_to, hand_on
from normswap.recipes.recurrent import RecurrentRecipe
from normswap.records import Plan, RecurrentSite
from normswap.runs.settings import settings_kept
from normswap.stages.misfits import submodule

__all__ = ["replaced", "why_irreplaceable"]


def why_irreplaceable(model: nn.Module, module: nn.Module) -> str | None:
    """Return who holds the layer beside the module tree or asks for its class, or what it alone has; None if no one."""
    if module is model:
        return "the model is the layer itself, in whose place another would come: put it into a module"
    for fqn, owner in model.named_modules():
        for name, value in vars(owner).items():
            if name != "_modules" and _holds(value, module, 3):
                return f"{'.'.join(filter(None, (fqn, name)))} holds it, too, and would go on to hold it"
        if has_code(owner):
            names = frozenset[str]().union(*(found.code.names for found in codes_of(owner)))
            if names & {"isinstance", "type", "__class__"} and names & {"LSTM", "LSTMCell"}:
                return f"the forward of {class_of(owner).__name__} asks for its class"
    return next((why for name, value in additions_to(module).items() if (why := _why_own(module, name, value))), None)


def _holds(value: Any, module: nn.Module, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    return value is module or (depth > 0 and any(_holds(one, module, depth - 1) for one in inner))


def _why_own(module: nn.Module, name: str, value: Any) -> str | None:
    """Return why an attribute cannot go over to a layer of another class, or None."""
    if callable(value) and not isinstance(value, nn.Module):
        return f"its {name} was set on it alone, and may be code that is for a {class_of(module).__name__}"
    if hasattr(type(module), name):
        return f"its {name} was replaced on it alone"
    return None


def replaced(model: nn.Module, plan: Plan, site: RecurrentSite, old: nn.Module, recipe: RecurrentRecipe) -> nn.Module:
    """Put another layer into the place of ``old``, with its mode, its hooks and what was added to it, and return it.

    Each tensor trains where the one of its name does; a new one does where the matrix does that it normalizes.

    Raises:
        PlanError: What was added to ``old`` cannot go over to the new layer.
    """
    with settings_kept():  # a layer draws its first values, none of which stays
        new = recipe.replacement(old).train(old.training)
    added = additions_to(old)
    for name, value in added.items():
        why = _why_own(old, name, value)
        if why is None and hasattr(new, name):
            why = f"its {name} has the name of something else in a {type(new).__name__}"
        if why is not None:
            raise PlanError(
                f"'{site.name}' cannot be replaced: {why}",
                code="layer-additions",
                hint=f"leave the layer out ({argument('exclude', [site.name])})",
            )
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(_trains(old, name))
    hand_on(old, new, added)
    for name in site.names:
        parent, _, child = name.rpartition(".")
        submodule(model, parent, plan)._modules[child] = new
    return new


def _trains(old: nn.Module, name: str) -> bool:
    """Tell whether a tensor of the new layer trains: ``bias_ih_l0``, or ``ln_hh_weight_l0``, of the norm of W_hh."""
    of = old._parameters.get(name)
    if of is None and (part := re.search(r"_(ih|hh)(?:_weight|_bias)?(_l\d+(?:_reverse)?)?$", name)):
        of = old._parameters.get(f"weight_{part[1]}{part[2] or ''}")
    return any(p.requires_grad for p in old.parameters()) if of is None else of.requires_grad
