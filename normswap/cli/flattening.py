"""Turn the records of flags that a command declares into single flags for typer, and give it the records back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from normswap.cli.flags import Chosen, option_flags

__all__ = ["flattened"]


def flattened(command: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let typer see the single flags of the records, and of :class:`Chosen`, that a command's function takes."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        parameters: list[inspect.Parameter] = []
        groups: dict[str, tuple[list[str], Callable[..., Any]]] = {}
        for name, parameter in inspect.signature(function).parameters.items():
            hint = hints[name]
            if hint is Chosen:
                flags = list(option_flags(command))
                groups[name] = [flag.name for flag in flags], Chosen.of
            elif is_dataclass(hint):
                flags = _flags_of(hint)
                groups[name] = [flag.name for flag in flags], hint  # type: ignore[assignment]
            else:
                flags = [parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)]
            parameters += flags

        @functools.wraps(function)
        def run(**given: Any) -> None:
            records = {name: make(**{f: given.pop(f) for f in names}) for name, (names, make) in groups.items()}
            function(**given, **records)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _flags_of(record: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(record, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(f.name, keyword, default=f.default, annotation=hints[f.name]) for f in fields(record)]
