"""What a layer reads: an affine of its input channels goes into its weight and bias, where padding does not see it.

With ``x' = a_c x + b_c`` per input channel, ``W·x' + bias = (W·diag a)·x + (bias + W·b)``. Zeros that a layer pads with
stand for values of x', not of x, so that at the border the second form would be wrong; so it is at the border of a
transposed convolution, where fewer filters' values meet.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normswap.nn.filters import FilterLayout
from normswap.nn.kinds import class_of

__all__ = ["fused_inputs", "input_channels", "is_plain", "is_reader", "reads_last_axis", "why_no_affine"]

_RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


def is_reader(module: nn.Module) -> bool:
    """Tell whether ``module`` is a layer whose weight meets its input channel by channel."""
    return isinstance(module, (_ConvNd, nn.Linear, *_RECURRENT))


def reads_last_axis(module: nn.Module) -> bool:
    """Tell whether the input channels of ``module``, a reader, lie on the last axis, and not on axis 1."""
    return not isinstance(module, _ConvNd)


def input_channels(module: nn.Module) -> int:
    """Return the number of input channels of ``module``, a reader."""
    if isinstance(module, _RECURRENT):
        return int(module.input_size)
    return FilterLayout.of(module).in_channels(FilterLayout.weight(module))


def why_no_affine(module: nn.Module) -> str | None:
    """Return why an affine of the input cannot go into ``module``, a reader; None where it can."""
    if isinstance(module, _RECURRENT):
        return None if module.bias else "it has no bias"
    if isinstance(module, _ConvTransposeNd):
        return "at the border of a transposed convolution fewer values meet, and so less of the shift"
    if isinstance(module, _ConvNd) and module.padding_mode == "zeros" and _pads(module):
        return "its zero padding stands for values behind the norm"
    return None


def _pads(conv: _ConvNd) -> bool:
    if isinstance(conv.padding, str):
        return conv.padding == "same" and any(size > 1 for size in conv.kernel_size)
    return any(conv.padding)


def fused_inputs(module: nn.Module, factor: Tensor, shift: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of ``module``, a reader, that take up ``factor_c·x + shift_c`` of its input, by name.

    Args:
        module: The reader, whose parameters are plain; a bias that it does not have counts as zeros.
        factor: a. ``(channels,)`` float64.
        shift: b. ``(channels,)`` float64.
    """
    if isinstance(module, _RECURRENT):
        for end in ("", "_reverse") if module.bidirectional else ("",):
            weight, bias = (getattr(module, f"{name}_ih_l0{end}").detach().double() for name in ("weight", "bias"))
            yield f"weight_ih_l0{end}", weight * factor
            yield f"bias_ih_l0{end}", bias + weight @ shift
        return
    layout = FilterLayout.of(module)
    weight = FilterLayout.weight(module).detach().double()
    bias = module._parameters.get("bias")
    met = layout.multiply_inputs(weight, shift).flatten(1).sum(1)
    yield "weight", layout.multiply_inputs(weight, factor)
    yield "bias", met if bias is None else bias.detach().double() + met


def is_plain(module: nn.Module) -> bool:
    """Tell whether the forward of ``module`` is that of torch's own class."""
    return class_of(module).__module__.startswith("torch.nn.") and "forward" not in module.__dict__
