"""Recipes chosen by the norms' names: what each site becomes, and that it is what the recipe alone makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap as ns
from normswap.errors import InputError, PlanError
from normswap.recipes import PerSite, all_recipes, make_recipe
from normswap.records import Plan


class Net(nn.Module):
    """Three stages and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = self._stage(3, 8)
        self.body = self._stage(8, 16)
        self.tail = self._stage(16, 16)
        self.fc = nn.Linear(16, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight.data, module.running_var):
                    tensor.uniform_(0.5, 2)
                for tensor in (module.bias.data, module.running_mean):
                    tensor.normal_()
        self.eval()

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.tail(self.body(self.stem(x))).mean((2, 3)))


IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
STEM, BODY, TAIL = "stem.1", "body.1", "tail.1"


def recipes_of(plan: Plan) -> dict[str, str]:
    return {step.site.norm: step.recipe for step in plan.steps}


def test_the_first_pattern_that_matches_decides() -> None:
    plan = ns.plan(Net(), {"stem.*": "gn+aws", "[st]*": "ln", "*.1": "gn+ws"})
    assert recipes_of(plan) == {STEM: "gn+aws", BODY: "gn+ws", TAIL: "ln"}
    plan = ns.plan(Net(), {"tail.*": "gn+ws", "*.1": "ln"})
    assert recipes_of(plan) == {STEM: "ln", BODY: "ln", TAIL: "gn+ws"}


@pytest.mark.parametrize("to", [{"body.*": "gn"}, {"body.*": "gn", "*": None}, {"tail.*": None, "body.*": "gn"}])
def test_a_norm_without_a_recipe_stays_and_the_plan_says_so(to: dict[str, Any]) -> None:
    result = ns.convert(Net(), to)
    assert recipes_of(result.plan) == {BODY: "gn"}
    assert type(result.model.stem[1]) is nn.BatchNorm2d
    assert type(result.model.tail[1]) is nn.BatchNorm2d
    reasons = {skip.name: skip.reason for skip in result.plan.skips}
    assert reasons[STEM] == reasons[TAIL] == "no pattern gives it a recipe"


@pytest.mark.parametrize("name", all_recipes())
def test_one_pattern_for_all_is_the_recipe_itself(name: str) -> None:
    assert make_recipe({"*": name}) == make_recipe(name)


@pytest.mark.parametrize("name", all_recipes())
def test_a_site_becomes_what_its_recipe_alone_makes_of_it(name: str) -> None:
    """At an untouched stem: what comes after it cannot reach it."""
    alone = ns.convert(Net(), name, include="stem.*", init="absorb", example_inputs=IMAGES, scale=False).model
    mixed = ns.convert(Net(), {"stem.*": name, "*": "wn"}, init="absorb", example_inputs=IMAGES, scale=False).model
    expected, found = (model.stem.state_dict() for model in (alone, mixed))
    assert expected.keys() == found.keys()
    for key in expected:
        assert torch.equal(expected[key], found[key])


def test_exact_recipes_together_keep_the_output_and_are_checked() -> None:
    result = ns.convert(Net(), {"stem.*": "wn+mobn", "body.*": "mobn", "*": "wn"}, example_inputs=IMAGES)
    assert result.exact
    assert result.check is not None
    assert result.check.ok
    assert ns.verify(Net(), result.model, IMAGES).ok


def test_exact_and_inexact_ones_mixed_are_not_called_exact() -> None:
    result = ns.convert(Net(), {"stem.*": "wn+mobn", "*": "ln"}, example_inputs=IMAGES)
    assert not result.exact
    assert result.check is None
    assert not ns.verify(Net(), result.model, IMAGES).ok


@pytest.mark.parametrize("init", ["absorb", "match", "tune"])
def test_an_exact_site_stays_exact_where_data_fits_the_others(init: str) -> None:
    """Behind it comes an inexact one, in front of it none: what it gives is what the BatchNorm gave."""
    result = ns.convert(
        Net(), {"stem.*": "wn+mobn", "*": "ln"}, calibration=IMAGES, init=init, tune_steps=0, scale=False
    )
    with torch.no_grad():
        torch.testing.assert_close(result.model.stem(IMAGES), Net().stem(IMAGES), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(result.model.body(Net().stem(IMAGES)), Net().body(Net().stem(IMAGES)), atol=1e-2)
    assert {row.name: row.method for row in result.init.rows}[STEM] == "exact"


def test_a_match_chooses_groups_only_where_the_recipe_leaves_them_to_it() -> None:
    to = {"stem.*": {"recipe": "gn", "num_groups": 4}, "*": {"recipe": "gn", "num_groups": "auto", "group_size": 8}}
    plan = ns.convert(Net(), to, calibration=IMAGES).plan
    groups = {step.site.norm: step.num_groups for step in plan.steps}
    assert groups[STEM] == 4
    assert {groups[BODY], groups[TAIL]} <= {1, 2}


def test_options_go_to_the_recipes_that_have_them() -> None:
    plan = ns.plan(Net(), {"stem.*": "ln", "body.*": {"recipe": "gn", "num_groups": 8}, "*": "gn"}, num_groups=2)
    assert {step.site.norm: step.num_groups for step in plan.steps} == {STEM: 1, BODY: 8, TAIL: 2}
    assert plan.options == {
        "at": {
            "stem.*": "ln",
            "body.*": {"recipe": "gn", "num_groups": 8},
            "*": {"recipe": "gn", "num_groups": 2},
        }
    }


@pytest.mark.parametrize(
    ("to", "options", "words"),
    [
        ({"stem.*": "gnn", "*": "gn"}, {}, "gnn"),
        ({"nothing.*": "gn", "*": "gn"}, {}, "nothing"),
        ({}, {}, "names no recipe"),
        ({"*": None}, {}, "names no recipe"),
        ({"*": "wn"}, {"num_groups": 2}, "num_groups"),
        ({"stem.*": {"num_groups": 2}, "*": "gn"}, {}, "no recipe ''"),
        ({"stem.*": {"recipe": "gn", "groups": 2}, "*": "gn"}, {}, "groups"),
        ({"stem.*": PerSite((("*", make_recipe("gn")),)), "*": "gn"}, {}, "itself chooses between recipes"),
    ],
)
def test_what_does_not_fit_is_refused(to: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ns.plan(Net(), to, **options)


@pytest.mark.parametrize(
    ("to", "dead", "first"),
    [
        ({"*": "none", "body.*": "gn"}, "body.*", "'*'"),
        ({"stem.*": "gn", "b*": "ln", "stem.1": None, "*": "gn"}, "stem.1", "'stem.*'"),
        ({"stem.*": "gn", "b*": "ln", "[sb]*": None, "*": "gn"}, "[sb]*", "'stem.*', 'b*'"),
        (PerSite((("*", make_recipe("gn")), ("*", make_recipe("ln")))), "*", "'*'"),
    ],
)
def test_a_pattern_that_decides_nothing_is_refused(to: Any, dead: str, first: str) -> None:
    with pytest.raises(InputError) as refused:
        ns.plan(Net(), to)
    assert refused.value.code == "pattern-decides-nothing"
    assert f"{dead!r} decides nothing: {first} before it takes" in refused.value.message


def test_a_pattern_that_decides_somewhere_or_stands_for_the_rest_is_taken() -> None:
    assert recipes_of(ns.plan(Net(), {"body.*": "gn", "*": "none"})) == {STEM: "none", BODY: "gn", TAIL: "none"}
    assert recipes_of(ns.plan(Net(), {"s*": "gn", "[sbt]*": "ln", "*": "none"})) == {STEM: "gn", BODY: "ln", TAIL: "ln"}


def test_a_plan_is_read_back_and_replayed() -> None:
    first = ns.convert(Net(), {"stem.*": "gn+aws", "tail.*": None, "*": "gn+ws"}, num_groups=2)
    plan = Plan.from_json(first.plan.to_json())
    assert plan == first.plan
    again = ns.convert(Net(), plan=plan)
    assert again.plan == plan
    assert_same(first.model, again.model)


def test_a_plan_whose_recipe_names_none_of_its_sites_is_refused() -> None:
    plan = ns.plan(Net(), {"stem.*": "gn+aws", "*": "gn+ws"})
    with pytest.raises(PlanError, match=r"none for 'body\.1'"):
        ns.convert(Net(), PerSite((("stem.*", make_recipe("gn+aws")),)), plan=plan)


def test_a_stored_model_keeps_its_recipes(tmp_path: Path) -> None:
    model = ns.swap_norms(Net(), {"stem.*": "gn+aws", "body.*": "wn+mobn", "*": "ln"})
    ns.save(model, tmp_path / "model.safetensors")
    assert_same(model, ns.load(tmp_path / "model.safetensors", model=Net()))


def test_it_folds_and_exports(tmp_path: Path) -> None:
    model = ns.swap_norms(Net(), {"stem.*": "gn+aws", "body.*": "wn+mobn", "*": "gn+ws"}).eval()
    folded = ns.fold(model, example_inputs=IMAGES)
    ns.export_onnx(folded, tmp_path / "model.onnx", example_inputs=IMAGES)
    assert ns.verify(model, folded, IMAGES).ok
    assert ns.verify(model, tmp_path / "model.onnx", IMAGES).ok


def test_the_costs_of_sites_are_those_of_their_recipes() -> None:
    alone = {cost.norm: cost.error for cost in ns.rank_sites(Net(), "gn", calibration=IMAGES)}
    to = {"stem.*": "gn", "*": {"recipe": "gn", "num_groups": 8}}
    mixed = {cost.norm: cost.error for cost in ns.rank_sites(Net(), to, calibration=IMAGES)}
    assert mixed[STEM] == pytest.approx(alone[STEM], rel=1e-6)
    assert mixed[TAIL] != pytest.approx(alone[TAIL], rel=1e-6)


def assert_same(first: nn.Module, second: nn.Module) -> None:
    expected, found = first.state_dict(), second.state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key


class LastAxis(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def last_axis() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), LastAxis(5), nn.ReLU(), nn.Linear(5, 4), LastAxis(4)).eval()


def test_a_subclass_that_was_opened_goes_by_the_name_that_it_has_in_the_model() -> None:
    x = torch.randn(2, 3, 6)
    norms = [step.site.norm for step in ns.plan(last_axis(), "wn", example_inputs=x).steps]
    assert [step.site.inside for step in ns.plan(last_axis(), "wn", example_inputs=x).steps] == ["1", "4"]
    plan = ns.plan(last_axis(), {"1": "wn", "4": "ln"}, example_inputs=x)
    assert recipes_of(plan) == {norms[0]: "wn", norms[1]: "ln"}
    for include, exclude in (["4"], []), (["*"], ["1"]):
        plan = ns.plan(last_axis(), "wn", example_inputs=x, include=include, exclude=exclude)
        assert list(recipes_of(plan)) == norms[1:]


def test_stays_is_what_plans_call_none() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    plans = [ns.plan(model, {"1": stays, "*": "gn"}) for stays in ("stays", None)]
    assert plans[0] == plans[1]
    assert [step.site.norm for step in plans[0].steps] == ["3"]
    assert ns.Plan.from_json(plans[0].to_json()) == plans[0]


def test_auto_has_no_error_of_its_own_to_rank_sites_by() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(InputError, match="choose_recipes") as caught:
        ns.rank_sites(model, "auto", calibration=torch.randn(8, 3, 6, 6))
    assert caught.value.code == "auto-recipe"
