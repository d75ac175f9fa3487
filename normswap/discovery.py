"""Classes found by their files: a folder's modules are imported, and what they define under a name is collected."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import TypeVar

__all__ = ["classes_in"]

Base = TypeVar("Base")


def classes_in(folder: ModuleType, base: type[Base]) -> Mapping[str, type[Base]]:
    """Return the subclasses of ``base`` that the files of a package define with a ``name``, by it, in their order."""
    found: dict[str, type[Base]] = {}
    for module in pkgutil.iter_modules(folder.__path__):
        contents = vars(importlib.import_module(f"{folder.__name__}.{module.name}"))
        for value in contents.values():
            named = isinstance(value, type) and issubclass(value, base) and "name" in vars(value)
            if named and value.__module__ == contents["__name__"]:
                found[str(vars(value)["name"])] = value
    return found
