"""Draw the pictures of the command line: run each command on a terminal of its own and keep what it shows as SVG.

    python docs/pictures.py

The model is the demo's, a small residual network that was trained on handwritten digits.
"""

from __future__ import annotations

import fcntl
import os
import pty
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import torch
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from normswap.demo.data import load_network

WIDTH = 100
HERE = Path(__file__).resolve().parent / "pictures"
COMMANDS = {
    "inspect": "normswap inspect digits.pt --trust normswap --to gn+ws",
    "convert": "normswap convert digits.pt --trust normswap --to wn+mobn --onnx digits.onnx --input-shape 1x1x8x8",
    "verify": "normswap verify digits.pt digits.onnx --trust normswap --input-shape 4x1x8x8",
}


def main() -> None:
    HERE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(load_network().eval(), Path(folder, "digits.pt"))
        for name, command in COMMANDS.items():
            draw(command, shown(command, folder), HERE / f"{name}.svg")
            print(HERE / f"{name}.svg")


def shown(command: str, folder: str) -> str:
    """Return what ``command`` shows on a terminal, in its colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, WIDTH, 0, 0))
    program = [sys.executable, "-m", *shlex.split(command)]
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    path = os.pathsep.join(filter(None, (str(HERE.parent.parent), os.environ.get("PYTHONPATH"))))
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": path}
    # Progress goes to stderr, and only to a terminal: a pipe keeps it out of the picture.
    process = subprocess.Popen(
        program, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, cwd=folder, env=environment
    )
    os.close(theirs)
    output = b""
    try:
        while chunk := os.read(ours, 4096):
            output += chunk
    except OSError:  # Linux says EIO where the other side is closed
        pass
    finally:
        os.close(ours)
    assert process.stderr is not None
    complaint = process.stderr.read().decode()
    if process.wait():
        sys.exit(f"{command} failed:\n{complaint}")
    return output.decode().replace("\r\n", "\n")


def draw(command: str, output: str, path: Path) -> None:
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(Text.assemble(("$ ", "green"), (command, "bold")), soft_wrap=False)
        console.print(Text.from_ansi(output.rstrip()))
        console.save_svg(str(path), title="normswap", theme=MONOKAI, unique_id=f"normswap-{path.stem}")


if __name__ == "__main__":
    main()
