"""Layer-normalized LSTM, GRU and RNN with the interface of torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normswap.nn.layer_norm_lstm import derives_by_hand, lstm_over_time
from normswap.nn.layer_norm_steps import Direction, gru, lstm, rnn
from normswap.nn.layer_normalized import LayerNormalized
from normswap.nn.normalized import rnn_mode
from normswap.nn.normalized_rnn import NormalizedRNNBase, over_time
from normswap.nn.recurrent_steps import State, Step

__all__ = ["LayerNormGRU", "LayerNormLSTM", "LayerNormRNN", "LayerNormRNNBase"]


class LayerNormRNNBase(LayerNormalized, NormalizedRNNBase):
    """What the three layers share. What the inputs give is computed and normalized for all steps at once."""

    def __init__(self, mode: str, *args: Any, eps: float = 1e-5, cell_norm: bool = False, **options: Any) -> None:
        super().__init__(mode, *args, **options)
        self._settle(eps=eps, cell_norm=cell_norm)

    def _one_layer(self, k: int, x: Tensor, sizes: list[int], first: Sequence[State]) -> tuple[Tensor, list[State]]:
        found, last = [], []
        for d, end in enumerate(self._ends(k)):
            y, state = self._over_time(self._direction(end), x, sizes, first[d], backwards=d == 1)
            found.append(y)
            last.append(state)
        return torch.cat(found, -1) if len(found) > 1 else found[0], last

    def _over_time(
        self, p: Direction, x: Tensor, sizes: list[int], first: State, *, backwards: bool
    ) -> tuple[Tensor, State]:
        """Run one direction of a layer; return all h and the last state of each sample."""
        u, step = self._step(p, x)
        return over_time(step, u, sizes, first, backwards=backwards)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", cell_norm=True" if self.cell_norm else "")


class LayerNormLSTM(LayerNormRNNBase):
    """LSTM with layer normalization; the constructor, inputs, outputs and parameters of ``nn.LSTM``, and more.

    ``i, f, g, o = LN(W_ih x + b_ih; γ_ih, β_ih) + LN(W_hh h + b_hh; γ_hh, β_hh)``, ``c' = σ(f) c + σ(i) tanh g``,
    ``h' = σ(o) tanh(LN(c'; γ_c, β_c))``; c' goes on as it is, not normalized. Each LN is over all units of its
    argument, the 4H of all gates or the H of c. The published form has no biases within the norms (they
    start at 0) and one outside, ``b = β_ih + β_hh``; its gains start at 1, its shifts at 0.

    Beside the parameters of ``nn.LSTM`` there are, per layer and direction, ``ln_ih_weight_l0``, ``ln_ih_bias_l0``,
    ``ln_hh_weight_l0`` and ``ln_hh_bias_l0``, ``(4H,)``, and with ``cell_norm`` ``ln_c_weight_l0`` and
    ``ln_c_bias_l0``, ``(H,)``.

    Args:
        args: The arguments of ``nn.LSTM``: ``input_size``, ``hidden_size``, ``num_layers``, ``bias`` (the biases within
            the norms), ``batch_first``, ``dropout``, ``bidirectional``, ``proj_size``, ``device``, ``dtype``.
        cell_norm: Whether the output sees LN(c'), or c' itself.
        eps: Added to each variance.

    Source: J. L. Ba, J. R. Kiros, G. E. Hinton, *Layer Normalization*, 2016, eq. 20-22.
    """

    def __init__(self, *args: Any, cell_norm: bool = True, eps: float = 1e-5, **options: Any) -> None:
        super().__init__("LSTM", *args, cell_norm=cell_norm, eps=eps, **options)

    def _step(self, p: Direction, x: Tensor) -> tuple[Tensor, Step]:
        return lstm(p, x)

    def _over_time(
        self, p: Direction, x: Tensor, sizes: list[int], first: State, *, backwards: bool
    ) -> tuple[Tensor, State]:
        if not derives_by_hand(p, x, sizes):
            return super()._over_time(p, x, sizes, first, backwards=backwards)
        return lstm_over_time(p, p.norm(p.of_input(x), p.ih), len(sizes), first, backwards=backwards)


class LayerNormGRU(LayerNormRNNBase):
    """GRU with layer normalization; the constructor, inputs, outputs and parameters of ``nn.GRU``, and more.

    ``r, z = σ(LN(W_ih x + b_ih; γ_ih, β_ih) + LN(W_hh h + b_hh; γ_hh, β_hh))`` over the 2H units of both gates,
    ``n = tanh(LN(W_ih x + b_ih) + r LN(W_hh h + b_hh))`` over the H units of n, ``h' = (1 − z) n + z h``.

    Beside the parameters of ``nn.GRU`` there are, per layer and direction, ``ln_ih_weight_l0``, ``ln_ih_bias_l0``,
    ``ln_hh_weight_l0`` and ``ln_hh_bias_l0``, ``(3H,)``, of which the first 2H are those of the gates.

    Args:
        args: The arguments of ``nn.GRU``, see :class:`LayerNormLSTM`.
        eps: Added to each variance.

    Source: J. L. Ba, J. R. Kiros, G. E. Hinton, *Layer Normalization*, 2016, the GRU of its supplement.
    """

    def __init__(self, *args: Any, eps: float = 1e-5, **options: Any) -> None:
        super().__init__("GRU", *args, eps=eps, **options)

    def _step(self, p: Direction, x: Tensor) -> tuple[Tensor, Step]:
        return gru(p, x)


class LayerNormRNN(LayerNormRNNBase):
    """RNN with layer normalization; the constructor, inputs, outputs and parameters of ``nn.RNN``, and more.

    ``h' = f(LN(W_ih x + b_ih + W_hh h + b_hh; γ, β))``: one norm, of the sum. Beside the parameters of ``nn.RNN`` there
    are, per layer and direction, ``ln_weight_l0`` and ``ln_bias_l0``, ``(H,)``.

    Args:
        args: The arguments of ``nn.RNN``, see :class:`LayerNormLSTM`.
        nonlinearity: f, ``"tanh"`` or ``"relu"``.
        eps: Added to the variance.

    Source: J. L. Ba, J. R. Kiros, G. E. Hinton, *Layer Normalization*, 2016, eq. 4.
    """

    def __init__(self, *args: Any, nonlinearity: str = "tanh", eps: float = 1e-5, **options: Any) -> None:
        super().__init__(rnn_mode(nonlinearity), *args, eps=eps, **options)
        self.nonlinearity = nonlinearity

    def _step(self, p: Direction, x: Tensor) -> tuple[Tensor, Step]:
        return rnn(p, x, torch.relu if self.mode == "RNN_RELU" else torch.tanh)
