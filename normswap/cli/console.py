"""What the commands print: results on stdout, progress, notes and errors on stderr.

On a terminal tables fit its width and a spinner shows what is going on; elsewhere everything is plain text whose
lines are as long as they are, for ``grep`` and ``less -S``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, cast

import typer
from typer.core import TyperGroup

from normswap.errors import NormswapError
from normswap.records import text_table

__all__ = [
    "ErrorBoundary",
    "facts",
    "fits",
    "note",
    "print_json",
    "progressing",
    "say",
    "survive_any_encoding",
    "table",
    "working",
]

# typer has a copy of click since 0.20 and click itself before: the base of the usage errors in either is this one.
UsageError = cast("type[Exception]", typer.BadParameter.__mro__[2])

SPELLED = {
    "dynamic_batch=False": "--no-dynamic-batch",
    "dynamic_spatial=False": "--no-dynamic-spatial",
    "normswap.fold(model)": "normswap fold MODEL",
    "the whole reason is the exception's __cause__": "`normswap --debug …` shows the whole reason",
    "calibration=": "--calibration",
    "give calibration data": "give calibration data (--calibration FILE)",
    "num_groups='auto'": "--num-groups auto",
    "init='absorb'": "--init absorb",
    "scale=False": "--no-scale",
    "or group_size for": "or --group-size for",
    "give example_inputs": "give --input-shape",
    "give example inputs": "give --input-shape",
}
"""Arguments of the Python functions, as they stand in messages, and how the command line writes them."""


GAP = 2
"""Columns between the cells of a table on a terminal."""


class Ended(KeyboardInterrupt):
    """The process was asked to end, and cleans up on its way out as after Ctrl+C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let what ends a process (``kill``, ``timeout``, a closed terminal) raise, so that hidden files are removed."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other set a handler
        yield
        return

    def end(number: int, _: object) -> None:
        raise Ended(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]  # nohup ignores its own
    try:
        for number in ours:
            signal.signal(number, end)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


class ErrorBoundary(TyperGroup):
    """The one place that catches errors: it prints them and ends with their exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; see ``NormswapError.exit_code``, 2 for an unexpected error, 128 + n after a signal n."""
        try:
            with _ended_by_signals(), _notes_shown():
                return super().invoke(ctx)
        except (BrokenPipeError, UsageError, typer.Exit, typer.Abort):
            raise
        except Ended as signalled:
            typer.echo("ended by a signal", err=True)
            raise typer.Exit(128 + signalled.number) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except NormswapError as error:
            _show_traceback(ctx)
            typer.echo(_fitted(_spelled(str(error)), sys.stderr), err=True)
            raise typer.Exit(error.exit_code) from None
        except Exception as error:
            _show_traceback(ctx)
            lines = str(error).strip().splitlines()
            text = f"error[unexpected]: {type(error).__name__}" + (f": {lines[0]}" if lines else "")
            if not ctx.params["debug"]:
                text += "\n  hint: report this, with the traceback that `normswap --debug …` shows"
            typer.echo(text, err=True)
            raise typer.Exit(2) from None


def _show_traceback(ctx: Any) -> None:
    if ctx.params["debug"]:
        typer.echo(traceback.format_exc(), err=True)


def _spelled(text: str) -> str:
    """Return a message of the package in the words of the command line."""
    for python, option in SPELLED.items():
        text = text.replace(python, option)
    return text


def _fitted(text: str, stream: TextIO) -> str:
    """Break the lines between words where ``stream`` is a terminal; elsewhere they stay whole."""
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
    """Let a terminal or pipe that has no ``→`` or ``γ`` show a question mark instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


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


class _Notes(logging.Handler):
    """Shows what the package logs."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


@contextlib.contextmanager
def _notes_shown() -> Iterator[None]:
    logger, handler = logging.getLogger("normswap"), _Notes(logging.INFO)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def note(text: str) -> None:
    """Tell on stderr what a person should know and did not ask for."""
    typer.echo(_fitted(f"note: {_spelled(text)}", sys.stderr), err=True)


def say(text: str = "") -> None:
    """Print a line of the result, in the words of the command line."""
    typer.echo(_fitted(_spelled(text), sys.stdout))


def print_json(text: str) -> None:
    """Print the result for a machine; nothing else may go to stdout."""
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
    cells = [tuple(map(_spelled, row)) for row in rows]
    if not sys.stdout.isatty():
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
        grid.add_row(f"  {label}", _literal(_spelled(text)))
    Console(highlight=False).print(grid)


def _literal(text: str) -> Any:
    """Return text that rich takes as it is: ``[0]`` is no style."""
    from rich.text import Text

    return Text(text)
