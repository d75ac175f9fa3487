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
from normswap.runs.processes import everywhere, offsets, summed_by_name
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
        before, samples = offsets("samples", [sample_count(batch) for batch in batches])
        try:
            pairs = _on_held_out_samples(models, batches, before) if samples >= LEAST_SAMPLES else None
        except InputError:  # a model may take no other number of samples than the batches'
            pairs = None
        some_held = everywhere("held-out samples", pairs is not None)
        if pairs is None or not some_held:
            pairs, some_held = _held_out_rows(_on_batches(models, batches))
    sums = {str(i): [sum((_sums(a, b) for a, b in several), torch.zeros(()))] for i, several in pairs.items()}
    found = {int(i): one.tolist() for i, (one,) in summed_by_name("the agreement of output", sums).items()}
    if not found:
        return None
    rows, cosines, errors, sizes, classified, same = zip(*(found[i] for i in sorted(found)), strict=True)
    return Agreement(
        samples=int(rows[0]),
        relative_error=math.sqrt(sum(errors) / max(sum(sizes), 1e-30)),
        cosine=sum(cosine / n for cosine, n in zip(cosines, rows, strict=True)) / len(rows),
        top1=same[0] / classified[0] if classified[0] else None,
        held_out=some_held,
    )


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """Return of one batch's output, of the original and of the converted network, what is added up, ``(6,)``.

    The number of rows, their cosines, ``‖b − a‖²``, ``‖a‖²``, the number of rows that hold classes, and of those in
    which both have the same.
    """
    classes = a.ndim == 2 and a.shape[1] > 1
    same = (a.argmax(1) == b.argmax(1)).sum() if classes else torch.zeros(())
    valued = a.isfinite()
    a, b = (torch.where(valued, t, 0.0).double().unsqueeze(1).flatten(1) for t in (a, b))
    values = (
        len(a),
        torch.cosine_similarity(a, b).sum(),
        (b - a).square().sum(),
        a.square().sum(),
        len(a) * classes,
        same,
    )
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def _on_held_out_samples(models: Sequence[nn.Module], batches: Sequence[Batch], before: Sequence[int]) -> _Pairs | None:
    """Return what the models give for the held-out samples; None where batches cannot be taken apart."""
    parts = []
    for batch, first in zip(batches, before, strict=True):
        held = held_out(sample_count(batch), first)
        part = take(batch, held)
        if part is None:
            return None
        parts += [part] if bool(held.any()) else []
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


def _held_out_rows(pairs: _Pairs) -> tuple[_Pairs, bool]:
    """Return the rows of the held-out samples, counted along the outputs' first axis; all where they are few.

    And whether they were held out of all outputs.
    """
    chosen: _Pairs = {}
    some_held = True
    for i, several in pairs.items():
        firsts, rows = offsets(f"rows of output {i}", [len(a) for a, _ in several])
        enough = rows >= LEAST_SAMPLES
        some_held = some_held and enough
        held = (
            held_out(len(a), first).to(a.device) | (not enough) for (a, _), first in zip(several, firsts, strict=True)
        )
        chosen[i] = [(a[rows], b[rows]) for (a, b), rows in zip(several, held, strict=True)]
    return chosen, some_held
