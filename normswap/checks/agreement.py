"""Output agreement of a converted network with the original on unlabelled data: relative error, cosine, same class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normswap.errors import InputError
from normswap.records import Agreement
from normswap.runs.batches import LEAST_SAMPLES, held_out, sample_count, take
from normswap.runs.calling import Batch, run_on_data
from normswap.runs.guard import set_mode, untouched
from normswap.runs.tensors import tensors_of

__all__ = ["agreement"]

_Pairs = dict[int, list[tuple[Tensor, Tensor]]]  # of each output: what both networks give, batch after batch


def agreement(original: nn.Module, converted: nn.Module, batches: Sequence[Batch]) -> Agreement | None:
    """Compare both networks' outputs on the held-out samples, on all where there are too few to hold any out.

    Both networks are only read. What is not finite in the original's output is left out.

    Returns:
        How far they agree; None where the outputs hold nothing to compare.
    """
    models = original, converted
    with untouched(original), untouched(converted):
        set_mode(original, False)
        set_mode(converted, False)
        try:
            pairs = _on_held_out_samples(models, batches)
        except InputError:  # a model may take no other number of samples than the batches'
            pairs = None
        found = _on_batches(models, batches) if pairs is None else {}
        some_held = pairs is not None or all(_enough(several) for several in found.values())
        pairs = _held_out_rows(found) if pairs is None else pairs
    error = size = 0.0
    cosines: list[Tensor] = []  # those of each output
    same: list[Tensor] = []  # of the first one
    for i, several in pairs.items():
        of_this = []
        for a, b in several:
            if i == min(pairs) and a.ndim == 2 and a.shape[1] > 1:
                same.append((a.argmax(1) == b.argmax(1)).double())
            valued = a.isfinite()
            a, b = (torch.where(valued, t, 0.0).double().unsqueeze(1).flatten(1) for t in (a, b))
            error, size = error + float((b - a).square().sum()), size + float(a.square().sum())
            of_this.append(torch.cosine_similarity(a, b))
        cosines.append(torch.cat(of_this))
    if not cosines:
        return None
    return Agreement(
        samples=len(cosines[0]),
        relative_error=math.sqrt(error / max(size, 1e-30)),
        cosine=float(torch.stack([c.mean() for c in cosines]).mean()),
        top1=float(torch.cat(same).mean()) if same else None,
        held_out=some_held,
    )


def _on_held_out_samples(models: Sequence[nn.Module], batches: Sequence[Batch]) -> _Pairs | None:
    """Return what the models give for the held-out samples; None where batches cannot be taken apart, or few are."""
    counts = [sample_count(batch) for batch in batches]
    if sum(counts) < LEAST_SAMPLES:
        return None
    parts, before = [], 0
    for batch, count in zip(batches, counts, strict=True):
        held = held_out(count, before)
        part = take(batch, held)
        if part is None:
            return None
        parts += [part] if bool(held.any()) else []
        before += count
    return _on_batches(models, parts)


def _on_batches(models: Sequence[nn.Module], batches: Sequence[Batch]) -> _Pairs:
    """Return what the models give for whole batches, of each output that has the same shape in both."""
    pairs: _Pairs = {}
    for inputs in batches:
        outputs = (tensors_of(run_on_data(model, inputs)) for model in models)
        for i, (a, b) in enumerate(zip(*outputs, strict=False)):
            if a.ndim > 0 and a.shape == b.shape and a.numel():
                pairs.setdefault(i, []).append((a, b))
    return pairs


def _enough(several: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Tell whether some of an output's rows, counted along its first axis, are held out."""
    return sum(len(a) for a, _ in several) >= LEAST_SAMPLES


def _held_out_rows(pairs: _Pairs) -> _Pairs:
    """Return the rows of the held-out samples, counted along the outputs' first axis; all where they are few."""
    chosen: _Pairs = {}
    for i, several in pairs.items():
        before, enough = 0, _enough(several)
        for a, b in several:
            held = held_out(len(a), before).to(a.device) | (not enough)
            before += len(a)
            chosen.setdefault(i, []).append((a[held], b[held]))
    return chosen
