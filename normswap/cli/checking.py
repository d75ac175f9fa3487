"""``normswap verify``, ``normswap recipes`` and ``normswap demo``."""

from __future__ import annotations

import dataclasses
import json
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer

import normswap as ns
from normswap.cli.console import fits, note, print_json, say, table, working
from normswap.cli.flags import InputFlags, Json, flattened
from normswap.cli.inputs import example_inputs, required_inputs, stated_inputs
from normswap.cli.reading import Reading
from normswap.cli.reporting import show_check
from normswap.cli.sources import Source

__all__ = ["show_demo", "show_recipes", "verify_pair"]


@flattened("verify")
def verify_pair(
    *,
    a: Annotated[Path, typer.Argument(metavar="A", help="the reference: a model file or an .onnx file")],
    b: Annotated[Path, typer.Argument(metavar="B", help="what is compared with it")],
    given: InputFlags,
    rtol: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            help="allowed difference, relative to the output's magnitude (by the dtype: 2e-5 for float32)",
        ),
    ] = None,
    reading: Reading,
    as_json: Json = False,
) -> None:
    """Compare the outputs of two models or ONNX files.

    Both run on the same inputs: random ones of --input-shape, those of --input-file or, without either, random ones of
    the sizes that an ONNX file states. The exit code is 0 where they agree, 1 where they differ.
    """
    source = Source.of(reading, arch_if_needed=True)
    opened = {path: path if path.suffix == ".onnx" else source.open(path).eval() for path in dict.fromkeys((a, b))}
    sides: list[Any] = [opened[a], opened[b]]
    network = next((side for side in sides if not isinstance(side, Path)), None)
    inputs = example_inputs(network, given)
    if inputs is None:
        inputs = stated_inputs(network, [side for side in sides if isinstance(side, Path)])
    if inputs is None:
        inputs = required_inputs(network, given)
    with working("comparing"):
        check = dataclasses.replace(ns.verify(sides[0], sides[1], inputs, rtol=rtol), a=str(a), b=str(b))
    if as_json:
        print_json(check.to_json())
    else:
        show_check(check)
    if not check.ok:
        if check.rows and not check.reason and not any(row.reason and not isfinite(row.max_abs) for row in check.rows):
            exact = ", ".join(name for name, recipe in ns.all_recipes().items() if recipe.exact)
            note(
                f"only exact recipes ({exact}) keep a model's output: after another one compare with the converted "
                "model, not with the original"
            )
        raise typer.Exit(1)


def show_recipes(as_json: Json = False) -> None:
    """List what a BatchNorm can be swapped for.

    gn+ws, gn+aws, gn and ln normalize each sample by itself: batches of any size train alike. wn+mobn and mobn take the
    batch's mean and no variance, bcn estimates of both over many batches, streaming mixes the batch's with those of
    earlier ones: these four share something between samples and are not for differential privacy. cosine divides by
    the length of each input, wn and none take nothing from the data. ws keeps the BatchNorm.

    With --to auto the calibration data chooses, norm by norm, between gn+ws, gn+aws and ln, or those named by
    --option recipes=gn,ln, the most wanted first. --option max_error=0.1 keeps the first as far as the output's
    relative error allows, and --option leave=2 lets so many norms stay.

    An exact recipe keeps the model's outputs in evaluation. In the equations x is the norm's input, W the weight of
    the layer in front of it and v what is trained in its place, with n values in each filter. Options are given to
    convert as --num-groups 8 or --option axes=channel.
    """
    with working("reading the recipes"):
        from normswap.recipes.recurrent import all_recurrent

        recipes = ns.all_recipes()
    chosen = {name: {field.name: field.default for field in dataclasses.fields(cls)} for name, cls in recipes.items()}
    if as_json:
        record = [
            {"name": n, "equation": c.equation, "exact": c.exact, "paper": c.paper, "options": chosen[n]}
            for n, c in recipes.items()
        ]
        print_json(json.dumps(record, indent=2, ensure_ascii=False))
        return
    header = ("recipe", "exact", "equation", "paper", "options")
    rows = [
        (
            n,
            "yes" if c.exact else "no",
            c.equation,
            c.paper,
            ", ".join(k if v is None else f"{k}={v}" for k, v in chosen[n].items()) or "–",
        )
        for n, c in recipes.items()
    ]
    if fits(header, rows):
        table(header, rows)
    else:
        table(header[:3], [row[:3] for row in rows])
        say()
        table((header[0], *header[3:]), [(row[0], *row[3:]) for row in rows])
    say()
    layers = [(n, "yes" if c.exact else "no", c.equation, c.paper) for n, c in all_recurrent().items()]
    table(("--recurrent", *header[1:4]), layers)


def show_demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="where the ONNX files go")] = Path("normswap-demo"),
    as_json: Json = False,
) -> None:
    """Run every recipe on a small trained network, to ONNX files.

    The network and its handwritten digits are part of normswap: nothing is needed, nothing is downloaded. Two tables
    compare accuracy, speed and size; --output gets the ONNX files.
    """
    from normswap.demo.report import run_demo

    with working("running the demo"):
        record = run_demo(output)
    if as_json:
        print_json(record.to_json())
    else:
        say(str(record))
    if not record.ok:
        raise typer.Exit(1)
