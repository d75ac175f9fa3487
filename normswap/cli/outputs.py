"""The files that the commands write, and plans that they read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normswap.errors import InputError, marked
from normswap.storage.writing import reported

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "beside",
    "needing_normswap",
    "needs_architecture",
    "read_text",
    "save_weights",
    "save_whole",
    "store",
    "write_text",
]


def beside(model: Path, ending: str) -> Path:
    """Return the file beside ``model`` that is named like it, with ``ending`` in place of its suffix.

    A folder without a name of its own (``.``) has one, too: that it is none that a command reads is told elsewhere.
    """
    return model.parent / f"{model.stem}.{ending}"


def read_text(path: Path) -> str:
    """Return a text file's content."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        why = (cause.strerror or str(cause)) if isinstance(cause, OSError) else "it is not a text file"
        raise InputError(f"cannot read {str(path)!r}: {why}", code="file-unreadable", hint="check the path") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with reported(path):
        path.write_text(text, encoding="utf-8")


def store(model: nn.Module, path: Path, inputs: Any) -> None:
    """Write a converted model by ``normswap.save``, or as a program where ``path`` is a .pt2 file."""
    from normswap.storage import store as storage

    if path.suffix == ".pt2":
        _save_program(model, path, inputs)
    else:
        storage.save(model, path)


def needs_architecture(path: Path) -> bool:
    """Tell whether a file by :func:`store` can be read with the model's architecture alone."""
    from normswap.storage import store as storage

    return path.suffix != ".pt2" and not storage.holds_structure(path)


def save_weights(state: Mapping[str, Any], path: Path) -> None:
    """Write a state dict as a safetensors file, each tensor under each of its names, for ``load_state_dict``."""
    import torch
    from safetensors.torch import save_file

    if others := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise InputError(
            f"{others[0]!r} is no tensor, and {path.name} holds nothing else",
            code="output-kind",
            hint=f"write {path.stem}.pt",
        )
    with reported(path):
        save_file({name: value.detach().clone().contiguous() for name, value in state.items()}, path, {"format": "pt"})


def _save_program(model: nn.Module, path: Path, inputs: Any) -> None:
    """Write a model, as it is in evaluation, as an exported program."""
    import torch

    from normswap.exported.program import to_exported
    from normswap.runs.inputs import as_inputs

    program = to_exported(model.eval(), as_inputs(inputs))
    with reported(path):
        torch.export.save(program, path)


def needing_normswap(model: nn.Module, path: Path) -> list[str]:
    """Return the modules of a folded model for which its file loads only where normswap is; a program names none."""
    from normswap.deploy.unfolded import needs_package

    return [] if path.suffix in (".pt2", ".safetensors") else needs_package(model)


def save_whole(model: nn.Module, path: Path, inputs: Any) -> None:
    """Write a folded model such that :func:`normswap.loading.load_model` reads it.

    Args:
        model: The model.
        path: A .pt2 file becomes a program, exported with ``inputs``, a .safetensors file holds the weights alone, any
            other is a file by ``torch.save``.
        inputs: Inputs of the model.
    """
    import torch
    from torch import fx

    from normswap.loading.importing import scripts_as_main
    from normswap.loading.readable import why_unreadable

    if path.suffix == ".pt2":
        _save_program(model, path, inputs)
        return
    if path.suffix == ".safetensors":
        save_weights(model.state_dict(), path)
        return
    if isinstance(model, fx.GraphModule):
        raise InputError(
            f"the {type(model).__name__} comes from an exported program: it has no class that {path.name} could name",
            code="output-kind",
            hint=f"write {path.stem}.pt2",
        )

    try:
        with scripts_as_main(), reported(path), path.open("wb") as file:
            torch.save(model, file)
    except InputError:
        raise
    except Exception as cause:
        raise InputError(
            f"the {type(model).__name__} cannot be pickled: {type(cause).__name__}: {cause}",
            code="not-picklable",
            hint="write the .onnx file instead (--onnx), or fold it in Python and save its state dict",
        ) from cause
    with path.open("rb") as file:
        if why := why_unreadable(file):
            raise InputError(
                f"normswap could not read {path.name} again: {marked(why)}",
                code="output-unreadable",
                hint=f"write {path.stem}.pt2, a program, which names no classes",
            )
