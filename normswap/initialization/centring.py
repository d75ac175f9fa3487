"""What standardizing the weights needs, which takes each filter's mean away: scaled channels, and the inputs' moments.

Both come from calibration data where there is some, else from noise that the BatchNorms shape (Note [Data-free
moments]); and both concern the layers whose filters a recipe centres, and no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from normswap.checks.self_check import eval_output, keeps_output
from normswap.errors import Text, argument
from normswap.graph.channels import Channels, find_channels
from normswap.graph.dataflow import Dataflow
from normswap.initialization.equalization import choose_scales, scale_channels
from normswap.initialization.moments import Moments, input_moments, noise_like
from normswap.norms import Takes
from normswap.records import NormKind
from normswap.runs.batches import sample_count, some_samples
from normswap.runs.calling import Batch
from normswap.runs.guard import copy_of
from normswap.runs.inputs import Inputs, make_up_inputs
from normswap.runs.tensors import tensors_of
from normswap.stages.bound import BoundPlan, BoundStep

__all__ = ["SCALED", "moments_for", "scaled_for"]

SCALED = Text(
    "channels between layers were scaled, so that standardizing the weights takes less away: features taken from "
    f"within the model differ from the original's by a factor per channel ({argument('scale', False)} leaves them)"
)
_SAMPLES_TO_SCALE, _LARGE_SAMPLES_TO_SCALE = 128, 32
_LARGE = 2**17  # values of a sample, which then has many positions


def scaled_for(
    bound: BoundPlan,
    flow: Dataflow,
    batches: Sequence[Batch] | None,
    example: Inputs | None,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a copy of the captured model, the same function, whose channels' scales suit standardized weights.

    And the scales of the channels that each norm gives, by fqn. The model itself, and no scales, where nothing is
    gained, where it cannot be copied, or where its output would not stay.

    Args:
        bound: What is going to be done.
        flow: The original's dataflow.
        batches: Calibration data.
        example: Inputs that the copy is checked on.
    """
    model = flow.capture.model
    gains = dict(_gains(bound))
    if not gains or any(p.is_meta for p in model.parameters()):
        return model, {}
    inputs = example if example is not None else make_up_inputs(model)
    if inputs is None:
        return model, {}
    norms = {step.site.norm: tuple(one for _, one in step.source.after) for step in bound.modules}
    channels = find_channels(flow, norms, [step.site.layer for step in bound.modules if step.site.layer])
    scales = _scales(model, gains, channels, batches, inputs)
    if scales is None:
        return model, {}
    try:
        scaled = copy_of(model)
    except Exception:  # whatever a user's class does on being copied: it converts in place nevertheless
        return model, {}
    scale_channels(scaled, channels, scales)
    result = keeps_output(eval_output(model, inputs), scaled, inputs)
    if result is not None and not result.ok:
        return model, {}
    return scaled, {norm: scales[channels.outputs[norm]] for norm in norms if norm in channels.outputs}


def moments_for(
    bound: BoundPlan,
    model: nn.Module,
    batches: Sequence[Batch] | None,
    example: Inputs | None,
    *,
    fitted: bool,
) -> tuple[dict[str, Moments], str]:
    """Return the input moments of the layers whose filters are centred, by fqn, and what was assumed for them.

    Args:
        bound: What is going to be done.
        model: The original.
        batches: Calibration data.
        example: Inputs of the model.
        fitted: Whether the sites are fitted to the data afterwards: a fit measures its own.
    """
    layers = [layer for layer, step in _centred(bound) if not (fitted and step.norm.takes is Takes.NORMALIZATION)]
    if not layers or any(p.is_meta for p in model.parameters()):
        return {}, ""
    if batches is not None:
        return input_moments(model, layers, batches, shaped=False), ""
    inputs = example if example is not None else make_up_inputs(model)
    moments: dict[str, Moments] = {}
    for noise in () if inputs is None else _noises(inputs):
        try:
            moments = input_moments(model, layers, [noise], shaped=True)
            break
        except Exception:  # a model may take no other batch size than the example's
            continue
    if len(moments) < len(layers):
        return moments, Text(
            "no data was given and no inputs could be made up that reach every layer: give "
            f"{argument('example_inputs')} or, better, {argument('calibration')}; elsewhere the filters' means were "
            "removed evenly, which loses most of the model"
        )
    return moments, Text(
        "no data was given: the filters' means were removed by the moments of noise that has, at each BatchNorm, the "
        "recorded mean and variance; a few hundred unlabelled samples "
        f"({argument('calibration')}) keep more of the model"
    )


def _scales(
    model: nn.Module,
    gains: Mapping[str, Tensor],
    channels: Channels,
    batches: Sequence[Batch] | None,
    inputs: Inputs,
) -> Tensor | None:
    if batches is not None:
        return choose_scales(model, gains, channels, _first_samples(batches), shaped=False)
    for noise in _noises(inputs):
        try:
            return choose_scales(model, gains, channels, [noise], shaped=True)
        except Exception:  # a model may take no other batch size than the example's
            continue
    return None


def _gains(bound: BoundPlan) -> Iterator[tuple[str, Tensor]]:
    """Yield the layers whose filters are centred, each with γ and σ of the norm behind it. ``(2, C)``"""
    for layer, step in _centred(bound):
        state = step.state
        if step.site.kind == NormKind.MODULE and state.var is not None:
            yield layer, torch.stack([state.gamma.double(), (state.var.double() + state.eps).sqrt()])


def _centred(bound: BoundPlan) -> Iterator[tuple[str, BoundStep]]:
    for step in bound.steps:
        if step.site.layer is not None and step.weight.centres:
            yield step.site.layer, step


def _first_samples(batches: Sequence[Batch]) -> Sequence[Batch]:
    """Return the first batches that hold as many samples as the choice of scales needs."""
    samples = 0
    for i, batch in enumerate(batches):
        samples += sample_count(batch)
        one = some_samples(batch, 1)
        values = sum(value.numel() for value in tensors_of(one))
        if samples >= (_LARGE_SAMPLES_TO_SCALE if values >= _LARGE else _SAMPLES_TO_SCALE):
            return batches[: i + 1]
    return batches


def _noises(inputs: Inputs) -> tuple[Inputs, ...]:
    """Return noise like ``inputs`` and, in case that the model takes no other number of samples, less of it."""
    return noise_like(inputs), noise_like(inputs, batch=2), inputs
