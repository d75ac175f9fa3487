"""A plan: what a conversion does at each site; prints as a table and turns to JSON and back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from normswap.errors import PlanError
from normswap.records.recurrent import RecurrentSite, RecurrentStep
from normswap.records.sites import Site, Skip
from normswap.records.tables import text_table

__all__ = ["Plan", "Step"]

_FORMAT, _RECURRENT_FORMAT = 1, 2
"""A plan with steps for recurrent layers has a format of its own: what does not know them must not leave them out."""


@dataclass(frozen=True)
class Step:
    """What happens at one site.

    Args:
        site: The site.
        weight: The layer's weight parametrization, ``wn``, ``ws`` or ``aws``; None leaves the weight plain.
        norm: What replaces the norm, in words (``GroupNorm(4 groups of 16)``).
        num_groups: The group count, where the norm has groups.
        notes: What a person should know about it.
        reader: The layer behind the norm that takes it up, where no layer in front of it does.
        recipe: The recipe that does it; '' in a plan that was written when all sites had the same.
    """

    site: Site
    weight: str | None
    norm: str
    num_groups: int | None = None
    notes: tuple[str, ...] = ()
    reader: str | None = None
    recipe: str = ""

    @property
    def taken_up_by(self) -> str | None:
        """The layer that takes the norm up, in front of it or behind it; None where none does."""
        return self.site.layer or self.reader


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do to one architecture; prints as a table, turns to JSON, replays.

    Args:
        model: The model's class.
        recipe: The recipe's name.
        options: The recipe's options.
        steps: One step per site, in execution order.
        skips: Every norm, layer and opaque scope that is in no step.
        recurrent: One step per recurrent layer that is reparameterized.
        recurrent_recipe: The name of the recipe of these; '' where there are none.
        recurrent_options: That recipe's options.
    """

    model: str
    recipe: str
    options: Mapping[str, Any]
    steps: tuple[Step, ...]
    skips: tuple[Skip, ...]
    recurrent: tuple[RecurrentStep, ...] = ()
    recurrent_recipe: str = ""
    recurrent_options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [
            (
                step.site.norm,
                step.site.norm_type,
                step.taken_up_by or "–",
                step.weight or "–",
                step.norm,
                step.site.evidence,
                "; ".join((*step.site.remarks, *step.notes)),
            )
            for step in self.steps
        ]
        parts = [self.headline]
        if rows:
            parts.append(text_table(("norm", "type", "layer", "weight", "becomes", "proof", "notes"), rows))
        if self.recurrent:
            lines = [(s.site.name, s.site.type, s.site.sizes, s.weight, "; ".join(s.notes)) for s in self.recurrent]
            parts.append(text_table(("recurrent layer", "type", "sizes", "weights", "notes"), lines))
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

    @property
    def headline(self) -> str:
        """Return the model, the recipe and its options: ``ResNet → gn+ws (num_groups=4)``."""
        line = f"{self.model} → {self.recipe}" + (f" ({self.chosen})" if self.options else "")
        if not self.recurrent_recipe:
            return line
        own = f" ({_listed(self.recurrent_options)})" if self.recurrent_options else ""
        return f"{line}, recurrent layers → {self.recurrent_recipe}{own}"

    @property
    def chosen(self) -> str:
        """The recipe's options in words: ``num_groups=4, eps=0.001``, or ``stem.*: gn+aws, *: gn+ws``."""
        at = self.options.get("at")
        if isinstance(at, Mapping):
            return ", ".join(f"{glob}: {_in_words(part)}" for glob, part in at.items())
        return _listed(self.options)

    def summary(self) -> str:
        """Return one line: how many norms convert, how many layers take part, what is skipped."""
        norms = len(self.steps)
        kept = sum(skip.what == "norm" and skip.code != "not-batch-norm" for skip in self.skips)
        absorbed = sum(step.taken_up_by is not None for step in self.steps)
        line = f"{norms} of {norms + kept} BatchNorms convert, {absorbed} together with their layer"
        if not self.recurrent_recipe:
            return line
        layers = len(self.recurrent) + sum(skip.what == "recurrent layer" for skip in self.skips)
        recurrent = f"{len(self.recurrent)} of {layers} recurrent layers"
        return f"{line}; {recurrent}" if norms + kept else f"{recurrent} convert"

    def to_json(self, indent: int | None = 2) -> str:
        """Return the plan as JSON, which :meth:`from_json` reads back to an equal plan."""
        record = {
            "normswap_plan": _RECURRENT_FORMAT if self.recurrent_recipe else _FORMAT,
            "model": self.model,
            "recipe": self.recipe,
            "options": dict(self.options),
            "steps": [asdict(step) for step in self.steps],
            "skips": [asdict(skip) for skip in self.skips],
        }
        if self.recurrent_recipe:
            steps = [asdict(step) for step in self.recurrent]
            record |= {"recurrent": steps, "recurrent_recipe": self.recurrent_recipe}
            record |= {"recurrent_options": dict(self.recurrent_options)}
        return json.dumps(record, indent=indent, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan.

        Raises:
            PlanError: The text is no plan of this format.
        """
        try:
            record = json.loads(text)
            if record["normswap_plan"] not in (_FORMAT, _RECURRENT_FORMAT):
                raise PlanError(
                    f"the plan has format {record['normswap_plan']}, this version reads up to {_RECURRENT_FORMAT}",
                    code="plan-format",
                    hint="make the plan anew with this version",
                )
            steps = tuple(_read(Step, {**step, "site": _read(Site, step["site"])}) for step in record["steps"])
            skips = tuple(_read(Skip, skip) for skip in record["skips"])
            recurrent = tuple(
                _read(RecurrentStep, {**step, "site": _read(RecurrentSite, step["site"])})
                for step in record.get("recurrent", ())
            )
            return cls(
                record["model"],
                record["recipe"],
                record["options"],
                steps,
                skips,
                recurrent,
                record.get("recurrent_recipe", ""),
                record.get("recurrent_options", {}),
            )
        except (ValueError, KeyError, TypeError) as cause:
            raise PlanError(
                f"not a plan: {type(cause).__name__}: {cause}",
                code="plan-unreadable",
                hint="give the JSON that Plan.to_json() or 'normswap convert --dry-run --json' wrote",
            ) from cause


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _in_words(part: Any) -> str:
    """Return in words what a pattern stands for: ``gn+ws (num_groups=4)``."""
    if isinstance(part, Mapping):
        return f"{part['recipe']} ({_listed({k: v for k, v in part.items() if k != 'recipe'})})"
    return "stays" if part is None else str(part)


def _read(cls: type[Any], record: Mapping[str, Any]) -> Any:
    """Build a record from its JSON form, whose tuples came back as lists."""
    names = {f.name for f in fields(cls)}
    if unknown := set(record) - names:
        raise KeyError(f"{cls.__name__} has no field {sorted(unknown)[0]!r}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in record.items()})
