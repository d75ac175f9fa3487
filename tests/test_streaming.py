"""Streaming normalization: the paper's equations against NumPy, the swap, and what becomes of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from laws import distance
from torch import Tensor, nn
from zoo import randomize_

import normswap as ns
from normswap.errors import InputError
from normswap.nn import StreamingNorm
from normswap.nn.streaming import StreamingNorm2d

Array = np.ndarray
C, EPS = 5, 1e-3


class Stream:
    """The equations, with a channel's mean and mean square about nothing, ``E x`` and ``E x²``, as its statistics.

    For these the mixtures are linear as the paper writes them; the module holds mean and variance instead.
    """

    def __init__(self, alpha: float, beta: float, kappa: float) -> None:
        self.alpha, self.beta, self.kappa = alpha, beta, kappa  # α₁, β₁ and κ₁ = κ₃
        self.first, self.second = np.zeros(C), np.ones(C)
        self.gradients = np.zeros((2, C))

    def step(self, x: Array, gamma: Array, beta: Array, upstream: Array) -> tuple[Array, Array]:
        """Return y, and the gradient of Σ y·upstream that goes back to x."""
        axes, count = (0, *range(2, x.ndim)), x.size // C
        now = x.mean(axes), (x**2).mean(axes)
        first, second = (
            self.alpha * a + (1 - self.alpha) * b for a, b in zip((self.first, self.second), now, strict=True)
        )
        self.first, self.second = (
            self.kappa * a + (1 - self.kappa) * b for a, b in zip((self.first, self.second), now, strict=True)
        )
        inverse = (second - first**2 + EPS) ** -0.5
        centred = x - oracles.per_channel(first, x)
        y = centred * oracles.per_channel(gamma * inverse, x) + oracles.per_channel(beta, x)
        # with respect to the mean, and to the mean square about it
        g = np.stack([-gamma * inverse * upstream.sum(axes), -gamma / 2 * inverse**3 * (upstream * centred).sum(axes)])
        used = self.beta * self.gradients + (1 - self.beta) * g
        self.gradients = self.kappa * self.gradients + (1 - self.kappa) * g
        back = upstream * oracles.per_channel(gamma * inverse, x)
        back = back + (oracles.per_channel(used[0], x) + 2 * centred * oracles.per_channel(used[1], x)) / count
        return y, back


def batches(*shape: int, count: int = 5) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shift, scale = torch.randn(2, C, *(1,) * (len(shape) - 2), generator=generator, dtype=torch.float64)
    for _ in range(count):
        yield torch.randn(*shape, generator=generator, dtype=torch.float64) * scale.exp() + 3 * shift


def norm(**options: Any) -> StreamingNorm:
    made = StreamingNorm(C, EPS, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    return made


SHAPES = [(4, C, 3, 2), (3, C, 4), (6, C), (1, C, 4, 3), (1, C)]
SETTINGS = [(0.7, 0.7, 0.7), (0.0, 0.0, 0.9), (0.9, 0.2, 0.5), (0.3, 1.0, 0.8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("alpha", "beta", "kappa"), SETTINGS)
def test_outputs_gradients_and_what_accumulates_are_the_papers(
    shape: tuple[int, ...], alpha: float, beta: float, kappa: float
) -> None:
    module, stream = norm(alpha=alpha, beta=beta, momentum=1 - kappa), Stream(alpha, beta, kappa)
    gamma, shift = (p.detach().numpy() for p in module.parameters())
    for x in batches(*shape):
        upstream = torch.sin(7 * x)
        y, back = stream.step(x.numpy(), gamma, shift, upstream.numpy())
        x.requires_grad_()
        found = module(x)
        found.backward(upstream)
        # Some of the raw second moments are fifty times the variance that is left of them.
        np.testing.assert_allclose(found.detach(), y, rtol=1e-9, atol=1e-10)
        assert x.grad is not None
        np.testing.assert_allclose(x.grad, back, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(module.running_mean, stream.first, rtol=1e-12)
        np.testing.assert_allclose(module.running_var, stream.second - stream.first**2, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(module.mean_gradient, stream.gradients[0], rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(module.var_gradient, stream.gradients[1], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("other", ["alpha", "beta", "momentum"])
def test_another_setting_would_be_told_apart(other: str) -> None:
    settings = {"alpha": 0.7, "beta": 0.7, "momentum": 0.3}
    results = []
    for changed in ({}, {other: settings[other] + 1e-3}):
        module = norm(**settings | changed)
        for x in batches(4, C, 3, 2):
            x.requires_grad_()
            y = module(x)
            y.backward(torch.sin(7 * x.detach()))
        results.append((y.detach(), x.grad))
    (y, back), (other_y, other_back) = results
    assert distance(back, other_back) > 1e-5
    assert (distance(y, other_y) > 1e-5) is (other != "beta")


def test_without_what_is_long_term_it_is_batch_norm() -> None:
    module, theirs = norm(alpha=0.0, beta=0.0), nn.BatchNorm2d(C, EPS, dtype=torch.float64)
    with torch.no_grad():
        for mine, other in zip(module.parameters(), theirs.parameters(), strict=True):
            other.copy_(mine)
    for x in batches(4, C, 3, 2):
        gradients = []
        for one in (module, theirs):
            one.zero_grad()
            given = x.clone().requires_grad_()
            y = one(given)
            y.backward(torch.sin(7 * x))
            gradients.append([y.detach(), given.grad, *(p.grad for p in one.parameters())])
        for mine, other in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_the_output_where_nothing_is_long_term_and_else_are_not() -> None:
    x = next(batches(3, C, 2)).requires_grad_()
    tensors = (x, *norm().parameters())

    def output(alpha: float, beta: float) -> Any:
        module = norm(alpha=alpha, beta=beta)
        return lambda x, *p: torch.func.functional_call(module, dict(zip(("weight", "bias"), p, strict=True)), (x,))

    assert torch.autograd.gradcheck(output(0.0, 0.0), tensors)
    assert not torch.autograd.gradcheck(output(0.7, 0.7), tensors, raise_exception=False)


def test_a_second_derivative_is_refused() -> None:
    x = next(batches(3, C)).requires_grad_()
    (back,) = torch.autograd.grad(norm()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        back.sum().backward()


@pytest.mark.parametrize("shape", [(4, C, 3, 2), (1, C)], ids=str)
def test_the_plain_average_is_that_of_all_values(shape: tuple[int, ...]) -> None:
    """With ``momentum=None``; a mean of the batches' variances would leave out how their means vary."""
    module = norm(momentum=None)
    data = list(batches(*shape, count=7))
    for x in data:
        module(x)
    values = torch.cat(data).movedim(1, 0).flatten(1)
    torch.testing.assert_close(module.running_mean, values.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.running_var, values.var(1, correction=0), rtol=1e-10, atol=1e-10)
    assert int(module.num_batches_tracked) == 7
    of_batches = torch.stack([x.movedim(1, 0).flatten(1).var(1, correction=0) for x in data]).mean(0)
    assert distance(of_batches, module.running_var) > 1e-3


def test_a_single_value_trains_where_batch_norm_refuses() -> None:
    x = next(batches(1, C))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(C).double()(x)
    y = norm()(x).detach()
    assert y.isfinite().all()
    assert float((y - norm().bias.detach()).abs().min()) > 1e-2  # and is not normalized to zero


def test_it_forgets_what_is_long_term() -> None:
    module = norm()
    for x in batches(3, C):
        module(x.requires_grad_()).square().sum().backward()
    assert module.mean_gradient.abs().min() > 0
    module.reset_running_stats()
    fresh = StreamingNorm(C, dtype=torch.float64)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in fresh.named_buffers())


# --- the swap ---------------------------------------------------------------------------------------------------------


def network(frozen: bool = False) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
    )
    randomize_(model, 2)
    if frozen:
        model[1].train = lambda mode=True: nn.BatchNorm2d.train(model[1], False)
    return model.double().eval()


X = torch.randn(4, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_in_evaluation_the_swap_is_exact_and_has_the_batch_norms_values() -> None:
    model = network()
    result = ns.convert(model, "streaming", example_inputs=X)
    assert result.check is not None
    assert {row.method for row in result.init.rows} == {"exact"}
    assert all("shares statistics between samples" in step.notes for step in result.plan.steps)
    new = result.model[1]
    assert type(new) is StreamingNorm2d
    assert isinstance(new, nn.BatchNorm2d)
    with torch.no_grad():
        assert distance(result.model(X), model(X)) < 1e-12
        for name in ("weight", "bias", "running_var"):
            assert torch.equal(getattr(new, name), getattr(model[1], name))
        torch.testing.assert_close(new.running_mean, model[1].running_mean - model[0].bias, rtol=0, atol=1e-15)
        new.running_var[2] *= 1.01
        assert distance(result.model(X), model(X)) > 1e-4


def test_without_what_is_long_term_it_trains_as_the_batch_norm_did() -> None:
    model = network()
    converted = ns.swap_norms(model, "streaming", alpha=0.0, beta=0.0)
    gradients = []
    for one in (model.train(), converted.train()):
        one(X).sin().sum().backward()
        gradients.append([one[4].weight.grad, one[0].weight.grad, one[1].weight.grad, one[3].bias.grad])
    for old, new in zip(*gradients, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-8, atol=1e-9)
    other = ns.swap_norms(network(), "streaming").train()
    other(X).sin().sum().backward()
    assert distance(other[0].weight.grad, gradients[0][1]) > 1e-2


def test_it_folds_into_convolutions_is_exported_and_comes_back_from_a_file(tmp_path: Path) -> None:
    converted = ns.swap_norms(network().float(), "streaming").train()
    converted(X.float()).sin().sum().backward()  # something is long-term
    converted.eval()
    folding = ns.fold_with_report(converted, example_inputs=X.float())
    assert not folding.left
    assert {type(m) for m in folding.model.modules()} <= {nn.Sequential, nn.Conv2d, nn.ReLU, nn.Identity}
    ns.export_onnx(folding.model, tmp_path / "m.onnx", example_inputs=(X.float(),))
    assert ns.verify(converted, tmp_path / "m.onnx", (X.float(),)).ok
    ns.save(converted, tmp_path / "m.safetensors")
    again = ns.load(tmp_path / "m.safetensors", model=network().float())
    found = again.state_dict()
    assert found["1.mean_gradient"].abs().max() > 0
    assert all(torch.equal(found[name], value) for name, value in converted.state_dict().items())


def test_training_continues_from_a_state_dict_as_if_there_had_been_no_stop() -> None:
    data = [torch.randn(1, 3, 9, 9, dtype=torch.float64) for _ in range(6)]

    def trained(model: nn.Module, batches: list[Tensor]) -> nn.Module:
        for x in batches:
            model.zero_grad()
            model(x).sin().sum().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 1e-2 * p.grad
        return model

    through = trained(ns.swap_norms(network(), "streaming").train(), data)
    halfway = trained(ns.swap_norms(network(), "streaming").train(), data[:3])
    resumed = ns.swap_norms(network(), "streaming").train()
    resumed.load_state_dict(halfway.state_dict())
    resumed = trained(resumed, data[3:])
    copied = trained(copy.deepcopy(halfway), data[3:])
    for name, value in through.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
        assert torch.equal(value, copied.state_dict()[name])


def test_frozen_norms_become_affines_and_synchronized_ones_say_that_they_are_not() -> None:
    frozen = ns.convert(network(frozen=True), "streaming", example_inputs=X)
    assert frozen.plan.steps[0].notes == ("frozen: an affine of each channel",)
    assert not isinstance(frozen.model[1], StreamingNorm)
    assert isinstance(frozen.model[3], StreamingNorm)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    (first, *_) = ns.plan(synchronized, "streaming").steps
    assert first.notes == ("shares statistics between samples, but not between processes",)


def test_its_statistics_are_estimated_anew_and_it_is_converted_again() -> None:
    converted = ns.swap_norms(network(), "streaming")
    assert {"1", "3", "5"} == {*ns.update_statistics(converted, X).updated}
    values = converted[0](X)
    torch.testing.assert_close(converted[1].running_mean, values.mean((0, 2, 3)), rtol=1e-10, atol=1e-10)
    plain = ns.swap_norms(converted, "none")
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in plain.modules())
    with torch.no_grad():
        assert distance(plain(X), converted(X)) < 1e-12


def test_what_chooses_without_batch_statistics_does_not_choose_it() -> None:
    assert "streaming" not in ns.recipes.Auto.defaults


@pytest.mark.parametrize("option", ["alpha", "beta"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_weights_of_a_mixture_are_between_0_and_1(option: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{option} must be between 0 and 1"):
        ns.plan(network(), "streaming", **{option: value})
