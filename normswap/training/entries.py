"""What an optimizer or its state dict holds, by the old model's names: groups, options, states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from normswap.errors import InputError, argument
from normswap.storage.origin import Origin

__all__ = ["Foreign", "Layout", "layout_of", "names_of", "refuse_shapes"]


@dataclass(frozen=True)
class Foreign:
    """A parameter of a state dict that is none of the old model's, by its number there."""

    index: int


@dataclass(frozen=True)
class Layout:
    """An optimizer's groups and states. A member is an old parameter's name or, where it is none, anything else.

    Args:
        groups: The groups' members.
        options: The groups' options.
        states: The state of each member that has one.
    """

    groups: list[list[Any]]
    options: list[dict[str, Any]]
    states: dict[Any, Mapping[str, Any]]


def layout_of(given: Any) -> Layout:
    """Read a state dict; its members are numbers still.

    Raises:
        InputError: It is none.
    """
    groups = given.get("param_groups") if isinstance(given, Mapping) else None
    states = given.get("state") if isinstance(given, Mapping) else None
    sound = (
        isinstance(groups, list)
        and isinstance(states, Mapping)
        and all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups)
        and all(isinstance(number, int) for group in groups for number in group["params"])
        and all(isinstance(state, Mapping) for state in states.values())
    )
    if not sound:
        raise InputError(
            f"a {type(given).__name__} without 'state' and 'param_groups' of numbers is no optimizer",
            code="no-optimizer",
            hint="give an optimizer of torch.optim, or what its state_dict() returned",
        )
    assert isinstance(groups, list)
    assert isinstance(states, Mapping)
    options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    return Layout([list(group["params"]) for group in groups], options, dict(states))


def names_of(layout: Layout, origin: Origin, names: Sequence[str] | None) -> Layout:
    """Return a state dict's layout with the old model's names for its numbers.

    Raises:
        InputError: Which number is which parameter is not known.
    """
    skeleton = origin.skeleton
    shapes = {} if skeleton is None else {n: tuple(p.shape) for n, p in skeleton.named_parameters()}
    order = [number for group in layout.groups for number in group]
    stored = [name for options in layout.options for name in options.get("param_names") or ()]
    listed = list(names) if names is not None else stored if len(stored) == len(order) else list(shapes)
    if len(listed) != len(order):
        has = f"the old model has {len(listed)}" if names is None else f"{argument('names')} has {len(listed)}"
        raise InputError(
            f"the state dict is of {len(order)} parameters and {has}",
            code="optimizer-names",
            hint=f"give {argument('names')}, the old model's parameter names in the order in which the optimizer was "
            "given the parameters",
        )
    if names is not None and shapes and (unknown := [name for name in listed if name not in shapes]):
        raise InputError(
            f"the old model has no parameter '{unknown[0]}'",
            code="optimizer-names",
            hint="take the names from named_parameters() of the model as it was before the conversion",
        )
    known: dict[Any, Any] = {
        n: name if name in shapes or not shapes else Foreign(n) for n, name in zip(order, listed, strict=True)
    }
    if order and not any(isinstance(found, str) for found in known.values()):
        raise InputError(
            f"none of the names in the state dict, such as '{listed[0]}', is one of the old model's parameters",
            code="other-optimizer",
            hint=f"give {argument('names')}, the old model's parameter names in the order of the optimizer",
        )
    for number, state in layout.states.items():
        own = known.get(number)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and isinstance(own, str) and own in shapes:
                _refuse_other_shape(own, key, tuple(value.shape), shapes[own])
    return Layout(
        [[known[number] for number in group] for group in layout.groups],
        layout.options,
        {known[number]: state for number, state in layout.states.items() if number in known},
    )


def _refuse_other_shape(name: str, key: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise InputError(
            f"{key!r} of '{name}' has the shape {found}, the old model's parameter {wanted}",
            code="optimizer-shape",
            hint=f"give {argument('names')}, the old model's parameter names in the order of the optimizer; where the "
            "groups were made by hand it is another order than the model's",
        )


def refuse_shapes(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Raise where ``optimizer`` is about to load the state of other parameters; torch notices at the next step only."""
    layout = layout_of(state)
    pairs = zip(optimizer.param_groups, layout.groups, strict=False)
    for group, numbers in pairs:
        for parameter, number in zip(group["params"], numbers, strict=False):
            for key, value in layout.states.get(number, {}).items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    raise InputError(
                        f"{key!r} of parameter {number} has the shape {tuple(value.shape)}, the parameter of the "
                        f"converted model {tuple(parameter.shape)}: the state is of another model's optimizer",
                        code="optimizer-shape",
                        hint="give a BatchNorm model's state to normswap.migrate_optimizer(state_dict, result) first",
                    )
