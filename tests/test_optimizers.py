"""An optimizer goes through a swap: its momentum moves the function as before, and nothing of it is lost unsaid."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import BY_NAME
from pretrained import available, cifar10_train, load
from torch import Tensor, nn, optim
from zoo import leaves

import normswap as ns
from normswap.errors import InputError
from normswap.training.held import optimizers_in
from normswap.training.states import OPTIMIZERS

Make = Callable[[Iterable[Any]], optim.Optimizer]

MAKERS: dict[str, Make] = {
    "SGD": lambda p: optim.SGD(p, lr=0.05, momentum=0.9),
    "Nesterov": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: optim.Adam(p, lr=1e-3),
    "AMSGrad": lambda p: optim.Adam(p, lr=1e-3, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, lr=1e-3),
    "NAdam": lambda p: optim.NAdam(p, lr=1e-3),
    "RMSprop": lambda p: optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "Adamax": lambda p: optim.Adamax(p, lr=1e-3),
}


class Net(nn.Module):
    """Three convolutions, one with a bias, a residual addition, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x))))))
        return self.fc(x.mean((2, 3)))


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (16,), generator=generator)


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int = 30) -> None:
    x, y = data()
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()


def trained(make: Make) -> tuple[Net, optim.Optimizer]:
    model = Net().double()
    optimizer = make(model.parameters())
    train(model, optimizer)
    return model, optimizer


def output_change(model: nn.Module, optimizer: optim.Optimizer, rate: float) -> Tensor:
    """How the output changes by one step without a gradient: by what the optimizer remembers. Nothing stays changed."""
    x, _ = data(1)
    values, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        before = model(x)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = rate, 0.0
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        after = model(x)
    model.load_state_dict(values)
    optimizer.load_state_dict(state)
    return after - before


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --------------------------------------------------------------------------------------------- the law of the next step


@pytest.mark.parametrize("to", ["wn", "none"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_next_step_of_the_momentum_changes_the_function_as_without_the_swap(make: Make, to: str) -> None:
    """To first order: what is left is of second order, and falls with the rate as its share of the change does."""
    model, optimizer = trained(make)
    result = ns.convert(model, to, example_inputs=data()[:1])
    migrated = ns.migrate_optimizer(optimizer, result).optimizer
    errors = []
    for rate in (1e-5, 1e-6):
        expected = output_change(model, optimizer, rate)
        errors.append(distance(output_change(result.model, migrated, rate), expected))
    assert errors[0] < 1e-3  # a step of Adam's moves each value by the rate, so 1e-5 of 0.1 in a value
    assert errors[1] < 0.12 * errors[0] + 1e-7  # 1e-7: eps of Adam's, and rounding


@pytest.mark.parametrize("make", [MAKERS["SGD"], MAKERS["AdamW"]], ids=["SGD", "AdamW"])
def test_a_fresh_optimizer_and_momentum_carried_as_a_gradient_or_by_name_change_it_otherwise(make: Make) -> None:
    """The negative controls of the law."""
    model, optimizer = trained(make)
    result = ns.convert(model, "wn", example_inputs=data()[:1])
    expected = output_change(model, optimizer, 1e-6)
    fresh = output_change(result.model, make(result.model.parameters()), 1e-6)
    assert distance(fresh, expected) > 0.9  # nothing, but for an eps
    migrated = ns.migrate_optimizer(optimizer, result).optimizer
    first = "momentum_buffer" if "momentum_buffer" in next(iter(migrated.state.values())) else "exp_avg"
    moves = result.model.__dict__["_normswap_origin"].moves.moves
    for name, parameter in result.model.named_parameters():
        if name.endswith("original0"):  # g = ‖w‖/σ·γ: a gradient's factor is the inverse of the value's
            factor = moves[name].terms[0].factor.view_as(parameter)
            migrated.state[parameter][first] /= factor**2
    assert distance(output_change(result.model, migrated, 1e-6), expected) > 0.05


def test_a_whole_step_differs_from_the_unswapped_one_by_the_gradients_metric_alone() -> None:
    """With a gradient, ``δf' − δf = −lr (A' A'ᵀ − A Aᵀ) dL/df``, A and A' the Jacobians of the outputs f.

    The momentum's parts cancel. ``Aᵀ dL/df`` is autograd's gradient, and A of it a central difference of the outputs.
    """
    rate, h = 1e-7, 1e-6
    model, optimizer = trained(MAKERS["SGD"])
    x, y = data(1)
    result = ns.convert(model, "wn", example_inputs=(x,))
    migrated = ns.migrate_optimizer(optimizer, result).optimizer
    changes, metric = [], []
    for net, one in ((model, optimizer), (result.model, migrated)):
        one.zero_grad()
        F.cross_entropy(net(x), y).backward()
        gradients = [(p, p.grad.clone()) for p in net.parameters() if p.grad is not None]
        outputs = []
        with torch.no_grad():
            before = net(x)
            for step in (h, -2 * h, h):
                for parameter, gradient in gradients:
                    parameter += step * gradient
                outputs.append(net(x))
            metric.append((outputs[0] - outputs[1]) / (2 * h))
            for group in one.param_groups:
                group["lr"] = rate
            one.step()
            changes.append(net(x) - before)
    expected = -rate * (metric[1] - metric[0])
    # 1e-3: the step's second order, some 1e-6 of it, beside a difference that is a hundredth of the whole.
    assert distance(changes[1] - changes[0], expected) < 1e-3
    assert float(expected.norm()) > 1e-3 * float(changes[0].norm())  # the control: the metrics do differ


def test_second_moments_are_those_of_the_new_gradients() -> None:
    """With BatchNorm frozen, Adam's second moments of g and b' are near those that the new gradients really have."""
    model = Net().double().eval()
    result = ns.convert(model, "wn", example_inputs=data()[:1])
    optimizer = optim.Adam(model.parameters(), lr=0.0)
    other = optim.Adam(result.model.parameters(), lr=0.0)
    for seed in range(20):
        x, y = data(seed)
        for net, one in ((model, optimizer), (result.model, other)):
            one.zero_grad()
            F.cross_entropy(net(x), y).backward()
            one.step()
    migrated = ns.migrate_optimizer(optimizer, result).optimizer
    for name, parameter in result.model.named_parameters():
        found, wanted = (one.state[parameter]["exp_avg_sq"] for one in (migrated, other))
        if name.endswith("original0") or name.endswith("bias"):
            live = wanted > 1e-12
            ratio = (found[live] / wanted[live]).log2().abs()
            assert float(ratio.median()) < 1, name  # within a factor of 2: b' takes part in γ's gradient
        else:
            assert found.shape == parameter.shape


# ------------------------------------------------------------------------------------ every optimizer, every recipe


ALL: dict[str, Make] = {kind.__name__: kind for kind in OPTIMIZERS}  # type: ignore[attr-defined]


@pytest.mark.parametrize("to", ns.all_recipes())
def test_every_optimizer_goes_on_with_every_recipe(to: str) -> None:
    for kind, make in {**MAKERS, **ALL}.items():
        model, optimizer = trained(make)
        before = copy.deepcopy(optimizer.state_dict())
        result = ns.convert(model, to, example_inputs=data()[:1])
        found = ns.migrate_optimizer(optimizer, result)
        assert_same(optimizer.state_dict(), before)
        made = found.optimizer
        assert type(made) is type(optimizer), kind
        assert made.defaults == optimizer.defaults
        held = [p for group in made.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in result.model.parameters()}, kind
        for parameter, state in made.state.items():
            for value in state.values():
                if isinstance(value, Tensor) and value.ndim:
                    assert value.shape == parameter.shape
                    assert bool(value.isfinite().all())
        rows = {row.parameter for row in found.rows}
        assert rows == {n for n, _ in (*model.named_parameters(), *result.model.named_parameters())}
        assert "parameter" in str(found)
        train(result.model, made, 2)
        assert bool(result.model(data()[0]).isfinite().all())


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found["state"], expected["state"], rtol=0, atol=0)
    assert found["param_groups"] == expected["param_groups"]


def test_what_is_unchanged_is_carried_bit_for_bit() -> None:
    model, optimizer = trained(MAKERS["AdamW"])
    result = ns.convert(model, "wn", example_inputs=data()[:1])
    found = ns.migrate_optimizer(optimizer, result)
    what = {row.parameter: row.what for row in found.rows}
    new = dict(result.model.named_parameters())
    for name, old in (
        ("fc.weight", model.fc.weight),
        ("conv2.parametrizations.weight.original1", model.conv2.weight),
    ):
        assert what[name] == "unchanged"
        state = found.optimizer.state[new[name]]
        assert all(torch.equal(state[key], value) for key, value in optimizer.state[old].items())
        assert state["exp_avg"].data_ptr() != optimizer.state[old]["exp_avg"].data_ptr()
    assert what["conv2.weight"] == what["bn2.weight"] == "gone"
    assert what["conv2.bias"] == what["conv2.parametrizations.weight.original0"] == "mapped"


# ---------------------------------------------------------------------------------- groups, other models, places


def test_groups_options_rates_and_foreign_parameters_stay() -> None:
    model, other = Net().double(), nn.Linear(3, 2).double()
    norms = [p for m in (model.bn1, model.bn2, model.bn3) for p in m.parameters()]
    rest = [p for p in model.parameters() if all(p is not n for n in norms)]
    groups = [
        {"params": [other.weight, *rest], "weight_decay": 1e-2, "mine": "a"},
        {"params": [*norms, other.bias], "lr": 0.02},
    ]
    optimizer = optim.SGD(groups, lr=0.1, momentum=0.9)
    other(torch.ones(1, 3).double()).sum().backward()
    train(model, optimizer, 3)
    for parameter in other.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, 7.0)
    result = ns.convert(model, "wn", example_inputs=data()[:1])
    found = ns.migrate_optimizer(optimizer, result)
    first, second = found.optimizer.param_groups
    assert (first["weight_decay"], first["mine"], first["lr"], second["lr"]) == (1e-2, "a", 0.1, 0.02)
    assert first["params"][0] is other.weight
    assert second["params"][-1] is other.bias
    assert found.foreign == 2
    assert torch.equal(found.optimizer.state[other.weight]["momentum_buffer"], torch.full_like(other.weight, 7.0))
    names = {id(p): name for name, p in result.model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in second["params"][:-1]} == {"original0", "bias"}
    g = result.model.conv2.parametrizations.weight.original0
    along, gamma = (optimizer.state[p]["momentum_buffer"] for p in (model.conv2.weight, model.bn2.weight))
    w, sigma = model.conv2.weight.detach().flatten(1), (model.bn2.running_var + model.bn2.eps).sqrt()
    unit = w / w.norm(dim=1, keepdim=True)
    # In g's group a step is five times smaller than in w's, so that w's part counts five times.
    expected = w.norm(dim=1) / sigma * gamma + 5 * model.bn2.weight / sigma * (along.flatten(1) * unit).sum(1)
    torch.testing.assert_close(found.optimizer.state[g]["momentum_buffer"].flatten(), expected.detach())


def test_a_conversion_in_place_is_followed_by_the_old_tensors_that_the_optimizer_holds() -> None:
    model, optimizer = trained(MAKERS["AdamW"])
    twin, second = copy.deepcopy((model, optimizer))
    outside = ns.migrate_optimizer(second, ns.convert(twin, "wn", example_inputs=data()[:1])).optimizer
    schedule = optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    result = ns.convert(model, "wn", example_inputs=data()[:1], inplace=True)
    found = ns.migrate_optimizer(optimizer, result, inplace=True)
    assert found.optimizer is optimizer
    torch.testing.assert_close(optimizer.state_dict()["state"], outside.state_dict()["state"], rtol=0, atol=0)
    train(model, optimizer, 1)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 5e-4


def test_a_match_in_place_is_followed_as_one_beside_the_model() -> None:
    model, optimizer = trained(MAKERS["SGD"])
    twin, second = copy.deepcopy((model, optimizer))
    outside = ns.migrate_optimizer(second, ns.convert(twin, "gn+ws", calibration=data()[0])).optimizer
    result = ns.convert(model, "gn+ws", calibration=data()[0], inplace=True)
    found = ns.migrate_optimizer(optimizer, result).optimizer
    torch.testing.assert_close(found.state_dict()["state"], outside.state_dict()["state"])


def test_names_in_the_optimizer_decide_and_stay() -> None:
    model = Net().double()
    optimizer = optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 2)
    result = ns.convert(model, "wn", example_inputs=data()[:1])
    live = ns.migrate_optimizer(optimizer, result).optimizer
    names = [name for name, _ in result.model.named_parameters()]
    assert live.param_groups[0]["param_names"] == names
    given = optimizer.state_dict()
    found = ns.migrate_optimizer(given, result).optimizer
    assert found["param_groups"][0]["param_names"] == names
    torch.testing.assert_close(found["state"], live.state_dict()["state"])
    given["param_groups"][0]["param_names"] = [f"module.{name}" for name in given["param_groups"][0]["param_names"]]
    with pytest.raises(InputError, match="other-optimizer"):
        ns.migrate_optimizer(given, result)


def test_a_state_dict_goes_with_a_conversion_from_a_file(tmp_path: Path) -> None:
    for to in ("wn", "gn+ws"):
        model, optimizer = trained(MAKERS["AdamW"])
        result = ns.convert(model, to, example_inputs=data()[:1])
        ns.save(result.model, tmp_path / "m.safetensors")
        loaded = ns.load(tmp_path / "m.safetensors", model=Net().double())
        given = optimizer.state_dict()
        state = ns.migrate_optimizer(given, loaded).optimizer
        live = ns.migrate_optimizer(optimizer, result).optimizer
        torch.testing.assert_close(state["state"], live.state_dict()["state"], rtol=0, atol=0)
        again = optim.AdamW(loaded.parameters(), lr=1.0)
        again.load_state_dict(state)
        assert again.param_groups[0]["lr"] == 1e-3
        train(loaded, again, 1)


def test_a_state_dict_of_groups_made_by_hand_needs_the_names() -> None:
    model = Net().double()
    named = dict(model.named_parameters())
    order = sorted(named, key=lambda name: (named[name].ndim < 2, name))
    optimizer = optim.SGD([named[name] for name in order], lr=0.1, momentum=0.9)
    train(model, optimizer, 2)
    result = ns.convert(model, "wn", example_inputs=data()[:1])
    state = ns.migrate_optimizer(optimizer.state_dict(), result, names=order).optimizer
    live = ns.migrate_optimizer(optimizer, result).optimizer
    torch.testing.assert_close(state["state"], live.state_dict()["state"], rtol=0, atol=0)
    with pytest.raises(InputError, match="optimizer-shape"):
        ns.migrate_optimizer(optimizer.state_dict(), result)


def test_frozen_parameters_and_those_that_had_no_step_are_fresh_and_said_to_be() -> None:
    model = Net().double()
    model.bn2.requires_grad_(False)
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    result = ns.convert(model, "wn", example_inputs=data()[:1])
    rows = {row.parameter: row for row in ns.migrate_optimizer(optimizer, result).rows}
    assert rows["fc.weight"].what == "fresh"
    assert "had taken no step" in rows["fc.weight"].detail
    train(model, optimizer, 1)
    found = ns.migrate_optimizer(optimizer, ns.convert(model, "wn", example_inputs=data()[:1]))
    rows = {row.parameter: row for row in found.rows}
    assert rows["conv2.parametrizations.weight.original0"].what == "mapped"  # of the filter's length alone
    assert rows["conv2.bias"].what == "not held" or "not in the optimizer" in rows["conv2.bias"].detail


def test_options_of_the_implementation_are_kept() -> None:
    for options in ({"foreach": True}, {"fused": True}, {"capturable": False, "maximize": True}):
        model = Net().double()
        optimizer = optim.AdamW(model.parameters(), lr=1e-3, **options)
        train(model, optimizer, 2)
        result = ns.convert(model, "wn", example_inputs=data()[:1])
        made = ns.migrate_optimizer(optimizer, result).optimizer
        assert options.items() <= made.param_groups[0].items()
        train(result.model, made, 2)


def test_a_match_on_data_is_followed_with_the_signs_that_it_chose() -> None:
    """Momentum of a fitted filter points where the old one's did, in the filter's own sign."""
    model, optimizer = trained(MAKERS["SGD"])
    result = ns.convert(model, "gn", calibration=data()[0], num_groups=2)
    made = ns.migrate_optimizer(optimizer, result).optimizer
    old, new = model.conv2.weight, result.model.conv2.weight
    signs = ((old * new).flatten(1).sum(1)).sign()
    before, after = optimizer.state[old]["momentum_buffer"], made.state[new]["momentum_buffer"]
    cosines = F.cosine_similarity(before.flatten(1), after.flatten(1)) * signs
    torch.testing.assert_close(cosines.detach(), torch.ones(8).double())


# -------------------------------------------------------------------------------------------------------- refusals


def test_parameters_that_two_norms_share_lead_to_both() -> None:
    entry = BY_NAME["tied_gammas"]
    model = entry.model()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(value.float().square().mean() for value in leaves(model(*entry.inputs()))).backward()
    optimizer.step()
    result = ns.convert(model.eval(), "wn", example_inputs=entry.inputs())
    found = ns.migrate_optimizer(optimizer, result)
    into = [row for row in found.rows if row.what == "mapped" and row.parameter.endswith("original0")]
    shared = {row.detail.removeprefix("from ").split(" ")[0] for row in into}
    assert len(into) == 2
    assert len(shared) == 1


class Mine(optim.SGD):
    """A subclass may keep what it likes."""


class Wrapper(optim.Optimizer):
    """As accelerate's, Opacus' and Lightning's: the state is that of the optimizer within."""

    def __init__(self, inner: optim.Optimizer) -> None:
        self.inner = inner


def test_what_cannot_be_migrated_is_refused_by_name_and_nothing_is_changed() -> None:
    model, optimizer = trained(MAKERS["SGD"])
    result = ns.convert(model, "wn", example_inputs=data()[:1])
    for given, code, words in (
        (Mine(model.parameters(), lr=0.1), "unknown-optimizer", "Mine"),
        (optim.LBFGS(model.parameters()), "unknown-optimizer", "LBFGS"),
        (Wrapper(optimizer), "wrapped-optimizer", "wraps the SGD in its attribute 'inner'"),
        (optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), "other-optimizer", "none of the 2 parameters"),
        ({"state": {}}, "no-optimizer", "dict"),
        (7, "no-optimizer", "int"),
        ({"state": {0: {"odd": torch.ones(2)}}, "param_groups": [{"params": [0]}]}, "unknown-optimizer", "odd"),
        ({"state": {}, "param_groups": [{"params": [0]}]}, "optimizer-names", "of 1 parameters"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            ns.migrate_optimizer(given, result)
        assert caught.value.code == code
        assert caught.value.hint
    with pytest.raises(InputError, match="not-converted"):
        ns.migrate_optimizer(optimizer, model)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.state[model.bn1.weight]["momentum_buffer"] = torch.ones(3)
    with pytest.raises(InputError, match="optimizer-shape"):
        ns.migrate_optimizer(optimizer, result, inplace=True)
    assert optimizer.param_groups[0]["params"][0] is model.conv1.weight
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("to", ns.all_recipes())
def test_a_migrated_optimizer_is_not_migrated_again(to: str, inplace: bool) -> None:
    """As when a notebook's cell is run twice: momentum would be mapped twice."""
    model, optimizer = trained(MAKERS["SGD"])
    result = ns.convert(model, to, example_inputs=data()[:1], inplace=inplace)
    migrated = ns.migrate_optimizer(optimizer, result, inplace=inplace).optimizer
    before = copy.deepcopy(migrated.state_dict())
    for again in (migrated, optim.SGD(result.model.parameters(), lr=0.1)):
        if again is migrated or not inplace:
            with pytest.raises(InputError, match="is one of the converted model already") as caught:
                ns.migrate_optimizer(again, result, inplace=inplace)
            assert caught.value.code == "migrated-already"
    torch.testing.assert_close(migrated.state_dict(), before, rtol=0, atol=0)
    if not inplace:  # the old one may be migrated as often as one likes
        assert ns.migrate_optimizer(optimizer, result).rows


def test_one_optimizer_goes_through_one_conversion_after_the_other() -> None:
    model, optimizer = trained(MAKERS["SGD"])
    for only in (["bn1"], ["*"]):
        result = ns.convert(model, "wn", example_inputs=data()[:1], inplace=True, include=only)
        assert result.model is model
        ns.migrate_optimizer(optimizer, result, inplace=True)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_a_batchnorm_state_is_refused_by_a_migrated_optimizer_when_it_is_loaded() -> None:
    """torch's own optimizer takes it, and crashes at the next step."""
    model, optimizer = trained(MAKERS["AdamW"])
    result = ns.convert(model, "gn+ws", example_inputs=data()[:1])
    made = ns.migrate_optimizer(optimizer, result).optimizer
    given = optimizer.state_dict()
    given["param_groups"][0]["params"] = list(range(len(list(result.model.parameters()))))
    with pytest.raises(InputError, match="migrate_optimizer"):
        made.load_state_dict(given)
    made.load_state_dict(made.state_dict())
    optim.AdamW(result.model.parameters()).load_state_dict(given)


# --------------------------------------------------------------------------------------- optimizers in the model


class Policy(nn.Module):
    """A policy as libraries of reinforcement learning write it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.optimizer = optim.Adam(self.net.parameters(), lr=1e-3)
        self.more = {"critic": [optim.SGD(self.net.fc.parameters(), lr=0.1)]}

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_an_optimizer_that_the_model_holds_is_noted_and_can_be_migrated() -> None:
    policy = Policy().double()
    assert [name for name, _ in optimizers_in(policy)] == ["optimizer", "more['critic'][0]"]
    train(policy, policy.optimizer, 3)
    for inplace in (False, True):
        result = ns.convert(policy, "wn", example_inputs=data()[:1], inplace=inplace)
        notes = [note for note in result.init.notes if "migrate_optimizer" in note]
        assert len(notes) == 2
        assert "result.model.optimizer" in notes[0]
        ns.migrate_optimizer(result.model.optimizer, result, inplace=True)
        held = {id(p) for p in result.model.optimizer.param_groups[0]["params"]}
        assert held == {id(p) for p in result.model.parameters()}
        before = result.model(data()[0])
        train(result.model, result.model.optimizer, 1)
        assert not torch.allclose(result.model(data()[0]), before)
    assert not [n for n in ns.convert(Net(), "wn").init.notes if "optimizer" in n]


# ----------------------------------------------------------------------------------------------- a real network


@pytest.mark.skipif(not available(), reason="no data folder")
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_real_network_goes_on_as_it_would_have_after_300_steps(name: str) -> None:
    """ResNet-20 on CIFAR-10, its BatchNorms frozen: momentum moves the function alike, and a fresh optimizer not."""
    model, _ = load("cifar10_resnet20")
    model = model.eval()
    make: Make = (lambda p: optim.SGD(p, lr=1e-3, momentum=0.9)) if name == "SGD" else (lambda p: optim.AdamW(p, 1e-4))
    optimizer = make(model.parameters())
    images, labels = cifar10_train(300 * 4)
    for x, y in zip(images.split(4), labels.split(4), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model, images = model.double(), images[:32].double()
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.double() if value.ndim else value
    result = ns.convert(model, "wn", example_inputs=(images,))
    made = ns.migrate_optimizer(optimizer, result).optimizer
    changes = {}
    for key, net, one in (
        ("old", model, optimizer),
        ("new", result.model, made),
        ("fresh", result.model, make(result.model.parameters())),
    ):
        values = copy.deepcopy(net.state_dict())
        with torch.no_grad():
            before = net(images)
            for group in one.param_groups:
                group["lr"], group["weight_decay"] = 1e-7, 0.0
            for parameter in net.parameters():
                parameter.grad = torch.zeros_like(parameter)
            one.step()
            changes[key] = net(images) - before
        net.load_state_dict(values)
    assert distance(changes["new"], changes["old"]) < 1e-3
    assert distance(changes["fresh"], changes["old"]) > 0.9
