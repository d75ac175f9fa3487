"""Capture: read a model's dataflow without touching the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from normswap.errors import InputError, argument
from normswap.graph.contradiction import contradicts
from normswap.graph.recorded import capture_recorded
from normswap.graph.records import Capture, Trace
from normswap.graph.symbolic import capture_symbolic

__all__ = ["Capture", "Trace", "capture", "capture_recorded", "capture_symbolic"]


def capture(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    how: str = "auto",
    *,
    modes: tuple[bool, ...] = (False, True),
) -> Capture:
    """Return the dataflow of ``model``; read-only.

    Args:
        model: The model.
        example_inputs: Its inputs, positional or by keyword.
        how: ``"symbolic"`` traces; ``"recorded"`` writes down runs on ``example_inputs``; ``"auto"`` traces what can
            be traced and takes the record for the rest, where there are inputs. A record also knows the shapes.
        modes: The values of the train flag to trace and run with.

    Raises:
        InputError: The model does not run on ``example_inputs``, or is a wrapper that hides its modules.
    """
    if how not in ("auto", "symbolic", "recorded"):
        raise InputError(f"how={how!r} is unknown", code="unknown-capture", hint="choose auto, symbolic or recorded")
    if how == "symbolic" or (how == "auto" and example_inputs is None):
        return capture_symbolic(model, modes)
    if example_inputs is None:
        hint = f"give {argument('example_inputs')}"
        raise InputError("recording needs inputs to run the model on", code="no-inputs", hint=hint)
    if how == "recorded":
        return capture_recorded(model, example_inputs, modes)
    traced = capture_symbolic(model, modes)
    first = 1 + max((trace.run for trace in traced.traces), default=-1)
    if traced.opaque:
        record = capture_recorded(model, example_inputs, modes, first_run=first)
        return dataclasses.replace(traced, traces=traced.traces + record.traces, shapes=record.shapes)
    # Where the graphs lack nothing but the shapes, one run is enough, unless it is one that they do not show.
    record = capture_recorded(model, example_inputs, modes[:1])
    if not contradicts(record, traced):
        return dataclasses.replace(traced, shapes=record.shapes)
    record = capture_recorded(model, example_inputs, modes, first_run=first)
    return dataclasses.replace(traced, traces=traced.traces + record.traces, shapes=record.shapes)
