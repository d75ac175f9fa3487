"""The conversions that made a model, carried out again on its skeleton; what a replay must reproduce."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from normswap.errors import InputError
from normswap.recipes import Recipe
from normswap.records import Plan
from normswap.stages.bound import bind
from normswap.stages.moves import Moves
from normswap.stages.opened import opened
from normswap.stages.rewriting import rewrite
from normswap.storage.contents import differences
from normswap.storage.origin import Origin, origin_of, remember, skeleton_of, slots

__all__ = ["copied", "history", "refuse_changed", "replayed_on", "warn_of_hooks"]


def history(model: nn.Module) -> list[Origin]:
    """Return the conversions that made ``model``, the first one first."""
    if origin_of(model) is None:
        inner = [name for name, module in model.named_modules() if origin_of(module) is not None]
        hint = "torch.save stores it"
        if inner:
            hint = f"its submodule '{inner[0]}' is one: save that, and load it into its place"
        raise InputError(
            f"this {type(model).__name__} is not what a conversion returned", code="not-converted", hint=hint
        )
    history: list[Origin] = []
    current: nn.Module | None = model
    while current is not None and (origin := origin_of(current)) is not None:
        history.insert(0, origin)
        current = origin.skeleton
    return history


def copied(skeleton: nn.Module) -> nn.Module:
    """Return a copy of ``skeleton``."""
    copied = skeleton_of(skeleton)
    if copied is None:
        raise InputError(
            f"the {type(skeleton).__name__} cannot be copied",
            code="not-copyable",
            hint="take out what copy.deepcopy refuses, such as open files or locks",
        )
    return copied


def replayed_on(
    skeleton: nn.Module, steps: Sequence[tuple[Plan, Recipe]], moves: Sequence[Moves | None] = ()
) -> nn.Module:
    """Carry the plans out on ``skeleton``, in place; ``moves`` says where each one's parameters come from."""
    for index, (plan, recipe) in enumerate(steps):
        origin = Origin(plan, recipe, skeleton_of(skeleton), moves[index] if moves else None)
        with opened(skeleton):
            rewrite(skeleton, bind(plan, recipe, skeleton))
        remember(skeleton, origin)
    return skeleton


def _structure(model: nn.Module) -> dict[str, Any]:
    """Return what a replay must reproduce: modules by class (and by what they are aliases of), tensors by shape."""
    first: dict[int, str] = {}
    found: dict[str, Any] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        alias = first.setdefault(id(module), fqn)
        code = module.code if isinstance(module, fx.GraphModule) else ""
        found[fqn] = type(module).__qualname__ if alias == fqn else f"'{alias}'"
        if code:
            found[f"{fqn}.forward"] = code
    for slot in slots(model):
        if slot.kind != "attribute":
            found[slot.name] = f"a {slot.kind} of shape {tuple(slot.tensor.shape)}"
    return found


def refuse_changed(model: nn.Module, replayed: nn.Module) -> None:
    """Raise InputError where the model is no longer what its conversion made of the skeleton."""
    different = differences(_structure(model), _structure(replayed), "the model", "its conversion")
    if not different:
        return
    if _own_parts(replayed) and not _own_parts(model):
        raise InputError(
            f"the {type(model).__name__} was folded: nothing of the conversion is left in it",
            code="storage-folded",
            hint="a folded model is plain PyTorch: torch.save(model, path), or torch.save its state dict",
        )
    raise InputError(
        f"the {type(model).__name__} is no longer what its conversion made: {different}",
        code="storage-changed",
        hint="change the model (replace its head) before converting it; or store this one as it is by torch.save of "
        "fold(model), or of its state dict",
    )


def _own_parts(model: nn.Module) -> bool:
    return any(
        parametrize.is_parametrized(module) or type(module).__module__.startswith("normswap.nn.")
        for module in model.modules()
    )


def warn_of_hooks(model: nn.Module, replayed: nn.Module) -> None:
    """Warn of forward hooks that the model has and its conversion did not make."""
    before = dict(replayed.named_modules())
    for fqn, module in model.named_modules():
        for table in ("_forward_hooks", "_forward_pre_hooks"):
            if len(vars(module)[table]) > len(vars(before[fqn])[table]):
                warnings.warn(
                    f"'{fqn}' has forward hooks that were registered after the conversion: they are not stored",
                    stacklevel=3,
                )
                return
