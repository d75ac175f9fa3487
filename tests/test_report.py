"""The page about a conversion: what it says, that it needs nothing else, and that it is written whole or not at all."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import normswap as ns
from normswap import report
from normswap.errors import InputError
from normswap.records import Skip

pytest.importorskip("matplotlib")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    for _ in range(10):
        model(torch.randn(8, 3, 8, 8))
    return model.eval()


@pytest.fixture(scope="module")
def conversion() -> ns.Conversion:
    return ns.convert(make_model(), "gn+ws", calibration=torch.randn(40, 3, 8, 8))


class Page(HTMLParser):
    """The elements, their attributes, the text, and the rows of tables of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def page_of(conversion: ns.Conversion, folder: Path) -> Page:
    ns.write_report(conversion, folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_each_site_stands_on_the_page_with_its_figures(conversion: ns.Conversion, tmp_path: Path) -> None:
    page = page_of(conversion, tmp_path)
    fits = {row.name: row.fit for row in conversion.init.rows if row.fit is not None}
    assert set(fits) == {"1", "4", "8"}
    rows = {row[1]: row for row in page.rows if len(row) == 12 and row[0] != "#"}
    assert set(rows) == set(fits)
    for name, fit in fits.items():
        found = [float(cell.replace("−", "-")) for cell in rows[name][3:]]
        means, deviations = (fit.mean, fit.mean_before, fit.mean_after), (fit.std, fit.std_before, fit.std_after)
        assert found[:6] == pytest.approx((*means, *deviations), rel=1e-3)  # four digits
        ratios = [10 * torch.tensor(1 / noise).log10().item() for noise in (fit.noise_before, fit.noise_after)]
        assert found[6:8] == pytest.approx(ratios, abs=0.06)  # one decimal
        assert found[8] == fit.samples
    agreement = conversion.init.agreement
    assert agreement is not None
    for text in (f"{agreement.cosine:.4f}", f"{agreement.relative_error:.3f}", conversion.plan.summary()):
        assert text in page.text


def test_the_page_needs_no_network_no_script_and_no_other_file(conversion: ns.Conversion, tmp_path: Path) -> None:
    page = page_of(conversion, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "script" not in {tag for tag, _ in page.tags}
    links = [v or "" for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "xlink:href")]
    assert links  # the plots' markers refer to themselves
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"@import|url\((?!#)", text)
    assert [tag for tag, _ in page.tags].count("svg") == 2
    identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    # matplotlib names its groups alike in each plot; what is referred to must be unique.
    targets = {link[1:] for link in links if link.startswith("#")}
    assert targets
    assert all(identifiers.count(target) == 1 for target in targets)
    assert not re.search("#0[1-4]0[1-4]0[1-4]", text)  # each stand-in became a colour of the page
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_the_same_conversion_gives_the_same_page(conversion: ns.Conversion, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        ns.write_report(conversion, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_what_comes_from_the_model_is_escaped(conversion: ns.Conversion, tmp_path: Path) -> None:
    nasty = "<script>alert('$x$')</script>&amp;"
    rows = tuple(dataclasses.replace(row, name=nasty, notes=(nasty,)) for row in conversion.init.rows)
    skips = (Skip(nasty, "norm", nasty, "x", nasty),)
    changed = dataclasses.replace(
        conversion,
        plan=dataclasses.replace(conversion.plan, model=nasty, options={"x": nasty}, skips=skips),
        init=dataclasses.replace(conversion.init, rows=rows, notes=(nasty,)),
    )
    page = page_of(changed, tmp_path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(nasty) >= 3 * len(rows)
    assert "script" in {tag for tag, _ in Page(f"<p>{nasty}</p>").tags}  # the comparator sees one


def test_without_calibration_the_page_says_so_and_shows_the_choices(tmp_path: Path) -> None:
    page = page_of(ns.convert(make_model(), "gn"), tmp_path)
    assert "No site was fitted" in page.text
    assert ["1", "absorbed"] in [[row[0], row[3]] for row in page.rows if len(row) == 7]
    assert "svg" not in {tag for tag, _ in page.tags}


def test_a_layer_that_was_fitted_is_not_left_alone(conversion: ns.Conversion, tmp_path: Path) -> None:
    assert conversion.heads == ("8",)
    assert "8" in {skip.name for skip in conversion.plan.skips}
    assert "Left alone" not in page_of(conversion, tmp_path).text
    absorbed = ns.convert(make_model(), "gn")
    assert absorbed.heads == ()
    assert ["8", "layer", "Linear"] in [row[:3] for row in page_of(absorbed, tmp_path).rows]


def test_a_perfect_fit_has_no_error_to_draw(conversion: ns.Conversion, tmp_path: Path) -> None:
    rows = tuple(
        dataclasses.replace(row, fit=row.fit and dataclasses.replace(row.fit, noise_before=0.0, noise_after=0.0))
        for row in conversion.init.rows
    )
    changed = dataclasses.replace(conversion, init=dataclasses.replace(conversion.init, rows=rows))
    assert "∞" in page_of(changed, tmp_path).text


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    conversion: ns.Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PACKAGES", ("jinja2", "no_such_package"))
    with pytest.raises(InputError, match="no_such_package") as caught:
        ns.write_report(conversion, tmp_path / "report.html")
    assert "pip install 'normswap[report]'" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_failure_keeps_the_page_that_was_there(
    conversion: ns.Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(InputError, match="No space left"):
        ns.write_report(conversion, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
