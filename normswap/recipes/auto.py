"""A recipe for each site, chosen by what it does to the model's output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from normswap.errors import InputError, parameter
from normswap.recipes.base import Recipe

__all__ = ["Auto", "pick"]

_TIE = 1.05  # a recipe that stands earlier is taken where its error is larger by no more than this factor


@dataclass(frozen=True)
class Auto(Recipe):
    """At each site the recipe, of those admitted, that changes the model's output least on calibration data.

    Each admitted recipe is matched at each site by itself, and its error is followed to the output to first order
    (:mod:`normswap.choosing`). Without ``max_error`` the least error decides at each site. With it the recipe that
    stands first is kept wherever the output can afford it: the sites where a change buys most are changed until the
    expected error is small enough. Without data the last recipe is taken everywhere.

    Args:
        recipes: The admitted recipes, the most wanted first, the most faithful last. None of the default ones shares
            statistics between samples.
        max_error: The largest relative error of the output, ``‖y' − y‖/‖y‖``, that is wanted.
        leave: At so many sites, where it buys most, the norm may stay as it is.
    """

    recipes: tuple[Recipe, ...] = ()
    max_error: float | None = None
    leave: int = 0

    name = "auto"
    equation = "at each norm the recipe that changes the output least"
    paper = ""
    exact = False
    by_itself = False
    defaults: ClassVar[tuple[Any, ...]] = ("gn+ws", {"recipe": "gn+ws", "num_groups": 1}, "gn+aws", "ln")

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipes", tuple(dict.fromkeys(self.recipes)))
        if not self.recipes or not all(part.by_itself for part in self.recipes):
            raise InputError(
                f"{parameter('recipes')} must name one recipe or more, and none that itself chooses",
                code="auto-recipes",
                hint=f"the default is {self.defaults}",
            )
        if self.max_error is not None and not 0 < self.max_error < math.inf:
            raise InputError(
                f"{parameter('max_error')} must be > 0 and finite, got {self.max_error}",
                code="auto-max-error",
                hint="0.1 lets the outputs differ by a tenth of their size",
            )
        if self.leave < 0:
            raise InputError(
                f"{parameter('leave')} must be ≥ 0, got {self.leave}", code="auto-leave", hint="the default is 0"
            )

    @property
    def without_data(self) -> Recipe:
        """The recipe that is taken where there is nothing to choose by."""
        return self.recipes[-1].without_data


def pick(energies: Mapping[str, Mapping[str, float]], recipe: Auto) -> dict[str, str | None]:
    """Return the label of the recipe for each site, None where the norm stays.

    Args:
        energies: By site and label ``‖y' − y‖²/‖y‖²`` of the output, the labels in the order of the recipe's parts.
        recipe: What is wanted.
    """
    best: dict[str, str] = {}
    for norm, by in energies.items():
        least = min(by.values())
        best[norm] = next(label for label, energy in by.items() if energy <= least * _TIE**2)
    picked: dict[str, str | None] = dict(best)
    allowed = math.inf if recipe.max_error is None else recipe.max_error**2

    def total() -> float:
        return sum(energies[norm][label] for norm, label in picked.items() if label is not None)

    if recipe.max_error is not None:
        picked = {norm: next(iter(by)) for norm, by in energies.items()}
        gains = {norm: by[next(iter(by))] - by[best[norm]] for norm, by in energies.items()}
        for norm in sorted(gains, key=gains.__getitem__, reverse=True):
            if total() <= allowed:
                break
            picked[norm] = best[norm]
    costly = sorted(picked, key=lambda norm: energies[norm][picked[norm] or ""], reverse=True)
    for norm in costly[: recipe.leave]:
        costs = energies[norm][picked[norm] or ""] > 0
        if costs and (recipe.max_error is None or total() > allowed):
            picked[norm] = None
    return picked
