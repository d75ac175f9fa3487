"""Scales of channels, put into a model's parameters in place, and taken out again bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from normswap.graph.channels import Channels
from normswap.nn import FilterLayout
from normswap.stages.moves import Scale

__all__ = ["InPlace", "scale_channels", "scales_of_parameters"]


def scale_channels(model: nn.Module, channels: Channels, scales: Tensor) -> None:
    """Give each channel of ``model`` its scale, in place: ``scales`` holds one for each of ``channels``' numbers."""
    with torch.no_grad():
        for tensor, scale in _scaled_tensors(model, channels, scales):
            tensor.copy_(scale.times(tensor.double()))


class InPlace:
    """Scales that are put into a model's own parameters and can be taken out again, bit for bit.

    A power of two is taken out by its inverse. Only of tensors that it takes beyond what their dtype holds a copy is
    kept meanwhile.
    """

    def __init__(self, model: nn.Module, channels: Channels, scales: Tensor) -> None:
        self._tensors = list(_scaled_tensors(model, channels, scales))
        self._before: list[tuple[Tensor, Scale, Tensor | None]] = []

    @torch.no_grad()
    def put_in(self) -> None:
        """Give each channel its scale."""
        for tensor, scale in self._tensors:
            value = scale.times(tensor.double()).to(tensor.dtype)
            returns = torch.equal(scale.times(value.double(), -1).to(tensor.dtype), tensor)
            self._before.append((tensor, scale, None if returns else tensor.detach().clone()))
            tensor.copy_(value)

    @torch.no_grad()
    def take_out(self) -> None:
        """Give each tensor the values that it had."""
        while self._before:
            tensor, scale, values = self._before.pop()
            tensor.copy_(scale.times(tensor.double(), -1) if values is None else values)

    @contextmanager
    def unless_failed(self) -> Iterator[None]:
        """Put the scales in, and take them out again where what is done within fails."""
        try:
            self.put_in()
            yield
        except BaseException:
            self.take_out()
            raise


def scales_of_parameters(model: nn.Module, channels: Channels, scales: Tensor) -> dict[str, Scale]:
    """Return what :func:`scale_channels` multiplies each parameter with, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(one)]: scale for one, scale in _scaled_tensors(model, channels, scales) if id(one) in names}


def _scaled_tensors(model: nn.Module, channels: Channels, scales: Tensor) -> Iterator[tuple[Tensor, Scale]]:
    """Yield each weight and bias that is not to stay as it is, with its scale."""
    for fqn in dict.fromkeys((*channels.outputs, *channels.inputs)):
        module = model.get_submodule(fqn)
        outputs = _bare(scales[channels.outputs[fqn]] if fqn in channels.outputs else None)
        inputs = _bare(1 / scales[channels.inputs[fqn]] if fqn in channels.inputs else None)
        for tensor, of_inputs in ((module.weight, inputs), (module.bias, None)):
            if isinstance(tensor, Tensor) and (outputs is not None or of_inputs is not None):
                yield tensor, Scale(outputs, of_inputs, FilterLayout.of(module))


def _bare(factor: Tensor | None) -> Tensor | None:
    return None if factor is None or bool((factor == 1).all()) else factor
