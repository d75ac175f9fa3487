"""Where a layer's filters lie in its weight: the one place that knows."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

__all__ = ["FilterLayout", "row_moments"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class FilterLayout:
    """How the weight of a convolution, transposed convolution or linear layer splits into one filter per channel.

    A weight is ``(out, in/groups, *kernel)``, or ``(in, out/groups, *kernel)`` where transposed: output channel
    ``g·out/groups + o`` of a transposed convolution owns ``weight[g·in/groups : (g+1)·in/groups, o]``, so with
    ``groups > 1`` no single axis of the weight enumerates the output channels.

    Args:
        transposed: Whether the weight is ``(in, out/groups, *kernel)``.
        groups: The convolution's groups, 1 for a linear layer.
    """

    transposed: bool = False
    groups: int = 1

    @classmethod
    def of(cls, layer: nn.Module) -> FilterLayout:
        """Return the layout of ``layer``, an instance of a torch convolution or linear layer or of a subclass."""
        return cls(isinstance(layer, _TRANSPOSED), int(getattr(layer, "groups", 1)))

    @staticmethod
    def weight(layer: nn.Module) -> Tensor:
        """Return the weight that ``layer`` computes with, parametrized or not."""
        weight = layer.weight
        if not isinstance(weight, Tensor):
            raise TypeError(f"{type(layer).__name__} has no weight")
        return weight

    @property
    def axis(self) -> int | None:
        """The weight's axis that enumerates the output channels; None where no single axis does."""
        if not self.transposed:
            return 0
        return 1 if self.groups == 1 else None

    def out_channels(self, weight: Tensor) -> int:
        """Return the number of filters."""
        return int(weight.shape[1] * self.groups if self.transposed else weight.shape[0])

    def in_channels(self, weight: Tensor) -> int:
        """Return the number of input channels."""
        return int(weight.shape[0] if self.transposed else weight.shape[1] * self.groups)

    def fan_in(self, weight: Tensor) -> int:
        """Return the number of values in each filter."""
        return weight.numel() // max(self.out_channels(weight), 1)

    def flatten(self, weight: Tensor) -> Tensor:
        """Return the filters as rows, ``(out, fan_in)``; the order within a row is this layout's own affair."""
        if not self.transposed:
            filters: Tensor = _channels_last_view(weight).flatten(1)
            return filters
        g = self.groups
        split = weight.unflatten(0, (g, weight.shape[0] // g))  # (g, in/g, out/g, *kernel)
        rows: Tensor = split.transpose(1, 2).flatten(2).flatten(0, 1)
        return rows

    def unflatten(self, filters: Tensor, like: Tensor) -> Tensor:
        """Undo :meth:`flatten`: ``(out, fan_in)`` back to a weight of the shape and memory format of ``like``."""
        if not self.transposed:
            view = _channels_last_view(like)
            weight = filters.view(view.shape)
            return weight if view is like else weight.movedim(-1, 1)
        g, (n_in, n_out, *kernel) = self.groups, like.shape
        split = filters.view(g, n_out, n_in // g, *kernel)
        return split.transpose(1, 2).reshape(like.shape).contiguous()

    def multiply_outputs(self, weight: Tensor, factor: Tensor) -> Tensor:
        """Return ``weight`` with the filter of output channel ``c`` multiplied by ``factor[c]``."""
        return weight * self.per_output(weight, factor)

    def per_output(self, weight: Tensor, values: Tensor) -> Tensor:
        """Return ``values``, one per output channel, in a shape that broadcasts against ``weight``."""
        if not self.transposed:
            return values.view(-1, *(1,) * (weight.ndim - 1))
        of_group = values.view(self.groups, 1, -1).expand(-1, weight.shape[0] // self.groups, -1).flatten(0, 1)
        return of_group.reshape(*weight.shape[:2], *(1,) * (weight.ndim - 2))

    def multiply_inputs(self, weight: Tensor, factor: Tensor) -> Tensor:
        """Return ``weight`` with all that input channel ``c`` is multiplied with multiplied by ``factor[c]``."""
        trailing = (1,) * (weight.ndim - 2)
        if self.transposed:
            return weight * factor.view(-1, 1, *trailing)
        of_filter = factor.view(self.groups, 1, -1).expand(-1, weight.shape[0] // self.groups, -1).flatten(0, 1)
        return weight * of_filter.reshape(*weight.shape[:2], *trailing)

    def unit_filters(self, weight: Tensor) -> Tensor:
        """Return a weight of ``groups·fan_in`` filters that copies the layer's input patches to its output.

        Filter ``g·fan_in + i`` is one at position ``i`` of group ``g`` and zero elsewhere, so that the layer with
        this weight gives, at each output position, the patch which each of its real filters is multiplied with.
        Shape: as ``weight``, with ``groups·fan_in`` output channels.
        """
        n = self.fan_in(weight)
        eye = torch.eye(n, dtype=weight.dtype, device=weight.device).repeat(self.groups, 1)
        if not self.transposed:
            kernel = list(weight.shape[1:])
            if _channels_last_view(weight) is not weight:
                return eye.view(-1, *kernel[1:], kernel[0]).movedim(-1, 1)
            return eye.view(-1, *kernel)
        n_in, _, *kernel = weight.shape
        like = weight.new_empty(n_in, n, *kernel)
        if n != (n_in // self.groups) * prod(kernel):
            raise AssertionError("a transposed filter spans in/groups times the kernel")
        return self.unflatten(eye, like)


def row_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each row, several times faster than ``torch.var_mean`` on a CPU."""
    mean = rows.mean(1)
    return mean, torch.linalg.vector_norm(rows - mean[:, None], dim=1).square() / rows.shape[1]


def _channels_last_view(weight: Tensor) -> Tensor:
    """Return a channels-last weight with its channel axis moved to the end, so that flattening copies nothing."""
    if weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        return weight.movedim(1, -1)
    return weight
