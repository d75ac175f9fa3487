"""What a migration did, parameter by parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from normswap.records.tables import text_table

__all__ = ["OptimizerMigration", "OptimizerRow", "StateDictMigration"]


@dataclass(frozen=True)
class OptimizerRow:
    """What happened to one parameter's state.

    Args:
        parameter: Its name: in the new model or, where it is gone, in the old one.
        what: ``unchanged``, ``mapped``, ``fresh``, ``not held`` or ``gone``.
        detail: From what, or why.
    """

    parameter: str
    what: str
    detail: str = ""


@dataclass(frozen=True)
class OptimizerMigration:
    """What :func:`migrate_optimizer` gave; prints as a table.

    Args:
        optimizer: The optimizer, or the state dict where one was given.
        rows: What happened to each parameter of both models.
        foreign: How many of its parameters are none of the old model's; they are as they were.
    """

    optimizer: Any
    rows: tuple[OptimizerRow, ...]
    foreign: int = 0

    def __str__(self) -> str:
        table = text_table(("parameter", "what", "detail"), [(r.parameter, r.what, r.detail) for r in self.rows])
        return f"{table}\n{self.foreign} parameters of other models stay as they were" if self.foreign else table


@dataclass(frozen=True)
class StateDictMigration:
    """What :func:`migrate_state_dict` gave.

    Args:
        state: The state dict.
        to: What it is of: ``"converted"``, ``"batchnorm"``, or ``"renamed"`` where names alone were changed.
        exact: Whether it is the same function in evaluation, up to rounding.
        notes: What a person should know.
    """

    state: Mapping[str, Any]
    to: str
    exact: bool
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        how = "exactly" if self.exact else "not exactly"
        return "\n".join([f"{len(self.state)} tensors, {self.to}, {how}", *self.notes])
