"""The documentation keeps its word: its code runs, its output is what the commands print, its links lead somewhere."""

from __future__ import annotations

import copy
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normswap as ns
from normswap.demo.report import run_demo

REPOSITORY = Path(__file__).resolve().parent.parent
_TOOLS = runpy.run_path(str(REPOSITORY / "docs" / "blocks.py"))
PAGES: tuple[Path, ...] = _TOOLS["PAGES"]
NOT_RUN: str = _TOOLS["NOT_RUN"]
blocks, agree, run, prepare = (_TOOLS[name] for name in ("blocks", "agree", "run", "prepare"))
TEXTS = {str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8") for path in PAGES}
NAMED_COMMAND = re.compile(r"(?<!import )\b(make [a-z]+|python [\w./]+\.py|normswap (?:[a-z]+|--help))")
README_LIMIT = 8192


class Network(nn.Module):
    """What the pages call ``model``."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images).mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the pages' code finds when it begins, and the folder that it runs in."""
    torch.manual_seed(0)
    model = Network()
    images = torch.randn(64, 3, 8, 8)
    model(images)  # the BatchNorms have seen data
    model.eval()
    folder = tmp_path_factory.mktemp("pages")
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, folder / "model.pt2")
    return {
        "model": model,
        "fresh_model": Network(),
        "converted": ns.swap_norms(model),
        "x": images[:2],
        "loader": DataLoader(TensorDataset(images, torch.arange(64) % 10), batch_size=16),
        "folder": folder,
    }


def run_page(text: str, name: str, stand_ins: dict[str, Any]) -> None:
    """Run the Python blocks of a page one after the other in one namespace."""
    namespace: dict[str, Any] = {"__name__": name, **stand_ins}
    namespace["model"] = copy.deepcopy(stand_ins["model"])
    for block in blocks(text):
        if block.language == "python" and not block.before.startswith(NOT_RUN):
            code = compile("\n" * (block.line - 1) + block.text, name, "exec", dont_inherit=True)
            exec(code, namespace)


def pages_with(language: str) -> list[str]:
    return [name for name, text in TEXTS.items() if any(block.language == language for block in blocks(text))]


@pytest.mark.parametrize("name", pages_with("python"))
def test_the_python_of_a_page_runs(name: str, stand_ins: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stand_ins["folder"])
    run_page(TEXTS[name], name, stand_ins)


@pytest.mark.parametrize(
    "broken", ["import normswap as ns\nns.swap(model)", "import normswap as ns\nns.swap_norms(model, groups=3)", "1/0"]
)
def test_a_page_with_a_broken_block_fails(broken: str, stand_ins: dict[str, Any]) -> None:
    page = f"Text.\n\n```python\nfine = x.shape\n```\n\nMore.\n\n```python\n{broken}\n```\n"
    with pytest.raises(Exception, match=r"swap|option|groups|division"):
        run_page(page, "broken.md", stand_ins)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    prepare(folder)
    return folder


@pytest.mark.parametrize("name", pages_with("console"))
def test_a_page_shows_what_its_commands_print(name: str, digits: Path) -> None:
    for block in blocks(TEXTS[name]):
        if block.is_run:
            for command, shown in block.commands():
                printed = run(command, digits)
                expected = "" if block.grows_when_built else printed
                assert agree(shown, expected), f"{name}:{block.line}: python docs/blocks.py updates it\n{printed}"


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("error 0.069 in 60 samples", "error  0.070 in 60 samples", True),
        ("moved by 1.0e-07", "moved by 3.1e-07", True),
        ("moved by 1.0e-07", "moved by 3.1e-02", False),
        ("error 0.069", "error 0.169", False),
        ("9 of 9 converted", "7 of 9 converted", False),
        ("9 of 9 converted", "9 of 9 swapped", False),
        ("9 of 9", "9 of 9 and 3", False),
        ("", "anything", False),
    ],
)
def test_outputs_agree_up_to_rounding(shown: str, printed: str, same: bool) -> None:
    assert agree(shown, printed) == same


def test_a_command_that_fails_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"missing\.pt"):
        run("normswap inspect missing.pt", tmp_path)


def test_the_readme_shows_the_demo_as_it_is(tmp_path: Path) -> None:
    shown = {line.split()[0]: line for line in TEXTS["README.md"].splitlines() if re.match(r"\S+ +[\d–]+\S* +\d", line)}
    report = run_demo(tmp_path / "demo", recipes=("gn",))
    accuracies = str(report).partition("fold diff")[0]
    printed = {line.split()[0]: line for line in accuracies.splitlines() if re.match(r"\S+ +[\d–]+\S* +\d", line)}
    assert sorted(printed) == ["bn", "gn"]
    for recipe, line in printed.items():
        assert shown[recipe].split() == line.split()


def without_command(text: str) -> list[int]:
    """Return the lines of the blocks that show output and name no command, and of those of an unknown language."""
    known = {"python", "console", "sh"}
    found = []
    for block in blocks(text):
        if block.language == "text" and not NAMED_COMMAND.search(block.before):
            found.append(block.line)
        if block.language not in known | {"text"} or (block.language == "console" and not block.commands()):
            found.append(block.line)
    return found


def sections_without_command(text: str) -> list[str]:
    """Return the sections that hold a table of figures and name no script that printed it."""
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    figures = [section for section in sections if re.search(r"^\| ?-.*\|$", section, re.MULTILINE)]
    return [s.partition("\n")[0] for s in figures if not re.search(r"python (benchmarks|examples)/\w+\.py", s)]


def test_every_output_stands_beside_its_command() -> None:
    assert {name: found for name, text in TEXTS.items() if (found := without_command(text))} == {}
    assert sections_without_command(TEXTS["docs/results.md"]) == []


@pytest.mark.parametrize("block", ["```text\n1 2 3\n```\n", "```\n1 2 3\n```\n", "```console\nno command\n```\n"])
def test_an_output_without_a_command_is_found(block: str) -> None:
    assert without_command(f"Some words.\n\n{block}") == [4]
    assert without_command("`make demo` prints:\n\n```text\n1 2 3\n```\n") == []


def test_a_table_of_figures_without_a_command_is_found() -> None:
    table = "| a | b |\n|---|---|\n| 1 | 2 |\n"
    assert sections_without_command(f"# Page\n\n## Good\n\n`python benchmarks/x.py`\n\n{table}\n## Bad\n\n{table}") == [
        "Bad"
    ]


def missing_commands(text: str) -> list[str]:
    """Return the commands that a page names and that do not exist."""
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    verbs = {"convert", "demo", "export", "fold", "inspect", "migrate", "recipes", "verify", "--help"}
    code = re.findall(r"`([^`\n]+)`|^\$ (.+)$|<!-- printed by: (.+) -->", text, re.MULTILINE)
    found = []
    for named in (match[1] for part in code for match in NAMED_COMMAND.finditer(next(filter(None, part)))):
        tool, argument = named.split()
        exists = {"make": argument in targets, "normswap": argument in verbs}
        if not exists.get(tool, (REPOSITORY / argument).is_file()):
            found.append(named)
    return found


def test_every_command_that_a_page_names_exists() -> None:
    assert {name: found for name, text in TEXTS.items() if (found := missing_commands(text))} == {}


@pytest.mark.parametrize("command", ["make nothing", "python benchmarks/nothing.py", "normswap nothing"])
def test_a_command_that_does_not_exist_is_found(command: str) -> None:
    assert missing_commands(f"Run `{command}`.") == [command]


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(name: str, text: str) -> Iterator[str]:
    """Yield the relative links and pictures of a page that lead nowhere."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            file = (REPOSITORY / name).parent / path if path else REPOSITORY / name
            other = text if not path else file.read_text(encoding="utf-8") if file.suffix == ".md" else ""
            if not file.is_file() or (anchor and anchor not in anchors(other)):
                yield target


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_leads_somewhere(name: str) -> None:
    assert list(broken_links(name, TEXTS[name])) == []


@pytest.mark.parametrize("target", ["#nowhere", "docs/results.md#nowhere", "docs/nothing.png"])
def test_a_link_to_nowhere_is_found(target: str) -> None:
    assert list(broken_links("README.md", f"# Here\n\n[a](#here), [b]({target})")) == [target]


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if text.count("\n## ") > 3])
def test_a_long_page_begins_with_a_table_of_contents(name: str) -> None:
    if name in ("README.md", "docs/index.md"):  # whose last section lists the pages
        assert "](docs/results.md)" in TEXTS[name] or "](results.md)" in TEXTS[name]
        return
    listed = set(re.findall(r"^- \[[^\]]+\]\(#([\w-]+)\)", TEXTS[name], re.MULTILINE))
    sections = "\n".join(re.findall(r"^## .+$", TEXTS[name], re.MULTILINE))
    assert listed == anchors(sections)


def test_the_readme_is_short() -> None:
    assert (REPOSITORY / "README.md").stat().st_size <= README_LIMIT


def test_the_api_page_holds_every_public_name() -> None:
    shown = set(re.findall(r"^::: normswap\.(\w+)$", TEXTS["docs/api.md"], re.MULTILINE))
    assert shown == set(ns.__all__) - {"__version__"}


def test_the_design_page_names_every_package() -> None:
    table = TEXTS["docs/design.md"].partition("## The packages")[2].partition("\n## ")[0]
    named = {name.rstrip("/") for row in re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE) for name in row.split("`")}
    package = Path(ns.__file__).parent
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert folders | {path.name for path in package.glob("[a-z]*.py")} <= named


def test_the_recipes_of_the_readme_are_as_it_says() -> None:
    table = TEXTS["README.md"].partition("## Recipes")[2]
    exact = dict(re.findall(r"^\| `([\w+]+)` \|.*\| (\*\*yes\*\*|no) \|", table, re.MULTILINE))
    recipes = ns.all_recipes()
    assert exact
    assert {name: "no" not in said for name, said in exact.items()} == {name: recipes[name].exact for name in exact}


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version"} <= set(citation)
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", ns.__version__)


def test_the_changelog_tells_of_this_version() -> None:
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", changelog, re.MULTILINE) == ["Unreleased", ns.__version__]


def test_what_builds_the_site_is_pinned() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    extra = re.search(r"^docs = \[(.+)\]$", (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert extra is not None
    wanted = set(re.findall(r'"([a-z-]+)', extra[1]))
    assert "mkdocs" in wanted
    assert wanted <= pinned


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert "Swap a model" in api  # a docstring's sentence, not the page's
    assert ":func:" not in api
    assert "Usage: normswap convert" in (tmp_path / "site" / "command-line.html").read_text(encoding="utf-8")
