"""Norms, layers and heads that a forward chooses when it runs: whatever it chooses, the converted model is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import leaves, randomize_

import normswap as ns
from normswap.errors import NothingToConvertError
from normswap.graph import capture
from normswap.graph.choices import Choices
from normswap.runs.argument_values import other_ways

X = torch.randn(3, 4, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Domain(Enum):
    CLEAN = 0
    ADVERSARIAL = 1


class Chooser(nn.Module):
    """Two norms behind one layer, and a pair behind them that is always the same."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.bns = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))
        self.head = nn.Sequential(nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.ReLU())
        self.domain = 0

    def finish(self, x: Tensor, domain: int) -> Tensor:
        out: Tensor = self.head(self.bns[domain](self.conv(x)))
        return out


class ByInt(Chooser):
    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return self.finish(x, domain)


class ByRequiredInt(Chooser):
    def forward(self, x: Tensor, domain: int) -> Tensor:
        return self.finish(x, domain)


class ByEnum(Chooser):
    def forward(self, x: Tensor, domain: Domain = Domain.CLEAN) -> Tensor:
        return self.finish(x, domain.value)


class ByFlag(Chooser):
    def forward(self, x: Tensor, adversarial: bool = False) -> Tensor:
        return self.finish(x, int(adversarial))


class ByTwoArguments(Chooser):
    def forward(self, x: Tensor, task: int = 0, view: int = 0) -> Tensor:
        return self.finish(x, task & view)


class ByString(Chooser):
    def __init__(self) -> None:
        super().__init__()
        self.bns = nn.ModuleDict({"clean": nn.BatchNorm2d(6), "adversarial": nn.BatchNorm2d(6)})

    def forward(self, x: Tensor, domain: str = "clean") -> Tensor:
        return self.head(self.bns[domain](self.conv(x)))


class ByAttribute(Chooser):
    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x, self.domain)


class ByShape(Chooser):
    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x, x.shape[-1] % 2)


class ByCount(Chooser):
    def forward(self, *views: Tensor) -> Tensor:
        return self.finish(views[0], len(views) - 1)


class ByTheLengthOfAList(Chooser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = [0]

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x, len(self.seen) - 1)


class ByTraining(Chooser):
    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x, int(self.training))


class ByName(Chooser):
    def __init__(self) -> None:
        super().__init__()
        self.bns = nn.ModuleList()
        self.bn0, self.bn1 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(getattr(self, f"bn{self.domain}")(self.conv(x)))


class ByAnIf(ByName):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head(self.bn0(y) if self.domain == 0 else self.bn1(y))


class Selector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.domain, self.bns = 0, nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.bns[self.domain](x)


class ByASubmodule(Chooser):
    def __init__(self) -> None:
        super().__init__()
        self.bns = nn.ModuleList()
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3), Selector())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class PerTaskAndView(Chooser):
    def __init__(self) -> None:
        super().__init__()
        self.bns = nn.ModuleList(nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bns[self.domain][self.domain](self.conv(x)))


class OrNone(Chooser):
    """The other choice is no norm at all."""

    def __init__(self) -> None:
        super().__init__()
        self.bns = nn.ModuleDict({"bn": nn.BatchNorm2d(6), "none": nn.Identity()})

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bns["none" if self.domain else "bn"](self.conv(x)))


class OrSkipped(Chooser):
    """No other module stands there: only the argument's other value shows it."""

    def forward(self, x: Tensor, mode: str = "norm") -> Tensor:
        y = self.conv(x)
        return self.head(self.bns[0](y) if mode == "norm" else y)


class ChosenLayer(Chooser):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 6, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bns[0](self.convs[self.domain](x)))


class ReachedInto(Chooser):
    """The model itself calls a layer of a block in one of its ways, and goes on with another norm."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = nn.Sequential(), nn.BatchNorm2d(6)
        self.block.conv, self.block.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(self.block.conv(x)) if self.domain else self.block(x))


class Slimmable(nn.Conv2d):
    width = 6

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight[: self.width], self.bias[: self.width])


class PerWidth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.domain = Slimmable(4, 6, 3), 0
        self.bns = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(4)])

    def forward(self, x: Tensor) -> Tensor:
        self.conv.width = (6, 4)[self.domain]
        return self.bns[self.domain](self.conv(x))


def attribute(model: nn.Module, domain: int) -> Tensor:
    for module in model.modules():
        if hasattr(module, "domain"):
            module.domain = domain
    return model(X)


def in_mode(model: nn.Module, domain: int) -> Tensor:
    """The train flag of the model itself, with its norms in eval mode."""
    model.training = bool(domain)
    return model(X)


def length(model: nn.Module, domain: int) -> Tensor:
    model.seen = [0] * (domain + 1)
    return model(X)


CHOOSERS: dict[type[nn.Module], Callable[[nn.Module, int], Tensor]] = {
    ByInt: lambda m, d: m(X, d),
    ByRequiredInt: lambda m, d: m(X, d),
    ByEnum: lambda m, d: m(X, Domain(d)),
    ByFlag: lambda m, d: m(X, bool(d)),
    ByTwoArguments: lambda m, d: m(X, d, d),
    ByString: lambda m, d: m(X, ("clean", "adversarial")[d]),
    ByShape: lambda m, d: m(X[..., d:]),
    ByCount: lambda m, d: m(*[X] * (d + 1)),
    ByTraining: in_mode,
    ByTheLengthOfAList: length,
    OrSkipped: lambda m, d: m(X, ("norm", "plain")[d]),
    **dict.fromkeys(
        (ByAttribute, ByName, ByAnIf, ByASubmodule, PerTaskAndView, OrNone, ChosenLayer, ReachedInto, PerWidth),
        attribute,
    ),
}
NEEDS = {ByRequiredInt: 0}


def inputs_of(network: type[nn.Module], domain: int | None) -> tuple[Any, ...] | None:
    """Inputs that show one domain, or none."""
    if domain is None:
        return None
    return {
        ByInt: (X, domain),
        ByRequiredInt: (X, domain),
        ByEnum: (X, Domain(domain)),
        ByFlag: (X, bool(domain)),
        ByTwoArguments: (X, domain, domain),
        ByString: (X, ("clean", "adversarial")[domain]),
        ByShape: (X[..., domain:],),
        ByCount: (X,) * (domain + 1),
        OrSkipped: (X, ("norm", "plain")[domain]),
    }.get(network, (X,))


def error(found: nn.Module, expected: nn.Module, use: Callable[[nn.Module, int], Tensor], domain: int) -> float:
    with torch.no_grad():
        a, b = (leaves(use(model, domain))[0] for model in (found, expected))
    return float((a - b).abs().max())


def layers_of(plan: ns.Plan) -> dict[str, str | None]:
    return {step.site.norm: step.site.layer for step in plan.steps}


@pytest.mark.parametrize("shown", [None, 0, 1], ids=["", "first", "second"])
@pytest.mark.parametrize("recipe", ["none", "wn+mobn"])
@pytest.mark.parametrize("network", CHOOSERS)
def test_whatever_is_chosen_the_output_is_that_of_the_original(
    network: type[nn.Module], recipe: str, shown: int | None
) -> None:
    use, given = CHOOSERS[network], inputs_of(network, shown)
    model = randomize_(network().double(), 0).eval()
    result = ns.convert(model, recipe, example_inputs=given, check=False)
    folded = [ns.fold(model, example_inputs=given), ns.fold(result.model, example_inputs=given)]
    for found in (result.model, *folded):
        in_evaluation = found is not result.model and network is ByTraining  # of which a fold is
        for domain in (0,) if in_evaluation else (0, 1):
            assert error(found, model, use, domain) < 1e-12, domain
    chosen = {norm: layer for norm, layer in layers_of(result.plan).items() if not norm.startswith("head")}
    assert set(chosen.values()) <= {None}
    if "head.1" in layers_of(result.plan) and (given or network is not ByRequiredInt):
        assert layers_of(result.plan)["head.1"] == ("head.0" if given or network not in (ByShape, ByCount) else None)


@contextmanager
def blind() -> Iterator[None]:
    """Let nothing that no run calls stand in the way, and no other value of an argument be tried."""
    with (
        mock.patch.object(Choices, "_beside", return_value=None),
        mock.patch("normswap.graph.symbolic.other_ways", return_value=()),
        mock.patch("normswap.runs.calling.other_ways", return_value=()),
    ):
        yield


@pytest.mark.parametrize("network", [c for c in CHOOSERS if c not in (ByTraining, ByShape, ByCount, PerWidth)])
def test_without_the_look_at_what_no_run_calls_each_would_be_wrong(network: type[nn.Module]) -> None:
    model = randomize_(network().double(), 0).eval()
    with blind():
        found = ns.convert(model, "none", example_inputs=inputs_of(network, 0), check=False).model
    assert error(found, model, CHOOSERS[network], 0) < 1e-12
    assert error(found, model, CHOOSERS[network], 1) > 1e-3


def test_the_reason_names_the_module_that_may_be_called_instead() -> None:
    plan = ns.plan(ByAttribute(), "gn")
    reasons = {step.site.norm: step.site.reason for step in plan.steps}
    assert reasons["bns.0"] == ("bns.1 may be called instead of conv or bns.0: nothing that was traced or run calls it")
    assert reasons["bns.1"] == "no traced forward calls it"


# ---------------------------------------------------------------------------------- what must stay proven


class Unused(Chooser):
    """What no code mentions, what does not fit, and a whole block that may run instead of another."""

    def __init__(self) -> None:
        super().__init__()
        self.old = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
        self.dead, self.narrow = nn.BatchNorm2d(6), nn.BatchNorm2d(2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5)) for _ in range(2))
        self.bn, self.vectors = nn.BatchNorm2d(6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if self.domain == 2:
            y = self.narrow(y[:, :2])
        if self.domain == 3:
            y = self.vectors(y.mean((2, 3)))
        return self.blocks[self.domain](self.head(y))


class InTraining(Chooser):
    """Another norm that train mode alone calls, on something else."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.aux = nn.BatchNorm2d(6), nn.Sequential(nn.Conv2d(5, 6, 1), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Any:
        y = self.head(self.bn(self.conv(x)))
        return (y, self.aux(y)) if self.training else y


@pytest.mark.parametrize("given", [None, (X,)], ids=["", "inputs"])
def test_what_no_code_reaches_or_what_does_not_fit_takes_no_proof_away(given: Any) -> None:
    model = randomize_(Unused().double(), 0).eval()
    result = ns.convert(model, "none", example_inputs=given)
    proven = {s.site.norm: s.site.layer for s in result.plan.steps if s.site.proof == "proven"}
    assert proven == {"bn": "conv", "head.1": "head.0", "blocks.0.1": "blocks.0.0"}
    for domain in (0, 1):
        assert error(result.model, model, attribute, domain) < 1e-12


def test_what_train_mode_calls_is_no_choice_in_evaluation() -> None:
    model = randomize_(InTraining().double(), 0).eval()
    assert layers_of(ns.plan(model, "none")) == {
        "bn": "conv",
        "head.1": "head.0",
        "aux.1": "aux.0",
        "bns.0": None,
        "bns.1": None,
    }
    folded = ns.fold(model)
    assert type(folded.bn) is nn.Identity
    assert error(folded, model, attribute, 0) < 1e-12


@pytest.mark.parametrize("width", [7, 8])
def test_what_an_untraceable_block_may_call_is_a_choice_in_evaluation(width: int) -> None:
    """The trace of train mode shows that the block is called, and nothing of what it calls."""
    model = randomize_(nn.Sequential(ByShape(), nn.ReLU()).double(), 0).eval()
    folded = ns.fold(model, example_inputs=(F.pad(X, (0, width - 7)),))
    for x in (X, F.pad(X, (0, 1))):
        assert (folded(x) - model(x)).abs().max() < 1e-12


def test_other_values_of_an_argument_prove_the_pairs_that_only_they_call() -> None:
    class PerTask(Chooser):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)) for _ in range(3))

        def forward(self, x: Tensor, task: int = 0) -> Tensor:
            return self.head(self.blocks[task](x))

    steps = ns.plan(PerTask(), "gn").steps
    proven = {step.site.norm for step in steps if step.site.proof == "proven"}
    assert proven == {"blocks.0.1", "blocks.1.1", "blocks.2.1", "head.1"}


def test_a_chosen_head_takes_no_norm_up() -> None:
    class Heads(Chooser):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.heads = nn.BatchNorm2d(4), nn.ModuleList(nn.Conv2d(4, n, 1) for n in (3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.heads[self.domain](self.bn(x))

    model = randomize_(Heads().double(), 0).eval()
    for given in (None, (X,)):
        for found in (ns.fold(model, example_inputs=given), ns.convert(model, "none", example_inputs=given).model):
            for domain in (0, 1):
                assert error(found, model, attribute, domain) < 1e-12
    alone = randomize_(Heads().double(), 0).eval()
    alone.heads = alone.heads[:1]
    assert ns.plan(alone, "none").steps[0].site.readers == ("heads.0",)
    assert ns.plan(model, "none").steps[0].site.readers == ()


# -------------------------------------------------------------------------------------- records and arguments


class Crossed(nn.Module):
    """Which norm follows which layer is a matter of how many inputs there are, and all are called in each case."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
        self.p, self.q = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor, crossed: float = 0.0) -> Tensor:
        p, q = (self.q, self.p) if crossed > 0 else (self.p, self.q)
        y, z = self.a(x), self.b(x)
        return p(y) - q(z)


def test_a_record_that_contradicts_the_trace_wins() -> None:
    model = randomize_(Crossed().double(), 0).eval()
    assert layers_of(ns.plan(model, "none", example_inputs=(X,))) == {"p": "a", "q": "b"}
    found = capture(model, (X, 1.0))
    assert any(trace.recorded for trace in found.traces)
    assert not any(trace.recorded for trace in capture(model, (X,)).traces)
    result = ns.convert(model, "none", example_inputs=(X, 1.0))
    assert layers_of(result.plan) == {"p": None, "q": None}
    with torch.no_grad():
        for crossed in (0.0, 1.0):
            assert (result.model(X, crossed) - model(X, crossed)).abs().max() < 1e-12


def test_the_values_of_small_sets() -> None:
    class Takes(Chooser):
        def forward(
            self, x: Tensor, flag: bool = True, domain: Domain = Domain.CLEAN, depth: int = 1, eps: float = 1e-3
        ) -> Tensor:
            return x if depth > 4 else -x

    ways = other_ways(Takes(), {"flag": True, "domain": Domain.CLEAN, "depth": 1, "eps": 1e-3})
    assert ways[0] == {"flag": False}
    assert {way["depth"] for way in ways[1:]} == {0, 1, 3, 4, 5}
    assert {way["domain"] for way in ways[1:]} == set(Domain)
    assert len(ways) == 1 + 5 * 2 - 1


# ------------------------------------------------------------------------------------------- functional norms


class FunctionalByAttribute(nn.Module):
    def __init__(self, domains: int = 2) -> None:
        super().__init__()
        self.conv, self.domain = nn.Conv2d(4, 6, 3), 0
        for i in range(domains):
            self.register_buffer(f"mean{i}", torch.zeros(6))
            self.register_buffer(f"var{i}", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = getattr(self, f"mean{self.domain}"), getattr(self, f"var{self.domain}")
        return F.batch_norm(self.conv(x), mean, var, training=self.training)


class FunctionalBesideAChoice(FunctionalByAttribute):
    def __init__(self) -> None:
        super().__init__(1)
        self.heads = nn.ModuleList(nn.Conv2d(6, 3, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(self.conv(x), self.mean0, self.var0, training=self.training)
        return self.heads[self.domain](y)


@pytest.mark.parametrize("network", [FunctionalByAttribute, FunctionalBesideAChoice])
def test_a_forward_that_chooses_is_not_rewritten(network: type[nn.Module]) -> None:
    """What is rewritten is one trace, with the choice that it shows."""
    model = randomize_(network().double(), 0).eval()
    with pytest.raises(NothingToConvertError, match=r"may also use (mean1|heads\.1)"):
        ns.convert(model, "none")


def test_a_forward_that_chooses_nothing_is_rewritten() -> None:
    model = randomize_(FunctionalByAttribute(1).double(), 0).eval()
    result = ns.convert(model, "none", example_inputs=(X,))
    assert [step.site.layer for step in result.plan.steps] == ["conv"]
    assert error(result.model, model, attribute, 0) < 1e-12
