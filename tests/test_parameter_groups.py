"""Weight decay is for directions: what is one value per channel is left alone, under every recipe."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_packages import import_timm

import normswap as ns
from normswap.demo.data import load_network
from normswap.errors import InputError


def decayed(model: nn.Module) -> tuple[set[str], set[str]]:
    """Return the names with and without weight decay."""
    with_decay, without = ns.parameter_groups(model, weight_decay=0.1)
    assert (with_decay["weight_decay"], without["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in (with_decay, without)]
    assert groups[0] | groups[1] == set(names.values())
    assert sum(len(group["params"]) for group in (with_decay, without)) == len(names)
    return groups[0], groups[1]


@pytest.mark.parametrize(
    ("recipe", "weight", "others"),
    [
        ("gn", "weight", []),
        ("gn+ws", "parametrizations.weight.original0", ["original1"]),
        ("gn+aws", "parametrizations.weight.original0", ["original1", "original2"]),
        ("wn+mobn", "parametrizations.weight.original1", ["original0"]),
    ],
)
def test_weight_decay_is_for_the_directions_of_the_layers_weights_alone(
    recipe: str, weight: str, others: list[str]
) -> None:
    model = ns.swap_norms(load_network(), recipe, init="fresh")
    with_decay, without = decayed(model)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 9
    assert with_decay == {f"{name}.{weight}" for name in convolutions} | {"head.weight"}
    for name in convolutions:
        assert {f"{name}.parametrizations.weight.{other}" for other in others} <= without
    assert {"head.bias", "bn1.bias"} <= without


def test_weight_decay_tells_g_from_v_where_both_have_the_same_shape() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1, groups=4))
    originals = layer.parametrizations["weight"]
    assert originals.original0.shape == originals.original1.shape
    assert decayed(layer) == (
        {"parametrizations.weight.original1"},
        {"parametrizations.weight.original0", "bias"},
    )


def test_weight_decay_leaves_frozen_parameters_out() -> None:
    model = load_network()
    model.conv1.requires_grad_(False)
    groups = ns.parameter_groups(model, weight_decay=0.1)
    assert not any(p is model.conv1.weight for group in groups for p in group["params"])


def names_in(groups: list[dict[str, object]], model: nn.Module) -> set[str]:
    """The names of the parameters that decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}  # type: ignore[attr-defined]


def hugging_face(model: nn.Module) -> set[str]:
    """The rule of ``Trainer.get_decay_parameter_names``: no decay for what is in a LayerNorm, or is called so."""
    within = {
        f"{fqn}.{name}"
        for fqn, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
    forbidden = ("bias", "layernorm", "rmsnorm", ".norm", "_norm")
    names = {name for name, _ in model.named_parameters()}
    return {n for n in names - within if not any(word in n.lower() for word in forbidden)}


def test_rules_by_the_number_of_axes_and_by_names_decay_what_shrinks_the_function() -> None:
    """timm's takes g for a weight, as it has four axes; Hugging Face's does not know g, gain, offset and BatchNorm."""
    import_timm()
    by_number = importlib.import_module("timm.optim").param_groups_weight_decay
    for recipe, per_channel in (("wn", ["original0"]), ("gn+aws", ["original1", "original2"])):
        model = ns.swap_norms(load_network(), recipe, init="fresh")
        ours = names_in(ns.parameter_groups(model, weight_decay=0.1), model)
        by_axes = names_in(by_number(model, 0.1), model)
        by_name = hugging_face(model)
        found = {n for n in dict(model.named_parameters()) if n.rpartition(".")[2] in per_channel}
        assert found
        assert ours == by_axes - found
        assert found <= by_name
        assert bool(found & by_axes) == (recipe == "wn")
        assert bool({"bn1.weight"} & by_name) == (recipe == "gn+aws")


class Odd(nn.Module):
    """Parameters of all sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.embedding = nn.LSTM(3, 4), nn.Embedding(5, 3)
        self.norm = nn.LayerNorm((3, 4))
        self.token, self.scale = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.ones(4))
        self.tied = nn.Linear(3, 5)
        self.tied.weight = self.embedding.weight
        self.old = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_parameters_of_all_sorts() -> None:
    model = Odd()
    assert names_in(ns.parameter_groups(model, weight_decay=0.1), model) == {
        *("rnn.weight_ih_l0", "rnn.weight_hh_l0", "embedding.weight", "token", "old.parametrizations.weight.original"),
    }


def test_rates_follow_the_first_pattern_that_fits() -> None:
    model = load_network()
    groups = ns.parameter_groups(model, weight_decay=0.1, lr=0.2, rates={"head.*": 1.0, "*": 0.5})
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {
        (0.2, 0.1),
        (0.2, 0.0),
        (0.1, 0.1),
        (0.1, 0.0),
    }
    fast = {id(p) for group in groups if group["lr"] == 0.2 for p in group["params"]}
    assert fast == {id(p) for p in model.head.parameters()}
    torch.optim.SGD(groups, lr=1.0)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"weight_decay": -1.0}, "bad-number"),
        ({"weight_decay": float("nan")}, "bad-number"),
        ({"weight_decay": "much"}, "bad-number"),
        ({"rates": {"head.*": 0.1}}, "no-rate"),
        ({"rates": {"tail.*": 0.1}, "lr": 0.1}, "no-such-parameter"),
        ({"rates": {"head.*": -0.1}, "lr": 0.1}, "bad-number"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], code: str) -> None:
    with pytest.raises(InputError) as caught:
        ns.parameter_groups(load_network(), **options)  # type: ignore[arg-type]
    assert caught.value.code == code


@pytest.mark.parametrize("rates", [[0.1], {5: 0.1}, "backbone.*"])
def test_rates_that_are_no_globs_are_refused(rates: Any) -> None:
    with pytest.raises(InputError, match="must give factors by globs of names") as caught:
        ns.parameter_groups(nn.Linear(2, 2), lr=0.1, rates=rates)
    assert caught.value.code == "option-type"
    assert ns.parameter_groups(nn.Linear(2, 2), lr=0.1, rates={"*": 0.1})


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(InputError, match="dict"):
        ns.parameter_groups(nn.Linear(2, 2).state_dict())  # type: ignore[arg-type]
