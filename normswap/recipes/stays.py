"""No recipe: the norms stay."""

from __future__ import annotations

from dataclasses import dataclass

from normswap.recipes.base import Recipe
from normswap.records import Site

__all__ = ["Stays"]


@dataclass(frozen=True)
class Stays(Recipe):
    """Every norm stays as it is: ``to=None``, for a conversion of the recurrent layers alone."""

    name = "stays"
    equation = "every norm stays as it is"
    paper = ""
    exact = True
    by_itself = False

    def at(self, site: Site) -> Recipe | None:
        return None
