"""Recipes for recurrent layers: one file each, found by name, as the recipes for norms are."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from normswap.discovery import classes_in
from normswap.errors import InputError, argument
from normswap.recipes.recurrent.base import RecurrentRecipe

__all__ = ["RecurrentRecipe", "all_recurrent", "make_recurrent"]


@cache
def all_recurrent() -> Mapping[str, type[RecurrentRecipe]]:
    """Return every recipe of this folder, by name, in the order of the files."""
    return classes_in(sys.modules[__name__], RecurrentRecipe)


def make_recurrent(
    asked: str | RecurrentRecipe | Mapping[str, Any] | None, options: Mapping[str, Any] | None = None
) -> RecurrentRecipe | None:
    """Return the recipe that ``asked`` names, with ``options``; an instance is returned as it is, and so is None.

    ``{"recipe": "ln", "spread": 30}`` names one with options of its own.

    Raises:
        InputError: There is no such recipe, or it has no such option.
    """
    if isinstance(asked, Mapping):
        given = {**(options or {}), **asked}
        return make_recurrent(str(given.pop("recipe", "")), given)
    if asked is None or isinstance(asked, RecurrentRecipe):
        return asked
    known = all_recurrent()
    if not isinstance(asked, str) or asked not in known:
        raise InputError(
            f"{argument('recurrent', asked)}: there is no recipe {asked!r} for recurrent layers",
            code="unknown-recurrent",
            hint=f"choose from {', '.join(known)}",
        )
    return known[asked].of(options or {}, f"the recipe '{asked}' for recurrent layers")
