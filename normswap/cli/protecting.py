"""Which files a command reads, so that what it writes replaces none of them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from normswap.errors import InputError
from normswap.options import OUTPUT
from normswap.storage.writing import staged

__all__ = ["FilesRead"]

_WRITTEN_BY_NAME = (".safetensors", ".onnx", ".pt2")
"""The files that libraries write which take no other names than UTF-8."""


@dataclass(frozen=True)
class FilesRead:
    """The files that a command reads, by the flag that names each.

    A command that takes this record gets it from :func:`normswap.cli.flags.flattened`. Every file that a flag names is
    read, be it a path or a text (``--trust train.py``, ``--arch program.pt2``), except those under the heading of the
    output, which are written: a new flag is protected without more ado.
    """

    paths: Mapping[str, tuple[Path, ...]]

    @classmethod
    def of(cls, parameters: Sequence[inspect.Parameter], given: Mapping[str, Any]) -> FilesRead:
        """Return the files that the values ``given`` to the flags ``parameters`` name."""
        read = [one.name for one in parameters if not _is_output(one)]
        return cls({name: tuple(_files(given.get(name))) for name in read})

    @contextmanager
    def staged(
        self, *outputs: Path, rewritten: Mapping[str, Path | None] | None = None
    ) -> Iterator[Callable[[Path], Path]]:
        """Write files as :func:`normswap.storage.writing.staged` does, none of them over one that is read.

        Args:
            outputs: The files that are going to be written.
            rewritten: By a flag, the output that may replace the file that it names.

        Raises:
            InputError: An output cannot be written there.
        """
        for path in outputs:
            if path.suffix in _WRITTEN_BY_NAME and not _is_text(os.path.realpath(path)):
                raise InputError(
                    f"cannot write {str(path)!r}: it, or its folder, has a name that is not UTF-8",
                    code="output-path",
                    hint="choose another output",
                )
        spared = {(flag, os.path.realpath(path)) for flag, path in (rewritten or {}).items() if path is not None}
        inputs = [
            path for flag, paths in self.paths.items() for path in paths if (flag, os.path.realpath(path)) not in spared
        ]
        with staged(*outputs, inputs=inputs) as place:
            yield place


def _is_text(name: str) -> bool:
    """Return whether a file's name is UTF-8; in one that is not, Python has characters that have no such form."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_output(flag: inspect.Parameter) -> bool:
    return any(getattr(one, "rich_help_panel", None) == OUTPUT for one in get_args(flag.annotation)[1:])


def _files(value: Any) -> Iterator[Path]:
    """Yield the files that a flag's value names; one that is not there cannot be written over."""
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(one, (str, Path)) and os.path.isfile(one):
            yield Path(one)
