"""Layer-normalized LSTM, GRU and RNN with the interface of torch's: layers, directions, packed sequences, states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from normswap.nn.layer_norm_steps import GATES, PARTS, Direction, State, Step, gru, lstm, rnn
from normswap.nn.recurrent import LiveBase

__all__ = ["LayerNormGRU", "LayerNormLSTM", "LayerNormRNN", "LayerNormRNNBase"]


class LayerNormRNNBase(LiveBase):
    """What the three layers share. What the inputs give is computed and normalized for all steps at once."""

    def __init__(self, mode: str, *args: Any, eps: float = 1e-5, cell_norm: bool = False, **options: Any) -> None:
        super().__init__(mode, *args, **options)
        self.eps, self.cell_norm = eps, cell_norm
        like = next(self.parameters())
        for end in self._ends():
            for part, size in self._norms():
                for kind in ("weight", "bias"):
                    value = torch.empty(size, device=like.device, dtype=like.dtype)
                    setattr(self, f"ln{part}_{kind}_{end}", nn.Parameter(value))
        self.reset_parameters()

    def _ends(self) -> list[str]:
        """Return what the names of the tensors of each layer and direction end with."""
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{k}{end}" for k in range(self.num_layers) for end in ends]

    def _norms(self) -> list[tuple[str, int]]:
        """Return what is normalized, as it stands in the names, and over how many units."""
        units = GATES[self.mode] * self.hidden_size
        found = [(f"_{part}" if part else "", units) for part in PARTS[self.mode]]
        return [*found, ("_c", self.hidden_size)] if self.cell_norm else found

    def reset_parameters(self) -> None:
        """Draw the matrices as torch does; gains start at 1, shifts and the biases within the norms at 0."""
        limit = self.hidden_size**-0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("weight"):
                    parameter.uniform_(-limit, limit)
                else:
                    parameter.fill_(float(name.startswith("ln") and "_weight_" in name))

    def _direction(self, end: str) -> Direction:
        def pair(part: str) -> tuple[Tensor, Tensor] | None:
            name = f"ln{part}_%s_{end}"
            found = [getattr(self, name % kind, None) for kind in ("weight", "bias")]
            return None if found[0] is None or found[1] is None else (found[0], found[1])

        w_ih, w_hh = (getattr(self, f"weight_{part}_{end}") for part in ("ih", "hh"))
        rest = [getattr(self, f"{name}_{end}", None) for name in ("bias_ih", "bias_hh", "weight_hr")]
        of_input = pair("_ih") or pair("")
        assert of_input is not None
        return Direction(w_ih, w_hh, rest[0], rest[1], rest[2], of_input, pair("_hh"), pair("_c"), self.eps)

    def _step(self, p: Direction, x: Tensor) -> tuple[Tensor, Step]:
        raise NotImplementedError

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """Return the outputs and the last state, as torch's layer of the same kind does.

        Args:
            input: ``(T, N, in)``, ``(N, T, in)`` with ``batch_first``, ``(T, in)``, or a packed sequence.
            hx: h, or of an LSTM h and c; default zeros. ``(layers · directions, N, H)``

        Raises:
            ValueError: A sequence has no steps.
        """
        with parametrize.cached():
            if isinstance(input, PackedSequence):
                data, sizes, order, back = input
                found, state = self._run(data, sizes.tolist(), self._given(data, hx, int(sizes[0]), order))
                state = tuple(s if back is None else s.index_select(1, back) for s in state)
                return PackedSequence(found, sizes, order, back), self._returned(state)
            batched = input.dim() == 3
            x = input if batched else input.unsqueeze(0 if self.batch_first else 1)
            x = x.transpose(0, 1) if self.batch_first else x
            steps, batch = x.shape[:2]
            if not steps:
                raise ValueError("a sequence without steps was given; a recurrent layer needs one at least")
            if not batched and hx is not None:
                hx = tuple(s.unsqueeze(1) for s in hx) if isinstance(hx, tuple) else hx.unsqueeze(1)
            y, state = self._run(x.flatten(0, 1), [batch] * steps, self._given(x, hx, batch, None))
            y = y.unflatten(0, (steps, batch))
            y = y.transpose(0, 1) if self.batch_first else y
            if not batched:
                y, state = y.squeeze(0 if self.batch_first else 1), tuple(s.squeeze(1) for s in state)
            return y, self._returned(state)

    def _given(self, x: Tensor, hx: Any, batch: int, order: Tensor | None) -> State:
        """Return the first h and c, in the order of the samples; checked."""
        if x.shape[-1] != self.input_size:
            raise RuntimeError(f"input.size(-1) must be equal to input_size, {self.input_size}, got {x.shape[-1]}")
        rows = self.num_layers * (2 if self.bidirectional else 1)
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)
        if hx is None:
            h, c = (x.new_zeros(rows, batch, size) for size in sizes)
            return h, c
        h, c = hx if self.mode == "LSTM" else (hx, x.new_zeros(rows, batch, 0))
        for state, size in zip((h, c) if self.mode == "LSTM" else (h,), sizes, strict=False):
            self.check_hidden_size(state, (rows, batch, size))
        return (h, c) if order is None else (h.index_select(1, order), c.index_select(1, order))

    def _returned(self, state: Sequence[Tensor]) -> Any:
        return (state[0], state[1]) if self.mode == "LSTM" else state[0]

    def _run(self, x: Tensor, sizes: list[int], state: State) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run all layers; the samples of each step follow one another, ``sizes[t]`` of them, the longest first."""
        ends, last = self._ends(), []
        directions = 2 if self.bidirectional else 1
        for k in range(self.num_layers):
            if k and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            found = []
            for d in range(directions):
                row = k * directions + d
                u, step = self._step(self._direction(ends[row]), x)
                y, end = _over_time(step, u, sizes, (state[0][row], state[1][row]), backwards=d == 1)
                found.append(y)
                last.append(end)
            x = torch.cat(found, -1) if directions > 1 else found[0]
        return x, tuple(torch.stack(parts) for parts in zip(*last, strict=True))

    def extra_repr(self) -> str:
        return super().extra_repr() + (", cell_norm=True" if self.cell_norm else "")


def _over_time(step: Step, u: Tensor, sizes: list[int], first: State, *, backwards: bool) -> tuple[Tensor, State]:
    """Take ``step`` after ``step``, and return all h, in the order of ``u``, and the last state of each sample.

    Fewer and fewer samples go on: where one ends, its state is the last; backwards it begins there, with its first one.
    """
    inputs = u.split(sizes)
    outputs: list[Tensor] = []
    done: list[State] = []
    state: State = (first[0][:0], first[1][:0]) if backwards else first
    for now in reversed(inputs) if backwards else inputs:
        before, size = len(state[0]), len(now)
        if size > before:
            state = (torch.cat([state[0], first[0][before:size]]), torch.cat([state[1], first[1][before:size]]))
        elif size < before:
            done.append((state[0][size:], state[1][size:]))
            state = (state[0][:size], state[1][:size])
        state = step(now, state)
        outputs.append(state[0])
    if done:
        parts = [state, *reversed(done)]
        state = (torch.cat([h for h, _ in parts]), torch.cat([c for _, c in parts]))
    return torch.cat(outputs[::-1] if backwards else outputs), state


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
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"the nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        super().__init__(f"RNN_{nonlinearity.upper()}", *args, eps=eps, **options)
        self.nonlinearity = nonlinearity

    def _step(self, p: Direction, x: Tensor) -> tuple[Tensor, Step]:
        return rnn(p, x, torch.relu if self.mode == "RNN_RELU" else torch.tanh)
