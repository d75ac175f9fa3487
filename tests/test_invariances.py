"""What a normalized layer's output does not change under: table 1 of Ba et al. 2016, in both directions.

|             | weight matrix | weight matrix | weight vector | dataset    | dataset     | single case |
|             | re-scaling    | re-centring   | re-scaling    | re-scaling | re-centring | re-scaling  |
|-------------|---------------|---------------|---------------|------------|-------------|-------------|
| batch norm  | invariant     | no            | invariant     | invariant  | invariant   | no          |
| weight norm | invariant     | no            | invariant     | no         | no          | no          |
| layer norm  | invariant     | invariant     | no            | invariant  | no          | invariant   |

The layer in front of a norm has no bias, as in the paper, where the bias is added behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normswap
from normswap.nn import (
    ChannelLayerNorm,
    EstimatedStatistics,
    FilterLayout,
    WeightStandardization,
    parametrize_weight_norm,
)

EPS = 1e-12  # of the norms: the invariances hold for eps = 0, and eps = 1e-5 would break them by 1e-5
INVARIANT = 1e-9  # of the output's size; float64 and EPS leave about 1e-11
CHANGED = 0.1  # of the output's size; the least of the changes here is 0.2


@dataclass(frozen=True)
class Subject:
    """A normalized layer with an input of it.

    Args:
        model: Maps ``x`` to the normalized output.
        weight: The weight that the paper transforms: W, or v where the layer has a weight normalization.
        x: A minibatch, ``(N, C)`` or ``(N, C, *space)``.
        transposed: Whether the units lie along the weight's axis 1.
    """

    model: nn.Module
    weight: Tensor
    x: Tensor
    transposed: bool = False

    def output(self) -> Tensor:
        with torch.no_grad():
            return self.model(self.x)

    @property
    def units(self) -> Tensor:
        """The incoming weights of each unit, ``(units, ...)``: a view that may be written to."""
        return self.weight.detach().transpose(0, 1) if self.transposed else self.weight.detach()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# The transformations, in the table's order


def weight_matrix_rescaling(subject: Subject) -> Subject:
    """``W' = δW``, δ > 0."""
    subject.units.mul_(2.7)
    return subject


def weight_matrix_recentring(subject: Subject) -> Subject:
    """``W' = W + 1γᵀ``: the same vector γ is added to the incoming weights of all units."""
    subject.units.add_(random(*subject.units.shape[1:]))
    return subject


def weight_vector_rescaling(subject: Subject) -> Subject:
    """``w_1' = δw_1``: the incoming weights of one unit."""
    subject.units[1].mul_(2.7)
    return subject


def dataset_rescaling(subject: Subject) -> Subject:
    """``x' = δx`` for all cases."""
    return replace(subject, x=2.7 * subject.x)


def dataset_recentring(subject: Subject) -> Subject:
    """``x' = x + γ``, the same γ for all cases: one value per input unit, at all positions of a channel."""
    shift = 1 + random(1, subject.x.shape[1], *(1,) * (subject.x.ndim - 2)).abs()
    return replace(subject, x=subject.x + shift)


def single_case_rescaling(subject: Subject) -> Subject:
    """``x_1' = δx_1`` for one case of the minibatch."""
    x = subject.x.clone()
    x[1] *= 2.7
    return replace(subject, x=x)


TRANSFORMATIONS = {
    "weight matrix re-scaling": weight_matrix_rescaling,
    "weight matrix re-centring": weight_matrix_recentring,
    "weight vector re-scaling": weight_vector_rescaling,
    "dataset re-scaling": dataset_rescaling,
    "dataset re-centring": dataset_recentring,
    "single case re-scaling": single_case_rescaling,
}


def change(subject: Subject, transformation: Callable[[Subject], Subject]) -> float:
    """Return how far the output moves under a transformation, in units of its largest value."""
    before = subject.output()
    after = transformation(subject).output()
    return float((after - before).abs().max() / before.abs().max())


def assert_invariance(subject: Subject, transformation: str, invariant: bool) -> None:
    moved = change(subject, TRANSFORMATIONS[transformation])
    assert np.isfinite(moved)
    if invariant:
        assert moved < INVARIANT, f"{transformation} moved the output by {moved:.1e} of its size"
    else:
        assert moved > CHANGED, f"{transformation} moved the output by no more than {moved:.1e} of its size"


# The layers


def linear() -> tuple[nn.Module, Tensor]:
    return nn.Linear(6, 8, bias=False).double(), random(5, 6) + 0.5


def convolution() -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(3, 8, 3, bias=False).double(), random(4, 3, 6, 7) + 0.5


def transposed_convolution() -> tuple[nn.Module, Tensor]:
    # The padding cuts the border off: every position left sees a whole kernel of inputs, as in `convolution`.
    return nn.ConvTranspose2d(3, 8, 2, padding=1, bias=False).double(), random(4, 3, 4, 5) + 0.5


LAYERS = {"linear": linear, "convolution": convolution, "transposed convolution": transposed_convolution}


def subject(kind: str, norm: Callable[[nn.Module, Tensor], nn.Module]) -> Subject:
    """Return the layer ``kind`` inside what ``norm`` makes of it."""
    layer, x = LAYERS[kind]()
    model = norm(layer, x)
    layer = model[0] if isinstance(model, nn.Sequential) else model
    assert layer.bias is None or not layer.bias.any()
    normalized = parametrize.is_parametrized(layer)
    weight = layer.parametrizations["weight"].original1 if normalized else layer.weight
    return Subject(model, weight, x, isinstance(layer, nn.ConvTranspose2d))


def batch_normed(layer: Any, x: Tensor) -> nn.Module:
    norm = nn.BatchNorm1d if x.ndim == 2 else nn.BatchNorm2d
    return nn.Sequential(layer, norm(8, eps=EPS).double()).train()


def weight_normed(layer: Any, x: Tensor) -> nn.Module:
    parametrize_weight_norm(layer)
    return layer


def swapped_to_weight_norm(layer: Any, x: Tensor) -> nn.Module:
    return normswap.swap_norms(batch_normed(layer, x).eval(), to="wn", example_inputs=x)


def log_weight_normed(layer: Any, x: Tensor) -> nn.Module:
    parametrize_weight_norm(layer, log_gain=True)
    return layer


def batch_channel_normed(layer: Any, x: Tensor) -> nn.Module:
    """In training and at the update rate 1: the estimates are the batch's own statistics."""
    estimates = EstimatedStatistics(8, eps=EPS, momentum=1.0, dtype=torch.float64)
    return nn.Sequential(layer, estimates, nn.GroupNorm(2, 8, eps=EPS).double())


def layer_normed(layer: Any, x: Tensor) -> nn.Module:
    return nn.Sequential(layer, nn.GroupNorm(1, 8, eps=EPS).double())


def channel_layer_normed(layer: Any, x: Tensor) -> nn.Module:
    return nn.Sequential(layer, ChannelLayerNorm(8, eps=EPS).double())


def swapped_to_layer_norm(layer: Any, x: Tensor) -> nn.Module:
    """Without offsets, which are a part of the bias, and so no part of what is rescaled."""
    return normswap.swap_norms(batch_normed(layer, x), to="ln", example_inputs=x, eps=EPS, spread=0)


def swapped_to_channel_layer_norm(layer: Any, x: Tensor) -> nn.Module:
    return normswap.swap_norms(batch_normed(layer, x), to="ln", example_inputs=x, axes="channel", eps=EPS, spread=0)


BATCH_NORM = (True, False, True, True, True, False)
WEIGHT_NORM = (True, False, True, False, False, False)
LAYER_NORM = (True, True, False, True, False, True)
# Statistics over all positions: the vector added to all filters shifts each position by another value.
LAYER_NORM_OVER_SPACE = (True, False, False, True, False, True)

ROWS: dict[str, tuple[Callable[[Any, Tensor], nn.Module], dict[str, tuple[bool, ...]]]] = {
    "batch norm": (batch_normed, dict.fromkeys(LAYERS, BATCH_NORM)),
    "weight norm": (weight_normed, dict.fromkeys(LAYERS, WEIGHT_NORM)),
    "weight norm, swapped": (swapped_to_weight_norm, dict.fromkeys(LAYERS, WEIGHT_NORM)),
    "weight norm, log gain": (log_weight_normed, dict.fromkeys(LAYERS, WEIGHT_NORM)),
    "batch-channel norm": (batch_channel_normed, dict.fromkeys(LAYERS, BATCH_NORM)),
    "layer norm": (layer_normed, dict.fromkeys(LAYERS, LAYER_NORM_OVER_SPACE) | {"linear": LAYER_NORM}),
    "layer norm, swapped": (
        swapped_to_layer_norm,
        dict.fromkeys(LAYERS, LAYER_NORM_OVER_SPACE) | {"linear": LAYER_NORM},
    ),
    "layer norm over channels": (channel_layer_normed, dict.fromkeys(LAYERS, LAYER_NORM)),
    "layer norm over channels, swapped": (swapped_to_channel_layer_norm, dict.fromkeys(LAYERS, LAYER_NORM)),
}


@pytest.mark.parametrize("column", range(6), ids=list(TRANSFORMATIONS))
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("row", ROWS)
def test_the_output_changes_where_table_1_says_so_and_nowhere_else(row: str, kind: str, column: int) -> None:
    norm, expected = ROWS[row]
    assert_invariance(subject(kind, norm), list(TRANSFORMATIONS)[column], expected[kind][column])


@pytest.mark.parametrize("column", range(6), ids=list(TRANSFORMATIONS))
def test_a_plain_layer_has_no_invariance_at_all(column: int) -> None:
    plain = subject("convolution", lambda layer, x: nn.Sequential(layer))
    assert_invariance(plain, list(TRANSFORMATIONS)[column], invariant=False)


@pytest.mark.parametrize("column", range(6), ids=list(TRANSFORMATIONS))
def test_in_eval_mode_batch_norm_has_no_invariance_at_all(column: int) -> None:
    def frozen(layer: Any, x: Tensor) -> nn.Module:
        return batch_normed(layer, x).eval()

    assert_invariance(subject("convolution", frozen), list(TRANSFORMATIONS)[column], invariant=False)


def test_group_norm_with_one_group_behind_a_convolution_is_not_invariant_to_recentring_its_weight() -> None:
    """Where "layer norm" means all channels and positions, one entry of the table is another."""
    assert change(subject("convolution", layer_normed), weight_matrix_recentring) > CHANGED
    assert change(subject("convolution", channel_layer_normed), weight_matrix_recentring) < INVARIANT
    assert change(subject("linear", layer_normed), weight_matrix_recentring) < INVARIANT


@pytest.mark.parametrize("column", range(6), ids=list(TRANSFORMATIONS))
def test_estimates_that_lag_behind_have_no_invariance_at_all(column: int) -> None:
    def lagging(layer: Any, x: Tensor) -> nn.Module:
        model: Any = batch_channel_normed(layer, x)
        with torch.no_grad():
            model(x)
        return model.eval()

    # The group norm behind takes most of a change of scale away again, so that less than CHANGED is left.
    assert change(subject("convolution", lagging), list(TRANSFORMATIONS.values())[column]) > 1e-2


# The checks themselves


@pytest.mark.parametrize("row", ROWS)
def test_the_opposite_of_each_entry_is_refused(row: str) -> None:
    norm, expected = ROWS[row]
    for transformation, invariant in zip(TRANSFORMATIONS, expected["convolution"], strict=True):
        with pytest.raises(AssertionError, match="moved the output by"):
            assert_invariance(subject("convolution", norm), transformation, not invariant)


def test_an_invariance_broken_by_eps_is_found() -> None:
    def with_large_eps(layer: Any, x: Tensor) -> nn.Module:
        return nn.Sequential(layer, nn.GroupNorm(1, 8, eps=1e-5).double())

    moved = change(subject("linear", with_large_eps), dataset_rescaling)
    assert INVARIANT < moved < 1e-3


# Weight standardization, which the table does not have


def standardized(layer: Any, **options: Any) -> nn.Module:
    ws = WeightStandardization(FilterLayout.of(layer), eps=EPS, **options)
    parametrize.register_parametrization(layer, "weight", ws)
    return layer


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("options", [{"gain": False}, {}, {"offset": True}], ids=["published", "gain", "offset"])
def test_a_standardized_filter_may_be_scaled_and_shifted(kind: str, options: dict[str, bool]) -> None:
    layer, x = LAYERS[kind]()
    model = standardized(layer, **options)
    found = model.parametrizations["weight"]
    v = found.original if options == {"gain": False} else found.original0
    standard = Subject(model, v, x, isinstance(layer, nn.ConvTranspose2d))

    def scale_and_shift(s: Subject) -> Subject:
        s.units[1].mul_(2.7).add_(0.3)
        return s

    def shift_one_value(s: Subject) -> Subject:
        s.units[(1, *(0,) * (s.units.ndim - 1))].add_(1.0)
        return s

    assert change(standard, scale_and_shift) < INVARIANT
    assert change(standard, shift_one_value) > CHANGED


@pytest.mark.parametrize("kind", LAYERS)
def test_a_weight_normalized_filter_may_be_scaled_and_not_shifted(kind: str) -> None:
    def shift(s: Subject) -> Subject:
        s.units[1].add_(0.3)
        return s

    assert change(subject(kind, weight_normed), weight_vector_rescaling) < INVARIANT
    assert change(subject(kind, weight_normed), shift) > CHANGED
