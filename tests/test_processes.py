"""Many processes: each brings its share of the data, all get the values of one process with all of it."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import many_processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.slow,  # the first of these tests, whichever it is, waits for the processes that all of them share
]

QUICK = ("match", "match in float32", "match, uneven", "initialize", "by itself", "fails in one", "at last")
EQUAL = [
    *((2, name) for name in many_processes.EQUAL if name in QUICK),
    *((4, name) for name in many_processes.EQUAL),
]
ERRORS = {
    "fails in one": ("a disk is full", "process 1 failed: the model does not run"),
    "not finite in one": ("holds NaN", "process 1 failed: input 0 of batch"),
    "no data in one": ("the data holds no batch", "process 1 failed: the data holds no batch"),
    "other ways": ("0 is at 'second.1', process 1 at 'head'", "0 is at 'second.1', process 1 at 'head'"),
    "other models": ("'first.0.weight' has different", "'first.0.weight' has different values in the processes"),
    "other recipes": ("different plans", "the processes have different plans"),
    "other calls": ("the processes do different things", "the processes do different things"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each process has found, by the number of processes: the quick scenarios with two, all with four."""

    @cache
    def started(size: int) -> tuple[list[dict[str, Any]], str]:
        folder = tmp_path_factory.mktemp(f"processes{size}")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        command = [*torchrun, Path(many_processes.__file__), folder, *(QUICK if size == 2 else ())]
        done = subprocess.run(command, capture_output=True, text=True, timeout=540)
        files = [folder / f"{rank}.pt" for rank in range(size)]
        return [torch.load(file) for file in files if file.exists()], done.stderr

    def results(size: int) -> list[dict[str, Any]]:
        found, errors = started(size)
        assert len(found) == size, errors
        return found

    return results


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest distance of two tensors, relative to the tensor's length."""
    assert found.keys() == expected.keys()
    return max(
        float((found[key].double() - value.double()).norm() / value.double().norm().clamp(min=1e-6))
        for key, value in expected.items()
    )


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether all bits are equal."""
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def told(results: dict[str, Any]) -> str:
    """A report but for what it says of processes."""
    return "\n\n".join(part for part in results.get("init", "").split("\n\n") if "processes" not in part)


@pytest.mark.parametrize(("size", "name"), EQUAL)
def test_many_processes_get_the_values_of_one_with_all_data(size: int, name: str, run: Any) -> None:
    many = [results[name] for results in run(size)]
    assert all("state" in results for results in many), many
    one = many_processes.EQUAL[name](0, 1)
    for other in many[1:]:
        assert same(other["state"], many[0]["state"])
        assert (other.get("plan"), other.get("init")) == (many[0].get("plan"), many[0].get("init"))
    # All is summed up in float64; what comes of it may be rounded to the next float32.
    assert distance(many[0]["state"], one["state"]) < (1e-6 if name.endswith("float32") else 1e-12)
    if not name.endswith("float32"):
        assert (many[0].get("plan"), told(many[0])) == (one.get("plan"), told(one))


def test_the_report_says_whose_data_it_was(run: Any) -> None:
    assert "the data of 2 processes, 48 samples, was put together" in run(2)[0]["match"]["init"]


def test_a_process_that_works_by_itself_gets_other_values(run: Any) -> None:
    """The control of the comparisons above: this is what each share gives alone."""
    mine, other = (results["by itself"]["state"] for results in run(2))
    assert not same(mine, other)
    assert distance(mine, other) > 1e-2
    assert distance(mine, run(2)[0]["match in float32"]["state"]) > 1e-2


def test_recipes_that_are_chosen_are_the_same_in_all(run: Any) -> None:
    many = [results["auto"] for results in run(4)]
    assert all(same(other["state"], many[0]["state"]) for other in many), many
    assert {other["plan"] for other in many} == {many[0]["plan"]}


def test_tuning_on_shares_gives_all_the_same(run: Any) -> None:
    many = [results["tune on shares"] for results in run(4)]
    assert "8 gradient steps took the held-out error" in many[0]["init"]
    assert all(same(other["state"], many[0]["state"]) for other in many[1:])
    assert distance(many[0]["state"], run(4)[0]["match in float32"]["state"]) > 1e-4


@pytest.mark.parametrize(("size", "name"), [(2, "fails in one"), *((4, name) for name in ERRORS)])
def test_an_error_of_one_process_is_an_error_of_all(size: int, name: str, run: Any) -> None:
    errors = [results[name].get("error", "none") for results in run(size)]
    own, others = ERRORS[name]
    assert own in errors[1]
    assert all(others in error for rank, error in enumerate(errors) if rank != 1), errors


@pytest.mark.parametrize("recipe", ["wn+mobn, synchronized", "wn+mobn", "gn+ws"])
def test_a_sharded_model_is_loaded_trained_stored_and_gathered(recipe: str, run: Any) -> None:
    synchronized = recipe != "wn+mobn"
    for results in run(4):
        found = results["sharded"][recipe]
        assert found["loaded"] < 1e-6
        assert found["refused"] == ["sharded-model"] * 3
        # A checkpoint of DCP holds one process's running means: the control is a norm whose means are each its own.
        assert (found["means"] == 0) == synchronized
        assert found["folded"] < 1e-5
    assert (max(results["sharded"][recipe]["again"] for results in run(4)) < 1e-6) == synchronized


def test_after_an_error_all_goes_on(run: Any) -> None:
    for results in run(2):
        assert same(results["at last"]["state"], run(2)[0]["match in float32"]["state"])
