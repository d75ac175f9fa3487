"""The command line: parse, call, print. torch, NumPy and onnx are imported only inside the commands."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from normswap import __version__
from normswap.cli.boundary import Command, ErrorBoundary
from normswap.cli.checking import show_demo, show_recipes, verify_pair
from normswap.cli.console import printing, survive_any_encoding
from normswap.cli.converting import convert_model
from normswap.cli.deploying import export_model, fold_model
from normswap.cli.inspecting import inspect_model
from normswap.cli.migrating import migrate_checkpoint
from normswap.errors import InputError

__all__ = ["app", "main"]

app = typer.Typer(
    cls=ErrorBoundary,
    name="normswap",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # ErrorBoundary prints them
    rich_markup_mode="rich" if sys.stdout is not None and sys.stdout.isatty() else None,  # no boxes in a pipe
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example:  normswap convert model.pt --calibration images.npy --onnx model.onnx",
)


def _add(command: Callable[..., None], name: str, *examples: str) -> None:
    """Add a command; its help is the function's docstring with each paragraph in one piece, as typer needs it."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    text = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
    epilog = "\n\n".join(f"Example:  normswap {name} {given}" for given in examples)
    app.command(name, cls=Command, help=text, epilog=epilog)(command)


_add(
    inspect_model,
    "inspect",
    "model.pt --to gn+ws",
    "weights.pt --arch torchvision:resnet18",
)
_add(
    convert_model,
    "convert",
    "model.pt --to gn+ws -o model.gn+ws.safetensors",
    "model.pt --trust train.py --calibration images.npy",
    "model.pt --to wn+mobn --onnx model.onnx",
)
_add(fold_model, "fold", "model.gn+ws.safetensors -o deploy.pt")
_add(export_model, "export", "deploy.pt -o deploy.onnx --input-shape 1x3x32x32")
_add(migrate_checkpoint, "migrate", "later.pt --like model.gn+ws.safetensors -o later.gn+ws.safetensors")
_add(verify_pair, "verify", "deploy.pt deploy.onnx --input-shape 4x3x32x32")
_add(show_recipes, "recipes", "")
_add(show_demo, "demo", "--output results")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"normswap {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Replace the BatchNorm layers of a PyTorch network without losing what it has learnt.

    The usual way: inspect, convert, train on (normswap.load in Python), fold, export, verify.
    """


def main() -> None:
    """Run the command line and end the process with its exit code."""
    survive_any_encoding()
    try:
        with printing():
            app()
    except InputError as error:  # of the help or the version, which are no command's
        typer.echo(error.text, err=True)
        sys.exit(error.exit_code)
