"""A conversion's inputs: an example, and calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from normswap.errors import InputError
from normswap.runs.batches import bind_batches, sample_count, some_samples
from normswap.runs.calling import Batch, run_on_data
from normswap.runs.guard import set_mode, untouched
from normswap.runs.inputs import Inputs, example_of

__all__ = ["ENOUGH_SAMPLES", "Data", "few_samples"]

ENOUGH_SAMPLES = 1000


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
        batches: Calibration data, bound to the model's forward; None without.
        notes: What was left out of it.
    """

    example: Inputs | None = None
    batches: Sequence[Batch] | None = None
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

        Raises:
            InputError: It does not fit, or holds no sample.
        """
        notes: list[str] = []
        batches = None if calibration is None else list(bind_batches(model, calibration, notes, forward_fn))
        example = example_of(model, example_inputs)
        if example is None and batches is not None:
            example = some_samples(batches[0])
        return cls(example, batches, tuple(notes))

    @classmethod
    def to_plan(cls, model: nn.Module, example_inputs: Any, calibration: Any) -> Data:
        """Return the same for a plan, which looks at the first batch alone and uses no iterator up."""
        example = example_of(model, example_inputs)
        if calibration is None or isinstance(calibration, Iterator):
            return cls(example, None if calibration is None else ())
        if example is None:
            example = some_samples(next(bind_batches(model, calibration)))
        return cls(example, ())

    @property
    def enough(self) -> Sequence[Batch] | None:
        """The first batches that hold enough samples for closed forms, which have few parameters to find."""
        if self.batches is None:
            return None
        samples = 0
        for i, batch in enumerate(self.batches):
            if samples >= ENOUGH_SAMPLES:
                return self.batches[:i]
            samples += sample_count(batch)
        return self.batches

    @property
    def all_notes(self) -> tuple[str, ...]:
        """What was left out of the data, and how much of it closed forms take."""
        enough = self.enough
        if enough is None or self.batches is None or len(enough) == len(self.batches):
            return self.notes
        samples = sum(map(sample_count, enough))
        return (*self.notes, f"closed forms were fitted to the first {samples} samples")
