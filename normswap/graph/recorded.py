"""Recorded capture: eager runs on example inputs, written down in the graph form that a symbolic trace has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn

from normswap.graph.recorder import Recorder
from normswap.graph.records import Capture, Trace, model_names, refuse_wrappers
from normswap.runs.calling import does_not_run

__all__ = ["capture_recorded"]


def capture_recorded(
    model: nn.Module,
    inputs: tuple[Any, ...] | Mapping[str, Any],
    modes: tuple[bool, ...] = (False, True),
    *,
    first_run: int = 0,
) -> Capture:
    """Run ``model`` on ``inputs`` in each mode and write down which value came from which call; read-only.

    No gradients are recorded and no tensor is kept alive.

    Args:
        model: The model.
        inputs: Its inputs, positional or by keyword.
        modes: The values of the train flag to run with. A model that does not run in train mode on these inputs (it
            wants targets, or more than one sample) is recorded in eval mode only.
        first_run: The number of the first run.

    Raises:
        InputError: The model does not run on ``inputs`` in the first of ``modes``, or is a wrapper.
    """
    refuse_wrappers(model)
    modules, aliases, names = model_names(model)
    traces: list[Trace] = []
    shapes: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for run, training in enumerate(modes, first_run):
        recorder = Recorder(modules, model)
        try:
            graph = recorder.record(model, inputs, training)
        except Exception as cause:
            if traces:
                continue
            raise does_not_run(cause) from cause
        traces.append(Trace(run, "", graph, recorded=True))
        for norm, seen in recorder.shapes.items():
            shapes[norm] |= seen
    found = {norm: frozenset(seen) for norm, seen in shapes.items()}
    return Capture(model, tuple(traces), {}, modules, aliases, names, found, modes)
