"""Uses of a layer's output or weight that are in no call of the traced forward: nothing may be absorbed there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import leaves, randomize_

import normswap as ns
from normswap.errors import NothingToConvertError, VerificationError

X = torch.randn(3, 4, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        self.head, self.last = nn.Sequential(nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5)), nn.Conv2d(5, 2, 1)
        self.kept: Any = None
        self.outputs: list[Tensor] = []
        self.weights = [self.conv.weight]

    def forward(self, x: Tensor) -> Any:
        return self.finish(self.bn(self.conv(x)))

    def finish(self, x: Tensor) -> Tensor:
        return self.last(self.head(x.relu()))


class KeepsTheOutput(Pair):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.conv(x)
        return self.finish(self.bn(self.kept))


class AppendsTheOutput(Pair):
    def forward(self, x: Tensor) -> Tensor:
        self.outputs.clear()
        self.outputs.append(self.conv(x))
        return self.finish(self.bn(self.outputs[0]))


class WeightInAList(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.weights[0].norm())


class WeightFromTheTable(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.conv._parameters["weight"].data.norm())


class FirstParameter(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + next(self.conv.parameters()).sum()


class Flag(Pair):
    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        y = self.conv(x)
        return y if raw else self.finish(self.bn(y))


class KeywordFlag(Pair):
    def forward(self, x: Tensor, *, features: bool = True) -> Any:
        y = self.conv(x)
        z = self.finish(self.bn(y))
        return (z, y) if features else z


HIDDEN: tuple[tuple[type[Pair], Callable[[Any], Any]], ...] = (
    (KeepsTheOutput, lambda m: (m(X), m.kept)),
    (AppendsTheOutput, lambda m: (m(X), m.outputs[0])),
    (WeightInAList, lambda m: m(X)),
    (WeightFromTheTable, lambda m: m(X)),
    (FirstParameter, lambda m: m(X)),
    (Flag, lambda m: m(X, raw=True)),
    (Flag, lambda m: m(X)),
    (KeywordFlag, lambda m: m(X)),
    (KeywordFlag, lambda m: m(X, features=False)),
)


def error(found: nn.Module, expected: nn.Module, use: Callable[[Any], Any]) -> float:
    with torch.no_grad():
        pairs = list(zip(leaves(use(found)), leaves(use(expected)), strict=True))
    assert pairs
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(("network", "use"), HIDDEN)
@pytest.mark.parametrize("given", [None, (X,)], ids=["", "inputs"])
def test_a_hidden_use_is_seen_and_nothing_absorbed_there(
    network: type[Pair], use: Callable[[Any], Any], given: Any
) -> None:
    model = randomize_(network().double(), 0)
    result = ns.convert(model, "none", example_inputs=given, check=False)
    layers = {step.site.norm: step.site.layer for step in result.plan.steps}
    assert layers == {"bn": None, "head.1": "head.0"}, "the other pair is as it was"
    assert error(result.model, model, use) < 1e-12
    assert error(ns.fold(model, example_inputs=given), model, use) < 1e-12


def test_without_a_hidden_use_both_pairs_are_absorbed_and_the_output_of_the_layer_moves() -> None:
    model = randomize_(Pair().double(), 0)
    result = ns.convert(model, "none", check=False)
    assert [step.site.layer for step in result.plan.steps] == ["conv", "head.0"]
    assert error(result.model, model, lambda m: m(X)) < 1e-12
    assert error(result.model, model, lambda m: m.conv(X)) > 1e-2


def test_asking_a_parameter_for_its_type_is_no_read() -> None:
    class Casts(Pair):
        def forward(self, x: Tensor) -> Tensor:
            first = next(self.parameters())
            return super().forward(x.to(first.dtype).to(first.device)) * (first.ndim + first.shape[0] + first.numel())

    plan = ns.plan(Casts(), "none")
    assert [step.site.layer for step in plan.steps] == ["conv", "head.0"]


def test_a_functional_norm_beside_a_direct_read_is_not_rewritten() -> None:
    """What is computed from a tensor that no attribute gave would be a constant of the new forward."""

    class Functional(Pair):
        def forward(self, x: Tensor) -> Tensor:
            bn = self.bn
            y = nn.functional.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias)
            return self.finish(y) * self.weights[0].norm()

    model = randomize_(Functional().double(), 0)
    for given in (None, (X,)):
        result = ns.convert(model, "none", example_inputs=given)
        (skip,) = (skip for skip in result.plan.skips if skip.what == "norm")
        assert (skip.name, skip.code) == ("bn", "functional-norm")
        assert "reads conv.weight past the module's attributes" in skip.reason
        assert [step.site.norm for step in result.plan.steps] == ["head.1"]
        assert error(result.model, model, lambda m: m(X)) < 1e-12


class UntracedFlag(Pair):
    """No trace shows what the flag does, and no run by its default."""

    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        y = self.finish(self.bn(self.conv(x))) if branches(x) else x
        return y * self.conv(x).mean() if raw else y


@pytest.mark.parametrize("given", [None, (X,), {"x": X}], ids=["", "inputs", "keyword"])
def test_a_layer_that_a_flag_of_an_untraceable_forward_uses_is_left_as_it_is(given: Any) -> None:
    model = randomize_(UntracedFlag().double(), 0)
    result = ns.convert(model, "none", example_inputs=given, check=False)
    layers = {step.site.norm: step.site.layer for step in result.plan.steps}
    assert layers == {"bn": None, "head.1": None if given is None else "head.0"}
    for found in (result.model, ns.fold(model, example_inputs=given)):
        for raw in (False, True):
            assert error(found, model, lambda m, raw=raw: m(X, raw=raw)) < 1e-12


def test_a_flag_that_is_given_is_not_turned() -> None:
    """Who gives a flag says how the model is called."""
    model = randomize_(UntracedFlag().double(), 0)
    for given in ((X, False), {"x": X, "raw": False}):
        layers = [step.site.layer for step in ns.plan(model, "none", example_inputs=given).steps]
        assert layers == ["conv", "head.0"]


def branches(x: Tensor) -> bool:
    """A test that no trace passes and that is always true."""
    return bool(x.sum() > -1e9)


class ReadsAStatistic(Pair):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y + self.bn.running_mean.mean() if branches(x) else y


class ReadsByAVariable(Pair):
    def forward(self, x: Tensor) -> Any:
        y, bn = super().forward(x), self.bn
        return y * bn.weight.mean() if branches(x) else y


class ReadsInAMethod(Pair):
    def measure(self) -> Tensor:
        return self.bn.running_var.mean()

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * self.measure() if branches(x) else x


class ReadsInALambda(Pair):
    def forward(self, x: Tensor) -> Any:
        level = lambda: self.bn.bias.mean()  # noqa: E731
        return super().forward(x) + level() if branches(x) else x


class HasALevel(Pair):
    """Its own forward reads nothing."""

    @property
    def level(self) -> Tensor:
        return self.bn.running_var.mean()


class ReadsInABaseClass(ReadsAStatistic):
    def forward(self, x: Tensor) -> Any:
        return 2 * super().forward(x)


class Outer(nn.Module):
    """It calls a method of a module of its own that is not the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = HasALevel()

    def forward(self, x: Tensor) -> Any:
        return self.inner.finish(self.inner.bn(self.inner.conv(x))) * self.inner.level if branches(x) else x


class AsksForTheChannels(Pair):
    """The trace of this shows a number only."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * self.bn.num_features


class AsksForTheType(Pair):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).to(self.bn.weight.dtype)


class ReadsWhereNoInputComes(Pair):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if branches(x) else self.bn.running_mean


READING = (
    *(ReadsAStatistic, ReadsByAVariable, ReadsInAMethod, ReadsInALambda, ReadsInABaseClass),
    *(AsksForTheChannels, AsksForTheType, ReadsWhereNoInputComes),
)


@pytest.mark.parametrize("network", READING)
@pytest.mark.parametrize("recipe", ["none", "gn"])
@pytest.mark.parametrize("given", [None, (X,)], ids=["", "inputs"])
def test_a_norm_that_a_forward_reads_stays_and_the_others_convert(network: type[Pair], recipe: str, given: Any) -> None:
    model = randomize_(network().double(), 0)
    result = ns.convert(model, recipe, example_inputs=given, check=False)
    assert [step.site.norm for step in result.plan.steps] == ["head.1"]
    (skip,) = (skip for skip in result.plan.skips if skip.what == "norm")
    assert (skip.name, skip.code) == ("bn", "read-elsewhere")
    assert "reads" in skip.reason
    assert type(result.model.bn) is nn.BatchNorm2d
    for found in (ns.fold(model, example_inputs=given), result.model if recipe == "none" else model):
        assert error(found, model, lambda m: m(X)) < 1e-12


@pytest.mark.parametrize("given", [None, (X,)], ids=["", "inputs"])
def test_a_norm_that_a_method_reads_which_another_module_calls_stays(given: Any) -> None:
    model = randomize_(Outer().double(), 0)
    plan = ns.plan(model, "gn", example_inputs=given)
    assert [skip.name for skip in plan.skips if skip.what == "norm"] == ["inner.bn"]


def test_a_forward_that_reads_the_weight_of_a_layer_or_names_another_norm_keeps_no_norm_from_converting() -> None:
    class ReadsALayer(Pair):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y * self.last.weight.mean() if branches(x) else self.head[1](y)

    model = randomize_(ReadsALayer().double(), 0)
    for given in (None, (X,)):
        result = ns.convert(model, "none", example_inputs=given)
        assert {step.site.norm for step in result.plan.steps} == {"bn", "head.1"}
        assert error(result.model, model, lambda m: m(X)) < 1e-12


class ReadsSomeNorm(Pair):
    """Which norm, only a run shows."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y + [self.bn, self.last][0].running_mean.mean() if branches(x) else y


def test_a_read_of_no_name_keeps_every_norm_that_it_may_mean_unless_a_run_shows_which() -> None:
    model = randomize_(ReadsSomeNorm().double(), 0)
    with pytest.raises(NothingToConvertError, match=r"running_mean of a module, which may be .* give example_inputs="):
        ns.convert(model, "gn")
    (step,) = ns.plan(model, "gn", example_inputs=(X,)).steps
    assert step.site.norm == "head.1"


def test_a_read_of_no_name_keeps_no_norm_that_the_code_does_not_name() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.scales = Pair(), nn.ModuleList([nn.Conv2d(4, 4, 1)])

        def forward(self, x: Tensor) -> Any:
            return self.pair(x) * self.scales[0].weight.mean() if branches(x) else x

    assert {step.site.norm for step in ns.plan(Around(), "gn").steps} == {"pair.bn", "pair.head.1"}


class ReadsInDisguise(Pair):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y + getattr(self.bn, "_".join(("running", "mean"))).mean() if branches(x) else y


@pytest.mark.parametrize("recipe", ["none", "gn"])
def test_a_converted_model_that_does_not_run_is_an_error_that_says_so(recipe: str) -> None:
    model = randomize_(ReadsInDisguise().double(), 0)
    with pytest.raises(VerificationError, match="'running_mean'") as raised:
        ns.convert(model, recipe)
    assert raised.value.code == "does-not-run"
    assert "exclude" in raised.value.hint
    assert ns.convert(model, recipe, exclude=["bn"]).model(X).shape == model(X).shape
    with pytest.raises(AttributeError):
        ns.convert(model, recipe, check=False).model(X)


class WritesBetween(Pair):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        y[:, 0] = 0.5
        return self.finish(self.bn(y))


class WritesToAView(Pair):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        left = y[:, :2]
        left[:] += 1
        return self.finish(self.bn(y))


class WritesAfterwards(Pair):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        z = self.finish(self.bn(y.contiguous()))
        y[:] = 0
        return z + y.mean()


class WritesToTheNormsOutput(Pair):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        y[:, :1] += x.mean()
        return self.finish(y)


@pytest.mark.parametrize(
    ("network", "layer"),
    [(WritesBetween, None), (WritesToAView, None), (WritesAfterwards, None), (WritesToTheNormsOutput, "conv")],
)
def test_writing_to_a_value_is_traced_and_a_use_of_it(network: type[Pair], layer: str | None) -> None:
    model = randomize_(network().double(), 0)
    result = ns.convert(model, "none", check=False)
    assert {step.site.norm: step.site.layer for step in result.plan.steps} == {"bn": layer, "head.1": "head.0"}
    assert not [skip for skip in result.plan.skips if skip.what == "scope"]
    for found in (result.model, ns.fold(model)):
        assert error(found, model, lambda m: m(X)) < 1e-12


class WritingNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y[:, 0] = 0
        return y


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_norm_that_writes_to_its_output_goes_on_writing(device: str) -> None:
    with torch.device(device):
        model = nn.Sequential(nn.Conv2d(4, 6, 3), WritingNorm(6), nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5)).eval()
    plan = ns.plan(model, "gn")
    assert [step.site.norm for step in plan.steps] == ["1.norm", "3"]
    if device == "cpu":
        model = randomize_(model.double(), 0)
        for recipe in ("none", "wn+mobn"):
            assert error(ns.swap_norms(model, recipe), model, lambda m: m(X)) < 1e-12


def test_two_parameters_in_one_piece_of_memory_are_tied() -> None:
    """Each is a Parameter of its own: the new value of one would be the other's, too."""

    class SharedMemory(Pair):
        def __init__(self, share: bool) -> None:
            super().__init__()
            self.twin = nn.Conv2d(4, 6, 3)
            if share:
                self.twin.weight = nn.Parameter(self.conv.weight.data)

        def forward(self, x: Tensor) -> Tensor:
            return self.finish(self.bn(self.conv(x)) + self.twin(x))

    shared = randomize_(SharedMemory(True).double(), 0)
    shared.twin.weight.data = shared.conv.weight.data  # double() copied each by itself
    assert shared.twin.weight is not shared.conv.weight
    reasons = {skip.name: skip.reason for skip in ns.plan(shared, "wn+mobn").skips}
    assert "the weight of conv is tied to twin.weight" in reasons["conv"]
    before = shared(X)
    torch.testing.assert_close(ns.convert(shared, "wn+mobn").model(X), before)
    apart = ns.plan(randomize_(SharedMemory(False).double(), 0), "wn+mobn")
    assert [step.site.layer for step in apart.steps] == ["conv", "head.0"]


@pytest.mark.parametrize("name", ["bn", "again"])
def test_a_norm_is_chosen_by_each_of_its_names(name: str) -> None:
    class TwoNames(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.bn

    def chosen(**options: Any) -> list[str]:
        return [step.site.norm for step in ns.plan(TwoNames(), "gn", **options).steps]

    assert chosen(include=[name]) == ["bn"]
    assert chosen(exclude=[name]) == ["head.1"]
    assert chosen(include=["head.*"]) == ["head.1"]


# ------------------------------------------------------------------------- registered, and called from somewhere else


class Elsewhere(nn.Module):
    """Each norm is an attribute, and is called from what registers none."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.n, self.b, self.m = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        norms = [self.n, self.m]
        self.kept: Any = {
            "list": norms,
            "tuple": tuple(norms),
            "dict": dict(enumerate(norms)),
            "nested": [{0: (self.n,)}, {0: (self.m,)}],
            "methods": [norm.forward for norm in norms],
            "attribute": norms,
        }[how]
        if how == "attribute":
            self.__dict__["first"], self.__dict__["second"] = norms

    def norm(self, place: int) -> Any:
        if self.how == "attribute":
            return self.__dict__["second" if place else "first"]
        return self.kept[place][0][0] if self.how == "nested" else self.kept[place]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(1)(self.b(torch.relu(self.norm(0)(self.a(x)))))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("how", ["list", "tuple", "dict", "nested", "methods", "attribute"])
def test_a_norm_that_is_called_from_elsewhere_is_replaced_there(how: str, given: bool, inplace: bool) -> None:
    model = randomize_(Elsewhere(how).double(), 0).eval()
    expected = copy.deepcopy(model)
    for recipe in ("none", "mobn", "gn"):
        options: dict[str, Any] = {"example_inputs": X} if given else {}
        options |= {"group_size": 2} if recipe == "gn" else {}
        if how == "methods" and given:  # a run shows what a method that is called by itself does
            with pytest.raises(NothingToConvertError):
                ns.convert(model, recipe, **options)
            continue
        result = ns.convert(copy.deepcopy(model), recipe, check=False, inplace=inplace, **options)
        assert not any(isinstance(module, nn.BatchNorm2d) and module.affine is True and hasattr(module, "_buffers")
                       and "running_var" in module._buffers for module in reached(result.model))  # fmt: skip
        if recipe != "gn":
            assert error(result.model.eval(), expected, lambda m: m(X)) < 1e-12
        folded = ns.fold(result.model.eval())
        assert error(folded, result.model, lambda m: m(X)) < 1e-12
    folded = ns.fold(model)
    assert error(folded, expected, lambda m: m(X)) < 1e-12
    assert not [module for module in reached(folded) if isinstance(module, nn.BatchNorm2d)]


def reached(model: nn.Module) -> list[nn.Module]:
    """The modules that a run calls, wherever the model holds them."""
    found: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, _: found.append(module))
    try:
        model(X)
    finally:
        handle.remove()
    return found
