"""What every test has: a fixed seed, one thread, and the real data where it is present."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import time
from collections.abc import Iterator
from functools import _lru_cache_wrapper, cache
from pathlib import Path

import lanes
import laws
import pytest
import torch
from hypothesis import settings

import normswap as ns

REPOSITORY = Path(__file__).resolve().parent.parent

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs, whose children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # nohup ignores it, and so would the processes that tests start
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

torch.set_num_threads(1)  # the order of a sum, and so its last digit, depends on it; tests run side by side

# A time limit per example would make a test's result depend on the machine's load.
settings.register_profile("normswap", deadline=None)
settings.load_profile("normswap")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store-durations", action="store_true", help=f"write what the tests took to {lanes.FILE.name}")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--store-durations"):
        config.pluginmanager.register(lanes.Recorder())


@pytest.hookimpl(tryfirst=True)  # before pytest itself leaves out what -m does not ask for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lanes.mark_slow(items, lanes.stored())


def pytest_collection_finish() -> None:
    _set_aside()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Let go of what the functions of a test module remember, when its last test has run."""
    module = getattr(item, "module", None)
    if nextitem is None or getattr(nextitem, "module", None) is not module:
        for value in vars(module).values():
            if isinstance(value, _lru_cache_wrapper) and value.__module__ == module.__name__:
                value.cache_clear()
        _set_aside()


_LEAST_SECONDS = 5.0
_set_aside_at = [-_LEAST_SECONDS]


def _set_aside() -> None:
    """Collect all cycles, and have later collections pass by what is left: a million objects, a second each time."""
    if time.monotonic() - _set_aside_at[0] > _LEAST_SECONDS:
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        _set_aside_at[0] = time.monotonic()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Start each test from the same random numbers, whichever tests ran before it."""
    # torch.manual_seed also stores the stack of its call, once for each other kind of device: 1 ms of each test.
    torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def torchlib_is_read_once() -> None:
    """Remember torch's translations to ONNX, which each export parses anew out of 500 functions: half of its time."""
    try:
        registration = importlib.import_module("torch.onnx._internal.exporter._registration")
        api = registration.onnxscript_apis
        api.get_torchlib_ops = cache(api.get_torchlib_ops)
    except (ImportError, AttributeError):  # another torch may have it elsewhere: exports are slower then
        return


@pytest.fixture(autouse=True, scope="session")
def _models_stay() -> Iterator[None]:
    """Hold each verb, in every test that calls one, to the promise that the model you pass stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        for name in laws.READ_ONLY:
            patch.setattr(ns, name, laws.reads_only(getattr(ns, name)))
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of real data and models: NORMSWAP_DATA, or ../shared/data beside the repository.

    Skips where there is none, but fails where NORMSWAP_DATA names a folder that does not exist.
    """
    named = os.environ.get("NORMSWAP_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if folder.is_dir():
        return folder
    if named:
        pytest.fail(f"NORMSWAP_DATA={named} is not a folder", pytrace=False)
    pytest.skip(f"no real data at {folder}: set NORMSWAP_DATA to its folder")
