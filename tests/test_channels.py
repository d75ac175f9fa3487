"""Channels that are found to be free may be scaled by anything, and the model stays what it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import conversion_checks
import pytest
import torch
import torch.nn.functional as F
from conversion_checks import distance
from hypothesis import assume, given, settings
from random_networks import Network, networks
from test_random_networks import DETERMINISTIC
from torch import Tensor, nn
from torch.nn.utils import prune
from zoo import ZOO, Entry, randomize_
from zoo_packages import import_timm, import_torchvision

import normswap as ns
from normswap.errors import NormswapError
from normswap.graph import capture
from normswap.graph.after_norm import after_norm
from normswap.graph.channels import FIXED, Channels, find_channels
from normswap.graph.dataflow import Dataflow
from normswap.initialization.channel_scales import scale_channels
from normswap.records import NormKind
from normswap.stages.opened import opened


def channels_of(model: nn.Module, inputs: Any = None) -> Channels:
    plan = ns.plan(model, "gn", example_inputs=inputs)
    sites = [step.site for step in plan.steps if step.site.kind == NormKind.MODULE]
    layers = [site.layer for site in sites if site.layer]
    with opened(model):
        after = {site.norm: after_norm(model.get_submodule(site.norm)) for site in sites}
        return find_channels(Dataflow(capture(model, inputs)), after, layers)


def scaled(model: nn.Module, channels: Channels, seed: int = 0) -> nn.Module:
    """Return a copy whose free channels have random scales between 1/4 and 4."""
    scales = 4 ** (2 * torch.rand(channels.count, generator=torch.Generator().manual_seed(seed)).double() - 1)
    scales[FIXED] = 1
    result = copy.deepcopy(model)
    with opened(result):
        scale_channels(result, channels, scales)
    return result


def outputs(model: nn.Module, inputs: tuple[Any, ...], train: bool = False) -> list[Tensor]:
    with torch.no_grad():
        return conversion_checks.run(copy.deepcopy(model).train(train), inputs)


def free(channels: Channels) -> int:
    return int(sum(int((numbers != FIXED).sum()) for numbers in channels.outputs.values()))


@pytest.mark.parametrize("given_inputs", [False, True], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize("entry", ZOO, ids=str)
def test_scaled_channels_leave_an_awkward_model_the_same_function(entry: Entry, given_inputs: bool) -> None:
    model = entry.model().double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in entry.inputs())
    try:
        channels = channels_of(model, inputs if given_inputs else None)
    except (NormswapError, RuntimeError) as refused:
        pytest.skip(f"refused: {refused}")
    before = outputs(model, inputs)
    assert distance(outputs(scaled(model, channels), inputs), before) < 1e-9


@settings(DETERMINISTIC, max_examples=10)
@given(networks())
def test_scaled_channels_leave_a_random_network_the_same_function(network: Network) -> None:
    model, inputs = network.model(), network.inputs()
    try:
        channels = channels_of(model, inputs)
    except NormswapError:
        assume(False)
    assume(free(channels) > 0)
    other = scaled(model, channels)
    for train in (False, True):
        assert distance(outputs(other, inputs, train), outputs(model, inputs, train)) < 1e-8


@pytest.mark.parametrize(
    ("package", "name"),
    [
        *(("torchvision", n) for n in ("resnet18", "googlenet", "densenet121", "regnet_y_400mf", "shufflenet_v2_x0_5")),
        *(("timm", n) for n in ("resnet26t", "efficientnet_b0", "hrnet_w18_small", "dla34", "vovnet39a", "repvgg_a0")),
    ],
)
def test_scaled_channels_leave_a_published_architecture_the_same_function(package: str, name: str) -> None:
    if package == "torchvision":
        model = import_torchvision().models.get_model(name, **{"init_weights": False} if name == "googlenet" else {})
    else:
        model = import_timm().create_model(name)
    model = randomize_(model, 0).double().eval()
    x = (torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double(),)
    channels = channels_of(model, x)
    assert free(channels) > 0
    other = scaled(model, channels)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert distance(outputs(other, x), outputs(model, x)) < 1e-9


class Residual(nn.Module):
    """Two blocks with a shortcut, a projection without a norm, pooled into a linear layer."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv, self.inner = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.back, self.outer = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.project, self.last, self.end = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = self.act(x + self.outer(self.back(self.act(self.inner(self.conv(x))))))
        x = self.act(self.end(self.last(x)) + self.project(x))
        return self.fc(x.mean((2, 3)))


def numbers(channels: Channels, name: str, side: str = "outputs") -> list[int]:
    return getattr(channels, side)[name].tolist()


def test_a_shortcut_ties_and_the_features_stay() -> None:
    channels = channels_of(Residual())
    stream = numbers(channels, "norm")
    assert FIXED not in stream
    assert len(set(stream)) == 8
    assert stream == numbers(channels, "outer") == numbers(channels, "conv", "inputs")
    assert stream == numbers(channels, "last", "inputs") == numbers(channels, "project", "inputs")
    inner = numbers(channels, "inner")
    assert inner == numbers(channels, "back", "inputs")
    assert not set(inner) & {*stream, FIXED}
    assert set(numbers(channels, "end")) == set(numbers(channels, "project")) == {FIXED}, "what a linear layer takes"
    assert set(numbers(channels, "stem", "inputs")) == set(numbers(channels, "stem")) == {FIXED}


@pytest.mark.parametrize(
    "act", [F.silu, F.relu6, torch.tanh, F.selu, F.softplus, F.hardtanh, lambda x: x + 1, lambda x: x.clamp(min=-1)]
)
def test_an_activation_that_does_not_scale_fixes_its_channels(act: Callable[[Tensor], Tensor]) -> None:
    assert free(channels_of(Residual(act))) == 0


@pytest.mark.parametrize("act", [F.leaky_relu, lambda x: 2 * x, lambda x: F.dropout(x, 0.1), lambda x: -x / 3])
def test_an_operation_that_scales_does_not(act: Callable[[Tensor], Tensor]) -> None:
    assert free(channels_of(Residual(act))) == 8 * 3


def test_a_module_that_is_called_as_a_method_of_tensors_is_no_such_method() -> None:
    class Named(nn.Module):
        """``size`` is its activation: not a question for the size."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.size = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU()
            self.last, self.end = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            return self.size(y) + self.end(self.last(y))

    model = randomize_(Named(), 0).double()
    channels, x = channels_of(model), (torch.randn(2, 3, 4, 4).double(),)
    assert set(numbers(channels, "norm")) == {FIXED}
    assert distance(outputs(scaled(model, channels), x), outputs(model, x)) < 1e-9


def test_a_hook_that_sees_a_value_and_a_norm_that_is_left_out_fix_its_channels() -> None:
    model = Residual()
    model.inner.register_forward_hook(lambda *_: None)
    assert set(numbers(channels_of(model), "inner")) == {FIXED}
    channels = find_channels(Dataflow(capture(Residual())), {"norm": (), "outer": ()}, [])
    assert "inner" not in channels.outputs


def test_a_channel_that_was_overlooked_would_be_seen() -> None:
    """The negative control: one layer that is not told of the scales moves the output."""
    model = randomize_(Residual(), 0).double().eval()
    x = (torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)).double(),)
    channels = channels_of(model, x)
    assert distance(outputs(scaled(model, channels), x), outputs(model, x)) < 1e-9
    lacking = Channels(channels.count, {k: v for k, v in channels.inputs.items() if k != "back"}, channels.outputs)
    assert distance(outputs(scaled(model, lacking), x), outputs(model, x)) > 1e-2


class Net(nn.Module):
    """A convolution, a norm and a ReLU, of whose output ``tail`` does something."""

    def __init__(self, tail: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.tail = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), tail
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.tail(self, F.relu(self.norm(self.conv(x))))


def mlp(inputs: int) -> dict[str, nn.Module]:
    return {"l": nn.Linear(inputs, 6), "n": nn.BatchNorm1d(6), "o": nn.Linear(6, 4)}


def through(net: Any, features: Tensor) -> Tensor:
    return net.o(F.relu(net.n(net.l(features))))


def pools(a: Tensor, *sizes: int) -> Tensor:
    return torch.cat([F.adaptive_avg_pool2d(a, size).flatten(1) for size in sizes], 1)


def written_gate(net: Any, a: Tensor) -> Tensor:
    gate = torch.sigmoid(net.g(a))
    gate.mul_(a)
    return net.p(a) + gate


def aliased_gate(net: Any, a: Tensor) -> Tensor:
    gate = torch.sigmoid(net.g(a))
    alias = gate[:]
    gate *= a
    return net.p(gate) + alias


def written_out(net: Any, a: Tensor) -> Tensor:
    total = torch.zeros_like(a)
    torch.add(a, net.p(a), out=total)
    return net.q(total) + total


class Masked(nn.BatchNorm2d):
    """A norm with a second argument."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return super().forward(x) if scale is None else super().forward(x) * scale


class Added(nn.Conv2d):
    """A layer with a second argument."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return super().forward(x + other)


class Bent(nn.Conv2d):
    """A layer that takes a sigmoid of what it gives."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(x))


class Clamped(nn.Conv2d):
    """A layer that cuts large values off, in training only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(max=0.1) if self.training else x)


def bent_relu() -> nn.Module:
    relu = nn.ReLU()
    relu.forward = torch.sigmoid  # type: ignore[method-assign,assignment]
    return relu


def point(a: int = 8, b: int = 8) -> nn.Conv2d:
    return nn.Conv2d(a, b, 1)


TAILS: dict[str, Callable[[], Net]] = {
    "a transposed convolution that is told its size": lambda: Net(
        lambda s, a: s.p(torch.cat([s.up(a, output_size=[16, 16]), a.repeat(1, 1, 2, 2)], 1)),
        up=nn.ConvTranspose2d(8, 8, 3, 2, 1),
        p=point(16, 4),
    ),
    "a norm with a second argument": lambda: Net(lambda s, a: s.p(s.m(s.q(a), a)), m=Masked(8), q=point(), p=point()),
    "a layer with a second argument": lambda: Net(lambda s, a: s.k(a, s.p(a)), k=Added(8, 4, 1), p=point()),
    "a layer that bends what it gives": lambda: Net(lambda s, a: s.p(s.k(a)), k=Bent(8, 8, 1), p=point()),
    "a layer that is another in training": lambda: Net(lambda s, a: s.p(s.k(a)), k=Clamped(8, 8, 1), p=point()),
    "a module whose forward was replaced": lambda: Net(lambda s, a: s.p(s.r(a)), r=bent_relu(), p=point()),
    "a linear layer along the width": lambda: Net(
        lambda s, a: s.p(F.relu(s.w(a))[:, 1:]), w=nn.Linear(8, 8), p=point(7)
    ),
    "pools of several sizes, joined": lambda: Net(lambda s, a: through(s, pools(a, 1, 2, 4)), **mlp(8 * 21)),
    "flattened channels, sliced": lambda: Net(lambda s, a: through(s, pools(a, 2)[:, 8:24]), **mlp(16)),
    "flattened channels, split": lambda: Net(lambda s, a: pools(a, 2).split([8, 24], 1)[1]),
    "pooling that takes channels for space": lambda: Net(
        lambda s, a: through(s, F.avg_pool1d(a.mean((2, 3)), 3, 1, 1)), **mlp(8)
    ),
    "padding that takes channels for space": lambda: Net(
        lambda s, a: s.p(nn.ReplicationPad2d(1)(a.flatten(2))[:, 2:]), p=nn.Conv1d(8, 4, 1)
    ),
    "a gate that is written to": lambda: Net(written_gate, g=point(), p=point()),
    "a gate that is written to, and an alias of it": lambda: Net(aliased_gate, g=point(), p=point()),
    "a result that is written elsewhere": lambda: Net(written_out, p=point(), q=point()),
    "a division that rounds": lambda: Net(lambda s, a: s.p(torch.div(a, 0.5, rounding_mode="floor")), p=point()),
    "sizes that are computed": lambda: Net(
        lambda s, a: s.p(torch.split(a, [4, a.size(1) - 4], dim=1)[1].mean([2, a.dim() - 1], True)), p=point(4)
    ),
}


@pytest.mark.parametrize("given_inputs", [False, True], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize("kind", TAILS)
def test_what_would_be_wrong_is_not_scaled(kind: str, given_inputs: bool) -> None:
    torch.manual_seed(0)
    model = randomize_(TAILS[kind](), 0).double().eval()
    x = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)).double(),)
    try:
        channels = channels_of(model, x if given_inputs else None)
    except NormswapError as refused:
        pytest.skip(f"refused: {refused}")
    for seed in (0, 1):
        for train in (False, True):
            moved = distance(outputs(scaled(model, channels, seed), x, train), outputs(model, x, train))
            assert moved < 1e-9


class Optional(Residual):
    """An option that is no flag, of which a trace knows the default only."""

    def forward(self, x: Tensor, level: int = 0) -> Tensor:
        y = super().forward(x)
        return y + self.act(self.norm(self.stem(x))).mean() if level == 3 else y


class Branch(Residual):
    """A branch that example inputs may not take."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.act(self.norm(self.stem(x))).mean() if x.sum() > 1e9 else y


class Unused(Residual):
    """A layer that no call was seen of: something else may happen that was not seen, either."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(8, 2, 1)


@pytest.mark.parametrize("kind", [Optional, Branch, Unused])
@pytest.mark.parametrize("given_inputs", [False, True], ids=["without inputs", "with inputs"])
def test_where_some_way_through_the_model_is_not_known_nothing_is_free(
    kind: Callable[[], Residual], given_inputs: bool
) -> None:
    assert free(channels_of(kind(), (torch.randn(2, 3, 12, 12),) if given_inputs else None)) == 0


def test_tensors_that_are_not_the_modules_own_or_are_shared_are_not_scaled() -> None:
    pruned = Residual()
    prune.random_unstructured(pruned.inner, "weight", 0.5)
    assert set(numbers(channels_of(pruned), "inner")) == {FIXED}
    shared = Residual()
    memory = torch.ones(12)
    shared.inner.weight.data, shared.outer.weight.data = memory[:8], memory[4:]  # they overlap in part
    channels = channels_of(shared)
    assert set(numbers(channels, "inner")) == set(numbers(channels, "outer")) == {FIXED}
