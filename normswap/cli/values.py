"""How the values of flags are read: shapes, arguments of an architecture, options of a recipe."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from normswap.errors import InputError

__all__ = [
    "AUTO",
    "STAYS",
    "Recipes",
    "Shapes",
    "called",
    "read_arch_kwargs",
    "read_at",
    "read_recipe_options",
    "read_shapes",
]

Shapes = tuple[tuple[int, ...], ...]
Recipes = str | Mapping[str, str | None]
"""A recipe's name, or one by globs of norms' names."""

REST = "*"
"""The glob of all norms: where it is the last, of those that no other has taken."""

STAYS = "stays"
"""What stands for a recipe where norms stay as they are."""

AUTO = "auto"
"""What stands for a recipe where the calibration data chooses one for each norm."""


def read_shapes(texts: Sequence[str] | None) -> Shapes:
    """Read ``1x3x224x224`` (also with ``×`` or commas), one for each input of the model."""
    shapes = []
    for text in texts or ():
        if not re.fullmatch(r"[1-9]\d*([xX×,][1-9]\d*)*", text):
            raise InputError(
                f"--input-shape {text!r} is not a shape", code="input-shape", hint="write --input-shape 1x3x224x224"
            )
        shapes.append(tuple(map(int, re.split("[xX×,]", text))))
    return tuple(shapes)


def read_arch_kwargs(text: str | None) -> dict[str, Any]:
    """Read ``{"num_classes": 10}`` or ``num_classes=10,width=0.5``."""
    if text is None:
        return {}
    try:
        found = json.loads(text) if text.lstrip().startswith("{") else dict(map(_assignment, text.split(",")))
    except ValueError as cause:
        raise InputError(
            f"--arch-kwargs {text!r} cannot be read: {cause}",
            code="arch-kwargs",
            hint="""write --arch-kwargs num_classes=10 or --arch-kwargs '{"num_classes": 10}'""",
        ) from None
    return dict(found)


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.strip().partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, {"True": True, "False": False, "None": None}.get(value, value)


def read_at(to: str | None, texts: Sequence[str] | None, *, default: str) -> Recipes:
    """Return the recipe of all norms, or a mapping of the ``GLOB=RECIPE``s and, for the rest, that recipe.

    Args:
        to: What --to names, None where it is not given.
        texts: The ``GLOB=RECIPE``s; ``*=RECIPE`` names that of the rest itself.
        default: The recipe where neither names one.

    Raises:
        InputError: A text is none, a glob is given twice, or both --to and ``*=RECIPE`` are for the rest.
    """
    found: dict[str, str | None] = {}
    for text in texts or ():
        glob, _, recipe = text.rpartition("=")
        if not glob or not recipe:
            raise InputError(
                f"--at {text!r} is not GLOB=RECIPE",
                code="at-value",
                hint="write --at 'stem.*=gn+aws' or 'head.*=stays'",
            )
        if glob in found:
            raise InputError(f"--at {glob!r} is given twice", code="at-value", hint="give it once")
        found[glob] = None if recipe == STAYS else recipe
    if REST not in found:
        return {**found, REST: to or default} if found else to or default
    if to is not None:
        raise InputError(
            f"--to {to} and --at '{REST}={found[REST] or STAYS}' both say what becomes of every other norm",
            code="at-value",
            hint="leave one of them out",
        )
    return found if any(found.values()) else STAYS


def called(recipe: Recipes) -> str:
    """Return what a line calls a recipe, or several: ``gn+aws, gn+ws``."""
    return recipe if isinstance(recipe, str) else ", ".join(dict.fromkeys(filter(None, recipe.values())))


def read_recipe_options(recipe: Recipes, given: Mapping[str, Any], texts: Sequence[str] | None) -> dict[str, Any]:
    """Return the recipe's options, each of the type that the recipe declares for it.

    Args:
        recipe: The recipe's name, or what has several.
        given: What options of their own gave; None was not given.
        texts: The ``NAME=VALUE``s.
    """
    from normswap.recipes import option_types

    types = {name: kind.split(" | ") for name, kind in option_types(recipe).items()}
    options = {
        name: _typed(name, value, types.get(name, ["str"])) if isinstance(value, str) else value
        for name, value in given.items()
        if value is not None
    }
    for text in texts or ():
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise InputError(
                f"--option {text!r} is not NAME=VALUE",
                code="option-value",
                hint="write --option axes=channel; `normswap recipes` lists the options",
            )
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            raise InputError(
                f"the recipe has no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
                code="unknown-option",
                hint=f"its options are {', '.join(types) or 'none'}; those of every conversion are flags of their own",
            )
        if name in options:
            raise InputError(f"{name} is given twice", code="option-value", hint="give it once")
        options[name] = _typed(name, value.strip(), types[name])
    return options


def _typed(name: str, value: str, types: Sequence[str]) -> Any:
    if "None" in types and value.lower() in ("none", "null"):
        return None
    if "bool" in types and value.lower() in ("true", "false", "yes", "no", "1", "0"):
        return value.lower() in ("true", "yes", "1")
    for kind in (int, float):
        if kind.__name__ in types:
            try:
                return kind(value)
            except ValueError:
                continue
    if "str" in types:
        return value
    if any(kind.startswith("tuple") for kind in types):
        return tuple(part.strip() for part in value.split(","))
    wanted = {"bool": "true or false", "int": "a whole number", "float": "a number", "None": "none"}
    raise InputError(
        f"--option {name}={value} does not fit",
        code="option-value",
        hint=f"give {' or '.join(wanted.get(kind, kind) for kind in types)}",
    )
