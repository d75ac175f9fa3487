"""How the command line spells what messages name: ``calibration=`` of Python is ``--calibration`` here."""

from __future__ import annotations

from typing import Any

from normswap.errors import Term, spelled

__all__ = ["BY_OPTION", "FLAGS", "PYTHON_ONLY", "flag_of", "spell"]

FLAGS = {
    "example_inputs": "--input-shape or --input-file",
    "model": "--arch",
}
"""The arguments whose flag is not their name with dashes."""

PYTHON_ONLY = {"condition", "inplace", "kind", "lr", "momentum", "names", "rates", "recipe", "result", "steps"}
"""The arguments that no command has: they are shown as Python spells them."""

BY_OPTION = {"alpha", "beta", "leave", "max_error", "recipes"}
"""The options of recipes that have no flag of their own."""


def spell(text: str) -> str:
    """Return a text of the package in the words of the command line, see Note [Texts that name arguments]."""
    return spelled(text, _on_the_command_line)


def flag_of(name: str) -> str:
    """Return the flag of the argument ``name``."""
    if name in BY_OPTION:
        return f"--option {name}"
    return FLAGS.get(name, f"--{name.replace('_', '-')}")


def _on_the_command_line(term: Term) -> str:
    if term.kind == "function":
        return f"normswap {term.name} MODEL"
    if term.kind == "cause":
        return "`normswap --debug …` shows it"
    if term.name in PYTHON_ONLY:
        return f"{term} in Python"
    return " ".join([_with_value(flag_of(term.name), value) for value in term.value]) or flag_of(term.name)


def _with_value(flag: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    joint = "=" if flag.startswith("--option ") else " "
    return " ".join(f"{flag}{joint}{one}" for one in (value if isinstance(value, list) else [value]))
