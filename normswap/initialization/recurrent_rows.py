"""Data-dependent initialization of recurrent layers: the pre-activations of their gates get mean 0 and deviation 1.

Note [Pre-activations over time]
A row j makes one value of one gate, of the pre-activation ``a_j = g_j v_j·x/‖v_j‖ + b_j + w_j``, with w what the state
h before the step brings: ``w = W_hh h + b_hh``, for the new values of a GRU ``r (W_hh h + b_hh)``. Over all steps and
samples of a minibatch (Salimans & Kingma 2016, eq. 5-6, of the whole pre-activation)

    E[g t + b + w] = 0,  Var[g t + b + w] = 1,  t = v·x/‖v‖

gives g, the positive root of a quadratic equation, and b. Both change h, and with it w: the layer is run again until
they hold. The rows of W_hh and b_hh stay as they are. What W_hh gives is small at first, and rows that were as large as
a deviation of 1 wants would let gradients grow from step to step. The authors themselves take the usual initialization
for recurrent networks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from normswap.errors import InitializationError
from normswap.initialization.gains import gains_of
from normswap.nn.kinds import class_of
from normswap.nn.normalized_rnn import over_time, turned
from normswap.nn.plain import legacy_hooks
from normswap.nn.recurrent import ROWS, LiveBase, is_plain
from normswap.nn.recurrent_steps import State, gru_step, lstm_step
from normswap.runs.processes import summed
from normswap.runs.writes import unwatched

__all__ = ["settle_rows"]

_MOST_RUNS = 60
_MEAN, _DEVIATION = 1e-4, 1e-3
"""How near to 0 and 1 mean and deviation of a pre-activation are in the end; a tenth of what is promised."""

Found = tuple[str, tuple[str, ...]]
"""How a layer was initialized, and notes."""


def settle_rows(
    name: str,
    layer: nn.Module,
    given: tuple[tuple[Any, ...], dict[str, Any]],
    changing: Callable[..., AbstractContextManager[None]],
    scaled: set[int],
) -> Found:
    """Scale the rows of W_ih and set the biases of a recurrent layer, in place (Note [Pre-activations over time]).

    Args:
        name: Its name, for errors.
        layer: The layer.
        given: The arguments of its call, positional and by keyword.
        changing: Within what it returns tensors may be written.
        scaled: The ids of what was scaled already; what is scaled here is added.

    Raises:
        InitializationError: What it is given, or what it computes, is not finite.
    """
    if reason := _why_not(layer):
        return "not initialized", (reason,)
    assert isinstance(layer, nn.RNNBase)
    x, sizes, state = _steps(layer, *_input_and_state(*given))
    ends = ("", "_reverse") if layer.bidirectional else ("",)
    rows: list[tuple[str, _Rows]] = []
    for k in range(layer.num_layers):
        outputs = []
        for d, end in enumerate(ends):
            row = k * len(ends) + d
            order = turned(sizes, x.device) if d else torch.arange(len(x), device=x.device)
            one = _Direction.of(layer, f"l{k}{end}")
            found, y = _settled(name, one, x[order], sizes, (state[0][row], state[1][row]))
            if found is None:
                return "not initialized", (f"what layer {k} sees goes on changing with its scales",)
            rows.append((f"l{k}{end}", found))
            outputs.append(y[order])
        x = torch.cat(outputs, -1)
    gains = {end: gains_of(layer, f"weight_ih_{end}") for end, _ in rows}
    if {id(gain) for one in gains.values() for gain in one.gains} & scaled:
        return "not initialized", ("its weight is tied to one that is initialized already",)
    for end, found in rows:
        bias = layer._parameters.get(f"bias_ih_{end}")
        with changing(*gains[end].gains, *([] if bias is None else [bias])):
            gains[end].multiply(ROWS, found.factor)
            if bias is not None:
                bias.copy_(found.bias)
        scaled.update(map(id, gains[end].gains))
    notes = ["the rows of W_hh keep their scale"]
    if kept := sum(int(found.kept.sum()) for _, found in rows):
        notes.append(f"{kept} rows of W_ih, too: what they see is constant, or W_hh alone gives more than deviation 1")
    if not layer.bias:
        notes.append("bias-free: scale only")
    return ("scale and bias" if layer.bias else "scale"), tuple(notes)


def _why_not(layer: nn.Module) -> str:
    """Return why a layer is left as it is, or nothing."""
    if isinstance(layer, nn.RNNCellBase):
        return "a cell, which sees one step at a time: its rows keep the scale that they have"
    if not is_plain(layer):
        kind = class_of(layer)
        if kind.__module__.startswith("normswap.nn."):
            return "it is normalized already"
        return f"{kind.__name__} is a class of its own, and may read its matrices in its own way"
    if legacy_hooks(layer) or (parametrize.is_parametrized(layer) and not isinstance(layer, LiveBase)):
        return "torch computes its matrices and keeps them: convert it"
    return ""


@dataclass(frozen=True)
class _Rows:
    """What one direction gets.

    Args:
        factor: What each row of W_ih is multiplied with. ``(gates·H,)``
        bias: b_ih. ``(gates·H,)``
        kept: Which rows keep their scale. ``(gates·H,)``
    """

    factor: Tensor
    bias: Tensor
    kept: Tensor


@dataclass(frozen=True)
class _Direction:
    """The tensors of one layer in one direction, in float64."""

    mode: str
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None

    @classmethod
    def of(cls, layer: nn.RNNBase, end: str) -> _Direction:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        values = (getattr(layer, f"{name}_{end}", None) for name in names)
        w_ih, w_hh, b_ih, b_hh, w_hr = (None if value is None else value.detach().double() for value in values)
        assert w_ih is not None
        assert w_hh is not None
        return cls(layer.mode, w_ih, w_hh, b_ih, b_hh, w_hr)

    def run(self, u: Tensor, sizes: list[int], first: State) -> tuple[Tensor, Tensor]:
        """Return all h, and what the state brings to each pre-activation; ``u`` is what the input does."""
        brought: list[Tensor] = []

        def step(now: Tensor, state: State) -> State:
            w = F.linear(state[0], self.w_hh, self.b_hh)
            if self.mode == "GRU":
                size = state[0].shape[-1]
                gates = now[:, : 2 * size] + w[:, : 2 * size]
                brought.append(torch.cat([w[:, : 2 * size], torch.sigmoid(gates[:, :size]) * w[:, 2 * size :]], -1))
                return gru_step(gates, now[:, 2 * size :], w[:, 2 * size :], state[0]), state[1]
            brought.append(w)
            if self.mode == "LSTM":
                return lstm_step(now + w, state[1], self.w_hr)
            return (torch.relu if self.mode == "RNN_RELU" else torch.tanh)(now + w), state[1]

        y, _ = over_time(step, u, sizes, first, backwards=False)
        return y, torch.cat(brought)


@unwatched()
@torch.no_grad()
def _settled(name: str, one: _Direction, x: Tensor, sizes: list[int], first: State) -> tuple[_Rows | None, Tensor]:
    """Return what one direction gets, None where that does not settle, and all of its h with it."""
    t = F.linear(x.double(), one.w_ih)
    start = (first[0].double(), first[1].double())
    factor = t.new_ones(t.shape[1])
    bias = torch.zeros_like(factor) if one.b_ih is None else one.b_ih
    kept = torch.zeros_like(factor, dtype=torch.bool)
    for _ in range(_MOST_RUNS):
        y, w = one.run(factor * t + bias, sizes, start)
        means, var_t, var_w, both = _moments(name, t, w)
        mean = factor * means[0] + bias + means[1]
        deviation = (factor.square() * var_t + 2 * factor * both + var_w).clamp(min=0).sqrt()
        off = ((deviation - 1).abs() > _DEVIATION) & ~kept
        if one.b_ih is not None:
            off = off | (mean.abs() > _MEAN)
        # Constant, up to rounding, or too much without it: a row that was so once stays as it was, so that this ends.
        stuck = (var_t <= 1e-12 * (means[0].square() + var_t.amax())) | (var_w >= 1)
        if not bool(off.any()):
            return _Rows(factor, bias, kept), y
        kept = kept | stuck
        root = (both.square() + var_t * (1 - var_w)).clamp(min=0).sqrt() - both
        factor = torch.where(kept, 1.0, root / var_t.clamp(min=torch.finfo(var_t.dtype).tiny))
        if one.b_ih is not None:
            bias = -(factor * means[0] + means[1])
    return None, y


def _moments(name: str, t: Tensor, w: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
    """Return the means of t and w, their variances and their covariance, over the rows of all processes."""
    count, total_t, total_w = summed(f"the means at '{name}'", t.new_tensor(float(len(t))), t.sum(0), w.sum(0))
    means = total_t / count, total_w / count
    t, w = t - means[0], w - means[1]
    squares = summed(f"the deviations at '{name}'", t.square().sum(0), w.square().sum(0), (t * w).sum(0))
    var_t, var_w, both = (value / count for value in squares)
    if not isfinite(float((means[0] + means[1] + var_t + var_w).sum())):
        raise InitializationError(
            f"what '{name}' computes is not finite on this batch",
            code="initialize-not-finite",
            hint="check the batch and the weights; the model is as it was",
        )
    return means, var_t, var_w, both


def _input_and_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
    return given["input"], given.get("hx")


def _steps(layer: nn.RNNBase, x: Any, hx: Any) -> tuple[Tensor, list[int], State]:
    """Return the inputs of all steps, one after the other, how many samples each step has, and the first h and c."""
    order = None
    if isinstance(x, PackedSequence):
        data, lengths, order, _ = x
        sizes = lengths.tolist()
    else:
        batched = x.dim() == 3
        x = x if batched else x.unsqueeze(0 if layer.batch_first else 1)
        x = x.transpose(0, 1) if layer.batch_first else x
        data, sizes = x.flatten(0, 1), [x.shape[1]] * x.shape[0]
        if hx is not None and not batched:
            hx = tuple(s.unsqueeze(1) for s in hx) if isinstance(hx, tuple) else hx.unsqueeze(1)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    if hx is None:
        both = (layer.proj_size or layer.hidden_size, layer.hidden_size)
        h, c = (data.new_zeros(rows, sizes[0], size) for size in both)
    else:
        h, c = hx if isinstance(hx, tuple) else (hx, hx.new_zeros(*hx.shape[:2], 0))
        h, c = (h, c) if order is None else (h.index_select(1, order), c.index_select(1, order))
    return data, sizes, (h, c)
