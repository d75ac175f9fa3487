"""Parametrized weights made plain, without touching any copy of the module.

Note [Shared injected classes]
torch parametrizes a module by giving it a class made for it, and a deep copy shares that class: removing the
parametrization with torch's own function edits the class and breaks the other copy. Here the module gets its former
class back and the injected one is left alone.

Note [Legacy hooks]
torch's older weight norm, its older spectral norm and its pruning are no parametrizations: a hook computes the tensor
before each call of the module, from tensors of other names. Each has a function of torch's that makes the tensor plain.
Those of one module are undone in the reverse order, as one hook may compute what the one before it reads: the pruned
``weight_v`` of a normalized ``weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from normswap.nn.kinds import Answering
from normswap.nn.recurrent import additions_to, hand_on, is_recurrent, make_torchs

__all__ = ["legacy_hooks", "made_torchs", "make_plain"]


@dataclass(frozen=True)
class LegacyHook:
    """A hook of torch's that computes a tensor of a module before each call (Note [Legacy hooks]).

    Args:
        tensor: The name of the tensor.
        what: What it does, by the name of torch's function for it.
        remove: Makes the tensor of this name in the module a plain parameter of its present value.
    """

    tensor: str
    what: str
    remove: Callable[[nn.Module, str], Any]


def legacy_hooks(module: nn.Module) -> list[LegacyHook]:
    """Return the hooks of ``module`` that compute one of its tensors, in the order in which they are called."""
    found = []
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            found.append(LegacyHook(hook.name, "torch.nn.utils.weight_norm", remove_weight_norm))
        elif isinstance(hook, SpectralNorm):
            found.append(LegacyHook(hook.name, "torch.nn.utils.spectral_norm", _remove_spectral_norm))
        elif isinstance(hook, prune.BasePruningMethod):
            found.append(LegacyHook(hook._tensor_name, "torch.nn.utils.prune", prune.remove))
    return found


def _remove_spectral_norm(module: nn.Module, name: str) -> None:
    remove_spectral_norm(module, name)
    for key, hook in list(module._load_state_dict_pre_hooks.items()):  # torch looks past its own wrapper of it
        inner = getattr(hook, "hook", hook)
        if isinstance(inner, SpectralNormLoadStateDictPreHook) and inner.fn.name == name:
            del module._load_state_dict_pre_hooks[key]


def make_plain(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Replace every parametrized tensor in ``model``, in eval mode, by a plain parameter of its present value.

    The hooks of torch's older weight norm, spectral norm and pruning count, and any parametrization whose value does
    not change from one reading to the next. A module that is one of torch.nn in evaluation, as a
    batch-normalized recurrent layer may be, becomes that.

    Yields:
        (fqn of the tensor, '') for each that is plain now, (fqn, reason) for each that stays.
    """
    for fqn, module in model.named_modules():
        prefix = f"{fqn}." if fqn else ""
        for hook in reversed(legacy_hooks(module)):
            sources = [p for name, p in module._parameters.items() if name.startswith(f"{hook.tensor}_")]
            trainable = any(p.requires_grad for p in sources if p is not None)
            hook.remove(module, hook.tensor)
            getattr(module, hook.tensor).requires_grad_(trainable)
            yield f"{prefix}{hook.tensor}", ""
        if parametrize.is_parametrized(module):
            names = [name for name, _ in module.get_submodule("parametrizations").named_children()]
            random = [name for name in names if not torch.equal(getattr(module, name), getattr(module, name))]
            if not random:
                _unparametrize(module, names)
            for name in names:
                yield f"{prefix}{name}", f"{random[0]} changes from one reading to the next" if random else ""
        if made_torchs(module):
            yield from ((f"{prefix}{name}", "") for name, _ in module.named_parameters())


def made_torchs(module: nn.Module) -> bool:
    """Make of a module the one of torch.nn that it says it is, in place; tell whether it is one.

    Its hooks stay, and so does what a recurrent layer has got beside what its class has.
    """
    plain = module.deployed() if isinstance(module, Answering) else ""
    if isinstance(plain, str):
        return False
    hand_on(module, plain, additions_to(module) if is_recurrent(module) else {})
    module.__class__ = type(plain)
    vars(module).clear()
    vars(module).update(vars(plain))
    return True


def _unparametrize(module: nn.Module, names: list[str]) -> None:
    values: dict[str, Tensor] = {name: getattr(module, name).detach().clone() for name in names}
    lists = {name: module.get_submodule(f"parametrizations.{name}") for name in names}
    trainable = {name: any(p.requires_grad for p in originals.parameters()) for name, originals in lists.items()}
    module.__class__ = type(module).__bases__[0]  # Note [Shared injected classes]
    del module._modules["parametrizations"]
    # torch's weight norm leaves a hook behind that cannot be pickled.
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        if "weight_norm" in getattr(getattr(hook, "hook", hook), "__qualname__", ""):
            del module._load_state_dict_pre_hooks[key]
    plain = {name: nn.Parameter(value, requires_grad=trainable[name]) for name, value in values.items()}
    others = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update(plain | others)  # weight before bias, as torch's layers have it
    make_torchs(module)
