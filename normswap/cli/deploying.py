"""``normswap fold`` and ``normswap export``."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import normswap as ns
from normswap.cli.console import facts, note, print_json, say, table, working
from normswap.cli.flags import OUTPUT, InputFlags, Json, Model, Opset, flattened, output_flag
from normswap.cli.inputs import example_inputs, required_inputs
from normswap.cli.outputs import beside, needing_normswap, save_whole
from normswap.cli.protecting import FilesRead
from normswap.cli.reading import Reading
from normswap.cli.reporting import describe_check, needs, show_artifact, written
from normswap.cli.requests import DynamicTime
from normswap.cli.sources import Source
from normswap.errors import InputError

if TYPE_CHECKING:
    from normswap.deploy.rows import FoldRow

__all__ = ["export_model", "fold_model"]


@flattened("fold")
def fold_model(
    *,
    model: Model,
    output: Annotated[
        Path | None,
        output_flag(
            "a .pt file, a .pt2 program, which needs no class, or a .safetensors file of the plain weights alone "
            "(default: MODEL.folded.pt)"
        ),
    ] = None,
    given: InputFlags,
    reading: Reading,
    read: FilesRead,
    as_json: Json = False,
) -> None:
    """Turn reparameterized weights into plain ones, for deployment.

    MODEL is what `normswap convert` wrote or, after training, normswap.save in Python. BatchNorms that are left are
    merged into their layers. The output loads where normswap is not installed: a .pt file has MODEL's own class and
    torch.nn's modules, a .pt2 program needs no class, and the weights in a .safetensors file are for load_state_dict of
    a model with the layers of the folded one.

    Some have no equal in torch.nn: the norm of `convert --to ln --option axes=channel`, the layers of `--to cosine`,
    and recurrent layers with layer normalization or batch statistics per step. A .pt file with them loads only where
    normswap is installed, which the report says; a .pt2 program or an ONNX file needs no normswap.
    """
    program = model.suffix == ".pt2"
    target = output or beside(model, f"folded.pt{2 if program else ''}")
    if target.suffix not in (".pt", ".pth", ".pt2", ".safetensors"):
        raise InputError(
            f"a folded model is not written to {target}", code="output-kind", hint=f"write {target.stem}.pt"
        )
    source = Source.of(reading)
    with read.staged(target) as place:
        network = source.open(model).eval()
        take = required_inputs if target.suffix == ".pt2" else example_inputs
        inputs = take(network, given)
        with working("folding"):
            folding = ns.fold_with_report(network, example_inputs=inputs)
        with working(f"writing {target}"):
            save_whole(folding.model, place(target), inputs)
        needing = needing_normswap(folding.model, target)
    if as_json:
        record = {
            "rows": [dataclasses.asdict(row) for row in folding.rows],
            "left": [dataclasses.asdict(row) for row in folding.left],
            "needs_normswap": needing,
            "check": None if folding.check is None else json.loads(folding.check.to_json()),
            "written": [str(target)],
        }
        print_json(json.dumps(record, indent=2, ensure_ascii=False))
        return
    say(type(network).__name__)
    facts(
        [
            ("folded", _what_became(folding.rows)),
            ("checked", describe_check(folding.check)),
            *needs(needing),
            *written([target]),
        ]
    )
    if folding.left:
        say()
        table(("left", "why"), [(row.name, row.reason) for row in folding.left])
    if output is None:
        note("no -o was given: the output stands beside the model")


def _what_became(rows: Sequence[FoldRow]) -> str:
    """Return how many things became what: ``9 weights plain, 9 modules part of a layer``."""
    became = Counter("part of a layer" if row.result.startswith("part of") else row.result for row in rows)
    counted = [
        f"{n} weight{'s' * (n > 1)} made plain"
        if what == "a plain weight"
        else f"{n} module{'s' * (n > 1)} made {what}"
        for what, n in became.items()
    ]
    return ", ".join(counted) or "nothing: its weights were plain"


@flattened("export")
def export_model(
    *,
    model: Model,
    output: Annotated[
        Path | None,
        output_flag("an .onnx file (default: MODEL.onnx)"),
    ] = None,
    given: InputFlags,
    opset: Opset = 18,
    dynamic_batch: Annotated[
        bool, typer.Option(help="whether the file takes any batch size", rich_help_panel=OUTPUT)
    ] = True,
    dynamic_spatial: Annotated[
        bool, typer.Option(help="whether the file takes any height and width", rich_help_panel=OUTPUT)
    ] = False,
    dynamic_time: DynamicTime = None,
    reading: Reading,
    read: FilesRead,
    as_json: Json = False,
) -> None:
    """Write a folded model to an ONNX file and verify that file.

    MODEL is what `normswap fold` or `normswap convert --fold` wrote. The file is kept only where onnxruntime computes
    with it, on two batch sizes, what torch does; with --dynamic-time on two lengths, too.
    """
    target = output or beside(model, "onnx")
    if output is not None and target.suffix != ".onnx":
        raise InputError(f"{target} does not end with .onnx", code="output-kind", hint=f"write {target.stem}.onnx")
    source = Source.of(reading)
    with read.staged(target) as place:
        network = source.open(model).eval()
        inputs = required_inputs(
            network, given, use="" if dynamic_spatial else ", and the file takes no other height and width"
        )
        from normswap.runs.recorded_inputs import has_fixed_batch

        with working(f"writing {target} and verifying it"):
            artifact = ns.export_onnx(
                network,
                place(target),
                example_inputs=inputs,
                opset=opset,
                dynamic_batch=dynamic_batch and not has_fixed_batch(network),
                dynamic_spatial=dynamic_spatial,
                dynamic_time=False if dynamic_time is None else dynamic_time,
            )
    artifact = dataclasses.replace(artifact, path=target)
    if as_json:
        check = artifact.verification
        record = {
            **dataclasses.asdict(dataclasses.replace(artifact, verification=None)),
            "path": str(target),
            "verification": None if check is None else json.loads(check.to_json()),
        }
        print_json(json.dumps(record, indent=2, ensure_ascii=False))
        return
    show_artifact(artifact)
    if output is None:
        note("no -o was given: the output stands beside the model")
