"""Run a model and its converted copy side by side: all batches together, site after site, each layer computed once.

Note [Lock step]
Fitting a site needs what reaches it in the converted network, which hangs on how all sites before it were fitted, and
what the original gives there. Running both networks from the start for every site would cost depth squared. Here each
batch runs through each network in a thread of its own that is paused, inside a hook, where a site's output is made.
When all batches have arrived the site is fitted, its output is computed anew, and they go on. One thread runs at a
time, so the order, and with it the result, is always the same; what is alive is what the forwards hold at one site. No
graph is needed: a model that cannot be traced runs as well as any other.

Note [Where a block's error can still be made good]
In a residual network the norm's output is added to a shortcut on which the converted network's errors travel along.
Where a norm's output goes into an addition and nowhere else, the site is therefore fitted there, when both addends are
known: its output takes up the error of the other addend. A first run of both networks shows where that is, and also
where a norm's output, or that sum, goes into a ReLU and nowhere else: what lies below zero is then not seen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.errors import InitializationError
from normswap.operations.table import TABLE, called_by, named, written_by
from normswap.runs.calling import Batch, first_input, run_on, run_on_data
from normswap.runs.guard import set_mode, untouched

__all__ = [
    "ADDITIONS",
    "THREAD",
    "Place",
    "Uses",
    "Visit",
    "at_positions",
    "find_uses",
    "run_side_by_side",
    "tensors_of",
]

THREAD = "normswap-lockstep"
"""The name of the threads that passes run in."""

ADDITIONS = called_by(named("add"))
_IN_PLACE = written_by(named("add"))
_RELUS = frozenset[Any]().union(*(called_by(row) for row in TABLE.rows if row.floor == 0))
_CLAMPS = frozenset[Any]().union(*(called_by(row) for row in TABLE.rows if isinstance(row.floor, str)))


@dataclass(frozen=True)
class Place:
    """Where a site lies in both networks.

    Args:
        name: The site's name.
        source: The converted network's module whose weights are fitted: a layer or a per-channel affine.
        norm: The converted network's norm behind it; None where a layer is fitted alone.
        original: The original's norm module, or the layer where it is fitted alone; None for a functional norm.
        running_mean: The functional norm's buffer, by which its calls are known.
    """

    name: str
    source: nn.Module
    norm: nn.Module | None
    original: nn.Module | None
    running_mean: Tensor | None = None

    @property
    def end(self) -> nn.Module:
        """The converted network's module whose output is the site's."""
        return self.source if self.norm is None else self.norm

    def output(self, x: Tensor) -> Tensor:
        """Return what the converted network gives here for the source's input ``x``."""
        y: Tensor = self.source(x)
        return y if self.norm is None else self.norm(y)


@dataclass(frozen=True)
class Visit:
    """What one batch brings to a site.

    Args:
        x: The source's input in the converted network.
        reference: The input of the original's norm; its output where a layer is fitted alone.
        beside: Where the site is fitted at an addition, the other addend in the original and in the converted network.
        rectified: Whether of the site's output, or of that sum, only what lies above zero is seen.
    """

    x: Tensor
    reference: Tensor
    beside: tuple[Tensor, Tensor] | None = None
    rectified: bool = False

    @property
    def cut(self) -> Tensor | None:
        """The value below which the site's output is not seen, shaped as it; None where all of it is."""
        if not self.rectified:
            return None
        return torch.zeros_like(self.reference) if self.beside is None else -self.beside[1]

    def at(self, index: Tensor) -> Visit:
        """Return the same at some positions, counted through all samples, as if each were a sample of its own."""
        beside = None
        if self.beside is not None:
            beside = at_positions(self.beside[0], index), at_positions(self.beside[1], index)
        return Visit(self.x, at_positions(self.reference, index), beside, self.rectified)

    def split(self, size: int) -> Iterator[Visit]:
        """Return the same for at most ``size`` samples at a time."""
        for first in range(0, len(self.x), size):
            part = slice(first, first + size)
            beside = None if self.beside is None else (self.beside[0][part], self.beside[1][part])
            yield Visit(self.x[part], self.reference[part], beside, self.rectified)


def at_positions(value: Tensor, index: Tensor) -> Tensor:
    """Return the channels of ``(N, C, …)`` at some positions, counted through all samples. ``(len(index), C)``"""
    if value.ndim == 2:
        return value[index]
    value = value.flatten(2)
    positions = value.shape[2]
    return value[index // positions, :, index % positions]


def run_side_by_side(
    original: nn.Module,
    converted: nn.Module,
    places: Sequence[Place],
    batches: Sequence[Batch],
    fit: Callable[[Place, Sequence[Visit]], Sequence[Tensor] | None],
) -> None:
    """Run both networks over ``batches`` and call ``fit`` once for each place, in the order of execution.

    Args:
        original: The original; left as it was.
        converted: The converted network, of which only what ``fit`` changes of its parameters in place stays changed.
        places: The sites, in execution order as far as it is known.
        batches: The inputs of each forward pass.
        fit: Fits one site to all its visits, and returns what the converted network goes on with after each of them;
            None lets it go on with what the site gives now. A place that is called more than once is fitted at its
            first call.

    Raises:
        InputError: The forward fails.
        InitializationError: The forward computes otherwise when it is paused.
    """
    rank = {place.name: i for i, place in enumerate(places)}
    by_name = {place.name: place for place in places}
    fitted: set[str] = set()
    with ExitStack() as stack:
        stack.enter_context(untouched(original, values=True))
        stack.enter_context(untouched(converted, values=True))
        set_mode(original, False)
        set_mode(converted, False)
        norms = [place for place in places if place.norm is not None and place.original is not None]
        # In both networks: what a BatchNorm with an activation gives is not what the new norm before it gives.
        added = find_uses(original, {p.name: p.original for p in norms if p.original}, batches[0]).added
        uses = find_uses(converted, {p.name: p.end for p in places if p.norm is not None}, batches[0])
        added &= uses.added
        functional = {id(p.running_mean): p for p in places if p.original is None}
        firsts = [_Run(original, inputs, functional) for inputs in batches]
        seconds = [_Run(converted, inputs) for inputs in batches]
        for run in (*firsts, *seconds):
            stack.callback(run.close)
        for place in places:
            stack.enter_context(_watch_original(place, place.name in added))
            stack.enter_context(_watch_converted(place, place.name in added))
        for run in seconds:
            run.advance()
        while paused := [run for run in seconds if run.event is not None]:
            name = min((run.event.name for run in paused if run.event is not None), key=rank.__getitem__)
            visits, visitors = [], []
            arrived = [(a, b) for a, b in zip(firsts, seconds, strict=True) if b.event and b.event.name == name]
            if name not in fitted:
                for first, second in arrived:
                    here, there = second.event, first.until(name)
                    assert here is not None
                    if there is None or not there.valid:
                        continue
                    beside = None
                    if there.beside is not None and here.beside is not None:
                        one_shape = here.beside.shape == there.beside.shape == there.x.shape
                        beside = (there.beside, here.beside) if one_shape else None
                    rectified = name in (uses.rectified_sums if beside is not None else uses.rectified)
                    visits.append(Visit(here.x, there.x, beside, rectified))
                    visitors.append(here)
                if visits:
                    outputs = fit(by_name[name], visits)
                    fitted.add(name)
                    for here, output in zip(visitors, outputs or (), strict=outputs is not None):
                        here.output = output
            for first, second in arrived:
                first.found.pop(name, None)
                second.advance()
        output = firsts[0].finish()
    _check_undisturbed(original, batches[0], output)


@dataclass
class _Event:
    """A pause at a place: the source's input (in the original: the reference), the other addend, what to go on with."""

    name: str
    x: Tensor
    beside: Tensor | None = None
    output: Tensor | None = None
    _versions: list[tuple[Tensor, int]] = field(init=False)

    def __post_init__(self) -> None:
        self._versions = [(self.x, _version(self.x))]

    def set_beside(self, beside: Tensor) -> None:
        """Set the other addend, now that it is known."""
        self.beside = beside
        self._versions.append((beside, _version(beside)))

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
class _Run:
    """One network's pass over one batch, in a thread that computes only while someone waits for it.

    Args:
        model: The network.
        inputs: The batch.
        functional: The places of functional norms, by the ids of their running means.
        event: Where it is paused; None before the start and after the end.
        output: What the forward has returned.
        found: Events of the original that were passed by and are still to be asked for.
        calls: How often each place was called.
        inputs_of: The present input of each source.
        pending: Outputs that are to be fitted at the addition which takes them, by id, with their place's event.
    """

    model: nn.Module
    inputs: Batch
    functional: Mapping[int, Place] = field(default_factory=dict)
    event: _Event | None = None
    output: Any = None
    found: dict[str, _Event] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    inputs_of: dict[str, _Event] = field(default_factory=dict)
    pending: dict[int, tuple[Tensor, _Event, Callable[[], Tensor] | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._go, self._here = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._closed = self._done = False
        self._device = torch.get_default_device()  # which is each thread's own

    def advance(self) -> None:
        """Compute up to the next pause, or to the end."""
        self.event = None
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)
            self._thread.start()
        else:
            self._go.release()
        self._here.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def until(self, name: str) -> _Event | None:
        """Compute until the place ``name`` was reached, and return what was found there; None if it never is."""
        while name not in self.found and not self._done:
            self.advance()
            if self.event is not None:
                self.found[self.event.name] = self.event
        return self.found.get(name)

    def finish(self) -> Any:
        """Compute to the end and return the output."""
        while not self._done:
            self.found.clear()
            self.advance()
        return self.output

    def close(self) -> None:
        """Give the pass up."""
        if self._thread is not None and self._thread.is_alive():
            self._closed = True
            self._go.release()
            self._thread.join()

    def pause(self, event: _Event) -> None:
        """Wait, in the run's own thread, until someone wants more."""
        self.event = event
        self._here.release()
        self._go.acquire()
        if self._closed:
            raise _Closed

    def first_call(self, place: Place) -> bool:
        """Count a call of ``place`` and tell whether it was the first."""
        self.calls[place.name] = self.calls.get(place.name, 0) + 1
        return self.calls[place.name] == 1

    def _work(self) -> None:
        _current.run = self
        try:
            with self._device, _Additions(self):
                self.output = run_on_data(self.model, self.inputs)
        except _Closed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.event, self._done = None, True
            self._here.release()


def _present() -> _Run | None:
    return getattr(_current, "run", None)


class _Additions(TorchFunctionMode):
    """Pauses at the addition of an output that is to be fitted there, and knows functional norms by their buffers."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ADDITIONS and self.run.pending:
            addends = _addends(args, kwargs)
            for mine, other in zip(addends, reversed(addends), strict=True):
                if id(mine) in self.run.pending:
                    output, event, again = self.run.pending.pop(id(mine))
                    if not event.valid:
                        break
                    event.set_beside(other)
                    self.run.pause(event)
                    if again is not None:
                        output.copy_(again())
                    break
        elif func is F.batch_norm and self.run.functional:
            given = dict(zip(("input", "running_mean"), args, strict=False)) | kwargs
            if place := self.run.functional.get(id(given.get("running_mean"))):
                _reach_original(self.run, place, given["input"])
        return func(*args, **kwargs)


def _reach_original(run: _Run, place: Place, x: Tensor) -> None:
    if run.first_call(place):
        run.pause(_Event(place.name, x))


@contextmanager
def _watch_original(place: Place, added: bool) -> Iterator[None]:
    """Pause the original where ``place``'s norm takes its input or, where it is added, at that addition."""
    if place.original is None:  # known by its buffer
        yield
        return

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = _present()
        if run is not None and not added:
            _reach_original(run, place, first_input(args, kwargs))

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        run = _present()
        if run is None or not (added or place.norm is None) or not run.first_call(place):
            return
        if place.norm is None:
            run.pause(_Event(place.name, output))
        else:
            run.pending[id(output)] = output, _Event(place.name, first_input(args, kwargs)), None

    alone = place.norm is None
    handles = [] if alone else [place.original.register_forward_pre_hook(before, with_kwargs=True)]
    handles.append(place.original.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watch_converted(place: Place, added: bool) -> Iterator[None]:
    """Pause the converted network where ``place`` has made its output; it goes on with the fitted one."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (run := _present()) is None:
            return
        x = first_input(args, kwargs)
        run.inputs_of.pop(place.name, None)
        # With anything beside its input, such as a transposed convolution's output size, it could not be run again.
        if len(args) + len(kwargs) == 1 and isinstance(x, Tensor):
            run.inputs_of[place.name] = _Event(place.name, x)

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        run = _present()
        if run is None:
            return None
        event = run.inputs_of.pop(place.name, None)
        if not run.first_call(place) or event is None or not event.valid:
            return None

        def again() -> Tensor:
            return place.output(event.x) if event.output is None else event.output.to(output.dtype)

        if added:
            run.pending[id(output)] = output, event, again
            return None
        run.pause(event)
        return again()

    handles = [
        place.source.register_forward_pre_hook(before, with_kwargs=True),
        place.end.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Uses:
    """What becomes of the outputs of some norms, by name.

    Args:
        added: Those that go into one addition and nowhere else. Of two norms that are added to one another it is the
            one that runs first: mostly the last of a block's main branch.
        rectified: Those that go into ReLUs and nowhere else.
        rectified_sums: Those of ``added`` whose sum goes into ReLUs and nowhere else.
    """

    added: frozenset[str]
    rectified: frozenset[str]
    rectified_sums: frozenset[str]


def find_uses(model: nn.Module, norms: Mapping[str, nn.Module], inputs: Batch) -> Uses:
    """Run ``model`` and return what becomes of the outputs of ``norms``."""
    pilot = _Pilot()
    handles = [norm.register_forward_hook(partial(pilot.note, name)) for name, norm in norms.items()]
    try:
        with pilot:
            returned = run_on_data(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    pilot.use(None, returned)
    once = {name: pilot.uses.get(name, []) for name, calls in pilot.calls.items() if calls == 1}
    sums: dict[int, str] = {}
    for name, uses in once.items():
        if len(uses) == 1 and isinstance(uses[0], int):
            sums.setdefault(uses[0], name)
    return Uses(
        frozenset(sums.values()),
        frozenset(name for name, uses in once.items() if set(uses) == {_RELU}),
        frozenset(name for number, name in sums.items() if set(pilot.uses.get(number, [])) == {_RELU}),
    )


_RELU = "relu"


class _Pilot(TorchFunctionMode):
    """Notes what each norm's output and each sum goes into: an addition, by its number, a ReLU, or else None."""

    def __init__(self) -> None:
        super().__init__()
        # By id, an output with its norm's name or a sum with its number. The tensors are held: no id comes again.
        self.outputs: dict[int, tuple[Tensor, str | int]] = {}
        self.uses: dict[str | int, list[int | str | None]] = {}
        self.calls: dict[str, int] = {}
        self.additions = 0

    def note(self, name: str, _: nn.Module, args: Any, output: Any) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        if isinstance(output, Tensor):
            self.outputs[id(output)] = output, name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        addends = _addends(args, kwargs) if func in ADDITIONS else ()
        addition = len(addends) == 2 and addends[0].shape == addends[1].shape and addends[0] is not addends[1]
        self.additions += addition
        known = addition and any(id(addend) in self.outputs for addend in addends)
        rectifies = _rectifies(func, args, kwargs)
        if getattr(func, "__name__", "") != "__get__":  # .shape and the like
            self.use(self.additions if addition else _RELU if rectifies else None, args, kwargs)
        if addition and func in _IN_PLACE:  # what is called by this name from now on is the sum
            self.outputs.pop(id(addends[0]), None)
        result = func(*args, **kwargs)
        if known:
            self.outputs[id(result)] = result, self.additions
        elif rectifies and args and result is args[0]:  # in place: what is called by this name is rectified from now on
            self.outputs.pop(id(result), None)
        return result

    def use(self, what: int | str | None, *values: Any) -> None:
        """Note that ``values`` go into an addition, a ReLU, or into anything else."""
        for value in _nested(*values):
            if (found := self.outputs.get(id(value))) is not None:
                self.uses.setdefault(found[1], []).append(what)


def _rectifies(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a function lets nothing through that is below zero, as a ReLU does, or a ReLU6."""
    if func in _CLAMPS:
        least = args[1] if len(args) > 1 else kwargs.get("min_val", kwargs.get("min"))
        return isinstance(least, (int, float)) and least == 0
    return func in _RELUS


def _addends(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return what an addition adds where that is two tensors as they are, else nothing."""
    values = (*args, *(kwargs[name] for name in ("input", "other") if name in kwargs))
    plain = len(values) == 2 and kwargs.get("alpha", 1) == 1 and kwargs.get("out") is None
    return values if plain and all(isinstance(value, Tensor) for value in values) else ()


def _nested(*values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _nested(*value)
        elif isinstance(value, dict):
            yield from _nested(*value.values())


def _check_undisturbed(model: nn.Module, inputs: Batch, output: Any) -> None:
    """Refuse a model whose forward keeps state of its own between its layers: paused batches would mix it up.

    One that draws random numbers is refused, too: both networks would draw others.
    """
    with untouched(model, values=True):
        set_mode(model, False)
        plain = run_on(model, inputs)
    expected, found = tensors_of(plain), tensors_of(output)
    if len(expected) != len(found) or not all(map(_same, expected, found)):
        raise InitializationError(
            "the model gives another output when it is paused between its layers: its forward keeps state or is random",
            code="calibration-state",
            hint="calibrate with one batch if it keeps state, or convert with init='absorb'",
        )


def _same(a: Tensor, b: Tensor) -> bool:
    finite = a[a.isfinite()].abs()
    size = float(finite.amax()) if finite.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3 * size, equal_nan=True)


def tensors_of(value: Any) -> list[Tensor]:
    """Return the floating-point tensors in a nested output, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors_of(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_of(v)]
    return []
