"""Recipes: one file each, found by name; a new recipe is a new file here, or an instance passed by its user."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from normswap.discovery import classes_in
from normswap.errors import InputError
from normswap.recipes.base import Recipe

__all__ = ["Recipe", "all_recipes", "make_recipe", "option_names"]


@cache
def all_recipes() -> Mapping[str, type[Recipe]]:
    """Return every recipe of this folder by name, in the order of the files."""
    return classes_in(sys.modules[__name__], Recipe)


def option_names(to: str | Recipe) -> tuple[str, ...]:
    """Return the names of the options of the recipe that ``to`` names; none for an instance, which has its own.

    Raises:
        InputError: There is no such recipe.
    """
    return () if isinstance(to, Recipe) else tuple(f.name for f in fields(_type_of(to)))


def make_recipe(to: str | Recipe, options: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe that ``to`` names, with ``options``; an instance is returned as it is.

    Raises:
        InputError: There is no such recipe, or it has no such option.
    """
    options = dict(options or {})
    if isinstance(to, Recipe):
        if options:
            raise InputError(
                f"options {sorted(options)} given beside a recipe that has its own",
                code="recipe-options",
                hint=f"write {type(to).__name__}({', '.join(f'{k}=...' for k in options)})",
            )
        return to
    kind = _type_of(to)
    known = [f.name for f in fields(kind)]
    if unknown := [name for name in options if name not in known]:
        raise InputError(
            f"recipe '{to}' has no option {unknown[0]!r}",
            code="unknown-option",
            hint=f"its options are {', '.join(known)}" if known else "it has no options",
        )
    return kind(**options)


def _type_of(to: object) -> type[Recipe]:
    recipes = all_recipes()
    if not isinstance(to, str) or to not in recipes:
        raise InputError(f"there is no recipe {to!r}", code="unknown-recipe", hint=f"choose from {', '.join(recipes)}")
    return recipes[to]
