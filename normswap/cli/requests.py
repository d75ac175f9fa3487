"""What ``normswap convert`` is asked for: what becomes of the model, and which files are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from normswap.cli.flags import OUTPUT, Chosen, Opset, RecipeFlags, output_flag
from normswap.cli.outputs import beside, read_text
from normswap.cli.values import STAYS, Recipes, read_at
from normswap.errors import InputError
from normswap.records import Plan
from normswap.report import require_packages

__all__ = ["DEFAULT", "DynamicTime", "Files", "Request", "Writing", "default_of"]

DEFAULT = "gn+ws"
"""The recipe where none is named."""


def default_of(recurrent: str | None) -> str:
    """Return what becomes of the norms where no recipe is named: who asks for the recurrent layers leaves them."""
    return DEFAULT if recurrent is None else STAYS


DynamicTime = Annotated[
    int | None,
    typer.Option(
        metavar="AXIS",
        min=0,
        help="let sequences in the ONNX file have any length: the axis that time is on, 1 for (batch, time, …)",
        rich_help_panel=OUTPUT,
    ),
]


@dataclass(frozen=True)
class Writing:
    """What is written, and where."""

    output: Annotated[
        Path | None,
        output_flag("a .safetensors file, with --fold a .pt; or a .pt2 program (default: MODEL.RECIPE.safetensors)"),
    ] = None
    fold: Annotated[
        bool, typer.Option("--fold", help="write plain weights, to deploy and not to train", rich_help_panel=OUTPUT)
    ] = False
    onnx: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="fold, export to this .onnx file, and verify it", rich_help_panel=OUTPUT),
    ] = None
    opset: Opset = 18
    dynamic_time: DynamicTime = None
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="write a page of what the swap did to each site (.html)", rich_help_panel=OUTPUT
        ),
    ] = None
    save_plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write the plan (.json)", rich_help_panel=OUTPUT)
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the plan; write nothing but --save-plan", rich_help_panel=OUTPUT)
    ] = False


@dataclass(frozen=True)
class Request:
    """What is to become of the model: a recipe with its options, or a plan to carry out; and how."""

    to: Recipes
    recipe_options: dict[str, Any]
    chosen: Chosen
    plan: Plan | None

    @classmethod
    def of(
        cls, to: str | None, at: Sequence[str] | None, plan: Path | None, recipe: RecipeFlags, chosen: Chosen
    ) -> Request:
        """Return what the flags ask for."""
        if plan is None:
            asked = read_at(to, at, default=default_of(chosen.get("recurrent")))
            return cls(asked, recipe.of(asked), chosen, None)
        made = Plan.from_json(read_text(plan))
        if to or at or recipe or chosen.keys() & {"include", "exclude", "recurrent"}:
            raise InputError(
                "--plan says which norms become what; --to, --at, --recurrent, --include, --exclude or an option is "
                "given beside it",
                code="plan-options",
                hint="leave them out, or make the plan anew",
            )
        return cls(made.recipe, {}, chosen, made)

    @property
    def recipe(self) -> str:
        """The recipe's name, that of several where it is made of them, and that for recurrent layers."""
        from normswap.recipes import PerSite

        norms = self.to if isinstance(self.to, str) else PerSite.name
        layers = self.chosen.get("recurrent") if self.plan is None else self.plan.recurrent_recipe
        if not layers:
            return norms
        return f"recurrent-{layers}" if norms == STAYS else f"{norms}.recurrent-{layers}"


@dataclass(frozen=True)
class Files:
    """The files that a conversion writes, each None where it is not wanted."""

    target: Path | None
    onnx: Path | None
    report: Path | None
    plan: Path | None

    @classmethod
    def of(cls, model: Path, recipe: str, writing: Writing) -> Files:
        """Return the files that the flags ask for."""
        _require_suffix("--save-plan", writing.save_plan, ".json")
        if writing.dry_run:
            return cls(None, None, None, writing.save_plan)
        if writing.report is not None:
            require_packages()
        _require_suffix("--onnx", writing.onnx, ".onnx")
        _require_suffix("--report", writing.report, ".html")
        return cls(_target(model, recipe, writing), writing.onnx, writing.report, writing.save_plan)

    def all(self) -> list[Path]:
        """Return the files that are wanted."""
        return [path for path in (self.target, self.onnx, self.report, self.plan) if path is not None]


def _require_suffix(flag: str, path: Path | None, suffix: str) -> None:
    if path is not None and path.suffix != suffix:
        raise InputError(
            f"{flag} {path} does not end with {suffix}", code="output-kind", hint=f"write {path.stem}{suffix}"
        )


def _target(model: Path, recipe: str, writing: Writing) -> Path | None:
    """Return where the converted model goes; None where the ONNX file alone is wanted."""
    output, fold, onnx = writing.output, writing.fold, writing.onnx
    suffix = ".pt2" if model.suffix == ".pt2" else ".pt" if fold else ".safetensors"
    if output is None:
        return None if onnx is not None and not fold else beside(model, f"{recipe}{suffix}")
    if output.suffix in ((".pt", ".pth", ".pt2") if fold else (".safetensors", ".pt2")):
        return output
    suffix = ".pt" if fold else ".safetensors"
    hints = {
        ".pt": f"add --fold for plain weights in a .pt, or write {output.stem}.safetensors",
        ".pth": f"add --fold for plain weights in a .pth, or write {output.stem}.safetensors",
        ".onnx": f"write --onnx {output.name}",
        ".safetensors": f"a folded model is a plain module: write {output.stem}.pt, or leave --fold out",
    }
    what = "a folded model" if fold else "a converted model, which may be trained on,"
    raise InputError(
        f"{what} is not written to {output.suffix or 'a file without suffix'} ({output})",
        code="output-kind",
        hint=hints.get(output.suffix, f"write {output.stem}{suffix}"),
    )
