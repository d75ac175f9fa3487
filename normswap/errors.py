"""What normswap raises: one base class, one kind per broken promise.

Every message says *what*, *where* (a module's name, a value) and *what to do next*:

    error[fold-train-mode]: the model is in train mode ('' and 17 submodules)
      hint: call model.eval() before fold()
"""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "ExportError",
    "FoldError",
    "InitializationError",
    "InputError",
    "NormswapError",
    "NothingToConvertError",
    "PlanError",
    "VerificationError",
    "first_line",
]


class NormswapError(Exception):
    """Base of all errors; ``code`` is a stable slug, ``hint`` the next thing to do.

    ``exit_code`` is what the command line returns for it: 1 a verification failed, 2 wrong usage or unreadable
    input, 3 nothing could be converted.
    """

    exit_code = 2

    def __init__(self, message: str, *, code: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.code, self.hint = message, code, hint

    def __str__(self) -> str:
        text = f"error[{self.code}]: {self.message}"
        return f"{text}\n  hint: {self.hint}" if self.hint else text


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
