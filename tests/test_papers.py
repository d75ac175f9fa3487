"""Modules, parametrizations and converted layers against the papers' equations in NumPy (``oracles.py``)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normswap
from normswap.errors import InputError
from normswap.nn import (
    ChannelAffine,
    ChannelLayerNorm,
    FilterLayout,
    MeanOnlyBatchNorm,
    RankCheck,
    WeightStandardization,
    parametrize_weight_norm,
)

Array = NDArray[np.float64]

RTOL = 1e-12  # float64 has 2e-16; sums of some hundred terms, divided by a deviation, lose two or three digits


@dataclass(frozen=True)
class Case:
    """A layer, built anew by ``make``, and the shape of its input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def layer(self) -> Any:
        return self.make().double()

    def x(self) -> Tensor:
        return torch.randn(self.shape, dtype=torch.float64)


# Sizes differ from axis to axis, and channels in from channels out: no mix-up of two axes goes unseen.
LAYERS = {
    "linear": Case(lambda: nn.Linear(6, 4), (5, 6)),
    "conv1d": Case(lambda: nn.Conv1d(6, 4, 3, stride=2, padding=1), (3, 6, 9)),
    "conv2d": Case(lambda: nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 6, 7, 8)),
    "conv2d-1x1": Case(lambda: nn.Conv2d(6, 4, 1, bias=False), (2, 6, 3, 4)),
    "conv2d-grouped": Case(lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 6)),
    "conv2d-depthwise": Case(lambda: nn.Conv2d(4, 8, (3, 2), groups=4, padding=1), (2, 4, 5, 6)),
    "conv3d": Case(lambda: nn.Conv3d(3, 4, (1, 2, 3), padding=(0, 1, 1), stride=(1, 1, 2)), (2, 3, 3, 4, 5)),
    "conv3d-grouped": Case(lambda: nn.Conv3d(4, 8, 2, groups=2), (2, 4, 3, 4, 3)),
    "transposed1d": Case(lambda: nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1), (3, 6, 5)),
    "transposed1d-grouped": Case(lambda: nn.ConvTranspose1d(6, 4, 3, groups=2), (3, 6, 5)),
    "transposed2d": Case(
        lambda: nn.ConvTranspose2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 6, 4, 5)
    ),
    "transposed2d-grouped": Case(lambda: nn.ConvTranspose2d(6, 8, 3, groups=2, stride=2), (2, 6, 3, 4)),
    "transposed2d-depthwise": Case(lambda: nn.ConvTranspose2d(4, 4, (3, 2), groups=4, bias=False), (2, 4, 4, 5)),
    "transposed3d": Case(lambda: nn.ConvTranspose3d(3, 4, (1, 2, 3), stride=(1, 2, 1)), (2, 3, 3, 2, 3)),
    "transposed3d-grouped": Case(lambda: nn.ConvTranspose3d(4, 8, 2, groups=2), (2, 4, 2, 3, 2)),
}
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
NORM_SHAPES = [(5, 8), (4, 8, 3), (3, 8, 2, 4), (2, 8, 3, 2, 2)]

every_layer = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
every_shape = pytest.mark.parametrize("shape", NORM_SHAPES, ids=["2-D", "3-D", "4-D", "5-D"])


def deviation(actual: Tensor | Array, expected: Tensor | Array) -> float:
    """Return the largest difference in units of the largest expected value; shape and dtype must agree."""
    a, b = array(actual), array(expected)
    assert a.shape == b.shape
    assert a.dtype == b.dtype == np.float64
    assert np.isfinite(a).all()
    return float(np.abs(a - b).max() / np.abs(b).max())


def assert_equal(actual: Tensor | Array, expected: Tensor | Array, rtol: float = RTOL) -> None:
    found = deviation(actual, expected)
    assert found <= rtol, f"differs by {found:.1e} of its size"


def array(value: Tensor | Array) -> Array:
    return value.detach().numpy() if isinstance(value, Tensor) else value


def random(*shape: int) -> Tensor:
    """Return values of both signs, of which none is near zero."""
    return (0.5 + torch.rand(shape, dtype=torch.float64)) * torch.where(torch.rand(shape) < 0.3, -1.0, 1.0)


def randomize(module: nn.Module) -> None:
    """Give every parameter and running statistic of ``module`` a value other than its first one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(random(*parameter.shape))
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(random(*buffer.shape).abs() if name.endswith("var") else random(*buffer.shape))


def oracle(layer: Any, weight: Tensor | Array | None = None) -> oracles.Layer:
    """Return a torch layer as the NumPy one, with ``weight`` in its weight's place."""
    weight = array(layer.weight if weight is None else weight)
    bias = None if layer.bias is None else array(layer.bias)
    if isinstance(layer, nn.Linear):
        return oracles.Layer(weight, bias)
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    return oracles.Layer(
        weight,
        bias,
        transposed,
        layer.groups,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        output_padding=layer.output_padding,
    )


def originals(layer: Any) -> list[Tensor]:
    """Return the tensors that a layer's weight is computed from, in the parametrization's order."""
    found = layer.parametrizations["weight"]
    return [p for name, p in found.named_parameters(recurse=False) if name.startswith("original")]


def running(norm: Any) -> oracles.Running:
    """Return a copy of a norm's running statistics."""
    var = norm.running_var if hasattr(norm, "running_var") else torch.ones_like(norm.running_mean)
    return oracles.Running(
        array(norm.running_mean.clone()), array(var.clone()), int(norm.num_batches_tracked), norm.momentum
    )


def weight_normalized(case: Case) -> Any:
    layer = case.layer()
    parametrize_weight_norm(layer)
    randomize(layer)
    return layer


def standardized(case: Case, **options: Any) -> Any:
    layer = case.layer()
    parametrize.register_parametrization(layer, "weight", WeightStandardization(FilterLayout.of(layer), **options))
    randomize(layer)
    return layer


STANDARDIZATIONS = {
    "published": {"gain": False},
    "gain": {},
    "gain and offset": {"offset": True},
    "other eps": {"offset": True, "eps": 0.3},
}


def expected_weight_norm(layer: Any) -> Array:
    g, v = originals(layer)
    return oracles.weight_norm(oracle(layer, v), array(g).ravel())


def expected_standardization(layer: Any) -> Array:
    v, *affine = originals(layer)
    eps = layer.parametrizations["weight"][0].eps
    return oracles.weight_standardization(oracle(layer, v), *map(array, affine), eps=eps)


# The comparator and the oracles' own layers


def test_the_comparator_tells_a_change_of_one_value_in_the_eleventh_digit() -> None:
    expected = random(4, 3)
    assert_equal(expected.clone(), expected)
    broken = expected.clone()
    broken[1, 2] += 1e-11 * float(expected.abs().max())
    with pytest.raises(AssertionError, match=r"differs by 1\.0e-11 of its size"):
        assert_equal(broken, expected)


@pytest.mark.parametrize("wrong", [torch.zeros(3, 4), torch.zeros(4, 3), torch.full((4, 3), torch.nan).double()])
def test_the_comparator_tells_another_shape_another_dtype_and_nan(wrong: Tensor) -> None:
    with pytest.raises(AssertionError):
        assert_equal(wrong, torch.ones(4, 3, dtype=torch.float64), rtol=1e9)


@every_layer
def test_the_oracle_layer_computes_what_torch_computes(case: Case) -> None:
    layer, x = case.layer(), case.x()
    assert_equal(oracle(layer)(array(x)), layer(x))


@every_layer
def test_each_filter_of_the_oracle_reaches_its_own_output_channel_and_no_other(case: Case) -> None:
    layer, x = case.layer(), case.x()
    before = oracle(layer)
    for c in range(before.out_channels):
        changed = replace(before, weight=before.weight.copy())
        changed.weight[changed.filter(c)] += 1.0
        moved = np.abs(changed(array(x)) - before(array(x))).reshape(len(x), before.out_channels, -1).max(axis=(0, 2))
        assert [int(i) for i in np.flatnonzero(moved)] == [c]


# Weights


@every_layer
def test_weight_normalization_is_equation_2(case: Case) -> None:
    layer, x = weight_normalized(case), case.x()
    expected = expected_weight_norm(layer)
    assert_equal(layer.weight, expected)
    assert_equal(layer(x), oracle(layer, expected)(array(x)))


@every_layer
def test_the_gradient_of_weight_normalization_is_equation_3(case: Case) -> None:
    layer = weight_normalized(case)
    grad_w = random(*layer.weight.shape)
    g, v = originals(layer)
    grad_g, grad_v = torch.autograd.grad(layer.weight, (g, v), grad_w)
    expected_g, expected_v = oracles.weight_norm_gradients(oracle(layer, v), array(g).ravel(), array(grad_w))
    assert_equal(grad_g.flatten(), expected_g)
    assert_equal(grad_v, expected_v)


@pytest.mark.parametrize("options", STANDARDIZATIONS.values(), ids=STANDARDIZATIONS)
@every_layer
def test_weight_standardization_is_equations_4_and_5(case: Case, options: dict[str, Any]) -> None:
    layer, x = standardized(case, **options), case.x()
    expected = expected_standardization(layer)
    assert_equal(layer.weight, expected)
    assert_equal(layer(x), oracle(layer, expected)(array(x)))


@pytest.mark.parametrize("kind", ["wn", "ws"])
@pytest.mark.parametrize(
    "name",
    ["conv2d", "conv2d-1x1", "conv2d-grouped", "conv2d-depthwise", "transposed2d", "transposed2d-grouped"],
)
def test_a_channels_last_weight_gives_the_same_layer(name: str, kind: str) -> None:
    case = LAYERS[name]
    layer = weight_normalized(case) if kind == "wn" else standardized(case, offset=True)
    expected = expected_weight_norm(layer) if kind == "wn" else expected_standardization(layer)
    x, format_ = case.x(), torch.channels_last
    layer = layer.to(memory_format=format_)
    assert any(t.ndim == 4 and t.is_contiguous(memory_format=format_) for t in originals(layer))
    assert_equal(layer.weight, expected)
    assert_equal(layer(x.to(memory_format=format_)), oracle(layer, expected)(array(x)))


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d-grouped", "transposed2d", "transposed2d-grouped"])
def test_weights_of_other_equations_are_told_apart(name: str) -> None:
    """The nearest wrong equation is far off: another norm, the sample variance, another axis, another eps."""
    layer = weight_normalized(LAYERS[name])
    g, v = originals(layer)
    wrong = oracle(layer, v).per_filter(lambda f, c: array(g).ravel()[c] / np.abs(f).sum() * f)
    assert deviation(layer.weight, wrong) > 0.1
    layer = standardized(LAYERS[name])
    v, gain = originals(layer)
    expected, fan_in = expected_standardization(layer), FilterLayout.of(layer).fan_in(v)
    assert deviation(layer.weight, expected * np.sqrt((fan_in - 1) / fan_in)) > 0.01
    assert deviation(layer.weight, oracles.weight_standardization(oracle(layer, v), array(gain), eps=0.0)) > 1e-7
    assert deviation(layer.weight, oracles.weight_standardization(oracle(layer, v))) > 0.1
    if isinstance(layer, nn.ConvTranspose2d):
        plain = replace(oracle(layer, v), transposed=False)
        assert deviation(layer.weight, oracles.weight_standardization(plain, array(random(len(v))))) > 0.1


# Activations


@every_shape
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_mean_only_batch_norm_is_its_equation_in_train_and_eval(shape: tuple[int, ...], momentum: float | None) -> None:
    norm = MeanOnlyBatchNorm(shape[1], momentum).double()
    randomize(norm)
    for _ in range(3):
        x = random(*shape) + 2
        expected, after = oracles.mean_only_batch_norm_train(array(x), array(norm.bias), running(norm))
        assert_equal(norm(x), expected)
        assert_equal(norm.running_mean, after.mean)
        assert int(norm.num_batches_tracked) == after.batches
        norm.eval()
        assert_equal(norm(x), oracles.mean_only_batch_norm_eval(array(x), array(norm.bias), after))
        norm.train()


def test_mean_only_batch_norm_without_momentum_averages_all_batches() -> None:
    norm = MeanOnlyBatchNorm(4, momentum=None).double()
    batches = [random(3, 4, 5) + k for k in range(4)]
    for x in batches:
        norm(x)
    assert_equal(norm.running_mean, torch.stack(batches).mean((0, 1, 3)))
    assert deviation(norm.running_mean, batches[-1].mean((0, 2))) > 0.1


@every_shape
def test_the_gradient_of_mean_only_batch_norm_is_centred(shape: tuple[int, ...]) -> None:
    norm, x, grad = MeanOnlyBatchNorm(shape[1]).double(), random(*shape).requires_grad_(), random(*shape)
    found_x, found_bias = torch.autograd.grad(norm(x), (x, norm.bias), grad)
    assert_equal(found_x, oracles.mean_only_batch_norm_gradient(array(grad)))
    assert_equal(found_bias, grad.transpose(0, 1).flatten(1).sum(1))
    norm.eval()
    (in_eval,) = torch.autograd.grad(norm(x), x, grad)
    assert deviation(in_eval, oracles.mean_only_batch_norm_gradient(array(grad))) > 0.1


@every_shape
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_layer_normalization_is_equations_3_and_4(shape: tuple[int, ...], eps: float) -> None:
    x = random(*shape)
    norms = {
        oracles.layer_norm: nn.GroupNorm(1, shape[1], eps),
        oracles.layer_norm_channels: ChannelLayerNorm(shape[1], eps),
    }
    for equation, norm in norms.items():
        norm.double()
        randomize(norm)
        assert_equal(norm(x), equation(array(x), array(norm.weight), array(norm.bias), eps))
    if len(shape) > 2:  # the two equations are two
        over_all, over_channels = (f(array(x), *map(array, norm.parameters()), eps) for f in norms)
        assert deviation(over_all, over_channels) > 0.05


@every_shape
@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_group_normalization_is_equations_1_to_7(shape: tuple[int, ...], num_groups: int) -> None:
    norm, x = nn.GroupNorm(num_groups, shape[1], eps=1e-3).double(), random(*shape)
    randomize(norm)
    gamma, beta = array(norm.weight), array(norm.bias)
    assert_equal(norm(x), oracles.group_norm(array(x), num_groups, gamma, beta, 1e-3))
    other = 2 if num_groups == 1 else num_groups // 2
    assert deviation(norm(x), oracles.group_norm(array(x), other, gamma, beta, 1e-3)) > 0.05
    assert deviation(norm(x), oracles.group_norm(array(x), num_groups, gamma, beta, 1e-5)) > 1e-5


@every_shape
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_normalization_is_algorithms_1_and_2(shape: tuple[int, ...], momentum: float | None) -> None:
    norm = NORMS[len(shape)](shape[1], eps=1e-3, momentum=momentum).double()
    randomize(norm)
    gamma, beta = array(norm.weight), array(norm.bias)
    for _ in range(2):
        x = random(*shape)
        expected, after = oracles.batch_norm_train(array(x), gamma, beta, running(norm), 1e-3)
        assert_equal(norm(x), expected)
        assert_equal(norm.running_mean, after.mean)
        assert_equal(norm.running_var, after.var)
    norm.eval()
    expected = oracles.batch_norm_eval(array(x), gamma, beta, running(norm), 1e-3)
    assert_equal(norm(x), expected)
    assert deviation(norm(x), oracles.mean_only_batch_norm_eval(array(x), beta, running(norm))) > 0.05


@every_shape
def test_a_channel_affine_is_batch_normalization_at_given_statistics(shape: tuple[int, ...]) -> None:
    affine, x = ChannelAffine(shape[1]).double(), random(*shape)
    randomize(affine)
    unit = oracles.Running(np.zeros(shape[1]), np.ones(shape[1]))
    gamma, beta = array(affine.weight), array(affine.bias)
    assert_equal(affine(x), oracles.batch_norm_eval(array(x), gamma, beta, unit, eps=0.0))
    assert deviation(affine(x), oracles.batch_norm_eval(array(x), beta, gamma, unit, eps=0.0)) > 0.1


# Converted layers


def site(case: Case) -> nn.Sequential:
    """Return the layer with a BatchNorm that has been trained."""
    layer = case.layer()
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    model = nn.Sequential(layer, NORMS[len(case.shape)](channels, eps=1e-3)).double().eval()
    randomize(model)
    return model


def normalized_by(norm: Any, t: Array) -> Array:
    """Return what the paper makes of the pre-activation ``t`` with the parameters of ``norm``."""
    if isinstance(norm, nn.Identity):
        return t
    affine = array(norm.bias) if isinstance(norm, MeanOnlyBatchNorm) else (array(norm.weight), array(norm.bias))
    if isinstance(norm, MeanOnlyBatchNorm):
        if norm.training:
            return oracles.mean_only_batch_norm_train(t, affine, running(norm))[0]
        return oracles.mean_only_batch_norm_eval(t, affine, running(norm))
    if isinstance(norm, ChannelLayerNorm):
        return oracles.layer_norm_channels(t, *affine, norm.eps)
    if isinstance(norm, nn.GroupNorm):
        return (
            oracles.layer_norm(t, *affine, norm.eps)
            if norm.num_groups == 1
            else oracles.group_norm(t, norm.num_groups, *affine, norm.eps)
        )
    if norm.training:
        return oracles.batch_norm_train(t, *affine, running(norm), norm.eps)[0]
    return oracles.batch_norm_eval(t, *affine, running(norm), norm.eps)


def weight_by(layer: Any) -> Array:
    """Return the paper's weight out of the originals of a converted layer."""
    if not parametrize.is_parametrized(layer):
        return array(layer.weight)
    return (
        expected_standardization(layer)
        if isinstance(layer.parametrizations["weight"][0], WeightStandardization)
        else expected_weight_norm(layer)
    )


RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gn": ("gn", {"num_groups": 2}),
    "gn+ws": ("gn+ws", {"num_groups": 2, "depthwise": True}),
    "gn+ws, published": ("gn+ws", {"num_groups": 2, "depthwise": True, "gain": False}),
    "gn+aws": ("gn+aws", {"num_groups": 2}),
    "ln": ("ln", {}),
    "ln over channels": ("ln", {"axes": "channel"}),
    "mobn": ("mobn", {}),
    "wn": ("wn", {}),
    "wn+mobn": ("wn+mobn", {}),
    "ws": ("ws", {"depthwise": True}),
}
EXACT = {"mobn", "wn", "wn+mobn"}


def unchecked(module: nn.Module) -> nn.Module:
    """Return what is behind the check of how many axes an input has, which only the example showed."""
    if isinstance(module, RankCheck):
        return nn.Identity()
    return module[-1] if isinstance(module, nn.Sequential) else module


@pytest.mark.parametrize("recipe", RECIPES)
@every_layer
def test_a_converted_layer_computes_its_papers_equations(case: Case, recipe: str) -> None:
    model, x = site(case), case.x()
    to, options = RECIPES[recipe]
    before = oracles.batch_norm_eval(
        oracle(model[0])(array(x)), *map(array, (model[1].weight, model[1].bias)), running(model[1]), 1e-3
    )
    converted = normswap.swap_norms(model, to=to, example_inputs=x, **options)
    assert type(converted[1]) is not type(model[1]) or to == "ws"
    for training in (False, True):
        converted.train(training)
        expected = normalized_by(unchecked(converted[1]), oracle(converted[0], weight_by(converted[0]))(array(x)))
        if recipe in EXACT and not training:
            assert_equal(expected, before)
        found = converted(x)
        assert_equal(found, expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_converted_layer_with_one_value_changed_no_longer_does(recipe: str) -> None:
    model, x = site(LAYERS["conv2d-grouped"]), LAYERS["conv2d-grouped"].x()
    to, options = RECIPES[recipe]
    converted = normswap.swap_norms(model, to=to, example_inputs=x, **options)
    expected = normalized_by(converted[1], oracle(converted[0], weight_by(converted[0]))(array(x)))
    for parameter in converted.parameters():
        with torch.no_grad():
            parameter.view(-1)[0] += 1e-3
        with pytest.raises(AssertionError, match="differs by"):
            assert_equal(converted(x), expected)
        with torch.no_grad():
            parameter.view(-1)[0] -= 1e-3
    assert_equal(converted(x), expected)


# Derivatives


class WrongGradient(torch.autograd.Function):
    """The identity with a gradient that is one per cent too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 1.01 * grad


def gradient_is_right(module: Any, x: Tensor) -> bool:
    """Compare the derivatives by the input and by every parameter with differences, in float64."""
    names, values = zip(*module.named_parameters(), strict=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        # The buffers' copies are written by each call, so that no call sees another's.
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)) | buffers, (x,))

    inputs = (x.clone().requires_grad_(), *(v.detach().clone().requires_grad_() for v in values))
    return torch.autograd.gradcheck(function, inputs, raise_exception=False)


TINY = {
    "linear": Case(lambda: nn.Linear(3, 2), (2, 3)),
    "conv1d": Case(lambda: nn.Conv1d(2, 2, 2), (1, 2, 3)),
    "conv2d-grouped": Case(lambda: nn.Conv2d(4, 2, 2, groups=2), (1, 4, 2, 3)),
    "conv2d-depthwise": Case(lambda: nn.Conv2d(2, 2, 2, groups=2), (1, 2, 3, 2)),
    "conv3d": Case(lambda: nn.Conv3d(1, 2, (1, 2, 2)), (1, 1, 2, 2, 2)),
    "transposed2d": Case(lambda: nn.ConvTranspose2d(2, 2, (2, 1)), (1, 2, 2, 2)),
    "transposed2d-grouped": Case(lambda: nn.ConvTranspose2d(4, 4, (2, 1), groups=2), (1, 4, 1, 2)),
}


@pytest.mark.parametrize("case", TINY.values(), ids=TINY)
def test_the_gradients_of_parametrized_layers_are_right(case: Case) -> None:
    assert gradient_is_right(weight_normalized(case), case.x())
    for options in ({"gain": False}, {"offset": True}):
        assert gradient_is_right(standardized(case, **options), case.x())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", [MeanOnlyBatchNorm, ChannelLayerNorm, ChannelAffine])
@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3), (2, 4, 1, 2)], ids=str)
def test_the_gradients_of_the_norms_are_right(
    make: Callable[[int], nn.Module], shape: tuple[int, ...], training: bool
) -> None:
    norm = make(shape[1]).double().train(training)
    randomize(norm)
    assert gradient_is_right(norm, random(*shape))


def test_a_gradient_one_per_cent_too_large_is_found() -> None:
    class Wrong(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return WrongGradient.apply(super().forward(x))

    assert not gradient_is_right(Wrong(3, 2).double(), random(2, 3))


# Transformations of the whole


@pytest.fixture(params=["wn", "ws", "wn, transposed and grouped", "ws, transposed and grouped"])
def parametrized(request: pytest.FixtureRequest) -> tuple[Any, Tensor]:
    case = LAYERS["transposed2d-grouped" if "grouped" in request.param else "conv2d"]
    layer = weight_normalized(case) if request.param.startswith("wn") else standardized(case, offset=True)
    return layer, case.x()


def expected_output(layer: Any, x: Tensor) -> Array:
    return oracle(layer, weight_by(layer))(array(x))


def test_vmap_over_a_mean_only_norm_in_training_is_refused_in_words() -> None:
    x = torch.randn(4, 2, 3, 5)
    norm = MeanOnlyBatchNorm(3)
    with pytest.raises(InputError, match="running mean"):
        torch.func.vmap(norm)(x)
    assert not norm.running_mean.any()
    assert norm.num_batches_tracked == 0
    torch.testing.assert_close(torch.func.vmap(norm.eval())(x), x)  # the control: it is the running mean alone


# torch has no batching rule for its fused weight norm: vmap loops over it, and says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop.*aten..[_]weight_norm:UserWarning")
def test_vmap_over_stacked_parameters_is_one_layer_after_the_other(parametrized: tuple[Any, Tensor]) -> None:
    layer, x = parametrized
    layers = [copy.deepcopy(layer) for _ in range(3)]
    for one in layers:
        randomize(one)
    parameters, _ = torch.func.stack_module_state(layers)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            found = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(parameters)
        for k, one in enumerate(layers):
            assert_equal(found[k], expected_output(one, x))
        assert deviation(found[0], expected_output(layers[1], x)) > 0.1


def test_a_forward_without_gradients_is_the_same_and_is_watched_by_a_transformation(
    parametrized: tuple[Any, Tensor],
) -> None:
    layer, x = parametrized
    watched = layer(x).detach()
    with torch.no_grad():
        assert torch.equal(layer(x), watched)
        given = {name: p.detach() for name, p in layer.named_parameters()}
        slope = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).pow(3).sum())(given)
    with torch.inference_mode():
        assert_equal(layer(x), expected_output(layer, x))
    layer(x).pow(3).sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(slope[name], p.grad, rtol=1e-10, atol=1e-10)


def test_functional_call_uses_the_parameters_given_and_leaves_the_layer_alone(
    parametrized: tuple[Any, Tensor],
) -> None:
    layer, x = parametrized
    before, other = expected_output(layer, x), copy.deepcopy(layer)
    randomize(other)
    found = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
    assert_equal(found, expected_output(other, x))
    assert deviation(found, before) > 0.1
    assert_equal(layer(x), before)


def test_per_sample_gradients_are_those_of_one_sample_after_the_other(
    parametrized: tuple[Any, Tensor],
) -> None:
    layer, x = parametrized
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (sample[None],)).pow(3).sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for n, sample in enumerate(x):
        layer.zero_grad()
        layer(sample[None]).pow(3).sum().backward()
        for name, p in layer.named_parameters():
            assert_equal(found[name][n], p.grad)
            assert deviation(found[name][1 - n], p.grad) > 1e-3


def test_a_compiled_layer_computes_the_same_and_the_same_gradients(parametrized: tuple[Any, Tensor]) -> None:
    layer, x = parametrized
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = compiled(x)
    assert_equal(found, expected_output(layer, x))
    grads = torch.autograd.grad(found.pow(2).sum(), list(layer.parameters()))
    for found_grad, grad in zip(
        grads, torch.autograd.grad(layer(x).pow(2).sum(), list(layer.parameters())), strict=True
    ):
        assert_equal(found_grad, grad)
    randomize(layer)  # the compiled layer must not have kept the weight
    assert_equal(compiled(x), expected_output(layer, x))
    assert deviation(compiled(x), found) > 0.1


# Mixed precision


def in_autocast(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer.weight, layer(x)


def test_under_autocast_the_weight_stays_float32_and_the_output_is_bfloat16(
    parametrized: tuple[Any, Tensor],
) -> None:
    layer, x = parametrized[0].float(), parametrized[1].float()
    plain = layer.weight.detach().clone()
    weight, y = in_autocast(layer, x)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, plain)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters()
    )


def test_a_weight_computed_by_a_matrix_product_would_not_stay_float32() -> None:
    class Product(nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            return v @ torch.eye(v.shape[1])

    layer = nn.Linear(3, 2)
    parametrize.register_parametrization(layer, "weight", Product())
    weight, _ = in_autocast(layer, torch.ones(2, 3))
    assert weight.dtype == torch.bfloat16


# Data-dependent initialization


def stack(parametrization: str, bias: bool = True) -> nn.Sequential:
    """Return convolution, grouped transposed convolution and linear layer, one after the other."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, (3, 2), stride=(2, 1), bias=bias),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 8, 2, groups=2, bias=bias),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5, bias=bias),
    ).double()
    for layer in layers_of(model):
        if parametrization == "wn":
            parametrize_weight_norm(layer)
        elif parametrization == "ws":
            parametrize.register_parametrization(layer, "weight", WeightStandardization(FilterLayout.of(layer)))
    return model


PHIS: list[Callable[[Array], Array]] = [
    lambda t: np.maximum(t, 0),
    lambda t: np.tanh(t).mean((2, 3)),
    lambda t: t,
]


def layers_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]


def images() -> Tensor:
    return torch.randn(16, 3, 7, 6, dtype=torch.float64) + 0.3


def outputs_of(model: nn.Module, modules: list[Any], x: Tensor) -> list[Tensor]:
    """Return what each of ``modules`` puts out in one forward pass of ``model``."""
    outputs: list[Tensor] = []
    handles = [m.register_forward_hook(lambda _m, _args, out: outputs.append(out.detach())) for m in modules]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return outputs


def assert_initialized(outputs: list[Tensor]) -> None:
    for t in outputs:
        mean, var = oracles.batch_moments(array(t))
        assert np.abs(mean).max() < 1e-3
        assert np.abs(np.sqrt(var) - 1).max() < 1e-2


@pytest.mark.parametrize("parametrization", ["plain", "wn", "ws"])
def test_data_dependent_initialization_is_equations_5_and_6(parametrization: str) -> None:
    model, x = stack(parametrization), images()
    layers = layers_of(model)
    before = [oracle(layer, layer.weight.detach().clone()) for layer in layers]
    parameters, activations = oracles.data_dependent_initialization(before, array(x), PHIS)
    with pytest.raises(AssertionError):
        assert_initialized(outputs_of(model, layers, x))
    report = normswap.initialize(model, x)
    assert [row.name for row in report.rows] == [name for name, m in model.named_modules() if m in layers]
    found = outputs_of(model, layers, x)
    assert_initialized(found)
    # Each layer adds its own rounding to what the next one is measured on: a factor of ten on RTOL.
    for layer, was, (g, b), t, out in zip(layers, before, parameters, activations, found, strict=True):
        assert_equal(layer.weight, oracles.weight_norm(was, g), rtol=10 * RTOL)
        assert_equal(layer.bias, b, rtol=10 * RTOL)
        assert_equal(out, t, rtol=10 * RTOL)
        if parametrization == "wn":
            assert_equal(originals(layer)[0].flatten(), g, rtol=10 * RTOL)
            assert_equal(originals(layer)[1], was.weight)


def test_data_dependent_initialization_on_another_minibatch_is_told_apart() -> None:
    model, x = stack("wn"), images()
    before = [oracle(layer, layer.weight.detach().clone()) for layer in layers_of(model)]
    parameters, _ = oracles.data_dependent_initialization(before, array(images()), PHIS)
    normswap.initialize(model, x)
    for layer, (g, b) in zip(layers_of(model), parameters, strict=True):
        assert deviation(originals(layer)[0].flatten(), g) > 1e-3
        assert deviation(layer.bias, b) > 1e-3
    with pytest.raises(AssertionError):
        assert_initialized(outputs_of(model, layers_of(model), images()))


@pytest.mark.parametrize("parametrization", ["plain", "wn", "ws"])
def test_fresh_initialization_draws_directions_by_the_seed(parametrization: str) -> None:
    first, again, other = (stack(parametrization) for _ in range(3))
    x = images()
    for model, seed in ((first, 3), (again, 3), (other, 4)):
        normswap.initialize(model, x, fresh=True, seed=seed)
        assert_initialized(outputs_of(model, layers_of(model), x))
    for a, b, c in zip(layers_of(first), layers_of(again), layers_of(other), strict=True):
        assert_equal(a.weight, b.weight)
        assert deviation(a.weight, c.weight) > 0.1


def test_fresh_initialization_draws_from_a_normal_distribution_of_deviation_5_per_cent() -> None:
    """``v ~ N(0, 0.05²)``, then g and b by equation 6 for that v."""
    layer = nn.Linear(400, 50).double()
    parametrize_weight_norm(layer)
    x = torch.randn(64, 400, dtype=torch.float64)
    normswap.initialize(layer, x, fresh=True)
    g, v = (t.detach() for t in originals(layer))
    # 20,000 draws: five standard errors of the deviation and of the mean.
    assert abs(float(v.std()) - 0.05) < 5 * 0.05 / (2 * v.numel()) ** 0.5
    assert abs(float(v.mean())) < 5 * 0.05 / v.numel() ** 0.5
    assert abs(float((v.abs() < 0.05).double().mean()) - 0.6827) < 0.02  # a uniform one of that deviation: 0.577
    ((expected_g, expected_b),), _ = oracles.data_dependent_initialization([oracle(layer, v)], array(x), [lambda t: t])
    assert_equal(g.flatten(), expected_g)
    assert_equal(layer.bias, expected_b)


def test_a_converted_network_is_initialized_in_front_of_its_mean_only_batch_norms() -> None:
    """There b of equation 6 is the norm's: ``t/σ[t] − μ[t]/σ[t]``, the mean being taken by the norm."""
    plain = stack("plain")
    model = nn.Sequential(plain[0], nn.BatchNorm2d(6), *plain[1:3], nn.BatchNorm2d(8), *plain[3:])
    model, x = model.double().eval(), images()
    converted: Any = normswap.swap_norms(model, to="wn+mobn", example_inputs=x)
    layers = layers_of(converted)
    before = [oracle(layer, layer.weight.detach().clone()) for layer in layers]
    parameters, activations = oracles.data_dependent_initialization(before, array(x), PHIS)
    normswap.initialize(converted, x)
    ends = [converted[1], converted[4], layers[-1]]
    for training in (False, True):
        converted.train(training)
        found = outputs_of(converted, ends, x)
        assert_initialized(found)
        for out, t in zip(found, activations, strict=True):
            assert_equal(out, t, rtol=10 * RTOL)
        if not training:
            for norm, (_, b) in zip(ends[:2], parameters, strict=False):
                assert_equal(norm.running_mean, -b, rtol=10 * RTOL)
    for layer, was, (g, _) in zip(layers, before, parameters, strict=True):
        assert_equal(layer.weight, oracles.weight_norm(was, g), rtol=10 * RTOL)
