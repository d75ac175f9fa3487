"""Capture: read a model's dataflow without touching the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from normswap.capture.recorded import capture_recorded
from normswap.capture.symbolic import Capture, Trace, capture_symbolic
from normswap.errors import InputError

__all__ = ["Capture", "Trace", "capture", "capture_recorded", "capture_symbolic"]


def capture(
    model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None, how: str = "auto"
) -> Capture:
    """Return the dataflow of ``model``; read-only.

    Args:
        model: The model.
        example_inputs: Its inputs, positional or by keyword.
        how: ``"symbolic"`` traces; ``"recorded"`` writes down runs on ``example_inputs``; ``"auto"`` traces what can
            be traced and takes the record for the rest, where there are inputs. A record also knows the shapes.

    Raises:
        InputError: The model does not run on ``example_inputs``, or is a wrapper that hides its modules.
    """
    if how not in ("auto", "symbolic", "recorded"):
        raise InputError(f"how={how!r} is unknown", code="unknown-capture", hint="choose auto, symbolic or recorded")
    if how == "symbolic" or (how == "auto" and example_inputs is None):
        return capture_symbolic(model)
    if example_inputs is None:
        raise InputError("a record needs a run", code="no-inputs", hint="give example_inputs")
    if how == "recorded":
        return capture_recorded(model, example_inputs)
    traced = capture_symbolic(model)
    modes = (False, True) if traced.opaque else (False,)  # for the shapes, evaluation is enough
    first = 1 + max((trace.run for trace in traced.traces), default=-1)
    record = capture_recorded(model, example_inputs, modes, first_run=first)
    traces = traced.traces + (record.traces if traced.opaque else ())
    return dataclasses.replace(traced, traces=traces, shapes=record.shapes)
