"""Recipes: one file each, found by name; a new recipe is a new file here, or an instance passed by its user."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, TypeAlias

from normswap.discovery import classes_in
from normswap.errors import InputError, argument
from normswap.recipes.auto import Auto
from normswap.recipes.base import Recipe
from normswap.recipes.per_site import PerSite
from normswap.recipes.stays import Stays

__all__ = ["Auto", "PerSite", "Recipe", "To", "all_recipes", "make_recipe", "option_types"]

To: TypeAlias = "str | Recipe | Mapping[str, str | Recipe | Mapping[str, Any] | None] | None"
"""What says what becomes of the norms: a recipe's name, a recipe, or such by globs of their names; None leaves them."""


@cache
def all_recipes() -> Mapping[str, type[Recipe]]:
    """Return every recipe of this folder that its name alone chooses, by name, in the order of the files."""
    return {name: kind for name, kind in classes_in(sys.modules[__name__], Recipe).items() if kind.by_itself}


def option_types(to: To) -> dict[str, str]:
    """Return the options of the recipes that ``to`` names, each with its type as it is written in Python.

    An instance has its own and takes none.

    Raises:
        InputError: There is no such recipe.
    """
    if isinstance(to, Recipe) or to in (None, Stays.name):
        return {}
    if to == PerSite.name:
        return {"at": "Mapping"}
    if to == Auto.name:
        own = {f.name: str(f.type) for f in fields(Auto)}
        return own | {name: kind for part in Auto.defaults for name, kind in option_types(_split(part)[0]).items()}
    if isinstance(to, Mapping):
        return {name: kind for part in to.values() for name, kind in option_types(_split(part)[0]).items()}
    return {f.name: str(f.type) for f in fields(_type_of(to))}


def make_recipe(to: To, options: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe that ``to`` names, with ``options``; an instance is returned as it is.

    A mapping of globs to recipes gives each site the recipe of the first glob that matches its norm's name, and each
    recipe those of the options that it has: ``{"stem.*": "gn+aws", "head.*": {"recipe": "gn+ws", "num_groups": 1},
    "layer1.*": None, "*": "gn+ws"}``. None leaves the norm, and in place of a recipe all norms. The recipes that
    ``"auto"`` chooses from (``recipes``) are given the options in the same way.

    Raises:
        InputError: There is no such recipe, it has no such option, or the option no such value.
    """
    options = dict(options or {})
    if to == PerSite.name and isinstance(options.get("at"), Mapping):
        to = options.pop("at")
    if isinstance(to, Mapping):
        if wrong := [glob for glob in to if not isinstance(glob, str)]:
            raise InputError(
                f"{argument('to')} has {wrong[0]!r}, which is no glob of names",
                code="option-type",
                hint="give texts such as 'layer1.*'",
            )
        return PerSite.combined((glob, _part(part, options)) for glob, part in to.items())
    if to == Auto.name:
        return _auto(options)
    if to in (None, Stays.name):
        to = Stays()
    if isinstance(to, Recipe):
        if options:
            raise InputError(
                f"options {sorted(options)} given beside a recipe that has its own",
                code="recipe-options",
                hint=f"write {type(to).__name__}({', '.join(f'{k}=...' for k in options)})",
            )
        return to
    return _type_of(to).of(options, f"recipe '{to}'")


def _auto(options: Mapping[str, Any]) -> Recipe:
    """Return the recipe that chooses, each of its parts with those of the options that it has."""
    own = {name: options[name] for name in ("max_error", "leave") if name in options}
    grouped = options.keys() & {"num_groups", "group_size"}
    usual = [part for part in Auto.defaults if not (grouped and isinstance(part, Mapping))]
    parts = options.get("recipes", usual)
    of_parts = {k: v for k, v in options.items() if k not in (*own, "recipes")}
    if isinstance(parts, (str, Recipe, Mapping)):
        parts = (parts,)
    Auto.check_types({**own, "recipes": parts})
    made = (_part(part, of_parts) for part in parts)
    return Auto(tuple(part for part in made if part is not None), **own)


def _split(part: Any) -> tuple[Any, dict[str, Any]]:
    """Return what a glob stands for, a recipe or a name, and the options that stand with it."""
    if not isinstance(part, Mapping):
        return part, {}
    own = dict(part)
    return own.pop("recipe", ""), own


def _part(part: Any, options: Mapping[str, Any]) -> Recipe | None:
    if part is None:
        return None
    to, own = _split(part)
    taken = {} if isinstance(to, Recipe) else {k: v for k, v in options.items() if k in option_types(to)}
    return make_recipe(to, {**taken, **own})


def _type_of(to: object) -> type[Recipe]:
    recipes = all_recipes()
    if not isinstance(to, str) or to not in recipes:
        raise InputError(f"there is no recipe {to!r}", code="unknown-recipe", hint=f"choose from {', '.join(recipes)}")
    return recipes[to]
