"""Channels are scaled such that standardizing takes least away: the cost against NumPy, the search, what it brings."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normswap as ns
from normswap.demo.data import load_digits, load_network
from normswap.graph import capture
from normswap.graph.channels import FIXED, find_channels
from normswap.graph.dataflow import Dataflow
from normswap.initialization import equalization
from normswap.initialization.equalization import choose_scales
from normswap.initialization.equalization_cost import Cost, connected, costs_of, least_cost
from normswap.initialization.moments import moments_of_covariance
from normswap.initialization.quadratic_forms import CovarianceSums, QuadraticForm
from normswap.storage.origin import origin_of

LAYERS = {
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "1-D": lambda: nn.Conv1d(5, 3, 2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "linear": lambda: nn.Linear(5, 7),
}


def at(cost: Cost, v: np.ndarray) -> float:
    """A cost at one v."""
    return cost.lost(v) / cost.kept(v)


def samples(groups: int, n: int, count: int = 50) -> Tensor:
    return torch.randn(groups, count, n, generator=torch.Generator().manual_seed(2)).abs()


def covariance(rows: Tensor) -> np.ndarray:
    """The covariance of each group's samples, with the ridge."""
    matrices = [np.cov(one.double().numpy().T, bias=True) for one in rows]
    return np.stack([m + 1e-3 * m.diagonal().mean() * np.eye(len(m)) for m in matrices])


def inverse(rows: Tensor) -> list[QuadraticForm]:
    sums = CovarianceSums()
    sums.add(rows)
    found = sums.inverse()
    assert found is not None
    return found


def filters(layer: nn.Module) -> np.ndarray:
    """Each output channel's filter as (in/groups, kernel), read off torch's documentation of the weights."""
    weight = layer.weight.detach().double().numpy()
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, nn.ConvTranspose2d):  # (in, out/groups, *kernel)
        n_in, n_out = weight.shape[0] // groups, weight.shape[1]
        weight = np.stack(
            [weight[g * n_in : (g + 1) * n_in, o] for g in range(groups) for o in range(n_out)]
        )  # output channel g·out/groups + o
    return weight.reshape(len(weight), weight.shape[1], -1)


@pytest.mark.parametrize("count", [3, 12, 50])
def test_the_inverse_covariance_is_numpys_whether_samples_or_sums_are_kept(count: int) -> None:
    rows = samples(2, 12, count)
    v = np.random.default_rng(0).uniform(1, 10, size=12)
    expected = [v @ np.linalg.inv(matrix) @ v for matrix in covariance(rows)]
    for form, value in zip(inverse(rows), expected, strict=True):
        assert form(v) == pytest.approx(value, rel=1e-9)
        squares = [form(unit) for unit in np.eye(12)]
        assert form.squares.tolist() == pytest.approx(squares, rel=1e-9)
    parts = CovarianceSums()
    for part in rows.split(5, dim=1):
        parts.add(part)
    summed = CovarianceSums(parts.sums)  # as many processes give them
    for form, value in zip([*(parts.inverse() or ()), *(summed.inverse() or ())], 2 * expected, strict=True):
        assert form(v) == pytest.approx(value, rel=1e-9)
    assert inverse(rows * 2)[0](v) != pytest.approx(expected[0], rel=1e-2)


def test_samples_that_are_not_finite_have_no_inverse() -> None:
    for count in (3, 50):
        rows = samples(1, 12, count)
        rows[0, 1, 2] = float("nan")
        sums = CovarianceSums()
        sums.add(rows)
        assert sums.inverse() is None


def test_channels_with_one_number_are_joined() -> None:
    form, index = inverse(samples(1, 6, 4))[0], np.array([2, 0, 1, 2, 0, 2])
    v = np.array([1.0, 2.0, 5.0])
    assert form.joined(index, 3)(v) == pytest.approx(form(v[index]), rel=1e-12)
    order = np.array([3, 0, 2, 1, 5, 4])
    w = np.arange(1.0, 7.0)
    assert form.joined(order, 6)(w) == pytest.approx(form(w[order]), rel=1e-12)
    assert form.joined(order, 6)(w) != pytest.approx(form(w), rel=1e-3)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_cost_is_the_least_variance_that_a_zero_sum_takes_away(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    w = filters(layer)
    groups = getattr(layer, "groups", 1)
    out, n, kernel = w.shape
    rng = np.random.default_rng(3)
    gamma, sigma = rng.normal(size=out), rng.uniform(0.5, 2, size=out)
    rows = samples(groups, n)
    numbers = torch.arange(1, groups * n + 1)
    costs = costs_of(layer, torch.from_numpy(np.stack([gamma, sigma])), inverse(rows), numbers)
    assert [cost.numbers.tolist() for cost in costs] == numbers.view(groups, n).tolist()
    for g, cost in enumerate(costs):
        v = rng.uniform(1, 10, size=n)
        matrix, total = covariance(rows)[g], 0.0
        for o in range(g * out // groups, (g + 1) * out // groups):
            # min dᵀSd subject to Σ_ck v_c (w_ck − d_c) = 0, by its conditions as one linear system.
            conditions = np.block([[2 * matrix, kernel * v[:, None]], [kernel * v[None], np.zeros((1, 1))]])
            d = np.linalg.solve(conditions, np.r_[np.zeros(n), (v[:, None] * w[o]).sum()])[:n]
            total += (gamma[o] / sigma[o]) ** 2 * d @ matrix @ d
        assert at(cost, v) == pytest.approx(total / (gamma**2).sum(), rel=1e-9)


def costs_of_two_layers(count: int = 50) -> list[Cost]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 5, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(4, 3, 1)]
    numbers = [[FIXED, 1, 2, 3, 4, 5, 6, 7], [7, 8, 9, 10, 1, 2, 3, FIXED], [11, 12, 13, 14]]
    return [
        cost
        for layer, own in zip(layers, numbers, strict=True)
        for cost in costs_of(
            layer, torch.ones(2, layer.out_channels), inverse(samples(1, len(own), count)), torch.tensor(own)
        )
    ]


def total(costs: list[Cost], v: np.ndarray) -> float:
    return sum(at(cost, v[cost.numbers.numpy()]) for cost in costs)


def test_no_single_step_betters_what_was_found_and_fixed_channels_stay() -> None:
    costs = costs_of_two_layers()
    v = least_cost(costs, 15).numpy()
    assert v[FIXED] == 1
    assert bool(((v >= 1) & (v <= 8)).all())
    assert total(costs, v) < 0.3 * total(costs, np.ones(15))
    for number in range(1, 15):
        for value in (1.0, 2.0, 4.0, 8.0):
            other = v.copy()
            other[number] = value
            assert total(costs, other) > 0.995 * total(costs, v)


@pytest.mark.parametrize("count", [5, 50])
def test_the_descent_is_that_of_one_channel_after_the_other(count: int) -> None:
    costs = costs_of_two_layers(count)

    def plainly(sweeps: int) -> np.ndarray:
        """The same, each cost computed anew from all of v."""
        v = np.ones(15)
        for _ in range(sweeps):
            for number in (*range(1, 8), *range(8, 15)):
                mine = [cost for cost in costs if number in cost.numbers.tolist()]
                tried = [v[number], *(2.0 ** np.arange(4))]
                found = []
                for value in tried:
                    other = v.copy()
                    other[number] = value
                    found.append(total(mine, other))
                best = int(np.argmin(found))
                if found[best] < (1 - 1e-3) * found[0]:
                    v[number] = tried[best]
        return v

    assert least_cost(costs, 15).tolist() == plainly(8).tolist()
    assert least_cost(costs, 15).tolist() != plainly(1).tolist()


def test_sets_are_connected_by_what_they_share_but_not_by_fixed_channels() -> None:
    labels = connected([[1, 2], [FIXED, 3], [2, 4], [FIXED, 5], [5, 6], [4, 7]])
    same = [[a == b for b in labels] for a in labels]
    assert same[0] == [True, False, True, False, False, True]
    assert same[3] == [False, False, False, True, True, False]


def digits(count: int = 300) -> tuple[Tensor, Tensor]:
    images, labels = load_digits()
    return images[:count], labels[:count]


def error(model: nn.Module, original: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        expected, found = original(images), model(images)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("init", ["absorb", "match"])
def test_scaled_channels_bring_gn_ws_nearer(init: str) -> None:
    model = load_network()
    images, _ = digits()
    calibration, rest = images[:150], images[150:]
    options = {"calibration": calibration, "init": init, "input_offset": False}
    plain, scaled = (
        error(ns.swap_norms(model, "gn+ws", scale=scale, **options), model, rest) for scale in (False, True)
    )
    assert scaled < 0.9 * plain


def test_the_original_stays_and_the_report_says_that_channels_were_scaled() -> None:
    model = load_network()
    before = copy.deepcopy(model.state_dict())
    result = ns.convert(model, "gn+ws", calibration=digits(64)[0])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    said = [note for note in result.init.notes if "channels" in note]
    assert len(said) == 1
    assert not [
        n for n in ns.convert(model, "gn+ws", calibration=digits(64)[0], scale=False).init.notes if "channels" in n
    ]


def test_a_site_is_reported_in_the_models_own_units() -> None:
    model = load_network()
    images = digits(100)[0]
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, __, y, name=name: seen.update({name: y.detach()}))
    model(images[4::5])  # those that are held out
    for _, module in model.named_modules():
        module._forward_hooks.clear()
    rows = ns.convert(model, "gn+ws", calibration=images).init.rows
    fits = {row.name: row.fit for row in rows if row.fit and row.name in seen and not row.notes}
    assert len(fits) > 3
    for name, fit in fits.items():
        assert fit.mean == pytest.approx(float(seen[name].mean()), abs=1e-5)
        assert fit.std == pytest.approx(float(seen[name].std(correction=0)), rel=1e-5)


@pytest.mark.parametrize("init", ["absorb", "match"])
def test_in_place_and_in_a_copy_are_one_thing(init: str) -> None:
    model = load_network()
    images = digits(64)[0]
    copied = ns.swap_norms(model, "gn+ws", calibration=images, init=init)
    ns.swap_norms(model, "gn+ws", calibration=images, init=init, inplace=True)
    pairs = zip(copied.state_dict().items(), model.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_what_a_conversion_in_place_remembers_of_the_old_values_is_not_scaled() -> None:
    model, other = load_network(), load_network()
    old = {name: value.clone() for name, value in model.state_dict().items()}
    copied = origin_of(ns.swap_norms(other, "gn+ws"))
    here = origin_of(ns.swap_norms(model, "gn+ws", inplace=True))
    for origin in (copied, here):
        assert origin is not None
        assert origin.moves is not None
        assert any(scale.outputs is not None for scale in origin.moves.scales.values())
        assert origin.moves.before
        assert all(torch.equal(value, old[name]) for name, value in origin.moves.before.items())


@pytest.mark.parametrize("factor", [1.0, 2.0**-145, 2.0**127])
def test_a_failure_in_place_takes_the_scales_out_bit_for_bit(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a scale takes values beyond what float32 holds, to zero or to infinity."""
    model = load_network()
    with torch.no_grad():
        model.bn1.weight.mul_(factor)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scaled: list[bool] = []

    def fail(*_: Any, **__: Any) -> None:
        scaled.append(not torch.equal(model.bn1.weight, before["bn1.weight"]))
        raise KeyboardInterrupt

    monkeypatch.setattr("normswap.initialization.absorb.moments_for", fail)
    monkeypatch.setattr(equalization, "keeps_output", lambda *_: None)
    monkeypatch.setattr(equalization, "choose_scales", lambda _, __, channels, *___, **____: eighths(channels.count))
    with pytest.raises(KeyboardInterrupt):
        ns.swap_norms(model, "gn+ws", inplace=True)
    assert scaled == [True]  # the control: it had been scaled
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def eighths(count: int) -> Tensor:
    """A scale of 1/8 for all channels but the fixed one."""
    scales = torch.full((count,), 0.125, dtype=torch.float64)
    scales[FIXED] = 1
    return scales


def test_scales_are_powers_of_two_and_change_no_bit_of_the_output() -> None:
    model = load_network().eval()
    images = digits(64)[0]
    bound = ns.convert(copy.deepcopy(model), "gn+ws")
    origin = origin_of(bound.model)
    assert origin is not None
    assert origin.moves is not None
    found = [f for s in origin.moves.scales.values() for f in (s.outputs, s.inputs) if f is not None]
    assert found
    assert all(bool((torch.frexp(factor).mantissa == 0.5).all()) for factor in found)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for name, scale in origin.moves.scales.items():
            parameter = scaled.get_parameter(name)
            parameter.copy_(scale.times(parameter.double()))
    assert torch.equal(scaled(images), model(images))


@pytest.mark.parametrize("to", ["gn", "ln", "gn+aws", "wn+mobn"])
def test_recipes_that_do_not_centre_weights_scale_nothing(to: str) -> None:
    model = load_network()
    images = digits(64)[0]
    one, other = (
        ns.swap_norms(model, to, calibration=images, init="absorb", scale=scale).state_dict() for scale in (True, False)
    )
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_scales_that_would_move_the_output_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_network()
    images = digits(64)[0]
    plain = ns.swap_norms(model, "gn+ws", calibration=images, init="absorb", scale=False).state_dict()

    def break_one(scaled: nn.Module, channels: object, scales: Tensor) -> None:
        with torch.no_grad():
            next(scaled.parameters()).mul_(1.1)

    monkeypatch.setattr(equalization, "scale_channels", break_one)
    result = ns.convert(model, "gn+ws", calibration=images, init="absorb")
    assert not [note for note in result.init.notes if "channels" in note]
    assert all(torch.equal(plain[name], value) for name, value in result.model.state_dict().items())


def test_a_network_without_a_free_channel_is_left_as_it_is() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    ).eval()
    channels = find_channels(Dataflow(capture(model)), {"1": (), "4": ()}, ["0", "3"])
    gamma_sigma = {name: torch.ones(2, 4) for name in ("0", "3")}
    assert choose_scales(model, gamma_sigma, channels, [(torch.randn(8, 3, 8, 8),)], shaped=False) is None


def test_statistics_that_cannot_be_are_refused_and_overflows_are_told() -> None:
    model = load_network()
    with torch.no_grad():
        model.bn1.running_var[0] = -1
    with pytest.raises(ns.NormswapError, match=r"'bn1.running_var' holds negative values"):
        ns.swap_norms(model, "gn+ws")
    with pytest.raises(ns.NormswapError, match="not finite"):
        moments_of_covariance(torch.zeros(1, 4), torch.full((1, 4, 4), torch.inf), 100)


@pytest.mark.parametrize(("side", "samples"), [(8, 128), (224, 32)])
def test_scales_are_chosen_on_fewer_samples_where_these_are_large(
    side: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def choose(*args: Any, **_: Any) -> None:
        seen.extend(len(batch[0]) for batch in args[3])

    monkeypatch.setattr("normswap.initialization.equalization.choose_scales", choose)
    model = nn.Sequential(nn.Conv2d(3, 2, 3, stride=8), nn.BatchNorm2d(2)).eval()
    batches = list(torch.randn(160, 3, side, side).split(16))
    ns.swap_norms(model, "gn+ws", init="absorb", input_offset=False, calibration=batches)
    assert sum(seen) == samples
