"""The equations of layer-normalized recurrent layers: what is made of all inputs at once, and one step in time.

``LN(a; γ, β) = γ (a − mean a)/√(var a + eps) + β``
over the units of one layer at one step, for each sample by itself (Ba et al. 2016, eq. 3-4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from normswap.nn.recurrent_steps import State, Step, gru_step, lstm_step

__all__ = ["PARTS", "Direction", "gru", "lstm", "lstm_step_of", "rnn"]

PARTS = {"LSTM": ("ih", "hh"), "GRU": ("ih", "hh"), "RNN_TANH": ("",), "RNN_RELU": ("",)}
"""What is normalized over all gates' units: what W_ih gives and what W_hh gives, or the sum of both."""


@dataclass(frozen=True)
class Direction:
    """The tensors of one layer in one direction.

    Args:
        w_ih: W_ih. ``(gates·H, in)``
        w_hh: W_hh. ``(gates·H, size of h)``
        b_ih: b_ih, or None. ``(gates·H,)``
        b_hh: b_hh, or None. ``(gates·H,)``
        w_hr: The projection of h, or None. ``(P, H)``
        ih: γ and β of what W_ih gives; of an RNN, of the sum. ``(gates·H,)`` each
        hh: γ and β of what W_hh gives; of an RNN None.
        c: γ and β of c, or None. ``(H,)`` each
        eps: Added to each variance.
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    ih: tuple[Tensor, Tensor]
    hh: tuple[Tensor, Tensor] | None
    c: tuple[Tensor, Tensor] | None
    eps: float

    def norm(self, x: Tensor, values: tuple[Tensor, Tensor]) -> Tensor:
        """Return LN over the last axis of ``x``, with γ and β."""
        return F.layer_norm(x, values[0].shape, *values, self.eps)

    def of_input(self, x: Tensor) -> Tensor:
        """Return W_ih x + b_ih."""
        return F.linear(x, self.w_ih, self.b_ih)

    def of_state(self, h: Tensor) -> Tensor:
        """Return W_hh h + b_hh."""
        return F.linear(h, self.w_hh, self.b_hh)


def lstm(p: Direction, x: Tensor) -> tuple[Tensor, Step]:
    """Return what an LSTM makes of all inputs, and its step (Ba et al. 2016, eq. 20-22).

    ``i, f, g, o = LN(W_ih x + b_ih) + LN(W_hh h + b_hh)``, ``c' = σ(f) c + σ(i) tanh g``,
    ``h' = σ(o) tanh(LN(c'))``. It is c' that goes on, and not LN(c').
    """
    return p.norm(p.of_input(x), p.ih), lstm_step_of(p)


def lstm_step_of(p: Direction) -> Step:
    """Return the step of :func:`lstm`."""
    assert p.hh is not None
    of_state, cell = p.hh, p.c
    of_cell = None if cell is None else lambda c: p.norm(c, cell)

    def step(u: Tensor, state: State) -> State:
        return lstm_step(u + p.norm(p.of_state(state[0]), of_state), state[1], p.w_hr, of_cell)

    return step


def gru(p: Direction, x: Tensor) -> tuple[Tensor, Step]:
    """Return what a GRU makes of all inputs, and its step (Ba et al. 2016, the GRU of section 6.2 and its supplement).

    ``r, z = σ(LN(W_ih x + b_ih) + LN(W_hh h + b_hh))`` over the 2H units of both gates,
    ``n = tanh(LN(W_ih x + b_ih) + r LN(W_hh h + b_hh))`` over the H units of n, ``h' = (1 − z) n + z h`` (torch's z is
    1 minus the paper's).
    """
    assert p.hh is not None
    size = p.w_hh.shape[0] // 3
    parts = (2 * size, size)
    (gates_ih, new_ih), (gates_hh, new_hh) = (
        tuple(zip(*(value.split(parts) for value in values), strict=True)) for values in (p.ih, p.hh)
    )

    def step(u: Tensor, state: State) -> State:
        h = state[0]
        (u_gates, u_new), (a_gates, a_new) = u.split(parts, -1), p.of_state(h).split(parts, -1)
        gates = u_gates + p.norm(a_gates, gates_hh)
        return gru_step(gates, u_new, p.norm(a_new, new_hh), h), state[1]

    of_gates, of_new = p.of_input(x).split(parts, -1)
    return torch.cat([p.norm(of_gates, gates_ih), p.norm(of_new, new_ih)], -1), step


def rnn(p: Direction, x: Tensor, activation: Callable[[Tensor], Tensor]) -> tuple[Tensor, Step]:
    """Return what an RNN makes of all inputs, and its step (Ba et al. 2016, eq. 4).

    ``h' = f(LN(W_ih x + b_ih + W_hh h + b_hh))``, f the tanh or ReLU.
    """

    def step(u: Tensor, state: State) -> State:
        return activation(p.norm(u + p.of_state(state[0]), p.ih)), state[1]

    return p.of_input(x), step
