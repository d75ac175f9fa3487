"""Some random networks keep every promise; and each check sees a promise that is broken."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from typing import Any

import conversion_checks
import pytest
import torch
from conversion_checks import BrokenPromiseError, accounted_for, check, same
from hypothesis import HealthCheck, Phase, assume, given, settings
from random_networks import Network, networks
from size_networks import size_networks
from torch import nn

import normswap as ns
from normswap.graph.choices import Choices
from normswap.records import Plan

DETERMINISTIC = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)


PASSED: set[str] = set()  # hypothesis repeats what it has drawn: each network counts once


@settings(DETERMINISTIC, max_examples=15)  # benchmarks/random_networks.py checks thousands
@given(networks())
def test_a_random_network_keeps_every_promise(network: Network) -> None:
    assume(network.source not in PASSED)
    check(network)
    PASSED.add(network.source)


@settings(DETERMINISTIC, max_examples=6)
@given(size_networks())
def test_a_network_that_asks_for_sizes_and_writes_in_place_keeps_every_promise(network: Network) -> None:
    assume(network.source not in PASSED)
    check(network, oracle=False)
    PASSED.add(network.source)


def test_those_networks_run_at_other_sizes_and_differ() -> None:
    found: dict[str, Network] = {}

    @settings(DETERMINISTIC, phases=[Phase.generate])
    @given(size_networks())
    def collect(network: Network) -> None:
        found[network.source] = network

    collect()
    assert len(found) > 50
    features = Counter(feature.partition(" ")[0] for network in found.values() for feature in network.features)
    assert {"if", "for", "write:", "try", "context", "chance", "arithmetic:"} <= features.keys()
    sizes = [len([*conversion_checks.all_inputs(network, network.model())]) for network in found.values()]
    assert sum(sizes) > 5 * len(found)


def test_a_branch_that_another_size_takes_is_a_wrong_output_where_it_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    source = PAIRS.source.replace(
        "        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))",
        "        h = self.conv2(self.bn1(self.conv1(x)).relu())\n"
        "        return self.bn2(h) + h if x.shape[-1] > 6 else self.bn2(h)",
    )
    network = dataclasses.replace(PAIRS, source=source, others=((3, 3, 9, 9),))
    check(network, oracle=False)
    monkeypatch.setattr("normswap.graph.perturbation.other_sizes", lambda *_: ())
    assert kind_of(network) == "wrong output"


def test_the_networks_run_in_both_modes_and_differ() -> None:
    found: list[Network] = []

    @settings(DETERMINISTIC, phases=[Phase.generate])
    @given(networks())
    def collect(network: Network) -> None:
        assume(network.source not in {other.source for other in found})
        found.append(network)

    collect()
    assert len(found) > 50
    features = Counter(feature for network in found for feature in network.features)
    assert len(features) > 25
    assert sum(network.norms for network in found) > 120
    silent = 0  # a last ReLU lets nothing through: such a network shows nothing
    for network in found:
        model = network.model()
        with torch.no_grad():
            first, again = (conversion_checks.run(network.model(), network.inputs()) for _ in range(2))
            model.train()(*network.inputs())
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(bool(tensor.isfinite().all()) for tensor in first)
        silent += max(float(tensor.abs().max()) for tensor in first) <= 1e-6
    assert silent <= len(found) // 20


# ------------------------------------------------------------------------------------------ what must be seen

PAIRS = Network(
    """\
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


def adjust(model):
    pass
""",
    (3, 6, 6),
    2,
    frozenset(),
)


def kind_of(network: Network, recipes: tuple[str, ...] = ("none", "gn")) -> str:
    with pytest.raises(BrokenPromiseError) as caught:
        check(network, recipes)
    return caught.value.kind


def test_a_network_of_two_pairs_keeps_every_promise() -> None:
    found = check(PAIRS, ns.all_recipes())
    assert found.sites == {"module, with its layer, proven": 2}
    assert not found.refusals | found.alone | found.pairs_left
    assert not found.unlisted
    assert found.exported


def test_swapped_layers_are_a_wrong_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ns.plan

    def swapped(*args: Any, **kwargs: Any) -> Plan:
        found = plan(*args, **kwargs)
        one, two = found.steps
        sites = (
            dataclasses.replace(one.site, layer=two.site.layer),
            dataclasses.replace(two.site, layer=one.site.layer),
        )
        steps = tuple(dataclasses.replace(s, site=site) for s, site in zip(found.steps, sites, strict=True))
        return dataclasses.replace(found, steps=steps)

    monkeypatch.setattr(ns, "plan", swapped)
    assert kind_of(PAIRS) == "wrong pair"


def test_a_changed_weight_is_a_wrong_output(monkeypatch: pytest.MonkeyPatch) -> None:
    for verb in ("convert", "fold"):
        made = getattr(ns, verb)

        def broken(*args: Any, made: Any = made, verb: str = verb, **kwargs: Any) -> Any:
            result = made(*args, **kwargs)
            with torch.no_grad():
                next((result if verb == "fold" else result.model).parameters()).flatten()[0].add_(1e-4)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(ns, verb, broken)
            assert kind_of(PAIRS) == "wrong output"


def test_a_use_in_training_alone_that_is_lost_is_a_wrong_output() -> None:
    class Doubles(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) * (2 if self.training else 1)

    model = PAIRS.model()
    other = Doubles(copy.deepcopy(model)).eval()
    same(PAIRS, other, model, "eval")
    with conversion_checks.held(other, model), pytest.raises(BrokenPromiseError, match="wrong output: train"):
        same(PAIRS, other, model, "train")
    assert not any(module.training for module in (*model.modules(), *other.modules()))


def test_held_norms_move_no_statistics_and_use_them() -> None:
    model = PAIRS.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = conversion_checks.run(model, PAIRS.inputs())
    with conversion_checks.held(model):
        assert model.training
        assert torch.equal(conversion_checks.run(model, PAIRS.inputs())[0], expected[0])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_norm_that_the_other_domain_does_not_call_is_a_wrong_output(monkeypatch: pytest.MonkeyPatch) -> None:
    source = PAIRS.source.replace("class Net(nn.Module):", "class Net(nn.Module):\n    domain = 0\n")
    source = source.replace("nn.BatchNorm2d(4)\n\n", "nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))\n\n")
    source = source.replace("self.bn2(", "self.bn2[self.domain](")
    network = Network(source, PAIRS.shape, 3, frozenset({"norm chosen at run time"}))
    assert check(network).sites == {"module, alone, none": 3}
    monkeypatch.setattr(Choices, "_beside", lambda *_: None)
    assert kind_of(network) == "wrong output"


def test_a_plan_that_forgets_a_norm_or_a_layer_is_incomplete() -> None:
    model = PAIRS.model()
    plan = ns.plan(model, "gn")
    assert accounted_for(plan, model, 2) == 0
    for steps, norms in ((plan.steps[1:], 2), ((*plan.steps, plan.steps[0]), 2), (plan.steps, 3)):
        with pytest.raises(BrokenPromiseError, match="incomplete plan"):
            accounted_for(dataclasses.replace(plan, steps=steps), model, norms)


def test_a_touched_model_and_an_exception_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ns.plan

    def touches(model: nn.Module, *args: Any, **kwargs: Any) -> Plan:
        next(model.parameters()).data.mul_(1.0001)
        return plan(model, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ns, "plan", touches)
        assert kind_of(PAIRS) == "touched"

    def crashes(*args: Any, **kwargs: Any) -> Plan:
        raise KeyError("a bug")

    monkeypatch.setattr(ns, "plan", crashes)
    assert kind_of(PAIRS) == "crash (KeyError)"
