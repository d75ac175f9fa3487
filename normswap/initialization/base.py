"""What an initializer is: one class for each value of ``init``, which gives a conversion's new parts their values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

from torch import Tensor, nn

from normswap.discovery import classes_in
from normswap.errors import InputError, argument
from normswap.norms import Assignment
from normswap.options import Options
from normswap.recipes import Recipe
from normswap.recipes.recurrent import RecurrentRecipe
from normswap.records import Agreement, InitRow
from normswap.runs.calling import Batch
from normswap.runs.inputs import Inputs
from normswap.stages.bound import BoundPlan, BoundStep
from normswap.stages.moves import Scale
from normswap.stages.rewriting import Placed

__all__ = ["Initializer", "Outcome", "Progress", "Work", "initializer_for", "initializers"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Work:
    """What an initializer works on.

    Args:
        original: The user's model; only read.
        source: It, or a copy of it with scaled channels, which is what is converted. A fit only reads it; otherwise it
            is the model that is rewritten, each site after its values have been given.
        bound: What is done to it.
        options: How.
        example: Inputs of the model.
        enough: The first batches of the calibration data, which hold enough samples for closed forms.
        batches: All of it; a list where the initializer :attr:`revisits` it.
        scales: Of the channels that norms of ``source`` give, by fqn, where they were scaled.
        factors: What each parameter of ``original`` was multiplied with for ``source``, by name, where it was.
        scaling: Where the model itself is to be scaled: does that, and undoes it if what is done within fails.
        choose_groups: Whether the data chooses the group counts where a recipe leaves them to it.
        isolated: Whether the original's values go on after each site, so that its error is its own alone.
        progress: Called with what is done, how much of it is, and how much there is.
    """

    original: nn.Module
    source: nn.Module
    bound: BoundPlan
    options: Options
    example: Inputs | None = None
    enough: Sequence[Batch] | None = None
    batches: Iterable[Batch] = ()
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    factors: Mapping[str, Scale] = field(default_factory=dict)
    scaling: Callable[[], AbstractContextManager[None]] = nullcontext
    choose_groups: bool = False
    isolated: bool = False
    progress: Progress | None = None


@dataclass(frozen=True)
class Outcome:
    """What an initializer has done.

    Args:
        rows: How each module got its values.
        notes: What a person should know.
        agreement: How far both networks' outputs agree, where there was data.
        groups: The group counts that the data chose, by the norms' names.
    """

    rows: tuple[InitRow, ...]
    notes: tuple[str, ...] = ()
    agreement: Agreement | None = None
    groups: Mapping[str, int] = field(default_factory=dict)


class Initializer:
    """A way to give the new parts their values. To add one, subclass this in a file of this folder.

    The values that follow from the original alone are given while the model is rewritten, one site after the other
    (:meth:`values`); what needs the converted network comes after (:meth:`refine`).
    """

    name: ClassVar[str]
    """The value of ``init`` that chooses it."""
    keeps_function: ClassVar[bool] = True
    """Whether the converted model is meant to compute what the original does."""
    fits: ClassVar[bool] = False
    """Whether it fits the converted network to the original's values on data, and so needs both side by side."""
    revisits: ClassVar[bool] = False
    """Whether it goes through all data, beyond what is enough for closed forms, again and again."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def values(self, step: BoundStep) -> Assignment:
        """Return the values of a step's new parts, which follow from the original alone; pure."""
        raise NotImplementedError

    def refine(self, target: nn.Module, placed: Sequence[Placed]) -> Outcome:
        """Do to the rewritten model ``target`` what can only be done now, and say what was done in all."""
        raise NotImplementedError


@cache
def initializers() -> Mapping[str, type[Initializer]]:
    """Return every initializer of this folder by its name."""
    import normswap.initialization as folder

    return classes_in(folder, Initializer)


def initializer_for(
    init: str | None, recipe: Recipe, has_data: bool, recurrent: RecurrentRecipe | None = None
) -> type[Initializer]:
    """Return what gives the new parts their values.

    Args:
        init: The initializer's name; None for a match where there is data and the recipe is not exact, else absorb.
        recipe: The recipe.
        has_data: Whether there is calibration data.
        recurrent: That for recurrent layers. Where both are exact nothing is left to fit.

    Raises:
        InputError: There is no such initializer, or it needs data and there is none.
    """
    known = initializers()
    if init is None:
        init = "match" if has_data and not recipe.exact else "absorb"
    if init not in known:
        raise InputError(
            f"{argument('init', init)} is unknown", code="unknown-init", hint=f"choose from {', '.join(known)}"
        )
    chosen = known[init]
    if chosen.fits and not has_data:
        raise InputError(
            f"{argument('init', init)} fits to data and none was given",
            code="no-calibration",
            hint=f"give {argument('calibration')}, some hundred unlabelled samples",
        )
    exact = recipe.exact and (recurrent is None or recurrent.exact)
    return known["absorb"] if chosen.fits and exact else chosen
