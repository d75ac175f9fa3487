"""What is asked of a model before a conversion, and what the conversion promises of its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from normswap.checks.self_check import keeps_output, output_after, reference_output
from normswap.checks.verification import Verification
from normswap.errors import InputError, NothingToConvertError, Text, VerificationError, argument, marked
from normswap.records import Plan
from normswap.runs.inputs import Inputs, make_up_inputs

__all__ = ["Promise", "refuse_empty", "refuse_unfit"]


def refuse_unfit(model: nn.Module) -> None:
    """Raise InputError for a model whose tensors hold no values to keep."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(value):
            raise InputError(
                f"'{name}' has neither shape nor values yet: its layer is lazy and was never called",
                code="lazy-layer",
                hint="run the model on a batch first, and remove layers that it never calls",
            )
        if value.is_meta or not value.is_floating_point():
            continue
        # A buffer may be infinite for good reasons: attention masks are.
        mask = not isinstance(value, nn.Parameter) and not name.rpartition(".")[2].startswith("running_")
        if not bool((~value.isnan() if mask else value.isfinite()).all()):
            raise InputError(
                f"'{name}' holds NaN or infinite values",
                code="weights-not-finite",
                hint="take a checkpoint from before the training diverged",
            )
        if name.rpartition(".")[2] == "running_var" and bool((value < 0).any()):
            raise InputError(
                f"'{name}' holds negative values, which no variance has",
                code="negative-variance",
                hint="take a checkpoint whose BatchNorm statistics are sound",
            )


def refuse_empty(plan: Plan) -> None:
    """Raise NothingToConvertError for a plan without a step; the hint is the first reason."""
    if plan.steps or plan.recurrent:
        return
    norms = [skip for skip in plan.skips if skip.what == "norm"]
    layers = [skip for skip in plan.skips if skip.what == "recurrent layer"]
    named = (layers or norms) if plan.recurrent_recipe else (norms or layers)
    raise NothingToConvertError(
        f"no norm of the {plan.model} can be converted by '{plan.recipe}'"
        + (f", and no recurrent layer by '{plan.recurrent_recipe}'" if plan.recurrent_recipe else ""),
        code="nothing-to-convert",
        hint=f"'{named[0].name}': {marked(named[0].reason)}" if named else "the model has no BatchNorm",
    )


@dataclass(frozen=True)
class Promise:
    """What the original gives, noted before anything is changed, and what the converted model is held to.

    Args:
        expected: The original's output and its inputs, where the converted model must give the same.
        trial: Inputs on which the converted model must run, where a part of the original could not be traced: what such
            a part asks a norm for, nothing else may tell.
    """

    expected: tuple[Any, Inputs] | None = None
    trial: Inputs | None = None

    @classmethod
    def of(cls, model: nn.Module, plan: Plan, example: Inputs | None, *, exact: bool) -> Promise:
        """Return the promise for a plan.

        Args:
            model: The original; only read.
            plan: What is going to be done.
            example: Its inputs; made up where there are none.
            exact: Whether the output is to stay the same.
        """
        opaque = any(skip.what == "scope" for skip in plan.skips)
        if not (exact or opaque):
            return cls()
        inputs = example if example is not None else make_up_inputs(model)
        if inputs is None:
            return cls()
        expected = (reference_output(model, inputs, optional=True), inputs) if exact else None
        return cls(expected, inputs if opaque else None)

    def keep(self, model: nn.Module) -> Verification | None:
        """Return the comparison of the converted model's output with the original's, None where none was promised.

        Raises:
            VerificationError: The converted model does not run, or its output has moved.
        """
        if self.trial is not None:
            asked = "its forward asks a norm for what a new one does not have"
            output_after(model, self.trial, Text(f"{asked}: leave that norm out ({argument('exclude', ['NAME'])})"))
        if self.expected is None:
            return None
        expected, inputs = self.expected
        result = keeps_output(expected, model, inputs)
        if result is not None and not result.ok:
            raise VerificationError(
                f"the converted model's output moved by {result.max_rel:.1e} of its size; an exact recipe must keep it",
                code="self-check",
                hint=f"report this model; {argument('check', False)} converts it nevertheless",
            )
        return result
