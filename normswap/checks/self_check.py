"""Whether a model still computes what it did: the check that exact conversion, folding and export make."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normswap.checks.comparison import verify
from normswap.checks.verification import Verification
from normswap.errors import InputError, VerificationError, argument, first_line
from normswap.runs.calling import run_on_data
from normswap.runs.guard import copy_of, set_mode, untouched
from normswap.runs.inputs import Inputs

__all__ = ["broken", "eval_output", "holds_nan", "keeps_output", "output_after", "own_rounding", "reference_output"]

_MARGIN = 10
"""How far two ways of computing one function may be apart, as a multiple of the rounding error of one of them."""


def eval_output(model: nn.Module, inputs: Inputs) -> Any:
    """Return ``model``'s output in evaluation; the model is only read.

    Raises:
        InputError: It does not run on ``inputs``.
    """
    with untouched(model):
        set_mode(model, False)
        # An output may be a tensor that the model holds, and is put back.
        return pytree.tree_map_only(Tensor, torch.clone, run_on_data(model, inputs))


def holds_nan(output: Any) -> bool:
    """Whether an output holds NaN, with which nothing can be compared."""
    tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.layout is torch.strided]
    valued = [x for x in tensors if not (x.is_meta or x.is_nested or x.is_quantized)]
    return any(bool((x != x).any()) for x in valued)


def reference_output(model: nn.Module, inputs: Inputs, *, optional: bool = False) -> Any:
    """Return the output of the original, with which that of a model made of it is going to be compared.

    Args:
        model: The original; only read.
        inputs: Its inputs.
        optional: Whether the comparison can be left out.

    Raises:
        InputError: It does not run on ``inputs``, or its output holds NaN on them.
    """
    output = eval_output(model, inputs)
    if holds_nan(output):
        raise InputError(
            "the original's own output holds NaN on these inputs: nothing can be compared with it",
            code="output-nan",
            hint=f"give {argument('example_inputs')} on which it holds numbers"
            + (f"; {argument('check', False)} converts it unchecked" if optional else ""),
        )
    return output


def output_after(model: nn.Module, inputs: Inputs, hint: str = "report this model") -> Any:
    """Return the output of a model that was made of one which runs on ``inputs``.

    Raises:
        VerificationError: It does not run.
    """
    try:
        return eval_output(model, inputs)
    except InputError as error:
        raise broken(error, hint) from error.__cause__


def broken(error: InputError, hint: str = "report this model") -> VerificationError:
    """Return the error for a model that was made of one which runs, and does not run: ``error`` blames the inputs."""
    cause = error.__cause__ or error
    return VerificationError(
        f"the original runs and the model made of it does not: {type(cause).__name__}: {first_line(cause)}",
        code="does-not-run",
        hint=hint,
    )


def keeps_output(expected: Any, model: nn.Module, inputs: Inputs) -> Verification | None:
    """Compare ``model``'s output with ``expected``, allowing for rounding; None where that proves nothing.

    It proves nothing where both hold no value that could differ: a detector may find nothing, and a network whose last
    layer is initialized with zeros gives zeros.

    A wrong absorption moves an output by a good part of itself, rounding by little: 1e-3 is allowed in float32. A model
    that amplifies its own rounding errors beyond that is allowed ten times what they are.

    Raises:
        VerificationError: ``model`` does not run.
    """
    dtypes = {p.dtype for p in model.parameters()}
    rtol = 0.1 if dtypes & {torch.float16, torch.bfloat16} else 1e-3 if torch.float32 in dtypes else 1e-9
    found = output_after(model, inputs)
    if not any(leaf.numel() for leaf in pytree.tree_leaves((expected, found)) if isinstance(leaf, Tensor)):
        return None
    result = _compared(expected, found, inputs, rtol)
    if result.proves_nothing:
        return None
    if result.ok:
        return result
    return _compared(expected, found, inputs, max(rtol, _MARGIN * own_rounding(model, inputs)))


def _compared(expected: Any, found: Any, inputs: Inputs, rtol: float) -> Verification:
    result = verify(lambda *_, **__: expected, lambda *_, **__: found, inputs, rtol=rtol)
    return dataclasses.replace(result, a="the model before", b="the model after")


def own_rounding(model: nn.Module, inputs: Inputs) -> float:
    """Return how far rounding moves ``model``'s output, relative to its size; 0 where that cannot be told.

    Of a float32 model it is the distance to its float64 copy. A float64 model has no finer one: there it is what a
    change of all its values in their last digits does, as its operations' rounding is amplified as they are.
    """
    dtypes = {p.dtype for p in model.parameters()}
    try:
        if torch.float32 in dtypes:
            wide = pytree.tree_map_only(Tensor, lambda x: x.double() if x.dtype is torch.float32 else x, inputs)
            # An error as large as the output means that the output proves nothing: it must not excuse anything either.
            return min(_distance(eval_output(model, inputs), eval_output(copy_of(model).double(), wide)), 1e-2)
        if torch.float64 in dtypes:
            return min(_distance(eval_output(model, inputs), eval_output(_changed(model), inputs)), 1e-8)
    except Exception:  # a model that casts inside its forward has no float64 copy
        pass
    return 0.0


_LAST_DIGITS = 4 * torch.finfo(torch.float64).eps


def _changed(model: nn.Module) -> nn.Module:
    """Return a copy of a float64 model with all its values off in their last digits."""
    changed, generator = copy_of(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*changed.parameters(), *changed.buffers()):
            if tensor.dtype is torch.float64:
                noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.mul_(1 + _LAST_DIGITS * noise.to(tensor.device))
    return changed


def _distance(found: Any, expected: Any) -> float:
    """Return the largest difference between two outputs' floating point values, relative to each tensor's largest."""
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    errors = [
        float((a.double() - b.double()).abs().amax() / b.double().abs().amax().clamp(min=1e-300))
        for a, b in pairs
        if isinstance(a, Tensor) and a.dtype in (torch.float32, torch.float64) and a.numel()
    ]
    return max(errors, default=0.0)
