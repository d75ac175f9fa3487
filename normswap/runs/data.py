"""A conversion's inputs: an example, and calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn

from normswap.errors import InputError, Text, argument
from normswap.records import SyntheticSamples
from normswap.runs.batches import bind_batches, sample_count, some_samples
from normswap.runs.calling import Batch, run_on_data
from normswap.runs.guard import set_mode, untouched
from normswap.runs.inputs import Inputs, example_of
from normswap.runs.processes import objects, share

__all__ = ["ENOUGH_SAMPLES", "Data", "few_samples"]

ENOUGH_SAMPLES = 1000
FAR = 0.03
"""Of synthetic samples, the mismatch: up to 0.023 a match on them gained on six networks, at 0.047 it lost on one."""


def few_samples(model: nn.Module, batch: Batch) -> Batch:
    """Return the first samples of a batch, which show how ``model`` runs; all of it where it does not run on so few."""
    few = some_samples(batch)
    if few is None:
        return batch
    try:
        with untouched(model):
            set_mode(model, False)
            run_on_data(model, few)
    except InputError:
        return batch
    return few


@dataclass(frozen=True)
class Data:
    """What a model may be run on.

    Args:
        example: One call's inputs; None where none were given and the data shows none.
        enough: The first calibration batches, bound to the model's forward, that hold enough samples for closed forms,
            which have few parameters to find; None without data.
        batches: All of them: those, and then the others, which are read once, as they are asked for.
        notes: What was left out of the data, and how much of it closed forms take.
    """

    example: Inputs | None = None
    enough: Sequence[Batch] | None = None
    batches: Iterable[Batch] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example_inputs: Any,
        calibration: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    ) -> Data:
        """Bind what a user gave to ``model``; the arguments are those of ``convert``.

        Of many processes each brings its share of what is enough (:mod:`normswap.runs.processes`).

        Raises:
            InputError: It does not fit, or holds no sample.
        """
        example = example_of(model, example_inputs)
        if calibration is None:
            return cls(example)
        notes: list[str] = []
        if isinstance(calibration, SyntheticSamples):
            notes.append(f"calibrated on {calibration}: how far the outputs agree on real data was not measured")
            if calibration.after > FAR:
                far = f"they are far from the recorded statistics (over {FAR}), and a calibration on them may be worse"
                notes.append(Text(f"{far} than none: more steps may bring them closer ({argument('steps')})"))
        stream = bind_batches(model, calibration, notes, forward_fn)
        enough: list[Batch] = []
        rest: list[Batch] = []
        samples = 0
        for batch in stream:
            if samples >= share(ENOUGH_SAMPLES):
                rest.append(batch)
                break
            enough.append(batch)
            samples += sample_count(batch)
        counts, more = zip(*objects("the calibration data", (samples, bool(rest))), strict=True)
        if len(counts) > 1:
            notes.append(f"the data of {len(counts)} processes, {sum(counts)} samples, was put together")
        if any(more):
            notes.append(f"closed forms were fitted to the first {sum(counts)} samples")
        example = some_samples(enough[0]) if example is None else example
        return cls(example, enough, chain(enough, rest, stream), tuple(notes))

    @classmethod
    def to_plan(cls, model: nn.Module, example_inputs: Any, calibration: Any) -> Data:
        """Return the same for a plan, which looks at the first batch alone and uses no iterator up."""
        example = example_of(model, example_inputs)
        if calibration is None or isinstance(calibration, Iterator):
            return cls(example, None if calibration is None else ())
        if example is None:
            example = some_samples(next(bind_batches(model, calibration)))
        return cls(example, ())
