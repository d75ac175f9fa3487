"""``normswap migrate``: checkpoints in all their files, both ways, and what is refused; nothing of a file is run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner
from zoo import randomize_

import normswap as ns
from normswap.cli import app

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32)]
        return randomize_(nn.Sequential(*layers), seed + 1).eval()  # type: ignore[return-value]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for recipe in ("wn", "gn"):
        ns.save(ns.convert(net(), recipe).model, tmp_path / f"{recipe}.safetensors")
    torch.save(net(1).state_dict(), tmp_path / "later.pt")
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["migrate", *arguments])


def succeed(*arguments: str) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def far(found: nn.Module, expected: nn.Module) -> float:
    with torch.no_grad():
        a, b = found.eval()(X), expected.eval()(X)
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("wrapped", ["state", "checkpoint", "model", "data parallel", "safetensors"])
def test_checkpoints_of_all_kinds_go_there(folder: Path, wrapped: str) -> None:
    state, name = net(1).state_dict(), "later.pt"
    if wrapped == "checkpoint":
        torch.save({"epoch": 3, "model": state, "optimizer": {}}, name)
    elif wrapped == "model":
        torch.save(net(1), name)
    elif wrapped == "data parallel":
        torch.save({f"module.{key}": value for key, value in state.items()}, name)
    elif wrapped == "safetensors":
        save_file(state, name := "later.safetensors")
    shown = succeed(name, "--like", "wn.safetensors", "-o", "new.safetensors").stdout
    assert "the same, up to rounding" in shown
    assert far(ns.load("new.safetensors"), net(1)) < 1e-5
    assert far(ns.load("wn.safetensors"), net(1)) > 1e-2


def test_and_back(folder: Path) -> None:
    succeed("later.pt", "--like", "wn.safetensors", "-o", "new.safetensors")
    record = json.loads(succeed("new.safetensors", "--like", "wn.safetensors", "--json").stdout)
    assert (record["to"], record["exact"], record["written"]) == ("batchnorm", True, ["new.migrated.pt"])
    for name in ("new.migrated.pt", "back.safetensors"):
        if name.endswith("safetensors"):
            succeed("new.safetensors", "--like", "wn.safetensors", "-o", name)
        state: dict[str, Tensor] = load_file(name) if name.endswith("safetensors") else torch.load(name)
        back = net()
        back.load_state_dict(state)
        assert far(back, net(1)) < 1e-5


def test_an_inexact_recipe_is_said_to_be_and_a_plain_state_dict_is_written_on_request(folder: Path) -> None:
    result = succeed("later.pt", "--like", "gn.safetensors", "-o", "new.pt")
    assert "not the same" in result.stdout
    assert "without data" in result.stderr
    again = ns.load("gn.safetensors")
    again.load_state_dict(torch.load("new.pt"))
    assert far(again, ns.swap_norms(net(1), "gn")) < 1e-5
    assert "error[inexact-recipe]" in run("gn.safetensors", "--like", "gn.safetensors").stderr


def test_no_file_that_is_read_is_written_over(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("later.pt", "wn.safetensors"):
        assert "it is what is read" in run("later.pt", "--like", "wn.safetensors", "-o", name).stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    succeed("later.pt", "--like", "wn.safetensors", "-o", "gn.safetensors")  # the negative control: it is not read


class Called:
    """Unpickles as a call."""

    def __reduce__(self) -> object:
        return os.system, ("touch run",)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("later.pt", "--like", "later.pt"), "storage-foreign"),
        (("later.pt", "--like", "nothing.safetensors"), "file-missing"),
        (("nothing.pt", "--like", "wn.safetensors"), "file-missing"),
        (("hostile.pt", "--like", "wn.safetensors"), "untrusted-global"),
        (("other.pt", "--like", "wn.safetensors"), "state-dict-mismatch"),
        (("text.pt", "--like", "wn.safetensors"), "file-text"),
        (("later.pt", "--like", "wn.safetensors", "-o", "new.onnx"), "output-kind"),
        (("later.pt", "--like", "wn.safetensors", "-o", "later.pt"), "output-path"),
        (("later.pt", "--like", "wn.safetensors", "-o", "wn.safetensors"), "output-path"),
    ],
)
def test_what_does_not_fit_is_one_error_and_writes_nothing(folder: Path, arguments: tuple[str, ...], code: str) -> None:
    torch.save({"0.weight": Called()}, "hostile.pt")
    torch.save(nn.Linear(3, 2).state_dict(), "other.pt")
    Path("text.pt").write_text("no model", encoding="utf-8")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.count("error[") == 1
    assert "hint:" in result.stderr
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert f"error[{code}]" in result.stderr
