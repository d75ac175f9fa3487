"""Weight parametrizations: weight normalization and weight standardization, with and without an offset."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrizations import _WeightNorm

from normswap.nn.filters import FilterLayout, row_moments

__all__ = ["FilterWeightNorm", "ScalarMultiplier", "WeightStandardization", "parametrize_weight_norm"]


class _NormalizedRows(torch.autograd.Function):
    """Rows of length g, ``g_c · v_c / ‖v_c‖``, and the norms, by torch's fused kernel; ``(C, n)``, g ``(C, 1)``.

    torch's own second derivative of it takes ‖v_c‖ for a constant (torch 2.13): a gradient penalty would have a wrong
    gradient. So the derivative is written out wherever it may be differentiated itself.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        rows, norms = torch._weight_norm_interface(v, g, 0)
        return rows, norms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        v, g, norms = ctx.saved_tensors
        if not torch.is_grad_enabled():
            of_v, of_g = torch.ops.aten._weight_norm_interface_backward(grad, v, g, norms, 0)
            return of_v, of_g
        norms = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        unit = v / norms
        along = (grad * unit).sum(1, keepdim=True)
        return g / norms * (grad - along * unit), along


def _normalized(rows: Tensor, g: Tensor) -> Tensor:
    # Compiled code has no second derivatives, and a TorchScript file takes no function of Python.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return torch._weight_norm(rows, g, 0)
    # A function of Python costs more than the rows do; it is needed for derivatives, and for its rule of vmap.
    if not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        return torch._weight_norm_interface(rows.contiguous(), g, 0)[0]
    filters: Tensor = _NormalizedRows.apply(rows.contiguous(), g)[0]  # type: ignore[no-untyped-call]
    return filters


class FilterWeightNorm(nn.Module):
    """Weight normalization where torch's own does not fit: filters along no single axis, or a gain kept as logarithm.

    ``W_c = g_c · v_c / ‖v_c‖``, the norm over each filter (grouped transposed convolutions have no axis of filters);
    with ``log_gain``, ``g_c = exp(s_c)``. Originals: ``original0`` is g or s, ``(out,)``, ``original1`` is v, shaped as
    the weight. Every other layer gets torch's ``parametrizations.weight_norm``.

    Args:
        layout: Where the layer's filters lie.
        log_gain: Whether the logarithm of g is learnt. g is positive then, and signs are v's.

    Source: T. Salimans, D. Kingma, *Weight Normalization*, 2016, eq. 2 and section 2.1.
    """

    def __init__(self, layout: FilterLayout, *, log_gain: bool = False) -> None:
        super().__init__()
        self.layout, self.log_gain = layout, log_gain

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """Return the weight."""
        gain = g.exp() if self.log_gain else g
        return self.layout.unflatten(_normalized(self.layout.flatten(v), gain[:, None]), v)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return (g, v) or (s, v) with v the weight itself, as torch's weight norm does."""
        g = self.layout.flatten(weight).norm(dim=1)
        return (g.clamp(min=torch.finfo(g.dtype).tiny).log() if self.log_gain else g), weight

    def extra_repr(self) -> str:
        return f"log_gain={self.log_gain}"


class _RowWeightNorm(_WeightNorm):
    """torch's weight normalization over the first axis, without its copies of a channels-last weight.

    torch's kernel takes contiguous weights: in channels_last it copies v, its result and both their gradients. The rows
    of :meth:`FilterLayout.flatten` are contiguous in either memory format.
    """

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        """Return the weight, in the memory format of v."""
        layout = FilterLayout()
        return layout.unflatten(_normalized(layout.flatten(weight_v), weight_g.flatten(1)), weight_v)


def parametrize_weight_norm(layer: nn.Module, name: str = "weight", *, log_gain: bool = False) -> None:
    """Parametrize ``layer``'s weight as ``W_c = g_c · v_c/‖v_c‖``, with ``v`` the present weight and ``g`` its norm.

    With ``log_gain`` the logarithm of g is the parameter.
    """
    layout = FilterLayout.of(layer)
    if layout.axis is None or log_gain:
        parametrize.register_parametrization(layer, name, FilterWeightNorm(layout, log_gain=log_gain))
        return
    parametrizations.weight_norm(layer, name, dim=layout.axis)
    if layout.axis == 0:
        layer.get_submodule(f"parametrizations.{name}").register_module("0", _RowWeightNorm())


class ScalarMultiplier(nn.Module):
    """``W = a V`` with one scalar a. Originals: ``original0`` is a, ``()``; ``original1`` is V, shaped as the weight.

    Source: H. Zhang, Y. Dauphin, T. Ma, *Fixup Initialization*, 2019, the multiplier of each residual branch.
    """

    def forward(self, a: Tensor, v: Tensor) -> Tensor:
        """Return the weight."""
        return a * v

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the multiplier 1 and the weight itself."""
        return weight.new_ones(()), weight


class WeightStandardization(nn.Module):
    """Weight standardization, with a learnable gain and, on request, a learnable offset per filter.

    ``W_c = (g_c · (v_c − mean(v_c)) / sqrt(var(v_c) + eps) + o_c) / sqrt(n)``, mean and (biased) variance over each
    filter, n its number of values. Originals: ``original0`` is v, shaped as the weight; ``original1`` the gain g,
    ``(out,)``; ``original2`` the offset o, ``(out,)``. Without a gain there is no ``sqrt(n)`` either, and v is the only
    original: the published form. The gain keeps a pretrained filter's scale; the offset keeps its mean, so that with
    both every weight can be written exactly.

    With the ``sqrt(n)``, g is the filter's norm, as in weight normalization, and ``|∂W/∂g| = |∂W/∂o| = 1``. Without it
    g would be sqrt(n) times smaller and its gradient as much larger: a rate that fits all other parameters would change
    it n times too fast, and training diverges.

    Args:
        layout: Where the layer's filters lie.
        gain: Whether g is learnable, else 1.
        offset: Whether o is learnable, else 0; needs the gain.
        eps: Added to the variance.

    Source: S. Qiao et al., *Micro-Batch Training with Batch-Channel Normalization and Weight Standardization*, 2019,
    eq. 4-5, which have neither gain nor offset; the gain with its ``sqrt(n)``: A. Brock et al., *Characterizing signal
    propagation to close the performance gap in unnormalized ResNets*, 2021, eq. 2.
    """

    def __init__(self, layout: FilterLayout, *, gain: bool = True, offset: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        if offset and not gain:
            raise ValueError("an offset needs the gain: without it the weight's scale is not kept anyway")
        self.layout, self.gain, self.offset, self.eps = layout, gain, offset, eps

    def forward(self, v: Tensor, gain: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
        """Return the weight."""
        filters = self.layout.flatten(v)
        # One filter is one "group" of a single sample: torch's group norm standardizes, multiplies by the gain and
        # adds the offset in one kernel, about five times faster than layer_norm and two elementwise operations.
        # squeeze and not [0], whose backward fills zeros of the weight's size and copies into them.
        scale = filters.shape[1] ** -0.5
        gain, offset = (None if value is None else value * scale for value in (gain, offset))
        rows = F.group_norm(filters[None], filters.shape[0], gain, offset, self.eps).squeeze(0)
        return self.layout.unflatten(rows, v)

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the originals whose parametrized weight is ``weight``, up to its filters' means without an offset."""
        if not self.gain:
            return weight
        filters = self.layout.flatten(weight)
        mean, var = row_moments(filters)
        unit = filters.shape[1] ** 0.5
        gain = (var + self.eps).sqrt() * unit
        return (weight, gain, mean * unit) if self.offset else (weight, gain)

    def extra_repr(self) -> str:
        return f"gain={self.gain}, offset={self.offset}, eps={self.eps}"
