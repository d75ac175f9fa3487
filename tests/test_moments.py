"""Input moments: patches are what the filters see, and centring costs what it must and no more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import FrozenBatchNorm2d

import normswap as ns
from normswap.initialization.moments import Moments, centre, input_moments, moments_of
from normswap.initialization.noise import noise_like, shaped_by_statistics
from normswap.initialization.patches import patches, patches_at, random_patches
from normswap.initialization.symmetric import gram, ridged_factor
from normswap.nn import FilterLayout
from normswap.runs.watching import measure_statistics

LAYERS = {
    "plain": (nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), dilation=(1, 2)), (2, 4, 9, 9)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 7)),
    "reflecting": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
    "same": (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 7, 7)),
    "channels last": (nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (2, 4, 7, 7)),
    "one axis": (nn.Conv1d(4, 6, 5, stride=2), (2, 4, 11)),
    "three axes": (nn.Conv3d(2, 6, 2), (2, 2, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 5)),
    "transposed, grouped": (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (2, 4, 5)),
    "linear": (nn.Linear(5, 3), (2, 7, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_patches_times_filters_are_the_layers_output(name: str) -> None:
    layer, shape = LAYERS[name]
    layer, x = layer.double(), torch.randn(*shape, dtype=torch.float64)
    layout = FilterLayout.of(layer)
    with torch.no_grad():
        samples = patches(layer, x)  # (samples, groups, fan_in)
        filters = layout.flatten(layout.weight(layer)).unflatten(0, (layout.groups, -1))
        found = torch.einsum("ngf,gof->ngo", samples, filters).flatten(1) + layer.bias
        out = layer(x)
        expected = (out if isinstance(layer, nn.Linear) else out.movedim(1, -1)).reshape(found.shape)
    assert torch.allclose(found, expected, atol=1e-12)
    assert not torch.allclose(found, -expected, atol=1e-3)


@pytest.mark.parametrize("name", LAYERS)
def test_the_patches_at_some_positions_are_those_of_all(name: str) -> None:
    layer, shape = LAYERS[name]
    layer, x = layer.double(), torch.randn(*shape, dtype=torch.float64)
    with torch.no_grad():
        every = patches(layer, x)
        index = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[: len(every) // 2]
        assert torch.equal(patches_at(layer, x, index), every[index])
        assert not torch.equal(patches_at(layer, x, index), every[index.flip(0)])


def filters_and_samples(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, 12, generator=generator, dtype=torch.float64).relu() @ mixing + 1
    return torch.randn(5, 12, generator=generator, dtype=torch.float64), x


def test_centring_is_the_cheapest_projection_to_zero_mean() -> None:
    weight, x = filters_and_samples(500)
    centred, shift = centre(FilterLayout(), weight, moments_of(x[:, None]))
    assert centred.mean(1).abs().max() < 1e-12
    assert torch.allclose(shift, ((weight - centred) @ x.T).mean(1))

    def cost(w: Tensor) -> Tensor:
        return ((w - weight) @ x.T).var(dim=1)

    best = cost(centred)
    assert (best < 0.5 * cost(weight - weight.mean(1, keepdim=True))).all()  # the naive projection
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):  # any other step within zero mean costs more, up to what the ridge of 1e-3 gives away
        step = torch.randn(5, 12, generator=generator, dtype=torch.float64)
        assert (cost(centred + 0.1 * (step - step.mean(1, keepdim=True))) > 0.999 * best).all()


def test_few_samples_give_the_same_solution_by_the_smaller_matrix() -> None:
    """Woodbury's identity against the covariance itself, with the same ridge."""
    _, x = filters_and_samples(8)
    found = moments_of(x[:, None])
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    ridge = covariance.diagonal().mean() * max(1e-3, 0.1 * 12 / 8)
    solved = torch.linalg.solve(covariance + ridge * torch.eye(12, dtype=x.dtype), torch.ones(12, dtype=x.dtype))
    assert torch.allclose(found.direction[0], solved / solved.sum(), atol=1e-12)


def test_the_mean_is_corrected_by_what_the_output_had() -> None:
    weight, x = filters_and_samples(500)
    even, square = torch.full((1, 12), 1 / 12, dtype=x.dtype), torch.ones(1, dtype=x.dtype)
    wrong = Moments(torch.zeros(1, 12, dtype=x.dtype), even, square, assumed=True)
    right = wrong.corrected(FilterLayout(), weight, (weight @ x.T).mean(1))
    residual = weight @ (x.mean(0) - right.mean[0])
    assert residual.norm() < 0.1 * (weight @ x.mean(0)).norm()


@pytest.mark.parametrize("filters", [3, 40])
def test_the_correction_is_the_least_change_of_the_mean_whichever_matrix_is_smaller(filters: int) -> None:
    """``min ‖W(m + d) − output‖² + λ‖d‖²`` by NumPy's least squares, with fewer filters than values and with more."""
    rng = np.random.default_rng(0)
    weight, mean, output = rng.normal(size=(filters, 12)), rng.normal(size=12), rng.normal(size=filters)
    ridge = 1e-2 * (weight**2).sum(1).mean()
    rows = np.vstack([weight, np.sqrt(ridge) * np.eye(12)])
    change = np.linalg.lstsq(rows, np.r_[output - weight @ mean, np.zeros(12)], rcond=None)[0]
    direction = torch.full((1, 12), 1 / 12, dtype=torch.float64)
    known = Moments(torch.from_numpy(mean)[None], direction, direction.new_ones(1), assumed=True)
    found = known.corrected(FilterLayout(), torch.from_numpy(weight), torch.from_numpy(output)).mean[0].numpy()
    assert np.allclose(found, mean + change, rtol=0, atol=1e-10)
    assert not np.allclose(found, mean, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_product_with_its_own_transpose_is_the_whole_product(dtype: torch.dtype) -> None:
    x = torch.randn(2, 30, 50, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for matrices in (x, x.mT, x[:, ::2], x[0]):
        found, expected = gram(matrices), matrices.double() @ matrices.double().mT
        assert found.dtype is dtype
        assert torch.equal(found, found.mT)
        assert torch.allclose(found.double(), expected, rtol=0, atol=1e3 * torch.finfo(dtype).eps)
    assert not torch.allclose(gram(x).double(), x.double() @ x.double().flip(1).mT, atol=1e-3)


class Twice(nn.Module):
    """A layer that is called twice, and one that is called once in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(self.a(x)))


def test_patches_that_are_let_go_give_the_moments_of_those_that_are_kept() -> None:
    """What is drawn of a layer's second call follows what was drawn of all before, in a second run as in the first."""
    torch.manual_seed(0)
    model, noise = Twice(), torch.randn(4, 3, 20, 20)
    found = input_moments(model, ["a", "b"], [(noise,)], shaped=True)
    generator, inputs = torch.Generator().manual_seed(0), {"a": [noise], "b": [model.a(noise)]}
    inputs["a"].append(model.b(inputs["b"][0]))
    with torch.no_grad():
        first = random_patches(model.a, inputs["a"][0], 0, generator)
        between = random_patches(model.b, inputs["b"][0], 0, generator)
        second = random_patches(model.a, inputs["a"][1], len(first), generator)
        both = moments_of(torch.cat([first, second]), assumed=True)
        once = moments_of(between, assumed=True)
    assert (len(first), len(second)) == (1600, 1600)
    assert torch.equal(found["a"].direction, both.direction)
    assert torch.equal(found["b"].direction, once.direction)
    assert not torch.equal(both.direction, moments_of(first, assumed=True).direction)


def test_noise_has_the_shape_of_the_example_and_repeats() -> None:
    image, labels = torch.zeros(2, 3, 16, 16), torch.arange(2)
    noise, repeated = noise_like((image, labels))
    assert noise.shape == (32, 3, 16, 16)
    assert repeated.tolist() == [0, 1] * 16
    assert torch.equal(noise, noise_like((image, labels))[0])
    assert noise_like({"x": torch.zeros(2, 40)})["x"].shape == (1024, 40)
    neighbours = torch.corrcoef(torch.stack([noise[..., 1:].flatten(), noise[..., :-1].flatten()]))[0, 1]
    assert neighbours > 0.6  # smooth, as images are
    steps = (noise[..., 1:] - noise[..., :-1]).square().mean((1, 2, 3))
    assert steps.max() > 5 * steps.min()  # some smoother than others


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-11), (torch.float32, 2e-4), (torch.bfloat16, 0.15)])
def test_a_shaped_channel_is_numpys_and_a_constant_one_has_the_recorded_mean(dtype: torch.dtype, atol: float) -> None:
    """Also where a channel's mean is a hundred times its deviation; 0.1 is no binary number, and sums of it round."""
    x = torch.randn(40, 4, 9, 9, dtype=torch.float64) + torch.tensor([0.0, 100, 0, 0]).view(-1, 1, 1)
    x[:, 2], x[:, 3] = 0.1, 0.0
    x = x.to(dtype)
    mean, var = torch.tensor([3.0, -2, 5, 7], dtype=dtype), torch.tensor([4.0, 9, 2, 1], dtype=dtype)
    values = x.double().numpy()
    own_mean, own_var = (f(values, (0, 2, 3), keepdims=True) for f in (np.mean, np.var))
    own_var[:, 2:] = np.inf
    expected = (values - own_mean) * np.sqrt(var.double().view(-1, 1, 1).numpy() / own_var)
    expected += mean.double().view(-1, 1, 1).numpy()
    with shaped_by_statistics(nn.Identity()):  # the affine takes back what the norm does
        found = F.batch_norm(x, mean, var, var.sqrt(), mean, eps=0.0).double().numpy()
    np.testing.assert_allclose(found, expected, atol=atol)
    plain = F.batch_norm(x, mean, var, var.sqrt(), mean, eps=0.0).double().numpy()
    assert (np.abs(plain - expected).max((0, 2, 3)) > 1).all()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_noise_leaves_each_batch_norm_with_the_mean_and_variance_it_has_recorded(norm: type[nn.Module]) -> None:
    """What comes out of a norm without an affine has mean 0 and variance 1 just where its input is as recorded."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4), nn.Identity()).eval()
    for module in (model[1], model[4]):
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 4)
    noise = noise_like((torch.zeros(1, 3, 12, 12),))
    plain = measure_statistics(model, ["2", "5"], [noise])
    with shaped_by_statistics(model):
        shaped = measure_statistics(model, ["2", "5"], [noise])
    for name, found in shaped.items():
        assert torch.allclose(found.mean, torch.zeros(4).double(), atol=1e-4)
        assert torch.allclose(found.var, torch.ones(4).double(), atol=1e-3)
        assert not torch.allclose(plain[name].mean, found.mean, atol=0.1)
    after = measure_statistics(model, ["2", "5"], [noise])
    assert all(torch.equal(after[name].mean, plain[name].mean) for name in plain), "no hook is left"


# --- what hardly varies -----------------------------------------------------------------------------------------------


def test_a_ridge_grows_where_rounding_outweighs_it_and_nowhere_else() -> None:
    x = torch.randn(2, 40, 6, dtype=torch.float64)
    x[0] = torch.rand(6, dtype=torch.float64)  # no sample differs
    sums = (x.sum(1), x.mT @ x)
    covariance = sums[1] / 40 - (sums[0] / 40)[:, :, None] * (sums[0] / 40)[:, None]
    covariance[0] -= 1e-16 * torch.eye(6, dtype=torch.float64)
    ridge = torch.tensor([1e-33, 1e-3], dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(covariance + ridge[:, None, None] * torch.eye(6, dtype=torch.float64))
    factor, used = ridged_factor(covariance, ridge)
    assert 1e-17 < float(used[0]) < 1e-13
    assert used[1] == ridge[1]
    expected = torch.linalg.cholesky(covariance[1] + 1e-3 * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(factor[1], expected, rtol=1e-12, atol=0)


def _emptied(model: nn.Sequential, case: str) -> None:
    first, norm = model[0], model[1]
    assert isinstance(first, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.bias.normal_()
        if case == "no weights":
            first.weight.zero_()
        else:
            dead = slice(0, 2) if case.startswith("a group") else slice(None)
            norm.weight[dead] = 1e-6 if "nearly" in case else 0.0
            norm.bias.mul_(1e4 if "far" in case else 1.0)


@pytest.mark.parametrize("to", ["gn+ws", "bcn", "ws", "gn+aws", "ln"])
@pytest.mark.parametrize("case", ["no weights", "a group", "a group, nearly", "all", "all, far from zero"])
def test_layers_that_see_constants_are_converted(case: str, to: str) -> None:
    """As behind channels that pruning has emptied, or that began at zero: what they see has no covariance."""
    for seed in range(4):
        torch.manual_seed(seed)
        first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=4)
        model = nn.Sequential(
            first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1)
        )
        _emptied(model.eval(), case)
        x = torch.randn(12, 3, 7, 6)
        converted = ns.swap_norms(model, to, calibration=x)
        assert bool(converted(x).isfinite().all())
