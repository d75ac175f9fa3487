"""Recorded capture: what runs show, what they cannot see, and that nothing is absorbed where that is wrong."""

from __future__ import annotations

import dataclasses
import gc
import json
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import changed, distance, doubled, fingerprint
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint
from zoo import ZOO, Entry, randomize_

import normswap as ns
from normswap.errors import InputError, NormswapError
from normswap.graph import Capture, capture, capture_recorded, capture_symbolic
from normswap.graph.dataflow import Dataflow
from normswap.graph.perturbation import confirm_feeds
from normswap.records import Plan
from normswap.stages.find_sites import find_sites

EXACT = 1e-12  # in float64; a wrong absorption is off by more than a hundredth


class Pair(nn.Module):
    """A convolution and a BatchNorm in a forward that no trace gets through; what it does between is the case."""

    def __init__(self, between: Callable[[Pair, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(4, 6, 3)
        self.drop = nn.Dropout(0.5)
        self.between, self.last = [between], None
        self.register_buffer("kept", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        if not bool((x == x).all()):  # a branch on a value: no trace gets through
            return x
        return self.between[0](self, x)


def sum_of(x: Tensor) -> Tensor:
    return x.tanh().sum()


def change(x: Tensor) -> None:
    x.mul_(2.0)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TorchScript is deprecated, and yet in use
    scripted_sum, scripted_change = torch.jit.script(sum_of), torch.jit.script(change)


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


@dataclass
class Found:
    """A container that no tree utility looks into."""

    normal: Tensor
    raw: Tensor


def in_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []

    def run() -> None:
        with torch.no_grad():
            results.append(work())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def after(use: Callable[[Pair, Tensor], Any]) -> Callable[[Pair, Tensor], Any]:
    """``use`` makes something of the convolution's output, which is added to the norm's."""

    def forward(m: Pair, x: Tensor) -> Any:
        y = m.conv(x)
        extra = use(m, y)
        return m.bn(y) + (0 if extra is None else extra)

    return forward


def caught(m: Pair, x: Tensor) -> Tensor:
    try:
        m.conv(x[:, :3])
    except RuntimeError:
        return m.bn(m.conv(x))
    raise AssertionError


def twice(m: Pair, x: Tensor) -> Tensor:
    return m.bn(m.conv(x)) + m.bn(m.conv(x.flip(-1)))


def inference(m: Pair, y: Tensor) -> Tensor:
    with torch.inference_mode():
        return (y * 2).sum().clone()


def hidden_region(_: Any, y: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return y.tanh().sum()


def stashed(m: Pair, y: Tensor) -> None:
    m.last = y


def in_training(m: Pair, y: Tensor) -> Tensor | int:
    return y.tanh() if m.training else 0


def none(_: Any) -> None:
    return None


def inferred(m: Pair, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = m.bn(m.conv(x))
    return y.clone()


# What is wrong to absorb, though a run shows (or seems to show) the convolution in front of the norm.
TRAPS: dict[str, Callable[[Pair, Tensor], Any]] = {
    "written through a view": after(lambda m, y: none(y.view(-1)[::2].mul_(2))),
    "written through an index": after(lambda m, y: none(y[:, 1].fill_(0.5))),
    "item assignment": after(lambda m, y: none(y.__setitem__((slice(None), 0), 1.0))),
    "written by relu_": after(lambda m, y: none(F.relu_(y))),
    "written by out=": after(lambda m, y: none(torch.mul(y, y, out=y))),
    "written by an operator": after(lambda m, y: none(torch.ops.aten.mul_(y, y))),
    "written by an overload": after(lambda m, y: none(torch.ops.aten.mul_.Tensor(y, y))),
    "written through data": after(lambda m, y: none(y.data.pow_(2))),
    "written through detach": after(lambda m, y: none(y.detach().pow_(2))),
    "written through numpy": after(lambda m, y: none(y.numpy().__imul__(y.numpy()))),
    "written through dlpack": after(lambda m, y: none(torch.from_dlpack(y).pow_(2))),
    "written in a thread": after(lambda m, y: in_thread(lambda: none(y.pow_(2)))),
    "written through data in a thread": after(lambda m, y: in_thread(lambda: none(y.data.pow_(2)))),
    "written by TorchScript": after(lambda m, y: scripted_change(y)),
    "storage exchanged": after(lambda m, y: none(y.set_(y.tanh()))),
    "data exchanged": after(lambda m, y: none(setattr(y, "data", y.tanh()))),
    "read through data": after(lambda m, y: y.data.tanh()),
    "read through detach": after(lambda m, y: y.detach().tanh()),
    "read through numpy": after(lambda m, y: float(y.numpy().max())),
    "read through dlpack": after(lambda m, y: torch.from_dlpack(y).tanh()),
    "read as a number": after(lambda m, y: y.mean().item()),
    "read as a list": after(lambda m, y: max(y.flatten().tolist())),
    "read in a thread": after(lambda m, y: in_thread(lambda: y.tanh())),
    "read by TorchScript": after(lambda m, y: scripted_sum(y)),
    "read under vmap": after(lambda m, y: torch.vmap(lambda one: one.tanh())(y)),
    "read in inference mode": after(inference),
    "read without torch functions": after(hidden_region),
    "read by an autograd function": after(lambda m, y: Doubles.apply(y)),
    "read in training only": after(in_training),
    "branches on it": after(lambda m, y: 1.0 if y.mean() > 0 else -1.0),
    "output used twice": after(lambda m, y: y.tanh()),
    "output returned": lambda m, x: (lambda y: (m.bn(y), y))(m.conv(x)),
    "output returned in a container": lambda m, x: (lambda y: Found(m.bn(y), y))(m.conv(x)),
    "output kept": after(stashed),
    "output kept in a buffer": after(lambda m, y: none(m.kept.copy_(y.mean()))),
    "dropout between": lambda m, x: m.bn(m.drop(m.conv(x))),
    "dropout beside": after(lambda m, y: m.drop(y).tanh()),
    "relu_ between": lambda m, x: m.bn(m.conv(x).relu_()),
    "a chunk": lambda m, x: m.bn(torch.cat(m.conv(x).chunk(2, dim=1)[::-1], 1)),
    "a split beside": after(lambda m, y: y.split(3, dim=1)[0].sum()),
    "a slice": lambda m, x: m.bn(m.conv(x)[:, [1, 0, 2, 3, 4, 5]]),
    "two layers": lambda m, x: m.bn(m.conv(x)) + m.bn(m.other(x)),
    "layer called twice": lambda m, x: m.bn(m.conv(x)) + m.conv(x.flip(-1)),
    "layer called in a thread": lambda m, x: m.bn(m.conv(x)) + in_thread(lambda: m.conv(x.flip(-1))),
    "forward called by name": lambda m, x: m.bn(m.conv(x)) + m.conv.forward(x.flip(-1)),
    "weight read": lambda m, x: m.bn(m.conv(x)) + F.conv2d(x.tanh(), m.conv.weight),
    "weight read through data": lambda m, x: m.bn(m.conv(x)) + m.conv.weight.data.tanh().sum(),
    "weight read in a thread": lambda m, x: m.bn(m.conv(x)) + in_thread(lambda: m.conv.weight.tanh().sum()),
    "weight read by TorchScript": lambda m, x: m.bn(m.conv(x)) + scripted_sum(m.conv.weight),
    "weight read without torch functions": lambda m, x: m.bn(m.conv(x)) + hidden_region(m, m.conv.weight),
    "weight read through numpy": lambda m, x: m.bn(m.conv(x)) + float(abs(m.conv.weight.numpy()).max()),
    "bias read": lambda m, x: m.bn(m.conv(x)) + m.conv.bias.tanh().sum(),
    "another branch": lambda m, x: m.bn(m.conv(x)) if x.sum() > 0 else F.pad(m.conv(x), (0, 0)),
}

# What is right, and what a run on example inputs lets pass.
RIGHT: dict[str, Callable[[Pair, Tensor], Any]] = {
    "directly": lambda m, x: m.bn(m.conv(x)),
    "contiguous between": lambda m, x: m.bn(m.conv(x).contiguous()),
    "pair called twice": twice,
    "its shape is read": lambda m, x: m.bn(y := m.conv(x)) * y.shape[-1],
    "checkpoint": lambda m, x: checkpoint(lambda v: m.bn(m.conv(v)), x, use_reentrant=False),
    "reentrant checkpoint": lambda m, x: checkpoint(lambda v: m.bn(m.conv(v)), x, use_reentrant=True),
    "no value at all": lambda m, x: m.bn(m.conv(x)) if len(x) else x,
}

# Of the traps these spring in train mode only: there is no difference in evaluation.
TRAPS_IN_TRAINING = {"read in training only", "dropout between"}

# Right as well, but where no one could know it.
MISSED: dict[str, Callable[[Pair, Tensor], Any]] = {
    "a failing call before": caught,
    "pair in a thread": lambda m, x: in_thread(lambda: m.bn(m.conv(x))),
    "under inference mode": inferred,
}


def build(between: Callable[[Pair, Tensor], Any]) -> tuple[Pair, Tensor]:
    model = randomize_(Pair(between), 0).double()
    return model, torch.randn(3, 4, 7, 7, dtype=torch.float64) + 0.5


def outputs(model: nn.Module, x: Tensor) -> list[Any]:
    """What the model gives in eval mode for ``x`` and for ``-x``, and what it keeps of them."""
    found: list[Any] = []
    with torch.no_grad():
        for value in (x, -x):
            output = model(value.clone())
            found += dataclasses.astuple(output) if isinstance(output, Found) else [output]
            found += [model.last, model.kept.clone()]
    return [value for value in found if value is not None]


def layer_of(plan: Plan) -> str | None:
    (step,) = plan.steps
    return step.site.layer


def forced(plan: Plan) -> Plan:
    """The plan as a fuser that goes by names would have it."""
    (step,) = plan.steps
    site = dataclasses.replace(step.site, layer="conv", layer_type="Conv2d", fan_in=36, reason=None)
    return dataclasses.replace(plan, steps=(dataclasses.replace(step, site=site, weight="wn"),))


@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_layer_is_absorbed_where_that_is_wrong(name: str) -> None:
    model, x = build(TRAPS[name])
    result = ns.convert(model, "wn+mobn", example_inputs=x, check=False)
    assert layer_of(result.plan) is None
    assert distance(outputs(result.model, x), outputs(model, x)) < EXACT


@pytest.mark.parametrize("name", sorted(set(TRAPS) - TRAPS_IN_TRAINING))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fuser_that_goes_by_names_is_wrong_there(name: str) -> None:
    """The negative control: each trap is one."""
    model, x = build(TRAPS[name])
    plan = forced(ns.plan(model, "wn+mobn", example_inputs=x))
    wrong = ns.convert(model, plan=plan, check=False).model
    if name == "bias read":  # the bias is gone
        with pytest.raises(AttributeError, match="tanh"):
            outputs(wrong, x)
    else:
        assert distance(outputs(wrong, x), outputs(model, x)) > 1e-2


@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_numeric_check_alone_finds_every_trap(name: str) -> None:
    model, x = build(TRAPS[name])
    assert not confirm_feeds(model, [("conv", "bn")], (x,))


@pytest.mark.parametrize("name", {**RIGHT, **MISSED})
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # says the reentrant checkpoint
def test_a_layer_is_absorbed_where_runs_show_that_it_may_be(name: str) -> None:
    model, x = build({**RIGHT, **MISSED}[name])
    result = ns.convert(model, "wn+mobn", example_inputs=x, check=False)
    (step,) = result.plan.steps
    if name in RIGHT:
        assert (step.site.layer, step.site.found_by, step.site.proof) == ("conv", "recorded", "checked")
        assert "checked, recorded" in str(result.plan)
    else:
        assert step.site.layer is None
        assert step.site.reason
    assert confirm_feeds(model, [("conv", "bn")], (x,)) == {("conv", "bn"): frozenset({False, True})}
    assert distance(outputs(result.model, x), outputs(model, x)) < EXACT


@pytest.mark.parametrize(
    ("use", "alone"),
    [
        (lambda m, y: m.bn(y.transpose(1, 2)), True),
        (lambda m, y: m.bn(y.movedim(-1, 1)), True),
        (lambda m, y: m.bn(y.flip(-1).transpose(1, 2)), False),
        (lambda m, y: m.bn(y.transpose(1, 2)) + y.transpose(1, 2), False),
        (lambda m, y: m.bn(y.transpose(1, 2) * 1.0), False),
    ],
)
def test_a_layer_feeds_a_norm_through_axes_that_are_moved_and_through_nothing_else(use: Any, alone: bool) -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bn = nn.Linear(5, 6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return use(self, self.fc(x))

    model, x = randomize_(Moved(), 0).double(), torch.randn(3, 7, 5, dtype=torch.float64)
    assert (("fc", "bn") in confirm_feeds(model, [("fc", "bn")], (x,))) == alone


@pytest.mark.parametrize(("share", "alone"), [(0.0, True), (1e-3, False), (1e-4, False)])
def test_a_use_that_hardly_shows_in_any_result_is_seen(share: float, alone: bool) -> None:
    """In one operation with a large value: no result of its own, and no other, changes much."""

    class HardlyUsed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.add(self.bn(y), y, alpha=share) if share else self.bn(y)

    model, x = randomize_(HardlyUsed(), 0).double(), torch.randn(2, 4, 7, 7, dtype=torch.float64)
    assert (("conv", "bn") in confirm_feeds(model, [("conv", "bn")], (x,))) == alone


def test_without_inputs_nothing_is_absorbed_and_the_plan_says_what_to_do() -> None:
    model, _ = build(RIGHT["directly"])
    (step,) = ns.plan(model, "ln").steps
    assert step.site.layer is None
    assert "could not be traced" in str(step.site.reason)


def test_a_check_that_could_not_reach_train_mode_says_so() -> None:
    def wants_targets(m: Pair, x: Tensor) -> Tensor:
        if m.training:
            raise ValueError("targets should not be None in train mode")
        return m.bn(m.conv(x))

    model, x = build(wants_targets)
    plan = ns.plan(model, "ln", example_inputs=x)
    assert layer_of(plan) == "conv"
    assert "checked in eval mode only" in str(plan)
    assert Plan.from_json(plan.to_json()) == plan


def test_plans_of_before_the_record_still_load() -> None:
    model, x = build(RIGHT["directly"])
    plan = ns.plan(model, "ln", example_inputs=x)
    record = json.loads(plan.to_json())
    for step in record["steps"]:
        del step["site"]["found_by"], step["site"]["caveat"]
    (step,) = Plan.from_json(json.dumps(record)).steps
    assert step.site == dataclasses.replace(plan.steps[0].site, found_by="symbolic")


# ---------------------------------------------------------------------------------------- against symbolic capture

# A record finds another layer than the symbolic capture, or refuses where that does not, for the reason given.
DIFFERENCES = dict.fromkeys(
    (
        *("functional_norm", "functional_norm_in_child", "functional_frozen", "functional_without_layer"),
        *("functional_and_module_mix", "norm_as_holder", "user_graph"),
    ),
    "a record sees a functional norm in one mode at a time, and gives no forward to rewrite",
)


def layers_found(model: nn.Module, found: Capture, inputs: tuple[Tensor, ...]) -> dict[str, str | None]:
    return {site.norm: site.layer for site in find_sites(Dataflow(found), inputs).sites}


@pytest.mark.parametrize("entry", ZOO, ids=str)
def test_a_record_finds_the_layers_that_a_trace_finds(entry: Entry) -> None:
    model, inputs = entry.model().double(), doubled(entry.inputs)()
    by_trace = layers_found(model, capture(model, inputs), inputs)
    by_record = layers_found(model, capture(model, inputs, "recorded"), inputs)
    assert (by_record == by_trace) != (entry.name in DIFFERENCES)
    if entry.name in DIFFERENCES:
        assert by_record.items() <= by_trace.items()


def test_a_record_counts_every_call_of_a_shared_head() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, levels: list[Tensor]) -> list[Tensor]:
            return [self.bn(self.conv(level)) for level in levels if level.sum() != 0]

    model = randomize_(Head(), 0).double()
    levels = [torch.randn(2, 4, n, n, dtype=torch.float64) for n in (16, 8, 4, 2, 1)]
    graph = capture_recorded(model, (levels,)).traces[0].graph
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    assert calls == ["conv", "bn"] * 5
    result = ns.convert(model, "wn+mobn", example_inputs=(levels,))
    assert layer_of(result.plan) == "conv"
    with torch.no_grad():
        assert distance(result.model(levels), model(levels)) < EXACT


class Across(nn.Module):
    """A layer at the end of one traceable child feeds a norm at the beginning of another."""

    def __init__(self, use: Callable[[Tensor], Tensor | int]) -> None:
        super().__init__()
        self.post = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
        self.pre = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() == 0:
            return x
        y = self.pre(x)
        return self.post(y) + self.use(y)


@pytest.mark.parametrize(
    ("use", "layer"), [(lambda y: 0, "pre.2"), (lambda y: y.tanh(), None), (lambda y: hidden_region(None, y), None)]
)
def test_a_layer_is_found_across_the_bounds_of_what_could_be_traced(use: Any, layer: str | None) -> None:
    model, x = randomize_(Across(use), 0).double(), torch.randn(2, 4, 7, 7, dtype=torch.float64)
    result = ns.convert(model, "wn+mobn", example_inputs=x)
    found = [(step.site.norm, step.site.layer, step.site.found_by) for step in result.plan.steps]
    assert found == [("post.0", layer, "recorded"), ("post.3", "post.2", "symbolic")]  # in the order of the run
    with torch.no_grad():
        assert distance(result.model(x), model(x)) < EXACT


def test_the_rank_of_a_batch_norm_1d_is_decided_by_the_run() -> None:
    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bn = nn.Linear(5, 6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.fc(x)) if len(x) else x

    model = randomize_(Vectors(), 0)
    flat, square = torch.randn(4, 5), torch.randn(4, 6, 5)
    assert layer_of(ns.plan(model, "wn+mobn", example_inputs=flat)) == "fc"
    (step,) = ns.plan(model, "wn+mobn", example_inputs=square).steps
    assert step.site.layer is None
    assert step.site.rank == 3
    assert "3 axes" in str(step.site.reason)


def test_one_value_per_group_is_refused_by_what_the_run_shows() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 6, 1), nn.SyncBatchNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) if x.sum() != 0 else x

    model = randomize_(Pooled(), 0)
    for side, refused in ((1, True), (2, False)):
        plan = ns.plan(model, "gn", example_inputs=torch.randn(2, 4, side, side), num_groups=6)
        assert any(skip.code == "recipe-refuses" for skip in plan.skips if skip.what == "norm") == refused
        assert not refused or not plan.steps


def test_a_functional_norm_in_an_untraceable_forward_is_refused_with_what_to_do() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() == 0:
                return x
            y = self.bn(self.conv(x))
            return F.batch_norm(y, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias)

    model, x = randomize_(Functional(), 0).double(), torch.randn(2, 4, 7, 7, dtype=torch.float64)
    result = ns.convert(model, "wn+mobn", example_inputs=x)
    assert [step.site.norm for step in result.plan.steps] == ["bn"]
    (skip,) = [skip for skip in result.plan.skips if skip.what == "norm"]
    assert skip.name == "norm"
    assert "make it a BatchNorm module" in skip.reason
    with torch.no_grad():
        assert distance(result.model(x), model(x)) < EXACT


# -------------------------------------------------------------------------------------------- weight normalization


@pytest.mark.parametrize("normed", [weight_norm, parametrizations.weight_norm])
@pytest.mark.parametrize("how", ["traced", "recorded"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_normed_layer_keeps_its_function(normed: Callable[[nn.Module], nn.Module], how: str) -> None:
    pair, x = build(RIGHT["directly"])
    normed(pair.conv)
    model = pair if how == "recorded" else nn.Sequential(pair.conv, pair.bn, nn.ReLU(), nn.Conv2d(6, 2, 1).double())
    for recipe in ("wn+mobn", "none", "mobn"):
        result = ns.convert(model, recipe, example_inputs=x)
        (step,) = result.plan.steps
        assert step.site.layer is None
        assert "parametrized" in str(step.site.reason)
        with torch.no_grad():
            assert distance(result.model(x), model(x)) < EXACT
            assert distance(ns.fold(result.model.eval(), example_inputs=x)(x), model(x)) < EXACT


# ----------------------------------------------------------------------------------------------- read-only, errors


class Fragile(nn.Module):
    """Writes to itself, draws random numbers, changes modes, and fails where it is told to."""

    def __init__(self, place: str, failure: type[BaseException]) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros(1))
        self.place, self.failure, self.history = place, failure, [0]
        self.bn.register_forward_hook(lambda *_: self.fail("hook"))

    def fail(self, place: str) -> None:
        if place == self.place:
            raise self.failure("on purpose")

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.history.append(1)
        self.conv.train(not self.conv.training)
        y = self.drop(self.conv(x)) + torch.rand(1)
        self.fail("middle")
        return self.bn(y)


@pytest.mark.parametrize("place", ["middle", "hook", "nowhere"])
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("how", ["symbolic", "recorded", "auto"])
@pytest.mark.parametrize("training", [False, True])
def test_capture_leaves_everything_as_it_was(
    place: str, failure: type[BaseException], how: str, training: bool
) -> None:
    model, x = Fragile(place, failure).train(training), torch.randn(2, 4, 7, 7)
    model.conv.eval()
    state, history, given = fingerprint(model), list(model.history), x.clone()
    try:
        capture(model, (x,), how)
    except (KeyboardInterrupt, NormswapError):
        assert place != "nowhere"
    assert not changed(state, fingerprint(model))
    assert model.history == history
    assert torch.equal(x, given)


def test_the_comparison_sees_what_such_a_forward_does() -> None:
    """The negative control of the test above."""
    model = Fragile("nowhere", RuntimeError).train()
    state = fingerprint(model)
    model(torch.randn(2, 4, 7, 7))
    touched = changed(state, fingerprint(model))
    assert {"tensor steps", "tensor bn.running_mean", "module conv", "generators"} <= touched


@pytest.mark.parametrize("place", ["middle", "hook"])
def test_an_interrupted_check_leaves_everything_as_it_was(place: str) -> None:
    model, x = Fragile(place, KeyboardInterrupt), torch.randn(2, 4, 7, 7)
    state = fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        confirm_feeds(model, [("conv", "bn")], (x,))
    assert not changed(state, fingerprint(model))


def test_capture_keeps_no_tensor_of_the_run_alive() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def watched(m: Pair, x: Tensor) -> Tensor:
        y = m.conv(x)
        seen.append(weakref.ref(y))
        return m.bn(y)

    model, x = build(watched)
    graphs = capture_recorded(model, (x,))
    gc.collect()
    assert len(seen) == len(graphs.traces) == 2
    assert all(ref() is None for ref in seen)


def test_an_input_is_not_written_to() -> None:
    model, x = build(lambda m, x: m.bn(m.conv(x.mul_(2))))
    before = x.clone()
    ns.plan(model, "ln", example_inputs=x)
    assert torch.equal(x, before)


def test_what_cannot_be_captured_is_refused_with_a_hint() -> None:
    model, x = build(RIGHT["directly"])
    for wrong in (
        lambda: capture(model, (x[:, :3],)),
        lambda: capture(model, None, "recorded"),
        lambda: capture(model, (x,), "guess"),
    ):
        with pytest.raises(InputError) as caught_error:
            wrong()
        assert caught_error.value.hint


def test_symbolic_capture_takes_no_inputs() -> None:
    model, x = build(RIGHT["directly"])
    assert capture(model, (x,), "symbolic").traces == capture_symbolic(model).traces == ()
