"""How far a converted network's outputs agree with the original's on unlabelled data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from normswap.capture.guard import set_mode, untouched
from normswap.capture.observed import Batch, run_on_data
from normswap.errors import InputError
from normswap.initialization.holdout import LEAST_SAMPLES, held_out
from normswap.initialization.lockstep import tensors_of
from normswap.inputs import sample_count, take
from normswap.records import Agreement

__all__ = ["agreement"]


def agreement(original: nn.Module, converted: nn.Module, batches: Sequence[Batch]) -> Agreement | None:
    """Compare both networks' outputs on the held-out samples, on all where there are too few to hold any out.

    Both networks are only read. What is not finite in the original's output is left out.

    Returns:
        How far they agree; None where the outputs hold nothing to compare.
    """
    holds_out = sum(map(sample_count, batches)) >= LEAST_SAMPLES
    seen = 0
    error = size = 0.0
    cosines: dict[int, list[Tensor]] = {}  # those of each output
    same: list[Tensor] = []  # of the first one
    with untouched(original, values=True), untouched(converted, values=True):
        set_mode(original, False)
        set_mode(converted, False)
        for inputs in batches:
            samples = sample_count(inputs)
            held = held_out(samples, seen) if holds_out else torch.ones(samples, dtype=torch.bool)
            seen += samples
            for i, (a, b) in enumerate(_outputs((original, converted), inputs, held)):
                if i == 0 and a.ndim == 2 and a.shape[1] > 1:
                    same.append((a.argmax(1) == b.argmax(1)).double())
                valued = a.isfinite()
                a, b = (torch.where(valued, t, 0.0).double().unsqueeze(1).flatten(1) for t in (a, b))
                error, size = error + float((b - a).square().sum()), size + float(a.square().sum())
                cosines.setdefault(i, []).append(torch.cosine_similarity(a, b))
    if not cosines:
        return None
    of_each = [torch.cat(several) for several in cosines.values()]
    return Agreement(
        samples=len(of_each[0]),
        relative_error=math.sqrt(error / max(size, 1e-30)),
        cosine=float(torch.stack([c.mean() for c in of_each]).mean()),
        top1=float(torch.cat(same).mean()) if same else None,
    )


def _outputs(models: Sequence[nn.Module], inputs: Batch, held: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return what both give for some samples of a batch: each of the outputs of one shape that hold a value."""
    if not bool(held.any()):
        return []
    part, found = take(inputs, held), None
    if part is not None:
        with suppress(InputError):  # a model may take no other number of samples than the batch's
            found = [tensors_of(run_on_data(model, part)) for model in models]
    if found is None:
        found = [
            [t[held.to(t.device)] if t.ndim > 0 and len(t) == len(held) else t for t in tensors_of(output)]
            for output in (run_on_data(model, inputs) for model in models)
        ]
    return [(a, b) for a, b in zip(*found, strict=False) if a.ndim > 0 and a.shape == b.shape and a.numel()]
