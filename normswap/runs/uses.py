"""What becomes of a norm's output: whether it goes into a residual addition, into a ReLU, or anywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.operations.table import TABLE, called_by, named, written_by
from normswap.runs.calling import Batch, run_on_data

__all__ = ["ADDITIONS", "Uses", "addends_of", "find_uses"]

_IN_PLACE = written_by(named("add"))
ADDITIONS = called_by(named("add"))
_RELUS = frozenset[Any]().union(*(called_by(row) for row in TABLE.rows if row.floor == 0))
_CLAMPS = frozenset[Any]().union(*(called_by(row) for row in TABLE.rows if isinstance(row.floor, str)))


@dataclass(frozen=True)
class Uses:
    """What becomes of the outputs of some norms, by name.

    Args:
        into_addition: Those that go into one addition and nowhere else. Of two norms that are added to one another it
            is the one that runs first: mostly the last of a block's main branch.
        into_relu: Those that go into ReLUs and nowhere else.
        sum_into_relu: Those of ``into_addition`` whose sum goes into ReLUs and nowhere else.
    """

    into_addition: frozenset[str]
    into_relu: frozenset[str]
    sum_into_relu: frozenset[str]


def find_uses(model: nn.Module, norms: Mapping[str, nn.Module], inputs: Batch) -> Uses:
    """Run ``model`` and return what becomes of the outputs of ``norms``."""
    recorder = _UseRecorder()
    handles = [norm.register_forward_hook(partial(recorder.add_output, name)) for name, norm in norms.items()]
    try:
        with recorder:
            returned = run_on_data(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    recorder.add_use(None, returned)
    once = {name: recorder.uses.get(name, []) for name, calls in recorder.calls.items() if calls == 1}
    sums: dict[int, str] = {}
    for name, uses in once.items():
        if len(uses) == 1 and isinstance(uses[0], int):
            sums.setdefault(uses[0], name)
    return Uses(
        frozenset(sums.values()),
        frozenset(name for name, uses in once.items() if set(uses) == {_RELU}),
        frozenset(name for number, name in sums.items() if set(recorder.uses.get(number, [])) == {_RELU}),
    )


_RELU = "relu"


class _UseRecorder(TorchFunctionMode):
    """Records what each norm's output and each sum goes into: an addition, by its number, a ReLU, or else None."""

    def __init__(self) -> None:
        super().__init__()
        # By id, an output with its norm's name or a sum with its number. The tensors are held: no id comes again.
        self.outputs: dict[int, tuple[Tensor, str | int]] = {}
        self.uses: dict[str | int, list[int | str | None]] = {}
        self.calls: dict[str, int] = {}
        self.additions = 0

    def add_output(self, name: str, _: nn.Module, args: Any, output: Any) -> None:
        """Record the output of the norm ``name``, as a forward hook."""
        self.calls[name] = self.calls.get(name, 0) + 1
        if isinstance(output, Tensor):
            self.outputs[id(output)] = output, name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        addends = addends_of(args, kwargs) if func in ADDITIONS else ()
        addition = len(addends) == 2 and addends[0].shape == addends[1].shape and addends[0] is not addends[1]
        self.additions += addition
        known = addition and any(id(addend) in self.outputs for addend in addends)
        relu = _is_relu(func, args, kwargs)
        if getattr(func, "__name__", "") != "__get__":  # .shape and the like
            self.add_use(self.additions if addition else _RELU if relu else None, args, kwargs)
        if addition and func in _IN_PLACE:  # from now on this tensor holds the sum
            self.outputs.pop(id(addends[0]), None)
        result = func(*args, **kwargs)
        if known:
            self.outputs[id(result)] = result, self.additions
        elif relu and args and result is args[0]:  # in place: from now on this tensor holds what the ReLU gave
            self.outputs.pop(id(result), None)
        return result

    def add_use(self, what: int | str | None, *values: Any) -> None:
        """Record that ``values`` go into an addition, a ReLU, or into anything else."""
        for value in _nested(*values):
            if (found := self.outputs.get(id(value))) is not None:
                self.uses.setdefault(found[1], []).append(what)


def _is_relu(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a function gives zero or more and is zero below zero, as a ReLU or a ReLU6 is."""
    if func in _CLAMPS:
        least = args[1] if len(args) > 1 else kwargs.get("min_val", kwargs.get("min"))
        return isinstance(least, (int, float)) and least == 0
    return func in _RELUS


def addends_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
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
