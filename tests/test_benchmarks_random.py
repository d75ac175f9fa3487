"""The benchmark on random networks tells refusals that nothing could avoid from others."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "random_networks.py"
    spec = importlib.util.spec_from_file_location("benchmarks_random_networks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_refusal_on_purpose_is_told_from_another(benchmark: ModuleType) -> None:
    refusals = Counter(
        {
            "read-elsewhere: the forward of Net asks for its class, and a new norm is of another one": 3,
            "read-elsewhere: the model reads its parameters or statistics outside of its call": 2,
            "functional-norm: it is a call in the forward of …, which cannot be rewritten (…): make it a module": 4,
            "unknown-forward: the forward of ReluNorm cannot be traced (TraceError), so what it does is unknown": 1,
            "recipe-refuses: a group of one value": 5,
            "functional-norm: its eps is computed in the forward": 6,
        }
    )
    count = benchmark.Count(networks=1, norms=1000, refusals=refusals, unlisted=7)
    found = benchmark.on_purpose(count)
    assert sorted(found.values()) == [1, 2, 3, 4 + 7]
    assert "refused    17 on purpose, and 11 others: 1.1%" in benchmark.report(count)


def test_the_counts_of_a_few_networks(benchmark: ModuleType) -> None:
    count = benchmark.count_chunk(1, 4)
    assert count.networks == 4
    assert not count.broken
