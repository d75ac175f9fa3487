"""Example inputs of a model: given by the user, recorded when it was exported, or made up."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from normswap.errors import InputError, Text, argument
from normswap.nn import FilterLayout
from normswap.nn.kinds import is_layer
from normswap.runs.calling import run_on
from normswap.runs.cell_calls import refuse_misfitting_cells, seen_by_no_mode
from normswap.runs.deadline import RanTooLong, at_most
from normswap.runs.guard import set_mode, untouched
from normswap.runs.recorded_inputs import recorded_inputs

__all__ = ["Inputs", "as_inputs", "example_of", "make_up_inputs"]

logger = logging.getLogger(__name__)

Inputs = tuple[Any, ...] | Mapping[str, Any]
"""One call's inputs: positional or by keyword."""


def as_inputs(value: Any, what: str = "example_inputs") -> Inputs:
    """Return one call's inputs from a tensor, a tuple or list of positional inputs, or a dict of keyword inputs.

    Raises:
        InputError: The value is none of these.
    """
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (tuple, list)):
        return tuple(value)
    raise InputError(
        f"{what} is a {type(value).__name__}",
        code="inputs-type",
        hint="give a tensor, a tuple of positional inputs, or a dict of keyword inputs",
    )


def example_of(model: nn.Module, given: Any) -> Inputs | None:
    """Return ``given`` as one call's inputs or, without, those that ``model`` was exported with; None where none are.

    Raises:
        InputError: ``given`` is neither a tensor, a tuple, a list nor a dict.
    """
    return recorded_inputs(model) if given is None else as_inputs(given)


_SIDES = {1: (1024, 4096, 256), 2: (64, 32, 224, 96, 28, 128, 256, 384, 512), 3: (16, 32, 64)}
_MOST_WIDTHS = 4
_LONGEST = 5
"""Seconds: a conversion runs the model some ten times on what is made up."""


def make_up_inputs(model: nn.Module, *others: nn.Module, batch: int = 2) -> tuple[Tensor, ...] | None:
    """Return one noise input that ``model`` takes, found by trying sizes that fit its first layer; None if none does.

    ``others`` must take it, too. None is returned as well where all this takes longer than 5 s: a detector enlarges any
    image to 800 pixels. Made-up inputs show whether two models compute the same; they say nothing about the
    shapes that a user's data has.

    A size is tried by running the model on it, and some that do not fit would end the process: a recurrent cell's
    (:mod:`normswap.runs.cell_calls`).
    """
    layers = [m for m in model.modules() if is_layer(m)]
    if not layers or any(p.is_meta for p in model.parameters()) or any(map(seen_by_no_mode, (model, *others))):
        return None
    first, generator = layers[0], torch.Generator().manual_seed(0)
    like = FilterLayout.of(first).weight(first)
    if isinstance(first, nn.Linear):
        widths = dict.fromkeys(p.numel() for p in model.parameters() if p.ndim == 1)  # those of norms among them
        shapes: list[tuple[int, ...]] = [(batch, first.in_features)]
        shapes += [(batch, width, first.in_features) for width in list(widths)[:_MOST_WIDTHS]]
    else:
        axes = like.ndim - 2
        channels = cast(int, first.in_channels)
        shapes = [(batch, channels, *(side,) * axes) for side in _SIDES[axes]]
    end = time.monotonic() + _LONGEST
    with ExitStack() as stack:
        for one in (model, *others):
            stack.enter_context(untouched(one))
            set_mode(one, False)
        for shape in shapes:
            x = torch.randn(*shape, generator=generator).to(like)
            try:
                with at_most(max(end - time.monotonic(), 0)), refuse_misfitting_cells():
                    for one in (model, *others):
                        run_on(one, (x,))
            except RanTooLong:
                text = "no inputs were made up, as a run takes longer than %s s: give %s"
                logger.info(text, _LONGEST, Text(argument("example_inputs")))
                return None
            except Exception:  # this size does not fit: the next may
                continue
            return (x,)
    return None
