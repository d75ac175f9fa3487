"""Batch-normalized LSTM, GRU and RNN with the interface of torch's.

Note [Statistics shared over time]
What W_hh gives at a step depends on how it was normalized at the steps before, so that the statistics of a batch over
all of its steps are not to be had before the last step. In training it is therefore normalized by the running
statistics, which follow each batch afterwards: over all steps and samples. No gradient goes through them. What W_ih
gives is there for all steps at once, and is normalized by the batch's own statistics. Both are then affine maps of what
the matrices give, and torch's kernel computes the layer from ``diag(γ/σ) W`` and ``b − γ μ/σ``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.nn.batch_normalized import BatchNormalized
from normswap.nn.normalized import rnn_mode, without_cell_norm
from normswap.nn.normalized_rnn import NormalizedRNNBase, over_time, states_before, turned
from normswap.nn.recurrent_steps import State

__all__ = ["BatchNormGRU", "BatchNormLSTM", "BatchNormRNN", "BatchNormRNNBase"]

_KERNELS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": torch._VF.lstm,
    "GRU": torch._VF.gru,
    "RNN_TANH": torch._VF.rnn_tanh,
    "RNN_RELU": torch._VF.rnn_relu,
}
_TORCHS: dict[str, type[nn.RNNBase]] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN_TANH": nn.RNN, "RNN_RELU": nn.RNN}


class BatchNormRNNBase(BatchNormalized, NormalizedRNNBase):
    """What the three layers share."""

    def __init__(self, mode: str, *args: Any, **options: Any) -> None:
        settings = self._taken_from(options)
        super().__init__(mode, *args, **options)
        self._settle(**settings)

    def _one_layer(self, k: int, x: Tensor, sizes: list[int], first: Sequence[State]) -> tuple[Tensor, list[State]]:
        ends = self._ends(k)
        if self.max_length is None:
            return self._shared(ends, x, sizes, first)
        found = [self._stepwise(end, x, sizes, first[d], backwards=d == 1) for d, end in enumerate(ends)]
        return torch.cat([y for y, _ in found], -1), [state for _, state in found]

    # Statistics shared over time, see the note above -----------------------------------------------------------------

    def _shared(
        self, ends: list[str], x: Tensor, sizes: list[int], first: Sequence[State]
    ) -> tuple[Tensor, list[State]]:
        flat = [tensor for end in ends for tensor in self._plain(end, x if self.training else None).values()]
        h, c = (torch.stack([state[i] for state in first]) for i in range(2))
        given = (h, c) if self.mode == "LSTM" else h
        how = (flat, True, 1, 0.0, self.training, len(ends) > 1)
        if sizes[0] == sizes[-1]:
            y, *last = _KERNELS[self.mode](x.unflatten(0, (len(sizes), sizes[0])), given, *how, False)
            y = y.flatten(0, 1)
        else:
            y, *last = _KERNELS[self.mode](x, torch.tensor(sizes), given, *how)
        if self.training and not self.input_only:
            with torch.no_grad():
                for d, (end, own) in enumerate(zip(ends, y.chunk(len(ends), -1), strict=True)):
                    before = states_before(own, first[d][0], sizes, backwards=d == 1)
                    self._follow("hh", end, F.linear(before, self._own("weight_hh", end)))
        last_c = last[1] if self.mode == "LSTM" else c
        return y, [(last[0][d], last_c[d]) for d in range(len(ends))]

    def deployed(self) -> nn.RNNBase | str:
        """Return the layer of torch's that computes the same in evaluation, or why there is none."""
        if reason := self._why_no_torchs(_TORCHS[self.mode].__name__):
            return reason
        like = next(self.parameters())
        options: dict[str, Any] = {"num_layers": self.num_layers, "batch_first": self.batch_first}
        options |= {"dropout": self.dropout, "bidirectional": self.bidirectional}
        options |= {"proj_size": self.proj_size} if self.mode == "LSTM" else {}
        options |= {"nonlinearity": "relu" if self.mode == "RNN_RELU" else "tanh"} if "RNN" in self.mode else {}
        make: Any = _TORCHS[self.mode]
        made: nn.RNNBase = make(self.input_size, self.hidden_size, device="meta", dtype=like.dtype, **options)
        self._fill(made)
        return made

    # Statistics per step ---------------------------------------------------------------------------------------------

    def _stepwise(
        self, end: str, x: Tensor, sizes: list[int], first: State, *, backwards: bool
    ) -> tuple[Tensor, State]:
        """Run one direction, step by step; backwards each sequence is turned round by itself, so all begin at once."""
        order = turned(sizes, x.device) if backwards else None
        u = F.linear(x if order is None else x[order], self._own("weight_ih", end))
        time = itertools.count()

        def step(now: Tensor, state: State) -> State:
            return self._at(end, now, state, next(time), alone=sizes[0] > 1 and len(now) == 1)

        y, last = over_time(step, u, sizes, first, backwards=False)
        return y if order is None else y[order], last

    def extra_repr(self) -> str:
        return super().extra_repr() + self._settings()


class BatchNormLSTM(BatchNormRNNBase):
    """LSTM with batch normalization; the constructor, inputs, outputs and parameters of ``nn.LSTM``, and more.

    ``i, f, g, o = BN(W_ih x; γ_ih) + b_ih + BN(W_hh h; γ_hh) + b_hh``, ``c' = σ(f) c + σ(i) tanh g``,
    ``h' = σ(o) tanh(BN(c'; γ_c, β_c))``; c' goes on as it is. ``BN(a; γ) = γ (a − μ)/√(var + eps)`` per unit.

    Without ``max_length`` μ and var are shared over time, and c is not normalized: in evaluation the layer is an LSTM,
    which ``fold`` makes of it. In training W_ih x is normalized by the batch's own statistics, over all samples and
    steps (packed sequences: all that there are), W_hh h by the running ones (Note [Statistics shared over time]).

    With ``max_length`` each step has statistics of its own, in training those of the batch's samples, and the steps
    from ``max_length`` on share the last ones. They count from where a direction begins. Where sequences of a packed
    batch have ended and one is left alone, it takes the running statistics.

    Beside the parameters of ``nn.LSTM`` there are, per layer and direction, ``bn_ih_weight_l0`` and
    ``bn_hh_weight_l0``, ``(4H,)``, and with ``cell_norm`` ``bn_c_weight_l0`` and ``bn_c_bias_l0``, ``(H,)``; the
    running statistics are the buffers ``bn_ih_mean_l0``, ``bn_ih_var_l0`` and so on, per step ``(max_length, 4H)``.

    Args:
        args: The arguments of ``nn.LSTM``: ``input_size``, ``hidden_size``, ``num_layers``, ``bias``, ``batch_first``,
            ``dropout``, ``bidirectional``, ``proj_size``, ``device``, ``dtype``.
        max_length: How many steps have statistics of their own; None shares them over time.
        input_only: Whether W_ih x alone is normalized (Laurent et al. 2015).
        cell_norm: Whether the output sees BN(c'), or c' itself.
        gain: What the gains start at. Cooijmans et al. take 0.1, at which tanh does not saturate.
        eps: Added to each variance.
        momentum: The rate at which the running statistics follow the batches.

    Source: T. Cooijmans et al., *Recurrent Batch Normalization*, 2016, eq. 6-8, whose b is ``b_ih + b_hh``; C. Laurent
    et al., *Batch Normalized Recurrent Neural Networks*, 2015, for ``input_only`` and statistics over time.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__("LSTM", *args, **options)


class BatchNormGRU(BatchNormRNNBase):
    """GRU with batch normalization; the constructor, inputs, outputs and parameters of ``nn.GRU``, and more.

    ``r, z = σ(BN(W_ih x) + b_ih + BN(W_hh h) + b_hh)``, ``n = tanh(BN(W_ih x) + b_ih + r (BN(W_hh h) + b_hh))``,
    ``h' = (1 − z) n + z h``. Parameters, buffers and training are those of :class:`BatchNormLSTM`, with 3H units.

    Args:
        args: The arguments of ``nn.GRU``, and those of :class:`BatchNormLSTM` but for ``cell_norm``.

    Source: as of :class:`BatchNormLSTM`; neither paper has a GRU.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__("GRU", *args, **without_cell_norm(options))


class BatchNormRNN(BatchNormRNNBase):
    """RNN with batch normalization; the constructor, inputs, outputs and parameters of ``nn.RNN``, and more.

    ``h' = f(BN(W_ih x) + b_ih + BN(W_hh h) + b_hh)``. Parameters, buffers and training are those of
    :class:`BatchNormLSTM`, with H units.

    Args:
        args: The arguments of ``nn.RNN``, and those of :class:`BatchNormLSTM` but for ``cell_norm``.
        nonlinearity: f, ``"tanh"`` or ``"relu"``.

    Source: C. Laurent et al., *Batch Normalized Recurrent Neural Networks*, 2015.
    """

    def __init__(self, *args: Any, nonlinearity: str = "tanh", **options: Any) -> None:
        super().__init__(rnn_mode(nonlinearity), *args, **without_cell_norm(options))
        self.nonlinearity = nonlinearity
