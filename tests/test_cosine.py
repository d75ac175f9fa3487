"""Cosine normalization: the layers against NumPy, the swap, and what becomes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import oracles
import pytest
import torch
from laws import distance
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import normswap as ns
from normswap.nn import (
    CosineConv1d,
    CosineConv2d,
    CosineConv3d,
    CosineConvTranspose1d,
    CosineConvTranspose2d,
    CosineConvTranspose3d,
    CosineLinear,
)
from normswap.nn.cosine import make_cosine

Array = np.ndarray

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: CosineLinear(5, 4), (3, 5)),
    "conv1d, groups": (lambda: CosineConv1d(4, 6, 3, groups=2, padding=1), (2, 4, 5)),
    "conv2d, stride, dilation": (
        lambda: CosineConv2d(3, 4, (3, 2), stride=2, padding=(2, 1), dilation=(1, 2)),
        (2, 3, 5, 6),
    ),
    "conv2d without bias": (lambda: CosineConv2d(2, 3, 2, bias=False), (2, 2, 4, 4)),
    "conv3d": (lambda: CosineConv3d(2, 3, 2), (1, 2, 3, 3, 2)),
    "transposed 1d": (lambda: CosineConvTranspose1d(3, 2, 3, stride=2, output_padding=1), (2, 3, 4)),
    "transposed 2d, groups": (lambda: CosineConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 3, 3)),
    "transposed 3d": (lambda: CosineConvTranspose3d(2, 2, 2), (1, 2, 2, 2, 2)),
}
EACH = pytest.mark.parametrize("name", LAYERS)


def made(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[name]
    return make().double(), torch.randn(shape, dtype=torch.float64)


def read_by(layer: nn.Module, x: Array) -> Array:
    """‖u‖ of what each output reads: the inputs that a filter of ones lets through one by one, squared and summed."""
    how = {name: getattr(layer, name, ()) for name in ("stride", "padding", "dilation", "output_padding")}
    transposed = "Transpose" in type(layer).__name__
    ones = np.ones(layer.weight.shape)
    plain = oracles.Layer(ones, None, transposed, getattr(layer, "groups", 1), **how)
    if x.ndim == 2:
        return np.sqrt((x**2).sum(1, keepdims=True) * np.ones((1, len(ones))))
    total = 0.0
    for at in np.ndindex(*x.shape[1:]):
        only = np.zeros_like(x)
        only[(slice(None), *at)] = 1.0
        read = plain(only)
        assert set(np.unique(read)) <= {0.0, 1.0}
        total = total + read * (x[(slice(None), *at)] ** 2).reshape(-1, *(1,) * (read.ndim - 1))
    return np.sqrt(np.where(total > 0, total, np.inf))  # an output that reads nothing is its bias


@EACH
def test_a_layer_is_its_cosines_times_their_gains_and_the_bias(name: str) -> None:
    """``g v·u/(‖v‖ ‖u‖) + b`` (Luo et al. 2017: the cosine alone)."""
    layer, x = made(name)
    plain = copy.deepcopy(layer)
    plain.__class__ = type(layer).__bases__[-1]
    parametrizations.weight_norm(layer, dim=1 if "Transpose" in type(layer).__name__ and layer.groups == 1 else 0)
    with torch.no_grad():
        y = layer(x).numpy()
        products = plain(x).numpy()
    bias = 0.0 if plain.bias is None else oracles.per_channel(plain.bias.detach().numpy(), products)
    lengths = read_by(plain, x.numpy())
    np.testing.assert_allclose(y, (products - bias) / lengths + bias, rtol=0, atol=1e-12)
    assert np.abs(y - products).max() > 1e-2
    mean = lengths[np.isfinite(lengths)].mean()
    assert np.abs(y - ((products - bias) / mean + bias)).max() > 1e-3


@EACH
def test_cosines_are_at_most_one_and_know_no_lengths(name: str) -> None:
    layer, x = made(name)
    if "transposed 2d" not in name:  # its filters lie along no one axis
        parametrizations.weight_norm(layer, dim=1 if "Transpose" in type(layer).__name__ else 0)
        with torch.no_grad():
            layer.parametrizations.weight.original0.fill_(1)
            if layer.bias is not None:
                layer.bias.zero_()
        with torch.no_grad():
            before = layer(x)
            assert float(before.abs().max()) <= 1 + 1e-12
            layer.parametrizations.weight.original1.mul_(7)
        assert distance(layer(x).detach(), before) < 1e-12
    each = torch.rand(len(x), *(1,) * (x.ndim - 1), dtype=torch.float64) + 0.5
    assert distance(layer(each * x).detach(), layer(x).detach()) < 1e-12
    moved = x.clone()
    moved[0, 0] *= 2  # a part of what is read alone
    assert distance(layer(moved).detach(), layer(x).detach()) > 1e-3


@EACH
def test_gradients_are_right_and_finite_where_nothing_is_read(name: str) -> None:
    layer, x = made(name)
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(),), fast_mode=True)
    x = torch.zeros_like(x).requires_grad_()
    y = layer(x)
    bias = torch.zeros(()) if layer.bias is None else layer.bias.view(-1, *(1,) * (x.ndim - 2))
    assert torch.equal(y, bias.expand_as(y).to(y))
    y.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in (x, *layer.parameters()))


def test_a_head_without_a_bias_keeps_its_largest_output() -> None:
    plain = nn.Linear(6, 9, bias=False)
    layer, x = copy.deepcopy(plain), torch.randn(50, 6)
    make_cosine(layer)
    assert torch.equal(layer(x).argmax(1), plain(x).argmax(1))
    with_bias, cosine = nn.Linear(6, 9), nn.Linear(6, 9)
    cosine.load_state_dict(with_bias.state_dict())
    make_cosine(cosine)
    assert not torch.equal(cosine(5 * x).argmax(1), with_bias(5 * x).argmax(1))
    with pytest.raises(TypeError, match="CosineLinear is no layer of torch's own"):
        make_cosine(layer)


# --- the swap ---------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    """Its running statistics are those of its inputs."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 25, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 4),
    ).double()  # fmt: skip
    for module in model:
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    with torch.no_grad():
        for _ in range(60):
            model(images(64))
    return model.eval()


def images(size: int) -> Tensor:
    return torch.randn(size, 3, 9, 9, dtype=torch.float64) * (torch.rand(size, 1, 1, 1) + 0.5) + 0.3


def test_the_gains_are_those_of_the_expected_length() -> None:
    """``g = ρ ‖w‖ γ/σ`` with ``ρ² = E‖u‖²`` over the data, of each group; ``b' = β + γ (b − μ)/σ``."""
    model, data = network(), images(40)
    converted = ns.swap_norms(model, "cosine", calibration=data, init="absorb")
    for layer, norm in ((0, 1), (3, 4)):
        old, new = model[layer], converted[layer]
        x = model[:layer](data)
        patches = nn.functional.unfold(x, 3).unflatten(1, (old.groups, -1))
        length = patches.square().sum(2).mean((0, 2)).sqrt().repeat_interleave(old.out_channels // old.groups)
        factor = model[norm].weight / (model[norm].running_var + model[norm].eps).sqrt()
        gain = new.parametrizations.weight.original0.detach().flatten()
        # 4096 of the patches are taken, at random.
        torch.testing.assert_close(gain, length * old.weight.flatten(1).norm(dim=1) * factor, rtol=0.02, atol=0)
        torch.testing.assert_close(new.bias, model[norm].bias + factor * (old.bias - model[norm].running_mean))
        assert isinstance(converted[norm], nn.Identity)
    assert type(converted[0]).__bases__[0] is CosineConv2d


def test_a_match_comes_nearer_than_the_expected_length_and_a_fresh_start_does_not() -> None:
    model, data, held = network(), images(300), images(100)
    errors = {
        init: distance(ns.swap_norms(model, "cosine", calibration=data, init=init)(held).detach(), model(held).detach())
        for init in ("fresh", "absorb", "match")
    }
    assert errors["match"] < 0.9 * errors["absorb"] < 0.6 * errors["fresh"], errors


def test_where_it_ends_a_residual_branch_it_compensates_the_shortcut() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.second, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.bn1(self.first(x)))
            return torch.relu(self.bn2(self.second(y)) + y)

    torch.manual_seed(0)
    model = Block().double()
    with torch.no_grad():
        for _ in range(60):
            model(images(32))
    result = ns.convert(model.eval(), "cosine", calibration=images(100))
    rows = {row.name: row for row in result.init.rows}
    assert {row.method for row in rows.values()} == {"matched"}
    assert "compensates the error of its shortcut" in rows["bn2"].notes
    assert all(row.fit.noise_after < row.fit.noise_before for row in rows.values())


def test_what_has_no_input_to_divide_is_refused() -> None:
    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(
        nn.BatchNorm2d(3), Own(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4)
    )
    skips = {skip.name: skip.reason for skip in ns.plan(model, "cosine").skips if skip.what == "norm"}
    assert "there is no layer for it to normalize" in skips["0"]
    assert "Own is a class of its own" in skips["2"]
    assert (
        skips["4"] == "the cosine of single values are its sign".replace("are its", "is their") or "sign" in skips["4"]
    )


def test_it_is_stored_copied_folded_and_exported(tmp_path: Path) -> None:
    model, x = network().float(), images(5).float()
    converted = ns.swap_norms(model, "cosine", calibration=images(60).float()).eval()
    ns.save(converted, tmp_path / "model.safetensors")
    again = ns.load(tmp_path / "model.safetensors", model=network().float())
    assert distance(again(x).detach(), converted(x).detach()) == 0
    copy.deepcopy(converted).train()(x).sum().backward()
    folding = ns.fold_with_report(converted, example_inputs=x)
    assert type(folding.model[0]) is CosineConv2d
    assert not any(parametrize.is_parametrized(module) for module in folding.model.modules())
    assert {row.name for row in folding.left} == {"0", "3", "7"}
    assert all("divides by the length" in row.reason for row in folding.left)
    ns.export_onnx(folding.model, tmp_path / "model.onnx", example_inputs=(x,))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, converted(x).detach().numpy(), rtol=0, atol=1e-5)


def test_what_follows_folds_into_it_and_what_precedes_does_not() -> None:
    behind = nn.Sequential(CosineConv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    ahead = nn.Sequential(nn.BatchNorm2d(3), CosineConv2d(3, 4, 3)).double()
    for model in (behind, ahead):
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    nn.init.normal_(tensor)
        model.eval()
        folded = ns.fold(model, example_inputs=images(2))
        assert distance(folded(images(4) * 0 + 1).detach(), model(images(4) * 0 + 1).detach()) < 1e-12
        assert any(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) is (model is ahead)


def test_its_outputs_are_initialized_from_data() -> None:
    model, x = ns.swap_norms(network(), "cosine", example_inputs=(images(4),)), images(64)
    ns.initialize(model, x)
    y = model[0](x).detach()
    assert float(y.mean((0, 2, 3)).abs().max()) < 1e-3
    assert float((y.std((0, 2, 3)) - 1).abs().max()) < 1e-2
