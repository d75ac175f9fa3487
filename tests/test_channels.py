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
from hypothesis import assume, given
from random_networks import Network, networks
from test_random_networks import DETERMINISTIC
from torch import Tensor, nn
from zoo import ZOO, Entry, randomize_
from zoo_packages import import_timm, import_torchvision

import normswap as ns
from normswap.capture import capture
from normswap.capture.channels import FIXED, Channels, find_channels
from normswap.errors import NormswapError
from normswap.initialization.scaling import scale_channels
from normswap.records import NormKind


def channels_of(model: nn.Module, inputs: Any = None) -> Channels:
    plan = ns.plan(model, "gn", example_inputs=inputs)
    sites = [step.site for step in plan.steps if step.site.kind == NormKind.MODULE]
    captured = capture(model, inputs)
    return find_channels(captured, [site.norm for site in sites], [site.layer for site in sites if site.layer])


def scaled(model: nn.Module, channels: Channels, seed: int = 0) -> nn.Module:
    """Return a copy whose free channels have random scales between 1/4 and 4."""
    scales = 4 ** (2 * torch.rand(channels.count, generator=torch.Generator().manual_seed(seed)).double() - 1)
    scales[FIXED] = 1
    result = copy.deepcopy(model)
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


@DETERMINISTIC
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


@pytest.mark.parametrize("act", [F.silu, F.relu6, torch.tanh, lambda x: x + 1, lambda x: x.clamp(min=-1)])
def test_an_activation_that_does_not_scale_fixes_its_channels(act: Callable[[Tensor], Tensor]) -> None:
    assert free(channels_of(Residual(act))) == 0


@pytest.mark.parametrize("act", [F.leaky_relu, lambda x: 2 * x, lambda x: F.dropout(x, 0.1), lambda x: -x / 3])
def test_an_operation_that_scales_does_not(act: Callable[[Tensor], Tensor]) -> None:
    assert free(channels_of(Residual(act))) == 8 * 3


def test_a_hook_that_sees_a_value_and_a_norm_that_is_left_out_fix_its_channels() -> None:
    model = Residual()
    model.inner.register_forward_hook(lambda *_: None)
    assert set(numbers(channels_of(model), "inner")) == {FIXED}
    captured = capture(Residual())
    channels = find_channels(captured, ["norm", "outer"], [])
    assert "inner" not in channels.outputs


def test_a_channel_that_was_overlooked_would_be_seen() -> None:
    """The negative control: one layer that is not told of the scales moves the output."""
    model = randomize_(Residual(), 0).double().eval()
    x = (torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)).double(),)
    channels = channels_of(model, x)
    assert distance(outputs(scaled(model, channels), x), outputs(model, x)) < 1e-9
    lacking = Channels(channels.count, {k: v for k, v in channels.inputs.items() if k != "back"}, channels.outputs)
    assert distance(outputs(scaled(model, lacking), x), outputs(model, x)) > 1e-2
