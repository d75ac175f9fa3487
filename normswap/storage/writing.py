"""Write files all or nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError

from normswap.errors import InputError, NormswapError, Text, marked

__all__ = ["check_target", "reported", "staged"]


@contextmanager
def staged(*outputs: Path, inputs: Sequence[Path] = ()) -> Iterator[Callable[[Path], Path]]:
    """Give, for each output, a place to write it; the files move to where they belong when the block has succeeded.

    Until then, and after any exception, what was there before stays. The place is a hidden folder beside the output:
    making it shows, before the long work, whether the output can be written, and moving from it is atomic. What else
    is written there, such as the weights beside an ONNX file, moves, too. Links are followed; permissions stay.

    Args:
        outputs: The files that are going to be written.
        inputs: Files that no output may replace.

    Raises:
        InputError: An output cannot be written there.
    """
    targets: dict[Path, Path] = {}
    places: dict[Path, Path] = {}
    hidden: dict[Path, tuple[Path, int]] = {}
    for path in outputs:
        target = check_target(path, inputs)
        if target in targets.values():
            raise _unwritable(path, "two outputs have this name")
        targets[path] = target
    with ExitStack() as stack:
        for path, target in targets.items():
            if target.parent not in hidden:
                with reported(path):
                    folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=".normswap-")
                    hidden[target.parent] = Path(stack.enter_context(folder)), _usual_mode(Path(folder.name))
            places[path] = hidden[target.parent][0] / target.name
        try:
            yield places.__getitem__
        except NormswapError as error:
            for path, place in places.items():
                error.message = Text(marked(error.message).replace(str(place), str(path)))
            raise
        for parent, (folder_, mode) in hidden.items():
            # The weights beside an .onnx file go first: it refers to them.
            for file in sorted(folder_.iterdir(), key=lambda file: file.suffix == ".onnx"):
                with reported(parent / file.name):
                    _move(file, parent / file.name, mode)


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn what the system says against writing ``path`` into an error that names the file.

    Raises:
        InputError: The block failed for a reason of the system's: no space, no permission, an unknown folder.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as cause:
        why: BaseException | None = cause
        while isinstance(why, RuntimeError):  # torch's writer raises one while it handles the system's
            why = why.__context__
        if not isinstance(why, OSError | SafetensorError):
            raise
        text = getattr(why, "strerror", None) or str(why)
        raise _unwritable(path, text, "choose a folder with write access and enough space") from cause


def check_target(path: Path, inputs: Sequence[Path] = ()) -> Path:
    """Return the file to write, links followed.

    Raises:
        InputError: It cannot be one, or is one of ``inputs``.
    """
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            why = "it is a folder"
        elif not target.parent.is_dir():
            why = f"there is no folder {str(path.parent)!r}"
        elif target.exists() and not target.is_file():
            why = "it is not a file that can be replaced"
        elif target.exists() and not os.access(target, os.W_OK):
            why = "it is read-only"
        elif any(file.exists() and target == Path(os.path.realpath(file)) for file in inputs):
            why = "it is what is read"
        else:
            return target
    except (OSError, ValueError) as cause:  # a name that is too long, or no name at all
        why = (cause.strerror if isinstance(cause, OSError) else None) or str(cause)
    raise _unwritable(path, why)


def _usual_mode(folder: Path) -> int:
    """Return the permissions of a new file, which some libraries do not give theirs."""
    probe = folder / "probe"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    return mode


def _move(file: Path, target: Path, mode: int) -> None:
    file.chmod(target.stat().st_mode if target.exists() else mode)
    with file.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(file, target)


def _unwritable(path: Path, why: str, hint: str = "choose another output") -> InputError:
    return InputError(f"cannot write {str(path)!r}: {why}", code="output-path", hint=hint)
