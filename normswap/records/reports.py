"""Reports: how each module was initialized, and how closely sites and outputs agree with the original's."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from normswap.records.tables import text_table

__all__ = ["Agreement", "Fit", "InitReport", "InitRow", "SiteCost"]


@dataclass(frozen=True)
class Fit:
    """How closely a site's output was matched to the original's, on held-out samples.

    Args:
        samples: How many samples reached the site.
        mean: The original's output's mean, over all channels.
        std: Its standard deviation.
        mean_before: The converted network's mean with what the BatchNorm alone told it.
        std_before: Its standard deviation.
        noise_before: Its error, ``E‖y' − y‖² / Var y``; where a ReLU follows, of what that lets through.
        mean_after: The mean after the fit.
        std_after: The standard deviation after the fit.
        noise_after: The error after the fit.
        num_groups: The norm's group count, where it has groups.
        ridge: The ridge that was chosen, None where the site was not fitted.
    """

    samples: int
    mean: float
    std: float
    mean_before: float
    std_before: float
    noise_before: float
    mean_after: float
    std_after: float
    noise_after: float
    num_groups: int | None = None
    ridge: float | None = None


@dataclass(frozen=True)
class InitRow:
    """How one module got its values: its fqn, the method, notes, and where it was matched how closely."""

    name: str
    method: str
    notes: tuple[str, ...] = ()
    fit: Fit | None = None


@dataclass(frozen=True)
class Agreement:
    """How far the original's and the converted network's outputs agree on calibration samples, held-out ones if any.

    Args:
        samples: How many samples.
        relative_error: ``‖found − expected‖ / ‖expected‖`` over all outputs.
        cosine: The mean cosine between a sample's two outputs.
        top1: The share of samples whose largest output is the same; None where the output is no score per class.
        held_out: Whether nothing was fitted to these samples; there were too few to hold any out where it was.
    """

    samples: int
    relative_error: float
    cosine: float
    top1: float | None = None
    held_out: bool = True

    def __str__(self) -> str:
        which = "held-out samples" if self.held_out else "samples, the same that it was fitted to"
        text = f"output on {self.samples} {which}: relative error {self.relative_error:.3f}"
        text += f", cosine {self.cosine:.4f}"
        return text if self.top1 is None else text + f", same class in {100 * self.top1:.1f} %"


@dataclass(frozen=True)
class SiteCost:
    """What the swap of one site costs by itself, with the original's own values before and after it.

    Args:
        norm: The norm's fqn.
        layer: The fqn of the layer that takes the norm's statistics up, or None.
        error: ``E‖y' − y‖² / Var y`` on held-out samples, y the norm's output in the original, y' after the match.
        absorbed: The same before the fit: absorbed.
        share: The error's share of the sum over all sites.
    """

    norm: str
    layer: str | None
    error: float
    absorbed: float
    share: float


@dataclass(frozen=True)
class InitReport:
    """What an initialization did, module by module, in execution order.

    Args:
        method: The method asked for.
        rows: One row per module that was given values, or that was passed over with a reason.
        notes: What a person should know: what was assumed, left out or changed.
        agreement: How far both networks' outputs agree, where there was data to match them on.
    """

    method: str
    rows: tuple[InitRow, ...]
    notes: tuple[str, ...] = ()
    agreement: Agreement | None = None

    def __str__(self) -> str:
        fitted = any(r.fit for r in self.rows)
        header = ("module", "initialized", *(("error before", "after") if fitted else ()), "notes")
        rows = []
        for r in self.rows:
            errors = (f"{r.fit.noise_before:.3f}", f"{r.fit.noise_after:.3f}") if r.fit else ("", "")
            rows.append((r.name, r.method, *(errors if fitted else ()), "; ".join(r.notes)))
        end = [] if self.agreement is None else [str(self.agreement)]
        return "\n\n".join([f"initialization: {self.method}", text_table(header, rows), *self.notes, *end])

    def to_json(self, indent: int | None = 2) -> str:
        """Return the report as JSON."""
        return json.dumps(asdict(self), indent=indent, ensure_ascii=False)
