"""The ridge regression of a layer's filters, against NumPy: moments, solutions and constraint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from normswap.initialization.regression import Covariances, SecondMoments, clamped, solve, surrogate_target

GROUPS, FAN_IN, OUT = 2, 5, 3


def samples(n: int, *, offset: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated patches ``(n, G, p)`` of deviation about 1 around ``offset``, and noisy targets ``(n, C)``."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(GROUPS, FAN_IN, FAN_IN)) / FAN_IN**0.5
    u = np.einsum("ngp,gpq->ngq", random.normal(size=(n, GROUPS, FAN_IN)), mixing)
    weight = random.normal(size=(GROUPS, OUT, FAN_IN))
    t = np.einsum("ngp,gop->ngo", u, weight) + 0.3 * random.normal(size=(n, GROUPS, OUT))
    return torch.from_numpy(u + offset), torch.from_numpy(t + 2 * offset).flatten(1)


def moments(u: Tensor, t: Tensor, *sizes: int) -> Covariances:
    """The moments, taken in chunks of ``sizes`` samples (default: all at once)."""
    found = SecondMoments()
    for one, other in zip(u.split(list(sizes) or len(u)), t.split(list(sizes) or len(t)), strict=True):
        found.add(one, other)
    return found.read()


def by_group(t: Tensor) -> np.ndarray:
    return t.numpy().reshape(len(t), GROUPS, -1)


def errors(u: Tensor, t: Tensor, weight: Tensor, bias: Tensor) -> np.ndarray:
    """``E (W u + b − t)²`` per channel, ``(G, C/G)``."""
    residual = np.einsum("ngp,gop->ngo", u.numpy(), weight.numpy()) + bias.numpy() - by_group(t)
    return (residual**2).mean(0)


def anchor(seed: int = 5) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(GROUPS, OUT, FAN_IN)))


# ------------------------------------------------------------------------------------------------------- moments


def assert_are_numpys(found: Covariances, u: Tensor, t: Tensor, atol: float) -> None:
    targets = by_group(t)
    for g in range(GROUPS):
        joint = np.cov(np.concatenate([u.numpy()[:, g], targets[:, g]], 1).T, bias=True)
        np.testing.assert_allclose(found.inputs[g], joint[:FAN_IN, :FAN_IN], atol=atol)
        np.testing.assert_allclose(found.cross[g], joint[FAN_IN:, :FAN_IN], atol=atol)
        np.testing.assert_allclose(found.targets[g], joint.diagonal()[FAN_IN:], atol=atol)
        np.testing.assert_allclose(found.input_mean[g], u.numpy()[:, g].mean(0), atol=atol)
        np.testing.assert_allclose(found.target_mean[g], targets[:, g].mean(0), atol=atol)


@pytest.mark.parametrize("sizes", [(), (1, 299), (100, 0, 200), (7,) * 42 + (6,)])
def test_moments_are_numpys_however_the_samples_are_cut(sizes: tuple[int, ...]) -> None:
    u, t = samples(300)
    found = moments(u, t, *sizes)
    assert found.count == 300
    assert_are_numpys(found, u, t, atol=1e-12)
    with pytest.raises(AssertionError):
        assert_are_numpys(moments(u[1:], t[1:]), u, t, atol=1e-12)  # one sample less is another covariance


def test_an_empty_first_chunk_says_nothing() -> None:
    u, t = samples(50)
    assert_are_numpys(moments(u, t, 0, 50), u, t, atol=1e-12)


def test_values_far_from_zero_lose_no_digits_in_float32() -> None:
    """Mean 1e4, deviation 1: raw second moments in float32, of 1e8 ± 10, would know nothing of the covariance."""
    u, t = (x.float() for x in samples(400, offset=1e4))
    # The inputs themselves are rounded to 1e-3 here; NumPy is given the rounded ones.
    assert_are_numpys(moments(u, t, 100, 300), u.double(), t.double(), atol=2e-3)
    raw = (u[:, 0].mT @ u[:, 0]).double() / 400 - torch.outer(u[:, 0].double().mean(0), u[:, 0].double().mean(0))
    assert float((raw - torch.cov(u[:, 0].double().T, correction=0)).abs().amax()) > 0.1


def test_reading_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no data"):
        SecondMoments().read()


# ------------------------------------------------------------------------------------------------------ solution


def numpys_ridge(
    u: Tensor, t: Tensor, anchor: Tensor, ridge: float, *, zero_sum: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise ``E‖W u + b − t‖² + λ d ‖W − W₀‖²``, under ``W 1 = 0`` where asked for, filter by filter.

    The KKT system of ``(W, b, ν)``: the objective's gradient, plus ν times the constraint's, is zero.
    """
    x, y = u.numpy(), by_group(t)
    n = len(x)
    weights, biases = np.zeros((GROUPS, OUT, FAN_IN)), np.zeros((GROUPS, OUT))
    for g in range(GROUPS):
        d = x[:, g].var(0).mean()
        penalty = ridge * (d if d > 0 else 1.0)
        design = np.concatenate([x[:, g], np.ones((n, 1))], 1)
        system = np.zeros((FAN_IN + 2, FAN_IN + 2))
        system[:-1, :-1] = design.T @ design / n
        system[:FAN_IN, :FAN_IN] += penalty * np.eye(FAN_IN)
        system[:FAN_IN, -1] = system[-1, :FAN_IN] = 1.0
        for o in range(OUT):
            right = np.append(design.T @ y[:, g, o] / n, 0.0)
            right[:FAN_IN] += penalty * anchor[g, o].numpy()
            size = FAN_IN + 2 if zero_sum else FAN_IN + 1
            found = np.linalg.solve(system[:size, :size], right[:size])
            weights[g, o], biases[g, o] = found[:FAN_IN], found[FAN_IN]
    return weights, biases


@pytest.mark.parametrize("zero_sum", [False, True])
@pytest.mark.parametrize("ridge", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("n", [200, 3])
def test_the_solution_is_that_of_the_normal_equations(n: int, ridge: float, zero_sum: bool) -> None:
    """Also with fewer samples than the fan-in of 5, where the ridge alone decides some directions."""
    u, t = samples(n, offset=3.0)
    found = solve(moments(u, t), anchor(), ridge, zero_sum=zero_sum)
    weight, bias = numpys_ridge(u, t, anchor(), ridge, zero_sum=zero_sum)
    assert found.ridge == ridge
    np.testing.assert_allclose(found.weight, weight, atol=1e-8)
    np.testing.assert_allclose(found.bias, bias, atol=1e-7)
    sums = float(found.weight.sum(-1).abs().amax())
    assert sums < 1e-12 if zero_sum else sums > 1e-2
    other, _ = numpys_ridge(u, t, anchor(6), ridge, zero_sum=zero_sum)
    assert np.abs(found.weight.numpy() - other).max() > 1e-6, "the anchor is part of the equation"


def test_removing_the_filters_means_evenly_costs_more_than_the_constrained_minimum() -> None:
    u, t = samples(200)
    data = moments(u, t)
    free = solve(data, anchor(), 1e-6)
    evenly = free.weight - free.weight.mean(-1, keepdim=True)
    bias = data.target_mean - (evenly @ data.input_mean[..., None])[..., 0]
    constrained = solve(data, anchor(), 1e-6, zero_sum=True)
    least, plainly = errors(u, t, constrained.weight, constrained.bias), errors(u, t, evenly, bias)
    assert (least < 0.99 * plainly).any()
    assert (least <= plainly + 1e-9).all()
    assert (errors(u, t, free.weight, free.bias) <= least + 1e-9).all()


def test_a_heavy_ridge_keeps_the_anchor_and_still_sets_the_bias() -> None:
    u, t = samples(100, offset=2.0)
    data = moments(u, t)
    found = solve(data, anchor(), 1e9)
    assert torch.allclose(found.weight, anchor(), atol=1e-6)
    residual = by_group(t) - np.einsum("ngp,gop->ngo", u.numpy(), anchor().numpy())
    np.testing.assert_allclose(found.bias, residual.mean(0), atol=1e-5)


# ---------------------------------------------------------------------------------------------------- degenerate


@pytest.mark.parametrize("zero_sum", [False, True])
@pytest.mark.parametrize("what", ["constant", "duplicates", "one dead input", "one sample"])
def test_a_singular_covariance_gives_a_finite_solution_that_predicts_no_worse_than_the_mean(
    what: str, zero_sum: bool
) -> None:
    u, t = samples(100)
    if what == "constant":
        u = torch.full_like(u, 7.0)
    elif what == "duplicates":
        u = u[:, :, :1].expand(-1, -1, FAN_IN).contiguous()
    elif what == "one dead input":
        u[:, :, 2] = 0
    else:
        u, t = u[:1], t[:1]
    data = moments(u, t)
    found = solve(data, torch.zeros_like(anchor()), 0.0, zero_sum=zero_sum)
    assert bool(found.weight.isfinite().all())
    assert bool(found.bias.isfinite().all())
    assert found.ridge < 1e-3
    error = errors(u, t, found.weight, found.bias)
    assert (error <= data.targets.numpy() + 1e-9).all()
    if what == "one dead input" and not zero_sum:
        assert torch.equal(found.weight[..., 2], torch.zeros(GROUPS, OUT)), "nothing moves it from the anchor"
        assert (error < 0.9 * data.targets.numpy()).any(), "the others are fitted"


def test_without_a_ridge_a_singular_covariance_is_no_failure_and_a_regular_one_is_left_alone() -> None:
    u, t = samples(100)
    assert solve(moments(u, t), anchor(), 0.0).ridge == 0.0
    assert solve(moments(torch.zeros_like(u), t), anchor(), 0.0).ridge > 0.0


# ------------------------------------------------------------------------------------ regression through a ReLU


def test_retargeted_moments_are_those_of_the_new_targets() -> None:
    u, t = samples(300, offset=50.0)
    other = t.square() + u.flatten(1)[:, : t.shape[1]]
    data = moments(u, t)
    expected, found = moments(u, other), data.retargeted(u - data.input_mean, other)
    for a, b in ((expected.cross, found.cross), (expected.targets, found.targets), (expected.inputs, found.inputs)):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))
    assert torch.allclose(expected.target_mean, found.target_mean)


def test_a_solution_applies_as_it_says_and_its_factor_may_be_used_again() -> None:
    u, t = samples(200, offset=3.0)
    data = moments(u, t)
    found = solve(data, anchor(), 1e-2, zero_sum=True)
    by_hand = np.einsum("ngp,gop->ngo", u.double(), found.weight) + found.bias.numpy()
    np.testing.assert_allclose(found.apply(u - data.input_mean), by_hand.reshape(len(u), -1), atol=1e-9)
    assert np.abs(found.apply(u).numpy() - by_hand.reshape(len(u), -1)).max() > 0.1, "the patches lack their mean"
    again = solve(moments(u, t), anchor(), 1e-2, zero_sum=True, like=found)
    assert torch.equal(found.weight, again.weight)
    other = solve(moments(u, t), anchor(), 1.0, zero_sum=True, like=found)  # its factor is of no use here
    assert torch.equal(other.weight, solve(moments(u, t), anchor(), 1.0, zero_sum=True).weight)
    assert not torch.allclose(other.weight, found.weight, rtol=1e-3)


def test_rounds_of_regression_lessen_the_error_behind_a_relu() -> None:
    """Targets with a tail far below zero: no linear map predicts it, plain regression tries, and a ReLU drops it."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(4000, 1, 6, generator=generator, dtype=torch.float64)
    plain = u[:, 0] @ torch.randn(6, 3, generator=generator, dtype=torch.float64)
    y = torch.where(plain > 0, plain, -3 * plain.square() * (1 + u[:, 0, :1].abs()))
    threshold = torch.zeros_like(y)
    data = moments(u, y)
    solution = solve(data, torch.zeros(1, 3, 6, dtype=torch.float64), 1e-4)
    centred = u - data.input_mean
    found = []
    for _ in range(8):
        predicted = solution.apply(centred)
        found.append(float((clamped(predicted, threshold) - clamped(y, threshold)).square().mean()))
        again = data.retargeted(centred, surrogate_target(predicted, y, threshold))
        solution = solve(again, torch.zeros(1, 3, 6, dtype=torch.float64), 1e-4, like=solution)
    assert found[-1] < 0.3 * found[0]
    assert found == sorted(found, reverse=True)


def test_without_a_threshold_all_of_a_value_counts() -> None:
    y, predicted = torch.randn(5, 3), torch.randn(5, 3)
    assert surrogate_target(predicted, y, None) is y
    assert clamped(y, None) is y
    threshold = torch.full_like(y, -10.0)
    assert torch.equal(surrogate_target(predicted, y, threshold), y), "nor where the threshold is far below"
