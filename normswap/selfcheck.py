"""Whether a model still computes what it did: the check that exact conversion, folding and export make."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normswap.capture.guard import copy_of, set_mode, untouched
from normswap.capture.observed import run_on
from normswap.inputs import Inputs
from normswap.verification import Verification, verify

__all__ = ["eval_output", "keeps_output", "own_rounding"]

_MARGIN = 10
"""How far two ways of computing one function may be apart, as a multiple of the rounding error of one of them."""


def eval_output(model: nn.Module, inputs: Inputs) -> Any:
    """Return ``model``'s output in evaluation; the model is only read."""
    with untouched(model, values=True):
        set_mode(model, False)
        return run_on(model, inputs)


def keeps_output(expected: Any, model: nn.Module, inputs: Inputs) -> Verification | None:
    """Compare ``model``'s output with ``expected``, allowing for rounding; None where ``expected`` holds no value.

    A wrong absorption moves an output by a good part of itself, rounding by little: 1e-3 is allowed in float32. A model
    that amplifies its own rounding errors beyond that is allowed ten times what they are.
    """
    dtypes = {p.dtype for p in model.parameters()}
    rtol = 0.1 if dtypes & {torch.float16, torch.bfloat16} else 1e-3 if torch.float32 in dtypes else 1e-9
    found = eval_output(model, inputs)
    if not any(leaf.numel() for leaf in pytree.tree_leaves((expected, found)) if isinstance(leaf, Tensor)):
        return None
    result = _compared(expected, found, inputs, rtol)
    if result.ok:
        return result
    return _compared(expected, found, inputs, max(rtol, _MARGIN * own_rounding(model, inputs)))


def _compared(expected: Any, found: Any, inputs: Inputs, rtol: float) -> Verification:
    result = verify(lambda *_, **__: expected, lambda *_, **__: found, inputs, rtol=rtol)
    return dataclasses.replace(result, a="the model before", b="the model after")


def own_rounding(model: nn.Module, inputs: Inputs) -> float:
    """Return how far rounding moves ``model``'s output, relative to its size; 0 where that cannot be told.

    It is the distance between the model in float32 and in float64; of a float64 model as much less as its numbers are
    finer.
    """
    dtypes = {p.dtype for p in model.parameters()}
    if not dtypes & {torch.float32, torch.float64}:
        return 0.0
    wide = torch.float32 not in dtypes
    other = torch.float32 if wide else torch.float64
    cast = pytree.tree_map_only(
        Tensor, lambda x: x.to(other) if x.dtype in (torch.float32, torch.float64) else x, inputs
    )
    try:
        pairs = zip(
            pytree.tree_leaves(eval_output(model, inputs)),
            pytree.tree_leaves(eval_output(copy_of(model).to(other), cast)),
            strict=True,
        )
    except Exception:  # a model that casts inside its forward has no copy in the other precision
        return 0.0
    errors = [
        float((a.double() - b.double()).abs().amax() / b.double().abs().amax().clamp(min=1e-300))
        for a, b in pairs
        if isinstance(a, Tensor) and a.dtype in (torch.float32, torch.float64) and a.numel()
    ]
    # An error as large as the output means that the output proves nothing: it must not excuse anything either.
    worst = max(errors, default=0.0)
    finer = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return min(worst, 1.0) * finer if wide else min(worst, 1e-2)
