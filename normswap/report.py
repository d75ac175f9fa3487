"""A page about a conversion: what became of each site, how closely it was matched, how far both networks agree.

One HTML file that needs nothing else: no script, no font, no network.
"""

from __future__ import annotations

import importlib.util
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normswap.errors import InputError
from normswap.records import SKIPPED, Fit, Plan
from normswap.storage.writing import reported, staged
from normswap.version import __version__

if TYPE_CHECKING:
    from normswap.pipeline import Conversion

__all__ = ["require_packages", "write_report"]

PACKAGES = ("jinja2", "matplotlib")
_TEMPLATE = Path(__file__).with_name("report.html")

# Colours that stand for the page's own, which differ between light and dark.
_COLOURS = {"#010101": "var(--ink)", "#020202": "var(--line)", "#030303": "var(--before)", "#040404": "var(--after)"}
_INK, _LINE, _BEFORE, _AFTER = _COLOURS


def write_report(conversion: Conversion, path: str | Path) -> None:
    """Write a page about ``conversion`` to ``path``, whole or not at all.

    Where the conversion was matched on calibration data, it shows for each site the mean and the standard deviation of
    its output in the original and in the converted network, and its signal-to-error ratio ``10 log₁₀ (Var y / E‖y' −
    y‖²)`` in dB, before and after the fit.

    Args:
        conversion: What :func:`normswap.convert` returned.
        path: An ``.html`` file.

    Raises:
        InputError: It is no conversion, a package that draws the page is missing, or the file cannot be written.
    """
    if not isinstance(getattr(conversion, "plan", None), Plan) or not hasattr(conversion, "init"):
        raise InputError(
            f"the conversion is of type {type(conversion).__name__}",
            code="option-type",
            hint="give what normswap.convert returned",
        )
    require_packages()
    page = _render(conversion)
    with staged(Path(path)) as place, reported(Path(path)):
        place(Path(path)).write_text(page, encoding="utf-8")


def require_packages() -> None:
    """Refuse where a package that draws the page is missing.

    Raises:
        InputError: It is missing.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(
            f"the report is drawn by {' and '.join(missing)}, not installed here",
            code="report-packages",
            hint="pip install 'normswap[report]'",
        )


def decibels(noise: float) -> float:
    """Return the signal-to-error ratio of an error ``E‖y' − y‖² / Var y``."""
    return -10 * math.log10(noise) if noise > 0 else math.inf


def _render(conversion: Conversion) -> str:
    import jinja2

    plan, init = conversion.plan, conversion.init
    fits = [(row.name, row.fit) for row in init.rows if row.fit is not None]
    layers = {step.site.norm: step.site.layer for step in plan.steps}
    ratios = [[decibels(f.noise_before) for _, f in fits], [decibels(f.noise_after) for _, f in fits]]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": _number, "db": _db}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        version=__version__,
        plan=plan,
        init=init,
        agreement=init.agreement,
        options=plan.chosen,
        fits=[
            {"index": i, "name": name, "layer": layers.get(name), "fit": f, "before": a, "after": b}
            for i, ((name, f), a, b) in enumerate(zip(fits, *ratios, strict=True), 1)
        ],
        medians=[statistics.median(values) if values else None for values in ratios],
        choices=_choices(plan, conversion),
        skips=sorted(
            (skip for skip in plan.skips if skip.name not in conversion.heads),
            key=lambda skip: SKIPPED.index(skip.what),
        ),
        plots=_plots([f for _, f in fits]) if fits else [],
    )


def _choices(plan: Plan, conversion: Conversion) -> list[dict[str, Any]]:
    """Return what was chosen for each module, in the order of the initialization."""
    steps = {step.site.norm: step for step in plan.steps}
    recurrent = {step.site.name: step.weight for step in plan.recurrent}
    found = []
    for row in conversion.init.rows:
        step = steps.get(row.name)
        notes = [] if step is None else [*([step.site.reason] if step.site.reason else []), *step.notes]
        found.append(
            {
                "name": row.name,
                "norm": "–" if step is None else step.norm,
                "weight": recurrent.get(row.name, "–") if step is None else step.weight or "–",
                "method": row.method,
                "ridge": None if row.fit is None else row.fit.ridge,
                "groups": None if row.fit is None else row.fit.num_groups,
                "notes": "; ".join([*notes, *row.notes]),
            }
        )
    return found


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}".replace("-", "−")


def _db(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}".replace("-", "−") if math.isfinite(value) else "∞"


def _plots(fits: Sequence[Fit]) -> list[dict[str, str]]:
    """Return the plots as SVG, with what they show in words."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    depth = range(1, len(fits) + 1)
    plots = []

    def axes_of(title: str, ylabel: str) -> tuple[Figure, Any]:
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel("site, in order of execution", color=_INK)
        axes.set_ylabel(ylabel, color=_INK)
        axes.tick_params(which="both", colors=_INK)
        axes.grid(color=_LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_INK)
        plots.append({"title": title, "svg": ""})
        return figure, axes

    style: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.5}
    figure, axes = axes_of("Error by depth", "error / variance of the output (1)")
    for values, label, colour in (
        ([f.noise_before for f in fits], "before the fit", _BEFORE),
        ([f.noise_after for f in fits], "after the fit", _AFTER),
    ):
        axes.plot(depth, [v if v > 0 else math.nan for v in values], color=colour, label=label, **style)
    if any(f.noise_before > 0 or f.noise_after > 0 for f in fits):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.legend(frameon=False, labelcolor=_INK)
    plots[-1]["svg"] = _svg(figure, "error")

    figure, axes = axes_of("Standard deviation of the output by depth", "standard deviation (1)")
    axes.plot(depth, [f.std for f in fits], color=_INK, label="original", linewidth=1.5)
    axes.plot(depth, [f.std_before for f in fits], color=_BEFORE, label="converted, before the fit", **style)
    axes.plot(depth, [f.std_after for f in fits], color=_AFTER, label="converted, after the fit", **style)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=_INK)
    plots[-1]["svg"] = _svg(figure, "spread")
    return plots


def _svg(figure: Any, salt: str) -> str:
    """Return ``figure`` as an SVG element in the page's colours; the same figure gives the same text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, variable)
    return text
