"""What normalized LSTMs, GRUs and RNNs share: the interface of torch's layers, layer by layer and step by step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from normswap.nn.normalized import Normalized
from normswap.nn.recurrent import LiveBase
from normswap.nn.recurrent_steps import State, Step

__all__ = ["NormalizedRNNBase", "over_time", "states_before", "turned"]


class NormalizedRNNBase(Normalized, LiveBase):
    """A recurrent layer whose classes say what one layer of it computes; inputs, outputs and states are torch's."""

    def _ends(self, layer: int | None = None) -> list[str]:
        """Return what the names of the tensors of each direction end with, of one layer or of all."""
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{k}{end}" for k in (range(self.num_layers) if layer is None else [layer]) for end in ends]

    def _one_layer(self, k: int, x: Tensor, sizes: list[int], first: Sequence[State]) -> tuple[Tensor, list[State]]:
        """Run layer ``k`` in all directions; return all h, those of the directions side by side, and the last states.

        Args:
            k: Which layer.
            x: The inputs of all steps, one after the other. ``(rows, in)``
            sizes: How many samples each step has, the longest ones first.
            first: The first h and c of each direction.
        """
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
        last: list[State] = []
        for k in range(self.num_layers):
            if k and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            rows = range(len(last), len(last) + len(self._ends(k)))
            x, ends = self._one_layer(k, x, sizes, [(state[0][row], state[1][row]) for row in rows])
            last += ends
        return x, tuple(torch.stack(parts) for parts in zip(*last, strict=True))


def over_time(step: Step, u: Tensor, sizes: list[int], first: State, *, backwards: bool) -> tuple[Tensor, State]:
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


def states_before(y: Tensor, first: Tensor, sizes: list[int], *, backwards: bool) -> Tensor:
    """Return the h before each step, in the order of ``y``, which are those after."""
    steps = y.split(sizes)
    if not backwards:
        return torch.cat([first, *(h[:size] for h, size in zip(steps, sizes[1:], strict=False))])
    following = [*steps[1:], first[:0]]
    return torch.cat([torch.cat([h, first[len(h) : size]]) for h, size in zip(following, sizes, strict=True)])


def turned(sizes: list[int], device: torch.device) -> Tensor:
    """Return where each row of the turned sequences comes from, and so where it goes to: each is turned by itself."""
    starts = torch.tensor([0, *itertools.accumulate(sizes)][:-1])
    lengths = torch.tensor([sum(size > n for size in sizes) for n in range(sizes[0])])
    rows = [starts[lengths[:size] - 1 - t] + torch.arange(size) for t, size in enumerate(sizes)]
    return torch.cat(rows).to(device)
