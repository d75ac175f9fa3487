"""All steps in time of a layer-normalized LSTM, with the derivative written out.

Recorded step by step by autograd, the derivative takes some 40 small operations a step, and a gradient of W_hh as large
as W_hh itself at each. Written out it takes ten: what does not depend on the steps after it is computed for all of
them at once, and so are the gradients of W_hh, b_hh, γ and β.

Of a step (:func:`normswap.nn.layer_norm_steps.lstm`), with ``z = W_hh h + b_hh``, ``a = u + LN(z; γ, β)`` and s what
the gates are, ``c' = s_f c + s_i s_g``, ``m = LN(c'; γ_c, β_c)`` and ``h' = s_o tanh m``, it is, given ∂h' and ∂c':

- ``∂m = s_o (1 − tanh² m) ∂h'``, and ∂c' gains what LN makes of it;
- ``∂a_i = s_g s_i(1 − s_i) ∂c'``, ``∂a_f = c s_f(1 − s_f) ∂c'``, ``∂a_g = s_i (1 − s_g²) ∂c'``,
  ``∂a_o = tanh m · s_o(1 − s_o) ∂h'``;
- ``∂z`` is what LN makes of ∂a, and ``∂h = ∂z W_hh``, ``∂c = s_f ∂c'`` go on to the step before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from normswap.nn.layer_norm_steps import Direction, lstm_step_of
from normswap.nn.normalized_rnn import over_time
from normswap.nn.recurrent_steps import State

__all__ = ["derives_by_hand", "lstm_over_time"]

_norm_backward = torch.ops.aten.native_layer_norm_backward.default


def derives_by_hand(p: Direction, x: Tensor, sizes: list[int]) -> bool:
    """Tell whether :func:`lstm_over_time` may stand for the loop over steps.

    That is in training, on sequences of one length, and where nothing but autograd looks at the operations.
    """
    plain = type(x) is Tensor and type(p.w_hh) in (Tensor, nn.Parameter)
    watched = (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled(x.device.type)
    )
    return torch.is_grad_enabled() and plain and not watched and sizes[0] == sizes[-1]


def lstm_over_time(p: Direction, u: Tensor, steps: int, first: State, *, backwards: bool) -> tuple[Tensor, State]:
    """Return all h, in the order of ``u``, and the last state, as :func:`~normswap.nn.normalized_rnn.over_time` does.

    Args:
        p: The tensors.
        u: What is made of the inputs of all steps, one after the other. ``(T·N, 4H)``
        steps: T.
        first: The first h and c. ``(N, P)``, ``(N, H)``
        backwards: Whether the last step is taken first.
    """
    assert p.hh is not None
    tensors = (u, *first, p.w_hh, p.b_hh, p.w_hr, *p.hh, *(p.c or (None, None)))
    y, c = _Steps.apply(steps, backwards, p, *tensors)  # type: ignore[no-untyped-call]
    return y, (y[: len(c)] if backwards else y[len(y) - len(c) :], c)


class _Steps(torch.autograd.Function):
    """The outputs of all steps and the last c, from what :func:`lstm_over_time` gives it."""

    @staticmethod
    def forward(ctx: Any, steps: int, backwards: bool, p: Direction, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        u, first, c, w_hh, b_hh, w_hr, gain, shift, c_gain, c_shift = tensors
        assert u is not None
        assert first is not None
        assert c is not None
        assert w_hh is not None
        size, units, batch = w_hh.shape[:1], c.shape[1:], len(c)
        z, s = (u.new_empty(steps, batch, *size) for _ in range(2))
        g, cells, t, out = (u.new_empty(steps, batch, *units) for _ in range(4))
        y = out if w_hr is None else u.new_empty(steps, *first.shape)
        transposed, stats = w_hh.t(), dict[int, tuple[Tensor, ...]]()
        h = first
        rows = list(zip(*(value.unbind(0) for value in (u.view_as(z), z, s, g, cells, t, out, y)), strict=True))
        for k in reversed(range(steps)) if backwards else range(steps):
            now, z_k, s_k, g_k, c_k, t_k, out_k, y_k = rows[k]
            torch.mm(h, transposed, out=z_k) if b_hh is None else torch.addmm(b_hh, h, transposed, out=z_k)
            a, *of_z = torch.native_layer_norm(z_k, size, gain, shift, p.eps)
            a.add_(now)
            torch.tanh(a[:, 2 * units[0] : 3 * units[0]], out=g_k)
            i, f, _, o = torch.sigmoid(a, out=s_k).chunk(4, -1)
            c = torch.addcmul(i * g_k, f, c, out=c_k)
            m, of_c = c, list[Tensor]()
            if c_gain is not None:
                m, *of_c = torch.native_layer_norm(c, units, c_gain, c_shift, p.eps)
            h = torch.mul(o, torch.tanh(m, out=t_k), out=out_k)
            if w_hr is not None:
                h = torch.mm(h, w_hr.t(), out=y_k)
            stats[k] = (*of_z, *of_c)
        ctx.steps, ctx.backwards, ctx.p, ctx.given = steps, backwards, p, len(tensors)
        statistics = (torch.stack(one) for one in zip(*(stats[k] for k in range(steps)), strict=True))
        ctx.save_for_backward(*tensors, z, s, g, cells, t, out, y, *statistics)
        return y.flatten(0, 1).clone(), c.clone()  # whoever changes them in place leaves alone what is kept

    @staticmethod
    def backward(ctx: Any, of_y: Tensor, of_c: Tensor) -> Any:
        saved = ctx.saved_tensors  # asked for once: gradient checkpointing makes them anew each time
        tensors, kept = saved[: ctx.given], saved[ctx.given :]
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(of_y):
            return None, None, None, *_differentiable(ctx, tensors, (of_y, of_c))
        return None, None, None, *_derivative(ctx, tensors, kept, of_y, of_c)


def _derivative(ctx: Any, tensors: Any, kept: Any, of_y: Tensor, of_c: Tensor) -> list[Tensor | None]:
    """Return the gradients of ``tensors``, by the equations above."""
    _, h_first, c_first, w_hh, b_hh, w_hr, gain, shift, c_gain, c_shift = tensors
    z, s, g, cells, t, out, y, z_mean, z_rstd, *c_stats = kept
    size, units = [w_hh.shape[0]], [cells.shape[-1]]
    h_before, c_before = (_before(v, first, ctx.backwards) for v, first in ((y, h_first), (cells, c_first)))
    i, f, _, o = s.unflatten(-1, (4, -1)).unbind(-2)
    to_m = o * (1 - t * t)
    to_a = torch.stack([g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g)], -2)
    to_o = t * o * (1 - o)
    all_a, all_m = s.new_empty(*g.shape[:2], 4, *units), torch.empty_like(t)
    d_h, d_c, found = torch.zeros_like(h_first), of_c, []
    values = (z, z_mean, z_rstd, f, cells, to_m, to_a, to_o, of_y.view_as(y), all_a, all_m)
    rows = list(zip(*(value.unbind(0) for value in values), strict=True))
    for k in range(ctx.steps) if ctx.backwards else reversed(range(ctx.steps)):
        z_k, mean, rstd, f_k, c_k, to_m_k, to_a_k, to_o_k, y_k, a_k, m_k = rows[k]
        d_h = d_h + y_k
        d_out = d_h if w_hr is None else torch.mm(d_h, w_hr)
        d_m = torch.mul(to_m_k, d_out, out=m_k)
        if c_gain is not None:
            own = [value[k] for value in c_stats]
            d_m = _norm_backward(d_m, c_k, units, *own, c_gain, c_shift, [True, False, False])[0]
        d_c = d_c + d_m
        torch.mul(to_a_k, d_c.unsqueeze(1), out=a_k[:, :3])
        torch.mul(to_o_k, d_out, out=a_k[:, 3])
        d_z = _norm_backward(a_k.flatten(1), z_k, size, mean, rstd, gain, shift, [True, False, False])[0]
        found.append((d_z, d_h))
        d_h, d_c = torch.mm(d_z, w_hh), d_c * f_k
    # The last step was the first here: they stand in the order of the inputs afterwards.
    of_u = all_a.flatten(2).flatten(0, 1)
    of_z, of_h = map(torch.cat, zip(*(found if ctx.backwards else found[::-1]), strict=True))
    _, of_gain, of_shift = _norm_backward(
        of_u, *_rows(z), size, *_rows(z_mean, z_rstd), gain, shift, [False, True, True]
    )
    of_c_gain = of_c_shift = None
    if c_gain is not None:
        _, of_c_gain, of_c_shift = _norm_backward(
            *_rows(all_m, cells), units, *_rows(*c_stats), c_gain, c_shift, [False, True, True]
        )
    of_w = of_z.t() @ h_before.flatten(0, 1)
    of_b = None if b_hh is None else of_z.sum(0)
    of_projection = None if w_hr is None else of_h.t() @ out.flatten(0, 1)
    return [of_u, d_h, d_c, of_w, of_b, of_projection, of_gain, of_shift, of_c_gain, of_c_shift]


def _before(values: Tensor, first: Tensor, backwards: bool) -> Tensor:
    """Return what each step begins with, from what each gives; ``(T, N, …)``."""
    return torch.cat([values[1:], first[None]] if backwards else [first[None], values[:-1]])


def _rows(*values: Tensor) -> list[Tensor]:
    return [value.flatten(0, 1) for value in values]


def _differentiable(ctx: Any, tensors: Any, grads: tuple[Tensor, Tensor]) -> list[Tensor | None]:
    """Return the gradients of ``tensors`` as autograd derives the loop: many at once, or to be derived again."""
    u, h, c, w_hh, b_hh, w_hr, gain, shift, *cell = tensors
    p = replace(
        ctx.p, w_hh=w_hh, b_hh=b_hh, w_hr=w_hr, hh=(gain, shift), c=None if cell[0] is None else (cell[0], cell[1])
    )
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        y, (_, last) = over_time(lstm_step_of(p), u, [len(c)] * ctx.steps, (h, c), backwards=ctx.backwards)
    wanted = [tensor for tensor, needed in zip(tensors, ctx.needs_input_grad[3:], strict=True) if needed]
    found = iter(torch.autograd.grad((y, last), wanted, grads, create_graph=again))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[3:]]
