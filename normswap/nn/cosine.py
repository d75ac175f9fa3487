"""Layers that divide what each filter reads by its length: with a normalized weight they give cosines."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from normswap.nn.kinds import Answering

__all__ = [
    "CosineConv1d",
    "CosineConv2d",
    "CosineConv3d",
    "CosineConvTranspose1d",
    "CosineConvTranspose2d",
    "CosineConvTranspose3d",
    "CosineLinear",
    "make_cosine",
]

_SHORTEST = 1e-6
"""The length that a shorter patch is divided by: one of zeros gives the bias, and finite gradients."""


def _over_length(layer: nn.Module, y: Tensor, squares: Tensor, axis: int) -> Tensor:
    """Return ``y/‖u‖ + bias``, ``squares`` the ``‖u‖²`` of each group, the channels of both on ``axis``."""
    length = squares.clamp(min=_SHORTEST**2).sqrt()
    groups = squares.shape[axis]
    if groups > 1:
        length = length.repeat_interleave(y.shape[axis] // groups, axis)
    bias = layer.bias
    if not isinstance(bias, Tensor):
        return y / length
    return y / length + bias.view(-1, *(1,) * (-axis - 1))


class _Cosine(Answering):
    def deployed(self) -> nn.Module | str:
        """Say that torch.nn has no such layer."""
        return "torch.nn has no layer that divides by the length of what it reads"


class CosineLinear(_Cosine, nn.Linear):
    """``y = W u/‖u‖ + b``; the constructor, shapes and parameters of ``nn.Linear``.

    With ``W = g v/‖v‖`` per row (``torch.nn.utils.parametrizations.weight_norm``) it is ``g cos(v, u) + b``. An input
    of zeros gives b.

    Source: C. Luo et al., *Cosine Normalization: Using Cosine Similarity Instead of Dot Product in Neural Networks*,
    2017, which has neither g nor b.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the cosines of the rows with ``input``, ``(…, in)``, times their gains, and the bias."""
        squares = input.square().sum(-1, keepdim=True)
        return _over_length(self, F.linear(input, self.weight), squares, -1)


class _CosineConv(_Cosine, nn.modules.conv._ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        """Return the cosines of the filters with the patches of ``input``, times their gains, and the bias."""
        apply: Any = self._conv_forward
        ones = self.weight.new_ones(self.groups, *self.weight.shape[1:])
        axis = -len(self.kernel_size) - 1
        return _over_length(self, apply(input, self.weight, None), apply(input.square(), ones, None), axis)


class CosineConv1d(_CosineConv, nn.Conv1d):
    """``y = W*u/‖u‖ + b``, u the patch at each position; the interface of ``nn.Conv1d``, see :class:`CosineLinear`."""


class CosineConv2d(_CosineConv, nn.Conv2d):
    """``y = W*u/‖u‖ + b``, u the patch at each position; the interface of ``nn.Conv2d``, see :class:`CosineLinear`."""


class CosineConv3d(_CosineConv, nn.Conv3d):
    """``y = W*u/‖u‖ + b``, u the patch at each position; the interface of ``nn.Conv3d``, see :class:`CosineLinear`."""


_TRANSPOSED: tuple[Any, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class _CosineConvTranspose(_Cosine, nn.modules.conv._ConvTransposeNd):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the cosines of the filters with what they read of ``input``, times their gains, and the bias."""
        axes = len(self.kernel_size)
        padding: Any = self._output_padding(
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            axes,
            self.dilation,  # type: ignore[arg-type]
        )
        how = (None, self.stride, self.padding, padding, self.groups, self.dilation)
        ones = self.weight.new_ones(self.weight.shape[0], 1, *self.weight.shape[2:])
        apply = _TRANSPOSED[axes - 1]
        y: Tensor = apply(input, self.weight, *how)
        return _over_length(self, y, apply(input.square(), ones, *how), -axes - 1)


class CosineConvTranspose1d(_CosineConvTranspose, nn.ConvTranspose1d):
    """``y = W*u/‖u‖ + b``, u what a filter reads; as ``nn.ConvTranspose1d``, see :class:`CosineLinear`."""


class CosineConvTranspose2d(_CosineConvTranspose, nn.ConvTranspose2d):
    """``y = W*u/‖u‖ + b``, u what a filter reads; as ``nn.ConvTranspose2d``, see :class:`CosineLinear`."""


class CosineConvTranspose3d(_CosineConvTranspose, nn.ConvTranspose3d):
    """``y = W*u/‖u‖ + b``, u what a filter reads; as ``nn.ConvTranspose3d``, see :class:`CosineLinear`."""


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: CosineLinear,
    nn.Conv1d: CosineConv1d,
    nn.Conv2d: CosineConv2d,
    nn.Conv3d: CosineConv3d,
    nn.ConvTranspose1d: CosineConvTranspose1d,
    nn.ConvTranspose2d: CosineConvTranspose2d,
    nn.ConvTranspose3d: CosineConvTranspose3d,
}


def make_cosine(layer: nn.Module) -> None:
    """Let ``layer``, of a class of torch's own, divide by lengths, in place; its tensors stay.

    Raises:
        TypeError: It is of another class, whose forward may do more.
    """
    if type(layer) not in _KINDS:
        raise TypeError(f"{type(layer).__name__} is no layer of torch's own")
    layer.__class__ = _KINDS[type(layer)]
