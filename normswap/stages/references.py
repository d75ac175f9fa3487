"""References to modules outside of the module tree: in a list, a dict or an attribute that registers none.

``self.bns.append(bn); setattr(self, f"bn{i}", bn)`` registers each norm and calls it from a plain list. What takes a
norm's place in the tree must take it there as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["exchange", "followed", "referenced"]

_TABLES = frozenset(vars(nn.Module()))


def exchange(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Let whatever ``model`` holds refer to the modules ``new``, by the ids of those whose place they have taken."""
    _visit(model, lambda module: new.get(id(module), module))


@contextmanager
def followed(model: nn.Module) -> Iterator[None]:
    """Let whatever ``model`` holds refer, on leaving, to what stands then where the modules stood before."""
    before = dict(model.named_modules(remove_duplicate=False))
    yield
    after = dict(model.named_modules(remove_duplicate=False))
    exchange(model, {id(old): after[name] for name, old in before.items() if after.get(name, old) is not old})


def referenced(model: nn.Module) -> frozenset[int]:
    """Return the ids of the modules to which ``model`` holds references outside of the module tree."""
    found: set[int] = set()

    def note(module: nn.Module) -> nn.Module:
        found.add(id(module))
        return module

    _visit(model, note)
    return frozenset(found)


def _visit(model: nn.Module, visit: Callable[[nn.Module], nn.Module]) -> None:
    seen: set[int] = set()
    for module in list(model.modules()):
        for name, value in list(vars(module).items()):
            if name not in _TABLES and (found := _visited(value, visit, seen)) is not value:
                module.__dict__[name] = found


def _visited(value: Any, visit: Callable[[nn.Module], nn.Module], seen: set[int]) -> Any:
    """Return ``value`` with each module in it visited; lists and dicts are changed in place, as others hold them."""
    if isinstance(value, nn.Module):
        return visit(value)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):  # self.layers = [self.bn.forward]
        owner = visit(value.__self__)
        return value if owner is value.__self__ else getattr(owner, value.__name__, owner)
    if not isinstance(value, (list, dict, tuple)) or id(value) in seen:
        return value
    seen.add(id(value))
    if isinstance(value, tuple):
        parts = [_visited(one, visit, seen) for one in value]
        same = all(a is b for a, b in zip(parts, value, strict=True))
        return value if same else type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    for key, one in list(value.items() if isinstance(value, dict) else enumerate(value)):
        if (found := _visited(one, visit, seen)) is not one:
            value[key] = found
    return value
