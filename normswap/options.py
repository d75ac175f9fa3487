"""The options of a conversion that hold for every recipe: one record, for Python and for the command line.

To add an option, add a field here: it is checked, ``convert`` takes it by its name, and the command line has a flag
for it, with its meaning as help.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

from normswap.errors import InputError, Text, argument, parameter

__all__ = [
    "NEW_NORMS",
    "OUTPUT",
    "WHICH_NORMS",
    "Flag",
    "Meaning",
    "Options",
    "check_callable",
    "check_types",
    "option",
]

# The headings under which the command line's help shows its flags.
NEW_NORMS, WHICH_NORMS, OUTPUT = "The new norms", "Which norms", "Output"


@dataclass(frozen=True)
class Flag:
    """How the command line offers an option.

    Args:
        commands: The commands that have it; none for an option that only Python has.
        metavar: What stands for its value in the help.
        heading: The heading under which the help shows it.
        note: What its help says after its meaning.
    """

    commands: tuple[str, ...] = ("convert",)
    metavar: str = ""
    heading: str = NEW_NORMS
    note: str = ""


@dataclass(frozen=True)
class Meaning:
    """What is known of an option beside its type and default, in its field's metadata under ``"meaning"``.

    Args:
        text: What it means, in one sentence.
        minimum: The least number that it may be, None where it is no number.
        flag: How the command line offers it.
    """

    text: Text
    minimum: float | None = None
    flag: Flag = Flag()


def option(default: Any, text: str, *, minimum: float | None = None, flag: Flag | None = None) -> Any:
    """Return a field of :class:`Options`; the arguments are those of :class:`Meaning`."""
    return field(default=default, metadata={"meaning": Meaning(Text(text), minimum, flag or Flag())})


_KINDS: Mapping[str, tuple[Any, str]] = {
    "None": (type(None), "None"),
    "bool": (bool, "True or False"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "a text"),
    "tuple": ((tuple, list), "a tuple"),
}
"""What a value of an option is, by the option's type as it is written."""


def check_types(kind: type, values: Mapping[str, Any]) -> None:
    """Raise InputError for a value that is not of the type of its field in the dataclass ``kind``.

    'no' would count as true.
    """
    written = {f.name: re.sub(r"\[.*\]", "", str(f.type)).split(" | ") for f in fields(kind)}
    for name, value in values.items():
        known = [_KINDS[one] for one in written[name] if one in _KINDS]
        number_for_flag = isinstance(value, bool) and "bool" not in written[name]
        if known and (number_for_flag or not any(isinstance(value, of) for of, _ in known)):
            raise InputError(
                f"{parameter(name)} must be {' or '.join(words for _, words in known)}, got {value!r}",
                code="option-type",
                hint=f"the default is {next(f.default for f in fields(kind) if f.name == name)!r}",
            )


def check_callable(name: str, value: Any) -> None:
    """Raise InputError for an argument that is to be called and cannot be."""
    if value is not None and not callable(value):
        raise InputError(
            f"{argument(name)} is of type {type(value).__name__}", code="option-type", hint="give a function"
        )


@dataclass(frozen=True)
class Options:
    """How a conversion is done, whatever the recipe.

    Args:
        include: Convert only norms whose names match one of these globs; default all, ``("*",)``. None at all is
            refused, as the list may have come out empty by mistake. It holds for recurrent layers, too.
        exclude: Leave norms whose names match one of these globs as they are. It holds for recurrent layers, too.
        init: How the new norms get their values. absorb keeps the model's function by what its BatchNorms know, at the
            statistics of the calibration data where there is some; match then fits each site to that data in closed
            form (the default with calibration=); tune then takes gradient steps towards the original's own values,
            without labels; fresh leaves the new norms as torch starts them; fixup draws a residual network that is left
            without norms anew (:mod:`normswap.initialization.fixup`).
        scale: Let channels between layers be scaled, where weights are standardized: the same function, and the swap
            is closer; features taken from within the model differ from the original's by a factor per channel, and
            those that go into a linear layer do not (:mod:`normswap.initialization.equalization`).
        spread: How far apart the offsets of a group's channels are set, in their standard deviations. 0 leaves a
            group's statistics to the sample alone; with more they are steadier, the swap closer, and less is
            normalized (:mod:`normswap.initialization.steadying`). Absorbing needs a pass of noise for it where there
            is no data, which 0 saves.
        tune_steps: Gradient steps of init='tune', of one batch each.
        recurrent: What becomes of recurrent layers (LSTM, GRU, RNN and their cells): None leaves them, a recipe's name
            converts them. wn parametrizes the rows of their matrices as weight normalization, aws as weight
            standardization with an offset, both exactly; on data, ws does without the offset, and ln makes LSTMs
            layer-normalized. ``{"recipe": "ln", "spread": 30}`` gives one options of its own.
        check: Verify that an exact recipe has kept the model's output; the inputs are the example's, or made up.
        inplace: Convert the model itself, for models that fill the memory; a failed check leaves it converted.
        processes: Let all processes of torch.distributed bring calibration data of their own, and give them the same
            values, where there is a process group and such data: what is measured, fitted and chosen is that of all of
            it. Every process must make the call; with False one works by itself (:mod:`normswap.runs.processes`).

    Raises:
        InputError: A value is not one that the option may have.
    """

    include: tuple[str, ...] = option(
        ("*",),
        "Convert only norms whose names match one of these globs",
        flag=Flag(metavar="GLOB", heading=WHICH_NORMS, note=", such as 'layer1.*'"),
    )
    exclude: tuple[str, ...] = option(
        (),
        "Leave norms whose names match one of these globs as they are",
        flag=Flag(metavar="GLOB", heading=WHICH_NORMS),
    )
    init: str | None = option(
        None,
        "How the new norms get their values",
        flag=Flag(
            metavar="HOW",
            note=f". absorb: keep what the BatchNorms know, at the statistics of {argument('calibration')} where that "
            f"is given; match: then fit each site to it (the default with {argument('calibration')}); tune: then take "
            "gradient steps, without labels; fresh: new norms as torch starts them; fixup: draw a residual network "
            "that is left without norms anew",
        ),
    )
    scale: bool = option(
        True,
        "Let channels between layers be scaled, where weights are standardized: the same function, and the swap is "
        "closer; features taken from within the model differ from the original's by a factor per channel",
        flag=Flag(commands=("inspect", "convert")),
    )
    spread: float = option(
        2.0,
        "How far apart the offsets of a group's channels are set, in their standard deviations",
        minimum=0,
        flag=Flag(
            commands=("inspect", "convert"),
            metavar="X",
            note=": the more, the steadier a group's statistics; 0 leaves them alone",
        ),
    )
    tune_steps: int = option(300, f"Gradient steps of {argument('init', 'tune')}", minimum=0, flag=Flag(metavar="N"))
    recurrent: str | None = option(
        None,
        "What becomes of recurrent layers (LSTM, GRU, RNN and their cells)",
        flag=Flag(
            commands=("inspect", "convert"),
            metavar="RECIPE",
            note=": wn normalizes the rows of their matrices, aws standardizes them, both exactly, ws without an "
            "offset and ln as layer normalization, on data; without it they stay",
        ),
    )
    check: bool = option(
        True,
        "Verify that an exact recipe has kept the model's output",
        flag=Flag(heading=OUTPUT),
    )
    inplace: bool = option(
        False,
        "Convert the model itself, for models that fill the memory",
        flag=Flag(commands=()),  # what a command has read from a file is nobody else's
    )
    processes: bool = option(
        True,
        "Let all processes of torch.distributed bring calibration data of their own, and give them the same values",
        flag=Flag(commands=()),  # a command is one process
    )

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            globs = getattr(self, name)
            given = (globs,) if isinstance(globs, str) else tuple(globs) if isinstance(globs, Iterable) else (globs,)
            if wrong := [one for one in given if not isinstance(one, str)]:
                raise InputError(
                    f"{parameter(name)} must be globs of names, got {wrong[0]!r}",
                    code="option-type",
                    hint="give texts such as 'layer1.*'",
                )
            object.__setattr__(self, name, given)
        if not self.include:
            raise InputError(
                f"{parameter('include')} names no norm: it is empty",
                code="include-empty",
                hint="leave it out to convert all norms; to convert none, do not convert",
            )
        if self.init == "none":
            renamed = Text(f"{argument('init', 'none')} is now called {argument('init', 'fresh')}")
            warnings.warn(renamed, FutureWarning, stacklevel=3)
            object.__setattr__(self, "init", "fresh")
        for known in fields(self):
            if known.metadata["meaning"].minimum is not None:
                _check_number(known, getattr(self, known.name))
            elif known.name != "recurrent":  # a recipe, which may be more than its name
                check_types(type(self), {known.name: getattr(self, known.name)})

    @classmethod
    def split(
        cls, given: Mapping[str, Any], recipe_fields: Sequence[str], others: Sequence[str] = ()
    ) -> tuple[Options, dict[str, Any]]:
        """Take keyword arguments apart into these options and those of a recipe.

        Args:
            given: The keyword arguments.
            recipe_fields: The names of the recipe's options.
            others: Further names that the caller takes, which a misspelt one may have meant.

        Raises:
            InputError: An argument is neither; the message names the one that is spelt most like it.
        """
        own = [known.name for known in fields(cls)]
        for name in given:
            if name not in own and name not in recipe_fields:
                near = difflib.get_close_matches(name, [*recipe_fields, *own, *others], n=1)
                raise InputError(
                    f"there is no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
                    code="unknown-option",
                    hint=f"the recipe's options are {', '.join(recipe_fields) or 'none'}; those of every conversion "
                    f"{', '.join(own)}",
                )
        options = {name: value for name, value in given.items() if name in own}
        return cls(**options), {name: value for name, value in given.items() if name not in own}


def _check_number(known: Field[Any], value: Any) -> None:
    minimum: float = known.metadata["meaning"].minimum
    whole = isinstance(known.default, int)
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not number or not minimum <= value < math.inf:
        wanted = f"a whole number ≥ {minimum:g}" if whole else f"≥ {minimum:g} and finite"
        raise InputError(
            f"{parameter(known.name)} must be {wanted}, got {value!r}",
            code=known.name.replace("_", "-"),
            hint=f"the default is {known.default:g}",
        )
