"""Recipes: found by name, with options, and added by one class."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normswap as ns
from normswap.norms import Encoding, Incoming, Norm
from normswap.recipes import all_recipes, make_recipe
from normswap.recipes.base import GroupedRecipe
from normswap.recipes.recurrent import make_recurrent
from normswap.records import Site


def site(channels: int, **changes: object) -> Site:
    return Site("bn", "module", "BatchNorm2d", channels, **changes)  # type: ignore[arg-type]


def small(channels: int = 32) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU())
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model.eval()


def test_every_recipe_says_what_it_is() -> None:
    assert list(all_recipes()) == sorted(all_recipes())
    assert {"gn+ws", "wn+mobn", "ln", "gn", "wn", "ws", "mobn", "gn+aws", "none"} <= set(all_recipes())
    for name, recipe in all_recipes().items():
        assert recipe.name == name
        assert recipe.equation
        assert recipe.paper
        assert recipe.__doc__ is not None
        assert "Source:" in recipe.__doc__


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(64, 4), (16, 1), (24, 2), (40, 2), (48, 3), (8, 1), (17, 1), (34, 2), (1, 1), (2, 1), (256, 16), (20, 1)],
)
def test_groups_have_sixteen_channels_or_the_nearest_size_that_divides(channels: int, groups: int) -> None:
    found = GroupedRecipe().groups_at(site(channels))
    assert found == groups
    assert channels % found == 0
    assert channels // found > 1 or channels == 1


def test_group_size_is_a_target_and_num_groups_a_demand() -> None:
    assert GroupedRecipe(group_size=8).groups_at(site(64)) == 8
    assert GroupedRecipe(num_groups=32).groups_at(site(64)) == 32
    with pytest.raises(ns.NormswapError, match="does not divide the 48 channels of 'bn'") as error:
        GroupedRecipe(num_groups=32).groups_at(site(48))
    assert "group_size" in str(error.value)
    with pytest.raises(ns.NormswapError, match="both given"):
        GroupedRecipe(num_groups=2, group_size=8).groups_at(site(48))


def test_a_group_of_one_value_is_refused() -> None:
    recipe = GroupedRecipe(group_size=1)
    assert "one value" in (recipe.refuse(site(8, rank=2)) or "")
    assert "one value" in (recipe.refuse(site(8, rank=4, spatial=1)) or "")
    assert "give example_inputs=" in (recipe.refuse(site(8, rank=None)) or "")
    assert recipe.refuse(site(8, rank=4)) is None
    assert GroupedRecipe().refuse(site(8, rank=2)) is None


def test_unknown_recipes_and_options_are_refused_with_what_there_is() -> None:
    with pytest.raises(ns.NormswapError, match=r"no recipe 'gn\+wz'") as error:
        make_recipe("gn+wz")
    assert "gn+ws" in str(error.value)
    with pytest.raises(ns.NormswapError, match="no option 'groups'") as error:
        make_recipe("gn+ws", {"groups": 3})
    assert "num_groups" in str(error.value)
    with pytest.raises(ns.NormswapError, match="axes='space'"):
        make_recipe("ln", {"axes": "space"})
    with pytest.raises(ns.NormswapError, match="beside a recipe"):
        make_recipe(make_recipe("gn"), {"eps": 1e-3})


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        ("gn", {"num_groups": 2.0}, "num_groups must be a whole number or a text or None, got 2.0"),
        ("gn", {"num_groups": True}, "num_groups must be a whole number or a text or None, got True"),
        ("gn", {"group_size": "4"}, "group_size must be a whole number or None, got '4'"),
        ("gn", {"eps": "small"}, "eps must be a number or None, got 'small'"),
        ("wn", {"log_gain": "no"}, "log_gain must be True or False, got 'no'"),
    ],
)
def test_a_value_that_is_not_of_its_options_type_is_refused(recipe: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ns.NormswapError, match=words):
        make_recipe(recipe, options)


@pytest.mark.parametrize("eps", [0, -1e-5, float("nan"), float("inf")])
def test_an_eps_that_leaves_no_norm_is_refused(eps: float) -> None:
    for make in (make_recipe, make_recurrent):
        with pytest.raises(ns.NormswapError, match=f"eps must be > 0 and finite, got {eps}"):
            make("ln", {"eps": eps})
        assert make("ln", {"eps": 1e-3}).options() == {"eps": 1e-3}  # type: ignore[union-attr]


def test_options_reach_the_model() -> None:
    model = small()
    norm = ns.swap_norms(model, "gn", num_groups=4, eps=1e-3)[1]  # type: ignore[index]
    assert (norm.num_groups, norm.eps) == (4, 1e-3)
    assert ns.swap_norms(model, "gn")[1].eps == model[1].eps  # type: ignore[index]
    plain = ns.swap_norms(model, "gn+ws", gain=False)[0]  # type: ignore[index]
    var = plain.weight.flatten(1).var(1, correction=0)
    assert torch.allclose(var, torch.ones_like(var), atol=1e-2)
    assert len(list(plain.parametrizations.weight.parameters())) == 1


def test_weight_standardization_without_gain_keeps_each_channels_part() -> None:
    """The published form keeps no scale: the norm's γ makes it good, at the expected statistics."""
    model = small().double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    with_gain, without = (
        ns.swap_norms(model, "gn+ws", gain=g, input_offset=False, calibration=x, init="absorb", num_groups=32)
        for g in (True, False)
    )
    # With one channel per group the norm divides each channel by its own deviation: the scale is gone either way.
    assert torch.allclose(with_gain(x), without(x), atol=1e-3)  # eps is seen by other scales


DEPTHWISE = {
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), True),
    "two filters a channel": (lambda: nn.Conv2d(6, 12, 3, groups=6), True),
    "transposed": (lambda: nn.ConvTranspose2d(6, 6, 3, groups=6), True),
    "grouped": (lambda: nn.Conv2d(6, 6, 3, groups=3), False),
    "of one input channel": (lambda: nn.Conv2d(1, 6, 3), False),
}


@pytest.mark.parametrize("kind", DEPTHWISE)
def test_depthwise_filters_are_standardized_on_demand_only(kind: str) -> None:
    build, depthwise = DEPTHWISE[kind]
    layer = build()
    model = nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels)).eval()
    (step,) = ns.plan(model, "gn+ws", input_offset=False).steps
    assert step.site.depthwise is depthwise
    assert step.weight == (None if depthwise else "ws")
    assert any("depthwise" in note for note in step.notes) is depthwise
    (step,) = ns.plan(model, "gn+ws", depthwise=True, input_offset=False).steps
    assert step.weight == "ws"
    assert not step.notes
    assert ns.plan(model, "gn+aws").steps[0].weight == "aws"  # which keeps the filters' means
    assert len(ns.plan(model, "ws").steps) == (0 if depthwise else 1)
    assert len(ns.plan(model, "ws", depthwise=True).steps) == 1


def test_a_plan_from_before_depthwise_sites_were_told_replays_as_it_was_made() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)).eval()
    record = json.loads(ns.plan(model, "gn+ws", depthwise=True).to_json())
    record["options"] = {}
    del record["steps"][0]["site"]["depthwise"]
    replayed = ns.convert(model, plan=ns.Plan.from_json(json.dumps(record)))
    assert parametrize.is_parametrized(replayed.model[0], "weight")


def test_a_recipe_is_added_by_one_class() -> None:
    class RootMeanSquare(nn.Module):
        def __init__(self, channels: int, eps: float) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
            self.eps = eps

        def forward(self, x: Tensor) -> Tensor:
            rms = (x.square().mean((1, 2, 3), keepdim=True) + self.eps).sqrt()
            return x / rms * self.weight[:, None, None] + self.bias[:, None, None]

    @dataclass(frozen=True)
    class RootMeanSquareNorm(Norm):
        eps: float

        modules = (RootMeanSquare,)
        removes_mean = False

        def build(self, site: Site, like: Tensor) -> nn.Module:
            return RootMeanSquare(site.num_features, self.eps)

        def encode(self, incoming: Incoming) -> Encoding:
            _, square = incoming.over_groups(1)
            return incoming.affine((square + self.eps).sqrt(), torch.zeros_like(square))

        def __str__(self) -> str:
            return "RootMeanSquare"

    @dataclass(frozen=True)
    class RmsNormalization(ns.Recipe):
        eps: float = 1e-5

        name = "rms"
        equation = "γ x/rms(x) + β"
        paper = "Zhang & Sennrich 2019"
        exact = False

        def norm(self, site: Site, num_groups: int | None) -> Norm:
            return RootMeanSquareNorm(self.eps)

    model = small()
    result = ns.convert(model, RmsNormalization(eps=1e-6))
    assert isinstance(result.model[1], RootMeanSquare)  # type: ignore[index]
    assert "RootMeanSquare" in str(result.plan)
    x = torch.randn(4, 3, 16, 16)
    reference = model(x)
    assert (result.model(x) - reference).norm() < 0.5 * reference.norm()
    replayed = ns.convert(small(), RmsNormalization(eps=1e-6), plan=ns.Plan.from_json(result.plan.to_json()))
    assert isinstance(replayed.model[1], RootMeanSquare)  # type: ignore[index]


@pytest.mark.parametrize("recipe", ["gn+ws", "gn+aws"])
def test_a_step_of_gain_or_offset_moves_the_filter_as_far(recipe: str) -> None:
    """|∂W/∂g| = |∂W/∂o| = 1, as of g in weight normalization: no learning rate of their own is needed."""
    model = nn.Sequential(nn.Conv2d(8, 4, 5), nn.BatchNorm2d(4)).eval()
    layer = ns.swap_norms(model, recipe)[0]
    before = layer.weight.detach().clone()
    for name, parameter in layer.parametrizations.weight.named_parameters():
        if parameter.ndim == 1:
            with torch.no_grad():
                parameter.add_(1)
                moved = (layer.weight - before).flatten(1).norm(dim=1)
                parameter.sub_(1)
            assert moved.tolist() == pytest.approx([1.0] * 4, rel=1e-2), name  # eps beside the variance of v


def test_a_dead_filter_is_as_long_as_the_others_and_computes_the_same() -> None:
    """The gradient of v grows as v shrinks: a step that suits the others would throw a dead filter anywhere."""
    model = nn.Sequential(nn.Conv2d(8, 4, 5), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        model[0].weight[1] *= 1e-3
        model[0].weight[2] = 0
    swapped = ns.swap_norms(model, "gn+aws", spread=0)[0]
    lengths = swapped.parametrizations.weight.original0.detach().flatten(1).norm(dim=1)
    typical = model[0].weight.detach().flatten(1).norm(dim=1).square().mean().sqrt()
    assert float(lengths[1]) == pytest.approx(float(typical), rel=1e-5)
    assert float(lengths[2]) == 0
    expected = model[0].weight / (model[1].running_var + model[1].eps).sqrt()[:, None, None, None]
    assert torch.allclose(swapped.weight, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("side", "channels", "groups"),
    [(56, 64, 4), (28, 64, 4), (14, 64, 1), (14, 256, 4), (7, 1024, 4), (7, 64, 1), (1, 32, 1)],
)
@pytest.mark.parametrize("to", ["gn", "gn+ws", "gn+aws"])
def test_groups_grow_where_the_map_is_small(to: str, side: int, channels: int, groups: int) -> None:
    """A group holds 16·28² values at the least, where the channels suffice."""
    model = nn.Sequential(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels))
    (step,) = ns.plan(model, to, example_inputs=torch.zeros(1, 3, side, side)).steps
    assert step.num_groups == groups
    assert ("larger groups than 16 channels, as the map is small" in step.notes) is (groups != channels // 16)


@pytest.mark.parametrize(
    ("option", "groups"), [({"group_size": 16}, 4), ({"num_groups": 8}, 8), ({"group_size": 8}, 8)]
)
def test_groups_are_those_that_were_asked_for_on_any_map(option: dict[str, int], groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64))
    for example in (None, torch.zeros(1, 3, 4, 4)):
        (step,) = ns.plan(model, "gn", example_inputs=example, **option).steps
        assert step.num_groups == groups
        assert step.notes == ()


def test_groups_are_of_16_channels_where_no_input_shows_the_map() -> None:
    (step,) = ns.plan(nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64)), "gn").steps
    assert step.num_groups == 4


@pytest.mark.parametrize("recipe", ns.all_recipes())
def test_a_recipe_needs_a_layer_where_it_says_so(recipe: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)).eval()
    plan = ns.plan(model, recipe, example_inputs=torch.randn(2, 6, 5, 5))
    refused = {skip.name: skip.reason for skip in plan.skips if skip.what == "norm"}
    assert ("0" in refused) is ns.all_recipes()[recipe].needs_layer
    assert "3" not in refused
    assert all(reason.startswith("there is no layer for it to normalize: ") for reason in refused.values())
