"""The flags that say how a model's file is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

__all__ = ["Reading"]

READING = "Reading the model"
"""The heading under which `--help` shows them on a terminal."""


@dataclass(frozen=True)
class Reading:
    """How a model's file is read."""

    trust: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="where MODEL's classes are defined, a package or your train.py, which is imported to read it (not "
            "needed for torch, torchvision and timm); repeatable",
            rich_help_panel=READING,
        ),
    ] = None
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="what a state dict is of: torchvision:NAME, timm:NAME, package:callable, PROGRAM.pt2",
            rich_help_panel=READING,
        ),
    ] = None
    arch_kwargs: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help="arguments of --arch, as JSON or as num_classes=10,…", rich_help_panel=READING
        ),
    ] = None
    key: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="the entry of a checkpoint that holds the weights, such as state_dict_ema or model.state_dict "
            "(default: what fits --arch)",
            rich_help_panel=READING,
        ),
    ] = None
    prefix: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="what to strip from a state dict's names, such as backbone; names without it are left out",
            rich_help_panel=READING,
        ),
    ] = None
