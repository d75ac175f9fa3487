"""The code blocks of the pages: find them, run their commands, and write what these print back into the pages.

    python docs/blocks.py          # run every `$ normswap …` of the pages and update what stands below it
    python docs/blocks.py --check  # only say which blocks are out of date

Three kinds of blocks are on the pages. A ``python`` block runs in tests/test_docs.py. A ``console`` one holds commands
behind ``$`` and what they print. A ``text`` block is output whose command stands in the paragraph or comment in front.
Commands run in a folder with the demo's network as ``digits.pt`` and ``digits.pt2`` and 300 digits as ``digits.npy``.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md")))
NOT_RUN = "<!-- not run:"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
ROUNDING = 1e-5
"""Relative differences below this are float32 rounding: they vary between machines."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the paragraph or comment in front of it, and its first line's number."""

    language: str
    text: str
    before: str
    line: int

    @property
    def is_run(self) -> bool:
        """Whether its commands run here; else the comment in front says why not."""
        return self.language == "console" and not self.before.startswith(NOT_RUN)

    @property
    def grows_when_built(self) -> bool:
        """Whether the site's build appends the output: help texts have one home, the package."""
        return all(re.fullmatch(r"normswap( \w+)? --help|normswap recipes", command) for command, _ in self.commands())

    def commands(self) -> list[tuple[str, str]]:
        """Return each command with the output that is shown below it."""
        parts = re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]
        return [(part.partition("\n")[0], part.partition("\n")[2].strip("\n")) for part in parts]


def blocks(page: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL):
        before = page[: found.start()].rstrip().rpartition("\n\n")[2]
        yield Block(found[1], found[2], before, page.count("\n", 0, found.start()) + 2)


def prepare(folder: Path) -> None:
    """Write the files that the pages' commands read."""
    import numpy as np
    import torch

    from normswap.demo.data import load_calibration, load_network

    network, digits = load_network(), load_calibration()[:300]
    torch.save(network, folder / "digits.pt")
    np.save(folder / "digits.npy", digits.numpy())
    program = torch.export.export(network, (digits[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, folder / "digits.pt2")


def run(command: str, folder: Path) -> str:
    """Return what ``normswap …`` prints to a pipe, notes included; one that fails is an error."""
    from typer.testing import CliRunner

    from normswap.cli import app

    app.rich_markup_mode = None  # as in a pipe: no boxes around the help
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = CliRunner().invoke(app, shlex.split(command)[1:], prog_name="normswap", env={"COLUMNS": "100"})
    finally:
        os.chdir(before)
    if done.exit_code:
        raise RuntimeError(f"{command} failed:\n{done.output}")
    return str(done.output).strip("\n")


def agree(shown: str, printed: str) -> bool:
    """Tell whether two outputs have the same words, and numbers that differ by rounding at most."""
    words = [NUMBER.sub("#", re.sub(r"─+|\s+", " ", text)).split() for text in (shown, printed)]
    numbers = [[float(n.replace(",", "")) for n in NUMBER.findall(text)] for text in (shown, printed)]
    return words[0] == words[1] and all(
        abs(a - b) <= max(0.1 * abs(a), ROUNDING) for a, b in zip_longest(*numbers, fillvalue=float("inf"))
    )


def completed(page: str, folder: Path, *, growing: bool) -> str:
    """Return the page with the output of its commands: of those that grow when built, or of the others."""
    for block in blocks(page):
        if block.is_run and block.grows_when_built == growing:
            outputs = [(command, run(command, folder)) for command, _ in block.commands()]
            if growing or not all(
                agree(shown, new) for (_, shown), (_, new) in zip(block.commands(), outputs, strict=True)
            ):
                text = "\n".join(f"$ {command}\n{output}" for command, output in outputs) + "\n"
                page = page.replace(f"```console\n{block.text}```", f"```console\n{text}```", 1)
    return page


def main() -> None:
    """Update the pages, or say which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    given = parser.parse_args()
    old = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for path in PAGES:
            page = path.read_text(encoding="utf-8")
            new = completed(page, Path(folder), growing=False)
            if new != page:
                old.append(path.name)
                if not given.check:
                    path.write_text(new, encoding="utf-8")
    print(", ".join(old) + (" out of date" if given.check else " updated") if old else "all pages are up to date")
    sys.exit(bool(old) and given.check)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))  # this copy of normswap, also where another one is installed
    main()
