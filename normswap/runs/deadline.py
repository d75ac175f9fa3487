"""A bound on how long a model runs, for runs that may be left out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["RanTooLong", "at_most"]


class RanTooLong(BaseException):
    """The time is over; no ``except Exception`` of a model's forward catches it."""


class _Clock(TorchFunctionMode):
    """Looks at the clock before each operation."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.end = time.monotonic() + seconds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.monotonic() > self.end:
            raise RanTooLong
        return func(*args, **(kwargs or {}))


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """End what runs in the block at the first operation after so many seconds.

    What is compiled runs eagerly here: neither a compilation nor a compiled kernel can be ended.

    Raises:
        RanTooLong: The time is over.
    """
    with torch.compiler.set_stance("force_eager"), _Clock(seconds):
        yield
