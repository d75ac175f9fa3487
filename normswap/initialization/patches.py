"""The patches of a layer's input (im2col): what each of its filters is multiplied with."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.nn import FilterLayout
from normswap.nn.kinds import class_of

__all__ = ["patches", "random_patches", "with_filters"]

_MAX_SAMPLES = 4096
_MAX_VALUES = 2**24  # 128 MB of float64 patches at one layer


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the patches of ``x`` that each of ``layer``'s filters is multiplied with. ``(samples, groups, fan_in)``

    The layer itself makes them, from unit filters: so padding, stride, dilation, transposition and a user's subclass
    are all the layer's own. The commonest layer, a plain 2-D convolution, has a faster way.
    """
    layout = FilterLayout.of(layer)
    weight = layout.weight(layer)
    kind = class_of(layer)
    plain = kind is nn.Conv2d and layer.padding_mode == "zeros" and weight.is_contiguous()
    if plain and isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str) and x.ndim == 4:
        columns = F.unfold(
            x, layer.kernel_size, layer.dilation, layer.padding, layer.stride
        )  # (N, in·kernel, positions)
        return columns.movedim(1, -1).reshape(-1, layout.groups, layout.fan_in(weight))
    rows: Tensor = with_filters(layer, layout.unit_filters(weight))(x)
    rows = rows.movedim(1, -1) if not isinstance(layer, nn.Linear) else rows
    return rows.reshape(-1, layout.groups, layout.fan_in(weight))


def random_patches(layer: nn.Module, x: Tensor, already: int, generator: torch.Generator) -> Tensor:
    """Return a random choice of the patches of ``x``, as many as are still wanted. ``(samples, groups, fan_in)``

    Args:
        layer: The layer.
        x: Its input.
        already: How many patches were chosen from earlier batches.
        generator: Draws the choice.
    """
    layout = FilterLayout.of(layer)
    weight = layout.weight(layer)
    width = layout.groups * layout.fan_in(weight)
    limit = min(_MAX_SAMPLES, max(64, _MAX_VALUES // width))
    wanted = limit - already
    if wanted <= 0:
        return x.new_empty(0, layout.groups, layout.fan_in(weight))
    rows = []
    for one in x.split(max(1, _MAX_VALUES // (4 * width * max(1, x[:1].numel() // max(1, x.shape[1]))))):
        found = patches(layer, one)
        share = max(1, -(-limit * len(one) // len(x)))
        if len(found) > share:
            found = found[torch.randperm(len(found), generator=generator)[:share].to(found.device)]
        rows.append(found)
        wanted -= len(found)
        if wanted <= 0:
            break
    return torch.cat(rows)[:limit]


def with_filters(layer: nn.Module, weight: Tensor, groups: int | None = None) -> nn.Module:
    """Return a layer of the plain class, where ``layer`` is parametrized, with another weight and without a bias."""
    kind = class_of(layer)
    probe = kind.__new__(kind)
    probe.__dict__.update(layer.__dict__, _modules={}, _forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
    probe.__dict__.update(_parameters={"weight": nn.Parameter(weight, requires_grad=False), "bias": None})
    if groups is not None:
        probe.__dict__["groups"] = groups
    return probe
