"""Forwards that ask for the class of a submodule: the norms that they mean stay, and no others."""

from __future__ import annotations

import collections.abc
import copy
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import BatchNorm1d
from torch.nn.modules.batchnorm import _BatchNorm
from zoo import randomize_

import normswap as ns
from normswap.errors import NothingToConvertError

generator = torch.Generator().manual_seed(0)
# As many positions as channels: a branch that is not taken gives no error, but something else.
VECTORS = torch.randn(5, 6, dtype=torch.float64, generator=generator)
SEQUENCES = torch.randn(5, 6, 6, dtype=torch.float64, generator=generator)


class Stack(nn.Module):
    """The single-cell models' stack: a BatchNorm of the last axis, whatever the rank."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6)])
        self.end = nn.Sequential(nn.Linear(6, 4), nn.Flatten(0, -2), nn.BatchNorm1d(4))

    def is_norm(self, layer: Any) -> bool:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.is_norm(layer) and x.dim() == 3:
                x = torch.cat([layer(part).unsqueeze(0) for part in x], 0)
            else:
                x = layer(x)
        return self.end(x)


class ByIsinstance(Stack):
    def is_norm(self, layer: Any) -> bool:
        return isinstance(layer, nn.BatchNorm1d)


class ByATuple(Stack):
    kinds = (nn.LayerNorm, _BatchNorm)

    def is_norm(self, layer: Any) -> bool:
        return isinstance(layer, self.kinds)


class ByItsBase(Stack):
    def is_norm(self, layer: Any) -> bool:
        return isinstance(layer, _BatchNorm)


class ByAUnion(Stack):
    def is_norm(self, layer: Any) -> bool:
        return isinstance(layer, BatchNorm1d | nn.BatchNorm2d)


class ByIssubclass(Stack):
    def is_norm(self, layer: Any) -> bool:
        return issubclass(layer.__class__, nn.modules.batchnorm._BatchNorm)


class ByType(Stack):
    def is_norm(self, layer: Any) -> bool:
        return type(layer) is BatchNorm1d


class ByTypeInATuple(Stack):
    def is_norm(self, layer: Any) -> bool:
        return type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d)


class ByClass(Stack):
    def is_norm(self, layer: Any) -> bool:
        return layer.__class__ == nn.BatchNorm1d


class ByClassName(Stack):
    def is_norm(self, layer: Any) -> bool:
        return layer.__class__.__name__ == "BatchNorm1d"


class ByPartOfTheName(Stack):
    def is_norm(self, layer: Any) -> bool:
        return "batchnorm" in type(layer).__name__.lower()


class ByGetName(Stack):
    def is_norm(self, layer: Any) -> bool:
        return layer._get_name().startswith("Batch")


class ByHasattr(Stack):
    def is_norm(self, layer: Any) -> bool:
        return hasattr(layer, "track_running_stats")


class ByGetattr(Stack):
    def is_norm(self, layer: Any) -> bool:
        return getattr(layer, "num_features", None) is not None


class ByAPattern(Stack):
    def is_norm(self, layer: Any) -> bool:
        match layer:
            case nn.BatchNorm1d():
                return True
        return False


PER_CLASS = {nn.BatchNorm1d: True}
PER_NAME = {"BatchNorm1d": True}


class ByATable(Stack):
    def is_norm(self, layer: Any) -> bool:
        return PER_CLASS.get(type(layer), False)


class ByATableOfNames(Stack):
    def is_norm(self, layer: Any) -> bool:
        return PER_NAME.get(type(layer).__name__, False)


def is_norm(layer: Any) -> bool:
    return isinstance(layer, nn.BatchNorm1d)


class ByAFunction(Stack):
    def is_norm(self, layer: Any) -> bool:
        return is_norm(layer)


tools = types.ModuleType("tools")
tools.is_norm = is_norm  # type: ignore[attr-defined]


class ByAFunctionElsewhere(Stack):
    def is_norm(self, layer: Any) -> bool:
        return tools.is_norm(layer)


class ByALambda(Stack):
    def is_norm(self, layer: Any) -> bool:
        return any(map(lambda one: isinstance(one, nn.BatchNorm1d), [layer]))  # noqa: C417


class ByALocalImport(Stack):
    def is_norm(self, layer: Any) -> bool:
        from torch.nn import BatchNorm1d as Norm

        return isinstance(layer, Norm)


class ByAnElement(Stack):
    """The code says which module is asked."""

    def is_norm(self, layer: Any) -> bool:
        return layer is self.layers[1] and isinstance(self.layers[1], nn.BatchNorm1d)


ASKING = (
    *(ByIsinstance, ByATuple, ByItsBase, ByAUnion, ByIssubclass, ByType, ByTypeInATuple, ByClass, ByClassName),
    *(ByPartOfTheName, ByGetName, ByHasattr, ByGetattr, ByAPattern, ByATable, ByATableOfNames, ByAFunction),
    *(ByAFunctionElsewhere, ByALambda, ByALocalImport, ByAnElement),
)


def network(kind: type[nn.Module]) -> nn.Module:
    return randomize_(kind().double(), 0).eval()


def error(found: nn.Module, expected: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((found(x) - expected(x)).abs().max())


@pytest.mark.parametrize("given", [None, VECTORS, SEQUENCES], ids=["", "vectors", "sequences"])
@pytest.mark.parametrize("kind", ASKING)
def test_a_norm_whose_class_is_asked_for_stays_and_both_ranks_are_right(
    kind: type[Stack], given: Tensor | None
) -> None:
    model, options = network(kind), {} if given is None else {"example_inputs": (given,)}
    result = ns.convert(model, "none", check=False, **options)
    assert type(result.model.layers[1]) is nn.BatchNorm1d
    (skip,) = [skip for skip in result.plan.skips if skip.name == "layers.1"]
    assert skip.code == "read-elsewhere"
    assert f"the forward of {kind.__name__} asks " in skip.reason
    assert [step.site.norm for step in result.plan.steps] == ["end.2"], "the other norm converts"
    for found in (result.model, ns.fold(model, **options)):
        assert type(found.layers[1]) is nn.BatchNorm1d
        assert max(error(found, model, x) for x in (VECTORS, SEQUENCES)) < 1e-12


@pytest.mark.parametrize("kind", [kind for kind in ASKING if kind is not ByAnElement])
def test_without_the_norm_the_branch_is_not_taken(kind: type[Stack]) -> None:
    """What a swap would do: in the same place a module of another class, silently wrong on sequences alone."""
    model = network(kind)
    assert model.is_norm(model.layers[1])
    assert not model.is_norm(nn.Sequential(model.layers[1]))
    for module in (nn.GroupNorm(1, 6), nn.Identity(), nn.Sequential(nn.Identity())):
        assert model.is_norm(module) is (kind is ByATuple and isinstance(module, nn.LayerNorm))
    swapped = copy.deepcopy(model)
    swapped.layers[1] = nn.Sequential(swapped.layers[1])
    assert error(swapped, model, VECTORS) == 0
    assert error(swapped, model, SEQUENCES) > 1e-2


# -------------------------------------------------------------------------------------------- no false alarms


class Harmless(nn.Module):
    """Questions that are answered the same afterwards, or that are not about a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()])
        self.block = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
        self.name = "bn"

    def forward(self, x: Any) -> Tensor:
        if isinstance(x, (list, tuple)):
            x = x[0]
        if not isinstance(x, Tensor) or type(x) is list or x.__class__.__name__ == "Sparse":
            raise TypeError(f"{self.__class__.__name__} takes tensors, not {type(x).__name__}, {self._get_name()}")
        for layer in self.layers:
            if isinstance(layer, (nn.Conv2d, nn.ReLU)) and hasattr(layer, "inplace"):
                x = x * 1
            if isinstance(layer, nn.Module) and isinstance(layer, collections.abc.Callable) and type(layer) is nn.ReLU:
                x = x + 0
            x = layer(x)
        if isinstance(self.block, nn.Sequential) and hasattr(self, "name") and getattr(self, "missing", None) is None:
            x = self.block(x)
        return x


@pytest.mark.parametrize("recipe", ["none", "gn", "ln"])
def test_other_questions_refuse_nothing(recipe: str) -> None:
    model = network(Harmless)
    x = torch.randn(3, 4, 7, 7, dtype=torch.float64)
    for options in ({}, {"example_inputs": (x,)}):
        result = ns.convert(model, recipe, **options)
        assert {step.site.norm for step in result.plan.steps} == {"layers.1", "block.1"}
        assert error(ns.fold(model, **options), model, x) < 1e-12


class AsksForOthers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def ask(self) -> bool:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y if self.ask() else self.other(y)


class ForGroupNorm(AsksForOthers):
    def ask(self) -> bool:
        return isinstance(self.norm, nn.GroupNorm)


class ForIdentity(AsksForOthers):
    def ask(self) -> bool:
        return isinstance(self.norm, nn.Identity)


@pytest.mark.parametrize("kind", [ForGroupNorm, ForIdentity])
def test_a_question_that_is_answered_yes_only_afterwards_counts_where_it_is_about_the_norm(kind: type) -> None:
    plan = ns.plan(network(kind), "gn")
    assert [step.site.norm for step in plan.steps] == ["other"]


def test_a_model_of_such_norms_alone_is_refused_in_words() -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) if isinstance(self.bn, nn.BatchNorm2d) else self.conv(x)

    with pytest.raises(NothingToConvertError, match="the forward of Only asks for its class"):
        ns.convert(network(Only), "gn")


class Criterion:
    def __init__(self) -> None:
        super().__init__()


def parsed(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """As a detector's parser of descriptions does."""
    return [nn.Sequential(layer) if isinstance(layer, nn.BatchNorm1d) else layer for layer in layers]


class AsksWhenMade(nn.Module):
    """Its forward makes an object, by whose constructor its own is no more called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(parsed([nn.Linear(6, 6), nn.BatchNorm1d(6)]))

    def forward(self, x: Tensor) -> Tensor:
        self.criterion = Criterion()
        Criterion.__init__(self.criterion)
        for layer in self.layers:
            x = layer(x)
        return x


class AsksAnew(AsksWhenMade):
    def forward(self, x: Tensor) -> Tensor:
        for layer in parsed(list(self.layers)):
            x = layer(x)
        return x


def test_what_a_constructor_asks_has_been_asked() -> None:
    model = AsksWhenMade().eval()
    assert [step.site.norm for step in ns.plan(model, "gn", example_inputs=VECTORS.float()).steps] == ["layers.1.0"]
    assert not ns.plan(AsksAnew().eval(), "gn", example_inputs=VECTORS.float()).steps  # the control
