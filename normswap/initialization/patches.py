"""The patches of a layer's input (im2col): what each of its filters is multiplied with."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.nn import FilterLayout
from normswap.nn.kinds import class_of
from normswap.runs.processes import share

__all__ = ["patches", "patches_at", "random_patches", "with_filters"]

_MAX_SAMPLES = 4096
_MAX_VALUES = 2**24  # 128 MB of float64 patches at one layer


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the patches of ``x`` that each of ``layer``'s filters is multiplied with. ``(samples, groups, fan_in)``

    The layer itself makes them, from unit filters: so padding, stride, dilation, transposition and a user's subclass
    are all the layer's own. The commonest layer, a plain 2-D convolution, has a faster way.
    """
    layout = FilterLayout.of(layer)
    weight = layout.weight(layer)
    if _is_plain(layer, x):
        assert not isinstance(layer.padding, str)
        columns = F.unfold(
            x, layer.kernel_size, layer.dilation, layer.padding, layer.stride
        )  # (N, in·kernel, positions)
        return columns.movedim(1, -1).reshape(-1, layout.groups, layout.fan_in(weight))
    rows: Tensor = with_filters(layer, layout.unit_filters(weight))(x)
    rows = rows.movedim(1, -1) if not isinstance(layer, nn.Linear) else rows
    return rows.reshape(-1, layout.groups, layout.fan_in(weight))


def patches_at(layer: nn.Module, x: Tensor, index: Tensor) -> Tensor:
    """Return ``patches(layer, x)[index]``, of a plain 2-D convolution without making the others."""
    if not _is_plain(layer, x):
        return patches(layer, x)[index]
    layout = FilterLayout.of(layer)
    assert not isinstance(layer.padding, str)
    (top, left), (down, right), (dy, dx) = layer.padding, layer.stride, layer.dilation
    height, width = layer.kernel_size
    rows, columns = _positions(layer, x)
    x = F.pad(x, (left, left, top, top)) if top or left else x
    sample, place = index // (rows * columns), index % (rows * columns)
    y = (place // columns * down)[:, None] + torch.arange(height, device=x.device).repeat_interleave(width) * dy
    z = (place % columns * right)[:, None] + torch.arange(width, device=x.device).repeat(height) * dx
    found = x[sample[:, None], :, y, z]  # (len(index), height·width, in)
    return found.movedim(1, 2).reshape(len(index), layout.groups, layout.fan_in(layout.weight(layer)))


def _positions(layer: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """Return how many rows and columns the output has for ``x``."""
    assert not isinstance(layer.padding, str)
    axes = zip(x.shape[2:], layer.padding, layer.kernel_size, layer.dilation, layer.stride, strict=True)
    rows, columns = ((side + 2 * pad - step * (size - 1) - 1) // stride + 1 for side, pad, size, step, stride in axes)
    return rows, columns


def _is_plain(layer: nn.Module, x: Tensor) -> TypeGuard[nn.Conv2d]:
    """Tell whether ``layer`` is torch's own 2-D convolution with zeros around, whose patches are known."""
    return (
        class_of(layer) is nn.Conv2d
        and isinstance(layer, nn.Conv2d)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and FilterLayout.weight(layer).is_contiguous()
        and x.ndim == 4
    )


def random_patches(layer: nn.Module, x: Tensor, already: int, generator: torch.Generator) -> Tensor:
    """Return a random choice of the patches of ``x``, as many as are still wanted. ``(samples, groups, fan_in)``

    Each of many processes takes its share of them.

    Args:
        layer: The layer.
        x: Its input.
        already: How many patches were chosen from earlier batches.
        generator: Draws the choice.
    """
    layout = FilterLayout.of(layer)
    weight = layout.weight(layer)
    width = layout.groups * layout.fan_in(weight)
    limit = share(min(_MAX_SAMPLES, max(64, _MAX_VALUES // width)))
    wanted = limit - already
    if wanted <= 0:
        return x.new_empty(0, layout.groups, layout.fan_in(weight))
    rows = []
    for one in x.split(max(1, _MAX_VALUES // (4 * width * max(1, x[:1].numel() // max(1, x.shape[1]))))):
        found = _some_of(layer, one, max(1, -(-limit * len(one) // len(x))), generator)
        rows.append(found)
        wanted -= len(found)
        if wanted <= 0:
            break
    return torch.cat(rows)[:limit]


def _some_of(layer: nn.Module, x: Tensor, some: int, generator: torch.Generator) -> Tensor:
    """Return a random choice of ``some`` patches of ``x``, or all where there are no more."""
    if _is_plain(layer, x):
        rows, columns = _positions(layer, x)
        count = len(x) * rows * columns
        if count <= some:
            return patches(layer, x)
        return patches_at(layer, x, torch.randperm(count, generator=generator)[:some].to(x.device))
    found = patches(layer, x)
    if len(found) <= some:
        return found
    return found[torch.randperm(len(found), generator=generator)[:some].to(found.device)]


def with_filters(layer: nn.Module, weight: Tensor, groups: int | None = None) -> nn.Module:
    """Return a layer of the plain class, where ``layer`` is parametrized, with another weight and without a bias."""
    kind = class_of(layer)
    probe = kind.__new__(kind)
    probe.__dict__.update(layer.__dict__, _modules={}, _forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
    probe.__dict__.update(_parameters={"weight": nn.Parameter(weight, requires_grad=False), "bias": None})
    if groups is not None:
        probe.__dict__["groups"] = groups
    return probe
