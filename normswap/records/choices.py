"""Choice: which recipe each site gets, and what each of the others would have done to the output."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from normswap.records.tables import text_table

__all__ = ["Choice", "SiteChoice"]


@dataclass(frozen=True)
class SiteChoice:
    """What each recipe would do at one site, and which of them was chosen.

    Args:
        norm: The norm's fqn.
        errors: By recipe the relative error ``‖y' − y‖/‖y‖`` of the model's output that the site causes by itself; the
            recipes that cannot be used there are missing.
        chosen: The recipe that was chosen; None where the norm stays.
        num_groups: The group count of the chosen recipe, where the data chose it.
    """

    norm: str
    errors: Mapping[str, float]
    chosen: str | None
    num_groups: int | None = None

    @property
    def error(self) -> float:
        """The relative error that the site causes with what was chosen."""
        return 0.0 if self.chosen is None else self.errors[self.chosen]


@dataclass(frozen=True)
class Choice:
    """A recipe for each site, chosen by what it does to the model's output.

    Args:
        recipes: The names of the recipes that it was chosen from.
        sites: What was chosen at each site, in the plan's order.
        to: The choice as ``to=`` of :func:`normswap.convert` takes it; JSON has the names of a user's own recipes.
        notes: What a person should know.
    """

    recipes: tuple[str, ...]
    sites: tuple[SiteChoice, ...]
    to: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def expected_error(self) -> float:
        """The expected relative error of the output: the sites' errors, added as if they were independent."""
        return math.hypot(*(site.error for site in self.sites))

    def expected_with(self, recipe: str) -> float | None:
        """Return the same with one recipe at all sites; None where some site cannot have it."""
        if not all(recipe in site.errors for site in self.sites):
            return None
        return math.hypot(*(site.errors[recipe] for site in self.sites))

    def summary(self) -> str:
        """Return in one line how often each recipe was chosen, and what is expected of it."""
        counts = Counter(site.chosen or "stays" for site in self.sites)
        alone = {name: self.expected_with(name) for name in self.recipes}
        others = ", ".join(f"{_cell(error)} with {name} alone" for name, error in alone.items() if error is not None)
        chosen = ", ".join(f"{name} at {count}" for name, count in counts.most_common())
        expected = f"expected relative error of the output {_cell(self.expected_error)}"
        return f"{chosen}; {expected}" + (f", {others}" if others else "")

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table of the choice, its header first."""
        found = [("norm", *self.recipes, "chosen")]
        for site in self.sites:
            found.append((site.norm, *(_cell(site.errors.get(name)) for name in self.recipes), _chosen(site)))
        total = (_cell(self.expected_with(name)) for name in self.recipes)
        return [*found, ("all together", *total, _cell(self.expected_error))]

    def __str__(self) -> str:
        header, *rows = self.rows()
        head = "relative error of the output by norm and recipe, each norm by itself"
        return "\n\n".join([head, text_table(header, rows), *self.notes])

    def to_json(self, indent: int | None = 2) -> str:
        """Return the choice as JSON."""
        to = {glob: getattr(part, "name", part) for glob, part in self.to.items()}
        record = {**asdict(self), "to": to, "expected_error": self.expected_error}
        return json.dumps(record, indent=indent, ensure_ascii=False)


def _cell(error: float | None) -> str:
    return "–" if error is None else f"{error:.3f}"


def _chosen(site: SiteChoice) -> str:
    if site.chosen is None:
        return "stays"
    groups = "" if site.num_groups is None else f", {site.num_groups} group{'' if site.num_groups == 1 else 's'}"
    return f"{site.chosen}{groups}"
