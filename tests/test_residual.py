"""Residual branches: which addend is the branch, and what a data-dependent initialization does at its end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pretrained.cifar_resnet import CifarResNet
from test_data_dependent import preactivations
from torch import Tensor, nn

import normswap as ns
from normswap.graph import capture_recorded, capture_symbolic
from normswap.graph.residual import Branch, output_layers, residual_branches
from normswap.nn import MeanOnlyBatchNorm

Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Layers a to d of 4 channels, a norm and a scale, with the forward that a test gives."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.norm, self.mean_only, self.drop = nn.BatchNorm2d(4), MeanOnlyBatchNorm(4), nn.Dropout()
        self.gamma = nn.Parameter(torch.ones(4, 1, 1))
        self.way = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def two(n: Net, x: Tensor) -> Tensor:
    return n.b(F.relu(n.a(x)))


def gated(n: Net, y: Tensor) -> Tensor:
    return y * torch.sigmoid(n.d(y.mean((2, 3), keepdim=True)))


BRANCHES: dict[str, tuple[Forward, list[tuple[str, str]]]] = {
    # what is added: the layers of each branch, and its ends
    "identity": (lambda n, x: x + two(n, x), [("ab", "b")]),
    "identity, in place": (lambda n, x: two(n, x).add_(x), [("ab", "b")]),
    "projection": (lambda n, x: torch.add(two(n, x), n.c(x)), [("ab", "b")]),
    "pre-activation, one layer": (lambda n, x: x + n.a(F.relu(x)), [("a", "a")]),
    "padding and stride": (lambda n, x: F.pad(x[:, ::2], (0, 0, 0, 0, 1, 1)) + two(n, x), [("ab", "b")]),
    "scale per channel, dropout": (lambda n, x: x + n.drop(n.gamma * two(n, x)) * 0.5, [("ab", "b")]),
    "ReLU at the end": (lambda n, x: x + F.relu(two(n, x)), [("ab", "b")]),
    "mean-only norm": (lambda n, x: x + n.mean_only(two(n, x)), [("ab", "b")]),
    "two in a row": (lambda n, x: (y := x + two(n, x)) + n.d(F.relu(n.c(y))), [("ab", "b"), ("cd", "d")]),
    "side by side": (lambda n, x: x + n.b(F.relu(n.a(x))) + n.d(F.relu(n.c(x))), [("ab", "b"), ("cd", "d")]),
    "a sum in the branch": (lambda n, x: x + (n.b(n.a(x)) + n.d(n.c(x))), [("abcd", "bd")]),
    "a gate of its own": (lambda n, x: x + gated(n, two(n, x)), [("abd", "b")]),
    "moved axes": (
        lambda n, x: x + two(n, x.transpose(2, 3)).transpose(2, 3) * n.gamma.reshape(4, 1, 1),
        [("ab", "b")],
    ),
    # and nothing
    "a norm that divides": (lambda n, x: x + n.norm(two(n, x)), []),
    "a sum of equals": (lambda n, x: n.a(x) + n.b(x), []),
    "a gate": (lambda n, x: x + n.a(x) * torch.sigmoid(n.b(x)), []),
    "an end with another use": (lambda n, x: (y := n.b(F.relu(n.a(x)))).mean() * (x + y), []),
    "a parameter that is added": (lambda n, x: n.a(x) + n.gamma, []),
    "twice the same": (lambda n, x: (y := n.a(x)) + y, []),
    "a difference": (lambda n, x: x - two(n, x), []),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_is_the_addend_with_more_layers_since_the_fork(name: str) -> None:
    forward, expected = BRANCHES[name]
    model, x = Net(forward).eval(), torch.randn(2, 4, 6, 6)
    depth = 1 if "one layer" in name else 2
    branches = tuple(Branch(tuple(layers), tuple(ends), depth) for layers, ends in expected)
    symbolic = capture_symbolic(model, (False,))
    assert not symbolic.opaque
    assert residual_branches(symbolic) == branches
    if name != "scale per channel, dropout":  # a record does not show a dropout that does nothing
        assert residual_branches(capture_recorded(model, (x,), (False,))) == branches


def test_the_layers_that_a_model_returns_are_known() -> None:
    heads: dict[str, Forward] = {
        "a": lambda n, x: n.a(x),
        "b": lambda n, x: torch.sigmoid(n.b(n.a(x))),
        "ab": lambda n, x: (n.a(x), {"x": n.b(x)}),
        "": lambda n, x: n.norm(n.a(x)),
    }
    for expected, forward in heads.items():
        assert output_layers(capture_symbolic(Net(forward).eval(), (False,))) == tuple(expected)


@pytest.mark.parametrize("to", ["wn", "none", "wn+mobn"])
def test_branches_and_the_head_of_a_residual_network_end_with_deviation_one_tenth(to: str) -> None:
    model, x = ns.swap_norms(CifarResNet(1).eval(), to), torch.randn(16, 3, 16, 16)
    report = ns.initialize(model, x, fresh=True)
    for name, (_, off_one) in preactivations(model, x).items():
        assert abs(off_one - (0.9 if name.endswith("conv2") or name == "linear" else 0)) < 1e-2, name
    notes = {row.name: row.notes for row in report.rows}
    assert "ends a residual branch: deviation 0.1" in notes["layer2.0.conv2"]
    assert "ends the network: deviation 0.1" in notes["linear"]
    assert not any("deviation" in note for note in notes["layer1.0.conv1"])


def test_a_branch_that_a_batch_norm_ends_keeps_deviation_one() -> None:
    model, x = CifarResNet(1), torch.randn(16, 3, 16, 16)
    ns.initialize(model, x, fresh=True)
    assert max(off_one for _, off_one in preactivations(model, x).values()) < 1e-2


def test_a_block_that_cannot_be_traced_is_found_on_the_batch() -> None:
    def branching(n: Net, x: Tensor) -> Tensor:
        return x + two(n, x) if float(x.mean()) < 1e9 else x

    model, x = Net(branching), torch.randn(16, 4, 6, 6)
    ns.initialize(model, x)
    off_one = {name: off for name, (_, off) in preactivations(model, x).items()}
    assert off_one["a"] < 1e-2
    assert abs(off_one["b"] - 0.9) < 1e-2


def test_a_residual_network_trains_where_deviation_one_everywhere_diverges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve steps at a rate of 0.1 on noise: enough for the sums to explode (benchmarks/initialization.py)."""

    def last_loss() -> float:
        torch.manual_seed(0)
        x, labels = torch.randn(32, 3, 8, 8), torch.arange(32) % 10
        model = ns.swap_norms(CifarResNet(3).eval(), "wn").train()
        ns.initialize(model, x, fresh=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(12):
            loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert last_loss() < 3
    monkeypatch.setattr("normswap.initialization.data_dependent._SMALL_STD", 1.0)
    assert not last_loss() < 100


def test_a_value_that_another_trace_has_kept_is_none_of_the_graph() -> None:
    """As in LeViT: what a forward computes from its parameters alone in eval mode is kept on the module.

    The trace of the whole model fails behind the blocks, and what they keep of it is there when they are traced alone.
    """

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.biases, self.kept = nn.Parameter(torch.randn(4, 6)), {}

        def bias(self) -> Tensor:
            if self.training:
                return self.biases[:, :1, None]
            if "bias" not in self.kept:
                self.kept["bias"] = self.biases[:, :1, None]
            return self.kept["bias"]

        def forward(self, x: Tensor) -> Tensor:
            return x + self.bn(self.conv(x + self.bias())) + self.bias()

    class Untraceable(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x if bool(x.mean() < 1e9) else -x

    model = Untraceable(Attention(), Attention()).eval()
    x = torch.randn(2, 4, 3, 3)
    expected = model(x).detach()
    for block in model:
        block.kept.clear()
    for inputs in (None, x):
        result = ns.convert(model, "wn+mobn", example_inputs=inputs)
        assert [step.site.norm for step in result.plan.steps] == ["0.bn", "1.bn"]
        assert torch.allclose(result.model(x), expected, atol=1e-5)
