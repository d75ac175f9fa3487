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

from normswap.nn.normalized_rnn import NormalizedRNNBase, over_time, states_before, turned
from normswap.nn.recurrent_steps import GATES, State, gru_step, lstm_step

__all__ = ["BatchNormGRU", "BatchNormLSTM", "BatchNormRNN", "BatchNormRNNBase"]

_KERNELS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": torch._VF.lstm,
    "GRU": torch._VF.gru,
    "RNN_TANH": torch._VF.rnn_tanh,
    "RNN_RELU": torch._VF.rnn_relu,
}
_TORCHS: dict[str, type[nn.RNNBase]] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN_TANH": nn.RNN, "RNN_RELU": nn.RNN}


class BatchNormRNNBase(NormalizedRNNBase):
    """What the three layers share."""

    def __init__(
        self,
        mode: str,
        *args: Any,
        max_length: int | None = None,
        input_only: bool = False,
        cell_norm: bool = False,
        gain: float = 0.1,
        eps: float = 1e-5,
        momentum: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(mode, *args, **options)
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        if cell_norm and max_length is None:
            raise ValueError("cell_norm=True needs statistics per step: give max_length")
        self.max_length, self.input_only, self.cell_norm = max_length, input_only, cell_norm
        self.gain, self.eps, self.momentum = gain, eps, momentum
        like = next(self.parameters()).detach()
        for end in self._ends():
            for part, units in self._norms():
                for kind in ("weight", "bias") if part == "c" else ("weight",):
                    setattr(self, f"bn_{part}_{kind}_{end}", nn.Parameter(like.new_empty(units)))
                for kind in ("mean", "var"):
                    shape = (units,) if max_length is None else (max_length, units)
                    self.register_buffer(f"bn_{part}_{kind}_{end}", like.new_empty(shape))
        self.reset_parameters()

    def _norms(self) -> list[tuple[str, int]]:
        """Return what is normalized, as it stands in the names, and how many units it has."""
        units = GATES[self.mode] * self.hidden_size
        found = [("ih", units)] if self.input_only else [("ih", units), ("hh", units)]
        return [*found, ("c", self.hidden_size)] if self.cell_norm else found

    def reset_parameters(self) -> None:
        """Draw the matrices as torch does; biases start at 0, gains at ``gain``, the statistics at 0 and 1."""
        limit = self.hidden_size**-0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("weight"):
                    parameter.uniform_(-limit, limit)
                else:
                    parameter.fill_(self.gain if name.startswith("bn") and "_weight_" in name else 0.0)
            for name, buffer in self.named_buffers():
                buffer.fill_(float("_var_" in name))

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
                    self._follow("hh", end, F.linear(before, getattr(self, f"weight_hh_{end}")))
        last_c = last[1] if self.mode == "LSTM" else c
        return y, [(last[0][d], last_c[d]) for d in range(len(ends))]

    def _plain(self, end: str, x: Tensor | None = None) -> dict[str, Tensor]:
        """Return the tensors with which a layer of torch's is this one; with ``x``, the batch's statistics are its."""
        found: dict[str, Tensor] = {}
        for part in ("ih", "hh"):
            weight, bias = getattr(self, f"weight_{part}_{end}"), getattr(self, f"bias_{part}_{end}", None)
            bias = weight.new_zeros(len(weight)) if bias is None else bias
            if part == "ih" or not self.input_only:
                gain, mean, var = (getattr(self, f"bn_{part}_{kind}_{end}") for kind in ("weight", "mean", "var"))
                if x is not None:  # what is used here does not change before the gradients are taken
                    of_batch = part == "ih"
                    mean, var = (
                        self._follow(part, end, F.linear(x, weight)) if of_batch else (mean.clone(), var.clone())
                    )
                factor = gain * (var + self.eps).rsqrt()
                weight, bias = factor[:, None] * weight, bias - factor * mean
            found |= {f"weight_{part}_{end}": weight, f"bias_{part}_{end}": bias}
        order = (*(f"{kind}_{part}_{end}" for kind in ("weight", "bias") for part in ("ih", "hh")),)
        found = {name: found[name] for name in order}
        return found | ({f"weight_hr_{end}": getattr(self, f"weight_hr_{end}")} if self.proj_size else {})

    def _follow(self, part: str, end: str, values: Tensor) -> tuple[Tensor, Tensor]:
        """Let the running statistics follow ``values``, ``(rows, units)``, and return the mean and the variance."""
        if len(values) < 2:
            raise ValueError(
                f"a batch in training must have more than one value per unit, and has {len(values)}: give longer "
                "sequences or more of them"
            )
        mean, var = (getattr(self, f"bn_{part}_{kind}_{end}") for kind in ("mean", "var"))
        values = values.to(mean.dtype)
        now = values.mean(0), values.var(0, correction=0)
        with torch.no_grad():
            mean.lerp_(now[0], self.momentum)
            var.lerp_(now[1] * (len(values) / (len(values) - 1)), self.momentum)
        return now

    def deployed(self) -> nn.RNNBase | str:
        """Return the layer of torch's that computes the same in evaluation, or why there is none."""
        if self.max_length is not None:
            return f"it has statistics of its own for each step, which torch.nn's {_TORCHS[self.mode].__name__} has not"
        like = next(self.parameters())
        options: dict[str, Any] = {"num_layers": self.num_layers, "batch_first": self.batch_first}
        options |= {"dropout": self.dropout, "bidirectional": self.bidirectional}
        options |= {"proj_size": self.proj_size} if self.mode == "LSTM" else {}
        options |= {"nonlinearity": "relu" if self.mode == "RNN_RELU" else "tanh"} if "RNN" in self.mode else {}
        make: Any = _TORCHS[self.mode]
        made: nn.RNNBase = make(self.input_size, self.hidden_size, device="meta", dtype=like.dtype, **options)
        made.to_empty(device=like.device)  # no random numbers are drawn
        with torch.no_grad():
            for end in self._ends():
                for name, value in self._plain(end).items():
                    made.get_parameter(name).copy_(value)
        made.requires_grad_(any(p.requires_grad for p in self.parameters()))
        return made.train(self.training)

    # Statistics per step ---------------------------------------------------------------------------------------------

    def _stepwise(
        self, end: str, x: Tensor, sizes: list[int], first: State, *, backwards: bool
    ) -> tuple[Tensor, State]:
        """Run one direction, step by step; backwards each sequence is turned round by itself, so all begin at once."""
        order = turned(sizes, x.device) if backwards else None
        w_ih, w_hh, w_hr = (getattr(self, f"weight_{part}_{end}", None) for part in ("ih", "hh", "hr"))
        assert w_ih is not None
        assert w_hh is not None
        u = F.linear(x if order is None else x[order], w_ih)
        time = itertools.count()

        def step(now: Tensor, state: State) -> State:
            t, alone = next(time), sizes[0] > 1 and len(now) == 1
            of_input = self._at("ih", end, now, t, alone=alone)
            of_state = self._at("hh", end, F.linear(state[0], w_hh), t, alone=alone)
            if self.mode == "LSTM":
                cell = (lambda c: self._at("c", end, c, t, alone=alone)) if self.cell_norm else None
                return lstm_step(of_input + of_state, state[1], w_hr, cell)
            if self.mode == "GRU":
                parts = (2 * self.hidden_size, self.hidden_size)
                (gates, new), (more, recurrent) = of_input.split(parts, -1), of_state.split(parts, -1)
                return gru_step(gates + more, new, recurrent, state[0]), state[1]
            return (torch.relu if self.mode == "RNN_RELU" else torch.tanh)(of_input + of_state), state[1]

        y, last = over_time(step, u, sizes, first, backwards=False)
        return y if order is None else y[order], last

    def _at(self, part: str, end: str, x: Tensor, t: int, *, alone: bool) -> Tensor:
        """Return what is made of ``x`` at step ``t``; of a sample that goes on ``alone`` with the running values."""
        bias = getattr(self, f"bn_c_bias_{end}" if part == "c" else f"bias_{part}_{end}", None)
        if part == "hh" and self.input_only:
            return x if bias is None else x + bias
        gain, mean, var = (getattr(self, f"bn_{part}_{kind}_{end}") for kind in ("weight", "mean", "var"))
        k = min(t, len(mean) - 1)
        return F.batch_norm(x, mean[k], var[k], gain, bias, self.training and not alone, self.momentum, self.eps)

    def extra_repr(self) -> str:
        more = "" if self.max_length is None else f", max_length={self.max_length}"
        more += ", input_only=True" if self.input_only else ""
        return super().extra_repr() + more + (", cell_norm=True" if self.cell_norm else "")


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
        super().__init__("GRU", *args, **_without_cell(options))


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
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"the nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        super().__init__(f"RNN_{nonlinearity.upper()}", *args, **_without_cell(options))
        self.nonlinearity = nonlinearity


def _without_cell(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("cell_norm"):
        raise TypeError("cell_norm is an LSTM's: this layer has no c")
    return options
