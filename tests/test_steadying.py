"""Signs and offsets that keep a group's statistics steady: what they promise, and that a GroupNorm gains by it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normswap.initialization.steadying import steady


def channel_means(channels: int, *, common: float = 1.0, samples: int = 400) -> Tensor:
    """Means of channels that share a part ``common`` as strong as their own, with random signs."""
    random = np.random.default_rng(channels)
    shared = random.normal(size=(samples, 1)) * random.choice([-1.0, 1.0], size=channels) * common
    return torch.from_numpy(shared + random.normal(size=(samples, channels)) * random.uniform(0.2, 1, channels)).float()


def squares_of(means: Tensor) -> Tensor:
    """Mean squares of channels that vary within a sample, too: in the stronger samples more, as contrast does."""
    random = np.random.default_rng(len(means))
    strength = torch.from_numpy(random.uniform(0.5, 2, size=(len(means), 1))).float()
    return means.square() + strength * (1 + means[:, :1].abs())


def group_covariances(means: Tensor, groups: int) -> list[np.ndarray]:
    return [np.cov(part.double().numpy().T, bias=True) for part in means.chunk(groups, 1)]


@pytest.mark.parametrize(("channels", "groups"), [(8, 1), (8, 2), (12, 3), (2, 1), (6, 3)])
def test_signs_steady_the_groups_means(channels: int, groups: int) -> None:
    means = channel_means(channels)
    signs, _ = steady(means, squares_of(means), groups)
    assert set(signs.tolist()) <= {-1.0, 1.0}
    for covariance, s in zip(group_covariances(means, groups), signs.double().numpy().reshape(groups, -1), strict=True):
        ones = np.ones_like(s)
        value = s @ covariance @ s
        assert value <= ones @ covariance @ ones + 1e-9
        for c in range(len(s)):  # no single flip makes it less
            flipped = s.copy()
            flipped[c] *= -1
            assert flipped @ covariance @ flipped >= value - 1e-5


def test_signs_undo_a_common_part() -> None:
    """Eight channels that are one another's copies: half of them are turned round."""
    means = torch.randn(100, 1).expand(-1, 8).contiguous()
    signs, _ = steady(means, squares_of(means), 1)
    assert float(signs.sum()) == 0
    alone = torch.randn(100, 1) * torch.eye(8)[0]
    assert torch.equal(steady(alone, squares_of(alone), 1)[0], torch.ones(8)), "where it brings nothing: no"


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(("channels", "groups"), [(8, 1), (8, 2), (2, 1)])
def test_offsets_cancel_in_a_group_and_are_as_far_apart_as_asked_for(channels: int, groups: int, spread: float) -> None:
    means = channel_means(channels)
    squares = squares_of(means)
    _, offsets = steady(means, squares, groups, spread)
    by_group = offsets.view(groups, -1)
    deviation = (squares.mean(0) - means.mean(0).square()).view(groups, -1).mean(1).sqrt()
    assert torch.allclose(by_group.sum(1), torch.zeros(groups), atol=1e-5)
    assert torch.allclose(by_group.square().mean(1).sqrt(), spread * deviation, rtol=1e-5)


@pytest.mark.parametrize("spread", [0.3, 2.0, 20.0])
@pytest.mark.parametrize(("channels", "groups"), [(8, 1), (8, 2), (2, 1), (5, 1)])
def test_offsets_make_the_groups_variance_vary_least(channels: int, groups: int, spread: float) -> None:
    """The minimum of ``oᵀΣo + oᵀc`` on a sphere, by the conditions that are known to be sufficient for it."""
    means = channel_means(channels)
    squares = squares_of(means)
    signs, offsets = (v.double().numpy().reshape(groups, -1) for v in steady(means, squares, groups, spread))
    m, energy = (v.double().numpy().reshape(len(means), groups, -1) for v in (means, squares))
    for g in range(groups):
        z = m[:, g] * signs[g]
        n = z.shape[1]
        q = energy[:, g].sum(1) - n * z.mean(1) ** 2
        basis = np.linalg.svd(np.eye(n) - 1 / n)[0][:, : n - 1]
        covariance = np.atleast_2d(np.cov(z @ basis, rowvar=False, bias=True))
        linear = (z @ basis - (z @ basis).mean(0)).T @ (q - q.mean()) / len(z) / 2
        v = basis.T @ offsets[g]
        gradient = covariance @ v + linear
        multiplier = -(gradient @ v) / (v @ v)
        scale = np.abs(covariance).max() * np.linalg.norm(v) + np.linalg.norm(linear)
        np.testing.assert_allclose(gradient, -multiplier * v, atol=1e-5 * scale)
        assert multiplier >= -np.linalg.eigvalsh(covariance)[0] - 1e-6 * scale
        # What it is for: the group's variance, taken from samples of real values, varies by just this.
        turned = [(q + 2 * z @ o).var() for o in (offsets[g], -offsets[g], np.roll(offsets[g], 1))]
        assert turned[0] <= min(turned) + 1e-9


def test_without_anything_to_cancel_offsets_lie_where_the_channels_vary_least() -> None:
    means = channel_means(8)
    signs, _ = steady(means, torch.ones_like(means), 1)
    even = 1 + (means * signs).mean(1, keepdim=True).square().expand_as(means)  # q is the same in each sample
    signs, offsets = steady(means, even, 1)
    centring = np.eye(8) - 1 / 8
    signed = group_covariances(means * signs, 1)[0]
    _, vectors = np.linalg.eigh(centring @ signed @ centring + 1e3 / 8)  # 1 has the largest eigenvalue
    assert abs(vectors[:, 0] @ offsets.numpy() / np.linalg.norm(offsets)) > 1 - 1e-5


def test_a_group_of_one_channel_is_left_alone() -> None:
    signs, offsets = steady(channel_means(6), squares_of(channel_means(6)), 6)
    assert torch.equal(signs, torch.ones(6))
    assert torch.equal(offsets, torch.zeros(6))


@pytest.mark.parametrize("means", [torch.ones(1, 4), torch.zeros(10, 4), torch.randn(3, 16)])
def test_few_or_constant_samples_give_finite_values(means: Tensor) -> None:
    signs, offsets = steady(means, means.square(), 2)
    assert bool(signs.abs().eq(1).all())
    assert bool(offsets.isfinite().all())


def test_a_rerun_gives_the_same() -> None:
    means = channel_means(16)
    first, second = (steady(means.clone(), squares_of(means), 2) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def distance_to_affine(z: Tensor, groups: int) -> float:
    """How far a GroupNorm, with its best affine per channel, is from what enters it: ``E‖a h + b − z‖²/Var z``."""
    h = F.group_norm(z, groups).transpose(0, 1).flatten(1).double()
    z = z.transpose(0, 1).flatten(1).double()
    h, z = h - h.mean(1, keepdim=True), z - z.mean(1, keepdim=True)
    unexplained = z.square().mean(1) - (h * z).mean(1).square() / h.square().mean(1)
    return float(unexplained.mean() / z.square().mean())


@pytest.mark.parametrize("groups", [1, 2])
def test_a_group_norm_of_steady_channels_is_nearer_to_an_affine(groups: int) -> None:
    """Channels whose means and strengths vary from sample to sample; unit variance over all of them."""
    generator = torch.Generator().manual_seed(0)
    strength = 0.5 + torch.rand(500, 1, 1, 1, generator=generator)
    z = torch.randn(500, 1, 1, 1, generator=generator) + channel_means(8, samples=500)[:, :, None, None]
    z = z + strength * torch.randn(500, 8, 4, 4, generator=generator)
    z = (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True)
    distances = {"plain": distance_to_affine(z, groups)}
    for spread in (0.0, 1.0, 3.0):
        signs, offsets = steady(z.mean((2, 3)), z.square().mean((2, 3)), groups, spread)
        moved = z * signs[:, None, None] + offsets[:, None, None]
        distances[str(spread)] = distance_to_affine(moved, groups)
    signs, offsets = steady(z.mean((2, 3)), z.square().mean((2, 3)), groups, 1.0)
    uneven = z * signs[:, None, None] + offsets.abs()[:, None, None]  # not orthogonal to 1
    assert distances["0.0"] < distances["plain"]
    assert distances["1.0"] < 0.9 * distances["0.0"]
    assert distances["3.0"] < distances["1.0"]
    assert distance_to_affine(uneven, groups) > distances["1.0"]
