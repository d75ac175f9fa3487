"""Batch-normalized cells of an LSTM, GRU and RNN with the interface of torch's: one step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.nn.batch_normalized import BatchNormalized
from normswap.nn.normalized import NormalizedCell, rnn_mode, without_cell_norm
from normswap.nn.recurrent_steps import State

__all__ = ["BatchNormGRUCell", "BatchNormLSTMCell", "BatchNormRNNCell"]

_TORCHS: dict[str, type[nn.RNNCellBase]] = {
    "LSTM": nn.LSTMCell,
    "GRU": nn.GRUCell,
    "RNN_TANH": nn.RNNCell,
    "RNN_RELU": nn.RNNCell,
}


class _Cell(BatchNormalized, NormalizedCell):
    """What the three cells share."""

    def __init__(self, mode: str, *args: Any, **options: Any) -> None:
        settings = self._taken_from(options)
        super().__init__(mode, *args, **options)
        self._settle(**settings)

    def forward(self, input: Tensor, hx: Any = None, t: int | None = None) -> Any:
        """Return the state after the step, as torch's cell of the same kind does.

        Args:
            input: ``(N, in)``, in evaluation also ``(in,)``.
            hx: h, or of an LSTM h and c; default zeros. ``(N, H)``
            t: Which step it is, from 0 on, where each has statistics of its own.

        Raises:
            ValueError: ``t`` is missing, or given where all steps share the statistics.
        """
        if (t is None) is not (self.max_length is None):
            steps = (
                "each step has statistics of its own: give t" if t is None else "all steps share statistics: leave t"
            )
            raise ValueError(f"{steps} (max_length={self.max_length})")
        if t is not None and (t < 0 or input.ndim == 1):
            raise ValueError(f"t must be at least 0, and the input a batch; got t={t} and {tuple(input.shape)}")
        return self._stepped(input, hx, t or 0)

    def _one_step(self, x: Tensor, state: State, t: int) -> State:
        if self.max_length is not None:
            return self._at("", F.linear(x, self._own("weight_ih", "")), state, t)
        p = self._plain("", x if self.training else None)
        u, w = F.linear(x, p["weight_ih"], p["bias_ih"]), F.linear(state[0], p["weight_hh"], p["bias_hh"])
        if self.training and not self.input_only:
            with torch.no_grad():
                self._follow("hh", "", F.linear(state[0], self._own("weight_hh", "")))
        return self._advanced(u, w, state)

    def deployed(self) -> nn.Module | str:
        """Return the cell of torch's that computes the same in evaluation, or why there is none."""
        if reason := self._why_no_torchs(_TORCHS[self.mode].__name__):
            return reason
        like = next(self.parameters())
        options: dict[str, Any] = {"nonlinearity": "relu" if self.mode == "RNN_RELU" else "tanh"}
        make: Any = _TORCHS[self.mode]
        form = options if "RNN" in self.mode else {}
        made: nn.Module = make(self.input_size, self.hidden_size, device="meta", dtype=like.dtype, **form)
        self._fill(made)
        return made

    def extra_repr(self) -> str:
        return super().extra_repr() + self._settings()


class BatchNormLSTMCell(_Cell):
    """One step of :class:`~normswap.nn.BatchNormLSTM`, with the interface of ``nn.LSTMCell``.

    Without ``max_length`` it computes what the layer computes of a sequence of one step: in evaluation it is an
    LSTMCell, which ``fold`` makes of it, and in training W_ih x is normalized by the statistics of the samples of this
    step, W_hh h by the running ones, which follow. With ``max_length`` the step ``t`` is given, and over all steps it
    is the layer.

    Args:
        args: The arguments of ``nn.LSTMCell``: ``input_size``, ``hidden_size``, ``bias``, ``device``, ``dtype``.
        max_length: How many steps have statistics of their own; None shares them over time.
        input_only: Whether W_ih x alone is normalized (Laurent et al. 2015).
        cell_norm: Whether the output sees BN(c'), or c' itself.
        gain: What the gains start at.
        eps: Added to each variance.
        momentum: The rate at which the running statistics follow the batches.

    Source: T. Cooijmans et al., *Recurrent Batch Normalization*, 2016, eq. 6-8; C. Laurent et al., *Batch Normalized
    Recurrent Neural Networks*, 2015, for ``input_only`` and statistics over time.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__("LSTM", *args, **options)


class BatchNormGRUCell(_Cell):
    """One step of :class:`~normswap.nn.BatchNormGRU`, with the interface of ``nn.GRUCell``.

    Args:
        args: The arguments of ``nn.GRUCell``, and those of :class:`BatchNormLSTMCell` but for ``cell_norm``.

    Source: as of :class:`BatchNormLSTMCell`; neither paper has a GRU.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__("GRU", *args, **without_cell_norm(options))


class BatchNormRNNCell(_Cell):
    """One step of :class:`~normswap.nn.BatchNormRNN`, with the interface of ``nn.RNNCell``.

    Args:
        args: The arguments of ``nn.RNNCell``, and those of :class:`BatchNormLSTMCell` but for ``cell_norm``.
        nonlinearity: f, ``"tanh"`` or ``"relu"``.

    Source: C. Laurent et al., *Batch Normalized Recurrent Neural Networks*, 2015.
    """

    def __init__(self, *args: Any, nonlinearity: str = "tanh", **options: Any) -> None:
        super().__init__(rnn_mode(nonlinearity), *args, **without_cell_norm(options))
        self.nonlinearity = nonlinearity
