"""The conversions that made a model, carried out again on its skeleton; what a replay must reproduce."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from normswap.errors import InputError
from normswap.recipes import Recipe
from normswap.records import Plan
from normswap.stages.bound import bind
from normswap.stages.moves import Moves
from normswap.stages.opened import opened
from normswap.stages.rewriting import rewrite
from normswap.storage.contents import differences, is_plain
from normswap.storage.origin import KEY, Origin, origin_of, remember, skeleton_of, slots

__all__ = ["copied", "history", "refuse_changed", "replayed_on", "warn_of_hooks", "warn_of_lost"]

_OWN = frozenset(vars(nn.Module())) | {KEY}


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


def warn_of_lost(model: nn.Module, replayed: nn.Module) -> None:
    """Warn of what was changed after the conversion and is not stored: functions and objects that modules hold."""
    before = dict(replayed.named_modules())
    lost = [
        f"'{fqn}.{name}'" if fqn else f"'{name}'"
        for fqn, module in model.named_modules()
        if not isinstance(module, fx.GraphModule)
        for name, value in vars(module).items()
        if name not in _OWN and not is_plain(value) and not _same(value, vars(before[fqn]).get(name), 3)
    ]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        warnings.warn(
            f"{', '.join(lost[:3])}{more}: changed after the conversion and neither tensor nor plain value, so not "
            "stored; set it again after loading",
            stacklevel=3,
        )


def _same(value: Any, other: Any, depth: int) -> bool:
    """Tell whether a value may be what a replay has in its place: tensors and modules are compared elsewhere."""
    if value is other or isinstance(value, (Tensor, nn.Module)):
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, MethodType):
        return value.__func__ is other.__func__
    if isinstance(value, FunctionType):
        return value.__code__ is other.__code__
    if isinstance(value, (BuiltinFunctionType, type)):
        return False
    if depth == 0:
        return True
    if isinstance(value, Mapping):
        same_keys = list(map(str, value)) == list(map(str, other))
        return same_keys and all(_same(a, b, depth - 1) for a, b in zip(value.values(), other.values(), strict=True))
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(_same(a, b, depth - 1) for a, b in zip(value, other, strict=True))
    if is_plain(value):
        return repr(value) == repr(other)
    return _same(vars(value), vars(other), depth - 1) if hasattr(value, "__dict__") else True
