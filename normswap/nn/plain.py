"""Parametrized weights made plain, without touching any copy of the module.

Note [Shared injected classes]
torch parametrizes a module by giving it a class made for it, and a deep copy shares that class: removing the
parametrization with torch's own function edits the class and breaks the other copy. Here the module gets its former
class back and the injected one is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_weight_norm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["make_plain"]


def make_plain(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Replace every parametrized tensor in ``model`` by a plain parameter of its present value.

    Both of torch's weight-norm APIs count, and any other parametrization whose value does not change from one reading
    to the next.

    Yields:
        (fqn of the tensor, '') for each that is plain now, (fqn, reason) for each that stays.
    """
    for fqn, module in model.named_modules():
        prefix = f"{fqn}." if fqn else ""
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
                yield f"{prefix}{hook.name}", ""
        if parametrize.is_parametrized(module):
            names = [name for name, _ in module.get_submodule("parametrizations").named_children()]
            random = [name for name in names if not torch.equal(getattr(module, name), getattr(module, name))]
            if not random:
                _unparametrize(module, names)
            for name in names:
                yield f"{prefix}{name}", f"{random[0]} changes from one reading to the next" if random else ""


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
