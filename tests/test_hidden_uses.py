"""Uses of a layer's output or weight that are in no call of the traced forward: nothing may be absorbed there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import leaves, randomize_

import normswap as ns

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
    with pytest.raises(ns.NormswapError, match=r"reads conv\.weight past the module's attributes"):
        ns.convert(model, "gn")
    assert ns.convert(model, "none", exclude=["bn"]).plan.steps
