"""A forward pass as a coroutine: it pauses inside hooks, where a site's output is made, and goes on with another one.

The forward is a user's code and cannot yield, so each pass runs in a thread of its own, which computes only while
someone waits for it: no two run at a time, and the order of all computations is always the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.runs.calling import Batch, first_input, run_on_data
from normswap.runs.paired_sites import PairedSite
from normswap.runs.uses import ADDITIONS, addends_of
from normswap.runs.writes import watched_here

__all__ = ["THREAD", "PausableRun", "Pause", "pausing_converted", "pausing_original"]

THREAD = "normswap-side-by-side"
"""The name of the threads that passes run in."""


@dataclass
class Pause:
    """A pause at a site.

    Args:
        name: The site's name.
        x: The source's input; in the original the reference (:class:`~normswap.runs.paired_sites.SiteBatch`).
        shortcut: The other addend, where the pass has paused at an addition.
        output: What the converted network goes on with; None lets it go on with what the site gives by then.
    """

    name: str
    x: Tensor
    shortcut: Tensor | None = None
    output: Tensor | None = None
    _versions: list[tuple[Tensor, int]] = field(init=False)

    def __post_init__(self) -> None:
        self._versions = [(self.x, _version(self.x))]

    def set_shortcut(self, shortcut: Tensor) -> None:
        """Set the other addend, now that it is known."""
        self.shortcut = shortcut
        self._versions.append((shortcut, _version(shortcut)))

    @property
    def valid(self) -> bool:
        """Whether its tensors still have the values that they had then: a forward may change them in place."""
        return all(_version(tensor) == version for tensor, version in self._versions)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class _Closed(BaseException):
    """Unwinds the forward of a run that is not going to be finished."""


_current = threading.local()


@dataclass
class PausableRun:
    """One network's pass over one batch, in a thread that computes only while someone waits for it.

    Args:
        model: The network.
        inputs: The batch.
        functional: The sites of functional norms, by the ids of their running means.
        paused: Where it is paused; None before the start and after the end.
        output: What the forward has returned.
        passed: Pauses of the original at sites that were run past and are still to be asked for.
        calls: How often each site was called.
        inputs_of: The present input of each source.
        pending: Outputs at whose addition the pass is to pause, by id, each with the pause and how to compute it anew.
    """

    model: nn.Module
    inputs: Batch
    functional: Mapping[int, PairedSite] = field(default_factory=dict)
    paused: Pause | None = None
    output: Any = None
    passed: dict[str, Pause] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    inputs_of: dict[str, Pause] = field(default_factory=dict)
    pending: dict[int, tuple[Tensor, Pause, Callable[[], Tensor] | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._go, self._here = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._closed = self._done = False
        self._device = torch.get_default_device()  # which is each thread's own
        self._watched = watched_here()

    def advance(self) -> None:
        """Compute up to the next pause, or to the end."""
        self.paused = None
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)
            self._thread.start()
        else:
            self._go.release()
        self._here.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def until(self, name: str) -> Pause | None:
        """Compute until the site ``name`` was reached, and return the pause there; None if it never is."""
        while name not in self.passed and not self._done:
            self.advance()
            if self.paused is not None:
                self.passed[self.paused.name] = self.paused
        return self.passed.get(name)

    def finish(self) -> Any:
        """Compute to the end and return the output."""
        while not self._done:
            self.passed.clear()
            self.advance()
        return self.output

    def close(self) -> None:
        """Give the pass up."""
        if self._thread is not None and self._thread.is_alive():
            self._closed = True
            self._go.release()
            self._thread.join()

    def pause(self, pause: Pause) -> None:
        """Wait, in the run's own thread, until someone wants more."""
        self.paused = pause
        self._here.release()
        self._go.acquire()
        if self._closed:
            raise _Closed

    def first_call(self, site: PairedSite) -> bool:
        """Count a call of ``site`` and tell whether it was the first."""
        self.calls[site.name] = self.calls.get(site.name, 0) + 1
        return self.calls[site.name] == 1

    def _work(self) -> None:
        _current.run = self
        try:
            with self._device, self._watched, _PauseInFunctions(self):
                self.output = run_on_data(self.model, self.inputs)
        except _Closed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.paused, self._done = None, True
            self._here.release()


def _current_run() -> PausableRun | None:
    """Return the run that the calling thread belongs to; None in a thread that is no such run's."""
    return getattr(_current, "run", None)


class _PauseInFunctions(TorchFunctionMode):
    """Pauses at the additions that pending outputs go into, and at functional norms, known by their buffers."""

    def __init__(self, run: PausableRun) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ADDITIONS and self.run.pending:
            addends = addends_of(args, kwargs)
            for mine, other in zip(addends, reversed(addends), strict=True):
                if id(mine) in self.run.pending:
                    output, pause, recompute = self.run.pending.pop(id(mine))
                    if not pause.valid:
                        break
                    pause.set_shortcut(other)
                    self.run.pause(pause)
                    if recompute is not None:
                        output.copy_(recompute())
                    break
        elif func is F.batch_norm and self.run.functional:
            given = dict(zip(("input", "running_mean"), args, strict=False)) | kwargs
            if site := self.run.functional.get(id(given.get("running_mean"))):
                _reach_original(self.run, site, given["input"])
        return func(*args, **kwargs)


def _reach_original(run: PausableRun, site: PairedSite, x: Tensor) -> None:
    if run.first_call(site):
        run.pause(Pause(site.name, x))


@contextmanager
def pausing_original(site: PairedSite, at_addition: bool) -> Iterator[None]:
    """Let runs of the original pause where the norm of ``site`` takes its input or at the addition of its output."""
    if site.original is None:  # known by its buffer
        yield
        return

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = _current_run()
        if run is not None and not at_addition:
            _reach_original(run, site, first_input(args, kwargs))

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        run = _current_run()
        if run is None or not (at_addition or site.alone) or not run.first_call(site):
            return
        if site.alone:
            run.pause(Pause(site.name, output))
        else:
            run.pending[id(output)] = output, Pause(site.name, first_input(args, kwargs)), None

    handles = [] if site.alone else [site.original.register_forward_pre_hook(before, with_kwargs=True)]
    handles.append(site.original.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def pausing_converted(site: PairedSite, at_addition: bool) -> Iterator[None]:
    """Let runs of the converted network pause where ``site`` has made its output, or at the addition of it.

    It goes on with what the site gives after the pause.
    """

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (run := _current_run()) is None:
            return
        x = first_input(args, kwargs)
        run.inputs_of.pop(site.name, None)
        # With anything beside its input, such as a transposed convolution's output size, it could not be run again.
        if len(args) + len(kwargs) == 1 and isinstance(x, Tensor):
            run.inputs_of[site.name] = Pause(site.name, x)

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        run = _current_run()
        if run is None:
            return None
        pause = run.inputs_of.pop(site.name, None)
        if not run.first_call(site) or pause is None or not pause.valid:
            return None

        def recompute() -> Tensor:
            return site.output(pause.x) if pause.output is None else pause.output.to(output.dtype)

        if at_addition:
            run.pending[id(output)] = output, pause, recompute
            return None
        run.pause(pause)
        return recompute()

    handles = [
        site.source.register_forward_pre_hook(before, with_kwargs=True),
        site.end.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
