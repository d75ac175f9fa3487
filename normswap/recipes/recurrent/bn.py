"""Batch normalization of recurrent layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from normswap.errors import InputError, parameter
from normswap.nn import BatchNormGRU, BatchNormLSTM, BatchNormRNN
from normswap.recipes.recurrent.base import RecurrentRecipe, Start
from normswap.records import RecurrentSite

__all__ = ["RecurrentBatchNormalization"]


@dataclass(frozen=True)
class RecurrentBatchNormalization(RecurrentRecipe):
    """Batch normalization of what W_ih and W_hh give, with statistics that are shared over time.

    ``BN(a) = γ (a − μ)/√(var + eps)`` per unit, μ and var those that calibration data show, ``γ = √(var + eps)`` and
    ``b' = b + μ``: in evaluation the same function. In training W_ih x is normalized by the batch's own statistics.

    Args:
        input_only: Whether W_ih x alone is normalized.
        eps: Added to each variance.
        momentum: The rate at which the running statistics follow the batches.

    Source: C. Laurent et al., *Batch Normalized Recurrent Neural Networks*, 2015; T. Cooijmans et al., *Recurrent Batch
    Normalization*, 2016, eq. 6, whose statistics are those of each step by itself.
    """

    input_only: bool = False
    eps: float = 1e-5
    momentum: float = 0.1

    name = "bn"
    equation = "BN(W_ih x) + b_ih and BN(W_hh h) + b_hh, statistics shared over time"
    paper = "Laurent et al. 2015, Cooijmans et al. 2016"
    exact = True
    start = Start.STATISTICS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum <= 1:
            raise InputError(
                f"{parameter('momentum')} must be from 0 to 1, got {self.momentum}",
                code="momentum",
                hint="the default is 0.1",
            )

    def refuse(self, site: RecurrentSite) -> str | None:
        if site.type.endswith("Cell"):
            return "a cell sees one step at a time: there are no statistics over time"
        return None

    def replacement(self, old: nn.Module) -> nn.Module:
        assert isinstance(old, nn.RNNBase)
        like = next(old.parameters())
        names = ("num_layers", "batch_first", "dropout", "bidirectional")
        options: dict[str, Any] = {name: getattr(old, name) for name in names}
        options |= {"input_only": self.input_only, "eps": self.eps, "momentum": self.momentum}
        options |= {"device": like.device, "dtype": like.dtype}
        sizes = (old.input_size, old.hidden_size)
        if isinstance(old, nn.LSTM):
            return BatchNormLSTM(*sizes, proj_size=old.proj_size, **options)
        if isinstance(old, nn.GRU):
            return BatchNormGRU(*sizes, **options)
        assert isinstance(old, nn.RNN)
        return BatchNormRNN(*sizes, nonlinearity=old.mode.removeprefix("RNN_").lower(), **options)
