"""Many processes, each with its own share of the data: what it shows is put together, and all decide alike.

Within :func:`together` the functions of this module take part in collectives of the default process group of
``torch.distributed``; outside of it, and in one process, they return what they are given.

Note [An error of one is an error of all]
A collective waits for every process. One that has failed, or that does something else because its data differs, would
let the others wait for ever. So each collective begins with a meeting, in which the processes tell each other whether
they are well and what they are about to exchange. A process that fails goes to one more meeting, and raises its error;
the others hear of it at the meeting of whatever they do next, at the latest when they leave :func:`together`, and raise
an error that quotes it.

Note [Equal numbers]
What is summed is the same in all processes, bit by bit, but what a process computes of it may differ in the last digit
from machine to machine. Whatever decides how a computation goes on is therefore a sum, or process 0's (:func:`agreed`),
and so are the values that a model has in the end.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normswap.errors import InitializationError, InputError, first_line
from normswap.runs.calling import Batch

__all__ = [
    "agreed",
    "alone",
    "everywhere",
    "gathered",
    "in_step",
    "mean_over_rows",
    "objects",
    "offsets",
    "share",
    "summed",
    "summed_by_name",
    "take_first",
    "together",
    "variance_over_rows",
]


class _ElsewhereError(InitializationError):
    """Another process has failed, or does something else; all processes know."""


class _Group:
    """The default process group, as its processes use it within :func:`together`."""

    def __init__(self) -> None:
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        on_cpu = "cpu:" in str(dist.get_backend_config())
        self.device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())

    def meet(self, step: str, failed: BaseException | None = None) -> None:
        """Wait for all processes, and raise where one has failed or is at another step."""
        state = torch.tensor([failed is not None, zlib.crc32(step.encode())], device=self.device)
        states = [torch.empty_like(state) for _ in range(self.size)]
        dist.all_gather(states, state)
        lost, codes = zip(*(one.tolist() for one in states), strict=True)
        if not any(lost) and len(set(codes)) == 1:
            return
        told: list[str] = [""] * self.size
        dist.all_gather_object(told, step if failed is None else str(getattr(failed, "message", first_line(failed))))
        if failed is not None:
            return
        if any(lost):
            rank = lost.index(1)
            raise _ElsewhereError(
                f"process {rank} failed: {told[rank]}",
                code="another-process-failed",
                hint="its own error says more; nothing was changed in the others",
            )
        other = next(rank for rank, code in enumerate(codes) if code != codes[0])
        raise _ElsewhereError(
            f"the processes do different things: process 0 is at {told[0]}, process {other} at {told[other]}",
            code="processes-differ",
            hint="call with the same arguments in all of them, each with data that reaches the same modules",
        )


_current: ContextVar[_Group | None] = ContextVar("processes", default=None)


@contextmanager
def together(wanted: bool = True) -> Iterator[None]:
    """Work with all processes of the default group, each of which must enter this; in one process, or none, alone.

    Raises:
        InitializationError: Another process has failed (Note [An error of one is an error of all]).
    """
    many = wanted and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not many or _current.get() is not None:
        yield
        return
    group = _Group()
    token = _current.set(group)
    try:
        yield
        group.meet("the end")
    except _ElsewhereError:
        raise
    except BaseException as error:
        group.meet("", error)
        raise
    finally:
        _current.reset(token)


def alone() -> bool:
    """Tell whether this process works by itself."""
    return _current.get() is None


def share(count: int) -> int:
    """Return how much of ``count`` one process takes."""
    group = _current.get()
    return count if group is None else -(-count // group.size)


@torch.no_grad()
def summed(step: str, *values: Tensor) -> tuple[Tensor, ...]:
    """Return each tensor's sum over the processes, in its own dtype; ``step`` says of what, for errors."""
    group = _current.get()
    if group is None:
        return values
    group.meet(f"{step}, {[tuple(value.shape) for value in values]}")
    whole = torch.cat([value.detach().reshape(-1).to(group.device, torch.float64) for value in values])
    dist.all_reduce(whole)
    parts = whole.split([value.numel() for value in values])
    return tuple(part.view_as(value).to(value) for part, value in zip(parts, values, strict=True))


def summed_by_name(step: str, values: Mapping[str, Sequence[Tensor]]) -> dict[str, tuple[Tensor, ...]]:
    """Return the sums of what stands under each name; a process that has nothing there adds nothing."""
    if alone():
        return {name: tuple(own) for name, own in values.items()}
    shapes: dict[str, list[tuple[tuple[int, ...], torch.dtype]]] = {}
    for own in objects(step, {name: [(tuple(t.shape), t.dtype) for t in one] for name, one in values.items()}):
        shapes |= own
    device = next((t.device for one in values.values() for t in one), None)
    found = {}
    for name, forms in shapes.items():
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in forms]
        found[name] = summed(f"{step} of '{name}'", *values.get(name, zeros))
    return found


def mean_over_rows(step: str, rows: Tensor) -> Tensor:
    """Return the mean over axis 0 of all processes' rows, summed up in float64."""
    total, count = summed(step, rows.sum(0, dtype=torch.float64), torch.tensor(float(len(rows))))
    return (total / count.to(total.device)).to(rows.dtype)


def variance_over_rows(step: str, rows: Tensor) -> Tensor:
    """Return the mean squared distance from the mean, over axis 0 of all processes' rows."""
    return mean_over_rows(f"{step}, squared", (rows - mean_over_rows(step, rows)).square())


@torch.no_grad()
def gathered(step: str, rows: Tensor) -> Tensor:
    """Return all processes' rows, one process after the other; along axis 0 they may differ in number."""
    group = _current.get()
    if group is None:
        return rows
    counts = objects(f"{step}, {tuple(rows.shape[1:])}, {rows.dtype}", len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:], device=group.device)
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(rows.device)


@torch.no_grad()
def take_first(step: str, tensors: Sequence[Tensor]) -> None:
    """Give ``tensors`` the values that they have in process 0."""
    group = _current.get()
    if group is None:
        return
    group.meet(f"{step}, {[tuple(tensor.shape) for tensor in tensors]}")
    for tensor in tensors:
        carried = tensor.detach().to(group.device, copy=True)
        dist.broadcast(carried, 0)
        tensor.copy_(carried)


def agreed(step: str, value: float) -> float:
    """Return process 0's number."""
    number = torch.tensor(value, dtype=torch.float64)
    take_first(step, [number])
    return float(number)


def everywhere(step: str, flag: bool) -> bool:
    """Tell whether ``flag`` holds in all processes."""
    return all(objects(step, flag))


def objects(step: str, value: Any) -> list[Any]:
    """Return each process's value, which holds no tensors: they would come with its device."""
    group = _current.get()
    if group is None:
        return [value]
    group.meet(step)
    found = [None] * group.size
    dist.all_gather_object(found, value)
    return found


def offsets(step: str, counts: Sequence[int]) -> tuple[list[int], int]:
    """Return how many samples come before each of this process's batches, and how many there are in all.

    All processes' first batches come first, then their second ones: as a distributed sampler deals samples out.

    Args:
        step: What is counted, for errors.
        counts: The number of samples in each of this process's batches.
    """
    group = _current.get()
    every = objects(step, list(counts))
    mine = 0 if group is None else group.rank
    found, before = [], 0
    for k in range(max(map(len, every))):
        for rank, own in enumerate(every):
            if k < len(own):
                if rank == mine:
                    found.append(before)
                before += own[k]
    return found, before


def in_step(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield as many batches as all processes have, for runs that wait for each other.

    Raises:
        InputError: One has more of them than another.
    """
    left = iter(batches)
    while True:
        batch = next(left, None)
        more = objects("a batch", batch is not None)
        if batch is None and not any(more):
            return
        if batch is None or not all(more):
            raise InputError(
                "the model has synchronized norms, and the processes have different numbers of batches",
                code="processes-differ",
                hint="give all of them as many, as a DistributedSampler does",
            )
        yield batch
