"""Recurrent layers in NumPy, step by step, from the papers' equations and torch's order of gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Values = Mapping[str, Array]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def standardized(x: Array, gain: Array, shift: Array, eps: float = 1e-5) -> Array:
    """``gain (x − mean x)/√(var x + eps) + shift`` over the last axis, the variance the biased one."""
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * gain + shift


def weight_normalized(g: Array, v: Array) -> Array:
    """Salimans & Kingma 2016, eq. 2, for each row: ``W_j = g_j v_j/‖v_j‖``."""
    return np.stack([g_j * v_j / np.sqrt((v_j * v_j).sum()) for g_j, v_j in zip(g.reshape(-1), v, strict=True)])


def offset_standardized(v: Array, gain: Array, offset: Array, eps: float = 1e-5) -> Array:
    """``W_j = (g_j (v_j − mean v_j)/√(var v_j + eps) + o_j)/√n``, after Qiao et al. 2019, eq. 4-5."""
    n = v.shape[1]
    return (standardized(v, np.ones(n), np.zeros(n), eps) * gain[:, None] + offset[:, None]) / np.sqrt(n)


Gates = Callable[[Array, Array], tuple[Array, Array]]
"""Returns what the two matrices make of x_t and h_{t−1}."""


def lstm_step(a: Array, c: Array, of_cell: Callable[[Array], Array] = lambda c: c) -> tuple[Array, Array]:
    """``c' = σ(f) c + σ(i) tanh g``, ``h = σ(o) tanh(of_cell(c'))``: c' itself goes on (Ba et al. 2016, eq. 21)."""
    i, f, g, o = np.split(a, 4, -1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(of_cell(c)), c


def gru_step(x: Array, h_part: Array, h: Array) -> Array:
    """``n = tanh(x_n + r h_n)``, ``h' = (1 − z) n + z h``, as torch's GRU has it."""
    (x_r, x_z, x_n), (h_r, h_z, h_n) = np.split(x, 3, -1), np.split(h_part, 3, -1)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    return (1 - z) * np.tanh(x_n + r * h_n) + z * h


def direction(
    kind: str, p: Values, end: str, x: Array, h: Array, c: Array, gates: Gates | None = None, **how: Any
) -> Any:
    """One layer in one direction over ``x``, (time, batch, features); returns all outputs and the last h and c."""

    def plain(x_t: Array, h: Array) -> tuple[Array, Array]:
        b = [p.get(f"bias_{part}_{end}", 0.0) for part in ("ih", "hh")]
        return x_t @ p[f"weight_ih_{end}"].T + b[0], h @ p[f"weight_hh_{end}"].T + b[1]

    outputs = []
    for x_t in x[::-1] if end.endswith("_reverse") else x:
        u, w = (gates or plain)(x_t, h)
        if kind == "LSTM":
            h, c = lstm_step(u + w, c, **how)
            h = h @ p[f"weight_hr_{end}"].T if f"weight_hr_{end}" in p else h
        elif kind == "GRU":
            h = gru_step(u, w, h)
        else:
            h = np.maximum(u + w, 0) if kind == "RELU" else np.tanh(u + w)
        outputs.append(h)
    return np.stack(outputs[::-1] if end.endswith("_reverse") else outputs), h, c


def layers(
    kind: str,
    p: Values,
    x: Array,
    size: int,
    cells: int,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    state: tuple[Array, Array] | None = None,
    gates_of: Callable[[str], Gates | None] = lambda end: None,
    cell_of: Callable[[str], Callable[[Array], Array]] | None = None,
) -> tuple[Array, Array, Array]:
    """All layers over ``x``, (time, batch, features): the last layer's outputs, and the last h and c of each.

    Args:
        kind: LSTM, GRU, TANH or RELU.
        p: The parameters, by torch's names.
        x: The inputs.
        size: The size of h.
        cells: The size of c.
        num_layers: The number of layers.
        bidirectional: Whether each runs in both directions.
        state: The first h and c, ``(layers · directions, batch, size)``; default zeros.
        gates_of: Gives the gates' two parts where they are not the plain ones, by a layer's and direction's name.
        cell_of: Gives what the output sees of c, likewise.
    """
    ends = [f"l{k}{end}" for k in range(num_layers) for end in (("", "_reverse") if bidirectional else ("",))]
    if state is None:
        state = (np.zeros((len(ends), x.shape[1], size)), np.zeros((len(ends), x.shape[1], cells)))
    last_h, last_c, row = [], [], []
    for k, end in enumerate(ends):
        how = {} if cell_of is None else {"of_cell": cell_of(end)}
        y, h, c = direction(kind, p, end, x, state[0][k], state[1][k], gates_of(end), **how)
        last_h.append(h)
        last_c.append(c)
        row.append(y)
        if not bidirectional or end.endswith("_reverse"):
            x, row = np.concatenate(row, -1), []
    return x, np.stack(last_h), np.stack(last_c)
