"""A numeric proof: whether a layer's forward is linear in its weight and bias is tried on noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from normswap.capture.guard import set_mode, untouched
from normswap.capture.ops import LAYERS, class_of
from normswap.nn import FilterLayout

__all__ = ["scales_with_its_parameters"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def scales_with_its_parameters(layer: nn.Module) -> bool:
    """Tell whether scaling ``layer``'s filters and shifting its bias scales and shifts its output, per channel.

    True for torch's own forwards. A user's subclass is tried on noise: ``f(x; s·W, s·b + t) = s·f(x; W, b) + t``. It
    holds for a subclass with its own padding and not for one that standardizes its weight. Unknown, so False, for a
    subclass on the meta device.
    """
    base = next(cls for cls in LAYERS if isinstance(layer, cls))
    own = class_of(layer)
    same = own.forward is base.forward and "forward" not in layer.__dict__
    if issubclass(base, _ConvNd) and same:
        same = getattr(own, "_conv_forward", None) is getattr(base, "_conv_forward", None)
    if same:
        return True
    weight = layer.weight
    if not isinstance(weight, Tensor) or weight.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    layout = FilterLayout.of(layer)
    channels = layout.out_channels(weight)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight)

    if isinstance(layer, nn.Linear):
        x = noise(2, layer.in_features)
    else:
        assert isinstance(layer, _ConvNd)
        spans = [(k - 1) * d + 4 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        x = noise(2, layer.in_channels, *spans)
    scale, shift = noise(channels).abs() + 0.5, noise(channels)
    bias = layer.bias if isinstance(layer.bias, Tensor) else torch.zeros_like(shift)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    with untouched(layer, values=True), torch.no_grad():
        set_mode(layer, False)
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
        try:
            before = functional_call(layer, {"weight": weight, "bias": bias}, (x,)).movedim(axis, -1)
            moved = {"weight": layout.scale(weight, scale), "bias": bias * scale + shift}
            after = functional_call(layer, moved, (x,)).movedim(axis, -1)
        except Exception:  # a forward that does not run on noise proves nothing
            return False
    expected = before * scale + shift
    tolerance = _TOLERANCE.get(weight.dtype, 5e-2)
    return bool((after - expected).abs().amax() <= tolerance * expected.abs().amax())
