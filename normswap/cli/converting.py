"""``normswap convert``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import normswap as ns
from normswap.cli.console import note, print_json, progressing, working
from normswap.cli.flags import (
    At,
    Chosen,
    DataFlags,
    InputFlags,
    Json,
    Model,
    RecipeFlags,
    To,
    flattened,
)
from normswap.cli.inputs import calibration_data, example_inputs, required_inputs, samples_of
from normswap.cli.outputs import needing_normswap, needs_architecture, save_whole, store, write_text
from normswap.cli.protecting import FilesRead
from normswap.cli.reading import Reading
from normswap.cli.reporting import as_record, left_as_they_were, needs, show_conversion, show_plan
from normswap.cli.requests import Files, Request, Writing
from normswap.cli.sources import Source
from normswap.cli.values import AUTO, called
from normswap.errors import NothingToConvertError
from normswap.options import WHICH_NORMS
from normswap.records import Plan

if TYPE_CHECKING:
    from torch import nn

    from normswap.deploy.onnx.artifact import ExportArtifact
    from normswap.pipeline import Conversion

__all__ = ["convert_model"]


Place = Callable[[Path], Path]
"""Returns where a file is written until all of them are complete."""


@flattened("convert")
def convert_model(
    *,
    model: Model,
    to: To = None,
    at: At = None,
    writing: Writing,
    data: DataFlags,
    chosen: Chosen,
    recipe: RecipeFlags,
    given: InputFlags,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="carry out this plan, by --save-plan", rich_help_panel=WHICH_NORMS),
    ] = None,
    reading: Reading,
    read: FilesRead,
    as_json: Json = False,
) -> None:
    """Swap a model's BatchNorms and keep what it has learnt.

    Writes MODEL.RECIPE.safetensors, or what -o names: to be trained on (normswap.load in Python) and then given to
    `normswap fold`. To deploy without training, --fold writes plain weights and --onnx an ONNX file.

    Some recipes, as wn+mobn, keep the model's outputs exactly. gn+ws, gn and ln lose some accuracy: little with
    --calibration, some hundred inputs without labels; without it gn+ws may lose much. Where there is no data,
    --synthetic 64 makes samples from the BatchNorms' own statistics.
    """
    source = Source.of(reading)
    request = Request.of(to, at, plan, recipe, chosen)
    files = Files.of(model, request.recipe, writing)
    with read.staged(*files.all(), rewritten={"plan": files.plan}) as place:
        network = source.open(model)
        inputs = example_inputs(network, given)
        batches = calibration_data(network, data, given, quiet=as_json)
        if writing.dry_run:
            made = _planned(network, request, inputs, batches, quiet=as_json)
            _save_plan(made, files, place)
        else:
            example = _example(network, files, inputs, batches)
            with progressing(f"converting to {called(request.to)}", quiet=as_json) as progress:
                result = ns.convert(
                    network,
                    request.to,
                    example_inputs=inputs,
                    calibration=batches,
                    plan=request.plan,
                    inplace=True,  # it was read from a file and is nobody else's
                    progress=progress,
                    **request.chosen,
                    **request.recipe_options,
                )
            artifact = _write(result, files, place, example, writing)
            _save_plan(result.plan, files, place)
            _save_report(result, files, place)
    if writing.dry_run:
        _show_planned(made, request, as_json=as_json)
        return
    if as_json:
        print_json(as_record(result, artifact, files.all()))
        return
    show_conversion(result, artifact, files.all())
    if writing.output is None and files.target is not None:
        note("no -o was given: the output stands beside the model")
    if batches is None and result.init.method == "absorb" and not result.exact and result.plan.steps:
        note(
            f"{called(request.to)} without --calibration: measure how much accuracy is left before you use the model; "
            "some hundred inputs without labels keep more of it, and so may --synthetic 64, which needs none"
        )


def _planned(network: nn.Module, request: Request, inputs: Any, batches: Any, *, quiet: bool) -> Plan:
    if request.plan is not None:
        return request.plan
    to, given = request.to, {**request.chosen, **request.recipe_options}
    if to == AUTO and batches is not None:
        with progressing("choosing recipes", quiet=quiet) as progress:
            to = ns.choose_recipes(network, calibration=batches, example_inputs=inputs, progress=progress, **given).to
        given = dict(request.chosen)
    with working("planning"):
        return ns.plan(network, to, example_inputs=inputs, calibration=batches, **given)


def _show_planned(made: Plan, request: Request, *, as_json: bool) -> None:
    """Show what a dry run has planned.

    Raises:
        NothingToConvertError: No norm is converted.
    """
    print_json(made.to_json()) if as_json else show_plan(made)
    if request.plan is None and made.options.get("num_groups") == "auto":
        note(
            "--num-groups auto: the groups are chosen during the fit, by --calibration; these are where it begins, "
            "and what --plan keeps"
        )
    if not (made.steps or made.recurrent):
        raise NothingToConvertError(
            f"no norm of the {made.model} can be converted by '{made.recipe}'",
            code="nothing-to-convert",
            hint="the table above has the reasons",
        )


def _example(network: nn.Module, files: Files, inputs: Any, batches: Any) -> Any:
    """Return inputs to write the files with: those given or, for a file that needs some, others."""
    program = files.target is not None and files.target.suffix == ".pt2"
    if inputs is not None or not (program or files.onnx is not None):
        return inputs
    # Made-up ones show nothing of the user's sizes, and the plan does not see them.
    return samples_of(network, batches) or required_inputs(
        network, InputFlags(), use=", and the file takes no other height and width"
    )


def _write(result: Conversion, files: Files, place: Place, example: Any, writing: Writing) -> ExportArtifact | None:
    """Write the model's files, and return what the ONNX file is where one is wanted."""
    if files.target is not None and not writing.fold:
        with working(f"writing {files.target}"):
            store(result.model, place(files.target), example)
        if needs_architecture(place(files.target)):
            note(f"{files.target} cannot hold the structure of this model: to read it again, give --arch")
    if not writing.fold and files.onnx is None:
        return None
    result.model.eval()
    with working("folding"):
        folding = ns.fold_with_report(result.model, example_inputs=example)
    folded = folding.model
    for text in left_as_they_were(folding.left):
        note(text)
    if writing.fold and files.target is not None:
        with working(f"writing {files.target}"):
            save_whole(folded, place(files.target), example)
        for label, text in needs(needing_normswap(folded, files.target)):
            note(f"{files.target} {label} {text}")
    if files.onnx is None:
        return None
    with working(f"writing {files.onnx} and verifying it"):
        from normswap.runs.recorded_inputs import has_fixed_batch

        artifact = ns.export_onnx(
            folded,
            place(files.onnx),
            example_inputs=example,
            opset=writing.opset,
            dynamic_batch=not has_fixed_batch(result.model),
            dynamic_time=False if writing.dynamic_time is None else writing.dynamic_time,
        )
    return dataclasses.replace(artifact, path=files.onnx)


def _save_plan(plan: Plan, files: Files, place: Place) -> None:
    if files.plan is not None:
        write_text(place(files.plan), plan.to_json() + "\n")


def _save_report(result: Conversion, files: Files, place: Place) -> None:
    if files.report is not None:
        with working(f"writing {files.report}"):
            ns.write_report(result, place(files.report))
