"""How far a converted network's outputs agree with the original's on unlabelled data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normswap.capture.guard import set_mode, untouched
from normswap.capture.observed import Batch, run_on_data
from normswap.initialization.holdout import LEAST_SAMPLES, held_out
from normswap.initialization.lockstep import tensors_of
from normswap.records import Agreement

__all__ = ["agreement"]


def agreement(original: nn.Module, converted: nn.Module, batches: Sequence[Batch]) -> Agreement | None:
    """Compare both networks' outputs on the held-out samples, on all where there are too few to hold any out.

    Both networks are only read. What is not finite in the original's output is left out.

    Returns:
        How far they agree; None where the outputs hold nothing to compare.
    """
    pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}
    with untouched(original, values=True), untouched(converted, values=True):
        set_mode(original, False)
        set_mode(converted, False)
        for inputs in batches:
            outputs = (tensors_of(run_on_data(model, inputs)) for model in (original, converted))
            for i, (a, b) in enumerate(zip(*outputs, strict=False)):
                if a.ndim > 0 and a.shape == b.shape and a.numel():
                    pairs.setdefault(i, []).append((a.double(), b.double()))
    error = size = 0.0
    cosines: list[Tensor] = []  # those of each output
    same: list[Tensor] = []  # of the first one
    for i, several in pairs.items():
        samples, seen, of_this = sum(len(a) for a, _ in several), 0, []
        for a, b in several:
            held = held_out(len(a), seen).to(a.device) | (samples < LEAST_SAMPLES)
            seen += len(a)
            if i == min(pairs) and a.ndim == 2 and a.shape[1] > 1:
                same.append((a.argmax(1) == b.argmax(1))[held].double())
            valued = a.isfinite()
            a, b = (torch.where(valued, t, 0.0)[held].unsqueeze(1).flatten(1) for t in (a, b))
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
    )
