"""Norms in wrappers: over the last axis, behind branches that are off, and models in wrappers."""

from __future__ import annotations

import copy
import dis
import logging
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import normswap as ns
from normswap.errors import InputError, NothingToConvertError
from normswap.graph.branches import left_out
from normswap.loading import load_model
from normswap.runs.wrappers import entry_of


def distance(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((a(x) - b(x)).abs().max())


class GraphNorm(nn.Module):
    """The wrapper of PyTorch Geometric: with one node it may use the stored statistics, which is off by default."""

    def __init__(self, channels: int, allow_single_element: bool = False) -> None:
        super().__init__()
        self.module, self.allow_single_element = nn.BatchNorm1d(channels), allow_single_element

    def forward(self, x: Tensor) -> Tensor:
        if self.allow_single_element and x.size(0) <= 1:
            n = self.module
            return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)
        return self.module(x)


class Network(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), norm, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x))))


def network(norm: nn.Module) -> nn.Module:
    return zoo.randomize_(Network(norm), 0).eval()


@pytest.mark.parametrize("training", [False, True])
def test_a_read_that_a_flag_of_the_module_leaves_out_is_none(training: bool) -> None:
    model, x = network(GraphNorm(8)), torch.randn(4, 6)
    result = ns.convert(model.train(training), "wn+mobn", example_inputs=x)
    assert [step.site.layer for step in result.plan.steps] == ["a"]
    assert distance(result.model.eval(), model.eval(), x) < 1e-5
    assert distance(ns.fold(result.model), model, x) < 1e-5
    result.model.norm.module.get_submodule("norm").bias.data[0] += 1
    assert distance(result.model, model, x) > 1e-2  # negative control


def test_the_same_read_counts_where_the_flag_lets_it_run() -> None:
    with pytest.raises(NothingToConvertError, match="reads its running_mean"):
        ns.convert(network(GraphNorm(8, allow_single_element=True)), "wn+mobn", example_inputs=torch.randn(4, 6))


class Cases:
    """Methods that read, or do not, under ``on`` True and ``off`` False."""

    on, off = True, False

    def dead(self, x):  # type: ignore[no-untyped-def]
        if self.off:
            return self.bn.running_mean
        return x

    def dead_and(self, x):  # type: ignore[no-untyped-def]
        if self.off and x > 0 and x < 9:
            return self.bn.running_mean
        return x

    def dead_not(self, x):  # type: ignore[no-untyped-def]
        if not self.on:
            x = self.bn.running_mean
        return x

    def live(self, x):  # type: ignore[no-untyped-def]
        if self.on:
            return self.bn.running_mean
        return x

    def live_or(self, x):  # type: ignore[no-untyped-def]
        if self.off or x > 0:
            return self.bn.running_mean
        return x

    def live_and(self, x):  # type: ignore[no-untyped-def]
        if self.on and x > 0:
            return self.bn.running_mean
        return x

    def live_else(self, x):  # type: ignore[no-untyped-def]
        if self.off:
            return x
        return self.bn.running_mean

    def live_set(self, x):  # type: ignore[no-untyped-def]
        self.off = x > 0
        if self.off:
            return self.bn.running_mean
        return x

    def live_of_another(self, x):  # type: ignore[no-untyped-def]
        if x.off:
            return self.bn.running_mean
        return x

    def live_tried(self, x):  # type: ignore[no-untyped-def]
        try:
            if self.off:
                return x
        except ValueError:
            return self.bn.running_mean
        return x


@pytest.mark.parametrize("name", [name for name in vars(Cases) if name.startswith(("dead", "live"))])
def test_what_flags_leave_out(name: str) -> None:
    code = getattr(Cases, name).__code__
    out = left_out(code, {"on": True, "off": False})
    reads = [step.offset for step in dis.get_instructions(code) if step.argval == "running_mean"]
    assert len(reads) == 1
    assert (reads[0] in out) is name.startswith("dead")
    assert reads[0] not in left_out(code, {})


def averaged() -> nn.Module:
    model = zoo.randomize_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), 0)
    return AveragedModel(model).eval()


TAKEN_OFF = "the AveragedModel was taken off: what follows is about its module, a Sequential"


def test_an_averaged_model_is_converted_without_its_wrapper(caplog: pytest.LogCaptureFixture) -> None:
    model, x = averaged(), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    result = ns.convert(model, "wn+mobn")
    assert type(result.model) is nn.Sequential
    assert result.plan.summary() == "1 of 1 BatchNorms convert, 1 together with their layer"
    assert result.init.notes == (TAKEN_OFF,)
    assert distance(result.model, model, x) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert ns.plan(model, "wn+mobn") == result.plan
    assert ns.rank_sites(model, "gn", calibration=torch.randn(20, 3, 8, 8))[0].norm == "1"
    with caplog.at_level(logging.INFO, "normswap"):
        folded = ns.fold(model)
    assert caplog.messages == [TAKEN_OFF]
    assert [type(module) for module in folded] == [nn.Conv2d, nn.Identity]
    assert distance(folded, model, x) < 1e-5
    folded[0].bias.data[0] += 1
    assert distance(folded, model, x) > 1e-2  # negative control


def test_a_pickled_averaged_model_is_read_and_taken_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, x = averaged(), torch.randn(2, 3, 8, 8)
    torch.save(model, tmp_path / "swa.pt")
    torch.save({"ema": model}, tmp_path / "checkpoint.pt")
    for name in ("swa.pt", "checkpoint.pt"):
        with caplog.at_level(logging.INFO, "normswap"):
            loaded = load_model(tmp_path / name)
        assert TAKEN_OFF in caplog.messages
        assert type(loaded) is nn.Sequential
        assert distance(loaded, model, x) == 0


def test_a_pickled_averaged_model_may_hold_no_code(tmp_path: Path) -> None:
    model = averaged()
    model.avg_fn = os.getcwd
    torch.save(model, tmp_path / "swa.pt")
    with pytest.raises(InputError) as error:
        load_model(tmp_path / "swa.pt")
    assert error.value.code == "untrusted-global"


class PassesOn(nn.Module):
    """What trainers wrap models in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.wrapped = model

    def forward(self, *inputs, **options):  # type: ignore[no-untyped-def]
        """Pass all on."""
        return self.wrapped(*inputs, **options)


class PassesOnMore(PassesOn):
    def forward(self, *inputs, **options):  # type: ignore[no-untyped-def]
        return 2 * self.wrapped(*inputs, **options)


class Flagged(nn.Module):
    """Behind the flag the layer is seen without its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        y = self.conv(x)
        return y if raw else self.bn(y)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_wrapper_that_passes_all_on_hides_nothing(depth: int) -> None:
    model: nn.Module = zoo.randomize_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), 0)
    for _ in range(depth):
        model = PassesOn(model)
    model, x = model.eval(), torch.randn(2, 3, 8, 8)
    result = ns.convert(model, "wn+mobn")
    inner = "wrapped." * depth
    assert [(s.site.layer, s.site.norm, s.site.proof) for s in result.plan.steps] == [
        (f"{inner}0", f"{inner}1", "proven")
    ]
    assert distance(result.model, model, x) < 1e-5
    assert distance(ns.fold(result.model), model, x) < 1e-5
    result.model.get_submodule(f"{inner}1").bias.data[0] += 1
    assert distance(result.model, model, x) > 1e-2  # negative control


def test_a_flag_behind_a_wrapper_counts() -> None:
    model, x = zoo.randomize_(PassesOn(Flagged()), 0).eval(), torch.randn(2, 3, 8, 8)
    for inputs in (None, (x,)):
        converted = ns.swap_norms(model, "wn+mobn", example_inputs=inputs).eval()
        for raw in (False, True):
            with torch.no_grad():
                assert torch.allclose(converted(x, raw=raw), model(x, raw=raw), atol=1e-5)


def test_labels_behind_a_wrapper_are_left_out() -> None:
    model = zoo.randomize_(PassesOn(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))), 0).eval()
    loader = [(torch.randn(16, 3, 8, 8), torch.zeros(16).long())]
    assert ns.convert(model, "gn", calibration=loader).init.notes[0] == ("of each batch's 2 entries the first was used")


def test_what_a_wrapper_does_is_seen() -> None:
    assert entry_of(PassesOn(nn.ReLU()))[0] == "wrapped"
    assert entry_of(PassesOnMore(nn.ReLU()))[0] == ""
    hooked = PassesOn(nn.ReLU())
    hooked.wrapped.register_forward_hook(lambda *_: None)
    assert entry_of(hooked)[0] == ""


class Branching(nn.BatchNorm1d):
    """Over the last axis of three, as a subclass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2) if x.dim() == 3 else super().forward(x)


class OverLast(nn.Module):
    """Over the last axis, as a module around a plain BatchNorm."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm, self.how = nn.BatchNorm1d(8), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "transpose":
            return self.norm(x.transpose(1, 2)).transpose(1, 2)
        if self.how == "permute":
            return self.norm(x.permute(0, 2, 1)).permute(0, 2, 1)
        return self.norm(x.reshape(-1, 8)).reshape(x.shape)


@pytest.mark.parametrize("how", ["transpose", "permute", "reshape"])
@pytest.mark.parametrize("given", [False, True])
def test_a_norm_over_the_last_axis_converts_in_a_module_around_it(how: str, given: bool) -> None:
    model, x = network(OverLast(how)), torch.randn(4, 5, 6)
    result = ns.convert(model, "wn+mobn", example_inputs=x if given else None)
    assert [step.site.layer for step in result.plan.steps] == [None if how == "reshape" else "a"]
    assert distance(result.model.eval(), model, x) < 1e-5
    folded = ns.fold(result.model, example_inputs=x if given else None)
    assert distance(folded, model, x) < 1e-5
    folded.a.bias.data[0] += 1
    assert distance(folded, model, x) > 1e-2  # negative control


def test_a_subclass_that_branches_is_refused_with_what_to_do() -> None:
    with pytest.raises(NothingToConvertError) as error:
        ns.convert(network(Branching(8)), "wn+mobn", example_inputs=torch.randn(4, 5, 6))
    assert error.value.hint == (
        "'norm': the forward of Branching cannot be traced (TraceError), so what it does is unknown: where it moves "
        "axes, let a module do so that calls a plain BatchNorm"
    )
