"""The README's pictures are there and are of the commands that the script draws."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

REPOSITORY = Path(__file__).resolve().parent.parent


def test_each_picture_of_the_readme_shows_the_command_it_was_drawn_from() -> None:
    commands = runpy.run_path(str(REPOSITORY / "docs" / "pictures.py"))["COMMANDS"]
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]+\]\(docs/pictures/(\w+)\.svg\)", readme)
    assert sorted(shown) == sorted(commands)
    for name, command in commands.items():
        picture = ElementTree.parse(REPOSITORY / "docs" / "pictures" / f"{name}.svg")
        text = "".join(picture.getroot().itertext()).replace("\xa0", " ")
        assert command in text, name
