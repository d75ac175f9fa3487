"""The flags that several commands share, and those that come from the options of a conversion.

A command declares a record for a group of flags, and :class:`Chosen` for the options that it offers;
:func:`flattened` turns them into single flags for typer and gives the command the records back.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from normswap.cli.console import note
from normswap.cli.protecting import FilesRead
from normswap.cli.spelling import flag_of, spell
from normswap.cli.values import Recipes, Shapes, read_recipe_options, read_shapes
from normswap.options import NEW_NORMS, OUTPUT, WHICH_NORMS, Meaning, Options

__all__ = [
    "OUTPUT",
    "At",
    "Chosen",
    "DataFlags",
    "InputFlags",
    "Json",
    "Model",
    "Opset",
    "RecipeFlags",
    "To",
    "flattened",
    "option_flags",
    "output_flag",
]

# A further heading under which `--help` shows the flags on a terminal.
INPUTS = "Inputs"


def _recipes_like(start: str) -> list[tuple[str, str]]:
    """Return the recipes whose names begin with ``start``, with what they do, for a shell to offer."""
    from normswap.recipes import Auto, all_recipes

    known = {name: recipe.equation for name, recipe in all_recipes().items()} | {Auto.name: Auto.equation}
    return [(name, equation) for name, equation in known.items() if name.startswith(start)]


Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="what torch.save or `normswap convert` wrote, a .pt2 program, or a state dict with --arch"
    ),
]
To = Annotated[
    str | None,
    typer.Option(
        metavar="RECIPE",
        help="what takes the BatchNorms' place: gn+ws (which convert takes by itself), ln, wn+mobn, …; see "
        "`normswap recipes`; auto: at each norm the one that by --calibration changes the output least",
        autocompletion=_recipes_like,
        rich_help_panel=NEW_NORMS,
    ),
]
At = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB=RECIPE",
        help="another recipe where a norm's name matches, such as 'stem.*=gn+aws'; 'GLOB=stays' leaves it; repeatable, "
        "the first that matches decides",
        rich_help_panel=WHICH_NORMS,
    ),
]


def output_flag(text: str) -> Any:
    """Return the flag that names the file to write."""
    return typer.Option("-o", "--output", metavar="FILE", help=text, rich_help_panel=OUTPUT)


Json = Annotated[
    bool, typer.Option("--json", help="print JSON on stdout, and nothing else there", rich_help_panel=OUTPUT)
]
Opset = Annotated[
    int, typer.Option(metavar="N", help="ONNX operator set; 18 runs fastest in onnxruntime", rich_help_panel=OUTPUT)
]


@dataclass(frozen=True)
class InputFlags:
    """What a model is run on."""

    input_shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHAPE",
            help="shape of random numbers to run the model on, such as 1x3x224x224; once for each of its inputs",
            rich_help_panel=INPUTS,
        ),
    ] = None
    input_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="the same with inputs of yours: .npz, .npy, .pt or .safetensors",
            rich_help_panel=INPUTS,
        ),
    ] = None

    def __post_init__(self) -> None:
        read_shapes(self.input_shape)  # a misspelt one is refused before a model is read

    @property
    def shapes(self) -> Shapes:
        """The shapes of --input-shape."""
        return read_shapes(self.input_shape)


@dataclass(frozen=True)
class DataFlags:
    """What the new norms are fitted to: data from a file, or samples made from the norms' own statistics."""

    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="unlabelled inputs to fit the new norms to: .npz, .npy, .pt or .safetensors; 500-1000 are enough",
            rich_help_panel=INPUTS,
        ),
    ] = None
    synthetic: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="without data: make N samples, such as 64, from the BatchNorms' own statistics and fit to those",
            rich_help_panel=INPUTS,
        ),
    ] = None
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="calibration inputs that run at once", rich_help_panel=INPUTS)
    ] = 32


@dataclass(frozen=True)
class RecipeFlags:
    """The options of a recipe."""

    num_groups: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="groups at every norm; auto: at each the number that calibration finds best",
            rich_help_panel=NEW_NORMS,
        ),
    ] = None
    group_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="channels per group, or the nearest number that divides a norm's (16)",
            rich_help_panel=NEW_NORMS,
        ),
    ] = None
    eps: Annotated[
        float | None,
        typer.Option(metavar="X", help="added to the variance (the BatchNorm's own)", rich_help_panel=NEW_NORMS),
    ] = None
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="another option of the recipe, such as axes=channel; repeatable",
            rich_help_panel=NEW_NORMS,
        ),
    ] = None

    def __bool__(self) -> bool:
        return self != RecipeFlags()

    def of(self, recipe: Recipes) -> dict[str, Any]:
        """Return the options as ``recipe``, or those that it is made of, have them."""
        own = {"num_groups": self.num_groups, "group_size": self.group_size, "eps": self.eps}
        return read_recipe_options(recipe, own, self.option)


class Chosen(dict[str, Any]):
    """Those options of a conversion that a command was given, by name; they have been checked."""

    @classmethod
    def of(cls, **values: Any) -> Chosen:
        """Return what was given: a flag that was not is None, or an empty list."""
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if value is not None and value != []
        }
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            options = Options(**given)
        for warning in caught:
            note(warning.message.args[0] if isinstance(warning.message, Warning) else warning.message)
        return cls({name: getattr(options, name) for name in given})


def option_flags(command: str) -> Iterator[inspect.Parameter]:
    """Yield a flag for each option of a conversion that ``command`` offers; without it, its value is None."""
    hints = get_type_hints(Options)
    for known in fields(Options):
        meaning: Meaning = known.metadata["meaning"]
        if command not in meaning.flag.commands:
            continue
        kind = _value_type(hints[known.name])
        flag = flag_of(known.name)
        info = typer.Option(
            f"{flag}/{flag.replace('--', '--no-', 1)}" if kind is bool else flag,
            metavar=meaning.flag.metavar or None,
            min=meaning.minimum,
            help=_help(known, meaning),
            rich_help_panel=meaning.flag.heading,
        )
        annotation = Annotated[kind | None, info]  # type: ignore[valid-type]
        yield inspect.Parameter(known.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _value_type(hint: Any) -> Any:
    """Return the type of a flag's value: ``tuple[str, ...]`` is given as a list, and None is not given at all."""
    if get_origin(hint) is tuple:
        return list[get_args(hint)[0]]  # type: ignore[misc]
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _help(known: Field[Any], meaning: Meaning) -> str:
    """Return an option's meaning in the words of the command line, with its default where that is a number."""
    text = spell(meaning.text)
    text = text[0].lower() + text[1:] + spell(meaning.flag.note)
    if isinstance(known.default, tuple):
        return f"{text}; repeatable"
    return text if meaning.minimum is None else f"{text} ({known.default:g})"


def flattened(command: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let typer see the single flags of the records, and of :class:`Chosen`, that a command's function takes."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        parameters: list[inspect.Parameter] = []
        groups: dict[str, tuple[list[str], Callable[..., Any]]] = {}
        asking: list[str] = []
        for name, parameter in inspect.signature(function).parameters.items():
            hint = hints[name]
            if hint is FilesRead:
                asking.append(name)
                continue
            if hint is Chosen:
                flags = list(option_flags(command))
                groups[name] = [flag.name for flag in flags], Chosen.of
            elif is_dataclass(hint):
                flags = _flags_of(hint)
                groups[name] = [flag.name for flag in flags], hint  # type: ignore[assignment]
            else:
                flags = [parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)]
            parameters += flags

        @functools.wraps(function)
        def run(**given: Any) -> None:
            records: dict[str, Any] = {name: FilesRead.of(parameters, given) for name in asking}
            records |= {name: make(**{f: given.pop(f) for f in names}) for name, (names, make) in groups.items()}
            function(**given, **records)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _flags_of(record: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(record, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(f.name, keyword, default=f.default, annotation=hints[f.name]) for f in fields(record)]
