"""Import modules as ``python -m`` would find them, torchvision also without its C++ operators."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch

from normswap.errors import InputError

__all__ = ["first_line", "import_paths", "import_quietly", "import_script", "scripts_as_main"]

_OPERATORS: list[Any] = []  # a Library takes its operators with it when it is collected
_SCRIPTS: dict[Path, ModuleType] = {}


@contextlib.contextmanager
def import_paths(folders: Sequence[str] = ()) -> Iterator[None]:
    """Make the current directory and `folders` importable inside the block."""
    added = [folder for folder in (os.getcwd(), *folders) if folder not in sys.path]
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            with contextlib.suppress(ValueError):
                sys.path.remove(folder)


def import_quietly(name: str) -> ModuleType:
    """Import the module `name`; torchvision on a torch without its operators gets their schemas declared.

    torchvision's Python half describes ``nms`` to ``torch.library`` while it is imported, and fails where
    its C++ half, built for another torch, could not be loaded. A declared operator is enough for the
    import; only calling it still needs the C++ half.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of the imported package are not the user's
        try:
            return importlib.import_module(name)
        except RuntimeError as error:
            if "torchvision::nms" not in str(error) or _OPERATORS:
                raise
        declare: Any = torch.library.Library  # torch gives it no types
        library = declare("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _OPERATORS.append(library)
        root = name.partition(".")[0]
        for module in [m for m in sys.modules if m.partition(".")[0] in ("torchvision", root)]:
            del sys.modules[module]  # half imported; the package that asked for it too
        return importlib.import_module(name)


def import_script(path: Path) -> ModuleType:
    """Run the script `path` as a module under a private name, so that its ``__main__`` part does not run.

    What it defines says that it is of ``__main__``, as it was in the process that ran the script. The script that is
    running as ``__main__`` right now is not run again.

    Raises:
        InputError: the script raises, or ends the process.
    """
    place, main = path.resolve(), sys.modules["__main__"]
    if place in _SCRIPTS:
        return _SCRIPTS[place]
    if Path(getattr(main, "__file__", None) or "").resolve() == place:
        return main
    name = f"_normswap_script_{path.stem}_{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with import_paths([str(place.parent)]):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(
            f"the script {str(path)!r} cannot be imported: {type(error).__name__}: {first_line(error)}",
            code="trust-script",
            hint='put what should run only as a script under `if __name__ == "__main__":`',
        ) from error
    for value in _defined(module):
        value.__module__ = "__main__"
    _SCRIPTS[place] = module
    return module


@contextlib.contextmanager
def scripts_as_main() -> Iterator[None]:
    """Let pickle find what imported scripts define where it says that it is: in ``__main__``."""
    main = vars(sys.modules["__main__"])
    own = {value.__name__: value for module in _SCRIPTS.values() for value in _defined(module)}
    hidden = {name: main[name] for name in own if name in main}
    main.update(own)
    try:
        yield
    finally:
        for name in own:
            del main[name]
        main.update(hidden)


def _defined(script: ModuleType) -> list[Any]:
    """Return the classes and functions that `script` defines at its top."""
    places = (script.__name__, "__main__")
    return [
        value
        for name, value in vars(script).items()
        if isinstance(value, type | FunctionType) and value.__module__ in places and value.__name__ == name
    ]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, cut to a readable length."""
    text = (str(error).strip() or "no message").splitlines()[0]
    return text if len(text) <= 200 else text[:197] + "..."
