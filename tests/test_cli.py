"""The command line: every command, its exit codes, its output on a terminal, in a pipe and as JSON, and its files."""

from __future__ import annotations

import ast
import fcntl
import inspect
import json
import logging
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import types
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import typer
from click.testing import Result
from onnx import TensorProto, helper
from torch import Tensor, nn
from typer.testing import CliRunner

import normswap as ns
from normswap import errors, options
from normswap.cli import app, boundary, console, converting, deploying, flags, reporting
from normswap.cli.flags import DataFlags, InputFlags
from normswap.cli.inputs import calibration_data, example_inputs
from normswap.cli.protecting import FilesRead
from normswap.cli.spelling import BY_OPTION, FLAGS, PYTHON_ONLY, flag_of, spell
from normswap.cli.values import read_recipe_options, read_shapes
from normswap.deploy.folding import FoldRow
from normswap.errors import InputError, Text, argument, function
from normswap.loading import load_model
from normswap.loading.architectures import build
from normswap.options import Flag, Options
from normswap.recipes import Auto, all_recipes
from normswap.storage.writing import staged

REPOSITORY = Path(__file__).resolve().parent.parent
MODULE = [sys.executable, "-m", "normswap"]
ANSI = "\x1b["

SCRIPT = """
import torch
from torch import nn
print("a script may print")
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)
    def forward(self, x):
        return self.bn(self.conv(x))
if __name__ == "__main__":
    torch.save(Net().eval(), "net.pt")
"""


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    for _ in range(20):
        model(torch.randn(8, 3, 12, 12))
    return model.eval()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a trained model, one without norms, and a broken file; it is only copied."""
    folder = tmp_path_factory.mktemp("models")
    torch.save(make_model(), folder / "model.pt")
    torch.save(nn.Sequential(nn.Linear(3, 2)), folder / "plain.pt")
    (folder / "text.pt").write_text("no model", encoding="utf-8")
    (folder / "save.py").write_text(SCRIPT, encoding="utf-8")
    subprocess.run(
        [sys.executable, "save.py"],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the models' folder, which is the current directory."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def succeed(*arguments: str) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def environment(**changes: str) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM")}
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return {**plain, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changes}


def run_on_terminal(width: int, *arguments: str, **changes: str) -> str:
    """Return what the command shows on a terminal of ``width`` columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    env = environment(TERM="xterm-256color", **changes)
    process = subprocess.Popen([*MODULE, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # Linux says EIO where the other side is closed
        pass
    finally:
        os.close(ours)
    assert process.wait() == 0, shown
    return shown.decode()


def visible(shown: str) -> list[str]:
    """Return the lines without control sequences, as they stand once everything is printed."""
    return [
        re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).split("\r")[-1] for line in shown.replace("\r\n", "\n").split("\n")
    ]


# The commands


def test_the_examples_in_the_help_texts_work_one_after_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = {command.name: command for command in app.registered_commands}
    shown = [
        app.info.epilog,
        *(commands[n].epilog for n in ("inspect", "convert", "fold", "export", "migrate", "verify", "recipes")),
    ]
    assert set(commands) == {"inspect", "convert", "fold", "export", "migrate", "verify", "recipes", "demo"}
    torch.save(make_model().state_dict(), "later.pt")
    np.save("images.npy", np.random.default_rng(0).standard_normal((40, 3, 12, 12)).astype("float32"))
    (folder / "train.py").write_text(SCRIPT, encoding="utf-8")
    torch.save(build("torchvision:resnet18", {}).state_dict(), "weights.pt")
    for epilog in shown:
        for line in epilog.split("\n\n"):
            program, *arguments = shlex.split(line.removeprefix("Example:"))
            assert program == "normswap"
            succeed(*arguments)


def test_every_command_and_option_is_described() -> None:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        assert command.help, name
        assert f"Example:  normswap {name}" in command.epilog
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"


def test_version_and_the_python_module_agree() -> None:
    assert succeed("--version").stdout == f"normswap {ns.__version__}\n"


def test_inspect_names_every_norm_layer_and_reason(folder: Path) -> None:
    result = succeed("inspect", "model.pt")
    assert result.stdout.splitlines()[0] == "Sequential: 5,498 parameters, 2 BatchNorm sites"
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["1", "BatchNorm2d", "16", "0", "Conv2d", "proven"] in rows
    assert ["4", "BatchNorm2d", "32", "3", "Conv2d", "proven"] in rows
    assert "8" in [row[0] for row in rows if row[1:3] == ["layer", "Linear"]]


def test_inspect_with_a_recipe_prints_its_plan(folder: Path) -> None:
    result = succeed("inspect", "model.pt", "--to", "ln")
    assert "GroupNorm, 1 group of 32" in result.stdout
    assert result.stdout.splitlines()[-1] == "2 of 2 BatchNorms convert, 2 together with their layer"


def test_convert_stores_a_model_that_computes_what_the_api_gives(folder: Path) -> None:
    result = succeed("convert", "model.pt", "--to", "wn+mobn", "-o", "out.safetensors")
    lines = result.stdout.splitlines()
    assert lines[:2] == ["Sequential → wn+mobn", "  converted  2 of 2 BatchNorms, 2 together with their layer"]
    assert re.fullmatch(r"  wrote      out.safetensors \([\d.]+ kB\)", lines[-1])
    assert run("verify", "model.pt", "out.safetensors").exit_code == 0
    assert run("verify", "model.pt", "out.safetensors", "--rtol", "0").exit_code == 1  # rounding, which is seen


def test_convert_without_an_output_writes_beside_the_model_and_says_so(folder: Path) -> None:
    result = succeed("convert", "model.pt")
    assert (folder / "model.gn+ws.safetensors").is_file()
    first, second = result.stderr.splitlines()
    assert first == "note: no -o was given: the output stands beside the model"
    assert second.startswith("note: gn+ws without --calibration: measure how much accuracy is left")
    assert "wrote      model.gn+ws.safetensors" in result.stdout
    assert "noted      no data was given" in result.stdout
    assert "(--calibration)" in result.stdout


def test_convert_fold_writes_a_whole_plain_model(folder: Path) -> None:
    succeed("convert", "model.pt", "--to", "wn", "--fold", "-o", "out.pt")
    folded = load_model(folder / "out.pt")
    assert {type(m).__module__.split(".")[0] for m in folded.modules()} == {"torch"}
    x = torch.randn(2, 3, 12, 12)
    assert ns.verify(make_model(), folded, x).ok


def test_convert_onnx_alone_writes_only_the_onnx_file(folder: Path) -> None:
    before = set(contents(folder))
    result = succeed("convert", "model.pt", "--to", "ln", "--onnx", "net.onnx", "--input-shape", "2x3x12x12")
    assert set(contents(folder)) - before == {"net.onnx"}
    assert "net.onnx (opset 18)" in result.stdout
    assert "verified   the ONNX file against the converted model: outputs differ by" in result.stdout
    assert result.stderr.startswith("note: ln without --calibration: ")
    assert len(result.stderr.splitlines()) == 1  # and no word of an output beside the model


def test_convert_takes_a_recipes_options_by_either_spelling(folder: Path) -> None:
    plan = json.loads(succeed("convert", "model.pt", "--to", "gn", "--num-groups", "2", "--dry-run", "--json").stdout)
    assert [step["num_groups"] for step in plan["steps"]] == [2, 2]
    plan = json.loads(
        succeed("convert", "model.pt", "--to", "gn+ws", "--option", "gain=false", "--dry-run", "--json").stdout
    )
    assert plan["options"] == {"gain": False}
    plan = json.loads(
        succeed("convert", "model.pt", "--to", "ln", "--option", "axes=channel", "--dry-run", "--json").stdout
    )
    assert plan["options"] == {"axes": "channel"}


def test_include_and_exclude_choose_norms(folder: Path) -> None:
    for choice in (["--include", "4"], ["--exclude", "1"]):
        plan = json.loads(succeed("convert", "model.pt", *choice, "--dry-run", "--json").stdout)
        assert [step["site"]["norm"] for step in plan["steps"]] == ["4"]


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        ("--at *=stays", "stays"),
        ("--at *=gn", "gn"),
        ("--at 1=ln --at *=gn", "per-site (1: ln, *: gn)"),
        ("--at 1=stays --at *=gn", "per-site (1: stays, *: gn)"),
        ("--at 1=ln --to wn", "per-site (1: ln, *: wn)"),
        ("--at 1=ln", "per-site (1: ln, *: gn+ws)"),
    ],
)
def test_the_pattern_of_all_norms_stands_for_the_rest(folder: Path, arguments: str, recipe: str) -> None:
    for command in (["convert", "model.pt", "--dry-run"], ["inspect", "model.pt"]):
        assert run(*command, *arguments.split()).stdout.startswith(f"Sequential → {recipe}\n")
        if "*" in arguments:
            both = run(*command, *arguments.split(), "--to", "wn")
            assert (both.exit_code, both.stdout) == (2, "")
            assert "--to wn and --at '*=" in both.stderr


def test_a_dry_run_writes_nothing_but_the_plan_it_is_asked_for(folder: Path) -> None:
    before = contents(folder)
    succeed("convert", "model.pt", "-o", "out.safetensors", "--onnx", "out.onnx", "--dry-run")
    assert contents(folder) == before
    result = succeed("convert", "model.pt", "--dry-run", "--save-plan", "plan.json", "--json")
    assert set(contents(folder)) - set(before) == {"plan.json"}
    assert (folder / "plan.json").read_text(encoding="utf-8") == result.stdout


def test_a_dry_run_says_that_calibration_chooses_the_groups(folder: Path) -> None:
    chosen = ("convert", "model.pt", "--dry-run", "--json", "--num-groups")
    result = succeed(*chosen, "auto", "--save-plan", "auto.json")
    assert json.loads(result.stdout)["options"] == {"num_groups": "auto"}
    assert "the groups are chosen during the fit, by --calibration" in result.stderr
    assert succeed(*chosen, "4").stderr == ""
    assert succeed("convert", "model.pt", "--dry-run", "--plan", "auto.json").stderr == ""  # it keeps the plan's


def test_a_saved_plan_is_carried_out(folder: Path) -> None:
    succeed(
        "convert", "model.pt", "--to", "gn", "--num-groups", "2", "--include", "4", "--dry-run", "--save-plan", "p.json"
    )
    result = succeed("convert", "model.pt", "--plan", "p.json", "-o", "out.safetensors", "--json")
    assert json.loads(result.stdout)["plan"] == json.loads((folder / "p.json").read_text(encoding="utf-8"))


def test_calibration_is_read_in_batches_without_its_labels(folder: Path) -> None:
    np.savez("data.npz", np.random.default_rng(0).normal(size=(10, 3, 12, 12)).astype("float32"), np.arange(10))
    result = succeed("convert", "model.pt", "--calibration", "data.npz", "--batch-size", "4", "-o", "out.safetensors")
    assert "noted      of each batch's 2 entries the first was used" in result.stdout
    batches = calibration_data(make_model(), DataFlags(Path("data.npz"), batch_size=4), InputFlags())
    assert batches is not None
    assert [len(x) for x, _ in batches] == [4, 4, 2]


def test_fold_and_export_make_a_file_that_verify_accepts(folder: Path) -> None:
    succeed("convert", "model.pt", "-o", "m.safetensors")
    result = succeed("fold", "m.safetensors", "-o", "m.pt", "--input-shape", "1x3x12x12")
    assert "folded   2 weights made plain" in result.stdout
    succeed("export", "m.pt", "-o", "m.onnx", "--input-shape", "1x3x12x12", "--dynamic-spatial")
    result = succeed("verify", "m.safetensors", "m.onnx", "--input-shape", "5x3x17x12")
    assert result.stdout.startswith("m.safetensors and m.onnx agree: ")


def test_a_folded_program_needs_no_class(folder: Path) -> None:
    for name in ("folded.pt", "folded.pt2"):
        succeed("fold", "net.pt", "--trust", "save.py", "-o", name, "--input-shape", "2x3x8x8")
    assert load_model(folder / "folded.pt2")(torch.zeros(2, 3, 8, 8)).shape == (2, 32, 6, 6)
    with pytest.raises(InputError, match="Net"):
        load_model(folder / "folded.pt")


def test_fold_says_which_modules_need_normswap_to_be_loaded(folder: Path) -> None:
    succeed("convert", "model.pt", "--to", "ln", "--option", "axes=channel", "-o", "m.safetensors")
    shown = succeed("fold", "m.safetensors", "-o", "m.pt").stdout
    assert re.search(
        r"needs +normswap, to be loaded: 2 modules \(1, 4\) of its own; a \.pt2 program needs no class", shown
    )
    assert "normswap" in pickled(folder / "m.pt")
    program = succeed("fold", "m.safetensors", "-o", "m.pt2", "--input-shape", "2x3x12x12", "--json").stdout
    assert json.loads(program)["needs_normswap"] == []
    told = succeed("convert", "model.pt", "--to", "ln", "--option", "axes=channel", "--fold", "-o", "f.pt").stderr
    assert "note: f.pt needs normswap, to be loaded: 2 modules (1, 4)" in told
    succeed("convert", "model.pt", "--to", "gn+ws", "-o", "g.safetensors")  # the negative control
    shown = succeed("fold", "g.safetensors", "-o", "g.pt").stdout
    assert "needs" not in shown
    assert "normswap" not in pickled(folder / "g.pt")


def pickled(path: Path) -> str:
    """Return what a file by torch.save names, as text."""
    with zipfile.ZipFile(path) as file:
        return file.read(next(n for n in file.namelist() if n.endswith("data.pkl"))).decode("latin-1")


@pytest.mark.parametrize(
    ("results", "text"),
    [
        ([], "nothing: its weights were plain"),
        (["a plain weight"], "1 weight made plain"),
        (["a plain weight"] * 2 + ["part of a", "part of b"], "2 weights made plain, 2 modules made part of a layer"),
        (["a depthwise 1×1 Conv2d"], "1 module made a depthwise 1×1 Conv2d"),
    ],
)
def test_what_was_folded_is_counted(results: list[str], text: str) -> None:
    assert deploying._what_became([FoldRow("", result) for result in results]) == text


def test_verify_tells_two_different_models_apart(folder: Path) -> None:
    other = make_model()
    other[-1].bias.data[3] += 0.1  # type: ignore[union-attr]
    torch.save(other, "other.pt")
    assert run("verify", "model.pt", "model.pt").exit_code == 0
    result = run("verify", "model.pt", "other.pt")
    assert result.exit_code == 1
    assert result.stdout.startswith("model.pt and other.pt DIFFER: ")
    assert json.loads(run("verify", "model.pt", "other.pt", "--json").stdout)["ok"] is False
    assert run("verify", "model.pt", "other.pt", "--rtol", "1").exit_code == 0


def onnx_file(name: str, *sizes: int | str) -> None:
    """Write an ONNX file whose input and output have these sizes."""
    spec = [helper.make_tensor_value_info(n, TensorProto.FLOAT, sizes) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", spec[:1], spec[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), name)


def test_verify_takes_noise_of_the_sizes_that_an_onnx_file_states(folder: Path) -> None:
    onnx_file("stated.onnx", "N", 3, 7)
    onnx_file("open.onnx", "N", 3, "width")
    for pair in (("stated.onnx", "stated.onnx"), ("open.onnx", "stated.onnx")):
        result = succeed("verify", *pair, "--json")
        assert [row["shape"] for row in json.loads(result.stdout)["rows"]] == [[2, 3, 7]]
        assert result.stderr == ""
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 81, 2)).eval(), "odd.pt")
    succeed("export", "odd.pt", "-o", "odd.onnx", "--input-shape", "1x3x11x11")
    assert "made up" not in succeed("verify", "odd.pt", "odd.onnx").stderr
    torch.export.save(torch.export.export(make_model(), (torch.zeros(4, 3, 12, 12),)), "four.pt2")
    succeed("export", "model.pt", "-o", "any.onnx", "--input-shape", "1x3x12x12")
    succeed("verify", "four.pt2", "any.onnx")  # the program's own inputs are of four samples
    result = run("verify", "open.onnx", "open.onnx")  # neither says how wide
    assert (result.exit_code, result.stderr) == (
        2,
        "error[inputs-missing]: no inputs are given, and none could be made up that the model takes\n"
        "  hint: give --input-shape 1x3x224x224, once for each input, or --input-file FILE\n",
    )


def test_verify_says_what_an_inexact_recipe_does(folder: Path) -> None:
    succeed("convert", "model.pt", "--to", "ln", "-o", "ln.safetensors")
    result = run("verify", "model.pt", "ln.safetensors")
    assert result.exit_code == 1
    assert "note: only exact recipes (mobn, none, streaming, wn, wn+mobn) keep a model's output" in result.stderr


EMPTY = """
from torch import nn
class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)
    def forward(self, images):
        found = self.bn(self.conv(images[0])).mean((1, 2, 3))
        return found[found > 1e9]
"""


def test_outputs_without_a_value_are_told_and_prove_nothing(folder: Path) -> None:
    (folder / "detector.py").write_text(EMPTY, encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "detector"}
    exec(EMPTY, namespace)
    sys.modules["detector"] = types.ModuleType("detector")
    vars(sys.modules["detector"]).update(namespace)
    torch.save(namespace["Detector"]().eval(), "detector.pt")
    torch.save(([torch.randn(1, 3, 8, 8)],), "images.pt")
    options = ["--trust", "detector", "--input-file", "images.pt"]
    result = succeed("convert", "detector.pt", *options, "--to", "wn+mobn", "-o", "out.safetensors")
    assert "checked    not compared: give inputs on which the model returns something" in result.stdout
    result = run("verify", "detector.pt", "out.safetensors", *options)
    assert result.exit_code == 1
    assert result.stdout.startswith(
        "detector.pt and out.safetensors prove nothing: all outputs are empty: nothing was compared\n"
    )
    assert "exact recipes" not in result.stderr
    result = run("convert", "detector.pt", "--trust", "detector", "--input-shape", "3x8x8")
    assert "a list of images is given by --input-file" in result.stderr
    del sys.modules["detector"]


def test_recipes_lists_every_recipe_with_its_options(folder: Path) -> None:
    listed = json.loads(succeed("recipes", "--json").stdout)
    assert {r["name"]: r["exact"] for r in listed} == {name: cls.exact for name, cls in ns.all_recipes().items()}
    text = succeed("recipes").stdout
    assert all(r["equation"] in text and r["paper"] in text for r in listed)
    told = re.split(r"[\s,.:]+", succeed("recipes", "--help").stdout.partition("An exact recipe")[0])
    assert {r["name"] for r in listed} <= set(told)  # the help says what each takes from the data


def test_demo_prints_the_report_and_fails_where_a_file_differs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = pytest.importorskip("normswap.demo.report")
    used: list[Path] = []

    class Record:
        ok = True

        def __str__(self) -> str:
            return "a report"

        def to_json(self) -> str:
            return '{"rows": []}'

    def run_demo(output: Path) -> Record:
        used.append(output)
        return Record()

    monkeypatch.setattr(report, "run_demo", run_demo)
    assert succeed("demo").stdout == "a report\n"
    assert json.loads(succeed("demo", "--output", "results", "--json").stdout) == {"rows": []}
    assert used == [Path("normswap-demo"), Path("results")]
    monkeypatch.setattr(Record, "ok", False)
    assert run("demo").exit_code == 1


def test_a_model_of_a_script_comes_back_as_one_of_main(folder: Path) -> None:
    succeed("convert", "net.pt", "--trust", "save.py", "--to", "wn", "--fold", "-o", "folded.pt")
    assert not hasattr(sys.modules["__main__"], "Net")
    assert type(load_model(folder / "folded.pt", trust=["save.py"])).__name__ == "Net"
    script = "import torch; from save import Net; import __main__; __main__.Net = Net\n"
    script += "print(type(torch.load('folded.pt', weights_only=False)).__name__)"
    loaded = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=environment(PYTHONPATH=str(folder)),
    )
    assert loaded.stdout.splitlines()[-1] == "Net"


def test_a_state_dict_needs_its_architecture_and_takes_its_arguments(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "from torch import nn\ndef net(width): return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))\n",
        encoding="utf-8",
    )
    torch.save(nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)).state_dict(), "state.pt")
    assert "error[arch-missing]" in run("inspect", "state.pt").stderr
    for text in ("width=32", '{"width": 32}'):
        assert (
            "2 BatchNorm sites"
            not in succeed("inspect", "state.pt", "--arch", "mine:net", "--arch-kwargs", text).stdout
        )
    succeed("verify", "state.pt", "state.pt", "--arch", "mine:net", "--arch-kwargs", "width=32")


# Errors


@pytest.mark.parametrize(
    ("arguments", "exit_code", "text"),
    [
        (
            "convert model.pt --to gn+wz",
            2,
            f"error[unknown-recipe]: there is no recipe 'gn+wz'\n  hint: choose from {', '.join(ns.all_recipes())}\n",
        ),
        (
            "convert plain.pt",
            3,
            "error[nothing-to-convert]: no norm of the Sequential can be converted by 'gn+ws'\n"
            "  hint: the model has no BatchNorm\n",
        ),
        (
            "convert plain.pt --dry-run",
            3,
            "error[nothing-to-convert]: no norm of the Sequential can be converted by 'gn+ws'\n"
            "  hint: the table above has the reasons\n",
        ),
        (
            "convert model.pt -o out.pt",
            2,
            "error[output-kind]: a converted model, which may be trained on, is not written to .pt (out.pt)\n"
            "  hint: add --fold for plain weights in a .pt, or write out.safetensors\n",
        ),
        (
            "convert model.pt --fold -o out.safetensors",
            2,
            "error[output-kind]: a folded model is not written to .safetensors (out.safetensors)\n"
            "  hint: a folded model is a plain module: write out.pt, or leave --fold out\n",
        ),
        (
            "convert model.pt -o no/out.safetensors",
            2,
            "error[output-path]: cannot write 'no/out.safetensors': there is no folder 'no'\n"
            "  hint: choose another output\n",
        ),
        (
            "fold model.pt -o model.pt",
            2,
            "error[output-path]: cannot write 'model.pt': it is what is read\n  hint: choose another output\n",
        ),
        (
            "convert model.pt --input-shape 1x3xa",
            2,
            "error[input-shape]: --input-shape '1x3xa' is not a shape\n  hint: write --input-shape 1x3x224x224\n",
        ),
        (
            "convert model.pt --option gain=perhaps",
            2,
            "error[option-value]: --option gain=perhaps does not fit\n  hint: give true or false\n",
        ),
        (
            "convert model.pt --to ln --num-groups 2",
            2,
            "error[unknown-option]: there is no option 'num_groups'\n"
            "  hint: the recipe's options are axes, eps; those of every conversion include, exclude, init, scale, "
            "spread, tune_steps, recurrent, check, inplace, processes\n",
        ),
        (
            "inspect text.pt",
            2,
            "error[file-text]: 'text.pt' is a text file\n"
            "  hint: give the checkpoint; a download may have saved a web page instead\n",
        ),
        (
            "convert model.pt --plan save.py",
            2,
            "error[plan-unreadable]: not a plan: JSONDecodeError: Expecting value: line 2 column 1 (char 1)\n"
            "  hint: give the JSON that Plan.to_json() or 'normswap convert --dry-run --json' wrote\n",
        ),
        (
            "convert model.pt --plan none.json",
            2,
            "error[file-unreadable]: cannot read 'none.json': No such file or directory\n  hint: check the path\n",
        ),
        (
            "convert model.pt --arch-kwargs width",
            2,
            "error[arch-kwargs]: --arch-kwargs 'width' cannot be read: 'width' is not NAME=VALUE\n"
            """  hint: write --arch-kwargs num_classes=10 or --arch-kwargs '{"num_classes": 10}'\n""",
        ),
        (
            "verify a.onnx b.onnx",
            2,
            "error[onnx-missing]: there is no file a.onnx\n  hint: check the path; it ends with .onnx\n",
        ),
        (
            "export model.pt -o out.onnx --input-shape 1x4x12x12",
            2,
            "error[inputs-do-not-fit]: Sequential fails on the inputs of --input-shape: RuntimeError: "
            "Given groups=1, weight of size [16, 3, 3, 3], "
            "expected input[1, 4, 12, 12] to have 3 channels, but got 4 channels instead\n"
            "  hint: forward takes (input); a list of images is given by --input-file FILE, written by "
            "torch.save(([image, image],), FILE)\n",
        ),
    ],
)
def test_an_error_is_one_message_with_its_exit_code_and_writes_nothing(
    folder: Path, arguments: str, exit_code: int, text: str
) -> None:
    before = contents(folder)
    result = run(*arguments.split())
    assert (result.exit_code, result.stderr) == (exit_code, text)
    assert contents(folder) == before


@pytest.mark.parametrize("arguments", [["convert"], ["conver", "model.pt"], ["convert", "model.pt", "--two", "gn"], []])
def test_wrong_usage_exits_with_2(folder: Path, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: normswap" in result.output


def test_images_that_were_not_prepared_are_explained(folder: Path) -> None:
    np.save("images.npy", np.zeros((4, 12, 12, 3), dtype="uint8"))
    for option in ("--calibration", "--input-file"):
        result = run("convert", "model.pt", option, "images.npy")
        assert result.exit_code == 2
        assert f"error[inputs-do-not-fit]: Sequential fails on the inputs of {option}" in result.stderr
        assert "images are not scaled on loading" in result.stderr


@pytest.mark.parametrize("text", ["Couldn't load custom C++ ops.", "operator torchvision::nms does not exist", "other"])
def test_a_detector_without_torchvisions_operators_is_explained(text: str) -> None:
    class Detects(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError(text)

    with pytest.raises(InputError) as caught:
        example_inputs(Detects(), InputFlags(["1x3x8x8"]))
    assert ("install the torchvision" in caught.value.hint) == (text != "other")
    assert ("forward takes (x" in caught.value.hint) == (text == "other")


def test_data_with_names_that_the_model_has_not_is_refused_with_the_one_it_takes(folder: Path) -> None:
    images = np.zeros((4, 3, 12, 12), dtype="float32")
    np.savez("data.npz", images=images, labels=np.arange(4))
    result = run("convert", "model.pt", "--calibration", "data.npz")
    assert (result.exit_code, result.stderr) == (
        2,
        "error[inputs-names]: the data has entries 'images', 'labels'; forward takes 'input'\n"
        "  hint: name the one with the inputs 'input', or give it alone, as one tensor or array\n",
    )
    np.savez("data.npz", input=images, labels=np.arange(4))  # what the hint asks for
    assert calibration_data(make_model(), DataFlags(Path("data.npz"), batch_size=4), InputFlags()) is not None


def test_both_kinds_of_inputs_at_once_are_refused(folder: Path) -> None:
    np.save("x.npy", np.zeros((1, 3, 12, 12), dtype="float32"))
    result = run("export", "model.pt", "--input-file", "x.npy", "--input-shape", "1x3x12x12")
    assert (result.exit_code, result.stderr.splitlines()[0]) == (
        2,
        "error[inputs-twice]: --input-shape and --input-file are both given",
    )


def test_a_plan_beside_other_choices_is_refused(folder: Path) -> None:
    succeed("convert", "model.pt", "--dry-run", "--save-plan", "p.json")
    assert "error[plan-options]" in run("convert", "model.pt", "--plan", "p.json", "--to", "ln").stderr
    assert "error[plan-" in run("convert", "net.pt", "--trust", "save.py", "--plan", "p.json").stderr


def test_an_unexpected_exception_is_one_line_and_a_traceback_on_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("seven\nby nought")

    monkeypatch.setattr(ns, "convert", fail, raising=False)
    result = run("convert", "model.pt")
    assert (result.exit_code, result.stderr) == (
        2,
        "error[unexpected]: ZeroDivisionError: seven\n"
        "  hint: report this, with the traceback that `normswap --debug …` shows\n",
    )
    result = run("--debug", "convert", "model.pt")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1] == "error[unexpected]: ZeroDivisionError: seven"


# Words: what messages name, and the flags that come from options


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"pass {argument('dynamic_batch', False)}", "pass --no-dynamic-batch"),
        (f"give {argument('calibration')}", "give --calibration"),
        (f"{argument('num_groups', 'auto')}, {errors.parameter('group_size')}", "--num-groups auto, --group-size"),
        (f"give {argument('trust', ['a', 'b.py'])}", "give --trust a --trust b.py"),
        (f"give {argument('example_inputs')}", "give --input-shape or --input-file"),
        (f"give {argument('inplace', True)}", "give inplace=True in Python"),
        (f"{argument('leave', 2)}, {errors.parameter('max_error')}", "--option leave=2, --option max_error"),
        (f"first: {function('fold')}", "first: normswap fold MODEL"),
    ],
)
def test_a_message_names_arguments_as_the_command_line_does(text: str, shown: str) -> None:
    assert spell(text) == spell(Text(text)) == shown


def named_terms(source: str) -> list[tuple[str, bool]]:
    """Return the arguments that texts in ``source`` name, each with whether something renders the text."""
    found: list[tuple[str, bool]] = []

    def walk(node: ast.AST, rendered: bool) -> None:
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ("argument", "parameter") and isinstance(node.args[0], ast.Constant):
                found.append((node.args[0].value, rendered))
            rendered = rendered or name.endswith("Error") or name in ("Text", "option", "Flag")
        for child in ast.iter_child_nodes(node):
            walk(child, rendered)

    walk(ast.parse(source), False)
    return found


# Here texts are put together from parts, and all of them end in errors, which render them.
IN_PARTS = {"refusals.py", "trials.py", "entries.py", "gaps.py", "graph/__init__.py"}


def test_every_text_that_names_arguments_is_rendered() -> None:
    loose = {
        str(path.relative_to(REPOSITORY / "normswap"))
        for path in (REPOSITORY / "normswap").rglob("*.py")
        if not all(rendered for _, rendered in named_terms(path.read_text("utf-8")))
    }
    assert {path for path in loose if not path.endswith(tuple(IN_PARTS))} == set()
    assert named_terms("hint = f'give {argument(\"a\")}'") == [("a", False)]  # the negative controls
    assert named_terms("InputError('b', hint=f'give {argument(\"a\")}')") == [("a", True)]


def test_every_argument_that_a_message_names_is_a_flag_of_some_command() -> None:
    group: Any = typer.main.get_command(app)
    known = {
        flag for command in group.commands.values() for p in command.params for flag in (*p.opts, *p.secondary_opts)
    }
    named = {
        name for path in (REPOSITORY / "normswap").rglob("*.py") for name, _ in named_terms(path.read_text("utf-8"))
    }
    assert {"calibration", "example_inputs", "init", "trust", "num_groups"} <= named  # they are found
    assert {flag for name in named - PYTHON_ONLY - BY_OPTION for flag in flag_of(name).split(" or ")} <= known
    assert not [name for name in PYTHON_ONLY | BY_OPTION if f"--{name.replace('_', '-')}" in known]
    assert {f.name for kind in (Auto, *all_recipes().values()) for f in fields(kind)} >= BY_OPTION
    assert {flag for flags in FLAGS.values() for flag in flags.split(" or ")} <= known
    assert flag_of("calibratoin") not in known  # the negative control


def test_a_new_option_is_a_flag_with_help_that_reaches_convert(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class More(Options):
        warmth: float = options.option(0.5, "How warm the norms are", minimum=0.25, flag=Flag(metavar="X"))
        cool: bool = options.option(True, "Cool them afterwards")
        places: tuple[str, ...] = options.option((), "Where it is warm", flag=Flag(metavar="GLOB"))
        hidden: int = options.option(3, "Only in Python", flag=Flag(commands=()))

    reached: list[dict[str, Any]] = []

    def convert(*_: Any, **given: Any) -> None:
        reached.append(given)
        raise InputError("far enough", code="stop")

    monkeypatch.setattr(flags, "Options", More)
    monkeypatch.setattr(ns, "convert", convert, raising=False)
    fresh = typer.Typer(cls=boundary.ErrorBoundary, rich_markup_mode=None)
    fresh.callback()(lambda debug=False: None)
    fresh.command("convert")(flags.flattened("convert")(converting.convert_model.__wrapped__))
    shown = " ".join(CliRunner().invoke(fresh, ["convert", "--help"]).output.split())
    assert re.search(r"--warmth X how warm the norms are \(0\.5\)", shown)
    assert "--cool / --no-cool cool them afterwards" in shown
    assert "--places GLOB where it is warm; repeatable" in shown
    assert "hidden" not in shown
    CliRunner().invoke(fresh, ["convert", "model.pt", "--warmth", "2", "--no-cool", "--places", "a", "--places", "b"])
    given = {name: reached[0].get(name) for name in ("warmth", "cool", "places")}
    assert given == {"warmth": 2.0, "cool": False, "places": ("a", "b")}
    refused = CliRunner().invoke(fresh, ["convert", "model.pt", "--warmth", "inf"])
    assert "--warmth must be ≥ 0.25 and finite, got inf" in refused.output
    CliRunner().invoke(fresh, ["convert", "model.pt"])
    assert not {"warmth", "cool", "places"} & set(reached[1])  # the defaults are left to Python


def test_the_former_name_of_fresh_is_told(folder: Path) -> None:
    result = succeed("convert", "model.pt", "--init", "none", "-o", "out.safetensors")
    assert result.stderr == "note: --init none is now called --init fresh\n"


# What is written


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, InputError])
def test_a_failure_while_writing_keeps_what_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    def half(model: nn.Module, path: Path, **_: Any) -> None:
        Path(path).write_text("half")
        raise InputError("no", code="no") if failure is InputError else failure("no")

    for name in ("out.pt", "out.onnx"):
        (folder / name).write_text("kept")
    before = contents(folder)
    monkeypatch.setattr(ns, "export_onnx", half, raising=False)
    result = run("convert", "model.pt", "--fold", "-o", "out.pt", "--onnx", "out.onnx", "--save-plan", "plan.json")
    assert result.exit_code == (130 if failure is KeyboardInterrupt else 2)
    assert contents(folder) == before  # the folded model, which had been written, did not take its place
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    succeed("convert", "model.pt", "--fold", "-o", "out.pt", "--onnx", "out.onnx", "--save-plan", "plan.json")
    after = contents(folder)
    assert set(after) == {*before, "plan.json"}
    assert after["out.pt"] != before["out.pt"]
    assert after["out.onnx"] != before["out.onnx"]


@pytest.mark.parametrize(
    "arguments",
    [
        "convert model.pt --calibration data.safetensors -o data.safetensors",
        "convert model.pt --input-file data.safetensors -o data.safetensors",
        "convert model.pt --fold --input-file data.pt -o data.pt",
        "convert state.pt --arch program.pt2 -o program.pt2",
        "convert model.pt --trust script.html --report script.html",
        "convert model.pt --plan plan.html --report plan.html",
        "convert model.pt --calibration data.json --dry-run --save-plan linked.json",
        "fold model.pt --input-file data.pt -o data.pt",
        "fold state.pt --arch program.pt2 -o program.pt2",
        "export model.pt --input-file data.onnx -o data.onnx",
        "export data.onnx",
    ],
)
def test_no_file_that_is_read_is_written_over(folder: Path, arguments: str) -> None:
    for name in re.findall(r"[a-z]+\.[a-z0-9]+", arguments):
        if name != "model.pt":
            (folder / name).write_text("kept")
    if "linked" in arguments:
        (folder / "linked.json").unlink()
        (folder / "linked.json").symlink_to("data.json")
    if "plan.html" in arguments:
        (folder / "plan.html").write_text(ns.plan(make_model(), "gn").to_json())
    before = contents(folder)
    result = run(*arguments.split())
    assert result.exit_code == 2
    assert "it is what is read" in result.stderr
    assert contents(folder) == before


def test_a_plan_may_be_written_over_itself_and_what_is_not_read_over(folder: Path) -> None:
    np.save("data.npy", np.zeros((4, 3, 12, 12), np.float32))
    Path("old.safetensors").write_text("written over")
    succeed("convert", "model.pt", "--to", "gn", "--dry-run", "--save-plan", "plan.json")
    succeed(*["convert", "model.pt", "--plan", "plan.json", "--save-plan", "plan.json", "-o", "old.safetensors"])
    succeed(*["convert", "model.pt", "--to", "gn", "--input-file", "data.npy", "-o", "old.safetensors"])
    assert "it is what is read" in run("convert", "old.safetensors", "--to", "gn", "-o", "old.safetensors").stderr


@pytest.mark.parametrize(("flag", "suffix"), [("--report", ".html"), ("--save-plan", ".json"), ("--onnx", ".onnx")])
def test_an_output_of_another_kind_is_refused(folder: Path, flag: str, suffix: str) -> None:
    before = contents(folder)
    for name in ("save.py", "model.pt", "plain"):
        result = run("convert", "model.pt", flag, name)
        assert result.exit_code == 2
        assert f"error[output-kind]: {flag} {name} does not end with {suffix}" in result.stderr
        assert f"write {Path(name).stem}{suffix}" in result.stderr
    assert contents(folder) == before
    succeed("convert", "model.pt", flag, f"plain{suffix}")


def test_every_flag_for_a_file_is_read_or_stands_with_the_outputs() -> None:
    paths = {}
    for name in ("convert", "fold", "export", "migrate"):
        command = next(one.callback for one in app.registered_commands if one.name == name)
        flagged = inspect.signature(command).parameters.values()
        read = FilesRead.of([*flagged], {flag.name: __file__ for flag in flagged}).paths
        paths[name] = {flag.name for flag in flagged if "Path" in str(flag.annotation)} - read.keys()
    assert paths.pop("convert") == {"output", "onnx", "report", "save_plan"}
    assert all(written == {"output"} for written in paths.values())


def test_two_outputs_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="two outputs have this name"), staged(Path("a.json"), Path("a.json")):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_access_is_told_before_the_model_is_read(folder: Path) -> None:
    (folder / "closed").mkdir(mode=0o500)
    result = run("convert", "no-such-model.pt", "-o", "closed/out.safetensors")
    assert "error[output-path]: cannot write 'closed/out.safetensors': Permission denied" in result.stderr


def test_an_output_is_checked_before_the_model_is_read(folder: Path) -> None:
    assert "error[output-path]" in run("convert", "no-such-model.pt", "-o", "no/out.safetensors").stderr
    assert "error[file-missing]" in run("convert", "no-such-model.pt", "-o", "out.safetensors").stderr


@pytest.mark.parametrize("command", ["convert", "fold", "export", "inspect"])
@pytest.mark.parametrize("name", [".", "", "..", "models"])
def test_a_folder_in_place_of_a_model_is_named(folder: Path, command: str, name: str) -> None:
    (folder / "models").mkdir()
    before = sorted(path.name for path in folder.iterdir())
    result = run(command, name)
    assert (result.exit_code, result.stderr) == (
        2,
        f"error[file-is-directory]: {name or '.'!r} is a directory\n  hint: give the checkpoint file in it\n",
    )
    assert sorted(path.name for path in folder.iterdir()) == before
    assert "error[file-missing]" in run(command, "no.pt").stderr  # the negative control


def test_a_pipe_in_place_of_a_file_is_told(folder: Path) -> None:
    os.mkfifo("pipe.pt")
    for arguments in ("inspect pipe.pt", "convert pipe.pt --to gn", "convert model.pt --calibration pipe.pt"):
        result = run(*arguments.split())
        assert result.exit_code == 2
        assert "error[file-not-seekable]: 'pipe.pt' is no file but a pipe" in result.stderr


@pytest.mark.parametrize("name", ["a\udcff.safetensors", "a\udcff.pt2", "\udcff/a.safetensors", "a\udcff.onnx"])
def test_an_output_whose_name_is_no_text_is_refused(folder: Path, name: str) -> None:
    (folder / "\udcff").mkdir()
    result = run("convert", "model.pt", "--to", "gn", "--onnx" if name.endswith("onnx") else "-o", name)
    assert result.exit_code == 2
    assert "has a name that is not UTF-8" in result.stderr
    succeed("convert", "model.pt", "--to", "gn", "-o", "ä.safetensors")


# JSON


def test_json_is_all_that_stands_on_stdout(folder: Path) -> None:
    commands = {
        "inspect net.pt --trust save.py": "sites",
        "inspect net.pt --trust save.py --to ln": "steps",
        "convert net.pt --trust save.py -o n.safetensors": "plan",
        "convert net.pt --trust save.py --onnx n.onnx --input-shape 1x3x8x8": "verification",
        "migrate net.pt --like n.safetensors --trust save.py -o l.safetensors": "exact",
        "fold n.safetensors --trust save.py -o n.pt": "rows",
        "export n.pt --trust save.py -o n.onnx --input-shape 1x3x8x8": "verification",
        "verify n.pt n.onnx --trust save.py --input-shape 1x3x8x8": "ok",
    }
    for name in [name for name in sys.modules if name.startswith("_normswap_script_save_")]:
        del sys.modules[name]
    for command, key in commands.items():
        assert key in json.loads(succeed(*command.split(), "--json").stdout), command


def test_a_script_that_prints_does_print_to_stderr(folder: Path) -> None:
    command = [*MODULE, "inspect", "net.pt", "--trust", "save.py", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    assert json.loads(result.stdout)["model"] == "Net"
    assert "a script may print" in result.stderr


# Terminals and pipes


def test_a_shell_offers_the_recipes(folder: Path) -> None:
    env = environment(_NORMSWAP_COMPLETE="complete_bash", COMP_WORDS="normswap convert m.pt --to wn", COMP_CWORD="4")
    program = "import sys; sys.argv[0] = 'normswap'; from normswap.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env)
    assert result.stdout.split() == ["wn", "wn+mobn"]


def test_notes_that_differ_in_names_alone_are_joined() -> None:
    groups = {"a.b might use a.c, too": ["x"], "b.b might use d.c, too": ["y", "z"], "another": ["w"]}
    assert reporting._alike(groups) == [
        ("a.b might use a.c, too (the others likewise)", ["x", "y", "z"]),
        ("another", ["w"]),
    ]


def test_a_pipe_gets_plain_text_whose_lines_are_whole(folder: Path) -> None:
    outputs = []
    for columns in ("40", "200"):
        command = [*MODULE, "inspect", "model.pt", "--to", "gn+ws"]
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(COLUMNS=columns))
        assert ANSI not in result.stdout + result.stderr
        assert "…" not in result.stdout
        outputs.append(result.stdout)
    assert outputs[0] == outputs[1]


def test_help_in_a_pipe_has_neither_boxes_nor_colours() -> None:
    for arguments in (["--help"], ["convert", "--help"], ["convert", "--wrong"]):
        result = subprocess.run([*MODULE, *arguments], capture_output=True, text=True, check=False, env=environment())
        assert ANSI not in result.stdout + result.stderr
        assert not re.search("[╭│╰─]", result.stdout + result.stderr)


@pytest.mark.parametrize("width", [80, 140])
def test_a_terminal_gets_tables_that_fit_it(folder: Path, width: int) -> None:
    shown = run_on_terminal(width, "inspect", "model.pt", "--to", "gn+ws")
    lines = visible(shown)
    assert ANSI in shown
    assert max(map(len, lines)) <= width
    heading = next(i for i, line in enumerate(lines) if line.startswith("Sequential → gn+ws"))
    assert not lines[heading + 1].strip()  # as in a pipe, a line is left free
    assert "in every row: type BatchNorm2d, proof proven" in [line.rstrip() for line in lines]
    rows = [line.split() for line in lines]
    assert ["4", "3", "ws", "GroupNorm,", "2", "groups", "of", "16"] in rows
    assert not any("…" in line and "reading" not in line and "planning" not in line for line in lines)


def test_names_and_numbers_stay_whole_where_there_is_room() -> None:
    columns = [["norm", "stages.0.conv1_1x1.bn"], ["reason", "a text that may be broken between its words"], ["n", "7"]]
    assert console._widths(columns, 100) == [21, 43, 1]  # all that is wanted
    assert console._widths(columns, 60) == [21, 34, 1]
    assert console._widths(columns, 33) == [21, 7, 1]
    assert console._widths(columns, 32) == [None, None, None]


def test_a_long_name_beside_a_long_text_is_shown_whole_on_a_terminal(folder: Path) -> None:
    inner = nn.Sequential(OrderedDict({"a_name_of_forty_characters_in_a_network": nn.Linear(32, 10)}))
    torch.save(nn.Sequential(*list(make_model())[:-1], inner, nn.Linear(10, 2)).eval(), "long.pt")
    lines = [line.rstrip() for line in visible(run_on_terminal(80, "inspect", "long.pt", "--to", "gn+ws"))]
    assert max(map(len, lines)) <= 80
    assert any(" 8.a_name_of_forty_characters_in_a_network" in line for line in lines)
    assert any(line.endswith(" directly") for line in lines)  # the reason beside it is broken between words, not cut


@pytest.mark.parametrize("width", [80, 140, 200])
def test_the_list_of_recipes_is_split_before_its_equations_are(width: int) -> None:
    lines = [line.rstrip() for line in visible(run_on_terminal(width, "recipes"))]
    assert max(map(len, lines)) <= width
    for recipe in ns.all_recipes().values():
        row = next(line for line in lines if line.split()[:1] == [recipe.name])
        assert recipe.equation.split(", ")[0] in row
        assert any(recipe.paper in line for line in lines)
    assert sum(line.startswith("recipe ") for line in lines) == (1 if width == 200 else 2)


def test_no_color_is_respected(folder: Path) -> None:
    colour = re.compile(r"\x1b\[[\d;]*(3[0-7]|38|9[0-7])[\d;]*m")
    assert colour.search(run_on_terminal(80, "--help"))
    for arguments in (["--help"], ["inspect", "model.pt"], ["recipes"]):
        assert not colour.search(run_on_terminal(80, *arguments, NO_COLOR="1"))


def test_an_encoding_without_the_characters_shows_question_marks() -> None:
    result = subprocess.run(
        [*MODULE, "recipes"], capture_output=True, check=True, env=environment(PYTHONIOENCODING="latin-1")
    )
    assert b"sqrt(var" in result.stdout
    assert b"?" in result.stdout


def test_a_pipe_that_closes_early_is_no_error() -> None:
    process = subprocess.Popen([*MODULE, "recipes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    message = process.stderr.read().decode()
    process.stderr.close()
    process.wait()
    assert "Traceback" not in message
    assert "error" not in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("arguments", ["recipes", "recipes --json", "--version", "convert --help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_one_line(folder: Path, arguments: str, unbuffered: str) -> None:
    environ = environment(PYTHONUNBUFFERED=unbuffered)
    with open("/dev/full", "w") as full:
        command = [*MODULE, *arguments.split()]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environ, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error[output-stream]: cannot write to the standard output: No space left on device")
    assert len(ended.stderr.splitlines()) == 2


def test_a_closed_stdout_is_no_error(folder: Path) -> None:
    command = shlex.join([*MODULE, *["convert", "model.pt", "--to", "gn", "-o", "out.safetensors"]])
    ended = subprocess.run(
        f"{command} >&-", shell=True, stderr=subprocess.PIPE, text=True, env=environment(), check=False
    )
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr
    assert {type(one) for one in ns.load("out.safetensors").modules()} >= {nn.GroupNorm}
    assert (
        subprocess.run(f"{command.replace('gn', 'gnn')} >&-", shell=True, env=environment(), check=False).returncode
        == 2
    )


def test_ctrl_c_ends_with_130_and_leaves_nothing(folder: Path) -> None:
    (folder / "stop.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n", encoding="utf-8")
    before = contents(folder)
    command = [*MODULE, "convert", "net.pt", "--trust", "stop.py", "-o", "out.safetensors"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert (result.returncode, result.stderr) == (130, "interrupted\n")
    assert contents(folder) == before
    assert not list(folder.glob(".normswap-*"))


def test_a_signal_that_is_ignored_stays_ignored_and_handlers_are_put_back() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with boundary._ended_by_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(boundary.Ended):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_choice_of_a_checkpoints_entry_is_told(folder: Path) -> None:
    torch.save({"model": make_model(), "ema": make_model()}, "checkpoint.pt")
    level = logging.getLogger("normswap").level
    result = succeed("inspect", "checkpoint.pt")
    assert result.stderr == (
        "note: checkpoint.pt: the weights are taken from 'model' (there are also 'ema'): --key ema takes the average\n"
    )
    assert logging.getLogger("normswap").level == level
    assert not logging.getLogger("normswap").handlers


def test_made_up_inputs_are_told(folder: Path) -> None:
    result = succeed("export", "model.pt", "-o", "m.onnx")
    assert result.stderr == (
        "note: the input shape 2x3x64x64 was made up, and the file takes no other height and width: "
        "give --input-shape for the size that you use\n"
    )


# Values


@pytest.mark.parametrize(
    ("text", "shape"), [("1x3x8x8", (1, 3, 8, 8)), ("4", (4,)), ("2×3", (2, 3)), ("2,30", (2, 30)), ("2X3", (2, 3))]
)
def test_a_shape_is_read(text: str, shape: tuple[int, ...]) -> None:
    assert read_shapes([text]) == (shape,)


@pytest.mark.parametrize("text", ["", "0x3", "1x", "x3", "1x-3", "1.5x3", "1 3"])
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a shape"):
        read_shapes([text])


def test_a_recipes_options_get_their_own_types() -> None:
    texts = ["eps=1e-3", "group-size=4", "num_groups=none", "gain=no"]
    found = read_recipe_options("gn+ws", {}, texts)
    assert found == {"eps": 1e-3, "group_size": 4, "num_groups": None, "gain": False}
    for wrong in ("group_size=4.5", "eps=small", "gain=2", "gain", "=3"):
        with pytest.raises(InputError):
            read_recipe_options("gn+ws", {}, [wrong])
    with pytest.raises(InputError, match="eps is given twice"):
        read_recipe_options("gn+ws", {"eps": 1e-3}, ["eps=1e-4"])


@pytest.mark.parametrize(
    "name", ["inplace", "to", "model", "calibration", "plan", "progress", "check", "include", "axis"]
)
def test_an_option_that_is_none_of_the_recipe_is_refused(folder: Path, name: str) -> None:
    result = run("convert", "model.pt", "--to", "ln", "--option", f"{name}=1", "--dry-run")
    assert result.exit_code == 2
    assert f"error[unknown-option]: the recipe has no option '{name}'" in result.stderr
    assert ("did you mean 'axes'?" in result.stderr) == (name == "axis")
    assert "its options are axes, eps" in result.stderr
    succeed("convert", "model.pt", "--to", "ln", "--option", "axes=channel", "--dry-run")


def test_noise_has_the_models_dtype_and_the_same_values_each_time() -> None:
    model = nn.Linear(4, 2).double()
    first, second = (example_inputs(model, InputFlags(["3x4"])) for _ in range(2))
    assert first[0].dtype == torch.float64
    assert isinstance(first[0], Tensor)
    assert torch.equal(first[0], second[0])


def test_the_root_of_usage_errors_is_the_one_that_typer_raises() -> None:
    assert issubclass(typer.BadParameter, boundary.UsageError)
    assert boundary.UsageError.__name__ == "ClickException"


@pytest.fixture
def calibrated(folder: Path) -> Path:
    """Return the folder with calibration data in it."""
    np.save(folder / "data.npy", torch.randn(40, 3, 12, 12, generator=torch.Generator().manual_seed(1)).numpy())
    return folder


def test_calibration_matches_where_nothing_else_is_asked_for(calibrated: Path) -> None:
    shown = succeed("convert", "model.pt", "--calibration", "data.npy", "-o", "out.safetensors").stdout
    assert re.search(r"agreement +output on 8 held-out samples: relative error 0\.\d+, cosine 0\.9", shown)
    plain = ("convert", "model.pt", "--calibration", "data.npy", "--json", "-o")
    methods = {}
    for how in ("match", "absorb", "tune", "fresh"):
        steps = ("--tune-steps", "2") if how == "tune" else ()
        record = json.loads(succeed(*plain, f"{how}.safetensors", "--init", how, *steps).stdout)
        methods[how] = record["init"]["method"]
        assert (record["init"]["agreement"] is None) == (how in ("absorb", "fresh"))
    assert methods == {how: how for how in methods}
    default, matched, absorbed = (ns.load(f"{how}.safetensors").state_dict() for how in ("out", "match", "absorb"))
    assert all(torch.equal(value, matched[name]) for name, value in default.items())
    assert not all(torch.equal(value, absorbed[name]) for name, value in default.items())


def test_an_inexact_recipe_without_calibration_is_told_to_be_measured(calibrated: Path) -> None:
    given = ("convert", "model.pt", "-o", "out.safetensors")
    told = "note: gn+ws without --calibration: measure how much accuracy is left"
    assert succeed(*given).stderr.startswith(told)
    for silent in (["--to", "wn+mobn"], ["--calibration", "data.npy", "--init", "absorb"], ["--init", "fresh"]):
        assert succeed(*given, *silent).stderr == "", silent
    result = succeed(*given, "--json")
    assert json.loads(result.stdout)["init"]["method"] == "absorb"
    assert result.stderr == ""


def test_a_layer_that_gives_the_output_is_fitted_and_not_skipped(calibrated: Path) -> None:
    given = ("convert", "model.pt", "-o", "out.safetensors")
    lines = succeed(*given, "--calibration", "data.npy").stdout.splitlines()
    assert "  fitted     1 layer (8), without a norm: what it gives is the model's output" in lines
    assert not any(line.startswith("  skipped") for line in lines)
    lines = succeed(*given).stdout.splitlines()
    assert not any(line.startswith("  fitted") for line in lines)
    assert "  skipped    1 layer (8): no BatchNorm follows it directly" in lines


def test_a_file_that_is_written_takes_the_calibration_datas_sizes(calibrated: Path) -> None:
    given = ("convert", "model.pt", "--to", "wn+mobn", "--onnx", "out.onnx")
    result = succeed(*given, "--calibration", "data.npy")
    assert "in   input: float32 [batch, 3, 12, 12]" in result.stdout
    assert result.stderr == ""
    result = succeed(*given, "--calibration", "data.npy", "--input-shape", "1x3x16x20")  # asked for, it goes first
    assert "in   input: float32 [batch, 3, 16, 20]" in result.stdout
    single = ("--calibration", "data.npy", "--batch-size", "1", "--fold", "-o", "out.pt2")
    succeed("convert", "model.pt", "--to", "wn+mobn", *single)
    assert load_model(calibrated / "out.pt2")(torch.zeros(5, 3, 12, 12)).shape == (5, 10)
    result = succeed(*given)
    assert "in   input: float32 [batch, 3, 64, 64]" in result.stdout
    assert "the input shape 2x3x64x64 was made up" in result.stderr


def test_the_spread_the_scales_and_the_number_of_groups_are_chosen(calibrated: Path) -> None:
    plain = ("convert", "model.pt", "--to", "gn", "--calibration", "data.npy", "-o")
    succeed(*plain, "a.safetensors", "--spread", "0")
    succeed(*plain, "b.safetensors", "--spread", "1")
    one, other = (ns.load(f"{name}.safetensors").state_dict() for name in "ab")
    assert not all(torch.equal(value, other[name]) for name, value in one.items())
    plain = ("convert", "model.pt", "--to", "gn+ws", "--calibration", "data.npy", "-o")
    succeed(*plain, "a.safetensors")
    succeed(*plain, "b.safetensors", "--no-scale")
    one, other = (ns.load(f"{name}.safetensors").state_dict() for name in "ab")
    assert not all(torch.equal(value, other[name]) for name, value in one.items())
    plain = ("convert", "model.pt", "--to", "gn", "--calibration", "data.npy", "-o")
    record = json.loads(succeed(*plain, "c.safetensors", "--num-groups", "auto", "--json").stdout)
    assert record["plan"]["options"]["num_groups"] == "auto"
    assert all(step["num_groups"] for step in record["plan"]["steps"])
    record = json.loads(succeed(*plain, "d.safetensors", "--num-groups", "4", "--json").stdout)
    assert [step["num_groups"] for step in record["plan"]["steps"]] == [4, 4]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--num-groups", "auto"], "--num-groups auto chooses by calibration data"),
        (["--num-groups", "many"], "--num-groups must be a whole number or 'auto', got 'many'"),
        (["--init", "match"], "fits to data and none was given"),
        (["--init", "magic"], "--init magic is unknown"),
        (["--spread", "inf"], "--spread must be ≥ 0 and finite, got inf"),
        (["--report", "nowhere/page.html"], "cannot write"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(folder: Path, arguments: list[str], expected: str) -> None:
    before = contents(folder)
    result = run("convert", "model.pt", *arguments)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert contents(folder) == before


def test_inspect_ranks_the_sites_by_what_their_swap_costs(calibrated: Path) -> None:
    command = ("inspect", "model.pt", "--calibration", "data.npy", "--to", "gn+ws")
    record = json.loads(succeed(*command, "--json").stdout)
    assert {row["norm"]: row["layer"] for row in record} == {"1": "0", "4": "3"}
    assert [row["error"] for row in record] == sorted((row["error"] for row in record), reverse=True)
    assert sum(row["share"] for row in record) == pytest.approx(1)
    shown = succeed(*command).stdout
    assert f"{record[0]['error']:.4f}" in shown
    assert shown.splitlines()[-1].endswith(f" --exclude {record[0]['norm']}")  # the largest error
    assert "is exact" in run("inspect", "model.pt", "--calibration", "data.npy", "--to", "wn").stderr


def test_a_site_has_the_same_error_whatever_lies_before_it(calibrated: Path) -> None:
    """The second site's cost is that of its swap alone; converted together it also has the first one's errors."""
    model, data = load_model(calibrated / "model.pt"), torch.from_numpy(np.load("data.npy"))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    together = {row.norm: row for row in ns.rank_sites(model, "gn", calibration=data)}
    alone = {row.norm: row for row in ns.rank_sites(model, "gn", calibration=data, include=["4"])}
    assert together["4"].error == pytest.approx(alone["4"].error, rel=1e-3)  # float32, and the ridge's steps
    fits = {row.name: row.fit for row in ns.convert(model, "gn", calibration=data).init.rows}
    assert fits["4"] is not None
    assert fits["4"].noise_after > 1.05 * together["4"].error  # the negative control: errors add up there
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_convert_writes_a_report(calibrated: Path) -> None:
    pytest.importorskip("matplotlib")
    shown = succeed(
        "convert", "model.pt", "--calibration", "data.npy", "-o", "out.safetensors", "--report", "page.html"
    )
    assert "page.html (" in shown.stdout
    assert "<svg" in (calibrated / "page.html").read_text(encoding="utf-8")


def test_a_terminal_shows_the_progress_of_a_match_and_a_pipe_does_not(calibrated: Path) -> None:
    arguments = ("convert", "model.pt", "--calibration", "data.npy", "-o", "out.safetensors")
    assert re.search(r"[123]/3", run_on_terminal(100, *arguments))
    assert not re.search(r"[123]/3", run_on_terminal(100, *arguments, "--json"))
    result = subprocess.run([*MODULE, *arguments], capture_output=True, text=True, check=True, env=environment())
    assert result.stderr == ""


def test_ctrl_c_within_a_match_ends_with_130_and_leaves_nothing(calibrated: Path) -> None:
    script = SCRIPT.replace(
        "        return", "        if len(x) == 7: import os; os.kill(os.getpid(), 2)\n        return"
    )
    (calibrated / "stop.py").write_text(script.replace('"net.pt"', '"stop.pt"'), encoding="utf-8")
    subprocess.run([sys.executable, "stop.py"], check=True, stdout=subprocess.DEVNULL, env=environment())
    np.save("some.npy", np.zeros((23, 3, 12, 12), np.float32))
    before = contents(calibrated)
    command = [*MODULE, "convert", "stop.pt", "--trust", "stop.py", "--calibration", "some.npy", "--batch-size", "16"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert (result.returncode, result.stderr.splitlines()[-1]) == (130, "interrupted")
    assert contents(calibrated) == before
    assert not list(calibrated.glob(".normswap-*"))


def test_an_interrupted_match_leaves_the_model_as_it_was() -> None:
    model = make_model().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for act in (ns.convert, ns.rank_sites):
        with pytest.raises(KeyboardInterrupt):
            act(model, "gn+ws", calibration=torch.randn(20, 3, 12, 12), progress=stop)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
