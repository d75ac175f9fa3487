"""Absorption where there is data: the expected statistics are the data's, beside what the BatchNorm has recorded."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from laws import distance
from torch import Tensor, nn

import normswap as ns
from normswap.errors import InitializationError
from normswap.initialization.absorb import absorb
from normswap.runs.watching import Statistics, measure_statistics

GROUPS, RECORDED = 2, 16


def network() -> nn.Sequential:
    """A BatchNorm behind a convolution and one behind a ReLU, which gets an affine in front."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1)
    )
    for norm in (model[1], model[3]):
        nn.init.normal_(norm.weight, 0, 2)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 3)
    return model.double().eval()


def other_domain(count: int = 24) -> Tensor:
    """Inputs that are not what the statistics were recorded on."""
    return 0.3 * torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1


def expected_statistics(
    norm: nn.BatchNorm2d, x: np.ndarray, sign: np.ndarray, offset: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of ``s t + o`` in each group, t = (x − μ)/σ of ``x`` and of 16 more that are as recorded."""
    mean, var = norm.running_mean.numpy(), norm.running_var.numpy()
    shape = (1, -1, 1, 1)
    t = (x - mean.reshape(shape)) / np.sqrt(var + norm.eps).reshape(shape)
    share = len(x) / (len(x) + RECORDED)
    level = share * t.mean((0, 2, 3))
    square = share * (t**2).mean((0, 2, 3)) + (1 - share) * var / (var + norm.eps)
    square += 2 * sign * offset * level + offset**2
    level, square = (v.reshape(GROUPS, -1).mean(1) for v in (sign * level + offset, square))
    return level, square - level**2


class At(nn.Module):
    """A group norm's own affine, at a mean and a variance of each group of what reaches it."""

    def __init__(self, norm: nn.GroupNorm, level: np.ndarray, variance: np.ndarray) -> None:
        super().__init__()
        each = norm.num_channels // norm.num_groups
        self.mean = torch.from_numpy(level.repeat(each)).view(-1, 1, 1)
        self.std = torch.from_numpy(np.sqrt(variance.repeat(each) + norm.eps)).view(-1, 1, 1)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.norm.weight.view(-1, 1, 1), self.norm.bias.view(-1, 1, 1)
        return (x - self.mean) / self.std * weight + bias


def inputs_of(model: nn.Sequential, x: Tensor, *norms: int) -> list[np.ndarray]:
    """What reaches the norms."""
    with torch.no_grad():
        return [model[:i](x).numpy() for i in norms]


def at_statistics(original: nn.Sequential, converted: nn.Module, found: list[np.ndarray]) -> nn.Module:
    """The converted network with each new norm at the statistics that the data and the BatchNorm's own let it expect.

    What reaches it is ``s t + o``: the sign s and the offset o are read off the layer, or the affine, in front.
    """
    replaced = copy.deepcopy(converted)
    for name, x in zip("13", found, strict=True):
        place, old = replaced.get_submodule(name), original.get_submodule(name)
        std = (old.running_var + old.eps).sqrt()
        if isinstance(place, nn.GroupNorm):
            parent, leaf, layer = replaced, name, replaced[int(name) - 1]
            factor = (layer.weight * original[int(name) - 1].weight).sum((1, 2, 3)).sign() / std
        else:
            parent, leaf = place, "norm"
            layer = next(part for part in place.children() if not isinstance(part, nn.GroupNorm))
            factor = layer.weight
        norm = parent.get_submodule(leaf)
        assert isinstance(norm, nn.GroupNorm)
        sign, offset = ((v.detach().numpy()) for v in (factor * std, factor * old.running_mean + layer.bias))
        parent.register_module(leaf, At(norm, *expected_statistics(old, x, sign, offset)))
    return replaced


@pytest.mark.parametrize("recipe", ["gn", "gn+aws"])
def test_at_the_statistics_of_the_data_the_converted_network_is_the_original(recipe: str) -> None:
    model, x = network(), other_domain()
    converted = ns.swap_norms(model, recipe, calibration=x, init="absorb", num_groups=GROUPS)
    found = inputs_of(model, x, 1, 3)
    other = torch.randn(5, 3, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        assert distance(at_statistics(model, converted, found)(other), model(other)) < 1e-12
        # negative controls: at the statistics of other data, and absorbed without any, it is another network
        assert distance(at_statistics(model, converted, [v + 0.1 for v in found])(other), model(other)) > 1e-3
        plain = ns.swap_norms(model, recipe, init="absorb", num_groups=GROUPS)
        assert distance(at_statistics(model, plain, found)(other), model(other)) > 1e-3


def test_data_of_another_domain_makes_the_swap_closer() -> None:
    model, x = network(), other_domain(48)
    with torch.no_grad():

        def error(**options: Tensor) -> float:
            moved = ns.swap_norms(model, "gn", init="absorb", num_groups=GROUPS, **options)(x[24:]) - model(x[24:])
            return float(moved.norm() / model(x[24:]).norm())

        assert error(calibration=x[:24]) < 0.5 * error()


@pytest.mark.parametrize(
    "data", [other_domain(1), torch.ones(200, 3, 8, 8, dtype=torch.float64)], ids=["one", "constant"]
)
def test_too_little_data_cannot_decide_alone(data: Tensor) -> None:
    """γ' is γ·sqrt(r + eps): at a group of nothing but one value it would be γ·sqrt(eps)."""
    model = network()
    plain = ns.swap_norms(model, "gn", init="absorb", num_groups=GROUPS, spread=0)
    found = ns.swap_norms(model, "gn", init="absorb", num_groups=GROUPS, spread=0, calibration=data)
    ratio = (found[1].weight / plain[1].weight).detach().abs()  # the signs are free
    assert (ratio > 0.2).all()
    assert found(other_domain()).isfinite().all()


def test_a_match_falls_back_on_what_absorbing_on_the_same_data_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "normswap.initialization.fitting.absorb",
        lambda step, layer, moments, data: seen.append(data) or absorb(step, layer, moments, data),
    )
    model, x = network(), other_domain(20)
    ns.swap_norms(model, "gn", calibration=list(x.split(7)), num_groups=GROUPS)
    fitted = [i for i in range(20) if i % 5 != 4]  # every fifth sample is held out
    for statistics, values in zip(seen, inputs_of(model, x[fitted], 1, 3), strict=True):
        # The match computes in float32.
        assert np.allclose(statistics.mean, values.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
        assert np.allclose(statistics.var, values.var((0, 2, 3)), rtol=1e-5)
        assert statistics.samples == len(fitted)


def test_statistics_add_up() -> None:
    x = 1e4 + torch.randn(9, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Statistics.of(x[:2]) + Statistics.of(x[2:3]) + Statistics.of(x[3:])
    values = x.numpy()
    assert np.allclose(found.mean, values.mean((0, 2)), rtol=1e-14)
    assert np.allclose(found.var, values.var((0, 2)), rtol=1e-9)  # not np's own 1e8·eps of a mean of squares
    assert (found.values, found.samples) == (45, 9)
    assert not np.allclose((Statistics.of(x[:2]) + Statistics.of(x[3:])).var, values.var((0, 2)), rtol=1e-3)


@pytest.mark.parametrize("recipe", ["gn", "gn+ws"])
def test_a_match_keeps_what_was_absorbed_where_the_original_overflows(recipe: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    nn.init.normal_(model[0].weight, 0, 1e30)
    x = 1e9 * torch.randn(20, 3, 5, 5)
    assert not model[0](x).isfinite().all()
    found = ns.convert(model, recipe, calibration=x)
    assert all(bool(p.isfinite().all()) for p in found.model.parameters())
    assert found.init.rows[0].notes == ("its values are not finite: not fitted",)


def test_values_that_are_not_finite_are_refused() -> None:
    model = network()
    model[2] = Exploding()
    with pytest.raises(InitializationError, match="the values that reach '3' are not finite"):
        measure_statistics(model, ["1", "3"], [(other_domain(),)])


class Exploding(nn.Module):
    """Gives what no norm can take."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x - x)
