"""What a converted model remembers of its conversion, so that it can be stored and made again.

Note [Remembered beside the model]
The origin lies in the converted model's ``__dict__``: it goes along with a deep copy, and no parameter, buffer,
submodule or state-dict key comes of it. It is never part of a pickle: a model whose new norms are all torch's own stays
a plain PyTorch model for ``torch.save``, which loads where this package is not installed. In place of the origin such a
file holds an empty ``OrderedDict``, one of the few things that weights-only loading admits.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.recipes import Recipe
from normswap.records import Plan
from normswap.stages.moves import Moves

__all__ = ["Origin", "Slot", "origin_of", "remember", "skeleton_of", "slots", "substituted"]

KEY = "_normswap_origin"


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a converted model comes from.

    Args:
        plan: What the conversion did.
        recipe: What it did it with.
        skeleton: The model before, on the meta device; None where it cannot be copied. Never to be changed. A model
            that was converted twice has a skeleton with an origin of its own.
        moves: Where its parameters come from; None where that is not known.
    """

    plan: Plan
    recipe: Recipe
    skeleton: nn.Module | None
    moves: Moves | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # Note [Remembered beside the model]


def remember(model: nn.Module, origin: Origin) -> None:
    """Note in ``model`` where it comes from; see :func:`origin_of`."""
    _home(model)[KEY] = origin


def origin_of(model: nn.Module) -> Origin | None:
    """Return what :func:`remember` noted in ``model`` or in the model that it is a copy of."""
    found = _home(model).get(KEY)
    return found if isinstance(found, Origin) else None


def forget(model: nn.Module) -> None:
    """Take the note out of ``model``."""
    _home(model).pop(KEY, None)


def _home(model: nn.Module) -> dict[str, Any]:
    # A GraphModule's copy is built anew from its graph: only its meta goes along.
    return model.meta if isinstance(model, fx.GraphModule) else vars(model)


@dataclass(frozen=True)
class Slot:
    """A place of a model that holds a tensor.

    Args:
        name: The module's fqn and the tensor's name in it.
        kind: ``parameter``, ``buffer`` (persistent or not), or ``attribute``, a tensor that is neither.
        table: What holds the tensor.
        key: Under what it does.
    """

    name: str
    kind: str
    table: dict[str, Any]
    key: str

    @property
    def tensor(self) -> Tensor:
        """The tensor."""
        found = self.table[self.key]
        assert isinstance(found, Tensor)
        return found


def slots(model: nn.Module) -> Iterator[Slot]:
    """Yield every place of ``model`` that holds a tensor, tied ones and those of shared modules once per name."""
    for fqn, module in model.named_modules(remove_duplicate=False):
        own = vars(module)
        for kind, table in (
            ("parameter", own.get("_parameters", {})),  # a traced TorchScript module has none in Python
            ("buffer", own.get("_buffers", {})),
            ("attribute", own),
        ):
            for key, value in table.items():
                if isinstance(value, Tensor):
                    yield Slot(f"{fqn}.{key}" if fqn else key, kind, table, key)


def substituted(model: nn.Module, replacements: Mapping[int, Tensor]) -> nn.Module:
    """Return a deep copy of ``model`` in which the tensors with the ids ``replacements`` are replaced.

    They are wherever the model holds them, also in its lists, dicts and closed-over objects.
    """
    return copy.deepcopy(model, dict(replacements))


def skeleton_of(model: nn.Module) -> nn.Module | None:
    """Return a copy of ``model`` with its parameters and buffers on the meta device, None where it cannot be copied.

    Shapes, dtypes, strides, ties and ``requires_grad`` are as in the model; no data is copied but that of tensors
    that are neither parameters nor buffers.
    """
    replacements: dict[int, Tensor] = {}
    for slot in slots(model):
        replacements.setdefault(id(slot.tensor), _stand_in(slot))
    try:
        return substituted(model, replacements)
    except Exception:  # whatever a user's class does on being copied: a conversion in place works nevertheless
        return None


def _stand_in(slot: Slot) -> Tensor:
    tensor = slot.tensor
    if slot.kind == "attribute":
        # Values that a forward may branch on; a copy also where deepcopy refuses, on a stashed activation.
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)
    like = torch.empty_like(tensor.detach(), device="meta", memory_format=torch.preserve_format)
    return nn.Parameter(like, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else like
