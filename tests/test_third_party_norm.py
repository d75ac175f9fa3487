"""A norm and a recipe from one file outside the package, which no line of normswap or of the tests' helpers knows."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from laws import SMALL, Case, at_expected_statistics, changed, distance, doubled, fingerprint
from torch import Tensor, nn
from zoo import ZOO, Entry, randomize_

import normswap as ns
from normswap.errors import NormswapError, NothingToConvertError
from normswap.norms import Stays, deployed, norm_of

FILE = REPOSITORY / "examples" / "rms_group_norm.py"
ENTRIES = pytest.mark.parametrize("entry", ZOO, ids=str)


def _loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rms_group_norm", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rms_group_norm"] = module
    spec.loader.exec_module(module)
    return module


rms = _loaded()


def recipe(**options: Any) -> Any:
    return rms.RMSGroupNormalization(**options)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )
    for _ in range(10):  # the norms see the data
        model(images(64))
    for norm in (model[1], model[3], model[5]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return model.eval()


def images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 10, 10, generator=generator) + torch.randn(count, 3, 1, 1, generator=generator)


def error(model: nn.Module, expected: nn.Module) -> float:
    x = images(64, seed=5)
    with torch.no_grad():
        return float((model(x) - expected(x)).norm() / expected(x).norm())


def norms_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, m) for name, m in model.named_modules() if type(m) is rms.RMSGroupNorm)


# -------------------------------------------------------------------------------------------------- all of normswap


def test_neither_the_package_nor_the_helpers_know_of_it() -> None:
    helpers = ("laws.py", "zoo.py", "conversion_checks.py", "random_networks.py", "oracles.py", "conftest.py")
    known = [*(REPOSITORY / "normswap").rglob("*.py"), *(REPOSITORY / "tests" / name for name in helpers)]
    assert len(known) > 100
    assert not [path for path in known if "rms_group" in path.read_text() or "RMSGroup" in path.read_text()]


def test_the_module_is_what_its_file_says() -> None:
    """``y = γ x/sqrt(mean_g x² + eps) + β``, in NumPy."""
    norm = rms.RMSGroupNorm(2, 4, eps=1e-3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    found = norm(x).detach().numpy()
    gamma, beta = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    for n in range(3):
        for c in range(4):
            group = x.numpy()[n, c // 2 * 2 : c // 2 * 2 + 2]
            expected = gamma[c] * x.numpy()[n, c] / np.sqrt((group**2).mean() + 1e-3) + beta[c]
            assert np.allclose(found[n, c], expected, rtol=1e-12)


def test_it_is_planned_and_absorbed() -> None:
    model = network()
    before = fingerprint(model)
    result = ns.convert(model, recipe(num_groups=2), example_inputs=images(2))
    assert not changed(before, fingerprint(model))
    assert [step.norm for step in result.plan.steps] == [
        "RMSGroupNorm, 2 groups of 4", "RMSGroupNorm, 2 groups of 4", "RMSGroupNorm, 2 groups of 6",
    ]  # fmt: skip
    assert [step.num_groups for step in result.plan.steps] == [2, 2, 2]
    assert result.init.method == "absorb"
    assert len(list(norms_of(result.model))) == 3
    assert 1e-3 < error(result.model, model) < 0.7
    fresh = ns.convert(model, recipe(num_groups=2), example_inputs=images(2), init="fresh").model
    assert error(result.model, model) < 0.7 * error(fresh, model)


def test_it_is_matched_and_closer_than_absorbed() -> None:
    model = network()
    absorbed = ns.convert(model, recipe(num_groups=2), calibration=images(128), init="absorb")
    matched = ns.convert(model, recipe(num_groups=2), calibration=images(128))
    assert matched.init.method == "match"
    assert all(row.fit is not None for row in matched.init.rows[:3])
    assert error(matched.model, model) < error(absorbed.model, model)


def test_data_chooses_its_groups() -> None:
    model = network()
    result = ns.convert(model, recipe(num_groups="auto"), calibration=images(128))
    counts = {name: m.num_groups for name, m in norms_of(result.model)}
    assert list(counts.values()) == [step.num_groups for step in result.plan.steps]
    assert all(f"{step.num_groups} group" in step.norm for step in result.plan.steps)
    fixed = [error(ns.convert(model, recipe(num_groups=g), calibration=images(128)).model, model) for g in (1, 2, 4)]
    assert error(result.model, model) < max(fixed)
    with pytest.raises(NormswapError, match="calibration"):
        ns.convert(model, recipe(num_groups="auto"), example_inputs=images(2))


def test_its_sites_are_ranked() -> None:
    costs = ns.rank_sites(network(), recipe(num_groups=2), calibration=images(64))
    assert {cost.norm for cost in costs} == {"1", "3", "5"}
    assert all(cost.error > 0 for cost in costs)


@pytest.mark.parametrize("groups", [2, "auto"])
def test_it_is_saved_loaded_folded_exported_and_verified(groups: Any, tmp_path: Path) -> None:
    x = images(4)
    converted = ns.convert(network(), recipe(num_groups=groups), calibration=images(128)).model
    ns.save(converted, tmp_path / "model.safetensors")
    loaded = ns.load(tmp_path / "model.safetensors", recipe=recipe(num_groups=groups)).eval()
    assert torch.equal(loaded(x), converted(x))

    folding = ns.fold_with_report(loaded, example_inputs=x)
    left = {row.name: row.reason for row in folding.left}
    assert set(left) == {name for name, _ in norms_of(folding.model)}
    assert all("rms_group_norm must be there" in reason for reason in left.values())
    assert folding.check is not None
    assert folding.check.ok
    assert ns.verify(converted, folding.model, images(8, seed=3)).ok

    artifact = ns.export_onnx(folding.model, tmp_path / "model.onnx", example_inputs=x)
    assert artifact.verification is not None
    assert artifact.verification.ok
    broken = copy.deepcopy(folding.model)
    with torch.no_grad():
        next(norms_of(broken))[1].weight.mul_(1.01)
    assert not ns.verify(converted, broken, images(8, seed=3)).ok


def test_a_file_with_it_is_not_loaded_as_another_recipes() -> None:
    """By the recipe's name alone nothing is found: it has to be given."""
    with pytest.raises(NormswapError, match="no recipe 'rms'"):
        ns.convert(network(), "rms")


def test_a_loaded_file_without_the_recipe_is_refused_in_words(tmp_path: Path) -> None:
    converted = ns.convert(network(), recipe(num_groups=2), example_inputs=images(2)).model
    ns.save(converted, tmp_path / "model.safetensors")
    with pytest.raises(NormswapError, match="rms"):
        ns.load(tmp_path / "model.safetensors")


def test_its_plan_replays() -> None:
    plan = ns.Plan.from_json(ns.plan(network(), recipe(num_groups=2), example_inputs=images(2)).to_json())
    replayed = ns.convert(network(), recipe(num_groups=2), plan=plan).model
    expected = ns.convert(network(), recipe(num_groups=2), example_inputs=images(2)).model
    assert torch.equal(replayed(images(2)), expected(images(2)))


def test_a_second_conversion_says_what_it_is() -> None:
    converted = ns.convert(network(), recipe(num_groups=2), exclude=["5"], example_inputs=images(2)).model
    plan = ns.plan(converted, "gn", example_inputs=images(2))
    assert [step.site.norm for step in plan.steps] == ["5"]
    assert sum("RMSGroupNorm" in skip.reason for skip in plan.skips) == 2
    (norm, *_) = (module for _, module in norms_of(converted))
    assert norm_of(norm) is rms.RMSGroups
    assert isinstance(deployed(norm), Stays)


# --------------------------------------------------------------------------------------------------------- the laws


def converted(entry: Entry) -> Case | None:
    """The entry's conversion in float64, as the laws have it of the package's own recipes."""
    original, inputs = entry.model().double(), doubled(entry.inputs)
    assert inputs is not None
    before = fingerprint(original)
    try:
        with SMALL:
            result = ns.convert(
                original, recipe(), example_inputs=inputs() if not entry.kwargs() else None, check=False
            )
    except NothingToConvertError:
        return None
    return Case(entry, original, inputs, None, result.model, result.plan, before, fingerprint(original))


@ENTRIES
def test_at_its_expected_statistics_the_converted_model_is_the_original(entry: Entry) -> None:
    case = converted(entry)
    if case is None:
        pytest.skip("no norm of it can be converted")
    assert case.model is not None
    assert not changed(case.before, case.after)
    with SMALL:
        law = at_expected_statistics(case, case.model)
    assert distance(case.run(law), case.run(case.original)) < 1e-9
    folded = ns.fold(case.model, example_inputs=case.inputs() if not entry.kwargs() else None)
    assert distance(case.run(folded), case.run(case.model)) < 1e-9


def test_most_entries_were_converted_and_the_law_sees_a_wrong_value() -> None:
    cases = [converted(entry) for entry in ZOO if entry.name in ("conv_bn_relu_chain", "norm_first", "conv3d")]
    for case in cases:
        assert case is not None
        assert case.model is not None
        law = at_expected_statistics(case, case.model)
        assert distance(case.run(law), case.run(case.original)) < 1e-9
        model = copy.deepcopy(case.model)
        with torch.no_grad():
            next(norms_of(model))[1].weight[0].mul_(1 + 1e-6)
        assert distance(case.run(at_expected_statistics(case, model)), case.run(case.original)) > 1e-9
        other = dataclasses.replace(case, original=randomize_(copy.deepcopy(case.original), 9))
        assert distance(case.run(at_expected_statistics(other, case.model)), case.run(case.original)) > 1e-9
    assert sum(converted(entry) is not None for entry in ZOO) > 0.9 * len(ZOO)
