"""Weight normalization with the logarithm of the gain as parameter: ``g = exp(s)`` (Salimans & Kingma 2016, 2.1)."""

from __future__ import annotations

from pathlib import Path

import laws
import numpy as np
import oracles
import pytest
import torch
from test_data_dependent import preactivations
from test_papers import oracle
from torch import Tensor, nn

import normswap as ns
from normswap.nn import FilterLayout, FilterWeightNorm
from normswap.weights import WeightNorm


def network() -> nn.Module:
    """Convolutions of every layout with BatchNorms whose γ are of both signs, and one of which is zero."""
    layers = [nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 3, groups=2, bias=False), nn.Conv2d(6, 4, 3)]
    model = nn.Sequential(*(m for layer, c in zip(layers, (8, 6, 4), strict=True) for m in (layer, nn.BatchNorm2d(c))))
    for norm in list(model)[1::2]:
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
        norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        model[1].weight[3] = 0
        model[0].weight[5] = 0
    return model.double().eval()


X = torch.randn(4, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def distance(found: Tensor, expected: Tensor) -> float:
    return laws.distance(found.detach(), expected.detach())


@pytest.mark.parametrize("to", ["wn", "wn+mobn"])
def test_the_swap_is_exact_folds_and_comes_back_from_a_file(to: str, tmp_path: Path) -> None:
    model = network()
    result = ns.convert(model, to, example_inputs=X, log_gain=True)
    assert distance(result.model(X), model(X)) < 1e-12
    for layer in list(result.model.modules()):
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            s, v = (layer.get_parameter(f"parametrizations.weight.original{i}").detach().numpy() for i in (0, 1))
            layout = FilterLayout.of(layer)
            expected = oracles.weight_norm(oracle(layer, v), np.exp(s))
            assert np.allclose(layer.weight.detach().numpy(), expected, rtol=1e-12, atol=1e-300)
            assert s.shape == (layout.out_channels(layer.weight),)
    folded = ns.fold(result.model, example_inputs=X)
    assert not any("parametrizations" in name for name, _ in folded.named_modules())
    assert distance(folded(X), model(X)) < 1e-12
    ns.save(result.model, tmp_path / "m.safetensors")
    again = ns.load(tmp_path / "m.safetensors", model=network())
    assert torch.equal(again(X), result.model(X))
    assert result.plan.options == {"log_gain": True}


def test_one_broken_gain_is_found() -> None:
    model = network()
    broken = ns.swap_norms(model, "wn", log_gain=True)
    with torch.no_grad():
        broken[0].parametrizations.weight.original0[0] += 1e-3
    assert distance(broken(X), model(X)) > 1e-6


def test_a_step_of_s_multiplies_the_filter_and_its_gradient_is_g_times_that_of_g() -> None:
    """``∂L/∂s = g ∂L/∂g``, and ``∂L/∂g = ⟨∂L/∂W, v⟩/‖v‖`` (eq. 3), against NumPy."""
    layer = nn.Linear(5, 3).double()
    nn.utils.parametrize.register_parametrization(
        layer, "weight", FilterWeightNorm(FilterLayout.of(layer), log_gain=True)
    )
    s, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    x, upstream = torch.randn(7, 5).double(), torch.randn(7, 3).double()
    (layer(x) * upstream).sum().backward()
    of_w = upstream.numpy().T @ x.numpy()
    vn = v.detach().numpy()
    length = np.linalg.norm(vn, axis=1)
    of_g = (of_w * vn).sum(1) / length
    g = np.exp(s.detach().numpy())
    assert np.allclose(s.grad, g * of_g, rtol=1e-12)
    assert not np.allclose(s.grad, of_g, rtol=1e-3)
    expected = g[:, None] / length[:, None] * of_w - (g * of_g / length**2)[:, None] * vn
    assert np.allclose(v.grad, expected, rtol=1e-10)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        s += np.log(2)
    assert torch.allclose(layer.weight, 2 * before, rtol=1e-14)


def test_what_follows_a_parameter_in_training_follows_the_derivative() -> None:
    """The recorded terms of s and v are the derivatives by the old weight and by γ/σ, against finite differences."""
    layout, generator = FilterLayout(), torch.Generator().manual_seed(1)
    weight, factor, step = (torch.randn(*n, generator=generator).double() for n in ((4, 6), (4,), (4, 6)))
    form, h = WeightNorm(log_gain=True), 1e-6

    def s_of(w: Tensor, f: Tensor) -> Tensor:
        return form.encode(layout, w, f, torch.float64).values["parametrizations.weight.original0"].value

    encoded = form.encode(layout, weight, factor, torch.float64).values
    of_factor, of_weight = encoded["parametrizations.weight.original0"].terms
    v = encoded["parametrizations.weight.original1"].value
    by_weight = (s_of(weight + h * step, factor) - s_of(weight - h * step, factor)) / (2 * h)
    along = of_weight.factor * (v / v.norm(dim=1, keepdim=True) * step).sum(1)
    assert torch.allclose(along, by_weight, rtol=1e-6)
    by_factor = (s_of(weight, factor + h) - s_of(weight, factor - h)) / (2 * h)
    assert torch.allclose(of_factor.factor, by_factor, rtol=1e-6)
    assert not torch.allclose(-of_factor.factor, by_factor, rtol=1e-2)


def test_optimizers_and_checkpoints_go_along() -> None:
    model = network().float()
    with torch.no_grad():
        model[1].weight[3] = model[0].weight[5] = 0.3  # a zero has no way back from exp
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X.float()).sum().backward()
    optimizer.step()
    result = ns.convert(model, "wn", log_gain=True)
    assert not any(row.what == "fresh" for row in ns.migrate_optimizer(optimizer, result).rows)
    there = ns.migrate_state_dict(model.state_dict(), result)
    assert all(torch.equal(there.state[name], value) for name, value in result.model.state_dict().items())
    back = ns.migrate_state_dict(result.model.state_dict(), result)
    again = network().float()
    again.load_state_dict(back.state)
    assert distance(again(X.float()), model(X.float())) < 1e-5


def test_data_dependent_initialization_sets_the_logarithm() -> None:
    model = ns.swap_norms(network().float(), "wn", log_gain=True)
    report = ns.initialize(model, X.float(), fresh=True)
    assert all(row.method == "scale and bias" for row in report.rows)
    for mean, deviation in preactivations(model, X.float()).values():
        assert mean < 1e-3
        assert deviation < 1e-2
