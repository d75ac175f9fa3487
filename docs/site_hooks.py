"""What the site's build adds to the pages: the help texts of the command line, below the commands that print them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from blocks import completed


def on_page_markdown(markdown: str, **given: Any) -> str:
    """Return a page's text with what its help commands print (called by mkdocs for each page)."""
    return completed(markdown, Path.cwd(), growing=True)
