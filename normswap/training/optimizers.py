"""Carry an optimizer through a swap: what it has for the old model's parameters becomes what it has for the new ones'.

How the entries of its state follow is in :mod:`normswap.training.states`; which old parameter a new one comes from, in
:mod:`normswap.stages.moves`.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normswap.errors import InputError, argument
from normswap.norms import LinearOf
from normswap.stages.moves import Moves
from normswap.storage.origin import Origin, origin_of
from normswap.training.entries import Layout, layout_of, names_of, refuse_shapes
from normswap.training.records import OptimizerMigration, OptimizerRow
from normswap.training.states import OPTIMIZERS, Entries, Held, carried, is_unchanged, refuse_misshapen, terms_of

__all__ = ["migrate_optimizer"]

_MIGRATED: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Moves]] = weakref.WeakKeyDictionary()
"""The conversion that an optimizer was last carried through."""


def migrate_optimizer(
    optimizer: Optimizer | Mapping[str, Any],
    result: Any,
    *,
    inplace: bool = False,
    names: Sequence[str] | None = None,
    kind: type[Optimizer] | None = None,
) -> OptimizerMigration:
    """Make an optimizer of the old model's parameters one of the converted model's: groups, momentum, step counts.

    A new parameter ``N = Σ_k T_k O_k`` takes the momentum's step over, ``Σ_k T_k step_k``, and the second moments of
    its main old parameter by ``1/f²``; ``normswap/training/states.py`` has the equations. Its group is that of the
    old parameter that it comes from. Other models' parameters stay as they are.

    Args:
        optimizer: The optimizer, before or after the conversion, or its state dict, which is not changed.
        result: What ``convert`` returned, or the converted model.
        inplace: Change the optimizer itself, so that schedulers go on with it, instead of returning another.
        names: For a state dict: the old model's parameter names in the optimizer's order. Default: those that the state
            dict holds, or those of all parameters, where they are as many and fit in shape.
        kind: For a state dict: the optimizer's class. Default: known by its entries.

    Returns:
        The optimizer with a row for each parameter.

    Raises:
        InputError: The class of optimizer is unknown, it holds nothing of the old model, or the model's conversion is
            not known; nothing is changed then.
    """
    model = getattr(result, "model", result)
    origin, moves = _known(model)
    if isinstance(optimizer, Optimizer):
        _refuse_wrapper(optimizer)
        entries = _entries_of(type(optimizer))
        return _of_optimizer(optimizer, model, moves, entries, inplace=inplace)
    layout = layout_of(optimizer)
    entries = _entries_of(kind) if kind is not None else _guessed(layout)
    layout = names_of(layout, origin, names)
    groups, states, rows = _migrated(layout, model, moves, entries)
    foreign = sum(not isinstance(entry, str) for group in layout.groups for entry in group)
    return OptimizerMigration(_as_state_dict(optimizer, groups, states), tuple(rows), foreign)


def _known(model: Any) -> tuple[Origin, Moves]:
    origin = origin_of(model) if isinstance(model, nn.Module) else None
    if origin is None:
        raise InputError(
            f"the {type(model).__name__} given as {argument('result')} is not what a conversion returned",
            code="not-converted",
            hint="give what normswap.convert returned, or its model",
        )
    if origin.moves is None:
        raise InputError(
            f"where the parameters of this {type(model).__name__} come from is not known: its file does not say it",
            code="no-moves",
            hint="convert the old model again and migrate with that; an older normswap wrote the file",
        )
    return origin, origin.moves


def _refuse_wrapper(optimizer: Optimizer) -> None:
    """Raise for what a training loop puts around the optimizer that has the state."""
    if type(optimizer) in OPTIMIZERS:
        return
    for name, held in vars(optimizer).items():
        if type(held) in OPTIMIZERS:
            raise InputError(
                f"the {type(optimizer).__name__} wraps the {type(held).__name__} in its attribute '{name}'",
                code="wrapped-optimizer",
                hint=f"give that one, optimizer.{name}, and {argument('inplace', True)}: the wrapper goes on with it",
            )


def _entries_of(kind: type) -> Entries:
    if kind not in OPTIMIZERS:
        known = ", ".join(one.__name__ for one in OPTIMIZERS)
        raise InputError(
            f"how the state of a {kind.__module__}.{kind.__qualname__} follows a swap is not known",
            code="unknown-optimizer",
            hint=f"start it afresh on the converted model's parameters; known are {known} of torch.optim",
        )
    return OPTIMIZERS[kind]


def _guessed(layout: Layout) -> Entries:
    """Return the entries of the optimizer whose state this is."""
    keys = {key for state in layout.states.values() for key in state if key not in ("step", "mu_product", "eta", "ax")}
    if not keys:
        return {}
    found = next((entries for entries in OPTIMIZERS.values() if keys <= entries.keys()), None)
    if found is None:
        raise InputError(
            f"the state dict holds {', '.join(sorted(map(str, keys)))}: of which optimizer it is, is not known",
            code="unknown-optimizer",
            hint=f"give {argument('kind')}, its class, or start afresh on the converted model's parameters",
        )
    return found


def _of_optimizer(
    optimizer: Optimizer, model: nn.Module, moves: Moves, entries: Entries, *, inplace: bool
) -> OptimizerMigration:
    own = {id(ref()): name for name, refs in moves.old.items() for ref in refs if ref() is not None}
    parameters = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    new = dict(model.named_parameters())
    _refuse_migrated(optimizer, moves, {id(p): name for name, p in new.items() if id(p) not in own})
    if not any(id(tensor) in own for tensor in parameters):
        raise InputError(
            f"none of the {len(parameters)} parameters of the {type(optimizer).__name__} is one of the old model's",
            code="other-optimizer",
            hint="give the optimizer of the model that was converted; after loading a conversion from a file, give "
            "optimizer.state_dict()",
        )
    layout = Layout(
        [[own.get(id(tensor), tensor) for tensor in group["params"]] for group in optimizer.param_groups],
        [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
        {own.get(id(tensor), tensor): state for tensor, state in optimizer.state.items()},
    )
    groups, states, rows = _migrated(layout, model, moves, entries)
    made = optimizer if inplace else copy.copy(optimizer)
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    for entry, found in ((entry, found) for entry, found in states.items() if found):
        state[new[entry] if isinstance(entry, str) else entry] = (
            found
            if inplace or isinstance(entry, str)
            else {key: value.clone() if isinstance(value, Tensor) else value for key, value in found.items()}
        )
    listed = []
    for group, members in zip(optimizer.param_groups, groups, strict=True):
        fresh = group if inplace else dict(group)
        fresh["params"] = [new[entry] if isinstance(entry, str) else entry for entry in members]
        if "param_names" in group:
            held = {id(tensor): name for tensor, name in zip(group["params"], group["param_names"], strict=False)}
            fresh["param_names"] = [e if isinstance(e, str) else held.get(id(e), "") for e in members]
        listed.append(fresh)
    made.param_groups, made.state = listed, state
    if not inplace:
        made.defaults = dict(optimizer.defaults)
    _start(made, state)
    made.register_load_state_dict_pre_hook(refuse_shapes)
    _MIGRATED[made] = weakref.ref(moves)
    foreign = sum(id(tensor) not in own for tensor in parameters)
    return OptimizerMigration(made, tuple(rows), foreign)


def _refuse_migrated(optimizer: Optimizer, moves: Moves, new: Mapping[int, str]) -> None:
    """Raise where the optimizer is the converted model's already: what it holds would be mapped once more."""
    held = next((new[id(t)] for group in optimizer.param_groups for t in group["params"] if id(t) in new), None)
    known = _MIGRATED.get(optimizer)
    if held is not None or (known is not None and known() is moves):
        what = "it was migrated before" if held is None else f"it holds '{held}'"
        raise InputError(
            f"the {type(optimizer).__name__} is one of the converted model already: {what}",
            code="migrated-already",
            hint="go on with it; to migrate again, give the old model's optimizer",
        )


def _start(optimizer: Optimizer, state: defaultdict[Tensor, Any]) -> None:
    """Give parameters without a state what Adagrad gives them when it is made; others do so at the first step."""
    if type(optimizer) is torch.optim.Adagrad:
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if not state[tensor]:
                    total = torch.full_like(tensor, group["initial_accumulator_value"], requires_grad=False)
                    state[tensor] = {"step": torch.tensor(0.0), "sum": total}


def _migrated(
    layout: Layout, model: nn.Module, moves: Moves, entries: Entries
) -> tuple[list[list[Any]], dict[Any, Mapping[str, Any]], list[OptimizerRow]]:
    """Return the groups' members, new parameters by name and foreign ones as they were, with the states and rows."""
    held = {
        entry: Held(place, layout.options[place], layout.states.get(entry, {}))
        for place, group in enumerate(layout.groups)
        for entry in group
        if isinstance(entry, str)
    }
    refuse_misshapen(held, moves, model, entries)
    new = dict(model.named_parameters())
    own: dict[int, list[str]] = defaultdict(list)
    rows, states = [], {entry: state for entry, state in layout.states.items() if not isinstance(entry, str)}
    for name, value in new.items():
        move = moves.moves.get(name)
        wanted = [name] if move is None else [*move.near, *(term.old for term in move.terms)]
        home = next((old for old in wanted if old in held), None)
        if home is None:
            rows.append(OptimizerRow(name, "not held", "the optimizer holds nothing that it comes of"))
            continue
        own[held[home].group].append(name)
        filters = None if move is None or move.filters is None else new[move.filters]
        states[name] = carried(name, value, filters, moves, held, held[home].options, entries)
        rows.append(_row(name, states[name], moves, held))
    groups = [_members(group, own[place]) for place, group in enumerate(layout.groups)]
    successors: dict[str, list[str]] = defaultdict(list)
    for name in new:
        for term in terms_of(name, moves):
            successors[term.old].append(name)
    for old in held:
        if old not in new:
            into = ", ".join(successors[old])
            rows.append(OptimizerRow(old, "gone", f"into {into}" if into else "nothing takes it up"))
    return groups, states, rows


def _members(group: Sequence[Any], own: Sequence[str]) -> list[Any]:
    """Return a group's new members: those of the model, in its order, where its first one was; foreign ones stay."""
    first = next((place for place, entry in enumerate(group) if isinstance(entry, str)), len(group))
    return [*group[:first], *own, *(entry for entry in group[first:] if not isinstance(entry, str))]


def _row(name: str, state: Mapping[str, Any], moves: Moves, held: Mapping[str, Held]) -> OptimizerRow:
    terms = terms_of(name, moves)
    if not state:
        if not terms:
            return OptimizerRow(name, "fresh", moves.moves[name].reason)
        without = [term.old for term in terms if term.old in held and not held[term.old].state]
        why = "it had taken no step" if without else "is not in the optimizer"
        return OptimizerRow(name, "fresh", f"{(without or [terms[0].old])[0]}: {why}")
    if is_unchanged(name, moves):
        return OptimizerRow(name, "unchanged", "" if terms[0].old == name else f"from {terms[0].old}")
    used = [term for term in terms if term.old in held and held[term.old].state]
    return OptimizerRow(name, "mapped", "from " + ", ".join(map(_words, used)))


def _words(term: LinearOf) -> str:
    return f"{term.old} ({term.along.name.lower()})"


def _as_state_dict(
    given: Mapping[str, Any], groups: list[list[Any]], states: Mapping[Any, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a state dict of the same groups with members numbered anew."""
    numbers: dict[Any, int] = {}
    for group in groups:
        for entry in group:
            numbers[entry] = len(numbers)
    listed = []
    for group, members in zip(given["param_groups"], groups, strict=True):
        fresh = {**group, "params": [numbers[entry] for entry in members]}
        if "param_names" in group:
            held = dict(zip(group["params"], group["param_names"], strict=False))
            fresh["param_names"] = [e if isinstance(e, str) else held.get(e.index, "") for e in members]
        listed.append(fresh)
    state = {numbers[entry]: copy.copy(dict(found)) for entry, found in states.items() if found and entry in numbers}
    return {**given, "state": state, "param_groups": listed}
