"""What the commands say about a plan, a conversion and the files that were written."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normswap.cli.console import facts, say, table
from normswap.records import InitReport, Plan, Skip, Step

if TYPE_CHECKING:
    from normswap.conversion import Conversion
    from normswap.exporting import ExportArtifact
    from normswap.verification import Verification

__all__ = ["as_record", "describe_check", "show_artifact", "show_check", "show_conversion", "show_plan", "written"]

MOST_NOTES = 5


def show_plan(plan: Plan) -> None:
    """Print what becomes of every norm and layer."""
    chosen = "".join(f" {name}={value}" for name, value in plan.options.items())
    say(f"{plan.model} → {plan.recipe}{chosen}\n")
    table(("norm", "is", "layer", "weight", "becomes", "proof", "notes"), [_row(step) for step in plan.steps])
    say()
    if plan.skips:
        table(
            ("skipped", "what", "names", "reason"),
            [(str(len(names)), what, _some(names), reason) for (what, reason), names in _grouped(plan.skips)],
        )
        say()
    say(plan.summary())


def _row(step: Step) -> tuple[str, ...]:
    site = step.site
    notes = "; ".join((*site.remarks, *step.notes))
    return site.norm, site.norm_type, site.layer or "–", step.weight or "–", step.norm, site.evidence, notes


def _grouped(skips: Sequence[Skip]) -> list[tuple[tuple[str, str], list[str]]]:
    """Return the names per kind and reason, norms first."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for skip in sorted(skips, key=lambda skip: skip.what != "norm"):
        groups[skip.what, skip.reason].append(skip.name)
    return list(groups.items())


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(name or "(the model itself)" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def show_conversion(result: Conversion, artifact: ExportArtifact | None, outputs: Sequence[Path]) -> None:
    """Print what a conversion did, assumed, checked and wrote."""
    plan = result.plan
    chosen = "".join(f" {name}={value}" for name, value in plan.options.items())
    say(f"{plan.model} → {plan.recipe}{chosen}")
    lines = [("converted", plan.summary().replace(" convert,", ","))]
    lines += [
        ("skipped", f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({_some(names)}): {reason}")
        for (what, reason), names in _grouped(plan.skips)
    ]
    lines += [("noted", text) for text in _noted(plan, result.init)]
    if result.check is not None:
        lines.append(("checked", describe_check(result.check)))
    lines += [("assumed", text) for text in result.init.assumptions]
    if artifact is not None and artifact.verification is not None:
        lines.append(("verified", describe_check(artifact.verification)))
    lines += written(outputs)
    facts(lines)
    if artifact is not None:
        say()
        say(str(dataclasses.replace(artifact, verification=None)))


def _noted(plan: Plan, init: InitReport) -> list[str]:
    """Return what a person should know of single norms, each once with the norms that it is about."""
    names: dict[str, list[str]] = defaultdict(list)
    for step in plan.steps:
        for text in (*([step.site.reason] if step.site.reason else []), *step.notes):
            names[text].append(step.site.norm)
    for row in init.rows:
        for text in row.notes:
            names[text].append(row.name)
    lines = [f"{text}: {_some(which)}" for text, which in names.items()]
    more = [f"{len(lines) - MOST_NOTES} more; --dry-run shows them"] if len(lines) > MOST_NOTES else []
    return [*lines[:MOST_NOTES], *more]


def describe_check(check: Verification) -> str:
    """Return one line about a comparison."""
    if not check.ok:
        return f"{check.a} and {check.b} DIFFER: {check.failure}"
    return f"{check.max_rel:.1e} of the output's magnitude (allowed {check.tolerance:.0e})"


def show_artifact(artifact: ExportArtifact) -> None:
    """Print what an ONNX file takes, returns and holds, and how it was verified."""
    say(str(dataclasses.replace(artifact, verification=None)))
    if artifact.verification is not None:
        say()
        show_check(artifact.verification)


def show_check(check: Verification) -> None:
    """Print a comparison, output by output."""
    head, _, rest = str(check).partition("\n")
    say(head)
    if not sys.stdout.isatty():
        say(rest)
        return
    rows = [
        (r.name, "×".join(map(str, r.shape)), r.dtype, f"{r.max_abs:.1e}", f"{r.scale:.1e}", r.reason or "ok")
        for r in check.rows
    ]
    say()
    table(("output", "shape", "dtype", "max |a−b|", "max |a|", "result"), rows)
    if check.rows and check.reason:
        say(check.reason)


def written(outputs: Sequence[Path]) -> list[tuple[str, str]]:
    """Return a line per file, with its size."""
    return [("wrote", f"{path} ({_size(path)})") for path in outputs]


def _size(path: Path) -> str:
    size = float(path.stat().st_size)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def as_record(result: Conversion, artifact: ExportArtifact | None, outputs: Sequence[Path]) -> str:
    """Return a conversion as JSON."""
    record: Mapping[str, Any] = {
        "plan": json.loads(result.plan.to_json()),
        "init": dataclasses.asdict(result.init),
        "check": None if result.check is None else json.loads(result.check.to_json()),
        "verification": None
        if artifact is None or artifact.verification is None
        else json.loads(artifact.verification.to_json()),
        "written": [str(path) for path in outputs],
    }
    return json.dumps(record, indent=2, ensure_ascii=False)
