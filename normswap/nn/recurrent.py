"""Recurrent layers whose matrices may be computed: torch's, but for what they remember of their weights.

Note [Live weights]
torch's recurrent layers hold their tensors twice: as attributes, and in a list, ``_flat_weights``, which the kernel
gets. Where a tensor is parametrized, the list keeps what was computed once: with gradients it is no leaf of the graph,
and a deep copy of the layer raises; after ``.double()`` or an optimizer's step it may be out of date. In a live layer
the list is read from the attributes each time. Within a call each matrix is computed once.

On CUDA the weights of such a layer lie in no common piece of memory, so cuDNN packs them anew in each call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from normswap.nn.filters import FilterLayout
from normswap.nn.kinds import class_of

__all__ = [
    "CELLS",
    "RECURRENT_CALLS",
    "ROWS",
    "LiveBase",
    "LiveGRU",
    "LiveLSTM",
    "LiveRNN",
    "additions_to",
    "hand_on",
    "is_plain",
    "is_recurrent",
    "make_live",
    "make_torchs",
    "matrices_of",
]

ROWS = FilterLayout()
"""How a matrix of a recurrent layer splits into filters: each row is one."""

CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)

RECURRENT_CALLS: dict[Any, str] = {
    overload: name
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
    for packet in (getattr(torch.ops.aten, name),)
    for overload in (getattr(torch, name), packet, *(getattr(packet, one) for one in packet.overloads()))
}
"""The functions that compute a recurrent layer, or one step of it, from the tensors that they are given."""


class LiveBase(nn.RNNBase):
    """A recurrent layer of torch's that reads its tensors from its attributes, see Note [Live weights]."""

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        """Keep nothing."""

    def _init_flat_weights(self) -> None:
        """Keep nothing."""
        self._flat_weight_refs = []

    def _update_flat_weights(self) -> None:
        """Keep nothing."""

    def flatten_parameters(self) -> None:
        """Do nothing: a computed tensor lies where it was computed."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """Return what torch's layer returns, with each matrix computed once."""
        with parametrize.cached():
            return super().forward(input, hx)


class LiveLSTM(LiveBase, nn.LSTM):
    """``nn.LSTM`` whose tensors may be parametrized, see Note [Live weights]."""


class LiveGRU(LiveBase, nn.GRU):
    """``nn.GRU`` whose tensors may be parametrized, see Note [Live weights]."""


class LiveRNN(LiveBase, nn.RNN):
    """``nn.RNN`` whose tensors may be parametrized, see Note [Live weights]."""


_LIVE: dict[type[nn.RNNBase], type[LiveBase]] = {nn.LSTM: LiveLSTM, nn.GRU: LiveGRU, nn.RNN: LiveRNN}


def is_recurrent(module: nn.Module) -> bool:
    """Tell whether ``module`` is an LSTM, GRU or RNN, a cell of one, or of a class that derives from these."""
    return isinstance(module, (nn.RNNBase, nn.RNNCellBase))


def is_plain(module: nn.Module) -> bool:
    """Tell whether ``module`` is one of torch's own layers, whose matrices may be computed."""
    return class_of(module) in {*_LIVE, *_LIVE.values()}


def matrices_of(module: nn.Module) -> tuple[str, ...] | None:
    """Return the names of the matrices of a recurrent layer; None where its class is not torch's own."""
    kind = type(module)
    if kind in CELLS:
        return ("weight_ih", "weight_hh")
    if kind not in _LIVE:
        return None
    assert isinstance(module, nn.RNNBase)
    return tuple(name for name in module._flat_weights_names if name.startswith("weight"))


def additions_to(module: nn.Module) -> dict[str, Any]:
    """Return what a recurrent layer has got that a new one of its form has not, by name.

    Such are attributes, a ``forward`` among them, parameters, buffers and modules; not hooks, for which each has room.
    Of a class that derives from torch's or this package's the new one is of that one.
    """
    assert isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    kind: Any = next(c for c in type(module).__mro__ if c.__module__.startswith(("torch.nn.modules.", "normswap.")))
    names = ("num_layers", "bidirectional", "proj_size") if isinstance(module, nn.RNNBase) else ()
    form = {name: getattr(module, name) for name in names}
    if form and not isinstance(module, nn.LSTM) and getattr(module, "mode", "") != "LSTM":
        del form["proj_size"]  # torch's other constructors take none
    new: nn.Module = kind(module.input_size, module.hidden_size, device="meta", **form)
    pairs = (
        (vars(module), vars(new)),
        *((vars(module)[t], vars(new)[t]) for t in ("_parameters", "_buffers", "_modules")),
    )
    return {name: value for own, fresh in pairs for name, value in own.items() if name not in fresh}


def hand_on(old: nn.Module, new: nn.Module, added: Mapping[str, Any]) -> None:
    """Give the hooks of ``old``, and what was added to it, to the layer that comes in its place."""
    for name, value in vars(old).items():
        if "_hooks" in name:
            vars(new)[name].update(value)
    new._is_full_backward_hook = old._is_full_backward_hook
    for name, value in added.items():
        if name in old._buffers:
            new.register_buffer(name, value, name not in old._non_persistent_buffers_set)
        else:
            setattr(new, name, value)


def make_live(module: nn.Module) -> None:
    """Make one of torch's layers live, in place; a cell keeps no list and stays what it is."""
    live = _LIVE.get(type(module))  # type: ignore[arg-type]
    if live is not None:
        vars(module).pop("_flat_weights", None)
        module.__class__ = live
        assert isinstance(module, LiveBase)
        module._init_flat_weights()


def make_torchs(module: nn.Module) -> None:
    """Make a live layer whose tensors are plain again one of torch's own, in place; other modules stay.

    A layer of torch's keeps a new list of its tensors. They are in the order in which it registers them.
    """
    if not isinstance(module, nn.RNNBase):
        return
    kind = class_of(module)
    module.__class__ = next((plain for plain, live in _LIVE.items() if live is kind), kind)  # type: ignore[assignment]
    own = dict(module._parameters)
    ordered = {name: own.pop(name) for name in module._flat_weights_names if name in own}
    module._parameters.clear()
    module._parameters.update(ordered | own)
    module._init_flat_weights()
