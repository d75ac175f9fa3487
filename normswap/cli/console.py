"""What the commands print: results on stdout, progress, notes and errors on stderr.

On a terminal tables fit its width and a spinner shows what is going on; elsewhere everything is plain text whose
lines are as long as they are, for ``grep`` and ``less -S``.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import typer

from normswap.cli.spelling import spell
from normswap.errors import InputError
from normswap.records import text_table

__all__ = [
    "facts",
    "fits",
    "fitted",
    "note",
    "print_json",
    "printing",
    "progressing",
    "say",
    "survive_any_encoding",
    "table",
    "working",
]

GAP = 2
"""Columns between the cells of a table on a terminal."""


def fitted(text: str, stream: TextIO) -> str:
    """Return ``text`` with its lines broken between words where ``stream`` is a terminal; elsewhere they stay whole."""
    if not stream.isatty():
        return text
    wrap = textwrap.TextWrapper(
        shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
    )
    lines = []
    for line in text.split("\n"):
        wrap.subsequent_indent = " " * (len(line) - len(line.lstrip()) + 4)
        lines += wrap.wrap(line) or [""]
    return "\n".join(lines)


def survive_any_encoding() -> None:
    """Let a terminal or pipe that has no ``→`` or ``γ`` show a question mark, and a closed one show nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Tell where the standard output takes no more; a pipe that was closed is no error, and typer's affair.

    Raises:
        InputError: The disk that it goes to is full, or the like.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as cause:
        with contextlib.suppress(OSError, ValueError):  # what is left would fail again as the process ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise InputError(
            f"cannot write to the standard output: {cause.strerror or cause}",
            code="output-stream",
            hint="make room, or send it elsewhere; a file that was asked for is complete where it stands",
        ) from None


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show ``what`` while the block runs; what libraries and models print goes to stderr, warnings nowhere."""
    with contextlib.ExitStack() as stack:
        if sys.stderr.isatty():
            from rich.console import Console

            stack.enter_context(Console(stderr=True).status(f"{what} …"))
        stack.enter_context(_hushed())
        yield


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Send what libraries and models print to stderr, and their warnings nowhere."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def progressing(what: str, *, quiet: bool = False) -> Iterator[Callable[[str, int, int], None] | None]:
    """As :func:`working`, with a bar and the time that is left once the callback given has been told of both.

    Args:
        what: What is going on.
        quiet: Show no bar.

    Yields:
        To be called with what is done, how much of it, and how much there is; None where nothing is shown.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_hushed())
        if quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=20))
        bar = Progress(
            *columns, MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
        )
        task = stack.enter_context(bar).add_task(f"{what} …", total=None)

        def show(name: str, done: int, total: int) -> None:
            if total != bar.tasks[0].total:  # something else has begun
                bar.reset(task, total=total)
            bar.update(task, description=name, completed=done)

        yield show


def note(text: str) -> None:
    """Tell on stderr what a person should know and did not ask for."""
    typer.echo(fitted(f"note: {spell(text)}", sys.stderr), err=True)


def say(text: str = "") -> None:
    """Print a line of the result, in the words of the command line."""
    with printing():
        typer.echo(fitted(spell(text), sys.stdout))


def print_json(text: str) -> None:
    """Print the result for a machine; nothing else may go to stdout."""
    with printing():
        typer.echo(text)


def fits(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> bool:
    """Return whether a table's rows stay whole: in a pipe, and on a terminal that is wide enough."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    return sum(widths) + GAP * (len(widths) - 1) <= room


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table; on a terminal the columns with one value alone stand in a line above it."""
    if not rows:
        return
    cells = [tuple(map(spell, row)) for row in rows]
    if not sys.stdout.isatty():
        with printing():
            typer.echo(text_table(header, cells))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    same = {i for i in range(1, len(header)) if len(cells) > 1 and len({row[i] for row in cells}) == 1}
    if common := [f"{header[i]} {cells[0][i]}" for i in sorted(same) if cells[0][i] not in ("", "–")]:
        say(f"in every row: {', '.join(common)}")
        say()
    shown = [i for i in range(len(header)) if i not in same]
    console = Console(highlight=False)
    widths = _widths([[row[i] for row in (header, *cells)] for i in shown], console.width)
    grid = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1),
        collapse_padding=True,
        header_style="bold",
    )
    for i, width in zip(shown, widths, strict=True):
        grid.add_column(header[i], overflow="fold", width=width)
    for row in cells:
        grid.add_row(*(_literal(row[i]) for i in shown))
    with printing():
        console.print(grid)


def _widths(columns: Sequence[Sequence[str]], room: int) -> list[int | None]:
    """Return the columns' widths such that names and numbers stay whole; None where there is no room for that."""
    widths = [max(map(len, column)) for column in columns]
    least = [max(len(word) for cell in column for word in cell.split(" ")) for column in columns]
    room -= GAP * (len(columns) - 1)
    if sum(least) > room:
        return [None] * len(columns)
    while sum(widths) > room:
        widest = max((i for i in range(len(widths)) if widths[i] > least[i]), key=widths.__getitem__)
        widths[widest] -= 1
    return [*widths]


def facts(pairs: Sequence[tuple[str, str]]) -> None:
    """Print labelled lines; on a terminal they wrap beside their label."""
    if not pairs:
        return
    pairs = [(label, spell(text)) for label, text in pairs]
    width = max(len(label) for label, _ in pairs)
    if not sys.stdout.isatty():
        for label, text in pairs:
            say(f"  {label.ljust(width)}  {text}".rstrip())
        return
    from rich.console import Console
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=width + 2, style="bold")
    grid.add_column(overflow="fold")
    for label, text in pairs:
        grid.add_row(f"  {label}", _literal(text))
    with printing():
        Console(highlight=False).print(grid)


def _literal(text: str) -> Any:
    """Return text that rich takes as it is: ``[0]`` is no style."""
    from rich.text import Text

    return Text(text)
