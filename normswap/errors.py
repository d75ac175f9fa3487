"""What normswap raises: one base class, one kind per broken promise; and texts that name arguments.

Every message says *what*, *where* (a module's name, a value) and *what to do next*:

    error[fold-train-mode]: the model is in train mode ('' and 17 submodules)
      hint: call model.eval() before fold()

# Note [Texts that name arguments]
A Python user gives ``calibration=``, a user of the command line ``--calibration``. So a message does not spell the
argument out: ``f"give {argument('calibration')}"`` holds a marked :class:`Term`. Errors, and :class:`Text` for the
notes in reports, show it as Python does; another front end renders the same text with :func:`spelled`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = [
    "CaptureError",
    "ExportError",
    "FoldError",
    "InitializationError",
    "InputError",
    "NormswapError",
    "NothingToConvertError",
    "PlanError",
    "Term",
    "Text",
    "VerificationError",
    "argument",
    "first_line",
    "full_cause",
    "function",
    "marked",
    "parameter",
    "spelled",
]


@dataclass(frozen=True)
class Term:
    """Something that front ends spell differently.

    Args:
        kind: ``"argument"`` (``calibration=``), ``"parameter"`` (its name alone), ``"function"``, or ``"cause"``: where
            the exception behind an error is shown.
        name: Its name in Python.
        value: An argument's value, as a tuple of one; empty where the text names the argument alone.
    """

    kind: str
    name: str
    value: tuple[Any, ...] = ()

    def marked(self) -> str:
        """Return the term as it stands in a text until a front end spells it."""
        return f"\x02{json.dumps([self.kind, self.name, *self.value], default=str)}\x03"

    def __str__(self) -> str:
        if self.kind == "function":
            return f"normswap.{self.name}(model)"
        if self.kind == "parameter":
            return self.name
        if self.kind == "cause":
            return "the exception's __cause__"
        return f"{self.name}={''.join(map(repr, self.value))}"


def argument(name: str, *value: Any) -> str:
    """Return the argument ``name``, or that argument with a value, for use within a message.

    See Note [Texts that name arguments].
    """
    return Term("argument", name, value).marked()


def parameter(name: str) -> str:
    """Return the bare name of an argument, for use as a noun within a message."""
    return Term("parameter", name).marked()


def function(name: str) -> str:
    """Return the public function ``name``, called with a model, for use within a message."""
    return Term("function", name).marked()


def full_cause() -> str:
    """Return, for use within a message, where the exception that caused an error is shown in full."""
    return Term("cause", "").marked()


def spelled(text: str, spell: Callable[[Term], str] = str) -> str:
    """Return ``text`` with each of its terms as ``spell`` writes it, by default as Python does."""

    def write(found: re.Match[str]) -> str:
        try:
            kind, name, *value = json.loads(found[1])
        except (ValueError, TypeError):  # no mark of ours: a name from a file may hold anything
            return found[0]
        return spell(Term(str(kind), str(name), tuple(value)))

    return re.sub("\x02(.*?)\x03", write, marked(text))


def marked(text: str) -> str:
    """Return a text with its terms still marked, to make a longer one of it."""
    return text.marked if isinstance(text, Text) else text


class Text(str):
    """A text that may name arguments: reads as Python spells them, and :func:`spelled` renders it otherwise."""

    marked: str

    def __new__(cls, text: str) -> Text:
        """Make the text from one with marked terms."""
        made = super().__new__(cls, spelled(text))
        made.marked = marked(text)
        return made


class NormswapError(Exception):
    """Base of all errors; ``code`` is a stable slug, ``hint`` the next thing to do.

    ``exit_code`` is what the command line returns for it: 1 a verification failed, 2 wrong usage or unreadable
    input, 3 nothing could be converted.
    """

    exit_code = 2

    def __init__(self, message: str, *, code: str, hint: str = "") -> None:
        super().__init__(spelled(message))
        self.message: str = Text(message)
        self.hint: str = Text(hint)
        self.code = code

    def __str__(self) -> str:
        return str(self.text)

    @property
    def text(self) -> Text:
        """The whole error: its code, its message and its hint."""
        text = f"error[{self.code}]: {marked(self.message)}"
        return Text(f"{text}\n  hint: {marked(self.hint)}" if self.hint else text)


class InputError(NormswapError):
    """A model, file, option or input that cannot be read or does not fit."""


class CaptureError(NormswapError):
    """The model's dataflow could not be captured."""


class PlanError(NormswapError):
    """A plan cannot be made, read or replayed on this model."""


class NothingToConvertError(NormswapError):
    """No site in the model can be converted."""

    exit_code = 3


class InitializationError(NormswapError):
    """The new parts could not be given values."""


class FoldError(NormswapError):
    """A reparameterization could not be folded into a plain weight."""


class ExportError(NormswapError):
    """The model could not be exported."""


class VerificationError(NormswapError):
    """Two things that must compute the same do not."""

    exit_code = 1


def first_line(cause: BaseException) -> str:
    """Return the first line of an error's message that says something."""
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
