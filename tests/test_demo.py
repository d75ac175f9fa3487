"""The demo's report: what it measures, how it prints, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from contextlib import redirect_stdout
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from normswap.demo import report as demo
from normswap.demo.data import load_digits, load_metadata
from normswap.demo.report import OPENING, DemoReport, DemoRow, run_demo
from normswap.errors import InputError
from normswap.recipes import all_recipes

RECIPES = ("gn", "gn+ws", "wn+mobn")  # one inexact, one that gains by data, one exact


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> DemoReport:
    return run_demo(tmp_path_factory.mktemp("demo") / "made" / "here", recipes=RECIPES)


def row(report: DemoReport, recipe: str, *, calibrated: bool = False) -> DemoRow:
    (found,) = [r for r in report.rows if r.recipe == recipe and r.calibrated == calibrated]
    return found


def test_there_is_a_row_for_the_network_as_it_is_and_for_each_recipe(report: DemoReport) -> None:
    assert [(r.recipe, r.calibrated) for r in report.rows] == [
        ("bn", False),
        ("gn", False),
        ("gn+ws", False),
        ("gn+ws", True),
        ("wn+mobn", False),
    ]


def test_the_network_as_it_is_has_the_recorded_accuracy(report: DemoReport) -> None:
    recorded = 100 * int(load_metadata()["heldout_correct"]) / report.digits
    reference = row(report, "bn")
    assert (reference.swapped, reference.folded, reference.onnx) == (recorded, recorded, recorded)
    assert reference.fresh is None


def test_the_exact_recipe_keeps_every_digit_to_the_end(report: DemoReport) -> None:
    reference, exact = row(report, "bn"), row(report, "wn+mobn")
    assert exact.swapped == exact.folded == exact.onnx == reference.swapped


def test_fresh_norms_lose_what_the_swap_keeps(report: DemoReport) -> None:
    swapped = row(report, "gn")
    assert swapped.fresh is not None
    assert swapped.fresh < 50 < 95 < swapped.swapped


def test_calibration_keeps_more_than_no_data(report: DemoReport) -> None:
    assert row(report, "gn+ws", calibrated=True).swapped > row(report, "gn+ws").swapped


def test_every_stage_after_the_swap_gives_the_same_predictions(report: DemoReport) -> None:
    assert report.ok
    for r in report.rows:
        assert r.swapped == r.folded == r.onnx
        # Float32 rounding of nine layers is of the order of 1e-7; a wrong fold moves a good part of the output.
        assert max(r.fold_difference, r.onnx_difference) < 1e-5


def test_every_file_has_the_stated_accuracy_in_onnxruntime(report: DemoReport) -> None:
    images, labels = load_digits()
    for r in report.rows:
        session = onnxruntime.InferenceSession(r.file, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert 100 * (logits.argmax(1) == labels.numpy()).mean() == pytest.approx(r.onnx)
        assert r.milliseconds > 0
    assert sorted(Path(r.file) for r in report.rows) == sorted(Path(report.output).iterdir())


def test_parameters_are_counted_before_and_after_folding(report: DemoReport) -> None:
    norms = 2 * (3 * 16 + 3 * 32 + 3 * 64)  # γ and β
    bn, gn, exact = row(report, "bn"), row(report, "gn"), row(report, "wn+mobn")
    assert bn.trained_parameters == 77_754
    assert bn.deployed_parameters == 77_754 - norms // 2  # W takes γ up; β becomes the bias
    assert gn.trained_parameters == gn.deployed_parameters == 77_754 + norms // 2  # the layers' new biases
    assert exact.trained_parameters == 77_754  # g takes the place of γ
    assert exact.deployed_parameters == bn.deployed_parameters


def test_the_report_prints_as_two_tables_of_at_most_80_columns(
    report: DemoReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(report.output)
    rows = tuple(dataclasses.replace(r, file=Path(r.file).name) for r in report.rows)
    report = dataclasses.replace(report, output=".", rows=rows)
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80
    header = next(line for line in lines if line.startswith("recipe"))
    assert header.split()[1:] == ["fresh", "swapped", "folded", "onnx"]
    for name in ("bn", "gn", "gn+ws", "gn+ws, calibrated", "wn+mobn"):
        assert sum(line.startswith(name + "  ") for line in lines) == 2, name
    assert "all 5 files verified" in str(report)
    assert "1 thread" in str(report)


def test_the_printed_lines_run_a_file_and_fit_a_terminal(report: DemoReport) -> None:
    lines = [line.strip() for line in str(report).splitlines() if line.startswith("    ")]
    assert len(lines) == 4
    usual = OPENING.format(folder="normswap-demo", file="normswap-demo/digits-ws-calibrated.onnx")
    assert max(map(len, usual.splitlines())) <= 80  # a longer one would be broken in two, and be no Python
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec("\n".join(lines), {})
    assert "array" in printed.getvalue()


def test_the_report_does_not_tell_how_to_open_files_that_are_gone(report: DemoReport) -> None:
    gone = dataclasses.replace(report.rows[-1], file="gone/digits.onnx")
    assert "netron" in str(report)
    assert "netron" not in str(dataclasses.replace(report, rows=(gone,)))


def test_the_report_turns_to_json(report: DemoReport) -> None:
    record = json.loads(report.to_json())
    assert record["ok"] is True
    assert record["rows"] == [dataclasses.asdict(r) for r in report.rows]


def test_a_difference_that_is_not_finite_is_null_in_json(report: DemoReport) -> None:
    broken = dataclasses.replace(report.rows[0], onnx_difference=math.inf, ok=False)
    record = json.loads(dataclasses.replace(report, rows=(broken,)).to_json())
    assert record["rows"][0]["onnx_difference"] is None
    assert record["rows"][0]["fold_difference"] == broken.fold_difference
    assert record["ok"] is False


def test_a_report_without_rows_is_not_ok(report: DemoReport) -> None:
    assert not dataclasses.replace(report, rows=()).ok


def test_a_fold_that_moves_the_output_is_not_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = demo.fold

    def wrong(model: nn.Module, *, example_inputs: torch.Tensor) -> nn.Module:
        folded = right(model, example_inputs=example_inputs)
        folded.get_submodule("head").weight.data[0] *= 1.01  # type: ignore[index,operator,union-attr]
        return folded

    monkeypatch.setattr(demo, "fold", wrong)
    report = run_demo(tmp_path, recipes=["wn"])
    assert not report.ok
    assert [r.ok for r in report.rows] == [False, False]
    assert all(r.fold_difference > 1e-4 > r.onnx_difference for r in report.rows)
    assert "NOT VERIFIED: bn; wn" in str(report)


def test_all_recipes_run_unless_some_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, bool]] = []

    def note(name: str, *rest: object, calibrated: bool = False) -> DemoRow:
        measured.append((name, calibrated))
        return DemoRow(name, calibrated, None, 0, 0, 0, 0, 0, True, 0, 0, 0, "")

    monkeypatch.setattr(demo, "_measure", note)
    monkeypatch.setattr(demo, "_latencies", lambda files, image: [0.0 for _ in files])
    run_demo(tmp_path)
    assert [name for name, calibrated in measured if not calibrated] == ["bn", *all_recipes()]
    assert [name for name, calibrated in measured if calibrated] == ["gn+ws", "ws"]


def test_progress_names_each_step_and_threads_are_put_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    lines: list[str] = []
    run_demo(tmp_path, recipes=[], progress=lines.append)
    assert lines == ["bn", "timing the ONNX files"]
    assert torch.get_num_threads() == before
    assert torch.is_grad_enabled()


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(InputError) as caught:
        run_demo(tmp_path / "taken")
    assert caught.value.code == "demo-output"
    assert (tmp_path / "taken").read_text() == "mine"


def test_an_unknown_recipe_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        run_demo(tmp_path / "new", recipes=["gn", "gn+sw"])
    assert caught.value.code == "unknown-recipe"
    assert not (tmp_path / "new").exists()
