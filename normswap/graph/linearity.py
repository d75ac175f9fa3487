"""Linearity test: whether a layer's forward is linear in its weight and bias, tested on random inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from normswap.nn import FilterLayout
from normswap.nn.kinds import LAYERS, class_of
from normswap.runs.guard import set_mode, untouched

__all__ = ["is_torchs_own", "scales_with_its_parameters"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def scales_with_its_parameters(layer: nn.Module) -> bool:
    """Tell whether scaling ``layer``'s filters and shifting its bias scales and shifts its output, per channel.

    True for torch's own forwards. A user's subclass is tried on noise: ``f(x; s·W, s·b + t) = s·f(x; W, b) + t``. It
    holds for a subclass with its own padding and not for one that standardizes its weight. Unknown, so False, for a
    subclass on the meta device.
    """
    if is_torchs_own(layer):
        return True
    weight, noise = layer.weight, _Noise()
    if not isinstance(weight, Tensor) or weight.is_meta:
        return False
    layout = FilterLayout.of(layer)
    channels = layout.out_channels(weight)
    x = noise.input_of(layer)
    scale, shift = noise.like(weight, channels).abs() + 0.5, noise.like(weight, channels)
    bias = layer.bias if isinstance(layer.bias, Tensor) else torch.zeros_like(shift)
    moved = {"weight": layout.multiply_outputs(weight, scale), "bias": bias * scale + shift}
    axis = -1 if isinstance(layer, nn.Linear) else 1
    before, after = _outputs(layer, ({"weight": weight, "bias": bias}, x), (moved, x))
    if before is None or after is None:
        return False
    return _agree(before.movedim(axis, -1) * scale + shift, after.movedim(axis, -1))


def is_torchs_own(layer: nn.Module) -> bool:
    """Tell whether ``layer``'s forward is that of torch's class."""
    base = next(cls for cls in LAYERS if isinstance(layer, cls))
    own = class_of(layer)
    same = own.forward is base.forward and "forward" not in layer.__dict__
    if issubclass(base, _ConvNd) and same:
        same = getattr(own, "_conv_forward", None) is getattr(base, "_conv_forward", None)
    return same


class _Noise:
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def like(self, weight: Tensor, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(weight)

    def input_of(self, layer: nn.Module) -> Tensor:
        weight = FilterLayout.weight(layer)
        if isinstance(layer, nn.Linear):
            return self.like(weight, 2, layer.in_features)
        assert isinstance(layer, _ConvNd)
        spans = [(k - 1) * d + 4 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        return self.like(weight, 2, layer.in_channels, *spans)


def _outputs(layer: nn.Module, *trials: tuple[dict[str, Tensor], Tensor]) -> Sequence[Tensor | None]:
    """Return what ``layer`` gives with other parameters and inputs; None where it does not run on them."""
    with untouched(layer), torch.no_grad():
        set_mode(layer, False)
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
        try:
            return [functional_call(layer, parameters, (x,)) for parameters, x in trials]
        except Exception:  # a forward that does not run on noise proves nothing
            return [None] * len(trials)


def _agree(expected: Tensor, found: Tensor) -> bool:
    tolerance = _TOLERANCE.get(expected.dtype, 5e-2)
    return bool((found - expected).abs().amax() <= tolerance * expected.abs().amax())
