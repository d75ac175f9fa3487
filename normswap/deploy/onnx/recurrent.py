"""Recurrent layers in ONNX: the operators LSTM, GRU and RNN, for sequences of any length.

Note [The length of a sequence]
torch.export runs a recurrent layer of torch's step by step, so that the length of the example becomes a constant: of
an LSTM or GRU the exporter refuses a dynamic time axis, an RNN becomes as many copies of its step as the example has.
Here a copy of the model has, in the place of each layer, calls of an operator of this package, one per layer of it,
whose output has the length of its input whatever that is; each becomes one operator of ONNX. Its weights are parameters
in ONNX's order: nothing is computed from them in the file.

Note [A projection in ONNX]
The LSTM of ONNX has no projection ``h = P m``, ``m = σ(o) tanh c``. But what the gates see of h is ``W h = (W P) m``:
an LSTM without projection, of the state m and the matrix ``W P``, makes the same m, and P is applied to its output. A
state h that the caller gives is ``P m`` for ``m = P⁺ h``, as P has fewer rows than columns.

ONNX orders the gates of an LSTM i, o, f, c and torch i, f, g, o; those of a GRU z, r, h and r, z, n.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

__all__ = ["TRANSLATIONS", "Lowered", "lower_recurrent"]

torch.library.define(
    "normswap::onnx_recurrent",
    "(str kind, Tensor x, Tensor w, Tensor r, Tensor? b, Tensor? h, Tensor? c) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("normswap::onnx_recurrent")  # type: ignore[untyped-decorator]
def _shapes(
    kind: str, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, h: Tensor | None, c: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ONNX's operator returns, without values.

    Shapes: x ``(T, N, in)``, w ``(D, gates·H, in)``, r ``(D, gates·H, H)``, b ``(D, 2·gates·H)``, h and c
    ``(D, N, H)``; the result ``(T, D, N, H)``, ``(D, N, H)``, ``(D, N, H)``. D is 2 for both directions.
    """
    directions, _, size = r.shape
    last = (directions, x.shape[1], size)
    return x.new_empty(x.shape[0], *last), x.new_empty(last), x.new_empty(last)


def _translated(kind: str, x: Any, w: Any, r: Any, b: Any = None, h: Any = None, c: Any = None) -> Any:
    """Return ONNX's operator for one layer."""
    from onnxscript import opset18 as op

    both = w.shape[0] == 2
    form: dict[str, Any] = {"hidden_size": r.shape[2], "direction": "bidirectional" if both else "forward"}
    if kind == "LSTM":
        return op.LSTM(x, w, r, b, None, h, c, **form)
    if kind == "GRU":
        y, last = op.GRU(x, w, r, b, None, h, linear_before_reset=1, **form)
    else:
        activation = "Relu" if kind == "RNN_RELU" else "Tanh"
        y, last = op.RNN(x, w, r, b, None, h, activations=[activation] * (1 + both), **form)
    return y, last, op.Identity(last)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.normswap.onnx_recurrent.default: _translated}
"""What torch's exporter is to write for this package's operator."""

_DTYPES = (torch.float32, torch.float16)
"""Those that onnxruntime has the operators for; a layer of another one stays as torch exports it."""

_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}
"""The places in torch's order of the gates that ONNX expects, in its order."""


class Lowered(nn.RNNBase):
    """A recurrent layer that calls ONNX's operators, with the attributes that it had."""

    def flatten_parameters(self) -> None:
        """Do nothing."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """Return what torch's layer returns."""
        if not isinstance(input, Tensor):
            raise TypeError("a packed sequence has no form in ONNX: give the layer padded ones")
        batched = input.ndim == 3
        directions = 1 + int(self.bidirectional)
        x = input if batched else input.unsqueeze(0 if self.batch_first else 1)
        x = x.transpose(0, 1) if self.batch_first else x
        state = (None, None) if hx is None else hx if isinstance(hx, tuple) else (hx, None)
        h, c = (s if s is None or batched else s.unsqueeze(1) for s in state)
        last = []
        for k in range(self.num_layers):
            h_k, c_k = (
                s if s is None or self.num_layers == 1 else s[k * directions : (k + 1) * directions] for s in (h, c)
            )
            y, *ends = self._layer(k, x, h_k, c_k)
            x = y.squeeze(1) if directions == 1 else y.transpose(1, 2).flatten(2)
            last.append(ends)
        h, c = (torch.cat(ends) if len(ends) > 1 else ends[0] for ends in zip(*last, strict=True))
        x = x.transpose(0, 1) if self.batch_first else x
        if not batched:
            x, h, c = x.squeeze(0 if self.batch_first else 1), h.squeeze(1), c.squeeze(1)
        return x, (h, c) if self.mode == "LSTM" else h

    def _layer(self, k: int, x: Tensor, h: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return all outputs and the last states of layer ``k``, see :func:`_shapes`."""
        w, r, b, p, q = (self._parameters.get(f"onnx_{name}_l{k}") for name in ("w", "r", "b", "p", "q"))
        if p is None or q is None:
            found: tuple[Tensor, Tensor, Tensor] = torch.ops.normswap.onnx_recurrent(self.mode, x, w, r, b, h, c)
            return found
        h = None if h is None else h @ q  # Note [A projection in ONNX]
        y, h, c = torch.ops.normswap.onnx_recurrent(self.mode, x, w, r, b, h, c)
        return y @ p, h @ p, c


class _LoweredLSTM(Lowered, nn.LSTM):
    pass


class _LoweredGRU(Lowered, nn.GRU):
    pass


class _LoweredRNN(Lowered, nn.RNN):
    pass


_CLASSES: dict[type[nn.Module], type[nn.RNNBase]] = {nn.LSTM: _LoweredLSTM, nn.GRU: _LoweredGRU, nn.RNN: _LoweredRNN}


def lower_recurrent(model: nn.Module) -> None:
    """Let the recurrent layers of ``model`` call ONNX's operators, in place."""
    for module in model.modules():
        kind = _CLASSES.get(type(module))
        if kind is not None and next(module.parameters()).dtype in _DTYPES:
            assert isinstance(module, nn.RNNBase)
            _lower(module, kind)


def _lower(layer: nn.RNNBase, kind: type[nn.RNNBase]) -> None:
    """Give ``layer`` the class ``kind`` and its parameters in ONNX's order, in place."""
    values: dict[str, Tensor] = {}
    for k in range(layer.num_layers):
        ends = [f"l{k}{end}" for end in (("", "_reverse") if layer.bidirectional else ("",))]
        of_x, of_h = ([_tensor(layer, f"weight_{part}_{end}") for end in ends] for part in ("ih", "hh"))
        if layer.proj_size:
            projections = [_tensor(layer, f"weight_hr_{end}") for end in ends]
            of_h = [w @ p for w, p in zip(of_h, projections, strict=True)]
            values[f"onnx_p_l{k}"] = torch.stack([p.T for p in projections])
            values[f"onnx_q_l{k}"] = torch.stack([torch.linalg.pinv(p).T for p in projections])
        values |= {
            f"onnx_{n}_l{k}": torch.stack([_reordered(layer, w) for w in ws]) for n, ws in (("w", of_x), ("r", of_h))
        }
        if layer.bias:
            both = [[_tensor(layer, f"bias_{part}_{end}") for part in ("ih", "hh")] for end in ends]
            values[f"onnx_b_l{k}"] = torch.stack([torch.cat([_reordered(layer, b) for b in pair]) for pair in both])
    dtype = next(layer.parameters()).dtype
    layer._parameters.clear()
    vars(layer)["_flat_weights"] = []
    vars(layer)["_flat_weights_names"] = []
    layer.__class__ = kind
    for name, value in values.items():
        layer.register_parameter(name, nn.Parameter(value.to(dtype), requires_grad=False))


def _tensor(layer: nn.RNNBase, name: str) -> Tensor:
    value: Tensor = getattr(layer, name)
    return value.detach().double()


def _reordered(layer: nn.RNNBase, value: Tensor) -> Tensor:
    order = _GATES.get(layer.mode, (0,))
    gates = value.chunk(len(order))
    return torch.cat([gates[i] for i in order])
