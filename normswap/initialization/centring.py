"""Weight centring: which layers' filters a recipe centres, and the moments of their inputs, from data or from noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from normswap.initialization.moments import Moments, input_moments
from normswap.initialization.noise import noises_like
from normswap.recipes import Recipe
from normswap.recipes.parts import Takes
from normswap.records import Plan, Step
from normswap.runs.calling import Batch
from normswap.runs.inputs import Inputs, make_up_inputs

__all__ = ["centred_layers", "moments_for"]


def centred_layers(plan: Plan, recipe: Recipe) -> Iterator[tuple[str, Step]]:
    """Yield the fqn of each layer whose filters ``recipe`` centres, with its step."""
    for step in plan.steps:
        part = recipe.weight(step.site) if step.site.layer else None
        if part is not None and part.centres and step.site.layer:
            yield step.site.layer, step


def moments_for(
    plan: Plan,
    recipe: Recipe,
    model: nn.Module,
    batches: Sequence[Batch] | None,
    example: Inputs | None,
    *,
    fitted: bool,
) -> tuple[dict[str, Moments], str]:
    """Return the input moments of the layers whose filters are centred, by fqn, and what was assumed for them.

    Args:
        plan: What is going to be done.
        recipe: The plan's recipe.
        model: The original.
        batches: Calibration data.
        example: Inputs of the model.
        fitted: Whether the sites are fitted to the data afterwards: a fit measures its own.
    """
    layers = [
        layer
        for layer, step in centred_layers(plan, recipe)
        if not (fitted and recipe.norm(step.site, step.num_groups).takes is Takes.NORMALIZATION)
    ]
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
        return moments, (
            "no data was given and no inputs could be made up that reach every layer: give example_inputs or, better, "
            "calibration data; elsewhere the filters' means were removed evenly, which loses most of the model"
        )
    return moments, (
        "no data was given: the filters' means were removed by the moments of noise that has, at each BatchNorm, the "
        "recorded mean and variance; a few hundred unlabelled samples (calibration=) keep more of the model"
    )
