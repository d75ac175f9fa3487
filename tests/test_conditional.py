"""Conditional BatchNorm: γ and β come from the sample's class, and stay whatever becomes of the norm."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from laws import EXACT, INEXACT, distance
from torch import Tensor, nn

import normswap as ns

CLASSES, CHANNELS = 4, 8
NORMS = {"bn", "norm", "stored_mean_norm"}


class Holds(nn.Module):
    """A norm without an affine, and one embedding of γ and β: the form of most class-conditional generators."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(CHANNELS, affine=False)
        self.classes = nn.Embedding(CLASSES, 2 * CHANNELS)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        gamma, beta = self.classes(label).chunk(2, 1)
        return gamma[..., None, None] * self.bn(x) + beta[..., None, None]

    def values(self) -> tuple[Tensor, Tensor]:
        """γ and β of each class. ``(classes, C)``"""
        gamma, beta = self.classes.weight.chunk(2, 1)
        return gamma, beta


class Linears(Holds):
    """Functional, γ = 1 + a linear map of the class's vector (Brock et al. 2019)."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.gain, self.shift = (nn.Linear(CLASSES, CHANNELS, bias=False) for _ in range(2))
        self.register_buffer("stored_mean", torch.zeros(CHANNELS))
        self.register_buffer("stored_var", torch.ones(CHANNELS))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        vector = F.one_hot(label, CLASSES).to(x.dtype)
        gain = (1 + self.gain(vector)).view(x.size(0), -1, 1, 1)
        out = F.batch_norm(x, self.stored_mean, self.stored_var, None, None, self.training, 0.1, 1e-5)
        return out * gain + self.shift(vector)[..., None, None]

    def values(self) -> tuple[Tensor, Tensor]:
        return 1 + self.gain.weight.T, self.shift.weight.T


class Derives(nn.BatchNorm2d):
    """A subclass of BatchNorm that is called with the labels."""

    def __init__(self) -> None:
        super().__init__(CHANNELS, affine=False)
        self.gammas, self.betas = nn.Embedding(CLASSES, CHANNELS), nn.Embedding(CLASSES, CHANNELS)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.gammas(label)[..., None, None] * super().forward(x) + self.betas(label)[..., None, None]

    def values(self) -> tuple[Tensor, Tensor]:
        return self.gammas.weight, self.betas.weight


class Maps(Holds):
    """γ and β of each position, from a map as large as the input (Park et al. 2019)."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.bn = nn.BatchNorm2d(CHANNELS, affine=False)
        self.gamma, self.beta = nn.Conv2d(CLASSES, CHANNELS, 1), nn.Conv2d(CLASSES, CHANNELS, 1)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        segments = F.one_hot(label, CLASSES).to(x.dtype)[..., None, None]
        segments = F.interpolate(segments, size=x.shape[2:])
        return self.bn(x) * (1 + self.gamma(segments)) + self.beta(segments)

    def values(self) -> tuple[Tensor, Tensor]:
        gamma, beta = (conv.weight.flatten(1).T + conv.bias for conv in (self.gamma, self.beta))
        return 1 + gamma, beta


class Generator(nn.Module):
    def __init__(self, form: type[nn.Module]) -> None:
        super().__init__()
        self.start = nn.Linear(6, CHANNELS * 9)
        self.conv, self.norm = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), form()
        self.end = nn.Conv2d(CHANNELS, 3, 3, padding=1)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return self.end(F.relu(self.norm(self.conv(self.start(z).view(-1, CHANNELS, 3, 3)), label)))


FORMS = (Holds, Linears, Derives, Maps)
EACH = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


def generator(form: type[nn.Module]) -> nn.Module:
    """A generator in float64 whose channels differ in size, and whose running statistics are those of its inputs."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        model = Generator(form).double()
        with torch.no_grad():
            model.conv.weight.mul_(torch.logspace(-1, 1, CHANNELS).view(-1, 1, 1, 1))
            for _ in range(60):
                model(*inputs(64))
    return model.eval()


def inputs(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 6, dtype=torch.float64), torch.arange(size) % CLASSES


def by_class(found: Tensor, expected: Tensor, label: Tensor) -> list[float]:
    """The error of each class by itself."""
    return [distance(found[label == k], expected[label == k]) for k in range(CLASSES)]


def embedded(model: nn.Module) -> dict[str, Tensor]:
    """What makes γ and β, by name within the conditional module."""
    return {n: p for n, p in model.get_submodule("norm").named_parameters() if not set(n.split(".")) & NORMS}


def formula(x: Tensor, label: Tensor, norm: nn.Module) -> np.ndarray[Any, Any]:
    """``y = γ_k (x − μ)/√(var + eps) + β_k``, k the sample's class (Dumoulin et al. 2017, de Vries et al. 2017)."""
    gamma, beta = (value.detach().numpy() for value in norm.values())
    own = dict(norm.named_buffers())
    mean, var = (next(v.numpy() for n, v in own.items() if n.endswith(end)) for end in ("mean", "var"))
    y = np.empty(x.shape)
    for n, k in enumerate(label.tolist()):
        for c in range(CHANNELS):
            y[n, c] = gamma[k, c] * (x[n, c].numpy() - mean[c]) / np.sqrt(var[c] + 1e-5) + beta[k, c]
    return y


@EACH
def test_the_forms_compute_the_formula(form: type[nn.Module]) -> None:
    model, (z, label) = generator(form), inputs(12)
    with torch.no_grad():
        x = model.conv(model.start(z).view(-1, CHANNELS, 3, 3))
        y = model.norm(x, label).numpy()
    assert np.abs(y - formula(x, label, model.norm)).max() <= 1e-12
    assert np.abs(y - formula(x, label.flip(0), model.norm)).max() > 0.1


@EACH
def test_an_exact_recipe_is_exact_for_every_class(form: type[nn.Module]) -> None:
    model, (z, label) = generator(form), inputs(12)
    with torch.no_grad():
        expected = model(z, label)
        for recipe in EXACT:
            for given in (None, (z, label)):
                result = ns.convert(model, recipe, example_inputs=given)
                (step,) = result.plan.steps
                assert step.site.layer == "conv", "the conditioning's reads of a size are no other use of the layer"
                folded = ns.fold(result.model, example_inputs=(z, label))
                for found in (result.model, folded):
                    assert max(by_class(found(z, label), expected, label)) <= 1e-12
                assert all(torch.equal(value, embedded(model)[name]) for name, value in embedded(folded).items())


def test_a_class_that_is_wrong_is_seen_in_that_class() -> None:
    model, (z, label) = generator(Holds), inputs(12)
    converted = ns.swap_norms(model, "wn", example_inputs=(z, label))
    with torch.no_grad():
        converted.norm.classes.weight[2, 0] += 1e-6
        errors = by_class(converted(z, label), model(z, label), label)
    assert errors[2] > 1e-8
    assert max(errors[:2] + errors[3:]) <= 1e-12


@EACH
def test_other_recipes_keep_what_the_classes_have_learnt(form: type[nn.Module]) -> None:
    """γ(y) and β(y) are the original's; with data each class is nearer to the original than under a fresh norm."""
    model, (z, label) = generator(form), inputs(48)
    data = [inputs(96)]
    for recipe in INEXACT if form is Holds else ("gn+ws",):
        fresh = ns.swap_norms(model, recipe, init="fresh", example_inputs=(z, label))
        for found in (ns.swap_norms(model, recipe), ns.swap_norms(model, recipe, calibration=data)):
            assert embedded(found).keys() == embedded(model).keys()
            assert all(torch.equal(value, embedded(model)[name]) for name, value in embedded(found).items())
        with torch.no_grad():
            expected = model(z, label)
            errors = by_class(found(z, label), expected, label)
            assert all(a < b for a, b in zip(errors, by_class(fresh(z, label), expected, label), strict=True))


def test_training_after_a_swap_trains_the_classes() -> None:
    model, (z, label) = generator(Holds), inputs(12)
    converted = copy.deepcopy(ns.swap_norms(model, "gn", example_inputs=(z, label))).train()
    converted(z, label).square().mean().backward()
    assert bool(converted.norm.classes.weight.grad.bool().any(1).all())
