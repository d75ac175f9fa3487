"""What a fold reports: one row for each thing that was folded, or was not."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FoldRow"]


@dataclass(frozen=True)
class FoldRow:
    """One thing that was folded, or was not: its fqn, what became of it, and the reason if it stays."""

    name: str
    result: str
    reason: str = ""
