"""The options that several commands share, and how their values are read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from normswap.errors import InputError

__all__ = [
    "Arch",
    "ArchKwargs",
    "BatchSize",
    "Calibration",
    "Eps",
    "Exclude",
    "GroupSize",
    "Include",
    "InputFile",
    "InputShape",
    "Json",
    "Model",
    "NumGroups",
    "Opset",
    "RecipeOption",
    "Scale",
    "Shapes",
    "Spread",
    "To",
    "Trust",
    "read_arch_kwargs",
    "read_recipe_options",
    "read_shapes",
]

# The headings under which `--help` shows the options on a terminal.
READING, INPUTS, NORMS, CHOICE, OUTPUT = "Reading the model", "Inputs", "The new norms", "Which norms", "Output"


def _recipes_like(start: str) -> list[tuple[str, str]]:
    """Return the recipes whose names begin with ``start``, with what they do, for a shell to offer."""
    from normswap.recipes import all_recipes

    return [(name, recipe.equation) for name, recipe in all_recipes().items() if name.startswith(start)]


Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="what torch.save or `normswap convert` wrote, a .pt2 program, or a state dict with --arch"
    ),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="where MODEL's classes are defined, a package or your train.py, which is imported to read it (not needed "
        "for torch, torchvision and timm); repeatable",
        rich_help_panel=READING,
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="what a state dict is of: torchvision:NAME, timm:NAME, package:callable, PROGRAM.pt2",
        rich_help_panel=READING,
    ),
]
ArchKwargs = Annotated[
    str | None,
    typer.Option(metavar="JSON", help="arguments of --arch, as JSON or as num_classes=10,…", rich_help_panel=READING),
]
InputShape = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SHAPE",
        help="shape of random numbers to run the model on, such as 1x3x224x224; once for each of its inputs",
        rich_help_panel=INPUTS,
    ),
]
InputFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="the same with inputs of yours: .npz, .npy, .pt or .safetensors", rich_help_panel=INPUTS
    ),
]
To = Annotated[
    str | None,
    typer.Option(
        metavar="RECIPE",
        help="what takes the BatchNorms' place: gn+ws (which convert takes by itself), ln, wn+mobn, …; "
        "see `normswap recipes`",
        autocompletion=_recipes_like,
        rich_help_panel=NORMS,
    ),
]
NumGroups = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help="groups at every norm; auto: at each the number that calibration finds best",
        rich_help_panel=NORMS,
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="channels per group, or the nearest number that divides a norm's (16)", rich_help_panel=NORMS
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="unlabelled inputs to fit the new norms to: .npz, .npy, .pt or .safetensors; 500-1000 are enough",
        rich_help_panel=INPUTS,
    ),
]
BatchSize = Annotated[
    int, typer.Option(metavar="N", min=1, help="calibration inputs that run at once", rich_help_panel=INPUTS)
]
Spread = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        min=0,
        help="how steady a match keeps a group's statistics (2); 0 leaves them alone",
        rich_help_panel=NORMS,
    ),
]
Scale = Annotated[
    bool,
    typer.Option(
        "--scale/--no-scale",
        help="let channels between layers be scaled, where weights are standardized: the same function, and the swap "
        "is closer; features taken from within the model differ by a factor per channel",
        rich_help_panel=NORMS,
    ),
]
Eps = Annotated[
    float | None,
    typer.Option(metavar="X", help="added to the variance (the BatchNorm's own)", rich_help_panel=NORMS),
]
RecipeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="NAME=VALUE",
        help="another option of the recipe, such as axes=channel; repeatable",
        rich_help_panel=NORMS,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB", help="convert only norms with such names: 'layer1.*'; repeatable", rich_help_panel=CHOICE
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="leave norms with such names as they are; repeatable", rich_help_panel=CHOICE),
]
Json = Annotated[
    bool, typer.Option("--json", help="print JSON on stdout, and nothing else there", rich_help_panel=OUTPUT)
]
Opset = Annotated[
    int,
    typer.Option(metavar="N", help="ONNX operator set; 18 runs fastest in onnxruntime", rich_help_panel=OUTPUT),
]

Shapes = tuple[tuple[int, ...], ...]


def read_shapes(texts: Sequence[str] | None) -> Shapes:
    """Read ``1x3x224x224`` (also with ``×`` or commas), one for each input of the model."""
    shapes = []
    for text in texts or ():
        if not re.fullmatch(r"[1-9]\d*([xX×,][1-9]\d*)*", text):
            raise InputError(
                f"--input-shape {text!r} is no shape", code="input-shape", hint="write --input-shape 1x3x224x224"
            )
        shapes.append(tuple(map(int, re.split("[xX×,]", text))))
    return tuple(shapes)


def read_arch_kwargs(text: str | None) -> dict[str, Any]:
    """Read ``{"num_classes": 10}`` or ``num_classes=10,width=0.5``."""
    if text is None:
        return {}
    try:
        found = json.loads(text) if text.lstrip().startswith("{") else dict(map(_assignment, text.split(",")))
    except ValueError as cause:
        raise InputError(
            f"--arch-kwargs {text!r} cannot be read: {cause}",
            code="arch-kwargs",
            hint="""write --arch-kwargs num_classes=10 or --arch-kwargs '{"num_classes": 10}'""",
        ) from None
    return dict(found)


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.strip().partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"{text!r} is no NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, {"True": True, "False": False, "None": None}.get(value, value)


def read_recipe_options(recipe: str, given: Mapping[str, Any], texts: Sequence[str] | None) -> dict[str, Any]:
    """Return the recipe's options, each of the type that the recipe declares for it.

    Args:
        recipe: The recipe's name.
        given: What options of their own gave; None was not given.
        texts: The ``NAME=VALUE``s.
    """
    from normswap.recipes import all_recipes

    cls = all_recipes().get(recipe)  # an unknown one is refused later, with the list of those there are
    types = {field.name: str(field.type).split(" | ") for field in fields(cls)} if cls else {}
    options = {
        name: _typed(name, value, types.get(name, ["str"])) if isinstance(value, str) else value
        for name, value in given.items()
        if value is not None
    }
    for text in texts or ():
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise InputError(
                f"--option {text!r} is no NAME=VALUE",
                code="option-value",
                hint="write --option axes=channel; `normswap recipes` lists the options",
            )
        if name in options:
            raise InputError(f"{name} is given twice", code="option-value", hint="give it once")
        options[name] = _typed(name, value.strip(), types.get(name, ["str"]))
    return options


def _typed(name: str, value: str, types: Sequence[str]) -> Any:
    if "None" in types and value.lower() in ("none", "null"):
        return None
    if "bool" in types and value.lower() in ("true", "false", "yes", "no", "1", "0"):
        return value.lower() in ("true", "yes", "1")
    for kind in (int, float):
        if kind.__name__ in types:
            try:
                return kind(value)
            except ValueError:
                continue
    if "str" in types:
        return value
    wanted = {"bool": "true or false", "int": "a whole number", "float": "a number", "None": "none"}
    raise InputError(
        f"--option {name}={value} does not fit",
        code="option-value",
        hint=f"give {' or '.join(wanted.get(kind, kind) for kind in types)}",
    )
