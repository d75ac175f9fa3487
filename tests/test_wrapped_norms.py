"""Norms in wrappers: over the last axis, behind branches that are off, and models in wrappers."""

from __future__ import annotations

import dis

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import normswap as ns
from normswap.errors import NothingToConvertError
from normswap.graph.branches import left_out


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
