"""Layer normalization of LSTMs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from normswap.errors import InputError, parameter
from normswap.nn import LayerNormLSTM, LayerNormLSTMCell
from normswap.recipes.recurrent.base import RecurrentRecipe, Start
from normswap.records import RecurrentSite

__all__ = ["RecurrentLayerNormalization"]


@dataclass(frozen=True)
class RecurrentLayerNormalization(RecurrentRecipe):
    """Layer normalization of what W_ih and W_hh give, over the 4H units of all gates, and with ``cell_norm`` of c.

    The rows and the biases within the norms are chosen such that each norm starts as nearly affine, see
    :mod:`normswap.initialization.null_space`; calibration data tell how large the offsets must be. The norm of c has no
    such freedom: γ_c and β_c are fitted to what c is on the data, and the rest is left to ``init="tune"``.

    Args:
        spread: The offsets' size, as a multiple of what a matrix gives: the more, the closer to the LSTM the layer
            starts, and the less it normalizes.
        eps: Added to the variance.
        cell_norm: Whether the output sees LN(c), as published, or c itself, which keeps more of what is learnt.

    Source: J. L. Ba, J. R. Kiros, G. E. Hinton, *Layer Normalization*, 2016, eq. 20-22.
    """

    spread: float = 10.0
    eps: float = 1e-5
    cell_norm: bool = False

    name = "ln"
    equation = "i, f, g, o = LN(W_ih x + b_ih) + LN(W_hh h + b_hh)"
    paper = "Ba et al. 2016"
    exact = False
    start = Start.NULL_SPACE

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.spread < math.inf:
            raise InputError(
                f"{parameter('spread')} of a recurrent layer must be > 0 and finite, got {self.spread}",
                code="spread",
                hint="the default is 10",
            )

    @property
    def reads_cell(self) -> bool:
        return self.cell_norm

    def refuse(self, site: RecurrentSite) -> str | None:
        if not site.type.startswith("LSTM"):
            return f"in the {site.type} a norm is over as many units as it reads, so none can start as an affine map"
        return None

    def replacement(self, old: nn.Module) -> nn.Module:
        like = next(old.parameters())
        options: dict[str, Any] = {
            "cell_norm": self.cell_norm,
            "eps": self.eps,
            "device": like.device,
            "dtype": like.dtype,
        }
        if isinstance(old, nn.LSTMCell):
            return LayerNormLSTMCell(old.input_size, old.hidden_size, **options)
        assert isinstance(old, nn.LSTM)
        names = ("num_layers", "batch_first", "dropout", "bidirectional", "proj_size")
        own = {name: getattr(old, name) for name in names}
        return LayerNormLSTM(old.input_size, old.hidden_size, **own, **options)
