"""The examples run as a user runs them: each in a process of its own, in an empty folder."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import normswap as ns
from normswap.demo.data import load_network

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"

RUNS: dict[str, tuple[list[str], list[str]]] = {
    "convert_timm.py": ([], ["14 of 14 BatchNorms convert", "saved (", "parameters: "]),
    "crnn.py": ([], ["1 of 1 recurrent layers", "one at a time: converted", "[batch, 1, 8, time]", "twelve digits"]),
    "finetune.py": ([], ["BatchNorm ", "gn, fresh ", "gn+ws, calibrated ", "wn+mobn "]),
    "finetune_small_batches.py": (
        ["--steps", "2", "--search-steps", "1", "--images", "40"],
        ["BatchNorm ", "naive gn ", "gn+ws, match "],
    ),
    "fold_and_run.py": ([], ["9 before folding, 0 after", "agree: ", "onnxruntime "]),
    "private_training.py": ([], ["gn+ws ", "wn ", "wn+mobn is refused"]),
    "rms_group_norm.py": ([], ["2 of 2 BatchNorms convert", "matched: ", "rms.onnx agree"]),
    "train_digits.py": (["--help"], ["--output"]),  # its training takes longer than all others together
}
"""Per example: its arguments, and what its output must hold."""

NEEDS = {"convert_timm.py": "timm", "private_training.py": "opacus"}


def run(name: str, folder: Path, *arguments: str, without: str | None = None) -> str:
    """Run an example in ``folder``, as if the package ``without`` were not installed, and return what it printed."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    if without is not None:  # None in sys.modules makes every later import of it fail
        code = (
            f"import runpy, sys; sys.modules[{without!r}] = None; runpy.run_path({command[1]!r}, run_name='__main__')"
        )
        command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr, done.stderr[-3000:]
    return done.stdout


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run() -> None:
    assert sorted(RUNS) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", sorted(RUNS))
def test_an_example_runs_and_says_what_it_did(name: str, tmp_path: Path) -> None:
    arguments, expected = RUNS[name]
    printed = run(name, tmp_path, *arguments)
    if printed.startswith("skipped: "):
        pytest.skip(printed.strip())
    for text in expected:
        assert text in printed
    assert list(tmp_path.iterdir()) == []  # what nobody asked for is not left behind


@pytest.mark.parametrize(("name", "package"), sorted(NEEDS.items()))
def test_an_example_whose_package_is_missing_says_so_and_stops(name: str, package: str, tmp_path: Path) -> None:
    printed = run(name, tmp_path, without=package)
    assert printed.startswith("skipped: ")
    assert f"pip install {package}" in printed
    assert len(printed.splitlines()) == 1


def test_fold_and_run_leaves_the_file_that_was_asked_for(tmp_path: Path) -> None:
    run("fold_and_run.py", tmp_path, "mine.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.onnx"]


def decayed(model: nn.Module) -> tuple[set[str], set[str]]:
    """Return the names with and without weight decay."""
    with_decay, without = load("finetune").parameter_groups(model, 0.1)
    assert (with_decay["weight_decay"], without["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in (with_decay, without)]
    assert groups[0] | groups[1] == set(names.values())
    assert sum(len(group["params"]) for group in (with_decay, without)) == len(names)
    return groups[0], groups[1]


@pytest.mark.parametrize(
    ("recipe", "weight", "others"),
    [
        ("gn", "weight", []),
        ("gn+ws", "parametrizations.weight.original0", ["original1"]),
        ("gn+aws", "parametrizations.weight.original0", ["original1", "original2"]),
        ("wn+mobn", "parametrizations.weight.original1", ["original0"]),
    ],
)
def test_weight_decay_is_for_the_directions_of_the_layers_weights_alone(
    recipe: str, weight: str, others: list[str]
) -> None:
    model = ns.swap_norms(load_network(), recipe, init="fresh")
    with_decay, without = decayed(model)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 9
    assert with_decay == {f"{name}.{weight}" for name in convolutions} | {"head.weight"}
    for name in convolutions:
        assert {f"{name}.parametrizations.weight.{other}" for other in others} <= without
    assert {"head.bias", "bn1.bias"} <= without


def test_weight_decay_tells_g_from_v_where_both_have_the_same_shape() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1, groups=4))
    originals = layer.parametrizations["weight"]
    assert originals.original0.shape == originals.original1.shape
    assert decayed(layer) == (
        {"parametrizations.weight.original1"},
        {"parametrizations.weight.original0", "bias"},
    )


def test_weight_decay_leaves_frozen_parameters_out() -> None:
    model = load_network()
    model.conv1.requires_grad_(False)
    groups = load("finetune").parameter_groups(model, 0.1)
    assert not any(p is model.conv1.weight for group in groups for p in group["params"])


def test_both_kinds_of_batches_are_what_they_are_called() -> None:
    finetune = load("finetune")
    labels = torch.arange(200) % 10
    for alike in (True, False):
        pairs = [labels[batch] for batch in finetune.batches(labels, alike=alike)]
        assert len(pairs) == finetune.STEPS
        assert all(len(pair) == 2 for pair in pairs)
        assert all(bool(pair[0] == pair[1]) for pair in pairs) == alike
