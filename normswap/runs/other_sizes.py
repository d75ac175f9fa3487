"""Inputs of other sizes, on which a forward may take another branch than on those that are given.

Note [Other sizes]
Tried are one sample, two and one more, maps of half the size and of one place more, and sequences of half the length. A
forward may compare with any other size: so the model is run once on tensors that have symbols for sizes and no values,
which tells what its code asks of them, and for each condition sizes are looked for that break it. Where that run ends,
at a branch on a value, the conditions until then are known. The model need not run on what comes of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normswap.runs.calling import run_on
from normswap.runs.guard import set_mode, untouched
from normswap.runs.sizes import Condition, Sizes, as_condition, breaking

__all__ = ["AxisNames", "asked_of_sizes", "other_sizes"]

_Inputs = tuple[Any, ...] | Mapping[str, Any]
AxisNames = Sequence[Mapping[int, str]]
"""The names of the axes that may have another size, by the axis, for each leaf of the inputs."""


def other_sizes(model: nn.Module, inputs: _Inputs) -> Iterator[_Inputs]:
    """Yield inputs of other sizes, see Note [Other sizes].

    Args:
        model: The model; only read.
        inputs: Its inputs.
    """
    leaves, spec = pytree.tree_flatten(inputs)
    names = _named_axes(leaves)
    given = {name: leaf.shape[axis] for leaf, axes in zip(leaves, names, strict=True) for axis, name in axes.items()}
    values = max(sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor)), 1)

    def at(sizes: Sizes) -> _Inputs:
        changed = [_resized(leaf, axes, sizes) for leaf, axes in zip(leaves, names, strict=True)]
        return cast(_Inputs, pytree.tree_unflatten(changed, spec))

    tried = list(_usual(given))
    yield from map(at, tried)

    def conditions_at(sizes: Sizes) -> list[Condition]:
        return asked_of_sizes(model, at(sizes), names)

    for sizes, _ in breaking(conditions_at, given, tried, values, lambda sizes: _runs(model, at(sizes))):
        yield at(sizes)


def _named_axes(leaves: list[Any]) -> list[dict[int, str]]:
    """Name the axes: "batch" the first, where all tensors have one size there; each other by its leaf and place.

    The second axis of a map holds channels, and so does that of a vector.
    """
    samples = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
    found: list[dict[int, str]] = []
    for place, leaf in enumerate(leaves):
        strided = isinstance(leaf, Tensor) and leaf.layout is torch.strided and leaf.numel() > 0
        axes = range(leaf.ndim) if strided else range(0)
        second = len(axes) == 3 or (strided and not leaf.is_floating_point())
        named = {axis: f"size{place}_{axis}" for axis in axes if axis > 1 or (axis == 1 and second)}
        found.append({0: "batch", **named} if axes and len(samples) == 1 else named)
    return found


def _usual(given: Sizes) -> Iterator[Sizes]:
    """Yield the sizes that are tried of any model; axes behind the second are taken together."""
    if "batch" in given:
        yield from ({**given, "batch": n} for n in (1, 2, given["batch"] + 1) if n != given["batch"])
    second = [name for name in given if name.endswith("_1")]
    inner = [name for name in given if name != "batch" and name not in second]
    for names in (inner, second):
        if names:
            yield {**given, **{name: max(given[name] // 2, 1) for name in names}}
    if inner:
        yield {**given, **{name: given[name] + 1 for name in inner}}


def _resized(leaf: Any, axes: Mapping[int, str], sizes: Sizes) -> Any:
    """Return a tensor with other sizes, its own places repeated."""
    for axis, name in axes.items():
        n, size = leaf.shape[axis], sizes[name]
        if size != n:
            leaf = leaf.index_select(axis, torch.arange(size, device=leaf.device) % n)
    return leaf


def _runs(model: nn.Module, inputs: _Inputs) -> bool:
    with suppress(Exception), untouched(model):
        set_mode(model, False)
        run_on(model, inputs)
        return True
    return False


def asked_of_sizes(model: nn.Module, inputs: _Inputs, names: AxisNames) -> list[Condition]:
    """Return what the code of ``model`` asks of the sizes on ``inputs``, as far as torch's symbols for them tell.

    Args:
        model: The model; only read.
        inputs: Its inputs.
        names: The names of the axes whose sizes may be others.
    """
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    env = ShapeEnv(duck_shape=False, specialize_zero_one=False)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    symbols: dict[Any, str] = {}
    with suppress(Exception), untouched(model):  # torch's symbols are no public interface
        set_mode(model, False)
        leaves, spec = pytree.tree_flatten(inputs)
        fakes = list(leaves)
        for place, axes in enumerate(names):
            if axes:
                kinds = [DimDynamic.DYNAMIC if a in axes else DimDynamic.STATIC for a in range(leaves[place].ndim)]
                context = StatelessSymbolicContext(dynamic_sizes=kinds)  # type: ignore[var-annotated]
                fakes[place] = mode.from_tensor(
                    leaves[place], symbolic_context=context, source=ConstantSource(f"input{place}")
                )
                symbols |= {fakes[place].shape[axis].node.expr: name for axis, name in axes.items()}
        with mode:
            run_on(model, pytree.tree_unflatten(fakes, spec))
    asked = [guard.expr for guard in env.guards if not _is_torchs(guard)]
    return [found for expr in dict.fromkeys(asked) if (found := as_condition(expr, symbols)) is not None]


def _is_torchs(guard: Any) -> bool:
    """Tell whether torch's own code has asked, which chooses a kernel."""
    asker = getattr(guard.sloc.framework_loc, "filename", "")
    return bool(asker.startswith(os.path.dirname(torch.__file__)))
