"""What batch-normalized recurrent layers and their cells share: the norms' tensors, and one step in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.nn.normalized import Normalized
from normswap.nn.recomputation import refuse_recomputation
from normswap.nn.recurrent_steps import State, gru_step, lstm_step

__all__ = ["BatchNormalized"]


class BatchNormalized(Normalized):
    """A recurrent layer, or a cell, with batch normalization of what its matrices give."""

    prefix = "bn"
    eps: float
    momentum: float
    max_length: int | None
    input_only: bool
    training: bool

    @staticmethod
    def _taken_from(options: dict[str, Any]) -> dict[str, Any]:
        """Take the settings of the norms out of a constructor's options."""
        names = ("max_length", "input_only", "cell_norm", "gain", "eps", "momentum")
        return {name: options.pop(name) for name in names if name in options}

    def _settle(
        self,
        *,
        max_length: int | None = None,
        input_only: bool = False,
        cell_norm: bool = False,
        gain: float = 0.1,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        """Take the settings and add the norms' tensors."""
        assert isinstance(self, nn.Module)
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
                    self.register_parameter(self._of_norm(part, kind, end), nn.Parameter(like.new_empty(units)))
                for kind in ("mean", "var"):
                    shape = (units,) if max_length is None else (max_length, units)
                    self.register_buffer(self._of_norm(part, kind, end), like.new_empty(shape))
        self.reset_parameters()

    def _parts(self) -> Sequence[str]:
        return ("ih",) if self.input_only else ("ih", "hh")

    def _values(self, part: str, end: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gain, the running mean and the running variance of a norm."""
        gain, mean, var = (getattr(self, self._of_norm(part, kind, end)) for kind in ("weight", "mean", "var"))
        return gain, mean, var

    def _why_no_torchs(self, kind: str) -> str:
        """Return why no layer of torch's computes the same in evaluation, or nothing."""
        if "forward" in vars(self):
            return "its forward was replaced on the instance"
        if not type(self).forward.__module__.startswith("normswap."):  # type: ignore[attr-defined]
            return f"{type(self).__name__} has a forward of its own"
        if self.max_length is None:
            return ""
        return f"it has statistics of its own for each step, which torch's {kind} has not"

    # Statistics shared over time -------------------------------------------------------------------------------------

    def _plain(self, end: str, x: Tensor | None = None) -> dict[str, Tensor]:
        """Return the tensors with which a layer of torch's is this one; with ``x``, the batch's statistics are its."""
        if x is not None and not self.input_only:
            refuse_recomputation(f"a {type(self).__name__} whose statistics are shared over time")
        found: dict[str, Tensor] = {}
        for part in ("ih", "hh"):
            weight, bias = self._own(f"weight_{part}", end), self._own(f"bias_{part}", end)
            bias = weight.new_zeros(len(weight)) if bias is None else bias
            if part == "ih" or not self.input_only:
                gain, mean, var = self._values(part, end)
                if x is not None:  # what is used here does not change before the gradients are taken
                    of_batch = part == "ih"
                    mean, var = (
                        self._follow(part, end, F.linear(x, weight)) if of_batch else (mean.clone(), var.clone())
                    )
                factor = gain * (var + self.eps).rsqrt()
                weight, bias = factor[:, None] * weight, bias - factor * mean
            found |= {f"weight_{part}": weight, f"bias_{part}": bias}
        order = (*(f"{kind}_{part}" for kind in ("weight", "bias") for part in ("ih", "hh")),)
        found = {name: found[name] for name in order}
        if (projection := self._own("weight_hr", end)) is not None:
            found["weight_hr"] = projection
        return {f"{name}_{end}" if end else name: value for name, value in found.items()}

    def _fill(self, made: nn.Module) -> None:
        """Give a layer of torch's on the meta device, which draws no random numbers, its values, flags and mode.

        A matrix of it trains where the one of its name does, or that one's gain; so does a bias that this one has not.
        """
        assert isinstance(self, nn.Module)
        made.to_empty(device=next(self.parameters()).device)
        for end in self._ends():
            for name, value in self._plain(end).items():
                own = [self._parameters.get(name)]
                if own[0] is None or name.startswith("weight"):
                    own.append(self._parameters.get(self._of_norm(name.split("_")[1], "weight", end)))
                parameter = made.get_parameter(name).requires_grad_(any(p is not None and p.requires_grad for p in own))
                parameter.data.copy_(value)
        made.train(self.training)

    def _follow(self, part: str, end: str, values: Tensor) -> tuple[Tensor, Tensor]:
        """Let the running statistics follow ``values``, ``(rows, units)``, and return the mean and the variance."""
        rows = len(values) if values.ndim > 1 else 1
        if rows < 2:
            raise ValueError(
                f"a batch in training must have more than one value per unit, and has {rows}: give longer sequences or "
                "more of them"
            )
        _, mean, var = self._values(part, end)
        values = values.to(mean.dtype)
        now = values.mean(0), values.var(0, correction=0)
        with torch.no_grad():
            mean.lerp_(now[0], self.momentum)
            var.lerp_(now[1] * (rows / (rows - 1)), self.momentum)
        return now

    # Statistics per step ---------------------------------------------------------------------------------------------

    def _at(self, end: str, now: Tensor, state: State, t: int, *, alone: bool = False) -> State:
        """Return the state after step ``t``; ``now`` is what W_ih gives there.

        Of a sample that goes on ``alone`` the running statistics are taken in training, too.
        """
        of_input = self._normalized("ih", end, now, t, alone=alone)
        of_state = self._normalized("hh", end, F.linear(state[0], self._own("weight_hh", end)), t, alone=alone)
        cell = partial(self._normalized, "c", end, t=t, alone=alone) if self.cell_norm else None
        return self._advanced(of_input, of_state, state, self._own("weight_hr", end), cell)

    def _advanced(
        self,
        u: Tensor,
        w: Tensor,
        state: State,
        w_hr: Tensor | None = None,
        of_cell: Callable[[Tensor], Tensor] | None = None,
    ) -> State:
        """Return the state after a step; ``u`` and ``w`` are what becomes of the input and of h."""
        h, c = state
        if self.mode == "LSTM":
            return lstm_step(u + w, c, w_hr, of_cell)
        if self.mode == "GRU":
            parts = (2 * self.hidden_size, self.hidden_size)
            (gates, new), (more, recurrent) = u.split(parts, -1), w.split(parts, -1)
            return gru_step(gates + more, new, recurrent, h), c
        return (torch.relu if self.mode == "RNN_RELU" else torch.tanh)(u + w), c

    def _normalized(self, part: str, end: str, x: Tensor, t: int, *, alone: bool) -> Tensor:
        bias = getattr(self, self._of_norm("c", "bias", end)) if part == "c" else self._own(f"bias_{part}", end)
        if part == "hh" and self.input_only:
            return x if bias is None else x + bias
        gain, mean, var = self._values(part, end)
        k = min(t, len(mean) - 1)
        return F.batch_norm(x, mean[k], var[k], gain, bias, self.training and not alone, self.momentum, self.eps)

    def _settings(self) -> str:
        """Return what is printed of the settings."""
        more = "" if self.max_length is None else f", max_length={self.max_length}"
        more += ", input_only=True" if self.input_only else ""
        return more + (", cell_norm=True" if self.cell_norm else "")
