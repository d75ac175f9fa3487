"""A user's project, checked by mypy --strict against the installed package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

PROJECT = """
from pathlib import Path

from torch import Tensor, nn

import normswap as ns
from normswap.options import Options


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y

    def classes(self) -> int:
        return 16


def deploy(images: Tensor, path: Path) -> ns.Verification | None:
    model = ns.swap_norms(Net(), to="gn+ws", calibration=images, num_groups=4, spread=3.0)
    assert model.classes() == 16  # the caller's own class
    result = ns.convert(Net(), "ln", example_inputs=(images,))
    net: Net = result.model
    plan: ns.Plan = result.plan
    untyped: ns.Conversion = ns.convert(net, plan=plan)
    costs: tuple[ns.SiteCost, ...] = ns.rank_sites(Net(), "ln", calibration=images)
    print(untyped, costs[0].error, Options(spread=1.0).init)
    folded = ns.fold_with_report(model.eval()).model
    ns.save(result.model, path)
    loaded: nn.Module = ns.load(path, model=Net())
    print(ns.initialize(loaded, images).notes)
    return ns.export_onnx(folded, path.with_suffix(".onnx"), example_inputs=(images,)).verification
"""


MISTAKES = {
    "a method that the class does not have": ("model.classes() == 16", "model.clases() == 16"),
    "another class": ("net: Net = result.model", "net: nn.Linear = result.model"),
    "a misspelt option": ("Options(spread=1.0)", "Options(spreed=1.0)"),
}


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What mypy says of the project, ``right.py``, and of one for each mistake: one run, as it reads torch's types."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "right.py").write_text(PROJECT, encoding="utf-8")
    for number, (right, wrong) in enumerate(MISTAKES.values()):
        assert right in PROJECT
        (folder / f"wrong{number}.py").write_text(PROJECT.replace(right, wrong), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(folder / "cache")]
    paths = {**os.environ, "MYPYPATH": str(REPOSITORY)}  # mypy does not follow the hook of an editable install
    files = sorted(path.name for path in folder.glob("*.py"))
    result = subprocess.run([*command, *files], cwd=folder, capture_output=True, text=True, check=False, env=paths)
    return (result.stdout + result.stderr).splitlines()


def test_a_users_project_passes_mypy_strict(complaints: list[str]) -> None:
    # Of an installed package mypy shows no errors; found by its path it is checked, too, by rules that are not its own.
    assert [line for line in complaints if line.startswith("right.py")] == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_it_is_found(mistake: str, complaints: list[str]) -> None:
    number = list(MISTAKES).index(mistake)
    assert any(line.startswith(f"wrong{number}.py:") and "error" in line for line in complaints)
