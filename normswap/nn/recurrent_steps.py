"""One step in time of an LSTM, GRU and RNN, from what their matrices give; gates in torch's order.

That is i, f, g, o of an LSTM, and r, z, n of a GRU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GATES", "State", "Step", "gru_step", "lstm_step"]

State = tuple[Tensor, Tensor]
"""h and c; c is empty where there is none."""

Step = Callable[[Tensor, State], State]
"""One step: from what is made of the input, and the state before, to the state after."""

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def lstm_step(a: Tensor, c: Tensor, w_hr: Tensor | None, of_cell: Callable[[Tensor], Tensor] | None = None) -> State:
    """Return h' and c' of ``i, f, g, o = a``: ``c' = σ(f) c + σ(i) tanh g``, ``h' = W_hr (σ(o) tanh(of_cell(c')))``.

    It is c' that goes on, whatever the output sees of it.
    """
    i, f, g, o = a.chunk(4, -1)
    c = torch.addcmul(torch.sigmoid(i) * torch.tanh(g), torch.sigmoid(f), c)
    h = torch.sigmoid(o) * torch.tanh(c if of_cell is None else of_cell(c))
    return h if w_hr is None else F.linear(h, w_hr), c


def gru_step(gates: Tensor, new: Tensor, of_state: Tensor, h: Tensor) -> Tensor:
    """Return h' of ``r, z = σ(gates)``: ``n = tanh(new + r of_state)``, ``h' = (1 − z) n + z h``."""
    r, z = torch.sigmoid(gates).chunk(2, -1)
    n = torch.tanh(torch.addcmul(new, r, of_state))
    return torch.addcmul(n, z, h - n)
