"""Bound methods in a file: some networks choose a forward when they are made, ``self.forward = self.forward_split``.

Pickle writes such a method as ``getattr(module, "forward_split")``, and getattr reaches everything from anything.
What is called here in its place only notes both arguments. The note does nothing and cannot be called; once the whole
model is there, it becomes a method where it stands for the module's own forward and names a forward of its class.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import FunctionType, MethodType

from torch import nn

__all__ = ["GETATTR", "Noted", "bind", "is_forward", "note"]

GETATTR = "builtins.getattr"


@dataclass(frozen=True, eq=False)
class Noted:
    """What the file would have looked up: an attribute of an object."""

    owner: object
    name: str


def note(owner: object, name: str) -> Noted:
    """Stand in for ``getattr``."""
    return Noted(owner, name)


def is_forward(name: object) -> bool:
    """Return whether a method of this name may take forward's place: ``forward_features``, ``_forward_impl``."""
    return isinstance(name, str) and re.fullmatch(r"_?forward_\w+", name, re.ASCII) is not None


def bind(module: nn.Module, attribute: str, noted: Noted) -> bool:
    """Put the method into ``module``; return False, and change nothing, where it is no forward of the module's own."""
    owners = (vars(cls) for cls in type(module).__mro__ if cls is not nn.Module and issubclass(cls, nn.Module))
    function = next((own[noted.name] for own in owners if noted.name in own), None)
    if attribute != "forward" or noted.owner is not module or not is_forward(noted.name):
        return False
    if type(function) is not FunctionType:
        return False
    vars(module)[attribute] = MethodType(function, module)
    return True
