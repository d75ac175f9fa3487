"""The pictures of the command line are on its page and show the commands that the script draws."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_each_picture_of_the_page_shows_the_command_it_was_drawn_from() -> None:
    commands = runpy.run_path(str(DOCS / "pictures.py"))["COMMANDS"]
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]+\]\(pictures/(\w+)\.svg\)", page)
    assert sorted(shown) == sorted(commands)
    for name, command in commands.items():
        picture = ElementTree.parse(DOCS / "pictures" / f"{name}.svg")
        text = "".join(picture.getroot().itertext()).replace("\xa0", " ")
        assert command in text, name
