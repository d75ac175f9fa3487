"""What a comparison found, output by output."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normswap.errors import VerificationError
from normswap.records import text_table

__all__ = ["OutputRow", "Verification"]


@dataclass(frozen=True)
class OutputRow:
    """How far one output of ``b`` is from the same output of ``a``.

    Args:
        name: Where the output stands in what the network returns.
        shape: Its shape in ``a``.
        dtype: Its dtype; both, as ``a/b``, where they differ.
        max_abs: ``max |a − b|``; infinite where the two cannot be compared.
        scale: ``max |a|`` over the finite values.
        max_rel: ``max_abs / scale``.
        tolerance: The ``rtol`` that was applied; 0 where the output must be identical.
        ok: Whether the two are equal, see Note [What counts as equal].
        reason: Why they are not; empty where they are.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    max_abs: float
    scale: float
    max_rel: float
    tolerance: float
    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class Verification:
    """What a comparison found, output by output; prints as a table.

    Args:
        a: The name of the reference.
        b: The name of what was compared with it.
        rows: One row per output.
        reason: Why the outputs could not be paired at all; empty where they could.
    """

    a: str
    b: str
    rows: tuple[OutputRow, ...]
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether there are outputs and all of them are equal."""
        return not self.reason and bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def proves_nothing(self) -> bool:
        """Whether the two differ in nothing, but gave nothing that could have differed."""
        return bool(self.reason) and bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def max_abs(self) -> float:
        """The largest absolute difference; infinite where the outputs could not be compared."""
        return max((row.max_abs for row in self.rows), default=math.inf)

    @property
    def max_rel(self) -> float:
        """The largest difference relative to its output's magnitude."""
        return max((row.max_rel for row in self.rows), default=math.inf)

    @property
    def tolerance(self) -> float:
        """The largest relative difference that was allowed in any output."""
        return max((row.tolerance for row in self.rows), default=0.0)

    @property
    def failure(self) -> str:
        """Why the two do not compute the same, in one line; empty where they do."""
        if self.reason or self.ok:
            return self.reason
        return next((f"output {r.name!r} {r.reason}" for r in self.rows if not r.ok), "nothing was compared")

    def __str__(self) -> str:
        head = f"{self.a} and {self.b} {'agree' if self.ok else 'DIFFER'}"
        if not self.rows:
            return f"{head}: {self.reason}"
        if self.reason:
            head = f"{self.a} and {self.b} prove nothing: {self.reason}"
        else:
            head += f": {self.max_rel:.1e} of the output's magnitude (allowed {self.tolerance:.0e})"
        table = text_table(
            ("output", "shape", "dtype", "max |a−b|", "max |a|", "relative", "allowed", "result"),
            [
                (
                    row.name,
                    "×".join(map(str, row.shape)) or "scalar",
                    row.dtype,
                    f"{row.max_abs:.1e}",
                    f"{row.scale:.1e}",
                    f"{row.max_rel:.1e}",
                    f"{row.tolerance:.0e}" if row.tolerance else "exact",
                    row.reason or "ok",
                )
                for row in self.rows
            ],
        )
        return f"{head}\n\n{table}"

    def to_json(self, indent: int | None = 2) -> str:
        """Return the record as JSON; a difference that is not finite is null."""
        numbers = {"max_abs": self.max_abs, "max_rel": self.max_rel, "tolerance": self.tolerance}
        record = {"ok": self.ok, **numbers, **dataclasses.asdict(self)}
        return json.dumps(_finite(record), indent=indent, ensure_ascii=False, allow_nan=False)

    def raise_if_failed(self) -> None:
        """Do nothing where the two agree.

        Raises:
            VerificationError: They do not; the message names the first output that differs.
        """
        if not self.ok:
            raise VerificationError(
                f"{self.a} and {self.b} do not compute the same: {self.failure}",
                code="verification-failed",
                hint="print the verification for all outputs; do not put the second in the first's place",
            )


def _finite(value: Any) -> Any:
    """Return ``value`` with None for each float that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
