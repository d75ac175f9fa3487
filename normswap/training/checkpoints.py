"""Carry a checkpoint through a swap: the state dict of the old model becomes one of the converted model, or back.

Forward, the recorded plan is carried out again on the model as it was, with the checkpoint's values in it, as a
conversion without data does. Back, see :mod:`normswap.training.restoring`. A state dict of torch's old
``weight_norm`` becomes one of its parametrization, and the reverse, by names alone: ``weight_g`` and ``weight_v`` are
``parametrizations.weight.original0`` and ``original1``, of the same shapes for every ``dim``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import InputError, argument
from normswap.graph import capture
from normswap.graph.dataflow import Dataflow
from normswap.initialization.absorb import Absorb
from normswap.initialization.base import Work
from normswap.initialization.equalization import equalize
from normswap.initialization.missing import missing_statistics
from normswap.loading.names import COUNTER, match
from normswap.loading.weight_norm_names import renamed
from normswap.options import Options
from normswap.recipes.recurrent import make_recurrent
from normswap.records import Plan
from normswap.runs.guard import copy_of
from normswap.stages.bound import bind
from normswap.stages.opened import opened
from normswap.stages.rewriting import rewrite
from normswap.storage.contents import differences
from normswap.storage.origin import Origin, origin_of, slots, substituted
from normswap.storage.replay import history
from normswap.training.records import StateDictMigration
from normswap.training.restoring import restored

__all__ = ["migrate_state_dict"]

_FORMS = ("converted", "batchnorm")


def migrate_state_dict(old: Mapping[str, Tensor], model: Any, *, to: str | None = None) -> StateDictMigration:
    """Return the state dict that a converted model has with the values of an old one, or the reverse.

    For a later checkpoint of the same training, an average of weights, another fold. With an exact recipe (``wn``,
    ``wn+mobn``, ``mobn``, ``streaming``, ``none``) both are the same function in evaluation, up to rounding. With
    another, the checkpoint is converted as without data, whatever data the conversion had; a report says so.

    Back, γ, μ and σ are told apart by what the conversion remembers of the old ones, so that there and back gives the
    same values where they have not been trained meanwhile; ``W' = γ/σ·W`` alone would not tell.

    Args:
        old: The state dict; not changed. Keys of torch's old ``weight_norm`` are understood, and given where the model
            has them. So are names with a wrapper's parts in them (``module.``, ``_orig_mod.`` and their likes), as
            DistributedDataParallel, compiled models and AveragedModel give.
        model: What ``convert`` returned, the converted model, or any model whose state dict differs by the names of
            weight normalization alone. Only read.
        to: ``"converted"`` or ``"batchnorm"``. Default: the other one than ``old`` is of, by its keys.

    Returns:
        The state dict, of the dtypes of the model.

    Raises:
        InputError: The state dict is of neither form, or an inexact recipe cannot be taken back.
    """
    model = getattr(model, "model", model)
    _refuse_unusable(old, model, to)
    if origin_of(model) is None:
        state = _renamed(old, model)
        if different := _misfit(state, model):
            raise _neither(model, [("it", different)])
        return StateDictMigration(state, "renamed", True)
    origins = history(model)
    first = origins[0].skeleton
    if first is None:
        raise InputError(
            f"the {type(model).__name__} as it was before its conversion is not known: it could not be copied",
            code="no-skeleton",
            hint="load the checkpoint into the old model and convert that",
        )
    misfits = {form: _misfit(_renamed(old, one), one) for form, one in (("batchnorm", first), ("converted", model))}
    if to is None:
        to = "converted" if not misfits["batchnorm"] else "batchnorm"
    given = "batchnorm" if to == "converted" else "converted"
    if misfits[given]:
        raise _neither(
            model, [(f"as that of the {'old' if f == 'batchnorm' else 'converted'} model", misfits[f]) for f in misfits]
        )
    if to == "converted":
        return _forward(old, model, origins)
    return _back(old, model, origins)


def _refuse_unusable(old: Any, model: Any, to: str | None) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{argument('model')} is a {type(model).__name__}",
            code="not-a-model",
            hint="give what normswap.convert returned, or a model",
        )
    if not isinstance(old, Mapping) or not all(isinstance(name, str) for name in old):
        raise InputError(
            f"a {type(old).__name__} is no state dict", code="no-state-dict", hint="give what state_dict() returned"
        )
    if to is not None and to not in _FORMS:
        raise InputError(
            f"{argument('to', to)} is unknown", code="unknown-form", hint=f"choose from {', '.join(_FORMS)}"
        )


def _renamed(old: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return ``old`` with the names that ``model`` has: weight normalization's in its form, none of a wrapper's."""
    expected = model.state_dict(keep_vars=True)
    found = match(old, expected)
    others = {*found.foreign.values(), *found.outside}
    if found.problems or any(name.rpartition(".")[2] != COUNTER for name in others):
        return renamed(old, expected)  # tells best where it does not fit
    return {name: old[own] for name, own in found.names.items()}


def _misfit(state: Mapping[str, Any], model: nn.Module) -> str:
    """Return in words where a state dict does not fit a model, '' where it does."""
    wanted = {name: _shape(value) for name, value in model.state_dict(keep_vars=True).items()}
    return differences({name: _shape(value) for name, value in state.items()}, wanted, "it", "the model")


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else "no tensor"


def _neither(model: nn.Module, found: Sequence[tuple[str, str]]) -> InputError:
    return InputError(
        f"the state dict does not fit the {type(model).__name__}: "
        + "; ".join(f"{form}, {different}" for form, different in found),
        code="state-dict-mismatch",
        hint="give a state dict of the model that was converted, or of the converted one; where a "
        "checkpoint holds more than that, give the entry that holds it, such as checkpoint['state_dict']",
    )


def _filled(skeleton: nn.Module, state: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """Return a model as ``skeleton`` that holds ``state``; what no state dict has it takes from ``model``."""
    there = {slot.name: slot.tensor for slot in slots(model)}
    values: dict[int, Tensor] = {}
    for slot in slots(skeleton):
        old = slot.tensor
        if id(old) in values or not old.is_meta:
            continue
        same = there.get(slot.name)
        new = torch.zeros_like(old, device="cpu")
        if same is not None and same.shape == old.shape and not same.is_meta:
            new.copy_(same.detach())
        values[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    filled = substituted(skeleton, values)
    try:
        filled.load_state_dict(dict(state))
    except Exception as cause:
        raise InputError(
            f"the state dict does not load into the {type(model).__name__} as it was: {cause}",
            code="state-dict-mismatch",
            hint="give a state dict of the model that was converted",
        ) from cause
    return filled.eval()


def _forward(old: Mapping[str, Tensor], model: nn.Module, origins: Sequence[Origin]) -> StateDictMigration:
    first = origins[0].skeleton
    assert first is not None
    current = _filled(first, _renamed(old, first), model)
    notes: list[str] = []
    for origin in origins:
        with opened(current) as norms:
            target, notes_of = _again(origin, current)
            norms.close(target)
        notes += notes_of
        current = target
    state = {name: _detached(value) for name, value in current.state_dict().items()}
    if different := _misfit(state, model):
        raise InputError(
            f"the {type(model).__name__} is no longer what its conversion made: {different}",
            code="storage-changed",
            hint="give the model as it was converted, and change its parts afterwards",
        )
    return StateDictMigration(state, "converted", not any(not one.recipe.exact for one in origins), tuple(notes))


def _again(origin: Origin, model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return what the conversion ``origin`` makes of ``model`` without data, and what to know of it."""
    notes: list[str] = []
    bound = bind(origin.plan, origin.recipe, model)
    if fitted := [one for one in bound.recurrent if one.recipe.needs_data]:
        raise InputError(
            f"'{fitted[0].site.name}' got its values from calibration data, for "
            f"{argument('recurrent', fitted[0].recipe.name)}, and a state dict has none",
            code="no-calibration",
            hint="load the state dict into the old model, and convert that",
        )
    bound = bound.with_statistics(missing_statistics(model, bound, None))
    source = model
    scales: Mapping[str, Tensor] = {}
    if not origin.recipe.exact:
        equalized = equalize(bound, Dataflow(capture(model, None)), None, None)
        source, scales = equalized.source, equalized.scales
        bound = bound.with_scales(scales)
        notes.append(
            f"{origin.recipe.name} is not exact: the checkpoint was converted as without data, and loses what that "
            "loses"
        )
    method = Absorb(Work(model, source, bound, Options(), scales=scales))
    target = copy_of(source)
    outcome = method.refine(target, rewrite(target, bound, method.values))
    return target, [*notes, *outcome.notes]


def _back(old: Mapping[str, Tensor], model: nn.Module, origins: Sequence[Origin]) -> StateDictMigration:
    inexact = [origin.recipe.name for origin in origins if not origin.recipe.exact]
    recurrent = [name for origin in origins if (name := _inexact_recurrent(origin.plan))]
    if inexact or recurrent:
        raise InputError(
            f"{inexact[0] if inexact else argument('recurrent', recurrent[0])} is not exact: no old model computes "
            "what the converted one does",
            code="inexact-recipe",
            hint="go on with the converted model, or take the checkpoint from before the conversion",
        )
    current = _filled(model_on_meta(model), _renamed(old, model), model)
    notes: list[str] = []
    for origin in reversed(origins):
        assert origin.skeleton is not None
        state, found = restored(current, origin)
        notes += found
        current = _filled(origin.skeleton, state, model)
    state = {name: _detached(value) for name, value in current.state_dict().items()}
    return StateDictMigration(state, "batchnorm", True, tuple(notes))


def _inexact_recurrent(plan: Plan) -> str | None:
    """Return the name of the recipe that recurrent layers got, where it is not exact."""
    recipe = make_recurrent(plan.recurrent_recipe, plan.recurrent_options) if plan.recurrent else None
    return None if recipe is None or recipe.exact else recipe.name


def model_on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` whose tensors are filled anew, and share nothing with it."""
    return copy_of(model).cpu()


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
