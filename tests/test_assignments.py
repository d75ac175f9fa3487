"""What a conversion computes is a record: of values, computed without a change, and of where each comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from laws import BY_NAME, SMALL, changed, fingerprint, per_filter
from torch import Tensor, nn
from zoo import conv_bn, randomize_

import normswap as ns
from normswap.errors import NothingToConvertError
from normswap.graph import capture
from normswap.graph.dataflow import Dataflow
from normswap.initialization.absorb import Absorb, absorb
from normswap.initialization.base import Work
from normswap.nn import FilterLayout
from normswap.norms import Along, Assignment, LinearOf, NewValue, apply, of_present, tensor_in
from normswap.options import Options
from normswap.recipes import Recipe, make_recipe
from normswap.runs.data import Data
from normswap.runs.guard import copy_of
from normswap.stages.bound import BoundPlan, BoundStep, bind
from normswap.stages.find_sites import find_sites
from normswap.stages.planning import make_plan
from normswap.stages.rewriting import rewrite

VARIANTS: tuple[Recipe, ...] = (
    *(make_recipe(name) for name in ns.all_recipes()),
    make_recipe("gn", {"group_size": 2}),
    make_recipe("ln", {"axes": "channel"}),
    make_recipe("gn+ws", {"gain": False, "depthwise": True}),
    make_recipe("gn+ws", {"depthwise": True}),
    make_recipe("ws", {"gain": False, "depthwise": True}),
)
EACH_RECIPE = pytest.mark.parametrize(
    "recipe", VARIANTS, ids=lambda r: " ".join([r.name, *map(str, r.options().values())])
)


@dataclass(frozen=True)
class Case:
    """A model and what a recipe computes for it."""

    model: nn.Module
    bound: BoundPlan
    assignments: Mapping[str, Assignment]
    moments: Mapping[str, Any]
    data: Mapping[str, Any]
    steadied: Mapping[str, Any] = field(default_factory=dict)

    def of(self, model: nn.Module) -> Case:
        """The same for another model, with all that was measured on data as it was."""
        bound = bind(self.bound.plan, self.bound.recipe, model)
        found = {}
        for step in bound.steps:
            fqn = step.step.taken_up_by
            layer = None if fqn is None else model.get_submodule(fqn)
            measured = self.data.get(step.site.norm), self.steadied.get(step.site.norm)
            found[step.site.norm] = absorb(step, layer, self.moments, *measured).values
        return Case(model, bound, found, self.moments, self.data, self.steadied)


def computed(model: nn.Module, recipe: Recipe, x: Any, calibration: Any = None) -> Case:
    """Return the values that ``recipe`` gives ``model``, by the norm; nothing is rewritten."""
    data = Data.of(model, x, calibration)
    flow = Dataflow(capture(model, data.example))
    found = find_sites(flow, data.example)
    bound = make_plan(type(model).__name__, found, recipe, Options())
    work = Work(model, model, bound, Options(), data.example, data.enough)
    method = Absorb(work)
    values = {step.site.norm: method.values(step) for step in bound.steps}
    return Case(model, bound, values, method.moments, method.data, method.steadied)


# ----------------------------------------------------------------------------------------------------- pure, and whole

ENTRIES = (
    "conv_bn_relu_chain", "residual_block", "preactivation", "norm_first", "pair_called_twice", "aliases",
    "tied_gammas", "depthwise_separable", "transposed_conv2d_grouped", "linear_after_flatten", "conv3d", "zero_filters",
    "dead_channels", "no_affine", "frozen_batchnorm", "norm_drop_act_subclass", "norm_as_holder", "user_graph",
    "functional_and_module_mix", "functional_without_layer", "weight_norm", "bfloat16", "float64",
)  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_values_are_computed_without_a_change_and_applied_to_the_rewritten_model_they_are_the_conversion(
    name: str,
) -> None:
    """Before anything is rewritten all values are there; put into the bare rewritten model they give ``convert``'s."""
    entry = BY_NAME[name]
    for recipe in VARIANTS:
        model, x = entry.model(), entry.inputs()
        before = fingerprint(model)
        with SMALL:
            case = computed(model, recipe, x)
            assert not changed(before, fingerprint(model)), recipe
            try:
                expected = ns.convert(model, recipe, example_inputs=x, init="absorb", scale=False, check=False).model
            except NothingToConvertError:
                assert not case.assignments
                continue
        target = copy_of(model)
        for one in rewrite(target, case.bound):
            apply(case.assignments[one.name], one.tensor)
        assert not changed(before, fingerprint(model)), recipe
        assert not different(target, expected), recipe


def different(found: nn.Module, expected: nn.Module) -> set[str]:
    """The tensors of two models that are not bit for bit the same, and the names that only one has."""
    a, b = dict(found.state_dict()), dict(expected.state_dict())
    return {k for k in a.keys() | b.keys() if k not in a or k not in b or not torch.equal(a[k], b[k])}


def test_a_value_that_was_not_applied_and_one_that_is_off_by_a_bit_are_seen() -> None:
    entry = BY_NAME["conv_bn_relu_chain"]
    model = entry.model()
    expected = ns.convert(model, "gn+ws", example_inputs=entry.inputs(), init="absorb", scale=False).model
    case = computed(model, make_recipe("gn+ws"), entry.inputs())
    target = copy_of(model)
    first, second = rewrite(target, case.bound)
    apply(case.assignments[first.name], first.tensor)
    assert {name.split(".")[0] for name in different(target, expected)} == {"3", "4"}
    apply(case.assignments[second.name], second.tensor)
    assert not different(target, expected)
    with torch.no_grad():
        tensor_in(target, "3.bias")[0].mul_(1 + 2**-23)
    assert different(target, expected) == {"3.bias"}


def test_the_fingerprint_sees_a_computation_that_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of purity: values that were written into the original on the way would be noticed."""
    values = Absorb.values

    def writes(self: Absorb, step: BoundStep) -> Assignment:
        found = values(self, step)
        with torch.no_grad():
            self.work.source.get_submodule(step.site.layer).weight.mul_(1)
            self.work.source.get_submodule(step.site.layer).bias.add_(1e-6)
        return found

    monkeypatch.setattr(Absorb, "values", writes)
    model, x = randomize_(conv_bn(), 1), torch.randn(2, 4, 7, 7)
    before = fingerprint(model)
    computed(model, make_recipe("gn"), x)
    assert changed(before, fingerprint(model)) == {"tensor 0.bias"}


# ------------------------------------------------------------------------------------------ where a value comes from


def pair(layer: nn.Module, norm: type[nn.Module], channels: int) -> nn.Module:
    return nn.Sequential(layer, norm(channels), nn.ReLU())


def behind(norm: nn.Module, reader: nn.Module) -> nn.Module:
    return nn.Sequential(norm, reader)


class Recurrent(nn.Module):
    """A norm in front of a recurrent layer."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.bn, self.rnn = nn.BatchNorm1d(6), kind(6, 4, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.bn(x).transpose(1, 2))[0]


class Behind(nn.Module):
    """A linear layer whose channels are moved to where the norm has them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(5, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x).transpose(1, 2))


def image(channels: int = 4) -> Tensor:
    return torch.randn(24, channels, 7, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


KINDS: dict[str, tuple[Callable[[bool], nn.Module], Tensor]] = {
    "conv": (lambda bias: pair(nn.Conv2d(4, 6, 3, bias=bias), nn.BatchNorm2d, 6), image()),
    "grouped": (lambda bias: pair(nn.Conv2d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm2d, 6), image()),
    "depthwise": (lambda bias: pair(nn.Conv2d(4, 4, 3, groups=4, bias=bias), nn.BatchNorm2d, 4), image()),
    "transposed": (lambda bias: pair(nn.ConvTranspose2d(4, 6, 3, bias=bias), nn.BatchNorm2d, 6), image()),
    "grouped transposed": (
        lambda bias: pair(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm2d, 6), image(),
    ),
    "conv1d": (lambda bias: pair(nn.Conv1d(4, 6, 3, bias=bias), nn.BatchNorm1d, 6), image()[..., 0]),
    "linear": (lambda bias: pair(nn.Linear(4, 6, bias=bias), nn.BatchNorm1d, 6), image()[..., 0, 0]),
    "linear, moved": (lambda bias: Behind(), image(3)[:, :, :5, 0].contiguous()),
    "no affine": (
        lambda bias: nn.Sequential(nn.Conv2d(4, 6, 3, bias=bias), nn.BatchNorm2d(6, affine=False)), image(),
    ),
    "alone": (lambda bias: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()), image()),
    "behind: conv": (lambda bias: behind(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, bias=bias)), image()),
    "behind: grouped": (lambda bias: behind(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, bias=bias)), image()),
    "behind: linear": (lambda bias: behind(nn.BatchNorm1d(4), nn.Linear(4, 6, bias=bias)), image()[..., 0, 0]),
    "behind: LSTM": (lambda bias: Recurrent(nn.LSTM, bidirectional=True), image(6)[..., 0]),
    "behind: GRU": (lambda bias: Recurrent(nn.GRU, num_layers=2), image(6)[..., 0]),
}  # fmt: skip


def old_tensors(case: Case, step: BoundStep) -> dict[str, Tensor]:
    """The old parameters of a step's parts, as terms call them: those that there are."""
    site, model = step.site, case.model
    modules = {"norm": site.norm, "layer": site.layer, "reader": step.step.reader}
    return {
        f"{part}.{name}": parameter
        for part, fqn in modules.items()
        if fqn is not None
        for name, parameter in model.get_submodule(fqn)._parameters.items()
        if parameter is not None
    }


def contribution(case: Case, step: BoundStep, name: str, term: LinearOf, change: Tensor) -> Tensor:
    """``factor_c · change_c``, written anew: along what the old parameter gives, or what it reads."""
    values = case.assignments[step.site.norm]
    shape = values[name].value.shape
    if term.factor is None and term.along is Along.VALUES:
        return change
    if term.factor is None:
        term = dataclasses.replace(term, factor=torch.ones(step.site.num_features, dtype=torch.float64))
    if term.along in (Along.DIRECTION, Along.SPREAD, Along.MEAN):
        layer = case.model.get_submodule(step.site.layer)
        old = FilterLayout.of(layer).flatten(stored_filters(case, step)[0])
        rows = FilterLayout.of(layer).flatten(change)
        if term.along is Along.MEAN:
            return (term.factor * rows.mean(1)).view(shape)
        old = old - old.mean(1, keepdim=True) if term.along is Along.SPREAD else old
        return (term.factor * (rows * old).sum(1) / old.norm(dim=1)).view(shape)
    if term.along is Along.FILTERS:
        change, term = values[name].value, dataclasses.replace(term, factor=term.factor * change)
    elif change.ndim == 1:
        return (change * term.factor).view(shape)
    if not term.over_inputs:
        layer = case.model.get_submodule(step.site.layer)
        return change * per_filter(layer, term.factor, change)
    reader = case.model.get_submodule(step.step.reader)
    groups = getattr(reader, "groups", 1)
    rows = term.factor.view(groups, 1, -1).expand(-1, change.shape[0] // groups, -1).reshape(change.shape[:2])
    return change * rows.view(*change.shape[:2], *(1,) * (change.ndim - 2))


def stored_filters(case: Case, step: BoundStep) -> tuple[Tensor, list[LinearOf]]:
    """The filters that a reparameterized layer stores, and how they follow the old weight."""
    for new in case.assignments[step.site.norm].values():
        if terms := [t for t in new.terms if t.old == "layer.weight" and t.along is Along.VALUES]:
            return new.value, terms
    raise AssertionError("no filters are stored")


def zero_sum(layer: nn.Module, change: Tensor) -> Tensor:
    """The change without each filter's mean."""
    layout = FilterLayout.of(layer)
    rows = layout.flatten(change)
    return layout.unflatten(rows - rows.mean(1, keepdim=True), change)


def across(layer: nn.Module, values: Tensor, along: Tensor) -> Tensor:
    """What of each filter of ``values`` is at right angles to that of ``along``."""
    layout = FilterLayout.of(layer)
    rows, unit = layout.flatten(values), layout.flatten(along)
    unit = unit / unit.norm(dim=1, keepdim=True)
    return layout.unflatten(rows - (rows * unit).sum(1, keepdim=True) * unit, values)


Broken = Callable[[LinearOf], LinearOf]


def errors(kind: str, bias: bool, recipe: Recipe, broken: Broken = lambda term: term) -> Iterator[tuple[str, float]]:
    """Yield for each term what it says, and how far a small change of the old parameter is from it.

    A stored filter of a form that does not keep it whole is compared in what counts: where the weight's mean is
    lost, for changes that have none; where a filter's length is free and was chosen, at right angles to the filter.
    """
    make, x = KINDS[kind]

    def model() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(4)
            return randomize_(make(bias), 4).double()

    case = computed(model(), recipe, x, calibration=x)
    for step in case.bound.steps:
        olds = old_tensors(case, step)
        for name, new in case.assignments[step.site.norm].items():
            assert len({term.old for term in new.terms}) == len(new.terms), "one term for each old parameter"
            for term in new.terms:
                assert term.old in olds, f"{name}: there is no {term.old}"
                yield f"{name} of {term.old}", error(model, case, step, name, broken(term))


def error(model: Callable[[], nn.Module], case: Case, step: BoundStep, name: str, term: LinearOf) -> float:
    """How far the change of the new value ``name`` is from the term's, relative to that."""
    old = old_tensors(case, step)[term.old]
    change = 1e-5 * torch.randn(old.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    stored = name.startswith("layer.parametrizations") and term.old == "layer.weight"
    if stored and step.weight.centres:
        change = zero_sum(case.model.get_submodule(step.site.layer or ""), change)
    moved = []
    for sign in (1, -1):
        other = model()
        with torch.no_grad():
            old_tensors(Case(other, case.bound, {}, {}, {}), step)[term.old].add_(sign * change)
        moved.append(case.of(other).assignments[step.site.norm][name].value)
    found, expected = (moved[0] - moved[1]) / 2, contribution(case, step, name, term, change)
    if stored and step.weight.free_length and term.factor is not None and term.along is Along.VALUES:
        layer, new = case.model.get_submodule(step.site.layer or ""), case.assignments[step.site.norm][name].value
        found, expected = (across(layer, value, new) for value in (found, expected))
    if term.along is Along.SPREAD:  # a filter that was stretched to the mean length would be stretched otherwise
        _, (stretch,) = stored_filters(case, step)
        assert stretch.factor is not None
        whole = stretch.factor == 1
        found, expected = found[whole], expected[whole]
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_term_is_what_a_small_change_of_the_old_parameter_does(kind: str, bias: bool) -> None:
    seen = 0
    for recipe in VARIANTS:
        for what, off in errors(kind, bias, recipe):
            assert off < 1e-6, f"{recipe}: {what}"
            seen += 1
    assert seen > (4 if kind == "no affine" else 10)


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [("conv", "none"), ("grouped transposed", "mobn"), ("conv", "gn"), ("conv", "gn+aws"), ("behind: grouped", "none")],
)
def test_a_wrong_factor_a_missing_one_and_the_wrong_channels_are_seen(kind: str, recipe: str) -> None:
    def scaled(term: LinearOf) -> LinearOf:
        return dataclasses.replace(term, factor=None if term.factor is None else term.factor * (1 + 1e-4))

    def bare(term: LinearOf) -> LinearOf:
        return dataclasses.replace(term, factor=None)

    def turned(term: LinearOf) -> LinearOf:
        return dataclasses.replace(term, factor=None if term.factor is None else term.factor.roll(1))

    if recipe == "gn+aws":  # its factor is 1 or the free length's: another length is no fault, another direction is
        weights = [off for what, off in errors(kind, True, make_recipe(recipe), scaled) if "original0" in what]
        assert max(weights) > 1e-6
        return
    for broken in (scaled, bare, turned):
        assert max(off for _, off in errors(kind, True, make_recipe(recipe), broken)) > 1e-6, broken


def test_all_kinds_of_terms_have_been_looked_at() -> None:
    """Old parameters of the layer, the norm and the reader, along outputs and along inputs."""
    seen = set()
    for kind in ("conv", "alone", "behind: conv", "behind: LSTM"):
        make, x = KINDS[kind]
        for recipe in VARIANTS:
            case = computed(randomize_(make(True), 4).double(), recipe, x, calibration=x)
            for values in case.assignments.values():
                seen |= {(term.old, term.over_inputs) for new in values.values() for term in new.terms}
    assert seen >= {
        ("layer.weight", False),
        ("layer.bias", False),
        ("norm.weight", False),
        ("norm.bias", False),
        ("reader.weight", True),
        ("reader.bias", False),
        ("reader.weight_ih_l0", True),
        ("reader.bias_ih_l0_reverse", False),
    }


def test_terms_of_parameters_that_are_not_there_are_left_out() -> None:
    terms = (LinearOf("layer.weight"), LinearOf("layer.bias"))
    assert of_present(terms, {"layer.weight"}) == terms[:1]
    without = computed(
        nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False)).double().eval(),
        make_recipe("none"),
        image(),
    )
    (values,) = without.assignments.values()
    assert {term.old for new in values.values() for term in new.terms} == {"layer.weight"}


def test_applying_writes_the_values_in_the_parameters_own_type() -> None:
    layer = nn.Linear(2, 2, bias=True).bfloat16()
    new = NewValue(torch.tensor([1 / 3, 2.0], dtype=torch.float64))
    before = layer.bias
    apply({"bias": new}, lambda name: tensor_in(layer, name))
    assert layer.bias is before
    assert torch.equal(layer.bias, new.value.bfloat16())
    with pytest.raises(AssertionError, match="there is no tensor gamma"):
        apply({"gamma": new}, lambda name: tensor_in(layer, name))
