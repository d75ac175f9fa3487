"""The one place that catches errors, and the signals that end a command."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from normswap.cli.console import fitted, note, printing
from normswap.cli.spelling import spell
from normswap.errors import NormswapError, marked

__all__ = ["Command", "ErrorBoundary"]

# typer has a copy of click since 0.20 and click itself before: the base of the usage errors in either is this one.
UsageError = cast("type[Exception]", typer.BadParameter.__mro__[2])


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


class Command(TyperCommand):
    """A command whose help, which is printed as its flags are read, may go to a disk that is full."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the flags; see :func:`normswap.cli.console.printing` for what is raised."""
        with printing():
            return super().parse_args(ctx, args)


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
            typer.echo(fitted(spell(error.text), sys.stderr), err=True)
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


class _Notes(logging.Handler):
    """Shows what the package logs, each message once: a command may read one file several times."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        given = record.args if isinstance(record.args, tuple) else ()
        text = record.msg % tuple(marked(one) if isinstance(one, str) else one for one in given)
        if text not in self.shown:
            self.shown.add(text)
            note(text)


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
