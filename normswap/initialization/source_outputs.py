"""What the source of one site, a layer or a per-channel affine, gives for all batches while the site is fitted."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from normswap.initialization.sampling import Sampling
from normswap.initialization.site_values import Candidate
from normswap.runs.paired_sites import PairedSite

__all__ = ["SourceOutputs"]


class SourceOutputs:
    """What a site's source gives for all batches: computed once, and so known for other signs and offsets, too.

    The source is linear in its filters and its bias (:func:`~normswap.graph.linearity.scales_with_its_parameters`).
    """

    def __init__(self, site: PairedSite, sampling: Sampling) -> None:
        self.site, self._of_inputs = site, sampling

    def compute(self) -> None:
        """Run the source as it is."""
        self.sampling = self._of_inputs.on([self.site.channels(batch.x) for batch in self._of_inputs.batches])
        self._bias = self._present_bias()

    def _present_bias(self) -> Tensor | None:
        bias = self.site.source.bias
        return bias.detach().clone() if isinstance(bias, Tensor) else None

    def turned(self, signs: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what turns that into what the source gives now, with its present bias and these signs."""
        now = self._present_bias()

        def turn(z: Tensor) -> Tensor:
            shape = (1, -1, *(1,) * (z.ndim - 2))
            z = z * signs.to(z).view(shape)
            return z if now is None or self._bias is None else z.add_((now - signs.to(now) * self._bias).view(shape))

        return turn

    def outputs(self, candidate: Candidate) -> list[Tensor]:
        """Return what the site gives for each batch with the candidate's values, which it has."""
        turn = self.turned(candidate.signs)
        return [self.site.normalized(turn(batch.x)) for batch in self.sampling.batches]
