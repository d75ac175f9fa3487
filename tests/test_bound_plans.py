"""A plan carries what was found of each norm: derived once for a conversion, and anew for each replay."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from laws import BY_NAME, changed, distance, fingerprint
from torch import Tensor, nn
from zoo import randomize_
from zoo_packages import import_torchvision

import normswap as ns
from normswap.errors import PlanError
from normswap.graph.dataflow import Dataflow
from normswap.norms.batch import BatchNormalization
from normswap.recipes import make_recipe
from normswap.records import Plan
from normswap.stages import bound as binding
from normswap.stages import find_sites as finding
from normswap.stages.bound import bind

QUESTIONS = ("layer_feeding", "reader_of", "after_norm", "read")


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[str, Counter[str]]]:
    """Count for each norm how often each question about it is asked: where it is looked up."""
    names = {id(module): name for name, module in model.named_modules()}
    counts: dict[str, Counter[str]] = {question: Counter() for question in QUESTIONS}

    def counting(question: str, asked: Callable[..., Any], which: int) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            subject = args[which]
            name = subject if isinstance(subject, str) else names.get(id(subject), "of a copy")
            counts[question][name] += 1
            return asked(*args, **kwargs)

        return ask

    after = counting("after_norm", finding.after_norm, 0)
    patches = (
        mock.patch.object(Dataflow, "layer_feeding", counting("layer_feeding", Dataflow.layer_feeding, 1)),
        mock.patch.object(finding, "reader_of", counting("reader_of", finding.reader_of, 1)),
        mock.patch.object(finding, "after_norm", after),
        mock.patch.object(binding, "after_norm", after),
        mock.patch.object(BatchNormalization, "read", counting("read", BatchNormalization.read, 0)),
    )
    with patches[0], patches[1], patches[2], patches[3], patches[4]:
        yield counts


def resnet() -> nn.Module:
    model = import_torchvision().models.resnet18(num_classes=10)
    assert isinstance(model, nn.Module)
    return randomize_(model, 0)


def thin_resnet() -> nn.Module:
    """The same blocks in the same places with a few channels: a match takes no minute."""
    block, inputs, blocks = import_torchvision().models.resnet.BasicBlock, 4, []
    for outputs, stride in ((4, 1), (8, 2), (8, 2), (8, 2)):
        down = None
        if stride > 1:
            down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        blocks += [block(inputs, outputs, stride, down), block(outputs, outputs)]
        inputs = outputs
    stem = (nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    return randomize_(nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)), 0)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


NORMS = 20
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing": dict,
    "inputs": lambda: {"example_inputs": images(2)},
    "data": lambda: {"calibration": images(16)},
}


@pytest.mark.parametrize("given", GIVEN)
def test_a_conversion_asks_each_question_about_each_norm_once(given: str) -> None:
    model = thin_resnet() if given == "data" else resnet()
    with counted(model) as counts:
        result = ns.convert(model, "gn+ws", **GIVEN[given]())
    assert result.init.method == ("match" if given == "data" else "absorb")
    norms = dict.fromkeys((step.site.norm for step in result.plan.steps), 1)
    assert len(norms) == NORMS
    for question in QUESTIONS:
        assert counts[question] == norms, question


def test_a_second_plan_asks_everything_once_more() -> None:
    """The control of the count: it is of questions, and does not stop at one."""
    model = resnet()
    with counted(model) as counts:
        ns.plan(model, "gn+ws")
        ns.convert(model, "gn+ws")
    for question in QUESTIONS:
        assert set(counts[question].values()) == {2}
        assert len(counts[question]) == NORMS


def test_a_replay_looks_for_no_layer_and_reads_each_norm_once() -> None:
    model = resnet()
    plan = ns.plan(model, "gn+ws")
    with counted(model) as counts:
        ns.convert(model, plan=plan)
    assert not counts["layer_feeding"]
    assert not counts["reader_of"]
    for question in ("after_norm", "read"):
        assert set(counts[question].values()) == {1}
        assert len(counts[question]) == NORMS


# ------------------------------------------------------------------------------------------------------------- replays


class Mixed(nn.Module):
    """A norm behind its layer, one behind two names, one in front of a reader, one that is a call, one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.alias = nn.ModuleList([self.bn])
        self.front, self.reader = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        self.last = nn.Conv2d(4, 4, 1)
        self.gamma, self.beta = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))
        self.alone = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(torch.relu(self.bn(self.conv(x))))
        x = self.last(torch.relu(self.reader(x)))
        x = nn.functional.batch_norm(x, self.running_mean, self.running_var, self.gamma, self.beta, self.training)
        return torch.relu(self.alone(torch.relu(x)))


def mixed(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomize_(Mixed(), seed).double()


def small() -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def record_of(recipe: str) -> dict[str, Any]:
    record = json.loads(ns.plan(mixed(), recipe, example_inputs=small()).to_json())
    assert isinstance(record, dict)
    return record


def plan_of(record: dict[str, Any]) -> Plan:
    return Plan.from_json(json.dumps(record))


def step_at(record: dict[str, Any], norm: str) -> dict[str, Any]:
    (step,) = (step for step in record["steps"] if step["site"]["norm"] == norm)
    assert isinstance(step, dict)
    return step


NEW_FIELDS = {"axis", "readers", "unread"}


@pytest.mark.parametrize("recipe", sorted(ns.all_recipes()))
def test_a_plan_of_the_first_format_replays(recipe: str) -> None:
    """Files of before a site knew its axis and its readers: no reader takes a norm up, and all else is as planned."""
    record = record_of(recipe)
    for step in record["steps"]:
        step.pop("reader")
        for name in NEW_FIELDS:
            step["site"].pop(name)
    plan = plan_of(record)
    assert all(step.reader is None and step.site.axis == 1 and not step.site.readers for step in plan.steps)
    model = mixed(1)
    result = ns.convert(model, plan=plan, example_inputs=small(), scale=False)
    expected = ns.convert(model, recipe, example_inputs=small(), scale=False)
    if recipe not in ("none", "wn"):  # which alone have readers
        assert not (result.model.state_dict().keys() ^ expected.model.state_dict().keys())
    if ns.all_recipes()[recipe].exact:
        with torch.no_grad():
            assert distance(result.model(small()), model(small())) < 1e-12
    else:
        assert torch.equal(result.model(small()), expected.model(small()))


def test_a_plan_written_by_hand_in_the_first_format_replays() -> None:
    text = """{
      "normswap_plan": 1, "model": "Sequential", "recipe": "gn", "options": {"num_groups": 2}, "skips": [],
      "steps": [{"weight": null, "norm": "GroupNorm, 2 groups of 3", "num_groups": 2, "notes": [],
        "site": {"norm": "1", "kind": "module", "norm_type": "BatchNorm2d", "num_features": 6, "eps": 1e-05,
          "momentum": 0.1, "layer": "0", "layer_type": "Conv2d", "fan_in": 36, "depthwise": false, "rank": 4,
          "spatial": null, "frozen": false, "synchronized": false, "has_statistics": true, "proof": "proven",
          "reason": null, "aliases": [], "found_by": "symbolic", "caveat": null}}]
    }"""
    model = randomize_(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), 0)
    found = ns.convert(model, plan=Plan.from_json(text)).model
    expected = ns.convert(model, "gn", num_groups=2).model
    assert all(torch.equal(t, expected.state_dict()[name]) for name, t in found.state_dict().items())


@pytest.mark.parametrize("number", [0, 3, "1", None, 1.5])
def test_a_plan_of_another_format_is_refused_in_words(number: Any) -> None:
    record = record_of("gn") | {"normswap_plan": number}
    with pytest.raises(PlanError, match=f"the plan has format {number}, this version reads") as caught:
        plan_of(record)
    assert caught.value.code == "plan-format"
    assert caught.value.hint


@pytest.mark.parametrize("recipe", sorted(ns.all_recipes()))
def test_a_plan_replays_bound_to_a_fresh_model(recipe: str) -> None:
    """With the fresh model's own values, not those of the model that it was made for."""
    plan = plan_of(record_of(recipe))
    model = mixed(1)
    bound = bind(plan, make_recipe(recipe), model)
    assert bound.plan == plan
    for step in bound.steps:
        own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        assert step.step in plan.steps
        assert step.state.mean is not None
        assert step.state.mean.data_ptr() in own
        assert step.state.gamma.data_ptr() in own
    replayed = ns.convert(model, plan=plan, example_inputs=small()).model
    expected = ns.convert(model, recipe, example_inputs=small()).model
    assert replayed.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(t, expected.state_dict()[name]) for name, t in replayed.state_dict().items())


def test_the_comparison_of_replays_sees_another_models_values() -> None:
    plan = plan_of(record_of("gn"))
    first, second = (ns.convert(mixed(seed), plan=plan).model.state_dict() for seed in (0, 1))
    assert not all(torch.equal(t, second[name]) for name, t in first.items())


# ------------------------------------------------------------------------------------------------------------- misfits


def _without(name: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        del model.get_submodule(parent)._modules[leaf]

    return change


def _with(name: str, module: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    return lambda model: model.set_submodule(name, module().double().eval())


def _other_forward(model: nn.Module) -> None:
    class Other(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.alone(self.last(self.front(self.bn(self.conv(x))))))

    model.__class__ = Other


class Doubling(nn.BatchNorm2d):
    """Does more than normalize."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


Change = Callable[[nn.Module], None]
MISFITS: dict[str, tuple[str, Change, str]] = {
    "no norm": ("gn", _without("bn"), "has no module 'bn'"),
    "another norm": ("gn", _with("alone", lambda: nn.GroupNorm(1, 4)), "'alone' is a GroupNorm and no BatchNorm"),
    "other channels": ("gn", _with("alone", lambda: nn.BatchNorm2d(5)), "'alone' has 5 channels, the plan says 4"),
    "a norm that does more": ("gn", _with("alone", lambda: Doubling(4)), "'alone' is a Doubling and no BatchNorm"),
    "no alias": ("gn", _without("alias"), "has no module 'alias'"),
    "no layer": ("gn", _without("conv"), "has no module 'conv'"),
    "no reader": ("none", _without("reader"), "has no module 'reader'"),
    "no call": ("gn", _other_forward, "calls no norm with 'running_mean'"),
    "a layer that is none": ("gn", _with("conv", nn.ReLU), "'conv' is a ReLU"),
    "a layer of other channels": ("gn", _with("conv", lambda: nn.Conv2d(3, 5, 3)), "'conv' has 5 output channels"),
    "a layer of another kind": (
        "gn+ws", _with("conv", lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))), "parametrized",
    ),
    "a reader that is none": ("none", _with("reader", nn.ReLU), "'reader' is a ReLU"),
    "a reader of other channels": (
        "none", _with("reader", lambda: nn.Conv2d(5, 4, 3)), "'reader' has 5 input channels",
    ),
    "a reader that pads": ("none", _with("reader", lambda: nn.Conv2d(4, 4, 3, padding=1)), "zero padding"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_a_plan_that_does_not_fit_is_refused_before_anything_changes(name: str) -> None:
    recipe, change, words = MISFITS[name]
    plan = plan_of(record_of(recipe))
    model = mixed()
    change(model)
    before = fingerprint(model)
    with pytest.raises(PlanError, match="does not fit this model") as caught:
        ns.convert(model, plan=plan, inplace=True, check=False)
    assert words in str(caught.value)
    assert caught.value.code == "plan-does-not-fit"
    assert not changed(before, fingerprint(model))


@pytest.mark.parametrize("recipe", ["gn", "gn+ws", "none"])
def test_an_unchanged_model_fits_and_is_changed(recipe: str) -> None:
    """The control of the refusals: the same call goes through, and the fingerprint sees what it does."""
    model = mixed()
    before = fingerprint(model)
    ns.convert(model, plan=plan_of(record_of(recipe)), inplace=True, check=False)
    assert changed(before, fingerprint(model))


def test_a_field_that_no_site_has_is_named() -> None:
    record = record_of("gn")
    step_at(record, "alone")["site"]["colour"] = "red"
    with pytest.raises(PlanError, match="Site has no field 'colour'"):
        plan_of(record)


@pytest.mark.parametrize("name", ["aliases", "functional_and_module_mix", "norm_as_holder", "frozen_batchnorm"])
def test_plans_of_awkward_models_bind_to_fresh_ones(name: str) -> None:
    entry = BY_NAME[name]
    plan = ns.plan(entry.model(), "gn", example_inputs=entry.inputs())
    fresh = entry.model(3)
    bound = bind(Plan.from_json(plan.to_json()), make_recipe("gn"), fresh)
    assert [step.site for step in bound.steps] == [step.site for step in plan.steps]
