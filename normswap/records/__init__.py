"""What the stages hand to one another: frozen records that print as tables and turn to JSON. No torch here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from normswap.errors import PlanError

__all__ = [
    "Agreement",
    "Fit",
    "FoundBy",
    "InitReport",
    "InitRow",
    "NormKind",
    "Plan",
    "Proof",
    "Site",
    "SiteCost",
    "Skip",
    "Step",
    "text_table",
]

PLAN_FORMAT = 1


class NormKind:
    """How a site's norm is written in the model."""

    MODULE = "module"
    """A submodule that is a BatchNorm, a subclass of one or a frozen one."""
    FUNCTIONAL = "functional"
    """A call of ``batch_norm`` in the forward of the user's own module."""


class Proof:
    """How sure it is that a site's layer feeds its norm and nothing else."""

    PROVEN = "proven"
    """The graph shows it."""
    CHECKED = "checked"
    """The graph has a gap there, or is the record of a run; a numeric check on example inputs closed it."""
    NONE = "none"
    """Nothing is absorbed at this site; ``Site.reason`` says why."""


class FoundBy:
    """What shows that a site's norm is where it is."""

    SYMBOLIC = "symbolic"
    """A graph that was traced, in train and in eval mode."""
    RECORDED = "recorded"
    """Runs on example inputs: what is absorbed on their strength has passed a numeric check."""


@dataclass(frozen=True)
class Site:
    """A norm and, where that is proven, the one layer whose output it normalizes.

    Args:
        norm: The norm's fqn; for a functional norm ``owner:running_mean``, the owning module's fqn and the name of
            the buffer (or, without one, of the call).
        kind: A :class:`NormKind`.
        norm_type: The norm's class, or ``batch_norm``.
        num_features: The norm's channels, C.
        eps: The norm's eps.
        momentum: The norm's momentum.
        layer: The fqn of the layer that takes the norm's statistics up; None where none may.
        layer_type: The layer's class.
        fan_in: Values in each of the layer's filters, 0 without a layer.
        depthwise: Whether each of the layer's filters sees one input channel of several.
        rank: The number of axes of the norm's input where it is known.
        spatial: The number of positions per sample and channel (1 for a vector) where it is known.
        frozen: Whether the norm uses its stored statistics in training, too.
        synchronized: Whether the norm's statistics are those of all processes.
        has_statistics: Whether the norm stores a mean and a variance.
        proof: A :class:`Proof`.
        reason: Why there is no layer, or None.
        aliases: Further fqns of the same norm.
        found_by: A :class:`FoundBy`.
        caveat: What the numeric check of a layer could not reach, or None.
    """

    norm: str
    kind: str
    norm_type: str
    num_features: int
    eps: float = 1e-5
    momentum: float | None = 0.1
    layer: str | None = None
    layer_type: str | None = None
    fan_in: int = 0
    depthwise: bool = False
    rank: int | None = None
    spatial: int | None = None
    frozen: bool = False
    synchronized: bool = False
    has_statistics: bool = True
    proof: str = Proof.NONE
    reason: str | None = None
    aliases: tuple[str, ...] = ()
    found_by: str = FoundBy.SYMBOLIC
    caveat: str | None = None

    @property
    def evidence(self) -> str:
        """The grade of proof, and that a record is behind it where one is: ``checked, recorded``."""
        return f"{self.proof}, {self.found_by}" if self.found_by == FoundBy.RECORDED else self.proof

    @property
    def remarks(self) -> tuple[str, ...]:
        """Why there is no layer, and what the check of the layer could not reach."""
        return tuple(text for text in (self.reason, self.caveat) if text)


@dataclass(frozen=True)
class Skip:
    """A norm, layer or scope that no site holds, and why.

    Args:
        name: Its fqn.
        what: ``norm``, ``layer`` or ``scope``.
        type: Its class.
        code: A stable slug of the reason.
        reason: The reason, in words that a person can act on.
    """

    name: str
    what: str
    type: str
    code: str
    reason: str


@dataclass(frozen=True)
class Step:
    """What happens at one site.

    Args:
        site: The site.
        weight: The layer's weight parametrization, ``wn``, ``ws`` or ``aws``; None leaves the weight plain.
        norm: What replaces the norm, in words (``GroupNorm(4 groups of 16)``).
        num_groups: The group count, where the norm has groups.
        notes: What a person should know about it.
    """

    site: Site
    weight: str | None
    norm: str
    num_groups: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do to one architecture; prints as a table, turns to JSON, replays.

    Args:
        model: The model's class.
        recipe: The recipe's name.
        options: The recipe's options.
        steps: One step per site, in execution order.
        skips: Every norm, layer and opaque scope that is in no step.
    """

    model: str
    recipe: str
    options: Mapping[str, Any]
    steps: tuple[Step, ...]
    skips: tuple[Skip, ...]

    def __str__(self) -> str:
        head = f"{self.model} → {self.recipe}"
        if self.options:
            head += " (" + ", ".join(f"{k}={v}" for k, v in self.options.items()) + ")"
        rows = [
            (
                step.site.norm,
                step.site.norm_type,
                step.site.layer or "–",
                step.weight or "–",
                step.norm,
                step.site.evidence,
                "; ".join((*step.site.remarks, *step.notes)),
            )
            for step in self.steps
        ]
        parts = [head]
        if rows:
            parts.append(text_table(("norm", "type", "layer", "weight", "becomes", "proof", "notes"), rows))
        if self.skips:
            reasons = Counter((skip.what, skip.reason) for skip in self.skips)
            named = {(s.what, s.reason): s.name for s in reversed(self.skips)}
            parts.append(
                text_table(
                    ("skipped", "what", "first", "reason"),
                    [(str(n), what, named[what, why], why) for (what, why), n in reasons.items()],
                )
            )
        return "\n\n".join([*parts, self.summary()])

    def summary(self) -> str:
        """Return one line: how many norms convert, how many layers take part, what is skipped."""
        norms = len(self.steps)
        kept = sum(skip.what == "norm" and skip.code != "not-batch-norm" for skip in self.skips)
        absorbed = sum(step.site.layer is not None for step in self.steps)
        return f"{norms} of {norms + kept} BatchNorms convert, {absorbed} together with their layer"

    def to_json(self, indent: int | None = 2) -> str:
        """Return the plan as JSON, which :meth:`from_json` reads back to an equal plan."""
        record = {
            "normswap_plan": PLAN_FORMAT,
            "model": self.model,
            "recipe": self.recipe,
            "options": dict(self.options),
            "steps": [asdict(step) for step in self.steps],
            "skips": [asdict(skip) for skip in self.skips],
        }
        return json.dumps(record, indent=indent, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan.

        Raises:
            PlanError: The text is no plan of this format.
        """
        try:
            record = json.loads(text)
            if record["normswap_plan"] != PLAN_FORMAT:
                raise PlanError(
                    f"the plan has format {record['normswap_plan']}, this version reads {PLAN_FORMAT}",
                    code="plan-format",
                    hint="make the plan anew with this version",
                )
            steps = tuple(_read(Step, {**step, "site": _read(Site, step["site"])}) for step in record["steps"])
            skips = tuple(_read(Skip, skip) for skip in record["skips"])
            return cls(record["model"], record["recipe"], record["options"], steps, skips)
        except (ValueError, KeyError, TypeError) as cause:
            raise PlanError(
                f"not a plan: {type(cause).__name__}: {cause}",
                code="plan-unreadable",
                hint="give the JSON that Plan.to_json() or 'normswap convert --dry-run --json' wrote",
            ) from cause


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
    """How far the original's and the converted network's outputs agree on held-out calibration samples.

    Args:
        samples: How many samples.
        relative_error: ``‖found − expected‖ / ‖expected‖`` over all outputs.
        cosine: The mean cosine between a sample's two outputs.
        top1: The share of samples whose largest output is the same; None where the output is no score per class.
    """

    samples: int
    relative_error: float
    cosine: float
    top1: float | None = None

    def __str__(self) -> str:
        text = f"output on {self.samples} held-out samples: relative error {self.relative_error:.3f}"
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
        assumptions: What was assumed about the data, where none was given.
        agreement: How far both networks' outputs agree, where there was data to match them on.
    """

    method: str
    rows: tuple[InitRow, ...]
    assumptions: tuple[str, ...] = ()
    agreement: Agreement | None = None

    def __str__(self) -> str:
        fitted = any(r.fit for r in self.rows)
        header = ("module", "initialized", *(("error before", "after") if fitted else ()), "notes")
        rows = []
        for r in self.rows:
            errors = (f"{r.fit.noise_before:.3f}", f"{r.fit.noise_after:.3f}") if r.fit else ("", "")
            rows.append((r.name, r.method, *(errors if fitted else ()), "; ".join(r.notes)))
        end = [] if self.agreement is None else [str(self.agreement)]
        return "\n\n".join([f"initialization: {self.method}", text_table(header, rows), *self.assumptions, *end])

    def to_json(self, indent: int | None = 2) -> str:
        """Return the report as JSON."""
        return json.dumps(asdict(self), indent=indent, ensure_ascii=False)


def _read(cls: type[Any], record: Mapping[str, Any]) -> Any:
    """Build a record from its JSON form, whose tuples came back as lists."""
    names = {f.name for f in fields(cls)}
    if unknown := set(record) - names:
        raise KeyError(f"{cls.__name__} has no field {sorted(unknown)[0]!r}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in record.items()})


def text_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a plain table, columns separated by two spaces and as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, tuple("─" * w for w in widths), *rows]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
