"""Layer-normalized cells of an LSTM, GRU and RNN with the interface of torch's: one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normswap.nn.kinds import Answering
from normswap.nn.layer_norm_steps import NO_LIKE, PARTS, Direction, gru, lstm, rnn
from normswap.nn.recurrent_steps import GATES, Step

__all__ = ["LayerNormGRUCell", "LayerNormLSTMCell", "LayerNormRNNCell"]


class _Cell(Answering, nn.RNNCellBase):
    """What the three cells share."""

    mode: str

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float,
        cell_norm: bool = False,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, GATES[mode], device, dtype)
        self.mode, self.eps, self.cell_norm = mode, eps, cell_norm
        norms = [(f"_{part}" if part else "", GATES[mode] * hidden_size) for part in PARTS[mode]]
        for part, size in [*norms, ("_c", hidden_size)] if cell_norm else norms:
            for kind in ("weight", "bias"):
                value = torch.empty(size, device=device, dtype=dtype)
                self.register_parameter(f"ln{part}_{kind}", nn.Parameter(value))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices as torch does; gains start at 1, shifts and the biases within the norms at 0."""
        limit = self.hidden_size**-0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("weight"):
                    parameter.uniform_(-limit, limit)
                else:
                    parameter.fill_(float(name.startswith("ln") and name.endswith("_weight")))

    def deployed(self) -> nn.Module | str:
        """Say that torch.nn has no such cell."""
        return NO_LIKE

    def _step(self, p: Direction, x: Tensor) -> tuple[Tensor, Step]:
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Return the state after the step, as torch's cell of the same kind does.

        Args:
            input: ``(N, in)`` or ``(in,)``.
            hx: h, or of an LSTM h and c; default zeros. ``(N, H)`` or ``(H,)``
        """
        if input.shape[-1] != self.input_size:
            raise RuntimeError(f"input.size(-1) must be equal to input_size, {self.input_size}, got {input.shape[-1]}")
        size = (*input.shape[:-1], self.hidden_size)
        if hx is None:
            hx = input.new_zeros(size)
            hx = (hx, hx) if self.mode == "LSTM" else hx
        state = tuple(hx) if self.mode == "LSTM" else (hx, hx)
        for value in state:
            if tuple(value.shape) != size:
                raise RuntimeError(f"expected a state of shape {size}, got {tuple(value.shape)}")
        u, step = self._step(self._tensors(), input)
        h, c = step(u, (state[0], state[1]))
        return (h, c) if self.mode == "LSTM" else h

    def _tensors(self) -> Direction:
        def pair(part: str) -> tuple[Tensor, Tensor] | None:
            found = [getattr(self, f"ln{part}_{kind}", None) for kind in ("weight", "bias")]
            return None if found[0] is None or found[1] is None else (found[0], found[1])

        of_input = pair("_ih") or pair("")
        assert of_input is not None
        b_ih, b_hh = (self.bias_ih, self.bias_hh) if self.bias else (None, None)
        rest = (of_input, pair("_hh"), pair("_c"), self.eps)
        return Direction(self.weight_ih, self.weight_hh, b_ih, b_hh, None, *rest)


class LayerNormLSTMCell(_Cell):
    """One step of :class:`~normswap.nn.LayerNormLSTM`, with the interface of ``nn.LSTMCell``.

    Args:
        args: The arguments of ``nn.LSTMCell``: ``input_size``, ``hidden_size``, ``bias`` (the biases within the norms),
            ``device``, ``dtype``.
        cell_norm: Whether the output sees LN(c'), or c' itself.
        eps: Added to each variance.

    Source: J. L. Ba, J. R. Kiros, G. E. Hinton, *Layer Normalization*, 2016, eq. 20-22.
    """

    def __init__(self, *args: Any, cell_norm: bool = True, eps: float = 1e-5, **options: Any) -> None:
        super().__init__("LSTM", *args, cell_norm=cell_norm, eps=eps, **options)

    def _step(self, p: Direction, x: Tensor) -> tuple[Tensor, Step]:
        return lstm(p, x)


class LayerNormGRUCell(_Cell):
    """One step of :class:`~normswap.nn.LayerNormGRU`, with the interface of ``nn.GRUCell``.

    Args:
        args: The arguments of ``nn.GRUCell``, see :class:`LayerNormLSTMCell`.
        eps: Added to each variance.

    Source: J. L. Ba, J. R. Kiros, G. E. Hinton, *Layer Normalization*, 2016, the GRU of its supplement.
    """

    def __init__(self, *args: Any, eps: float = 1e-5, **options: Any) -> None:
        super().__init__("GRU", *args, eps=eps, **options)

    def _step(self, p: Direction, x: Tensor) -> tuple[Tensor, Step]:
        return gru(p, x)


class LayerNormRNNCell(_Cell):
    """One step of :class:`~normswap.nn.LayerNormRNN`, with the interface of ``nn.RNNCell``.

    Args:
        args: The arguments of ``nn.RNNCell``, see :class:`LayerNormLSTMCell`.
        nonlinearity: f, ``"tanh"`` or ``"relu"``.
        eps: Added to the variance.

    Source: J. L. Ba, J. R. Kiros, G. E. Hinton, *Layer Normalization*, 2016, eq. 4.
    """

    def __init__(self, *args: Any, nonlinearity: str = "tanh", eps: float = 1e-5, **options: Any) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"the nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        super().__init__(f"RNN_{nonlinearity.upper()}", *args, eps=eps, **options)
        self.nonlinearity = nonlinearity

    def _step(self, p: Direction, x: Tensor) -> tuple[Tensor, Step]:
        return rnn(p, x, torch.relu if self.mode == "RNN_RELU" else torch.tanh)
