"""A recipe for each site, chosen by what it does to the output: the estimate against the truth, and what is chosen."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import normswap as ns
from normswap.cli import app
from normswap.errors import InputError
from normswap.recipes import Auto, make_recipe
from normswap.recipes.auto import pick
from normswap.recipes.ln import LayerNormalization
from normswap.records import Choice, Plan
from normswap.runs.gradients import output_gradients


class Net(nn.Module):
    """Three stages of which the last hardly reaches the output, and a head."""

    def __init__(self, last: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU())
        self.side = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.fc, self.last = nn.Linear(32, 5), last

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        return self.fc((x + self.last * self.side(x)).mean((2, 3)))


def images(count: int) -> Tensor:
    """Images of different brightness, which standardized filters lose."""
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 12, 12, generator=generator) + torch.randn(count, 3, 1, 1, generator=generator)


@cache
def trained(last: float = 1.0) -> nn.Module:
    """A network whose BatchNorms have seen such images."""
    model = Net(last).train()
    with torch.no_grad():
        for _ in range(40):
            model(images(64))
    return model.eval()


@cache
def choice(**options: Any) -> Choice:
    return ns.choose_recipes(trained(), calibration=images(120), **options)


def test_the_energy_of_an_error_is_that_of_the_output_when_the_norm_errs() -> None:
    model, x = trained(), images(16)
    error = 1e-3 * torch.randn(16, 32, 6, 6, generator=torch.Generator().manual_seed(0))
    norms = {"body.1": model.get_submodule("body.1").running_mean}
    drawn = [output_gradients(model, norms, (x,), seed).energy("body.1", error) for seed in range(24)]
    estimate = sum(e for e in drawn if e is not None) / len(drawn)
    moved = copy.deepcopy(model)
    moved.get_submodule("body.1").register_forward_hook(lambda m, args, out: out + error)
    with torch.no_grad():
        true = float((moved(x) - model(x)).square().sum())
    # 24·4 directions for each of 16 samples: a relative deviation of about sqrt(2/1536) = 0.04 each.
    assert estimate == pytest.approx(true, rel=0.15)
    other = output_gradients(model, norms, (x,)).energy("body.1", error.flip(1))
    assert other is not None
    assert other != pytest.approx(drawn[0], rel=1e-3)


def test_what_is_not_known_is_not_made_up() -> None:
    model, x = trained(), images(4)
    norms = {"body.1": model.get_submodule("body.1").running_mean}
    found = output_gradients(model, norms, (x,))
    assert found.energy("body.1", torch.zeros(4, 32, 3, 3)) is None
    assert found.energy("stem.1", torch.zeros(4, 16, 12, 12)) is None
    assert found.size == pytest.approx(float(model(x).detach().double().square().sum()))


def test_the_recipe_of_least_error_is_chosen_at_each_site_and_the_earlier_one_where_they_tie() -> None:
    for site in choice().sites:
        least = min(site.errors.values())
        assert site.errors[site.chosen or ""] <= 1.05 * least
        before = list(site.errors)[: list(site.errors).index(site.chosen or "")]
        assert all(site.errors[name] > 1.05 * least for name in before)
    assert [site.norm for site in choice().sites] == ["stem.1", "body.1", "side.1"]


def test_a_site_that_hardly_reaches_the_output_has_hardly_an_error() -> None:
    seen = {site.norm: site.error for site in choice().sites}
    hardly = ns.choose_recipes(trained(0.01), calibration=images(120), recipes=["ln"])
    unseen = {site.norm: site.error for site in hardly.sites}
    assert unseen["side.1"] < 0.05 * seen["side.1"]
    assert unseen["body.1"] > 0.2 * seen["body.1"]


def test_errors_are_relative_to_the_size_of_the_output() -> None:
    louder = copy.deepcopy(trained())
    with torch.no_grad():
        for parameter in louder.get_submodule("fc").parameters():
            parameter.mul_(100)
    found = ns.choose_recipes(louder, calibration=images(120), recipes=["ln"])
    as_it_was = [site.errors["ln"] for site in choice().sites]
    assert [site.error for site in found.sites] == pytest.approx(as_it_was, rel=1e-2)


def test_no_recipe_everywhere_is_expected_to_do_better() -> None:
    each = [choice().expected_with(name) for name in choice().recipes]
    assert all(error is not None and choice().expected_error <= 1.05 * error for error in each)


def test_the_choice_is_carried_out_and_kept_in_the_plan() -> None:
    result = ns.convert(trained(), "auto", calibration=images(120))
    assert result.choice == choice()
    steps = {step.site.norm: (step.recipe, step.num_groups) for step in result.plan.steps}
    for site in choice().sites:
        assert steps[site.norm][0] == site.chosen
        assert site.num_groups in (None, steps[site.norm][1])
    by_hand = ns.convert(trained(), choice().to, calibration=images(120))
    replayed = ns.convert(trained(), plan=Plan.from_json(result.plan.to_json()), calibration=images(120))
    for other in (by_hand, replayed):
        for mine, found in zip(result.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(mine, found)


# By site, what each of three recipes costs; the sums of squares are 0.5² for the first everywhere, 0.1² for the best.
ENERGIES = {
    "a": {"ws": 0.16, "aws": 0.0025, "ln": 0.0025},
    "b": {"ws": 0.08, "aws": 0.04, "ln": 0.0050},
    "c": {"ws": 0.0100, "aws": 0.0099, "ln": 0.0099},
    "d": {"ln": 0.0016},
}
RECIPES = tuple(make_recipe(name) for name in ("gn+ws", "gn+aws", "ln"))


def picked(**options: Any) -> str:
    return " ".join(label or "stays" for label in pick(ENERGIES, Auto(RECIPES, **options)).values())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "aws ln ws ln"),  # ties within five percent go to the earlier one
        ({"max_error": 0.6}, "ws ws ws ln"),
        ({"max_error": 0.4}, "aws ws ws ln"),  # 0.16 − 0.0025 is the largest gain
        ({"max_error": 0.3}, "aws ln ws ln"),
        ({"max_error": 0.01}, "aws ln ws ln"),
        ({"leave": 1}, "aws ln stays ln"),
        ({"leave": 2, "max_error": 0.1}, "aws ln stays ln"),  # 0.0025 + 0.005 + 0.0016 is below 0.01
        ({"leave": 2, "max_error": 0.01}, "aws stays stays ln"),
        ({"leave": 2, "max_error": 0.6}, "ws ws ws ln"),
    ],
)
def test_what_is_wanted_first_is_kept_as_far_as_the_output_can_afford_it(
    options: dict[str, Any], expected: str
) -> None:
    assert picked(**options) == expected


def test_a_norm_that_is_left_stays_and_an_error_that_cannot_be_had_is_told() -> None:
    result = ns.convert(trained(), "auto", calibration=images(120), recipes=["ln"], leave=1, max_error=1e-6)
    assert result.choice is not None
    (left,) = [site.norm for site in result.choice.sites if site.chosen is None]
    assert isinstance(result.model.get_submodule(left), nn.BatchNorm2d)
    assert result.choice.to[left] is None
    (note,) = result.choice.notes
    assert "larger than the 1e-06 that was wanted" in note


def test_an_exact_recipe_has_no_error_and_a_refused_one_no_column() -> None:
    found = ns.choose_recipes(trained(), calibration=images(120), recipes=("gn+ws", "wn"))
    assert {site.chosen for site in found.sites} == {"wn"}
    assert found.expected_with("wn") == 0
    dense = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    of_dense = ns.choose_recipes(
        dense, calibration=torch.randn(40, 6), recipes=({"recipe": "gn", "num_groups": 8}, "ln")
    )
    assert [set(site.errors) for site in of_dense.sites] == [{"ln"}]
    assert "–" in str(of_dense)


def test_a_forward_without_gradients_is_told_and_judged_by_the_norms_own_errors() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = trained()

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.net(x))

    found = ns.choose_recipes(Frozen(), calibration=images(120), recipes=["ln"])
    (note,) = found.notes
    assert note.startswith("at 3 of 3 norms the error could not be followed to the output")
    assert all(math.isfinite(error) and error > 0 for site in found.sites for error in site.errors.values())


def test_a_forward_that_breaks_its_own_gradient_is_judged_so_too() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = trained()

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            return y.sigmoid_().mul_(y)  # a sigmoid's gradient needs the value that is written over

    (note,) = ns.choose_recipes(InPlace(), calibration=images(120), recipes=["ln"]).notes
    assert note.startswith("at 3 of 3 norms")


def test_the_command_line_chooses_and_shows_its_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(trained(), "net.pt")
    torch.save(images(120), "x.pt")
    shared = ("net.pt", "--trust", __name__, "--to", "auto", "--calibration", "x.pt")

    def succeed(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return str(result.stdout)

    table = succeed("inspect", *shared)
    assert [line.split()[0] for line in table.splitlines()[4:]][:3] == ["stem.1", "body.1", "side.1"]
    shown = succeed("convert", *shared, "--option", "recipes=gn+ws,ln", "--option", "leave=1", "-o", "out.safetensors")
    assert "stays at 1" in shown
    assert "expected relative error of the output" in shown
    one = ("--option", "recipes=ln")
    found = json.loads(succeed("convert", *shared, *one, "--json", "-o", "out.safetensors"))["choice"]
    assert [site["norm"] for site in found["sites"]] == ["stem.1", "body.1", "side.1"]
    dry = succeed("convert", *shared, *one, "--dry-run", "--json")
    assert {step["recipe"] for step in json.loads(dry)["steps"]} == {"ln"}


def test_a_recipe_without_an_error_is_told_and_one_of_no_error_leaves_no_norm() -> None:
    found = ns.choose_recipes(trained(), calibration=images(40), recipes=("ws", "ln"))
    assert found.notes == ("no error of ws could be measured: not chosen",)
    exact = ns.choose_recipes(trained(), calibration=images(40), recipes=("wn",), leave=2)
    assert {site.chosen for site in exact.sites} == {"wn"}


@dataclass(frozen=True)
class Own(LayerNormalization):
    """A recipe of a user."""

    name = "own"


def test_a_choice_of_ones_own_recipe_can_be_carried_out() -> None:
    found = ns.choose_recipes(trained(), calibration=images(40), recipes=(Own(), "gn"), leave=1, max_error=10.0)
    assert found.to == {"*": Own()}
    assert json.loads(found.to_json())["to"] == {"*": "own"}
    assert {step.recipe for step in ns.convert(trained(), found.to).plan.steps} == {"own"}
    assert choice().to.keys() == json.loads(choice().to_json())["to"].keys()


def test_without_data_the_last_recipe_is_taken() -> None:
    assert ns.plan(trained(), "auto").recipe == "ln"
    assert ns.convert(trained(), "auto").plan.recipe == "ln"
    recipes = ("ln", "gn+aws")
    assert ns.convert(trained(), "auto", recipes=recipes).plan.recipe == "gn+aws"
    assert ns.convert(trained(), "auto").choice is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipes": ()}, "recipes must name one recipe or more"),
        ({"recipes": ("auto",)}, "none that itself chooses"),
        ({"max_error": 0.0}, "max_error must be > 0"),
        ({"max_error": math.inf}, "max_error must be > 0"),
        ({"leave": -1}, "leave must be ≥ 0"),
        ({"leave": 3}, "leave=3 leaves every norm: there are 3"),
        ({"leave": 1.0}, "leave must be a whole number, got 1.0"),
        ({"leave": None}, "leave must be a whole number, got None"),
        ({"max_error": "1"}, "max_error must be a number or None, got '1'"),
        ({"recipes": None}, "recipes must be a tuple, got None"),
        ({"recipes": ("gm",)}, "there is no recipe 'gm'"),
        ({"max_eror": 0.1}, "did you mean 'max_error'"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ns.choose_recipes(trained(), calibration=images(20), **options)


def test_a_plan_does_not_choose() -> None:
    with pytest.raises(InputError, match="there is nothing to choose by"):
        ns.choose_recipes(trained(), calibration=None)
    with pytest.raises(InputError, match="which a plan does not"):
        ns.plan(trained(), "auto", calibration=images(20))
    with pytest.raises(InputError, match="itself chooses between recipes"):
        ns.plan(trained(), {"stem.*": "auto"})


def test_options_go_to_the_recipes_that_have_them() -> None:
    made = make_recipe("auto", {"num_groups": 4, "axes": "channel"})
    assert isinstance(made, Auto)
    assert [part.options() for part in made.recipes] == [{"num_groups": 4}, {"num_groups": 4}, {"axes": "channel"}]
    chosen = make_recipe("auto")
    assert isinstance(chosen, Auto)
    assert [(part.name, part.options()) for part in chosen.recipes] == [
        ("gn+ws", {}),
        ("gn+ws", {"num_groups": 1}),
        ("gn+aws", {}),
        ("ln", {}),
    ]


class Reaching(Net):
    """A network of which the data reaches two norms of three: the third stands in an auxiliary head."""

    def forward(self, x: Tensor, auxiliary: bool = False) -> Tensor:
        x = self.body(self.stem(x))
        return self.fc((x + self.side(x) if auxiliary else x).mean((2, 3)))


def test_a_norm_that_the_data_does_not_reach_gets_what_it_gets_without_data() -> None:
    model = Reaching().eval()
    model.load_state_dict(trained().state_dict())
    result = ns.convert(model, "auto", calibration=images(120), recipes=["ln", "gn"], num_groups=2, leave=1)
    steps = {step.site.norm: (step.recipe, step.num_groups) for step in result.plan.steps}
    assert steps["side.1"] == ("gn", 2)
    assert result.choice is not None
    assert "no error could be measured at side.1, as if there were no data: gn there" in result.choice.notes
    assert [site.norm for site in result.choice.sites] == ["stem.1", "body.1"]
    assert choice().notes == ()


def test_group_counts_that_are_given_hold_without_data() -> None:
    steps = ns.convert(trained(), "auto", recipes=["ln", "gn"], num_groups=4).plan.steps
    assert {step.num_groups for step in steps} == {4}
    steps = ns.convert(trained(), "auto", recipes=["ln", "gn"]).plan.steps
    assert {step.num_groups for step in steps} != {4}


def test_each_recipe_has_all_data_where_norms_store_no_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()).eval()
    found = ns.choose_recipes(model, calibration=[images(30)], recipes=["gn", "ln"])
    assert [set(site.errors) for site in found.sites] == [{"gn", "ln"}]


def test_a_gradient_that_is_no_number_is_not_followed() -> None:
    class Root(nn.Module):
        def __init__(self, power: int) -> None:
            super().__init__()
            self.net, self.power = trained(), power

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            y = y * (y > y.mean())
            return (y * y).sqrt() if self.power == 1 else y * y

    (note,) = ns.choose_recipes(Root(1), calibration=images(40), recipes=["ln"]).notes
    assert note.startswith("at 3 of 3 norms")
    assert ns.choose_recipes(Root(2), calibration=images(40), recipes=["ln"]).notes == ()


def test_an_output_that_no_norm_can_change_does_not_make_errors_small() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = trained()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x), x.detach() * 1e3

    beside = ns.choose_recipes(Beside(), calibration=images(40), recipes=["ln"])
    alone = ns.choose_recipes(trained(), calibration=images(40), recipes=["ln"])
    assert beside.expected_error == pytest.approx(alone.expected_error, rel=0.2)


def test_errors_on_the_samples_that_were_fitted_to_are_told() -> None:
    (note,) = ns.choose_recipes(trained(), calibration=images(9), recipes=["ln"]).notes
    assert note.startswith("too few samples to hold any out")
    assert ns.choose_recipes(trained(), calibration=images(10), recipes=["ln"]).notes == ()
    unknown = ns.choose_recipes(
        trained(), calibration=[images(40)], recipes=["ln"], forward_fn=lambda model, batch: model(batch)
    )
    assert not any("too few" in note for note in unknown.notes)


def test_the_error_at_a_norm_with_a_hook_is_its_own() -> None:
    model = copy.deepcopy(trained())
    model.get_submodule("stem.1").register_forward_hook(lambda module, args, out: out * 1.5)
    found = ns.choose_recipes(model, calibration=images(120), recipes=["ln"])
    (note,) = found.notes
    assert note.startswith("at 1 of 3 norms")
    plain = ns.choose_recipes(trained(), calibration=images(120), recipes=["ln"])
    assert found.sites[0].errors["ln"] < 2.5 * plain.sites[0].errors["ln"]
