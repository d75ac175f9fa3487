"""The layers that read the model's input, and what gn+ws does there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normswap as ns


class Network(nn.Module):
    """Something in front of a convolution, a norm, and one more of both."""

    def __init__(self, front: nn.Module | None = None) -> None:
        super().__init__()
        self.front = front
        self.stem, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.body, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.register_buffer("pixel_mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.kernel = nn.Parameter(torch.randn(3, 3, 1, 1))

    def ahead(self, x: Tensor) -> Tensor:
        return x if self.front is None else self.front(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.body(F.relu(self.bn1(self.stem(self.ahead(x))))))


class Normalizes(Network):
    def ahead(self, x: Tensor) -> Tensor:
        return F.pad((x / 255 - self.pixel_mean) / 0.25, (1, 1, 1, 1))


class Convolves(Network):
    def ahead(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel)


class LooksUp(Network):
    """Words, as an image of one row of three channels."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(10, 9))

    def ahead(self, x: Tensor) -> Tensor:
        return self.front(x).unflatten(2, (3, 3)).transpose(1, 2).repeat(1, 1, 4, 4)


class TwoStems(Network):
    """The second convolution reads the input, too, in one of two branches."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.repeat(1, 3, 1, 1)[:, :8]
        return F.relu(self.bn1(self.stem(x))) + self.bn2(self.body(wide))


IMAGES = (torch.randn(4, 3, 8, 8),)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Network(), {"stem"}),
        (Network(nn.ZeroPad2d(1)), {"stem"}),
        (Network(nn.Sequential(nn.Dropout(), nn.ReflectionPad2d(1))), {"stem"}),
        (Normalizes(), {"stem"}),
        (TwoStems(), {"stem", "body"}),
        (Network(nn.Conv2d(3, 3, 1)), set()),
        (Network(nn.Sequential(nn.InstanceNorm2d(3, affine=True))), set()),
        (Convolves(), set()),
    ],
)
@pytest.mark.parametrize("example", [None, IMAGES])
def test_a_layer_reads_the_input_where_nothing_with_parameters_lies_between(
    model: nn.Module, expected: set[str], example: tuple[Tensor, ...] | None
) -> None:
    plan = ns.plan(model, "gn", example_inputs=example)
    assert {step.site.layer for step in plan.steps} == {"stem", "body"}
    assert {step.site.layer for step in plan.steps if step.site.reads_input} == expected


def test_an_embedding_lies_between() -> None:
    plan = ns.plan(LooksUp(), "gn", example_inputs=torch.zeros(2, 5, dtype=torch.long))
    assert not any(step.site.reads_input for step in plan.steps)


def test_the_convolutions_of_an_untraced_part_are_not_taken_for_first_ones() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Conv2d(3, 3, 1), Network()

        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > 1e9:  # this cannot be traced
                return x
            return self.inner(self.first(x))

    plan = ns.plan(Opaque(), "gn")
    assert not any(step.site.reads_input for step in plan.steps)


def test_weight_standardization_has_an_offset_there_alone_and_the_plan_says_so() -> None:
    first, second = ns.plan(Network(), "gn+ws").steps
    assert (first.weight, second.weight) == ("aws", "ws")
    assert first.notes == ("reads the model's input: its filters have an offset",)
    assert second.notes == ()


@pytest.mark.parametrize("option", [{"input_offset": False}, {"gain": False}])
def test_as_published_it_has_none(option: dict[str, bool]) -> None:
    assert [step.weight for step in ns.plan(Network(), "gn+ws", **option).steps] == ["ws", "ws"]


def test_with_the_offset_the_first_layer_keeps_its_function() -> None:
    """Brightness, which zero-mean filters cannot see: without an offset the first layer loses it."""
    model = Network().eval()
    with torch.no_grad():
        model.stem.weight.abs_()
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.1 + torch.randn(64, 1, 1, 1)
    errors = {}
    for name, option in (("offset", {}), ("none", {"input_offset": False})):
        converted = ns.swap_norms(model, "gn+ws", calibration=x, init="absorb", scale=False, **option)
        with torch.no_grad():
            expected = model.stem(x)
            found = converted.stem(x)
        # What reaches the norm is (x − μ)/σ of the original's, up to a factor and a shift per channel.
        errors[name] = _unexplained(found, expected)
    assert errors["offset"] < 1e-8
    assert errors["none"] > 0.1


def _unexplained(found: Tensor, expected: Tensor) -> float:
    """Return the share of the variance of ``expected`` that no affine function of ``found``, per channel, gives."""
    a, b = (value.transpose(0, 1).flatten(1).double() for value in (found, expected))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    rho = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return float((1 - rho.square()).mean())
