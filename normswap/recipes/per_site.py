"""Recipes chosen site by site, by the names of the norms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from normswap.errors import InputError, parameter
from normswap.recipes.auto import Auto
from normswap.recipes.base import Recipe
from normswap.recipes.stays import Stays
from normswap.records import Site

__all__ = ["PerSite"]


@dataclass(frozen=True)
class PerSite(Recipe):
    """At each site the recipe of the first pattern that matches its norm's name; no pattern: the norm stays.

    Args:
        parts: Pairs of a glob and the recipe where it matches, None where the norm stays.
    """

    parts: tuple[tuple[str, Recipe | None], ...] = ()

    name = "per-site"
    equation = "at each norm the recipe of the first pattern that matches its name"
    paper = ""
    by_itself = False

    def __post_init__(self) -> None:
        # "stays" is how plans and their tables call None, and means it.
        parts = tuple((glob, None if isinstance(part, Stays) else part) for glob, part in self.parts)
        object.__setattr__(self, "parts", parts)
        if not self.recipes:
            raise InputError(
                f"{parameter('to')} names no recipe",
                code="per-site-recipe",
                hint="write a pattern and its recipe, such as {'stem.*': 'gn+aws', '*': 'gn+ws'}",
            )
        if any(isinstance(part, (PerSite, Auto)) for part in self.recipes):
            raise InputError(
                f"a pattern of {parameter('to')} has a recipe that itself chooses between recipes",
                code="per-site-recipe",
                hint="give one mapping; the first pattern that matches decides",
            )

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The recipes, each once per pattern."""
        return tuple(part for _, part in self.parts if part is not None)

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(glob for glob, _ in self.parts)

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return all(part.exact for part in self.recipes)

    @property
    def least_group(self) -> int | None:
        return next((least for part in self.recipes if (least := part.least_group) is not None), None)

    def at(self, site: Site) -> Recipe | None:
        for glob, part in self.parts:
            if any(fnmatchcase(name, glob) for name in site.names):
                return part
        return None

    def options(self) -> dict[str, Any]:
        """Return the parts as :func:`normswap.make_recipe` and JSON have them."""
        return {"at": {glob: _written(part) for glob, part in self.parts}}

    @classmethod
    def combined(cls, parts: Iterable[tuple[str, Recipe | None]]) -> Recipe:
        """Return the recipe of such parts, which is the only one where a single pattern takes every norm."""
        parts = tuple(parts)
        only = parts[0][1] if len(parts) == 1 and parts[0][0] == "*" else None
        return cls(parts) if only is None else only


def _written(part: Recipe | None) -> Any:
    if part is None:
        return None
    options = part.options()
    return {"recipe": part.name, **options} if options else part.name
