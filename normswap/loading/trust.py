"""What the user vouches for: packages, and scripts whose classes were pickled as ``__main__``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from normswap.errors import InputError, argument
from normswap.loading.importing import first_line, import_paths, import_quietly, import_script
from normswap.loading.scanning import Global

__all__ = ["STDLIB_DATA", "Trust", "entry_for", "under"]

SCRIPT = "SCRIPT.py"
"""Stands in messages for the script that saved a model."""
# Of the standard library only what training scripts put beside their weights, and which opens no doors.
STDLIB_DATA = {"argparse", "collections", "datetime", "decimal", "fractions", "pathlib", "uuid"}
# numpy.save writes files, so that trusting NumPy means its arrays, scalars and dtypes.
NUMPY_DATA = {
    "numpy.dtype",
    "numpy.ndarray",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
}


def under(module: str, prefixes: Sequence[str]) -> bool:
    """Return whether `module` is one of `prefixes` or inside one."""
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def _can_be_trusted(root: str) -> bool:
    if root == "torch":  # torch.hub, torch.fx and torch.distributed run what they are given
        return False
    return root in STDLIB_DATA or root not in sys.stdlib_module_names


def entry_for(found: Global) -> str | None:
    """Return what the user would trust to admit `found`, a package or ``SCRIPT``; None where nothing does."""
    root = found.module.partition(".")[0]
    if root == "__main__":
        return SCRIPT
    if "." in found.name or not _can_be_trusted(root):
        return None
    return None if root == "numpy" and not _numpy_data(found) else root


def _numpy_data(found: Global) -> bool:
    return found.path in NUMPY_DATA or found.module == "numpy.dtypes"


@dataclass(frozen=True)
class Trust:
    """The packages and scripts that the user named."""

    packages: tuple[str, ...] = ()
    scripts: tuple[Path, ...] = ()

    @classmethod
    def parse(cls, entries: Sequence[str]) -> Trust:
        """Read the entries of ``trust``: a dotted package name, or a path that ends in ``.py``.

        Raises:
            InputError: an entry is neither, the script does not exist, or the package is one that runs what
                it is given (``builtins``, ``os``, ``torch``).
        """
        if isinstance(entries, str):
            raise InputError(
                f"trust={entries!r} is one string",
                code="trust-invalid",
                hint=f"give a list: trust=[{entries!r}]",
            )
        if not isinstance(entries, Iterable) or not all(isinstance(entry, str) for entry in entries):
            raise InputError(
                f"trust={entries!r} is no list of texts",
                code="trust-invalid",
                hint="give packages, and scripts that end in .py: trust=['timm', 'train.py']",
            )
        packages, scripts = [], []
        for entry in entries:
            if entry.endswith(".py"):
                if not Path(entry).is_file():
                    raise InputError(
                        f"{argument('trust', [entry])}: there is no such script",
                        code="trust-invalid",
                        hint="check the path",
                    )
                scripts.append(Path(entry))
            elif not all(part.isidentifier() for part in entry.split(".")) or entry == "__main__":
                raise InputError(
                    f"{argument('trust', [entry])} is neither a package nor a script",
                    code="trust-invalid",
                    hint="give a package's name, or the script that saved it, such as train.py",
                )
            elif not _can_be_trusted(entry.partition(".")[0]):
                raise InputError(
                    f"{argument('trust', [entry])} would let the file run anything, and is never admitted",
                    code="trust-unsafe",
                    hint=f"save the model's state dict instead and give {argument('arch')}",
                )
            else:
                packages.append(entry)
        return cls(tuple(packages), tuple(scripts))

    def covers(self, found: Global) -> bool:
        """Return whether the user vouched for `found`; nothing is imported to answer."""
        if "." in found.name:
            return False  # protocol 2 writes no nested names, so it was made by hand
        if found.module == "__main__":
            return bool(self.scripts)
        if found.module.partition(".")[0] == "numpy" and not _numpy_data(found):
            return False
        return under(found.module, self.packages)

    def resolve(self, found: Global) -> object:
        """Import and return what `found` names.

        Raises:
            InputError: it is not there, or it is another package's and only passes through.
        """
        folders = [str(script.resolve().parent) for script in self.scripts]
        if found.module == "__main__":
            modules = [import_script(script) for script in self.scripts]
            module = next((m for m in modules if hasattr(m, found.name)), None)
            if module is None:
                names = ", ".join(str(script) for script in self.scripts)
                raise InputError(
                    f"the file needs {found.path}, and {names} defines no {found.name!r}",
                    code="class-missing",
                    hint=f"give the script that was run when the file was saved: {argument('trust', [SCRIPT])}",
                )
        else:
            with import_paths(folders):
                module = import_trusted(found)
        value: object = getattr(module, found.name)
        home = getattr(value, "__module__", None)
        root = found.module.partition(".")[0]
        if isinstance(value, ModuleType) or not isinstance(home, str) or home.partition(".")[0] != root:
            raise InputError(
                f"{found.path} is defined in {home or 'another module'} and not admitted through {root!r}",
                code="untrusted-global",
                hint="no pickle that Python writes looks so; get the model as a state dict",
            )
        return value


def import_trusted(found: Global) -> ModuleType:
    """Import the module of `found` and check that the name is in it."""
    root = found.module.partition(".")[0]
    try:
        module = import_quietly(found.module)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"the file needs {found.path}, and {found.module!r} cannot be imported: {first_line(error)}",
            code="module-missing",
            hint=f"install {root!r} in the version that saved the file, or run from its directory",
        ) from error
    if not hasattr(module, found.name):
        version = getattr(sys.modules.get(root), "__version__", "installed here")
        raise InputError(
            f"the file needs {found.path}, which {root} {version} does not have",
            code="class-missing",
            hint=f"install the version of {root} that saved the file, or save a state dict there",
        )
    return module
