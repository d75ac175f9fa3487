"""What layer-normalized recurrent layers and their cells share: the norms' tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from normswap.nn.layer_norm_steps import PARTS, Direction
from normswap.nn.normalized import Normalized
from normswap.nn.recurrent_steps import Step

__all__ = ["LayerNormalized"]


class LayerNormalized(Normalized):
    """A recurrent layer, or a cell, with layer normalization of what its matrices give."""

    prefix = "ln"
    eps: float

    def _settle(self, *, eps: float, cell_norm: bool) -> None:
        """Take the settings and add the norms' tensors."""
        assert isinstance(self, nn.Module)
        self.eps, self.cell_norm = eps, cell_norm
        like = next(self.parameters()).detach()
        for end in self._ends():
            for part, units in self._norms():
                for kind in ("weight", "bias"):
                    self.register_parameter(self._of_norm(part, kind, end), nn.Parameter(like.new_empty(units)))
        self.reset_parameters()

    def _parts(self) -> Sequence[str]:
        return PARTS[self.mode]

    def deployed(self) -> nn.Module | str:
        """Say that torch.nn has no such layer."""
        return "torch.nn has no layer-normalized recurrent layer"

    def _direction(self, end: str = "") -> Direction:
        def pair(part: str) -> tuple[Tensor, Tensor] | None:
            found = [getattr(self, self._of_norm(part, kind, end), None) for kind in ("weight", "bias")]
            return None if found[0] is None or found[1] is None else (found[0], found[1])

        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        w_ih, w_hh, b_ih, b_hh, w_hr = (self._own(name, end) for name in names)
        of_input = pair("ih") or pair("")
        assert of_input is not None
        return Direction(w_ih, w_hh, b_ih, b_hh, w_hr, of_input, pair("hh"), pair("c"), self.eps)

    def _step(self, p: Direction, x: Tensor) -> tuple[Tensor, Step]:
        """Return what is made of all inputs, and a step in time."""
        raise NotImplementedError
