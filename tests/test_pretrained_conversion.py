"""What the networks of the real world keep: published weights, swapped, folded and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pretrained import accuracy, cifar10_test, load
from torch import nn

import normswap as ns
from normswap.norms import Incoming

# Float32 rounding through up to 31 layers, relative to the output's largest value; seen: at most 2e-6.
EXACT = 1e-4

# Top-1 in percent of 2,000 test images without any data; seen: 89.45, 89.10, 89.10 and 87.15.
KEPT_WITHOUT_DATA = {"ln": 89.0, "gn": 88.5, "gn+aws": 88.5, "gn+ws": 86.0}


@pytest.fixture(autouse=True)
def _needs_data(data_dir: Path) -> None:
    """Skip where the real data is absent."""


@pytest.mark.parametrize("name", ["cifar10_resnet20", "cifar10_resnet32", "vww_mobilenetv1", "phasenet", "crepe_tiny"])
def test_weight_norm_with_mean_only_batch_norm_keeps_a_real_network(name: str, tmp_path: Path) -> None:
    model, inputs = load(name)
    converted = ns.swap_norms(model, "wn+mobn", example_inputs=inputs)
    folded = ns.fold(converted, example_inputs=inputs)
    ns.export_onnx(folded, tmp_path / "model.onnx", example_inputs=inputs)
    for other in (converted, folded, tmp_path / "model.onnx"):
        check = ns.verify(model, other, inputs, rtol=EXACT)
        assert check.ok, str(check)
    assert not any(type(m) in (nn.BatchNorm1d, nn.BatchNorm2d) for m in converted.modules())


def test_a_broken_weight_is_noticed() -> None:
    model, inputs = load("cifar10_resnet20")
    converted = ns.swap_norms(model, "wn+mobn", example_inputs=inputs)
    with torch.no_grad():
        converted.get_submodule("layer2.0.bn1").bias.mul_(1.01)
    assert not ns.verify(model, converted, inputs, rtol=EXACT).ok


def test_no_accuracy_is_lost_by_weight_norm_with_mean_only_batch_norm() -> None:
    images, labels = cifar10_test(2000)
    model, _ = load("cifar10_resnet20")
    folded = ns.fold(ns.swap_norms(model, "wn+mobn"))
    assert accuracy(folded, images, labels) == accuracy(model, images, labels)


@pytest.mark.parametrize("to", KEPT_WITHOUT_DATA)
def test_a_trained_network_survives_the_swap_without_data(to: str) -> None:
    images, labels = cifar10_test(2000)
    model, _ = load("cifar10_resnet20")
    assert accuracy(ns.swap_norms(model, to), images, labels) >= KEPT_WITHOUT_DATA[to]


def test_fresh_norms_lose_a_trained_network() -> None:
    """The negative control of the test above: what it demands is not had for nothing."""
    images, labels = cifar10_test(1000)
    model, _ = load("cifar10_resnet20")
    assert accuracy(ns.swap_norms(model, "gn+ws", init="fresh"), images, labels) < 40


def test_removing_the_filters_means_evenly_loses_a_trained_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the data-free moments are for: without them gn+ws keeps next to nothing."""
    images, labels = cifar10_test(1000)
    model, _ = load("cifar10_resnet20")
    monkeypatch.setattr("normswap.initialization.centring.input_moments", lambda *_, **__: {})
    assert accuracy(ns.swap_norms(model, "gn+ws"), images, labels) < 40


def test_dead_channels_count_in_the_expected_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the MobileNet's channels are dead: γ·sqrt(r + eps) with r = 1 is further off than with r itself."""
    model, inputs = load("vww_mobilenetv1")
    reference = model(*inputs)

    def error() -> float:
        moved = ns.swap_norms(model, "ln", example_inputs=inputs)(*inputs) - reference
        return float(moved.norm() / reference.norm())

    with torch.no_grad():
        measured = error()
        monkeypatch.setattr(
            "normswap.initialization.absorb.Incoming",
            lambda state, level, ratio, *more: Incoming(state, level, torch.ones_like(ratio), *more),
        )
        plain = error()
    assert measured < 0.5 * plain  # 0.47 and 1.35
