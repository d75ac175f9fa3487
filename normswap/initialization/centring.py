"""What a recipe's weights have to know of the layers' inputs: their moments, from data or from noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from normswap.errors import Text, argument
from normswap.initialization.moments import Moments, input_moments
from normswap.initialization.noise import noises_like
from normswap.runs.calling import Batch
from normswap.runs.inputs import Inputs, make_up_inputs
from normswap.stages.bound import BoundPlan, BoundStep

__all__ = ["centred_layers", "moments_for"]


def centred_layers(bound: BoundPlan) -> Iterator[tuple[str, BoundStep]]:
    """Yield the fqn of each layer whose filters a plan centres, with its step."""
    for step in bound.steps:
        if step.site.layer is not None and step.weight.centres:
            yield step.site.layer, step


def moments_for(
    bound: BoundPlan,
    model: nn.Module,
    batches: Sequence[Batch] | None,
    example: Inputs | None,
    *,
    fitted: bool,
) -> tuple[dict[str, Moments], str]:
    """Return the input moments of the layers whose form reads them, by fqn, and what was assumed for them.

    Args:
        bound: What is going to be done.
        model: The original.
        batches: Calibration data.
        example: Inputs of the model.
        fitted: Whether the sites are fitted to the data afterwards: a fit measures its own.
    """
    steps = [step for step in bound.steps if step.site.layer is not None and step.weight.reads_inputs]
    layers = [step.site.layer or "" for step in steps if not (fitted and step.measured_by_fit)]
    centred = any(step.weight.centres for step in steps)
    if not layers or any(p.is_meta for p in model.parameters()):
        return {}, ""
    if batches is not None:
        return input_moments(model, layers, batches, shaped=False), ""
    inputs = example if example is not None else make_up_inputs(model)
    moments: dict[str, Moments] = {}
    for noise in () if inputs is None else noises_like(inputs):
        try:
            moments = input_moments(model, layers, [noise], shaped=True)
            break
        except Exception:  # a model may take no other batch size than the example's
            continue
    if len(moments) < len(layers):
        return moments, Text(
            "no data was given and no inputs could be made up that reach every layer: give "
            f"{argument('example_inputs')} or, better, {argument('calibration')}; elsewhere "
            + ("the filters' means were removed evenly" if centred else "what a layer reads was taken to have length 1")
            + ", which loses most of the model"
        )
    return moments, Text(
        "no data was given: "
        + ("the filters' means were removed by the moments" if centred else "the lengths of what layers read are those")
        + " of noise that has, at each BatchNorm, the "
        f"recorded mean and variance; a few hundred unlabelled samples ({argument('calibration')}) keep more of the "
        "model"
    )
