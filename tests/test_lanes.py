"""The fast lane takes of each test the cases that fit, and what is measured comes from wherever the test ran."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import lanes
import pytest

TESTS = Path(lanes.__file__).parent


@pytest.mark.parametrize(
    ("cases", "seconds", "expected"),
    [
        (10, 0.0, set(range(10))),  # never measured, or quick
        (10, lanes.SHARE / 10, set(range(10))),
        (10, lanes.SHARE / 2.5, {0, 5}),
        (10, lanes.SHARE / 5.5, {0, 2, 4, 6, 8}),
        (10, lanes.SHARE * 2, {0}),
        (1, lanes.LONGEST, {0}),
        (10, lanes.LONGEST * 1.01, set()),
    ],
)
def test_of_a_test_those_cases_are_fast_that_fit_into_its_share(cases: int, seconds: float, expected: set[int]) -> None:
    assert lanes.fast(cases, seconds) == expected


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_a_case_takes_is_stored_and_leaves_it_out_of_the_fast_lane(tmp_path: Path, workers: str) -> None:
    (tmp_path / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "import lanes, pathlib\n"
        "FILE = pathlib.Path(__file__).parent / 'durations.json'\n"
        "def pytest_addoption(parser): parser.addoption('--store', action='store_true')\n"
        "def pytest_configure(config):\n"
        "    config.addinivalue_line('markers', 'slow: slow')\n"
        "    if config.getoption('--store'): config.pluginmanager.register(lanes.Recorder(FILE))\n"
        "def pytest_collection_modifyitems(items): lanes.mark_slow(items, lanes.stored(FILE))\n"
    )
    (tmp_path / "test_times.py").write_text(
        "import pytest, time\n"
        "def busy(seconds):\n"
        "    end = time.process_time() + seconds\n"
        "    while time.process_time() < end: pass\n"
        "def test_quick(): pass\n"
        "@pytest.mark.parametrize('n', range(4))\n"
        "def test_of_some_length(n): busy(0.1)\n"
        "@pytest.fixture\n"
        "def long(): busy(1.7)\n"
        "def test_of_a_long_fixture(long): pass\n"
    )

    def run(*more: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider", *more]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    (tmp_path / "durations.json").write_text(json.dumps({"test_times.py::test_quick": 9.0, "elsewhere.py::test": 9.0}))
    assert "6 passed" in run("--store")
    seconds = json.loads((tmp_path / "durations.json").read_text())
    assert seconds.pop("elsewhere.py::test") == 9.0
    assert set(seconds) == {"test_times.py::test_of_some_length", "test_times.py::test_of_a_long_fixture"}
    assert 0.09 < seconds["test_times.py::test_of_some_length"] < 0.3
    assert 1.69 < seconds["test_times.py::test_of_a_long_fixture"] < 3
    assert "2 passed" in run("-m", "not slow")
