"""What is still to fold in a module, and which modules of a folded model only normswap has."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from normswap.deploy.affines import is_hooked
from normswap.nn.plain import legacy_hooks
from normswap.norms import Affine, deployed

__all__ = ["needs_inputs", "needs_package", "unfolded"]


def unfolded(module: nn.Module) -> str:
    """Return what is still to fold in the module itself, or an empty string."""
    if parametrize.is_parametrized(module):
        return f"{', '.join(module.parametrizations)} is parametrized"  # type: ignore[arg-type]
    if hooks := legacy_hooks(module):
        return f"a {hooks[0].what} hook computes its {hooks[0].tensor}"
    answer = deployed(module)
    if not isinstance(answer, Affine) or answer.otherwise is not None or is_hooked(module):
        return ""
    return f"it is a {type(module).__name__}"


def needs_inputs(module: nn.Module) -> bool:
    """Tell whether folding knows by example inputs alone how many axes reach what is still to fold in the module."""
    answer = deployed(module)
    return isinstance(answer, Affine) and answer.otherwise is None and answer.rank is None


def needs_package(model: nn.Module) -> list[str]:
    """Return the names of the modules whose class is of this package: a file that names classes loads with it alone."""
    return [name for name, module in model.named_modules() if _is_own(module)]


def _is_own(module: nn.Module) -> bool:
    """Tell whether the module's class, or one that it derives from, is of this package and not of its demo."""
    names = [cls.__module__.split(".") for cls in type(module).__mro__]
    return any(name[0] == "normswap" and name[1:2] != ["demo"] for name in names)
