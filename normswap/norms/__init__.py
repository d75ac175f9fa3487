"""Norms: one class each, in a file each, found by their modules; a new norm is a new file here, or anywhere else."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Hashable
from functools import cache

from torch import nn

from normswap.nn.kinds import Answering
from normswap.norms.assignment import Along, Assignment, LinearOf, NewValue, apply, named, of_present, tensor_in
from normswap.norms.base import Norm, registered
from normswap.norms.records import Affine, Bias, Encoding, Incoming, NormState, Stays, Takes

__all__ = [
    "Affine",
    "Along",
    "Assignment",
    "Bias",
    "Encoding",
    "Incoming",
    "LinearOf",
    "NewValue",
    "Norm",
    "NormState",
    "Stays",
    "Takes",
    "apply",
    "deployed",
    "is_convertible",
    "named",
    "norm_of",
    "of_present",
    "tensor_in",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def norm_of(module: nn.Module) -> type[Norm] | None:
    """Return which norm ``module`` is, None where it is none."""
    kind: Hashable = type(module)  # type: ignore[assignment]
    return _of_class(kind, len(registered())) or next((n for n in registered() if n.recognizes(module)), None)


@cache
def _of_class(kind: Hashable, _: int) -> type[Norm] | None:
    """Return the norm whose module is closest in a class's MRO; asked anew when another norm has been defined."""
    assert isinstance(kind, type)
    known: dict[type, type[Norm]] = {cls: norm for norm in registered() for cls in norm.modules}
    return next((known[cls] for cls in kind.__mro__ if cls in known), None)


def is_convertible(module: nn.Module) -> bool:
    """Tell whether ``module`` is a norm that can be replaced: a BatchNorm, a subclass of one, or a frozen one."""
    norm = norm_of(module)
    return norm is not None and norm.converts


def deployed(module: nn.Module) -> Affine | Stays | nn.Module | None:
    """Return what becomes of ``module`` in a deployed model, see :meth:`Norm.deployed`.

    None of what is no norm, and no module of this package that answers for itself.
    """
    if (norm := norm_of(module)) is not None:
        return norm.deployed(module)
    if not isinstance(module, Answering):
        return None
    answer = module.deployed()
    return Stays(f"{answer}: normswap must be there to load the model") if isinstance(answer, str) else answer
