"""BatchNorm subclasses that move axes, or do anything else, around ``super().forward`` convert: the graph shows it all.

The networks take as many positions as channels, so that whoever takes one for the other is wrong, and does not crash.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from last_axis import (
    SPELLINGS,
    Around,
    AroundFlat,
    Derived,
    Flattened,
    Moved,
    Permuted,
    Reshaped,
    Transposed,
    WithAttribute,
)  # fmt: skip
from torch import Tensor, nn

import normswap as ns
from normswap.errors import NothingToConvertError
from normswap.graph.opening import opened_form

TOKENS = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


MOVED = [Transposed, Permuted, Moved, Derived, WithAttribute]


class Network(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 8), norm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x))))


def network(norm: Callable[[int], nn.Module], kind: Any = Network) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = kind(norm)
    return zoo.randomize_(model, 0).double().eval()


def distance(a: nn.Module, b: nn.Module, x: Tensor = TOKENS) -> float:
    with torch.no_grad():
        return float((a(x) - b(x)).abs().max())


def wrong_axis(model: nn.Module) -> nn.Module:
    """The same network with a plain BatchNorm, which normalizes the positions."""
    other = copy.deepcopy(model)
    plain = nn.BatchNorm1d(8).double().eval()
    plain.load_state_dict(model.norm.state_dict(), strict=False)
    other.norm = plain
    return other


@pytest.mark.parametrize("given", [False, True], ids=["bare", "given"])
@pytest.mark.parametrize("recipe", ["wn+mobn", "none", "wn", "mobn"])
@pytest.mark.parametrize("norm", SPELLINGS)
def test_a_subclass_over_the_last_axis_keeps_its_function(
    norm: type[nn.Module], recipe: str, given: bool
) -> None:  # fmt: skip
    model = network(norm)
    options = {"example_inputs": TOKENS} if given else {}
    result = ns.convert(model, recipe, **options)
    (step,) = result.plan.steps
    assert step.site.norm == "norm.norm"
    shown = given or norm is not Moved  # movedim(-1, 1) takes two axes as well
    assert step.site.layer == ("a" if norm in MOVED and shown else None)
    assert distance(result.model, model) < 1e-12
    assert distance(wrong_axis(model), model) > 1e-2  # what a mistaken axis would give
    folded = ns.fold(result.model, **options)
    assert distance(folded, model) < 1e-12
    if given:  # which show the rank where the graph does not
        assert not any(type(module).__module__.startswith("normswap") for module in folded.modules())
    folded.b.bias.data[0] += 1
    assert distance(folded, model) > 1e-2  # negative control
    assert type(model.norm) is norm  # and the model is as it was


INEXACT = [name for name, one in ns.all_recipes().items() if not one.exact]
NEED_A_LAYER = tuple(name for name, one in ns.all_recipes().items() if one.needs_layer)


@pytest.mark.parametrize(
    ("norm", "recipe"),
    [(Transposed, name) for name in INEXACT]
    + [(norm, name) for norm in (Reshaped, Flattened) for name in INEXACT if name not in NEED_A_LAYER],
)
def test_an_inexact_recipe_normalizes_as_around_a_plain_norm(norm: type[nn.Module], recipe: str) -> None:
    model, like = network(norm), network(Around if norm is Transposed else AroundFlat)
    like.norm.bn.load_state_dict(model.norm.state_dict())
    assert distance(model, like) < 1e-12
    options: dict[str, Any] = {} if recipe in (*NEED_A_LAYER, "ln") else {"group_size": 4}
    found, expected = (ns.swap_norms(one, recipe, example_inputs=TOKENS, **options).eval() for one in (model, like))
    assert distance(found, expected) < 1e-10
    if recipe != "ws":  # whose norm stays
        assert distance(found, model) > 1e-6


@pytest.mark.parametrize("norm", SPELLINGS)
def test_training_goes_on_as_around_a_plain_norm(norm: type[nn.Module]) -> None:
    model = network(norm)
    converted = ns.swap_norms(model, "mobn", example_inputs=TOKENS).train()
    converted(TOKENS).sum().backward()
    assert all(p.grad is not None for p in converted.parameters())
    (found,) = (module for module in converted.modules() if hasattr(module, "running_mean"))
    (before,) = (m for m in ns.swap_norms(model, "mobn", example_inputs=TOKENS).modules() if hasattr(m, "running_mean"))
    assert found.num_features == 8
    assert not torch.equal(found.running_mean, before.running_mean)


def test_a_norm_that_stays_is_put_back() -> None:
    model = nn.Sequential(network(Transposed), nn.Linear(3, 8), Transposed(8), nn.Linear(8, 2)).double().eval()
    result = ns.convert(model, "wn+mobn", exclude=["2.*"])
    assert type(result.model[2]) is Transposed
    assert type(result.model[0].norm) is not Transposed
    assert {*result.model[2].state_dict()} == {*model[2].state_dict()}
    assert distance(result.model, model) < 1e-12
    assert result.model[2].weight is not model[2].weight  # a copy
    stays = ns.swap_norms(model, "ws", example_inputs=TOKENS)
    assert type(stays[0].norm) is Transposed
    assert {*stays.state_dict()} >= {"0.norm.running_mean"}


def test_one_with_hooks_is_refused() -> None:
    model = network(Transposed)
    model.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(NothingToConvertError):
        ns.convert(model, "mobn")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("recipe", ["wn+mobn", "gn", "ws"])
def test_in_place_and_beside_give_the_same(recipe: str, inplace: bool) -> None:
    model = network(Transposed)
    expected = ns.swap_norms(copy.deepcopy(model), recipe, example_inputs=TOKENS)
    given = copy.deepcopy(model)
    found = ns.swap_norms(given, recipe, example_inputs=TOKENS, inplace=inplace)
    assert (found is given) is inplace
    assert distance(found, expected) == 0


def test_it_is_stored_and_read_again(tmp_path: Path) -> None:
    model = network(Transposed)
    result = ns.convert(model, "wn+mobn", example_inputs=TOKENS)
    ns.save(result.model, tmp_path / "a.safetensors")
    again = ns.load(tmp_path / "a.safetensors", model=network(Transposed)).eval()
    assert distance(again, result.model) == 0
    trusted = ns.load(tmp_path / "a.safetensors", trust=["last_axis", "test_opened_norms"]).eval()
    assert distance(trusted, result.model) == 0
    replayed = ns.convert(model, plan=result.plan).model
    assert distance(replayed, model) < 1e-12
    folded = ns.fold(result.model)
    torch.save(folded, tmp_path / "a.pt")
    assert distance(torch.load(tmp_path / "a.pt", weights_only=False), folded) == 0


@pytest.mark.parametrize("recipe", ["ln", "gn"])
def test_it_is_matched_on_data(recipe: str) -> None:
    model = network(Transposed)
    options = {"group_size": 4} if recipe == "gn" else {}
    data = torch.randn(64, 8, 8, dtype=torch.float64)
    absorbed = ns.swap_norms(model, recipe, example_inputs=TOKENS, **options)
    matched = ns.swap_norms(model, recipe, calibration=data, **options)
    assert type(model.norm) is Transposed
    assert distance(matched.eval(), model) < distance(absorbed.eval(), model)


def test_its_cost_is_ranked_and_what_train_holds_stays_held() -> None:
    model = network(Transposed)
    (cost,) = ns.rank_sites(model, "ln", calibration=torch.randn(64, 8, 8, dtype=torch.float64))
    assert cost.norm == "norm.norm"
    held = network(Transposed, HoldsNorms)
    (step,) = ns.plan(held, "mobn").steps
    assert step.site.frozen
    assert step.site.held
    assert type(held.norm) is type(model.norm) is Transposed


class Domains(nn.Module):
    """A norm is chosen by an attribute, of a list or by name."""

    domain = 0

    def __init__(self, norm: Callable[[int], nn.Module], named: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.named = nn.Linear(8, 8), nn.Linear(8, 3), named
        if named:
            self.one, self.two = norm(8), norm(8)
        else:
            self.norms = nn.ModuleList([norm(8), norm(8)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.named:
            x = self.two(x) if self.domain else self.one(x)
        else:
            x = self.norms[self.domain](x)
        return self.b(x)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_one_that_is_chosen_at_run_time_converts_without_its_layer(named: bool, given: bool) -> None:
    model = network(Transposed, lambda norm: Domains(norm, named))
    converted = ns.swap_norms(model, "wn+mobn", **({"example_inputs": TOKENS} if given else {}))
    for domain in (0, 1):
        model.domain = converted.domain = domain
        assert distance(converted, model) < 1e-12


# ------------------------------------------------------------------------------------------------- what is not opened


class Branching(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)
        return super().forward(x)


class ByMode(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2) * (2.0 if self.training else 1.0)


class ByChance(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2) * random.random()


class Keeps(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x.transpose(1, 2)).transpose(1, 2)
        return self.last


class ReadsItself(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2) * self.weight.mean()


class InContext(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Decorated(nn.BatchNorm1d):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Optional(nn.BatchNorm1d):
    def forward(self, x: Tensor, scale: Any = None) -> Tensor:
        y = super().forward(x.transpose(1, 2)).transpose(1, 2)
        return y if scale is None else y * scale


class NoCheck(Transposed):
    def _check_input_dim(self, input: Tensor) -> None:
        return None


class OwnWeight(Transposed):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gate = nn.Parameter(torch.ones(channels))


class ByName(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm1d.forward(self, x.transpose(1, 2)).transpose(1, 2)


class Functional(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        y = F.batch_norm(y, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return y.transpose(1, 2)


class OwnMode(Transposed):
    def train(self, mode: bool = True) -> Any:
        return super().train(False)


REFUSED: list[Callable[[int], nn.Module]] = [
    Branching, ByMode, ByChance, Keeps, ReadsItself, InContext, Decorated, Optional, NoCheck, OwnWeight, OwnMode,
    ByName, Functional,
]  # fmt: skip


@pytest.mark.parametrize("norm", REFUSED)
def test_what_a_graph_would_not_hold_is_refused(norm: type[nn.Module]) -> None:
    model = network(norm)
    assert opened_form(model.norm) is None
    with pytest.raises(NothingToConvertError, match=r"so what it does is unknown|does more than normalize"):
        ns.convert(model, "wn+mobn", example_inputs=TOKENS)
    assert type(model.norm) is norm


class Reads(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.norm.running_mean.mean()


class ReadsAttribute(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(*self.norm.axes)


class ReadsByName(Network):
    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return super().forward(x).transpose(*getattr(norm, "axes"))  # noqa: B009


class CallsMethod(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.norm.turned(x)[..., :3]


class Asks(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if isinstance(self.norm, WithAttribute) else 1)


class Holds(Network):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, WithAttribute):
                module.eval()
        return self


class HoldsNorms(Network):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


@pytest.mark.parametrize("kind", [Reads, ReadsAttribute, ReadsByName, CallsMethod, Asks, Holds])
@pytest.mark.parametrize("given", [False, True])
def test_one_of_which_the_model_has_more_than_the_call_is_refused(kind: type[nn.Module], given: bool) -> None:
    model = network(WithAttribute, kind)
    with pytest.raises(NothingToConvertError):
        ns.convert(model, "wn+mobn", **({"example_inputs": TOKENS} if given else {}))
    assert type(model.norm) is WithAttribute


def test_the_model_is_as_it_was_where_a_conversion_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(Transposed)

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr("normswap.pipeline.rewrite", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        ns.convert(model, "wn+mobn")
    assert type(model.norm) is Transposed
