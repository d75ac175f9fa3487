"""Docstrings name other objects as Sphinx does, ``:func:`convert```; the site's pages link them as Markdown does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?(?:normswap\.)?([^`]+)`")
DOCUMENTED = set(
    re.findall(r"^::: normswap\.(\w+)$", Path(__file__).with_name("api.md").read_text("utf-8"), re.MULTILINE)
)


class Roles(griffe.Extension):
    """Replace each role by the name in code font, with a link where the API page documents it."""

    def on_object(self, *, obj: griffe.Object, **given: Any) -> None:
        """Rewrite one object's docstring (called by griffe for each object that it reads)."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(_linked, obj.docstring.value)


def _linked(role: re.Match[str]) -> str:
    name = role[1]
    return f"[`{name}`][normswap.{name}]" if name in DOCUMENTED else f"`{name}`"
