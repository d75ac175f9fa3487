"""What a forward may change beside its model: random generators, and torch's settings of the whole process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch

__all__ = ["seed_generators", "settings", "settings_kept"]


@contextmanager
def settings_kept() -> Iterator[None]:
    """Restore the random generators of torch, Python and NumPy and torch's settings on leaving."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    before = settings()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if device := _initialized_accelerator():
            devices = list(range(torch.get_device_module(device).device_count()))
            stack.enter_context(torch.random.fork_rng(devices, device_type=device))
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            for (read, write), value in zip(_SETTINGS, before, strict=True):
                if read() != value:
                    write(value)


def settings() -> list[Any]:
    """Return torch's settings, as they are now."""
    return [read() for read, _ in _SETTINGS]


def seed_generators(seed: int) -> None:
    """Seed the generators of torch, Python and NumPy; within :func:`settings_kept`, which restores them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _initialized_accelerator() -> str | None:
    """Return the type of the accelerator in use, whose generators a forward may draw from."""
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    assert device is not None
    in_use = getattr(torch.get_device_module(device), "is_initialized", lambda: True)()
    return device.type if in_use else None


_Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


def _attribute(holder: Any, name: str) -> _Setting:
    return (lambda: getattr(holder, name)), (lambda value: setattr(holder, name, value))


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _autocast(device: str) -> tuple[_Setting, ...]:
    return (
        (lambda: torch.is_autocast_enabled(device), lambda value: torch.set_autocast_enabled(device, value)),
        (lambda: torch.get_autocast_dtype(device), lambda value: torch.set_autocast_dtype(device, value)),
    )


def _seeds_for_later(module: ModuleType) -> tuple[_Setting, ...]:
    """What ``torch.manual_seed`` keeps for a device that is not in use yet, and which it gets once it is."""
    kept = getattr(module, "_lazy_seed_tracker", None)
    return () if kept is None else ((lambda: dict(vars(kept)), vars(kept).update),)


_SETTINGS: tuple[_Setting, ...] = (
    (torch.is_grad_enabled, torch._C._set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, torch.set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (_deterministic, lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    *(_attribute(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")),
    _attribute(torch.backends.cuda.matmul, "allow_tf32"),
    *_autocast("cpu"),
    *_autocast("cuda"),
    *_seeds_for_later(torch.cuda),
    *_seeds_for_later(torch.xpu),
)
"""How each setting is read and written."""
