"""What a recipe is: its options, the parts it puts at a site, what it refuses, and where it comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from normswap.errors import InputError, Text, argument, parameter
from normswap.norms import Norm
from normswap.norms.group import Groups
from normswap.recipes.described import Described
from normswap.records import Site
from normswap.weights import PlainWeight, Weight

__all__ = ["AUTO_GROUPS", "DEFAULT_GROUP_SIZE", "GroupedRecipe", "Recipe"]

DEFAULT_GROUP_SIZE = 16
"""Channels per group, one of the two settings of the group normalization paper (Wu & He 2018, table 3)."""

LEAST_VALUES = DEFAULT_GROUP_SIZE * 28**2
"""The values of a sample that a group holds at the least, where it has no size of its user's.

On maps of 7×7 positions a group of 16 channels has the statistics of 784 values, which differ from sample to sample by
more than what the network has learnt can take. Measured on an ImageNet network (docs/results.md).
"""

AUTO_GROUPS = "auto"


@dataclass(frozen=True)
class Recipe(Described):
    """What replaces a Conv-BatchNorm site. A recipe is a frozen dataclass whose fields are its options.

    To add one, subclass this in a file of its own, set the class attributes, and implement :meth:`weight` and
    :meth:`norm` with the classes of :mod:`normswap.weights` and :mod:`normswap.norms`, or with your own. Recipes in
    this folder are found by name; a recipe elsewhere is passed as an instance.
    """

    by_itself: ClassVar[bool] = True
    """Whether its name alone chooses it; else it needs options."""
    needs_layer: ClassVar[bool] = False
    """Whether it normalizes the layer, so that it does nothing where none takes the norm up."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """The globs by which it tells the norms apart, each of which must match one."""
        return ()

    def at(self, site: Site) -> Recipe | None:
        """Return the recipe that is used at ``site``: itself, or one of those that it is made of; None for none."""
        return self

    def refuse(self, site: Site) -> str | None:
        """Return why this recipe cannot be used at ``site``, or None."""
        if self.needs_layer and site.layer is None:
            return f"there is no layer for it to normalize: {site.reason}"
        return None

    def weight(self, site: Site) -> Weight:
        """Return the form of the site's layer's weight; asked only where the site has a layer."""
        return PlainWeight()

    def groups_at(self, site: Site) -> int | None:
        """Return the group count at ``site``, None where the norm has no groups."""
        return None

    @property
    def least_group(self) -> int | None:
        """The fewest channels of a group, where the group counts are left to the data; None where they are not."""
        return None

    def with_groups(self, count: int | None) -> Recipe:
        """Return the recipe with so many groups at each site, where its norm has groups; None for the default ones."""
        return self

    @property
    def without_data(self) -> Recipe:
        """The recipe where there is no data: with the default group counts, where they are left to it."""
        return self if self.least_group is None else self.with_groups(None)

    def norm(self, site: Site, num_groups: int | None) -> Norm:
        """Return what stands where the norm stood."""
        raise NotImplementedError

    def notes(self, site: Site) -> tuple[str, ...]:
        """Return what a person should know about this site."""
        return ()


@dataclass(frozen=True)
class GroupedRecipe(Recipe):
    """A recipe whose norm is a group normalization.

    Args:
        num_groups: Groups at every site; must divide the channels everywhere. ``"auto"`` gives each site the count of
            least error on held-out calibration data.
        group_size: Channels per group, where that divides; elsewhere the nearest size that does. Default 16, and more
            where example inputs show a map of fewer than 28×28 positions: as many as hold the same number of values.
            With ``num_groups="auto"`` the fewest channels that a group may have.
        eps: Added to the variance; default that of the norm it replaces.
    """

    num_groups: int | str | None = None
    group_size: int | None = None
    eps: float | None = None

    def refuse(self, site: Site) -> str | None:
        groups = self.groups_at(site)
        if site.num_features > groups:
            return None
        if site.rank is None:
            return Text(
                "a group of one channel may hold one value, which normalizes to zero: give "
                f"{argument('example_inputs')}"
            )
        if site.rank == 2 or site.spatial == 1:
            return "a group would hold one value, which normalizes to zero"
        return None

    def groups_at(self, site: Site) -> int:
        """Return ``num_groups``, or the count whose group size divides and is nearest, by ratio, to ``group_size``.

        Raises:
            InputError: ``num_groups`` does not divide the site's channels, or both options are given.
        """
        channels = site.num_features
        if isinstance(self.num_groups, str):
            if self.num_groups != AUTO_GROUPS:
                raise InputError(
                    f"{parameter('num_groups')} must be a whole number or 'auto', got {self.num_groups!r}",
                    code="group-options",
                    hint=f"{argument('num_groups', 'auto')} chooses by calibration data",
                )
        elif self.num_groups is not None and self.group_size is not None:
            raise InputError(
                f"{argument('num_groups', self.num_groups)} and "
                f"{argument('group_size', self.group_size)} are both given",
                code="group-options",
                hint="give one of them",
            )
        elif self.num_groups is not None:
            if self.num_groups < 1 or channels % self.num_groups:
                divisors = [d for d in range(1, channels + 1) if channels % d == 0]
                raise InputError(
                    f"{argument('num_groups', self.num_groups)} does not divide the {channels} channels of "
                    f"'{site.norm}'",
                    code="groups-do-not-divide",
                    hint=f"give one of {divisors}, or {parameter('group_size')} for the nearest size that divides at "
                    "each norm",
                )
            return self.num_groups
        target = self._default_size(site) if self.group_size is None else self.group_size
        if target < 1:
            raise InputError(
                f"{parameter('group_size')} must be ≥ 1, got {target}",
                code="group-options",
                hint=f"the default is {DEFAULT_GROUP_SIZE}",
            )
        smallest = 1 if target == 1 or channels == 1 else 2
        sizes = [s for s in range(smallest, channels + 1) if channels % s == 0]
        return channels // min(sizes, key=lambda s: abs(math.log(s / target)))

    def notes(self, site: Site) -> tuple[str, ...]:
        chosen = self.num_groups is not None or self.group_size is not None
        grown = not chosen and self._default_size(site) > DEFAULT_GROUP_SIZE < site.num_features
        return ("larger groups than 16 channels, as the map is small",) if grown else ()

    def _default_size(self, site: Site) -> int:
        if site.spatial is None:
            return DEFAULT_GROUP_SIZE
        return max(DEFAULT_GROUP_SIZE, min(site.num_features, math.ceil(LEAST_VALUES / max(site.spatial, 1))))

    @property
    def least_group(self) -> int | None:
        return (self.group_size or 2) if self.num_groups == AUTO_GROUPS else None

    def with_groups(self, count: int | None) -> Recipe:
        return replace(self, num_groups=count, group_size=self.group_size if count is None else None)

    def norm(self, site: Site, num_groups: int | None) -> Norm:
        assert num_groups is not None
        return Groups(num_groups, site.eps if self.eps is None else self.eps)
