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


def test_both_kinds_of_batches_are_what_they_are_called() -> None:
    finetune = load("finetune")
    labels = torch.arange(200) % 10
    for alike in (True, False):
        pairs = [labels[batch] for batch in finetune.batches(labels, alike=alike)]
        assert len(pairs) == finetune.STEPS
        assert all(len(pair) == 2 for pair in pairs)
        assert all(bool(pair[0] == pair[1]) for pair in pairs) == alike
