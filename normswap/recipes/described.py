"""What every recipe has, for norms and for recurrent layers: a name, a source, and options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from typing_extensions import Self

from normswap.errors import InputError, parameter
from normswap.options import check_types

__all__ = ["Described"]


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
        if eps is not None and not 0 < eps < math.inf:
            raise InputError(
                f"{parameter('eps')} must be > 0 and finite, got {eps}",
                code="eps",
                hint="give a small number such as 1e-5",
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
        check_types(cls, options)

    def options(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        defaults = {f.name: f.default for f in fields(self)}
        return {k: v for k, v in asdict(self).items() if v != defaults[k]}
