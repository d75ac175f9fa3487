"""Which tests the fast lane runs: of each test the cases that its share of the time is enough for.

``durations.json`` holds the processor seconds that a case of a test takes, with its subprocesses and its part of shared
fixtures, of each test that takes more than its share. If a case takes longer than ``LONGEST``, the test is slow. Of
another test as many cases stay as fit in ``SHARE``, spread evenly over all of them, and at least one. So a new test is
in the fast lane until it was measured, and no mark has to be kept up by hand::

    make test PYTEST_ARGS="--store-durations"
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parent / "durations.json"
SHARE, LONGEST = 0.05, 0.2
DIGITS = 3


def test_of(nodeid: str) -> str:
    """The test that a case belongs to."""
    return nodeid.partition("[")[0]


def fast(cases: int, seconds: float) -> set[int]:
    """Return which of a test's cases, each of which takes ``seconds``, are in the fast lane."""
    if seconds > LONGEST:
        return set()
    count = min(cases, max(1, int(SHARE / max(seconds, 1e-9))))
    return {number * cases // count for number in range(count)}


def mark_slow(items: list[pytest.Item], durations: dict[str, float]) -> None:
    """Mark as slow what is not in the fast lane."""
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        tests[test_of(item.nodeid)].append(item)
    for name, cases in tests.items():
        stay = fast(len(cases), durations.get(name, 0.0))
        for number, item in enumerate(cases):
            if number not in stay:
                item.add_marker("slow")


def stored(file: Path = FILE) -> dict[str, float]:
    """Return the seconds of a case of each test that takes more than its share."""
    found: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


class Recorder:
    """A plugin that measures each case, in whichever process it runs, and writes the file in the main one."""

    def __init__(self, file: Path = FILE) -> None:
        self.file = file
        self._started = 0.0
        self._seconds: dict[str, list[float]] = defaultdict(list)

    @staticmethod
    def _now() -> float:
        children = os.times()
        return time.process_time() + children.children_user + children.children_system

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Generator[None, object, object]:
        self._started = self._now()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, object, object]:
        if call.when == "teardown":  # what stands here travels with the report to the main process
            item.user_properties.append(("seconds", self._now() - self._started))
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            seconds = dict(report.user_properties)["seconds"]
            assert isinstance(seconds, float)
            self._seconds[test_of(report.nodeid)].append(seconds)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(session.config, "workerinput"):
            kept = {name: seconds for name, seconds in stored(self.file).items() if name not in self._seconds}
            means = {
                name: round(sum(seconds) / len(seconds), DIGITS)
                for name, seconds in self._seconds.items()
                if sum(seconds) > SHARE
            }
            text = json.dumps(kept | means, indent=0, sort_keys=True)
            self.file.write_text(text + "\n", encoding="utf-8")
