"""Other inputs: of other values, of more samples and of one, and with smaller and larger maps or sequences.

Note [Which arguments have the batch]
An argument that has by chance as many rows as there are samples, such as the two rows of a graph's edges, does not grow
with the batch. So arguments are tried by themselves, then two together and so on, those likeliest to hold data first:
the first with which the model runs on more samples have the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

__all__ = ["larger_batches", "one_sample", "other_data", "other_maps", "with_samples"]

_MOST_ARGUMENTS = 5


def with_samples(given: Mapping[str, Any], name: str) -> list[str]:
    """Return the arguments beside the class ``name`` that have as many rows as there are samples, likeliest first."""
    dense = {key: v for key, v in given.items() if isinstance(v, Tensor) and v.layout is torch.strided}
    tensors = {key: v for key, v in dense.items() if key != name and v.ndim}
    ranked = sorted(tensors, key=lambda key: (-tensors[key].is_floating_point(), -tensors[key].ndim))
    if not ranked:
        return []
    label = given[name]
    samples = len(label) if label.ndim else len(tensors[ranked[0]])
    return [key for key in ranked if len(tensors[key]) == samples]


def other_data(given: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Yield inputs with other values in all arguments but the class ``name``: of the other sign, and shifted noise.

    Values that are no numbers with a point may be places in a table, and change their order alone.
    """
    generator = torch.Generator().manual_seed(0)

    def changed(value: Any, of_noise: bool) -> Any:
        if isinstance(value, float):
            return 0.75 * value + 0.1
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return value
        if not value.is_floating_point():
            return value.flip(tuple(range(value.ndim)))
        noise = torch.randn(value.shape, generator=generator).to(value)
        return noise + 0.5 if of_noise else -0.75 * value

    for of_noise in (False, True):
        yield {key: value if key == name else changed(value, of_noise) for key, value in given.items()}


def larger_batches(given: Mapping[str, Any], name: str) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield arguments that may have the batch, with inputs of twice the samples in them and in the class.

    The first are all together; see Note [Which arguments have the batch].
    """
    found = [key for key in with_samples(given, name) if len(given[key])][:_MOST_ARGUMENTS]
    for many in (len(found), *range(1, len(found))) if found else ():
        for chosen in combinations(found, many):
            yield chosen, _resized(given, _axes(given, name, chosen), 2 * len(given[chosen[0]]))


def one_sample(given: Mapping[str, Any], name: str, chosen: tuple[str, ...]) -> dict[str, Any]:
    """Return inputs of one sample; ``chosen`` are the arguments that have the batch."""
    return _resized(given, _axes(given, name, chosen), 1)


def other_maps(given: Mapping[str, Any], name: str, *, larger: bool) -> Iterator[dict[str, Any]]:
    """Yield inputs in which axes behind the first are half as long or, with ``larger``, twice as long as well.

    These are all axes of one size together, each axis by itself, and all from the third on.
    """
    axes = {
        (key, axis): value.shape[axis]
        for key, value in given.items()
        if key != name and isinstance(value, Tensor) and value.layout is torch.strided
        for axis in range(1, value.ndim)
        if value.numel()
    }
    groups = [frozenset(one for one in axes if axes[one] == size) for size in dict.fromkeys(axes.values())]
    groups += [frozenset(one for one in axes if one[1] == axis) for axis in {axis: None for _, axis in axes}]
    groups.append(frozenset(one for one in axes if one[1] > 1))
    for group in dict.fromkeys(group for group in groups if group):
        for factor in (0.5, 2)[: 1 + larger]:
            sizes = {one: max(int(factor * axes[one]), 1) for one in group}
            if any(sizes[one] != axes[one] for one in group):
                resized = dict(given)
                for (key, axis), size in sizes.items():
                    resized[key] = _take(resized[key], axis, size)
                yield resized


def _axes(given: Mapping[str, Any], name: str, chosen: tuple[str, ...]) -> list[str]:
    return [*chosen, name] if given[name].ndim else [*chosen]


def _resized(given: Mapping[str, Any], keys: list[str], samples: int) -> dict[str, Any]:
    return {**given, **{key: _take(given[key], 0, samples) for key in keys}}


def _take(value: Tensor, axis: int, size: int) -> Tensor:
    """Return ``value`` with ``size`` places on an axis, its own ones repeated."""
    return value.index_select(axis, torch.arange(size, device=value.device) % value.shape[axis])
