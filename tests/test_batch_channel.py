"""Batch-channel normalization: its estimates against NumPy, the swap, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from laws import distance
from torch import Tensor, nn

import normswap as ns
from normswap.nn import EstimatedStatistics, MeanOnlyBatchNorm, StreamingNorm

Array = np.ndarray


def estimated(x: Array, mean: Array, var: Array, rate: float, eps: float) -> tuple[Array, Array, Array]:
    """The batch part of micro-batch BCN, from the paper: estimates first, then the normalization by them."""
    axes = (0, *range(2, x.ndim))
    mean = mean + rate * (x.mean(axes) - mean)
    var = var + rate * (((x - oracles.per_channel(mean, x)) ** 2).mean(axes) - var)
    y = (x - oracles.per_channel(mean, x)) / np.sqrt(oracles.per_channel(var, x) + eps)
    return y, mean, var


def batches(count: int = 4) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 6, 5, 4, generator=generator, dtype=torch.float64) * 3 + 1 for _ in range(count))


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_the_estimates_are_the_papers(momentum: float | None) -> None:
    norm = EstimatedStatistics(6, eps=1e-3, momentum=momentum, dtype=torch.float64)
    mean, var = np.zeros(6), np.ones(6)
    for count, x in enumerate(batches(), 1):
        expected, mean, var = estimated(x.numpy(), mean, var, 1 / count if momentum is None else momentum, 1e-3)
        assert np.allclose(norm(x), expected, rtol=1e-12)
        assert np.allclose(norm.running_mean, mean, rtol=1e-12)
        assert np.allclose(norm.running_var, var, rtol=1e-12)
    norm.eval()
    x = next(batches())
    first = norm(x)
    assert torch.equal(norm(x), first)
    y = (x.numpy() - oracles.per_channel(mean, x.numpy())) / np.sqrt(oracles.per_channel(var, x.numpy()) + 1e-3)
    assert np.allclose(first, y, rtol=1e-12)


def test_the_batchs_own_statistics_or_the_former_estimates_would_be_told_apart() -> None:
    x = next(batches()).numpy()
    norm = EstimatedStatistics(6, dtype=torch.float64)
    found = norm(torch.from_numpy(x)).numpy()
    ones, zeros = np.ones(6), np.zeros(6)
    own, _ = oracles.batch_norm_train(x, ones, zeros, oracles.Running(zeros, ones))
    assert np.abs(found - own).max() > 0.1
    former = x / np.sqrt(1 + 1e-5)
    assert np.abs(found - former).max() > 0.1


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", [EstimatedStatistics, MeanOnlyBatchNorm, StreamingNorm])
def test_a_batch_without_samples_leaves_the_statistics(kind: type[nn.Module], momentum: float | None) -> None:
    """A detector's head gets one where nothing was proposed; a BatchNorm takes it, too."""
    norm = kind(6, momentum=momentum)
    norm(torch.randn(4, 6, 2, 2))
    before = norm.running_mean.clone()
    assert norm(torch.randn(0, 6, 2, 2)).shape == (0, 6, 2, 2)
    assert torch.equal(norm.running_mean, before)
    assert norm.running_var.isfinite().all()
    norm(torch.randn(1, 6, 2, 2))
    assert not torch.equal(norm.running_mean, before)


def test_no_gradient_goes_through_the_estimates() -> None:
    x = next(batches()).requires_grad_()
    norm = EstimatedStatistics(6, dtype=torch.float64)
    upstream = torch.randn_like(x)
    (norm(x) * upstream).sum().backward()
    scale = (norm.running_var + norm.eps).rsqrt().view(1, -1, 1, 1)
    assert x.grad is not None
    assert torch.allclose(x.grad, upstream * scale, rtol=1e-12)


def network() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
    )
    for norm in (model[1], model[3], model[5]):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
        norm.running_var.uniform_(0.5, 2)
    return model.double().eval()


X = torch.randn(4, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_up_to_the_group_norm_the_swap_is_exact_where_the_weights_are_plain() -> None:
    """By excluding weight standardization from the comparison: the first site's filters have gain and offset."""
    model = network()
    converted = ns.swap_norms(model, "bcn", num_groups=2)
    front, groups = converted[1].front, converted[1].norm
    old = model[1]
    with torch.no_grad():
        t = front(converted[0](X))
        x = model[0](X)
        expected = (x - old.running_mean.view(1, -1, 1, 1)) * (old.running_var + old.eps).rsqrt().view(1, -1, 1, 1)
        assert distance(t, expected) < 1e-12
        y = oracles.group_norm(t.numpy(), 2, groups.weight.numpy(), groups.bias.numpy(), old.eps)
        assert np.allclose(groups(t), y, rtol=1e-10)
        front.running_var[2] *= 1.01
        assert distance(front(converted[0](X)), expected) > 1e-3


def test_where_no_layer_feeds_a_norm_its_estimates_need_no_affine() -> None:
    converted = ns.swap_norms(network(), "bcn")
    assert [name for name, _ in converted[3].named_children()] == ["front", "norm"]


def test_it_folds_into_convolutions_and_group_norms_and_comes_back_from_a_file(tmp_path: Path) -> None:
    converted = ns.swap_norms(network(), "bcn")
    folding = ns.fold_with_report(converted, example_inputs=X)
    assert not folding.left
    assert {type(m) for m in folding.model if m is not folding.model[3]} == {nn.Conv2d, nn.GroupNorm, nn.ReLU}
    assert {type(m) for m in folding.model[3]} == {nn.Conv2d, nn.GroupNorm}  # no layer in front: a 1×1 of each channel
    with torch.no_grad():
        assert distance(folding.model(X), converted(X)) < 1e-12
        ns.save(converted, tmp_path / "m.safetensors")
        again = ns.load(tmp_path / "m.safetensors", model=network())
        assert torch.equal(again(X), converted(X))


def test_it_exports(tmp_path: Path) -> None:
    converted = ns.swap_norms(network().float(), "bcn")
    folded = ns.fold(converted, example_inputs=X.float())
    ns.export_onnx(folded, tmp_path / "m.onnx", example_inputs=(X.float(),))
    assert ns.verify(converted, tmp_path / "m.onnx", (X.float(),)).ok


def test_a_match_fits_the_layer_and_lets_the_estimates_follow_it() -> None:
    model = network().float()
    x = torch.randn(40, 3, 9, 9, generator=torch.Generator().manual_seed(2))
    absorbed, matched = (
        ns.convert(model, "bcn", calibration=x, init=init, num_groups=1) for init in ("absorb", "match")
    )
    rows = {row.name: row for row in matched.init.rows}
    assert rows["1"].method == rows["5"].method == "matched"
    errors = [one.model(x).sub(model(x)).norm() / model(x).norm() for one in (absorbed, matched)]
    assert errors[1] < 0.7 * errors[0]
    for layer, norm in ((0, 1), (4, 5)):
        reaches = nn.Sequential(*list(matched.model)[: layer + 1])(x)
        estimates = matched.model[norm].front
        # The statistics of the training part, four fifths of the samples: within their sampling error.
        assert torch.allclose(estimates.running_mean, reaches.mean((0, 2, 3)), atol=0.05)
        assert torch.allclose(estimates.running_var, reaches.var((0, 2, 3)), rtol=0.1)
    choosing = ns.convert(model, "bcn", calibration=x, num_groups="auto")
    assert all(step.num_groups in (1, 2, 3, 4) for step in choosing.plan.steps)


def test_training_follows_the_batches_and_frozen_norms_stay() -> None:
    model = network()
    model[1].train = lambda mode=True: nn.BatchNorm2d.train(model[1], False)  # a model that freezes its norm
    frozen = ns.convert(model, "bcn", example_inputs=X)
    assert "estimated" not in frozen.plan.steps[0].norm
    assert "frozen: no estimates, its statistics go into the weight" in frozen.plan.steps[0].notes
    converted = ns.swap_norms(network(), "bcn").train()
    before = converted[1].front.running_mean.clone()
    converted(X[:2]).square().sum().backward()
    assert not torch.equal(converted[1].front.running_mean, before)
    assert all(bool(torch.isfinite(p.grad).all()) for p in converted.parameters())


def test_running_statistics_are_estimated_anew_and_a_second_conversion_leaves_them() -> None:
    converted = ns.swap_norms(network(), "bcn")
    updated = ns.update_statistics(converted, X)
    assert "1.front" in updated.updated
    values = converted[0](X)
    assert torch.allclose(converted[1].front.running_mean, values.mean((0, 2, 3)))
    converted.append(nn.BatchNorm2d(6).double().eval())
    told = {skip.name: skip.reason for skip in ns.plan(converted, "gn").skips}
    assert "batch part, from an earlier conversion" in told["1.front"]
