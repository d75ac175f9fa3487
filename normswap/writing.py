"""Write files all or nothing."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from normswap.errors import InputError
from normswap.loading.importing import first_line

__all__ = ["check_target", "replacing"]


def check_target(path: str | os.PathLike[str]) -> Path:
    """Return the file to replace, links followed, or refuse what is none."""
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            what, hint = "is a directory", "give a file in it: model.safetensors"
        elif target.exists() and not target.is_file():
            what, hint = "is no file that could be replaced", "give the path of a file"
        elif not target.parent.is_dir():
            what, hint = f"cannot be written: there is no folder {str(target.parent)!r}", "make the folder first"
        elif not os.access(target if target.exists() else target.parent, os.W_OK):
            what, hint = "cannot be written: permission denied", "choose a file and a folder with write access"
        else:
            return target
    except (OSError, ValueError) as cause:  # a name that is too long, or no name at all
        what, hint = f"cannot be written: {first_line(cause)}", "choose another name"
    raise InputError(f"{str(path)!r} {what}", code="storage-path", hint=hint)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file to write that takes the place of ``path`` at the end, or leaves no trace if anything fails."""
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        if path.exists():
            shutil.copymode(path, temporary)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors writes a file of its own making, which nobody else may read
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as cause:
        raise InputError(
            f"{str(path)!r} cannot be written: {first_line(cause)}",
            code="storage-write",
            hint="nothing was changed; choose a folder with write access and enough space",
        ) from cause
    finally:
        temporary.unlink(missing_ok=True)
