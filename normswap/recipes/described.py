"""What every recipe has, for norms and for recurrent layers: a name, a source, and options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from typing_extensions import Self

from normswap.errors import InputError, parameter

__all__ = ["Described"]

_KINDS: Mapping[str, tuple[Any, str]] = {
    "None": (type(None), "None"),
    "bool": (bool, "True or False"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "a text"),
    "tuple": ((tuple, list), "a tuple"),
}
"""What a value of an option is, by the option's type as it is written."""


@dataclass(frozen=True)
class Described:
    """A frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    equation: ClassVar[str]
    paper: ClassVar[str]
    exact: ClassVar[bool]
    """Whether the swap is a reparameterization: the outputs in evaluation stay the same up to rounding."""

    def __post_init__(self) -> None:
        eps = getattr(self, "eps", None)
        if eps is not None and not eps > 0:
            raise InputError(
                f"{parameter('eps')} must be > 0, got {eps}", code="eps", hint="give a small number such as 1e-5"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any], called: str) -> Self:
        """Return the recipe with ``options``; errors call it ``called``.

        Raises:
            InputError: It has no such option.
        """
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise InputError(
                f"{called} has no option {unknown[0]!r}",
                code="unknown-option",
                hint=f"its options are {', '.join(known)}" if known else "it has no options",
            )
        cls.check_types(options)
        return cls(**options)

    @classmethod
    def check_types(cls, options: Mapping[str, Any]) -> None:
        """Raise InputError for a value that is not of its option's type: 'no' would count as true."""
        written = {f.name: re.sub(r"\[.*\]", "", str(f.type)).split(" | ") for f in fields(cls)}
        for name, value in options.items():
            known = [_KINDS[one] for one in written[name] if one in _KINDS]
            number_for_flag = isinstance(value, bool) and "bool" not in written[name]
            if known and (number_for_flag or not any(isinstance(value, of) for of, _ in known)):
                raise InputError(
                    f"{parameter(name)} must be {' or '.join(words for _, words in known)}, got {value!r}",
                    code="option-type",
                    hint=f"the default is {next(f.default for f in fields(cls) if f.name == name)!r}",
                )

    def options(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        defaults = {f.name: f.default for f in fields(self)}
        return {k: v for k, v in asdict(self).items() if v != defaults[k]}
