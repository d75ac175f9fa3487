"""Which modules are in train mode, and which a model keeps in one mode."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from normswap.runs.guard import untouched

__all__ = ["Held", "held_modules", "training_modules"]


def training_modules(model: nn.Module) -> list[str]:
    """Return the fqns of the modules in train mode.

    An exported program has no modes, and a module without a forward none that means anything (a GraphModule's copy has
    such in train mode, whatever the original's).
    """
    if "train" in vars(model):  # torch.export overrides it in the instance: calling it raises
        return []
    return [fqn for fqn, module in model.named_modules() if module.training and type(module) is not nn.Module]


@dataclass(frozen=True)
class Held:
    """The ids of the modules that a model keeps in one mode, whatever mode it is put into itself.

    Args:
        in_eval: Those that stay in eval mode when the model is put into train mode.
        in_train: Those that stay in train mode when the model is put into eval mode.
    """

    in_eval: frozenset[int] = frozenset()
    in_train: frozenset[int] = frozenset()


def held_modules(model: nn.Module) -> Held:
    """Return the modules that ``model`` keeps in one mode by a ``train()`` of its own.

    Detection backbones freeze their BatchNorms so. ``train()`` is called once for each mode, and the model is as before
    afterwards, whatever it does; nothing is called where no module overrides it.
    """
    kinds = {type(module) for module in model.modules()}
    own = any(kind.train is not nn.Module.train or kind.eval is not nn.Module.eval for kind in kinds)
    if not own and not any({"train", "eval"} & {*vars(module)} for module in model.modules()):
        return Held()
    return Held(_with_mode(model, True, training=False), _with_mode(model, False, training=True))


def _with_mode(model: nn.Module, put: bool, *, training: bool) -> frozenset[int]:
    """Return the modules whose mode is ``training`` once ``model`` was put into train mode, or not."""
    modules = list(model.modules())
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with untouched(model):
        try:
            model.train() if put else model.eval()
            return frozenset(id(module) for module in modules if module.training == training)
        except Exception:  # what cannot be put into a mode, such as an exported program, holds nothing
            return frozenset()
        finally:
            for parameter, before in trainable:
                if parameter.requires_grad != before:
                    parameter.requires_grad_(before)
