"""What normalized recurrent layers and their cells share: the tensors of the norms, and how they start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normswap.nn.kinds import Answering
from normswap.nn.recurrent_steps import GATES, State

__all__ = ["Normalized", "NormalizedCell", "rnn_mode", "without_cell_norm"]


class Normalized(Answering):
    """A recurrent layer, or a cell, with norms.

    The tensors of a norm are called by its kind, by what it normalizes, by what they are and, in a layer, by the layer
    and the direction within it: ``ln_ih_weight_l0``, in a cell ``ln_ih_weight``.
    """

    prefix: ClassVar[str]
    """What the names of the norms' tensors begin with."""
    mode: str
    hidden_size: int
    cell_norm: bool
    gain: float = 1.0
    """What the gains start at."""

    def _ends(self, layer: int | None = None) -> list[str]:
        """Return what the names of the tensors of each direction end with, of one layer or of all; a cell has one."""
        return [""]

    def _parts(self) -> Sequence[str]:
        """Return what is normalized over all gates' units, as it stands in the names."""
        raise NotImplementedError

    def _norms(self) -> list[tuple[str, int]]:
        """Return what is normalized, and how many units it has."""
        found = [(part, GATES[self.mode] * self.hidden_size) for part in self._parts()]
        return [*found, ("c", self.hidden_size)] if self.cell_norm else found

    def _of_norm(self, part: str, kind: str, end: str) -> str:
        """Return the name of a norm's tensor."""
        return "_".join(filter(None, (self.prefix, part, kind, end)))

    def _own(self, name: str, end: str) -> Any:
        """Return a tensor of torch's layer, such as ``weight_ih``, of one direction; None where there is none."""
        return getattr(self, f"{name}_{end}" if end else name, None)

    def reset_parameters(self) -> None:
        """Draw the matrices as torch does; gains start at ``gain``, all else at 0, running variances at 1."""
        assert isinstance(self, nn.Module)
        limit = self.hidden_size**-0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("weight"):
                    parameter.uniform_(-limit, limit)
                else:
                    parameter.fill_(self.gain if name.startswith(self.prefix) and "_weight" in name else 0.0)
            for name, buffer in self.named_buffers():
                buffer.fill_(float("_var" in name))


class NormalizedCell(Normalized, nn.RNNCellBase):
    """A cell whose classes say what one step computes; inputs, outputs and states are torch's."""

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.mode: str
        super().__init__(input_size, hidden_size, bias, GATES[mode], device, dtype)
        self.mode = mode

    def _one_step(self, x: Tensor, state: State, t: int) -> State:
        """Return h and c after a step; c is h where there is none."""
        raise NotImplementedError

    def _stepped(self, x: Tensor, hx: Any, t: int = 0) -> Any:
        """Check what a cell is given and take the step ``t``."""
        if x.shape[-1] != self.input_size:
            raise RuntimeError(f"input.size(-1) must be equal to input_size, {self.input_size}, got {x.shape[-1]}")
        size = (*x.shape[:-1], self.hidden_size)
        if hx is None:
            hx = x.new_zeros(size)
            hx = (hx, hx) if self.mode == "LSTM" else hx
        state = tuple(hx) if self.mode == "LSTM" else (hx, hx)
        for value in state:
            if tuple(value.shape) != size:
                raise RuntimeError(f"expected a state of shape {size}, got {tuple(value.shape)}")
        h, c = self._one_step(x, (state[0], state[1]), t)
        return (h, c) if self.mode == "LSTM" else h


def rnn_mode(nonlinearity: str) -> str:
    """Return torch's name of an RNN with this nonlinearity.

    Raises:
        ValueError: It is neither ``"tanh"`` nor ``"relu"``.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"the nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    return f"RNN_{nonlinearity.upper()}"


def without_cell_norm(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a layer that has no c, of which none normalizes it."""
    if options.get("cell_norm"):
        raise TypeError("cell_norm is an LSTM's: this layer has no c")
    return options
