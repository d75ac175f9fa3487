"""`load_model`: a whole model, or a state dict and its architecture; no code of the file runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from normswap.errors import InputError, argument, parameter
from normswap.exported.program import from_exported
from normswap.loading.architectures import build
from normswap.loading.checkpoints import check_finite, read_checkpoint
from normswap.loading.files import expect_kind, kind_of, open_file
from normswap.loading.importing import first_line
from normswap.loading.programs import read_program
from normswap.loading.state_dicts import choose_entry, fit, stripped
from normswap.loading.trust import Trust
from normswap.runs.wrappers import unwrapped

__all__ = ["load_model", "load_tensors", "read_safetensors"]


def load_model(
    path: str | os.PathLike[str],
    *,
    trust: Sequence[str] = (),
    arch: str | None = None,
    arch_kwargs: Mapping[str, object] | None = None,
) -> nn.Module:
    """Return the model in `path`, on the CPU.

    Args:
        path: a model by ``torch.save(model)``, a state dict (``.pt``, ``.pth``, ``.safetensors``), a
            training checkpoint that holds either, or an exported program (``.pt2``).
        trust: packages, and scripts (``train.py``) whose ``__main__`` classes the file needs. Everything in
            them may be called with what the file says.
        arch: ``torchvision:NAME``, ``timm:NAME``, ``package.module:callable`` or ``PROGRAM.pt2``, for a state dict.
        arch_kwargs: arguments for `arch`.

    Returns:
        A whole model in the mode in which it was saved or exported; a model built by `arch` in eval mode.

    Raises:
        InputError: the file cannot be read, is of another kind, needs names that are not trusted, or does
            not fit.
    """
    path, trusted = Path(path), Trust.parse(trust)
    with open_file(path) as file:
        kind = kind_of(file)
        expect_kind(kind, ("torch", "safetensors", "exported"), path)
        content: object
        if kind == "exported":
            content = from_exported(read_program(file, path))
        else:
            content = read_checkpoint(file, path, trusted) if kind == "torch" else read_safetensors(path)
    found = choose_entry(content, path)
    if isinstance(found, nn.Module):
        if arch is not None:
            raise InputError(
                f"{str(path)!r} holds a whole model, a {type(found).__name__}; {argument('arch', arch)} was given too",
                code="arch-unused",
                hint=f"leave {parameter('arch')} out, or give the state dict",
            )
        found, _ = unwrapped(found)
        check_finite(found, path)
        return found
    if arch is None:
        raise InputError(
            f"{str(path)!r} is a state dict: {len(found)} tensors without the model that they belong to",
            code="arch-missing",
            hint=f"name the architecture by {argument('arch')}: torchvision:NAME, timm:NAME or package.module:callable",
        )
    model = build(arch, arch_kwargs or {})
    fit(model, found, path, arch)
    check_finite(model, path)
    return model


def load_tensors(path: Path, *, trust: Sequence[str] = (), names: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Return the state dict in `path`, on the CPU: as such, in a training checkpoint, or of a whole model.

    Args:
        path: a file by ``torch.save``, or a safetensors file.
        trust: as for :func:`load_model`.
        names: the names that are expected, by which wrappers' prefixes are told and taken off.

    Raises:
        InputError: the file cannot be read, is of another kind, or needs names that are not trusted.
    """
    trusted = Trust.parse(trust)
    with open_file(path) as file:
        kind = kind_of(file)
        expect_kind(kind, ("torch", "safetensors"), path)
        content = read_checkpoint(file, path, trusted) if kind == "torch" else read_safetensors(path)
    found = choose_entry(content, path)
    state = dict(unwrapped(found)[0].state_dict()) if isinstance(found, nn.Module) else found
    return stripped(state, names, path)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, or say that it is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"{str(path)!r} is a damaged safetensors file: {first_line(error)}",
            code="file-truncated" if "incomplete" in str(error).lower() else "file-damaged",
            hint="copy it again",
        ) from None
