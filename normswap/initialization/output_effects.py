"""What the errors of single sites do to the model's output.

Note [Errors at the output]
Each admitted recipe is matched at each site with the original's own values before it, and so are known, on held-out
samples, the errors ``e = y' − y`` of what the new norm gives. The original is differentiated once: with J its output's
Jacobian at the site, ``E_u ((Jᵀu)·e)² = ‖J e‖²`` for random u (Hutchinson). The errors of several sites are added in
squares, as if they were independent. That is an estimate: it says which recipe is the best for a site, and the
agreement that a conversion reports says what came of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normswap.initialization.base import Work
from normswap.initialization.targets import RegressionTarget
from normswap.runs.batches import LEAST_SAMPLES, held_out, sample_count, take
from normswap.runs.calling import Batch
from normswap.runs.gradients import OutputGradients, output_gradients
from normswap.runs.paired_sites import PairedSite, SiteBatch
from normswap.runs.processes import offsets, summed_by_name

__all__ = ["OutputEffects"]

_SAMPLES = 16  # whose errors are followed to the output


@dataclass(frozen=True)
class OutputEffects:
    """What the sites' errors do to the output (Note [Errors at the output]).

    Args:
        parts: The batches that the original was differentiated on: which of the data's it is, which of its samples,
            and the gradients.
        batches: How many batches the data has.
        found: The energy at the output by the norm's name, as far as it is known.
    """

    parts: Sequence[tuple[int, Tensor, OutputGradients]]
    batches: int
    found: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, work: Work) -> OutputEffects:
        """Differentiate the original on some held-out samples, on the first ones where there are too few."""
        batches = work.enough or ()
        means = {}
        for step in work.bound.steps:
            owner, _, buffer = step.site.norm.partition(":")
            module = work.source.get_submodule(owner)
            mean = getattr(module, buffer or "running_mean", None)
            hooked = not buffer and (module._forward_hooks or module._forward_pre_hooks)  # what it gives is not y
            if isinstance(mean, Tensor) and not hooked:
                means[step.site.norm] = mean
        parts = [(i, rows, output_gradients(work.source, means, inputs)) for i, rows, inputs in _some_held(batches)]
        return cls(parts, len(batches))

    def fitted(self, site: PairedSite, target: RegressionTarget, batches: Sequence[SiteBatch]) -> None:
        """Follow the error of a site that was fitted to the output."""
        size = sum(gradients.size for _, _, gradients in self.parts)
        if len(batches) != self.batches or not 0 < size < math.inf:
            return
        energy = 0.0
        for i, rows, gradients in self.parts:
            x, reference = batches[i].x, batches[i].reference
            if len(x) != len(rows) or len(reference) != len(rows):
                return
            here = SiteBatch(x[rows], reference[rows])
            at_output = gradients.energy(site.name, site.output(here.x).float() - target.targets(here)[1])
            if at_output is None:
                return
            energy += at_output
        self.found[site.name] = energy / size

    def over_processes(self) -> dict[str, float]:
        """Return the mean of what all processes have found, each on samples of its own."""
        values = {name: [torch.tensor([energy, 1.0], dtype=torch.float64)] for name, energy in self.found.items()}
        sums = summed_by_name("the effects of errors", values)
        return {name: float(energy / count) for name, ((energy, count),) in sums.items()}


def _some_held(batches: Sequence[Batch]) -> list[tuple[int, Tensor, Batch]]:
    """Return some held-out samples: the batch that they are of, which of its samples they are, and their inputs."""
    counts = [sample_count(batch) for batch in batches]
    firsts, samples = offsets("samples", counts)
    found: list[tuple[int, Tensor, Batch]] = []
    wanted = 0
    for i, (batch, count, first) in enumerate(zip(batches, counts, firsts, strict=True)):
        rows = torch.ones(count, dtype=torch.bool) if samples < LEAST_SAMPLES else held_out(count, first)
        rows &= rows.cumsum(0) <= _SAMPLES - wanted
        part = take(batch, rows)
        if part is not None and bool(rows.any()):
            found.append((i, rows, part))
            wanted += int(rows.sum())
        if wanted >= _SAMPLES:
            break
    return found
