"""``normswap inspect`` and ``normswap convert``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import normswap as ns
from normswap.cli import options
from normswap.cli import sources as files
from normswap.cli.console import note, print_json, progressing, say, table, working
from normswap.cli.reporting import (
    as_record,
    costs_as_record,
    show_conversion,
    show_costs,
    show_norms,
    show_plan,
)
from normswap.errors import InputError, NothingToConvertError
from normswap.records import Plan
from normswap.report import require_packages
from normswap.storage.writing import staged

if TYPE_CHECKING:
    from normswap.deploy.onnx import ExportArtifact
    from normswap.pipeline import Conversion

__all__ = ["convert_model", "inspect_model"]

DEFAULT = "gn+ws"


def inspect_model(
    model: options.Model,
    to: options.To = None,
    calibration: options.Calibration = None,
    batch_size: options.BatchSize = 32,
    spread: options.Spread = None,
    scale: options.Scale = True,
    input_shape: options.InputShape = None,
    input_file: options.InputFile = None,
    trust: options.Trust = None,
    arch: options.Arch = None,
    arch_kwargs: options.ArchKwargs = None,
    as_json: options.Json = False,
) -> None:
    """Show a model's norms, their layers, and what cannot be converted.

    With --to it shows what each norm would become; with --calibration what the swap of each by itself costs. Nothing
    is written.
    """
    shapes = options.read_shapes(input_shape)
    network = files.Source.of(trust, arch, arch_kwargs).open(model)
    inputs = files.example_inputs(network, shapes, input_file)
    batches = files.calibration_batches(network, calibration, batch_size)
    if batches is not None:
        with progressing("ranking the sites", quiet=as_json) as progress:
            fitting: dict[str, Any] = {"scale": scale, **({} if spread is None else {"spread": spread})}
            costs = ns.rank_sites(
                network, to or DEFAULT, calibration=batches, example_inputs=inputs, progress=progress, **fitting
            )
        print_json(costs_as_record(costs)) if as_json else show_costs(costs, type(network).__name__, to or DEFAULT)
        return
    if to is not None:
        with working("planning"):
            plan = ns.plan(network, to, example_inputs=inputs)
        print_json(plan.to_json()) if as_json else show_plan(plan)
        return
    with working("reading the dataflow"):
        from normswap.graph import capture
        from normswap.graph.dataflow import Dataflow
        from normswap.runs.inputs import as_inputs
        from normswap.stages.find_sites import find_sites
        from normswap.storage.origin import origin_of

        example = None if inputs is None else as_inputs(inputs)
        matches = find_sites(Dataflow(capture(network, example)), example)
        parameters = sum(p.numel() for p in network.parameters())
    name = type(network).__name__
    if as_json:
        record = {
            "model": name,
            "parameters": parameters,
            "sites": [dataclasses.asdict(site) for site in matches.sites],
            "skips": [dataclasses.asdict(skip) for skip in matches.skips],
        }
        print_json(json.dumps(record, indent=2, ensure_ascii=False))
        return
    origin = origin_of(network)
    converted = "" if origin is None else f", converted to {origin.plan.recipe}"
    say(f"{name}{converted}: {parameters:,} parameters, {len(matches.sites)} BatchNorm sites\n")
    show_norms(
        ("norm", "type", "channels", "layer", "layer type", "proof"),
        [
            (s.norm, s.norm_type, str(s.num_features), s.layer or "–", s.layer_type or "–", s.evidence)
            for s in matches.sites
        ],
        [s.remarks for s in matches.sites],
    )
    if matches.sites and matches.skips:
        say()
    table(("left alone", "what", "type", "reason"), [(s.name, s.what, s.type, s.reason) for s in matches.skips])


def convert_model(
    model: options.Model,
    to: options.To = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="a .safetensors file, with --fold a .pt; or a .pt2 program (default: MODEL.RECIPE.safetensors)",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    fold: Annotated[
        bool,
        typer.Option("--fold", help="write plain weights, to deploy and not to train", rich_help_panel=options.OUTPUT),
    ] = False,
    onnx: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="fold, export to this .onnx file, and verify it", rich_help_panel=options.OUTPUT
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="write a page of what the swap did to each site (.html)",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    calibration: options.Calibration = None,
    batch_size: options.BatchSize = 32,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="absorb: keep what the BatchNorms know, at the statistics of --calibration where that is given; "
            "match: then fit each site to it (the default with --calibration); tune: then take gradient steps, "
            "without labels; none: fresh norms",
            rich_help_panel=options.NORMS,
        ),
    ] = None,
    spread: options.Spread = None,
    scale: options.Scale = True,
    tune_steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="gradient steps of --init tune (300)", rich_help_panel=options.NORMS),
    ] = None,
    num_groups: options.NumGroups = None,
    group_size: options.GroupSize = None,
    eps: options.Eps = None,
    option: options.RecipeOption = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    input_shape: options.InputShape = None,
    input_file: options.InputFile = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="carry out this plan, by --save-plan", rich_help_panel=options.CHOICE),
    ] = None,
    save_plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write the plan (.json)", rich_help_panel=options.OUTPUT)
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="show the plan; write nothing but --save-plan", rich_help_panel=options.OUTPUT),
    ] = False,
    opset: options.Opset = 18,
    trust: options.Trust = None,
    arch: options.Arch = None,
    arch_kwargs: options.ArchKwargs = None,
    as_json: options.Json = False,
) -> None:
    """Swap a model's BatchNorms and keep what it has learnt.

    Writes MODEL.RECIPE.safetensors, or what -o names: to be trained on (normswap.load in Python) and then given to
    `normswap fold`. To deploy without training, --fold writes plain weights and --onnx an ONNX file.

    Some recipes, as wn+mobn, keep the model's outputs exactly. gn+ws, gn and ln lose some accuracy: little with
    --calibration, some hundred inputs without labels; without it gn+ws may lose much.
    """
    shapes = options.read_shapes(input_shape)
    source = files.Source.of(trust, arch, arch_kwargs)
    replayed = None if plan is None else Plan.from_json(files.read_text(plan))
    given = {"num_groups": num_groups, "group_size": group_size, "eps": eps}
    if replayed is None:
        recipe = to or DEFAULT
        chosen = options.read_recipe_options(recipe, given, option)
    else:
        if to or option or include or exclude or any(value is not None for value in given.values()):
            raise InputError(
                "--plan says which norms become what; --to, --include, --exclude or an option is given beside it",
                code="plan-options",
                hint="leave them out, or make the plan anew",
            )
        recipe, chosen = replayed.recipe, dict(replayed.options)
    target = None if dry_run else _target(model, recipe, output, fold=fold, onnx=onnx)
    onnx, report = (None, None) if dry_run else (onnx, report)
    if report is not None:
        require_packages()
    fitting: dict[str, Any] = {k: v for k, v in (("spread", spread), ("tune_steps", tune_steps)) if v is not None}

    with staged(*filter(None, (target, onnx, report, save_plan)), inputs=(model,)) as place:
        network = source.open(model)
        inputs = example = files.example_inputs(network, shapes, input_file)
        program = target is not None and target.suffix == ".pt2"
        batches = files.calibration_batches(network, calibration, batch_size)
        if (onnx is not None or program) and example is None:
            # Made-up ones show nothing of the user's sizes, and the plan does not see them.
            example = files.samples_of(network, batches) or files.required_inputs(
                network, (), None, use=", and the file takes no other height and width"
            )
        selected: dict[str, Any] = {"include": include or (), "exclude": exclude or ()}
        if dry_run:
            with working("planning"):
                made = replayed or ns.plan(
                    network, recipe, example_inputs=inputs, calibration=batches, **selected, **chosen
                )
            _save_plan(made, save_plan, place)
        else:
            with progressing(f"converting to {recipe}", quiet=as_json) as progress:
                result = ns.convert(
                    network,
                    recipe,
                    example_inputs=inputs,
                    calibration=batches,
                    init=init,
                    plan=replayed,
                    inplace=True,  # it was read from a file and is nobody else's
                    scale=scale,
                    progress=progress,
                    **fitting,
                    **selected,
                    **({} if replayed else chosen),
                )
            artifact = _write(result, place, target, onnx, example, fold=fold, opset=opset)
            _save_plan(result.plan, save_plan, place)
            if report is not None:
                with working(f"writing {report}"):
                    ns.write_report(result, place(report))
    if dry_run:
        print_json(made.to_json()) if as_json else show_plan(made)
        if replayed is None and made.options.get("num_groups") == "auto":
            note(
                "--num-groups auto: the groups are chosen during the fit, by --calibration; these are where it begins, "
                "and what --plan keeps"
            )
        if not made.steps:
            raise NothingToConvertError(
                f"no norm of the {made.model} can be converted by '{made.recipe}'",
                code="nothing-to-convert",
                hint="the table above has the reasons",
            )
        return
    outputs = [path for path in (target, onnx, report, save_plan) if path is not None]
    if as_json:
        print_json(as_record(result, artifact, outputs))
        return
    show_conversion(result, artifact, outputs)
    if output is None and target is not None:
        note("no -o was given: the output stands beside the model")
    if batches is None and result.init.method == "absorb" and not ns.all_recipes()[result.plan.recipe].exact:
        note(
            f"{result.plan.recipe} without --calibration: measure how much accuracy is left before you use the model; "
            "some hundred inputs without labels keep more of it"
        )


def _target(model: Path, recipe: str, output: Path | None, *, fold: bool, onnx: Path | None) -> Path | None:
    """Return where the converted model goes; None where the ONNX file alone is wanted."""
    if onnx is not None and onnx.suffix != ".onnx":
        raise InputError(f"--onnx {onnx} does not end with .onnx", code="output-kind", hint=f"write {onnx.stem}.onnx")
    suffix = ".pt2" if model.suffix == ".pt2" else ".pt" if fold else ".safetensors"
    if output is None:
        return None if onnx is not None and not fold else model.with_name(f"{model.stem}.{recipe}{suffix}")
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


def _write(
    result: Conversion, place: Any, target: Path | None, onnx: Path | None, example: Any, *, fold: bool, opset: int
) -> ExportArtifact | None:
    if target is not None and not fold:
        with working(f"writing {target}"):
            files.store(result.model, place(target), example)
    if not fold and onnx is None:
        return None
    result.model.eval()
    with working("folding"):
        folded = ns.fold_with_report(result.model, example_inputs=example).model
    if fold and target is not None:
        with working(f"writing {target}"):
            files.save_whole(folded, place(target), example)
    if onnx is None:
        return None
    with working(f"writing {onnx} and verifying it"):
        from normswap.runs.recorded_inputs import has_fixed_batch

        dynamic = not has_fixed_batch(result.model)
        artifact = ns.export_onnx(folded, place(onnx), example_inputs=example, opset=opset, dynamic_batch=dynamic)
    return dataclasses.replace(artifact, path=onnx)


def _save_plan(plan: Plan, path: Path | None, place: Any) -> None:
    if path is not None:
        files.write_text(place(path), plan.to_json() + "\n")
