"""Signs and offsets without a fit: what noise, or data, tells of how the means of a group's channels vary together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap as ns
from normswap.graph import capture
from normswap.graph.dataflow import Dataflow
from normswap.initialization import absorb as absorption
from normswap.initialization.steadied import Steadied, steadied
from normswap.options import Options
from normswap.preparation import planned
from normswap.recipes import make_recipe
from normswap.runs.data import Data


def network(seed: int = 0) -> nn.Sequential:
    """Two expanding convolutions, whose BatchNorms have recorded what smooth images of many contrasts are there."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64)
    ).double()
    for norm in (model[1], model[4]):
        norm.momentum = None
        nn.init.normal_(norm.weight)
    model(images(256, 1))
    return model.eval()


def images(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 4, 4, generator=generator, dtype=torch.float64)
    x = nn.functional.interpolate(x, size=(16, 16), mode="bilinear")
    return x * torch.rand(count, 1, 1, 1, generator=generator, dtype=torch.float64) * 3 + 1


def error(model: nn.Module, **options: Any) -> float:
    x = images(64, 2)
    with torch.no_grad():
        moved = ns.swap_norms(model, "ln", init="absorb", example_inputs=x[:1], **options)(x) - model(x)
        return float(moved.norm() / model(x).norm())


def found(model: nn.Module, to: str = "ln", **options: Any) -> Mapping[str, Steadied]:
    data = Data.of(model, images(2, 3), None, None)
    bound = planned(Dataflow(capture(model, data.example)), make_recipe(to, options), Options(), data)
    return steadied(bound, model, None, data.example, 2.0)


def test_without_data_the_swap_is_closer_than_without_signs_and_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    steady = error(model)
    steadier = error(model, spread=8)
    on_data = error(model, calibration=images(64, 4))
    monkeypatch.setattr(absorption, "steadied", lambda *_: {})
    plain = error(model)
    assert steady < 0.6 * plain
    assert steadier < 0.5 * steady
    assert on_data < 0.6 * plain


def test_offsets_have_the_length_that_is_asked_for_and_sum_to_zero() -> None:
    model = network()
    for groups in (1, 4):
        for name, (signs, offsets) in found(model, "gn", num_groups=groups).items():
            norm = model.get_submodule(name)
            ratio = norm.running_var / (norm.running_var + norm.eps)
            assert (signs.abs() == 1).all()
            each = offsets.view(groups, -1)
            assert each.sum(1).abs().max() < 1e-6 * each.abs().max()  # the noise is float32's, the sums are not
            expected = 4 * ratio.view(groups, -1).sum(1)
            torch.testing.assert_close(each.square().sum(1), expected, rtol=1e-4, atol=0)


def test_a_norm_that_leaves_nothing_free_gets_none() -> None:
    assert not found(network(), "bcn")
    assert not found(network(), "mobn")


def test_the_original_is_left_as_it_is_and_a_rerun_gives_the_same() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = found(model), found(model)
    assert all(torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_constant_channel_keeps_its_place() -> None:
    """A dead filter gives nothing that could vary: it counts for nothing in the group, and nothing is divided by 0."""
    model = network()
    with torch.no_grad():
        model[3].weight[:7] = 0
        model[4].running_var[:7] = 0
    converted = ns.swap_norms(model, "ln", example_inputs=images(2, 3))
    assert converted(images(8, 5)).isfinite().all()
