"""Streaming normalization."""

from __future__ import annotations

from dataclasses import dataclass

from normswap.errors import InputError, parameter
from normswap.norms import Norm
from normswap.norms.none import Nothing
from normswap.norms.streaming import Streaming
from normswap.recipes.base import Recipe
from normswap.records import Site

__all__ = ["StreamingNormalization"]


@dataclass(frozen=True)
class StreamingNormalization(Recipe):
    """Streaming normalization in the BatchNorm's place: in training statistics of earlier batches count, too.

    ``ŝ = α s_long + (1 − α) s`` are the mean and the variance that normalize, and ``ĝ = β g_long + (1 − β) g`` is the
    gradient that goes through them; what is long-term follows at the BatchNorm's own momentum. In evaluation it is the
    BatchNorm. A batch may be of one sample. A frozen BatchNorm becomes what it is, an affine of each channel.

    Args:
        alpha: α, what long-term statistics count in training.
        beta: β, what long-term gradients count.

    Source: Q. Liao, K. Kawaguchi, T. Poggio, *Streaming Normalization: Towards Simpler and More Biologically-plausible
    Normalizations for Online and Recurrent Learning*, 2016.
    """

    alpha: float = 0.7
    beta: float = 0.7

    name = "streaming"
    equation = "γ (x − μ̂)/sqrt(σ̂² + eps) + β, earlier batches count"
    paper = "Liao et al. 2016"
    exact = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0 <= value <= 1:
                raise InputError(
                    f"{parameter(name)} must be between 0 and 1, got {value}",
                    code="streaming-options",
                    hint="0 takes the present batch alone; the default is 0.7",
                )

    def norm(self, site: Site, num_groups: int | None) -> Norm:
        if site.frozen:
            return Nothing()
        return Streaming(site.eps, site.momentum, self.alpha, self.beta)

    def notes(self, site: Site) -> tuple[str, ...]:
        if site.frozen:
            return ("frozen: an affine of each channel",)
        shared = "shares statistics between samples"
        return (f"{shared}, but not between processes",) if site.synchronized else (shared,)
