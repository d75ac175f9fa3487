"""The perturbation test: a numeric check that a layer feeds its norm and nothing else, where no graph can show it.

Note [Perturbation test]
The test runs on a copy of the model. The layer's weight is replaced by random numbers except while the layer is being
called, and its output is replaced by random numbers, too. When the norm is handed those very numbers, or those with
the last axis moved to the place of the channels, it takes the true output in their stead. Whoever else reads the
weight, or uses or changes the output, computes something else than in a run of the unperturbed copy. The results of all
operations are compared, not the model's output alone: a detector that finds nothing returns nothing. Where the layer
feeds its norm and nothing else, all results are bit for bit the same; the tolerance is for operations that add in no
fixed order.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from normswap.runs.calling import other_arguments, run_on
from normswap.runs.cycles import new_cycles
from normswap.runs.guard import copy_of, set_mode, untouched
from normswap.runs.inputs import Inputs
from normswap.runs.other_sizes import other_sizes
from normswap.runs.settings import seed_generators
from normswap.runs.writes import kept

__all__ = ["Pair", "confirm_feeds"]

_SENSITIVITY = 1e-5
"""The smallest change of a result, relative to its largest value, that is seen: sums in no fixed order change less."""
_SAMPLES = 64
Pair = tuple[str, str]
"""A layer and its norm, by fqn."""


def confirm_feeds(
    model: nn.Module, pairs: Sequence[Pair], inputs: tuple[Any, ...] | Mapping[str, Any]
) -> dict[Pair, frozenset[bool]]:
    """Return the (layer, norm) pairs where the layer feeds the norm and nothing else, tested by runs on ``inputs``.

    Runs are in eval and, where the model runs in it, in train mode, on the inputs and on their negatives, which may
    take another way through a model that branches on values, with other values of its forward's optional arguments
    where those are few, and in eval mode on inputs near zero and of other sizes (Note [Perturbation test]). If all
    pairs together pass, each does; if not, they are halved until the wrong ones stand alone.

    Returns:
        The pairs that passed wherever they were called, each with the modes (train mode: True) in which it was called.
    """
    try:
        clone = copy_of(model)
    except Exception:  # a model that cannot be copied cannot be tried
        return {}
    good, called = list(pairs), {pair: set[bool]() for pair in pairs}
    for way in _ways(clone, inputs):
        if not good:
            break
        good, seen = _search(trial := _Trial(clone, *way), good)
        for pair in seen:
            called[pair].add(trial.training)
    return {pair: frozenset(called[pair]) for pair in good if called[pair]}


def _ways(model: nn.Module, inputs: Inputs) -> Iterator[tuple[Inputs, bool, float, Mapping[str, Any]]]:
    """Yield the ways to run ``model``: inputs, train flag, factor of the inputs, further arguments."""
    yield from product((inputs,), (False, True), (1, -1), ({}, *other_arguments(model, inputs)))
    yield inputs, False, 0.01, {}
    yield from ((other, False, 1, {}) for other in other_sizes(model, inputs))


def _search(trial: _Trial, pairs: list[Pair]) -> tuple[list[Pair], set[Pair]]:
    """Return the pairs that pass ``trial``, and those of them that it calls."""
    if not (pairs and trial.runs):
        return pairs, set()
    seen = trial.passes(pairs)
    if seen is not None:
        return pairs, seen
    if len(pairs) == 1:
        return [], set()
    half = len(pairs) // 2
    (left, a), (right, b) = _search(trial, pairs[:half]), _search(trial, pairs[half:])
    return left + right, a | b


class _Trial:
    """One way to run a model, and what every operation then gives.

    Args:
        model: A copy of the model, whose weights are written to and put back.
        inputs: The model's inputs.
        training: The train flag.
        factor: What the inputs are multiplied with.
        flags: Further arguments by keyword.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Any, ...] | Mapping[str, Any],
        training: bool,
        factor: float,
        flags: Mapping[str, Any],
    ) -> None:
        self.model, self.training, self.flags = model, training, flags

        def multiplied(x: Tensor) -> Tensor:
            return x * factor if x.is_floating_point() else x.clone()

        self.inputs = inputs
        self._multiplied = multiplied
        self._observer = _Observer()
        reference = self._run()
        self.runs = reference is not None
        self._reference = reference or []

    def _run(self, perturbations: Sequence[_Perturbation] = ()) -> list[_Summary] | None:
        """Return what one run computes, None where the model does not run or a perturbation has gone astray."""
        inputs = pytree.tree_map_only(Tensor, self._multiplied, self.inputs)
        with new_cycles() as collect, untouched(self.model), torch.no_grad():
            seed_generators(0)
            set_mode(self.model, self.training)
            self._observer.found = []
            try:
                with torch.compiler.set_stance("force_eager"), self._observer:
                    output = run_on(self.model, inputs, self.flags)
            except Exception:
                return None
            if any(one.astray(collect) for one in perturbations):
                return None
            kept = [*pytree.tree_leaves(output), *self.model.buffers()]
            return self._observer.found + [_summary(leaf) for leaf in kept]

    def passes(self, pairs: Sequence[Pair]) -> set[Pair] | None:
        """Return which of ``pairs`` the model calls, None where a perturbation is seen elsewhere than in its norm."""
        perturbations = [_Perturbation(self.model, *pair, self._observer) for pair in pairs]
        try:
            for one in perturbations:
                one.place()
            found = self._run(perturbations)
        finally:
            for one in perturbations:
                one.remove()
        if found is None or len(found) != len(self._reference):
            return None
        if not all(map(_same, found, self._reference)):
            return None
        return {pair for pair, one in zip(pairs, perturbations, strict=True) if one.calls}


class _Perturbation:
    """Random numbers in place of a layer's weight and output, which its norm alone takes back."""

    def __init__(self, model: nn.Module, layer: str, norm: str, observer: _Observer) -> None:
        self.observer = observer
        self.layer, self.norm = model.get_submodule(layer), model.get_submodule(norm)
        own = self.layer._parameters
        self.tensors = [t for t in (own.get("weight"), own.get("bias")) if t is not None]
        self.true = [t.detach().clone() for t in self.tensors]
        self.generator = torch.Generator().manual_seed(0)
        self.perturbed = [self._like(t) for t in self.true]
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.given: list[weakref.ref[Tensor]] = []
        self.calls, self.seen = 0, False
        self.handles: list[Any] = []

    def place(self) -> None:
        self._write(self.perturbed)
        self.handles = [
            self.layer.register_forward_pre_hook(self._before, prepend=True),
            self.layer.register_forward_hook(self._after),
            self.norm.register_forward_pre_hook(self._undo, prepend=True, with_kwargs=True),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self._write(self.true)

    def astray(self, collect: Callable[[], None]) -> bool:
        """Tell whether an output went elsewhere than into the norm, or is still held by someone after the run."""
        if self.seen or self.pending:
            return True
        if any(ref() is not None for ref in self.given):
            collect()
        return any(ref() is not None for ref in self.given)

    def _write(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad(), self.observer.paused(), kept():
            for tensor, value in zip(self.tensors, values, strict=True):
                tensor.copy_(value)

    def _like(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.generator).to(x)
        spread = x.float().abs().amax().to(x) if x.numel() else 1.0
        return torch.empty_like(x).copy_(noise * (spread + 1))

    def _before(self, layer: nn.Module, args: Any) -> None:
        self._write(self.true)

    def _after(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        self._write(self.perturbed)
        with self.observer.paused():
            noise = self._like(output)
            self.pending.append((noise.clone(), output))
        self.given.append(weakref.ref(noise))
        return noise

    def _undo(self, norm: nn.Module, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        with self.observer.paused():
            for i, (noise, output) in enumerate(self.pending):
                true = _in_place_of(x, noise, output)
                if true is not None:
                    del self.pending[i]
                    self.calls += bool(x.numel())
                    return ((true, *args[1:]), kwargs) if args else (args, {**kwargs, "input": true})
        self.seen = True
        return args, kwargs


def _in_place_of(x: Tensor, noise: Tensor, output: Tensor) -> Tensor | None:
    """Return ``output``, as it is or with its last axis as the norm's channels, where ``x`` is ``noise`` like that."""
    if noise.shape == x.shape and torch.equal(noise, x):
        return output
    if noise.ndim > 2 and noise.movedim(-1, 1).shape == x.shape and torch.equal(noise.movedim(-1, 1), x):
        return output.movedim(-1, 1)
    return None


_Summary = tuple[float, ...] | None


class _Observer(TorchDispatchMode):
    """Summarizes every result of every operation: what two runs are compared by."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[_Summary] = []
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Note nothing within."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._paused and _computes(func):
            self.found += [_summary(leaf) for leaf in pytree.tree_leaves(result)]
        return result


@cache
def _computes(func: torch._ops.OpOverload) -> bool:
    """Tell whether ``func`` gives new values: views, copies and memory that no one has written yet are none."""
    if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
        return False
    return not func._schema.name.startswith(
        ("aten::clone", "aten::copy_", "aten::empty", "aten::new_empty", "aten::resize")
    )


def _summary(value: Any) -> _Summary:
    """Return the sum and some of the values of a tensor, or a number; None for anything else."""
    if isinstance(value, (bool, int, float)):
        return (float(value),)
    if not isinstance(value, Tensor) or (value.is_complex() and not value.numel()):
        return None
    try:
        if value.is_complex():
            value = torch.view_as_real(value.resolve_conj())
        n = value.numel()
        places = torch.linspace(0, max(n - 1, 0), min(n, _SAMPLES), dtype=torch.float64).long().to(value.device)
        sample = value.take(places).double()
        value = value if value.dtype in (torch.float32, torch.float64) else value.double()
        return (float(torch.linalg.vector_norm(value)), *sample.tolist())
    except Exception:  # of a layout that cannot be read so; what is computed from it can
        return None


def _same(a: _Summary, b: _Summary) -> bool:
    if a is None or b is None or len(a) != len(b):
        return a is b
    size = max((abs(v) for v in b[1:] if math.isfinite(v)), default=0.0)
    ((x, *xs), (y, *ys)) = a, b
    allowed = (_SENSITIVITY * abs(y), *[_SENSITIVITY * size] * len(ys))
    pairs = zip((x, *xs), (y, *ys), allowed, strict=True)
    return all(abs(u - v) <= t if math.isfinite(u - v) else u == v or (u != u and v != v) for u, v, t in pairs)
