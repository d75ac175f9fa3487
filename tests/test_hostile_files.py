"""What the command line does with files and outputs that are hostile, broken or unfit.

Each case ends with one error that says what and where and what to do, the exit code that belongs to it, nothing run,
nothing written, and nothing replaced.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from torch import fx, nn
from typer.testing import CliRunner

from normswap.cli import app

REPOSITORY = Path(__file__).resolve().parent.parent

ARCHITECTURE = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8))
"""


def make_model() -> nn.Sequential:
    scope: dict[str, Any] = {}
    exec(ARCHITECTURE, scope)
    torch.manual_seed(0)
    model: nn.Sequential = scope["net"]()
    for _ in range(10):
        model(torch.randn(8, 3, 12, 12))
    return model.eval()


class Called:
    """Unpickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def with_nan(model: nn.Sequential) -> nn.Sequential:
    model[1].running_var[3] = float("nan")  # type: ignore[index]
    return model


def write_files() -> None:
    """Write the good files and the bad ones into the current directory."""
    model, state = make_model(), make_model().state_dict()
    Path("tiny.py").write_text(ARCHITECTURE, encoding="utf-8")
    torch.save(model, "model.pt")
    torch.save(Called(os.system, "touch it-ran"), "system.pt")
    torch.save({"model": model, "extra": Called(os.system, "touch it-ran")}, "system-beside.pt")
    torch.save(Called(nn.Linear, 2, 3), "constructor.pt")
    torch.save(fx.symbolic_trace(model), "graph.pt")
    torch.save(nn.ModuleDict({"inner": fx.symbolic_trace(model)}), "inner-graph.pt")
    torch.save(with_nan(make_model()), "nan.pt")
    whole = Path("model.pt").read_bytes()
    Path("truncated.pt").write_bytes(whole[: len(whole) // 2])
    save_file(state, "state.safetensors")
    Path("truncated.safetensors").write_bytes(Path("state.safetensors").read_bytes()[:-100])
    Path("text.pt").write_text("<html>404</html>", encoding="utf-8")
    Path("empty.pt").touch()
    Path("folder.pt").mkdir()
    torch.save({k: v for k, v in state.items() if k != "4.running_var"}, "missing.pt")
    torch.save({**state, "5.weight": torch.ones(2)}, "extra.pt")
    torch.save({**state, "0.weight": torch.ones(16, 1, 3, 3)}, "misshapen.pt")
    rng = np.random.default_rng(0)
    np.save("four-channels.npy", rng.normal(size=(8, 4, 12, 12)).astype("float32"))
    np.save("bytes.npy", np.zeros((8, 3, 12, 12), dtype="uint8"))
    np.save("doubles.npy", rng.normal(size=(8, 3, 12, 12)))
    np.save("nans.npy", np.full((8, 3, 12, 12), np.nan, dtype="float32"))
    np.save("objects.npy", np.array([Called(os.system, "touch it-ran")], dtype=object), allow_pickle=True)
    Path("kept.safetensors").write_bytes(b"kept")
    Path("kept.pt").write_bytes(b"kept")
    Path("kept.onnx").write_bytes(b"kept")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_files()
    return folder


@pytest.fixture
def folder(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the files' folder, which is the current directory."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def run(command: str) -> Result:
    return CliRunner().invoke(app, command.split())


def assert_refused(command: str, code: str, exit_code: int = 2) -> str:
    """Run ``command`` in the current directory and return its error, which must be the one of that code."""
    before = contents(Path())
    result = run(command)
    lines = result.stderr.splitlines()
    assert lines[0].startswith(f"error[{code}]: "), result.output
    assert lines[1].startswith("  hint: "), result.output
    assert len(lines) == 2, result.output
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert contents(Path()) == before
    return lines[0]


READERS = {
    "inspect": "inspect {0}",
    "convert": "convert {0} -o kept.safetensors",
    "fold": "fold {0} -o kept.pt",
    "export": "export {0} -o kept.onnx --input-shape 1x3x12x12",
    "verify": "verify model.pt {0} --input-shape 1x3x12x12",
}
MODELS = {
    "system.pt": "untrusted-global",
    "system-beside.pt": "untrusted-global",
    "constructor.pt": "pickle-unsafe",
    "graph.pt": "graph-module",
    "inner-graph.pt": "graph-module",
    "truncated.pt": "file-truncated",
    "truncated.safetensors": "file-truncated",
    "text.pt": "file-text",
    "empty.pt": "file-empty",
    "folder.pt": "file-is-directory",
    "none.pt": "file-missing",
    "nan.pt": "weights-not-finite",
    "state.safetensors": "arch-missing",
    "missing.pt --arch tiny:net": "state-dict-mismatch",
    "extra.pt --arch tiny:net": "state-dict-mismatch",
    "misshapen.pt --arch tiny:net": "state-dict-mismatch",
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("command", READERS)
def test_a_model_file_that_cannot_be_used_is_one_error(folder: Path, command: str, model: str) -> None:
    error = assert_refused(READERS[command].format(model), MODELS[model])
    assert model.split()[0] in error


@pytest.mark.parametrize("command", READERS)
def test_the_same_commands_take_the_sound_files(folder: Path, command: str) -> None:
    for model in ("model.pt", "state.safetensors --arch tiny:net"):
        result = run(READERS[command].format(model))
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "code"),
    {
        "--to gn+wz": "unknown-recipe",
        "--to gn --num-groups 3": "groups-do-not-divide",
        "--to gn --num-groups 0": "groups-do-not-divide",
        "--to gn --group-size 0": "group-options",
        "--to ln --num-groups 4": "unknown-option",
        "--calibration four-channels.npy": "inputs-do-not-fit",
        "--calibration bytes.npy": "inputs-do-not-fit",
        "--calibration doubles.npy": "inputs-do-not-fit",
        "--calibration nans.npy": "inputs-invalid",
        "--calibration objects.npy": "inputs-invalid",
        "--calibration none.npy": "file-missing",
        "--calibration text.pt": "file-text",
        "--input-file four-channels.npy": "inputs-do-not-fit",
        "--input-shape 1x3x1x1": "inputs-do-not-fit",
        "--plan text.pt": "plan-unreadable",
        "--trust none.py": "trust-invalid",
        "--trust os": "trust-unsafe",
    }.items(),
)
def test_an_argument_that_does_not_fit_is_one_error(folder: Path, arguments: str, code: str) -> None:
    assert_refused(f"convert model.pt {arguments} -o kept.safetensors", code)


@pytest.mark.parametrize(
    "output",
    ["no/out.safetensors", "folder.safetensors", "model.pt/out.safetensors", "x" * 400 + ".safetensors"],
    ids=["no_folder", "a_folder", "below_a_file", "a_long_name"],
)
def test_an_output_that_cannot_be_written_is_one_error(folder: Path, output: str) -> None:
    (folder / "folder.safetensors").mkdir()
    assert output in assert_refused(f"convert model.pt -o {output}", "output-path")


def test_an_output_that_is_a_link_stays_one_and_keeps_its_permissions(folder: Path) -> None:
    (folder / "link.pt").symlink_to("kept.pt")
    (folder / "kept.pt").chmod(0o640)
    assert run("fold model.pt -o link.pt").exit_code == 0
    assert (folder / "link.pt").is_symlink()
    assert (folder / "kept.pt").stat().st_mode & 0o777 == 0o640
    assert (folder / "kept.pt").read_bytes() != b"kept"
    (folder / "model-link.pt").symlink_to("model.pt")
    assert_refused("fold model.pt -o model-link.pt", "output-path")


def test_a_model_without_a_norm_converts_nothing_and_exits_with_3(folder: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(3, 2)), "plain.pt")
    assert_refused("convert plain.pt -o kept.safetensors", "nothing-to-convert", 3)


def test_two_models_that_differ_exit_with_1(folder: Path) -> None:
    other = make_model()
    other[0].weight.data[5] *= 1.01
    torch.save(other, "other.pt")
    assert run("verify model.pt model.pt --input-shape 2x3x12x12").exit_code == 0
    result = run("verify model.pt other.pt --input-shape 2x3x12x12")
    assert result.exit_code == 1
    assert result.stdout.startswith("model.pt and other.pt DIFFER: ")
    assert "error" not in result.stderr


FULL = """
    import json, os, subprocess, sys
    from pathlib import Path
    from typer.testing import CliRunner
    from normswap.cli import app
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", "full"], check=True)
    found = {}
    for name, command in json.loads(sys.argv[1]).items():
        path = Path("full", command.split()[-1].rpartition("/")[2])
        path.write_bytes(b"kept")
        result = CliRunner().invoke(app, command.split())
        left = {str(p): p.read_bytes() == b"kept" for p in Path("full").rglob("*")}
        found[name] = [result.exit_code, result.stdout, result.stderr, left == {str(path): True}]
        path.unlink()
    print(json.dumps(found))
"""


def test_a_full_disk_is_one_error_and_keeps_what_was_there(folder: Path) -> None:
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("a disk of 4 kB needs root or a user namespace (unshare -rm)")
    (folder / "full").mkdir()
    commands = {
        "convert": "convert model.pt -o full/m.safetensors",
        "convert --fold": "convert model.pt --fold -o full/m.pt",
        "fold": "fold model.pt -o full/m.pt",
        "export": "convert model.pt --to none --input-shape 1x3x12x12 --onnx full/m.onnx",
        "plan": "convert model.pt --dry-run --save-plan full/p.json",
    }
    found = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", textwrap.dedent(FULL), json.dumps(commands)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    for name, (exit_code, stdout, stderr, kept) in json.loads(found.stdout.splitlines()[-1]).items():
        path = commands[name].split()[-1]
        error, hint = stderr.splitlines()
        assert error.startswith(f"error[output-path]: cannot write '{path}': "), name
        assert "No space left on device" in error, name
        assert hint == "  hint: choose a folder with write access and enough space", name
        assert (exit_code, stdout, kept) == (2, "", True), name


STOPS = """
import glob, os, signal
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    def forward(self, x):
        return self.bn(self.conv(x))
    def __reduce_ex__(self, protocol):
        if glob.glob(".normswap-*/*"):
            os.kill(os.getpid(), signal.NAME)
        return super().__reduce_ex__(protocol)
"""


@pytest.mark.parametrize(
    ("name", "message", "exit_code"),
    [("SIGINT", "interrupted", 130), ("SIGTERM", "ended by a signal", 143), ("SIGHUP", "ended by a signal", 129)],
)
def test_an_interruption_while_writing_keeps_what_was_there(
    folder: Path, name: str, message: str, exit_code: int
) -> None:
    (folder / "stops.py").write_text(STOPS.replace("NAME", name), encoding="utf-8")
    save = "import __main__, stops, torch; __main__.Net = stops.Net; stops.Net.__module__ = '__main__'\n"
    save += "torch.save(stops.Net().eval(), 'net.pt')"
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(folder))), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", save], check=True, env=env)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    before = contents(folder)
    command = ["convert", "net.pt", "--trust", "stops.py", "--fold", "-o", "kept.pt"]
    result = subprocess.run([sys.executable, "-m", "normswap", *command], capture_output=True, text=True, env=env)
    assert (result.returncode, result.stdout, result.stderr) == (exit_code, "", f"{message}\n")
    assert contents(folder) == before
