"""What the commands say about a plan, a conversion and the files that were written."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normswap.cli.console import facts, note, say, table
from normswap.cli.spelling import spell
from normswap.records import SKIPPED, Choice, InitReport, Plan, SiteCost, Skip

if TYPE_CHECKING:
    from normswap.checks.verification import OutputRow, Verification
    from normswap.deploy.onnx.artifact import ExportArtifact
    from normswap.deploy.rows import FoldRow
    from normswap.pipeline import Conversion

__all__ = [
    "as_record",
    "costs_as_record",
    "describe_check",
    "left_as_they_were",
    "needs",
    "show_artifact",
    "show_check",
    "show_choice",
    "show_conversion",
    "show_costs",
    "show_norms",
    "show_plan",
    "written",
]

MOST_NOTES = 5


def show_plan(plan: Plan) -> None:
    """Print what becomes of every norm and layer."""
    say(f"{plan.headline}\n")
    if plan.steps:
        show_norms(
            ("norm", "type", "layer", "weight", "becomes", "proof"),
            [
                (s.site.norm, s.site.norm_type, s.site.layer or "–", s.weight or "–", s.norm, s.site.evidence)
                for s in plan.steps
            ],
            [(*step.site.remarks, *step.notes) for step in plan.steps],
        )
        say()
    if plan.recurrent:
        table(
            ("recurrent layer", "type", "sizes", "weights"),
            [(s.site.name, s.site.type, s.site.sizes, s.weight) for s in plan.recurrent],
        )
        say()
    if plan.skips:
        table(
            ("skipped", "what", "names", "reason"),
            [(str(len(names)), what, _some(names), reason) for (what, reason), names in _grouped(plan.skips)],
        )
        say()
    say(plan.summary())


def show_norms(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], notes: Sequence[Sequence[str]]) -> None:
    """Print a line for each norm, with its notes beside it or, on a terminal, which is too narrow for that, below."""
    if not sys.stdout.isatty():
        table(
            (*header, "notes"), [(*row, "; ".join(map(spell, texts))) for row, texts in zip(rows, notes, strict=True)]
        )
        return
    table(header, rows)
    about: dict[str, list[str]] = defaultdict(list)
    for row, texts in zip(rows, notes, strict=True):
        for text in texts:
            about[spell(text)].append(row[0])
    if about:
        say()
        facts([("noted", f"{_counted(names, 'norm')}: {text}") for text, names in _alike(about)])


def show_costs(costs: Sequence[SiteCost], model: str, recipe: str) -> None:
    """Print what the swap of each site costs by itself, largest error first."""
    say(f"{model} → {recipe}: the error of each site's swap by itself, as a share of its output's variance\n")
    table(
        ("site", "error", "before the match", "layer", "share"),
        [(c.norm, f"{c.error:.4f}", f"{c.absorbed:.4f}", c.layer or "–", f"{100 * c.share:.1f} %") for c in costs],
    )
    if costs:
        say(f"\nto leave the site of the largest error as it is: normswap convert … --exclude {costs[0].norm}")


def show_choice(choice: Choice) -> None:
    """Print what each recipe would do at each site, and which of them was chosen."""
    say("relative error of the output by norm and recipe, each norm by itself\n")
    rows = choice.rows()
    table(rows[0], rows[1:])
    for text in choice.notes:
        note(text)


def costs_as_record(costs: Sequence[SiteCost]) -> str:
    """Return a ranking as JSON."""
    return json.dumps([dataclasses.asdict(cost) for cost in costs], indent=2, ensure_ascii=False)


def _grouped(skips: Sequence[Skip]) -> list[tuple[tuple[str, str], list[str]]]:
    """Return the names per kind and reason, norms first."""
    found = []
    for what in sorted({skip.what for skip in skips}, key=SKIPPED.index):
        groups: dict[str, list[str]] = defaultdict(list)
        for skip in skips:
            if skip.what == what:
                groups[spell(skip.reason)].append(skip.name)
        found += [((what, reason), names) for reason, names in _alike(groups)]
    return found


def _alike(groups: Mapping[str, Sequence[str]]) -> list[tuple[str, list[str]]]:
    """Join the groups whose texts differ in the names of modules alone: the first speaks for all."""
    joined: dict[str, dict[str, Sequence[str]]] = defaultdict(dict)
    for text, names in groups.items():
        joined[re.sub(r"\w+(\.\w+)+", "…", text)][text] = names
    return [
        (
            next(iter(texts)) + (" (the others likewise)" if len(texts) > 1 else ""),
            [name for names in texts.values() for name in names],
        )
        for texts in joined.values()
    ]


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(name or "the model itself" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _counted(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({_some(names)})"


def show_conversion(result: Conversion, artifact: ExportArtifact | None, outputs: Sequence[Path]) -> None:
    """Print what a conversion did, assumed, checked and wrote."""
    plan = result.plan
    say(plan.headline)
    lines = [("converted", plan.summary().replace(" convert", ""))]
    heads = result.heads
    skips = [skip for skip in plan.skips if skip.name not in heads]
    lines += [("skipped", f"{_counted(names, what)}: {reason}") for (what, reason), names in _grouped(skips)]
    if result.choice is not None:
        lines.append(("chosen", result.choice.summary()))
        lines += [("noted", text) for text in result.choice.notes]
    if heads:
        lines.append(("fitted", f"{_counted(heads, 'layer')}, without a norm: what it gives is the model's output"))
    lines += [("noted", text) for text in _noted(plan, result.init)]
    if result.check is not None or _should_be_checked(result):
        lines.append(("checked", describe_check(result.check)))
    if result.init.agreement is not None:
        lines.append(("agreement", str(result.init.agreement)))
    lines += [("noted", text) for text in result.init.notes]
    if artifact is not None and artifact.verification is not None:
        lines.append(
            ("verified", f"the ONNX file against the converted model: {describe_check(artifact.verification)}")
        )
    lines += written(outputs)
    facts(lines)
    if artifact is not None:
        say()
        say(str(dataclasses.replace(artifact, verification=None)))


def _noted(plan: Plan, init: InitReport) -> list[str]:
    """Return what a person should know of single norms, each once with the norms that it is about."""
    names: dict[str, list[str]] = defaultdict(list)
    for step in plan.steps:
        for text in (*step.site.remarks, *step.notes):
            names[spell(text)].append(step.site.norm)
    for row in init.rows:
        for text in row.notes:
            names[spell(text)].append(row.name)
    lines = [f"{_counted(which, 'norm')}: {text}" for text, which in _alike(names)]
    more = [f"{len(lines) - MOST_NOTES} more; --dry-run shows them"] if len(lines) > MOST_NOTES else []
    return [*lines[:MOST_NOTES], *more]


def _should_be_checked(result: Conversion) -> bool:
    return result.exact and result.init.method != "fresh"


def describe_check(check: Verification | None) -> str:
    """Return one line about a comparison; None is one that there was nothing for."""
    if check is None:
        return "not compared: give inputs on which the model returns something (--input-shape or --input-file)"
    if not check.ok:
        return f"{check.a} and {check.b} DIFFER: {check.failure}"
    if not check.max_abs:
        return "no difference in the output"
    return f"outputs differ by {check.max_rel:.1e} of their magnitude (allowed {check.tolerance:.0e})"


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
        (r.name, "×".join(map(str, r.shape)), r.dtype, f"{r.max_abs:.1e}", f"{r.scale:.1e}", _result(r))
        for r in check.rows
    ]
    say()
    table(("output", "shape", "dtype", "max |a−b|", "max |a|", "result"), rows)


def _result(row: OutputRow) -> str:
    """Return what a cell has room for: by how much an output differs is in the cells beside it."""
    return "ok" if row.ok else "differs" if row.tolerance and isfinite(row.max_abs) else row.reason


def needs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the line about a file that is loaded only where normswap is, none where there are no such modules."""
    text = f"normswap, to be loaded: {_counted(names, 'module')} of its own; a .pt2 program needs no class"
    return [("needs", text)] if names else []


def left_as_they_were(rows: Sequence[FoldRow]) -> list[str]:
    """Return what folding has left, a line per reason."""
    names: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        names[spell(row.reason)].append(row.name)
    return [f"folding left {_counted(which, 'module')}: {reason}" for reason, which in names.items()]


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
        "choice": None if result.choice is None else json.loads(result.choice.to_json()),
        "check": None if result.check is None else json.loads(result.check.to_json()),
        "verification": None
        if artifact is None or artifact.verification is None
        else json.loads(artifact.verification.to_json()),
        "written": [str(path) for path in outputs],
    }
    return json.dumps(record, indent=2, ensure_ascii=False)
