"""Layer-normalized cells of an LSTM, GRU and RNN with the interface of torch's: one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normswap.nn.layer_norm_steps import Direction, gru, lstm, rnn
from normswap.nn.layer_normalized import LayerNormalized
from normswap.nn.normalized import NormalizedCell, rnn_mode
from normswap.nn.recurrent_steps import State, Step

__all__ = ["LayerNormGRUCell", "LayerNormLSTMCell", "LayerNormRNNCell"]


class _Cell(LayerNormalized, NormalizedCell):
    """What the three cells share."""

    def __init__(self, mode: str, *args: Any, eps: float, cell_norm: bool = False, **options: Any) -> None:
        super().__init__(mode, *args, **options)
        self._settle(eps=eps, cell_norm=cell_norm)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Return the state after the step, as torch's cell of the same kind does.

        Args:
            input: ``(N, in)`` or ``(in,)``.
            hx: h, or of an LSTM h and c; default zeros. ``(N, H)`` or ``(H,)``
        """
        return self._stepped(input, hx)

    def _one_step(self, x: Tensor, state: State, t: int) -> State:
        u, step = self._step(self._direction(), x)
        return step(u, state)


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
        super().__init__(rnn_mode(nonlinearity), *args, eps=eps, **options)
        self.nonlinearity = nonlinearity

    def _step(self, p: Direction, x: Tensor) -> tuple[Tensor, Step]:
        return rnn(p, x, torch.relu if self.mode == "RNN_RELU" else torch.tanh)
