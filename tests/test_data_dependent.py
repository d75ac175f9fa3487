"""Data-dependent initialization: what it promises on its minibatch, and what it reports where it cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import normswap as ns
from normswap.nn.kinds import is_layer


def preactivations(model: nn.Module, x: Tensor) -> dict[str, tuple[float, float]]:
    """Return, per layer at its first call, the greatest |mean| and |std − 1| over its channels."""
    seen: dict[str, tuple[float, float]] = {}

    def note(name: str) -> object:
        def hook(layer: nn.Module, args: object, out: Tensor) -> None:
            axis = out.ndim - 1 if isinstance(layer, nn.Linear) else 1
            std, mean = torch.std_mean(out, [a for a in range(out.ndim) if a != axis], correction=0)
            seen.setdefault(name, (float(mean.abs().max()), float((std - 1).abs().max())))

        return hook

    handles = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if is_layer(m)]  # type: ignore[arg-type]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return seen


def network(bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=bias),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2, bias=bias),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, groups=6, bias=bias),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(96, 5, bias=bias),
    )


@pytest.mark.parametrize("fresh", [False, True])
def test_every_preactivation_is_standardized_on_the_minibatch(fresh: bool) -> None:
    model, x = network(), torch.randn(16, 3, 12, 12) * 3 + 1
    untouched = preactivations(copy.deepcopy(model), x)
    report = ns.initialize(model, x, fresh=fresh)
    assert [row.method for row in report.rows] == ["scale and bias"] * 4
    for name, (mean, deviation) in preactivations(model, x).items():
        assert mean < 1e-3, name
        assert deviation < 1e-2, name
    assert max(deviation for _, deviation in untouched.values()) > 0.1  # else the test shows nothing


def test_fresh_weights_are_drawn_from_the_paper_distribution_and_repeat() -> None:
    one, two, other = (nn.Sequential(nn.Linear(200, 300)) for _ in range(3))
    x = torch.randn(64, 200)
    torch.nn.utils.parametrizations.weight_norm(one[0])
    torch.nn.utils.parametrizations.weight_norm(two[0])
    torch.nn.utils.parametrizations.weight_norm(other[0])
    for model, seed in ((one, 1), (two, 1), (other, 2)):
        ns.initialize(model, x, fresh=True, seed=seed)
    v = one[0].parametrizations.weight.original1
    assert abs(float(v.detach().std()) - 0.05) < 1e-3
    assert torch.equal(v, two[0].parametrizations.weight.original1)
    assert not torch.equal(v, other[0].parametrizations.weight.original1)


@pytest.mark.parametrize("to", ["wn+mobn", "gn+ws", "gn+aws", "ln", "wn"])
def test_converted_models_are_initialized_too(to: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32))
    model[1].running_var.uniform_(0.5, 2)
    converted = ns.swap_norms(model, to)
    x = torch.randn(8, 3, 10, 10)
    ns.initialize(converted, x)
    for name, (mean, deviation) in preactivations(converted, x).items():
        assert deviation < 1e-2, name
        assert mean < 1e-3 or to == "wn+mobn", name  # there the layer has no bias: the norm subtracts the mean


def test_what_cannot_be_initialized_is_reported() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bias_free, self.bn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
            self.unused = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.bn(self.bias_free(self.conv(self.conv(x))))
            return y

    model = Shared()
    with torch.no_grad():
        model.conv.weight[1].zero_()
    rows = {row.name: row for row in ns.initialize(model, torch.randn(4, 3, 5, 5)).rows}
    assert "shared: initialized at its first call" in rows["conv"].notes
    assert "1 constant channels keep their scale" in rows["conv"].notes
    assert rows["bias_free"].notes == ("bias-free in front of a norm: scale only",)
    assert rows["unused"].method == "not initialized"
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_tied_weights_are_scaled_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    report = ns.initialize(model, torch.randn(32, 6))
    assert report.rows[1].notes == ("its weight is tied to one that is initialized already",)
    assert preactivations(model, torch.randn(32, 6))["0"][1] < 1


def test_a_failed_initialization_leaves_the_model_as_it_was() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            self.bn(self.body(x))
            raise RuntimeError("out of luck")

    model = Fails().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ns.NormswapError, match="out of luck"):
        ns.initialize(model, torch.randn(4, 3, 8, 8), fresh=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not model.body._forward_hooks
    assert not model.bn._forward_pre_hooks


def test_bad_batches_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    before = model[0].weight.clone()
    for batch, match in (
        (torch.full((2, 4), float("nan")), "NaN"),
        (torch.randn(2, 5), "forward pass failed"),
        ([], "no batch"),
        (torch.randn(4), None),
    ):
        if match is None:
            assert ns.initialize(model, batch).rows[0].method == "not initialized"
        else:
            with pytest.raises(ns.NormswapError, match=match):
                ns.initialize(model, batch)
    assert torch.equal(model[0].weight, before)
