"""Conditional BatchNorm: γ and β come from the sample's class, and stay whatever becomes of the norm."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar
from unittest.mock import ANY

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from laws import EXACT, INEXACT, distance
from torch import Tensor, nn

import normswap as ns
from normswap.errors import NormswapError

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


# --- folded at one class ----------------------------------------------------------------------------------------------


def at(model: nn.Module, k: int, z: Tensor, label: Tensor) -> Tensor:
    with torch.no_grad():
        return model(z, torch.full_like(label, k))


@EACH
@pytest.mark.parametrize("recipe", [None, "none", "wn+mobn"])
def test_at_one_class_it_folds_into_plain_layers(form: type[nn.Module], recipe: str | None) -> None:
    if recipe is None and form in (Linears, Derives):
        return  # a functional norm, and a norm's own class, which stay; see below
    model, (z, label) = generator(form), inputs(12)
    converted = model if recipe is None else ns.swap_norms(model, recipe, example_inputs=(z, label))
    for k in (0, 2):
        folding = ns.fold_with_report(converted, example_inputs=(z, label), condition={"label": k})
        assert not folding.left
        assert folding.check is not None
        assert folding.check.ok
        assert {type(m) for m in folding.model.children()} == {nn.Linear, nn.Conv2d}
        assert len(list(folding.model.parameters())) == 6  # of Linear, Conv2d and Conv2d
        with torch.no_grad():
            for size in (12, 1, 5):
                assert distance(folding.model(z[:size]), at(model, k, z, label)[:size]) <= 1e-12
            assert distance(folding.model(z), at(model, k + 1, z, label)) > 1e-2
            folding.model.conv.bias += 1e-6
            assert distance(folding.model(z), at(model, k, z, label)) > 1e-9
    assert model(z, label).shape == (12, 3, 3, 3)  # and the model is as it was


def test_at_one_class_it_is_exported_and_behind_another_norm_stands_an_affine(tmp_path: Path) -> None:
    model, (z, label) = generator(Holds).float(), inputs(12)
    z = z.float()
    normalized = ns.swap_norms(model, "gn", example_inputs=(z, label))
    folding = ns.fold_with_report(normalized, example_inputs={"z": z, "label": label}, condition={"label": 1})
    assert [type(m) for m in folding.model.children()] == [nn.Linear, nn.Conv2d, nn.Module, nn.Conv2d, nn.Conv2d]
    assert distance(folding.model(z).detach(), at(normalized, 1, z, label)) < 1e-6
    artifact = ns.export_onnx(folding.model, tmp_path / "one.onnx", example_inputs=(z,))
    assert [value.name for value in artifact.inputs] == ["z"]


class OfBytes(Holds):
    """Takes labels of any whole dtype."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return super().forward(x, label.long())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("index", [3, np.int64(3)])
def test_labels_and_a_class_may_be_of_any_whole_dtype(dtype: torch.dtype, index: Any) -> None:
    model, (z, label) = generator(OfBytes), inputs(12)
    folded = ns.fold(model, example_inputs=(z, label.to(dtype)), condition={"label": index})
    with torch.no_grad():
        assert distance(folded(z), at(model, 3, z, label)) <= 1e-12
        assert distance(folded(z), at(model, 2, z, label)) > 1e-2


class OfOne(Holds):
    """The class is one for the batch."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        gamma, beta = self.classes(label).chunk(2, -1)
        return gamma[..., None, None] * self.bn(x) + beta[..., None, None]


def test_a_class_may_be_one_for_all_samples() -> None:
    model, (z, _) = generator(OfOne), inputs(12)
    label = torch.tensor(3)
    folding = ns.fold_with_report(model, example_inputs=(z, label), condition={"label": 2})
    assert not folding.left
    with torch.no_grad():
        assert distance(folding.model(z), model(z, torch.tensor(2))) <= 1e-12
        assert distance(folding.model(z), model(z, label)) > 1e-2


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "xv": lambda x, v: x * v,
    "vx": lambda x, v: v * x,
    "x+v": lambda x, v: x + v,
    "v+x": lambda x, v: v + x,
    "x-v": lambda x, v: x - v,
    "v-x": lambda x, v: v - x,
    "x/v": lambda x, v: x / v,
    "v/x": lambda x, v: v / x,
}


class Chain(Holds):
    """One step on what another gives, each of both sides."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        gamma, beta = self.classes(label)[..., None, None].tanh().chunk(2, 1)
        return STEPS[self.second](STEPS[self.first](self.bn(x), 2 + gamma), 2 + beta)


def test_a_step_on_what_another_gives_keeps_its_sides() -> None:
    z, label = torch.rand(3, CHANNELS, 4, 4, dtype=torch.float64) + 1, torch.tensor([0, 1, 2])
    for first, second in product(STEPS, STEPS):
        torch.manual_seed(3)
        model = Chain(first, second).double().eval()
        expected = at(model, 2, z, label)
        folding = ns.fold_with_report(model, example_inputs=(z, label), condition={"label": 2})
        assert ("label" in {row.name for row in folding.left}) == ("v/x" in (first, second))
        with torch.no_grad():
            assert distance(folding.model(z), expected) <= 1e-12
        if second in ("x-v", "x/v"):
            model.second = second[::-1]
            assert distance(at(model, 2, z, label), expected) > 1e-2


class Mixed(Holds):
    """γ depends on the sample as well as on its class (Brock et al. 2019); β does not."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        gamma, beta = self.classes(label).chunk(2, 1)
        gamma = gamma + x.mean((2, 3))
        return gamma[..., None, None] * self.bn(x) + beta[..., None, None]


class Sized(Holds):
    """γ depends on the size of the map."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        gamma, beta = self.classes(label).chunk(2, 1)
        return (gamma * x.size(2))[..., None, None] * self.bn(x) + beta[..., None, None]


class InPlace(Holds):
    """γ is written to, and multiplied in place."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        gamma, beta = self.classes(label).chunk(2, 1)
        gamma = gamma.clone()
        gamma.mul_(2)
        out = self.bn(x) + beta[..., None, None]
        out *= gamma[..., None, None]
        return out


class WritesLater(Holds):
    """γ is written to after its use."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        gamma, beta = self.classes(label).chunk(2, 1)
        gamma = gamma.clone()[..., None, None]
        out = gamma * self.bn(x)
        gamma *= 2
        return out + gamma + beta[..., None, None]


class ByPosition(Holds):
    """γ depends on the position, too."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        gamma, beta = self.classes(label).chunk(2, 1)
        where = torch.arange(x.size(2), dtype=x.dtype).view(1, 1, -1, 1)
        return (gamma[..., None, None] * where) * self.bn(x) + beta[..., None, None]


@pytest.mark.parametrize("form", [Mixed, Sized, InPlace, WritesLater, ByPosition, Linears, Derives])
def test_what_is_no_affine_of_the_class_stays_and_is_right(form: type[nn.Module]) -> None:
    model, (z, label) = generator(form), inputs(12)
    folding = ns.fold_with_report(model, example_inputs=(z, label), condition={"label": 2})
    with torch.no_grad():
        for size in (12, 4):
            assert distance(folding.model(z[:size]), at(model, 2, z, label)[:size]) <= 1e-12
    if form in (Mixed, WritesLater, Linears):  # γ is added to what the sample gives; *= as a product is the same
        assert "label" not in {row.name for row in folding.left}
        return
    row = next(row for row in folding.left if row.name == "label")
    assert row.result == "computed in each call"
    assert row.reason == "what it gives to 'norm' is not one factor and one summand of each channel"


class Of(nn.Module):
    """A value of the class in front of a convolution, computed from its embedding and the map x."""

    def __init__(self, value: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.classes, self.value = nn.Conv2d(3, CHANNELS, 3), nn.Embedding(CLASSES, CHANNELS), value

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.conv(x) * self.value(self.classes(label), x)


def corners(e: Tensor, x: Tensor) -> Tensor:
    """Two values of each sample and half of the channels, enlarged to a map of all channels."""
    return F.interpolate(e.view(-1, 1, CHANNELS // 2, 2), size=(x.size(2) - 2, x.size(3) - 2))


SIZED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int, str]] = {
    "norm over the batch": (lambda e, x: F.normalize(e, dim=0)[..., None, None], 4, "depends on the size"),
    "norm over one": (lambda e, x: F.normalize(e, dim=0)[..., None, None], 1, "depends on the size"),
    "sum": (lambda e, x: (e * e.sum())[..., None, None], 4, "depends on the size"),
    "cumsum of one": (lambda e, x: e.cumsum(0)[..., None, None], 1, "depends on the size"),
    "deviation": (lambda e, x: (e + e.std(0, correction=0))[..., None, None], 4, ""),
    "mean": (lambda e, x: (e - e.mean(0) / 2)[..., None, None], 4, ""),
    "norm over the channels": (lambda e, x: F.normalize(e, dim=1)[..., None, None], 4, ""),
    "a map's size": (corners, 4, "depends on the size"),
    "sum of a map": (
        lambda e, x: e[..., None, None].expand(-1, -1, x.size(2), 1).sum((2, 3), keepdim=True),
        4,
        "depends on the size",
    ),
    "noise": (
        lambda e, x: (e + torch.randn_like(e).sum())[..., None, None],
        1,
        "differs with the data, or from call to call",
    ),
    "a fixed batch": (lambda e, x: e.view(4, CHANNELS, 1, 1), 4, "may depend on the batch's size"),
}


@pytest.mark.parametrize("what", SIZED)
def test_what_depends_on_a_size_is_no_affine_of_the_class(what: str) -> None:
    value, batch, why = SIZED[what]
    model, label = Of(value).double().eval(), torch.arange(batch) % CLASSES
    side = 3 if what == "a map's size" else 6  # a map of 1x1 has one corner
    x = torch.randn(batch, 3, side, side, dtype=torch.float64)
    folding = ns.fold_with_report(model, example_inputs=(x, label), condition={"label": 2})
    assert [row.reason for row in folding.left] == ([ANY] if why else [])
    assert all(why in row.reason and "what it gives to the Of" in row.reason for row in folding.left)
    if why:
        assert any(node.target is operator.mul for node in folding.model.graph.nodes)
    for size in [(4, 3, side, side), (2, 3, 7, 9)][: 1 if "fixed" in what else 2]:
        x, two = torch.randn(size, dtype=torch.float64), torch.full(size[:1], 2)
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            torch.manual_seed(3)
            found = folding.model(x)
            torch.manual_seed(3)
            assert distance(found, model(x, two)) <= 1e-12
            assert distance(found, model(x, two + 1)) > 1e-2


def written(e: Tensor, x: Tensor) -> Tensor:
    e.add_(x.mean())
    return e[..., None, None]


def written_behind_a_view(e: Tensor, x: Tensor) -> Tensor:
    view = e[..., None]
    e.add_(x.mean())
    return view[..., None]


def set_in_part(e: Tensor, x: Tensor) -> Tensor:
    e[:, 0] = x[0, 0, 0, 0]
    return e[..., None, None]


@pytest.mark.parametrize("value", [written, written_behind_a_view, set_in_part])
def test_what_data_was_written_to_is_no_affine_of_the_class(value: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, label = Of(value).double().eval(), torch.tensor([0, 1])
    example = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    folding = ns.fold_with_report(model, example_inputs=(example, label), condition={"label": 2})
    assert "label" in {row.name for row in folding.left}
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64) + 1
    with torch.no_grad():
        expected = model(x, torch.full_like(label, 2))
        assert distance(folding.model(x), expected) <= 1e-12
        at_once = Of(lambda e, _: value(e, example)).double().eval()  # as if the data were always the example's
        at_once.load_state_dict(model.state_dict())
        assert distance(at_once(x, torch.full_like(label, 2)), expected) > 1e-2


class Doubled(Holds):
    """γ is written to between two uses of one view of it."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        gamma = self.classes(label)[:, :CHANNELS]
        view = gamma[..., None, None]
        once = self.bn(x) * view
        gamma.mul_(2)
        return once * view


def test_a_use_has_what_is_written_before_it() -> None:
    model, (z, label) = generator(Doubled), inputs(12)
    folding = ns.fold_with_report(model, example_inputs=(z, label), condition={"label": 2})
    with torch.no_grad():
        assert distance(folding.model(z), at(model, 2, z, label)) <= 1e-12
        assert distance(folding.model(z), at(model, 1, z, label)) > 1e-3


class Seen(Holds):
    """The norm's output is written to in place, which a second name of it sees; the sum counts little."""

    small: float = 1e-6

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        gamma, beta = self.classes(label)[..., None, None].chunk(2, 1)
        gamma += 1
        out = self.bn(x)
        again = out
        out *= gamma
        out = out + 0
        out += beta
        return x + self.small * (out + again)


def test_an_operator_in_place_is_seen_by_other_names_of_its_tensor() -> None:
    model, (z, label) = generator(Seen), inputs(12)
    folding = ns.fold_with_report(model, example_inputs=(z, label), condition={"label": 2})
    assert [node.target for node in folding.model.graph.nodes if node.op == "call_function"].count(operator.imul) == 1
    assert "label" in {row.name for row in folding.left}
    with torch.no_grad():
        expected = at(model, 2, z, label)
        assert distance(folding.model(z), expected) <= 1e-12
        for node in folding.model.graph.nodes:
            node.target = operator.mul if node.target is operator.imul else node.target
        folding.model.recompile()
        assert 1e-12 < distance(folding.model(z), expected) < 1e-3, "what a check on outputs would let pass"


class Styled(nn.Module):
    """A map of one row for all samples, in front of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.classes = nn.Conv2d(3, CHANNELS, 3), nn.Embedding(CLASSES, CHANNELS)

    def forward(self, style: Tensor, x: Tensor, label: Tensor) -> Tensor:
        gamma = self.classes(label)[..., None, None]
        return torch.cat([self.conv(x) * gamma * style, gamma + 0 * x[:, :1, 2:, 2:]], 1)


@pytest.mark.parametrize("batch", [1, 4])
def test_what_is_one_for_all_samples_is_not_where_the_batch_is(batch: int) -> None:
    model, style = Styled().double().eval(), torch.randn(1, CHANNELS, 4, 4, dtype=torch.float64)
    example = (style, torch.randn(batch, 3, 6, 6, dtype=torch.float64), torch.arange(batch))
    folded = ns.fold(model, example_inputs=example, condition={"label": 2})
    assert not torch.equal(folded.conv.weight, model.conv.weight), "γ is part of it"
    for size in (1, 4, 3):
        x, two = torch.randn(size, 3, 6, 6, dtype=torch.float64), torch.full((size,), 2)
        with torch.no_grad():
            assert distance(folded(style, x), model(style, x, two)) <= 1e-12
            assert distance(folded(style, x), model(style, x, two + 1)) > 1e-2


class Gated(nn.Module):
    """A gate of one value for each class, on the steps of a sequence, with an argument of as many rows as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.norm, self.gate = nn.Linear(5, 6), nn.LayerNorm(6), nn.Embedding(CLASSES, 1)

    def forward(self, pairs: Tensor, x: Tensor, label: Tensor) -> Tensor:
        gate = self.gate(label)[:, None]
        return torch.cat([self.norm(self.line(x)) * gate, gate.expand(-1, x.size(1), -1)], 2)[:, pairs[0]]


def test_a_gate_on_a_sequence_is_none_of_its_channels_and_the_batch_is_that_of_the_samples() -> None:
    model, pairs = Gated().double().eval(), torch.tensor([[0, 2, 1], [1, 1, 2]])
    example = (pairs, torch.randn(2, 7, 5, dtype=torch.float64), torch.tensor([0, 1]))
    folding = ns.fold_with_report(model, example_inputs=example, condition={"label": 2})
    assert any(row.reason.endswith("or on that of a map or a sequence") for row in folding.left)
    for size in ((2, 7, 5), (5, 9, 5), (1, 3, 5)):
        x, two = torch.randn(size, dtype=torch.float64), torch.full(size[:1], 2)
        with torch.no_grad():
            assert distance(folding.model(pairs, x), model(pairs, x, two)) <= 1e-12
            assert distance(folding.model(pairs, x), model(pairs, x, two + 1)) > 1e-2


def test_an_example_without_samples_shows_nothing() -> None:
    model, (z, label) = generator(Holds), inputs(12)
    folding = ns.fold_with_report(model, example_inputs=(z[:0], label[:0]), condition={"label": 2})
    assert "label" in {row.name for row in folding.left}
    with torch.no_grad():
        assert distance(folding.model(z), at(model, 2, z, label)) <= 1e-12
        assert distance(folding.model(z), at(model, 1, z, label)) > 1e-2


class Optional(Generator):
    """Arguments with defaults, which the forward branches on without a test that a trace would notice."""

    def forward(
        self,
        z: Tensor,
        label: Tensor,
        skip: Tensor | None = None,
        scale: float = 1.0,
        act: str | None = None,
        sizes: tuple[int, ...] = (1, 1),
    ) -> Tensor:
        x = super().forward(z * scale, label)
        if skip is not None:
            x = torch.tanh(x) + skip
        if act is None:
            x = F.pad(x, sizes)
        return x

    WAYS: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"skip": None, "act": None},
        {"skip": torch.tensor(0.5)},
        {"act": "none"},
        {"scale": 2.0, "sizes": (0, 2, 2, 0)},
    )


@pytest.mark.parametrize("way", range(len(Optional.WAYS)))
def test_other_arguments_are_those_that_the_example_gives(way: int) -> None:
    model, (z, label) = Optional(Holds).double().eval(), inputs(6)
    more, two = Optional.WAYS[way], torch.full_like(label, 2)
    folding = ns.fold_with_report(model, example_inputs={"z": z, "label": label, **more}, condition={"label": 2})
    held = {"act": "held at 'none'", "sizes": "held at (0, 2, 2, 0)"}
    rows = {row.name: row.result for row in folding.rows}
    assert {name: rows.get(name) for name in held} == {name: held[name] if more.get(name) else None for name in held}
    folded = folding.model
    free = {key: value for key, value in more.items() if key in ("skip", "scale") and value is not None}
    with torch.no_grad():
        assert distance(folded(z, **free), model(z, two, **more)) <= 1e-12
        assert all(not torch.equal(model(z, two, **w), model(z, two, **more)) for w in Optional.WAYS[2:] if w != more)
    for key in more:  # no call takes a branch other than the example's
        with pytest.raises(TypeError, match=key):
            folded(z, **({k: v for k, v in free.items() if k != key} if key in free else {key: more[key]}))


def test_a_forward_of_the_instance_is_the_one_that_is_folded() -> None:
    model, (z, label) = Generator(Holds).double().eval(), inputs(6)
    usual, two = at(model, 2, z, label), torch.full_like(label, 2)
    model.forward = MethodType(lambda self, z, label: Generator.forward(self, -z, label), model)
    folded = ns.fold(model, example_inputs=(z, label), condition={"label": 2})
    with torch.no_grad():
        assert distance(folded(z), model(z, two)) <= 1e-12
        assert distance(folded(z), usual) > 1e-2


class Twice(Generator):
    """The norm is also called by itself, and what holds it cannot be traced."""

    def __init__(self, holder: type[nn.Module]) -> None:
        super().__init__(holder)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        x = self.conv(self.start(z).view(-1, CHANNELS, 3, 3))
        return self.end(F.relu(self.norm(x, label)) + self.norm.bn(x))


class Untraced(Holds):
    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return super().forward(x, label) if x.abs().sum() >= 0 else x


@pytest.mark.parametrize("holder", [Holds, Untraced])
def test_what_a_graph_and_a_module_call_both_has_its_parts_left(holder: type[nn.Module]) -> None:
    model, (z, label) = Twice(holder).double().eval(), inputs(6)
    model.norm.bn.running_mean.normal_()
    model.norm.bn.running_var.uniform_(0.5, 2)
    for recipe in ("wn+mobn", "mobn", "wn"):
        converted = ns.swap_norms(model, recipe, example_inputs=(z, label))
        folded = ns.fold(converted, example_inputs=(z, label), condition={"label": 2})
        expected = at(model, 2, z, label)
        with torch.no_grad():
            assert distance(folded(z), expected) <= 1e-12
            assert distance(folded(z), at(model, 1, z, label)) > 1e-3


class Branches(Generator):
    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return super().forward(z if label.sum() > 0 else -z, label)


class Nameless(Generator):
    def forward(self, z: Tensor, /, label: Tensor, *more: Any, **named: Any) -> Tensor:
        return super().forward(z, label)


class AnyNumber(Generator):
    def forward(self, z: Tensor, label: Tensor, *more: Any, **named: Any) -> Tensor:
        return super().forward(z * named.get("scale", 1), label)


def test_any_number_of_arguments_may_be_none() -> None:
    model, (z, label) = AnyNumber(Holds).double().eval(), inputs(6)
    folded = ns.fold(model, example_inputs=(z, label), condition={"label": 2})
    with torch.no_grad():
        assert distance(folded(z), at(model, 2, z, label)) <= 1e-12
        assert distance(folded(z), at(model, 1, z, label)) > 1e-2
    with pytest.raises(TypeError, match="scale"):
        folded(z, scale=2)


def hooked() -> nn.Module:
    model = generator(Holds)
    model.norm.register_forward_hook(lambda *_: None)
    return model


Z, LABEL = inputs(12)
REFUSED: dict[str, tuple[nn.Module, Any, Any, str]] = {
    "no inputs": (generator(Holds), None, {"label": 1}, "condition=.* needs inputs|needs inputs"),
    "another name": (generator(Holds), (Z, LABEL), {"y": 1}, "no 'y'"),
    "a vector": (generator(Holds), (Z, torch.eye(CLASSES)[LABEL]), {"label": 1}, "float32 of shape"),
    "a map": (generator(Maps), (Z, LABEL[:, None, None]), {"label": 1}, r"int64 of shape \(12, 1, 1\)"),
    "two": (generator(Holds), (Z, LABEL), {"label": 1, "z": 2}, "is no class"),
    "none": (generator(Holds), (Z, LABEL), {}, "is no class"),
    "below zero": (generator(Holds), (Z, LABEL), {"label": -1}, "is no class"),
    "no number": (generator(Holds), (Z, LABEL), {"label": "cat"}, "is no class"),
    "a word": (generator(Holds), (Z, LABEL), "label", "condition='label' is no class"),
    "a list": (generator(Holds), (Z, LABEL), ["label", 1], "is no class"),
    "a tensor": (generator(Holds), (Z, LABEL), torch.tensor(1), "is no class"),
    "no name": (generator(Holds), (Z, LABEL), {1: 1}, "is no class"),
    "more than a byte": (generator(Holds), (Z, LABEL.to(torch.uint8)), {"label": 300}, "300 is no class.*uint8"),
    "more than a number": (generator(Holds), (Z, LABEL), {"label": 2**70}, "is no class that 'label' can give"),
    "too large": (generator(Holds), (Z, LABEL), {"label": CLASSES}, "index out of range"),
    "a branch": (Branches(Holds).double().eval(), (Z, LABEL), {"label": 1}, "cannot be written as a graph"),
    "no name of an argument": (Nameless(Holds).double().eval(), (Z, LABEL), {"label": 1}, "without a name"),
    "more places": (AnyNumber(Holds).double().eval(), (Z, LABEL, 1), {"label": 1}, "any number"),
    "more names": (AnyNumber(Holds).double().eval(), {"z": Z, "label": LABEL, "scale": 1}, {"label": 1}, "any number"),
    "a hook": (hooked(), (Z, LABEL), {"label": 1}, "a forward hook is on 'norm'"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_held_at_one_class_is_refused(why: str) -> None:
    model, given, condition, message = REFUSED[why]
    with pytest.raises(NormswapError, match=message):
        ns.fold(model, example_inputs=given, condition=condition)
