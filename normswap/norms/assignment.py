"""New values of a converted model's parameters, and where each comes from: computed first, applied by one function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

__all__ = ["Along", "Assignment", "LinearOf", "NewValue", "apply", "named", "of_present", "tensor_in"]


class Along(Enum):
    """What of an old parameter meets what of the new one, for each channel c with its factor f_c."""

    VALUES = "f_c · old_c"
    """Value by value: both have one shape, or both one value per channel."""
    DIRECTION = "f_c · ⟨v_c/‖v_c‖, old_c⟩"
    """A filter's part along the stored filter v_c gives one value: the length of weight normalization."""
    SPREAD = "f_c · ⟨u_c/‖u_c‖, old_c⟩, u_c = v_c − mean v_c"
    """The same along the filter without its mean: the gain of weight standardization."""
    MEAN = "f_c · mean(old_c)"
    """A filter's mean gives one value: the offset of weight standardization."""
    FILTERS = "f_c · old_c · new_c"
    """One value per channel scales a whole filter of the new value itself."""

    @property
    def reduces(self) -> bool:
        """Whether a filter gives one value."""
        return self in (Along.DIRECTION, Along.SPREAD, Along.MEAN)


@dataclass(frozen=True)
class LinearOf:
    """A term of a new value that is linear in an old parameter: ``factor_c · old_c`` for each channel c.

    What follows a parameter in training, such as an optimizer's momentum, follows the same map.

    Args:
        old: The old parameter: ``layer.weight``, ``layer.bias``, ``norm.weight`` (γ) or ``norm.bias`` (β), or one of
            the layer that reads the norm, ``reader.weight``.
        factor: One factor per channel; None is 1. ``(C,)``
        over_inputs: Whether the channels are those that a weight reads, and not those that it gives.
        along: What of the old parameter meets what of the new one, where it is not value by value. Directions are
            those at the conversion, which the new values hold.
    """

    old: str
    factor: Tensor | None = None
    over_inputs: bool = False
    along: Along = Along.VALUES


@dataclass(frozen=True)
class NewValue:
    """A value and the terms of it that are linear in old parameters; what is left of it is a constant.

    Args:
        value: The value, in any dtype; it is rounded to its parameter's.
        terms: The terms, for old parameters that were there.
    """

    value: Tensor
    terms: tuple[LinearOf, ...] = ()


Assignment = Mapping[str, NewValue]
"""New values by the name of the tensor that takes each, such as ``norm.weight``."""


def named(part: str, values: Assignment) -> dict[str, NewValue]:
    """Return ``values``, named within one part, with names that begin with the part's: ``norm.weight``."""
    return {f"{part}.{name}": value for name, value in values.items()}


def apply(assignment: Assignment, tensor: Callable[[str], Tensor]) -> None:
    """Write an assignment's values into the tensors that they are for, which ``tensor`` gives by name."""
    with torch.no_grad():
        for name, new in assignment.items():
            tensor(name).copy_(new.value)


def tensor_in(module: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer of ``module`` that goes by a dotted name."""
    path, _, leaf = name.rpartition(".")
    holder = module.get_submodule(path)
    tensor: Tensor | None = holder._parameters.get(leaf)
    tensor = holder._buffers.get(leaf) if tensor is None else tensor
    assert tensor is not None, f"there is no tensor {name}"
    return tensor


def of_present(terms: Iterable[LinearOf], present: Iterable[str]) -> tuple[LinearOf, ...]:
    """Return the terms of old parameters that were there."""
    known = frozenset(present)
    return tuple(term for term in terms if term.old in known)
