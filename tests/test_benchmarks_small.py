"""The zoo's benchmark on three small networks, and its checks on what they must refuse."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from zoo_packages import import_timm, import_torchvision

import normswap as ns

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


zoo, engine, deployment = load("zoo"), load("engine"), load("deployment")
SMALL = ("torchvision/resnet18", "timm/regnetx_002", "timm/mobilenetv3_small_100")
NORMS = {"torchvision/resnet18": 20, "timm/regnetx_002": 44, "timm/mobilenetv3_small_100": 34}


def network(name: str) -> Any:
    import_torchvision() if name.startswith("torchvision") else import_timm()
    (found,) = (one for one in zoo.NETWORKS if one.name == name)
    return dataclasses.replace(found, side=32) if name == "torchvision/resnet18" else found


@pytest.mark.parametrize(("name", "recipe"), list(zip(SMALL, zoo.RECIPES, strict=True)))
def test_a_network_of_the_zoo_passes_every_check(name: str, recipe: str) -> None:
    row = zoo.run(network(name), recipe, zoo.CHECKS)
    assert {key: cell.text for key, cell in row.cells.items() if not cell.ok} == {}
    assert row.ok
    assert set(row.cells) == set(zoo.CHECKS)
    assert (row.norms, row.layers, row.skipped_norms) == (NORMS[name], NORMS[name], 0)


# ------------------------------------------------------------------------------------- what the checks must see


def tiny() -> Any:
    def make() -> nn.Module:
        pairs = ((nn.Conv2d(i, o, 3), nn.BatchNorm2d(o), nn.ReLU()) for i, o in ((3, 8), (8, 16)))
        return nn.Sequential(*(layer for pair in pairs for layer in pair), nn.Flatten(), nn.Linear(256, 4))

    return zoo.Network("tests/tiny", make, side=8)


def case(recipe: str = "wn+mobn", **options: Any) -> Any:
    original, x = tiny().build(0), tiny().inputs()
    found = ns.convert(original, recipe, example_inputs=x, **options)
    return zoo.Case(tiny(), recipe, original, found.model, found.plan, x)


def broken(good: Any, factor: float = 1.01) -> Any:
    """The case with one filter of its converted model changed."""
    model = copy.deepcopy(good.model)
    with torch.no_grad():
        next(p for p in model.parameters() if p.ndim == 4)[0, 0] *= factor
    return dataclasses.replace(good, model=model)


def test_a_random_network_has_gammas_of_both_signs_and_a_function_of_its_input() -> None:
    model, x = tiny().build(0), tiny().inputs()
    for norm in zoo.batch_norms(model):
        assert norm.weight.min() < 0 < norm.weight.max()
        assert norm.momentum == 0.1
    with torch.no_grad():
        first, second = model(x)
    assert (first - second).abs().max() > 0.1 * first.abs().max()
    assert torch.equal(model[0].weight, tiny().build(0)[0].weight)
    assert not torch.equal(model[0].weight, tiny().build(2)[0].weight)


def test_a_changed_weight_fails_the_exactness_check_and_an_unchanged_one_passes() -> None:
    assert zoo.exact(case()).ok
    assert not zoo.exact(broken(case())).ok
    assert zoo.exact(broken(case("ln"))).text == "–"  # promises no exactness


@pytest.mark.parametrize("allowed", [zoo.EXACT, zoo.ROUNDED, zoo.SAME])
def test_the_comparison_fails_for_a_model_of_one_changed_weight(allowed: float) -> None:
    good = case()
    assert zoo.compare(good.model, copy.deepcopy(good.model), good.x, allowed).ok
    assert not zoo.compare(good.model, broken(good).model, good.x, allowed).ok


def test_a_batch_norm_that_is_left_fails_with_the_plans_reason() -> None:
    cell = zoo.none_left(case("ln", exclude=["1"]))
    assert not cell.ok
    assert cell.text == "1 BatchNorms are left: the pattern '1' excludes it"


@pytest.mark.parametrize("check", [zoo.step, zoo.step_bf16])
def test_a_training_step_fails_on_infinite_weights_and_on_parameters_out_of_reach(check: Any) -> None:
    good = case()
    assert check(good).ok
    assert "not finite" in check(broken(good, float("inf"))).text
    assert check(dataclasses.replace(good, model=WithIdle(good.model))).text == "idle has no gradient"


class WithIdle(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.idle = inner, nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)


def test_a_module_of_this_package_in_a_folded_model_fails() -> None:
    assert zoo.fold(case("ln")).ok
    cell = zoo.fold(case("ln", axes="channel"))
    assert not cell.ok
    assert cell.text == "1 is still a ChannelLayerNorm"


def test_a_failed_check_makes_the_exit_code_1_and_its_reason_a_cell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fails(case: Any) -> Any:
        raise ValueError("the reason\nand more")

    monkeypatch.setattr(zoo, "NETWORKS", (tiny(),))
    arguments = ["tiny", "--recipe", "ln", "--threads", str(torch.get_num_threads())]
    quick = {name: zoo.CHECKS[name] for name in ("BN left", "fold")}
    for checks, code in ((quick, 0), (quick | {"fold": fails}, 1)):
        monkeypatch.setattr(zoo, "CHECKS", checks)
        monkeypatch.setattr(zoo.run, "__defaults__", (checks,))
        assert zoo.main([*arguments, "--json", str(tmp_path / "zoo.json")]) == code
        assert ("FAILED: ValueError: the reason" in capsys.readouterr().out) == bool(code)
        (row,) = json.loads((tmp_path / "zoo.json").read_text(encoding="utf-8"))
        assert row["ok"] == (not code)


def test_a_network_that_cannot_be_converted_is_a_failed_row() -> None:
    row = zoo.run(zoo.Network("tests/plain", lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), side=8), "ln")
    assert not row.ok
    assert "NothingToConvertError" in zoo.table([row])


def test_a_missed_ratio_is_told_from_one_that_is_met_and_from_one_that_is_not_required() -> None:
    assert engine.Ratio("a", "b", 1.4, 1.0, 1.5).ok
    assert not engine.Ratio("a", "b", 1.6, 1.0, 1.5).ok
    assert engine.Ratio("a", "b", 9.0, 1.0).ok


def test_the_memory_at_its_peak_is_what_is_held_at_one_time() -> None:
    def block() -> torch.Tensor:
        return torch.zeros(1_000_000)

    one_by_one = engine.peak_memory(lambda: [block() is None for _ in range(3)])
    together = engine.peak_memory(lambda: [block() for _ in range(3)])
    assert 4e6 <= one_by_one < 5e6
    assert 12e6 <= together < 13e6


@pytest.mark.skipif(not engine.has_proc(), reason="there is no /proc")
def test_the_resident_memory_is_that_of_the_peak_beside_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def case(megabytes: int) -> Any:
        return lambda: (lambda: torch.ones(megabytes * 250_000).sum(), nn.Linear(10, 4))

    monkeypatch.setattr(engine, "CASES", {"large": case(200), "small": case(1)})
    found = {}
    for name in ("large", "small"):
        engine.measure(name)
        found[name] = json.loads(capsys.readouterr().out)
    assert found["large"]["model"] == 44 * 4
    assert 195e6 <= found["large"]["beside"] < 240e6
    assert found["small"]["beside"] < 40e6


def test_a_billion_parameters_are_a_billion() -> None:
    with torch.device("meta"):
        model = engine.billion()
    assert 0.98e9 < sum(p.numel() for p in model.parameters()) < 1.02e9
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_errors_and_copies_between_layouts_are_counted(tmp_path: Path) -> None:
    expected = np.array([1.0, -4.0])
    assert deployment.relative_error(expected, expected) == 0
    assert deployment.relative_error(np.array([1.0, -3.0]), expected) == 0.25
    kinds = ("Relu", "ReorderInput", "ReorderOutput", "ReorderOutput")
    nodes = [onnx.helper.make_node(kind, [f"x{i}"], [f"x{i + 1}"]) for i, kind in enumerate(kinds)]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "", [], [])), tmp_path / "graph.onnx")
    assert deployment.reorders(tmp_path / "graph.onnx") == 3


def test_a_slower_run_has_a_ratio_above_one() -> None:
    x = np.zeros(1)
    runs = {deployment.REFERENCE: lambda x: sum(range(2_000)), "slower": lambda x: sum(range(2_000_000))}
    found = deployment.compared(runs, x, 3)
    assert found[deployment.REFERENCE][1] == [1.0, 1.0, 1.0]
    assert min(found["slower"][1]) > 10


def test_a_chain_has_as_many_sites_as_pairs() -> None:
    assert len(ns.plan(engine.chain(7)).steps) == 7
