"""`load_model`: a whole model, or a state dict and its architecture; no code of the file runs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from normswap.errors import InputError, argument, parameter
from normswap.exported.program import from_exported
from normswap.loading.architectures import build
from normswap.loading.checkpoints import check_finite, read_checkpoint
from normswap.loading.entries import Entry, entries_of, named, preferred, tell_choice, weightless
from normswap.loading.files import expect_kind, kind_of, open_file
from normswap.loading.importing import first_line
from normswap.loading.programs import read_program
from normswap.loading.state_dicts import choose, fit, misfit, tell
from normswap.loading.trust import Trust
from normswap.runs.wrappers import unwrapped

__all__ = ["load_model", "load_tensors", "read_safetensors"]


def load_model(
    path: str | os.PathLike[str],
    *,
    trust: Sequence[str] = (),
    arch: str | None = None,
    arch_kwargs: Mapping[str, object] | None = None,
    key: str | None = None,
    prefix: str | None = None,
) -> nn.Module:
    """Return the model in `path`, on the CPU.

    Args:
        path: a model by ``torch.save(model)``, a state dict (``.pt``, ``.pth``, ``.safetensors``), a
            training checkpoint that holds either, or an exported program (``.pt2``).
        trust: packages, and scripts (``train.py``) whose ``__main__`` classes the file needs. Everything in
            them may be called with what the file says.
        arch: ``torchvision:NAME``, ``timm:NAME``, ``package.module:callable`` or ``PROGRAM.pt2``, for a state dict.
        arch_kwargs: arguments for `arch`.
        key: the entry of a checkpoint that holds the weights, dotted where it is nested: ``model.state_dict``. Default:
            the one that fits, see :mod:`normswap.loading.entries`.
        prefix: what to take off the names of a state dict; names without it are left out. Default: what
            :mod:`normswap.loading.names` says.

    Returns:
        A whole model in the mode in which it was saved or exported; a model built by `arch` in eval mode.

    Raises:
        InputError: the file cannot be read, is of another kind, needs names that are not trusted, does not fit, or
            holds several models.
    """
    path = Path(path)
    content = _read(path, trust, ("torch", "safetensors", "exported"))
    entries = entries_of(content) if key is None else [named(content, key, path)]
    states = [entry for entry in entries if not isinstance(entry.value, nn.Module)]
    models = [entry for entry in entries if isinstance(entry.value, nn.Module)]
    if not entries:
        raise weightless(content, path)
    first = min(entries, key=lambda entry: entry.rank)  # without `arch`: of a state dict, or what a loss lies beside
    if models and (not states or (arch is None and first in models)):
        return _whole(models, entries, path, arch, prefix)
    if arch is None:
        count = len(states[0].value) if len(states) == 1 else "several"  # type: ignore[arg-type]
        raise InputError(
            f"{str(path)!r} is a state dict: {count} tensors without the model that they belong to",
            code="arch-missing",
            hint=f"name the architecture by {argument('arch')}: torchvision:NAME, timm:NAME or package.module:callable",
        )
    model = build(arch, arch_kwargs or {})
    fit(model, states, path, arch, prefix)
    check_finite(model, path)
    return model


def _whole(
    models: Sequence[Entry], entries: Sequence[Entry], path: Path, arch: str | None, prefix: str | None
) -> nn.Module:
    """Return one of the whole models in a file."""
    taken = preferred(models, path)
    for name, value in (("arch", arch), ("prefix", prefix)):
        if value is not None:
            raise InputError(
                f"{str(path)!r} holds a whole model, a {type(taken.value).__name__}; {argument(name, value)} was given "
                "too",
                code=f"{name}-unused",
                hint=f"leave {parameter(name)} out, or give the state dict",
            )
    tell_choice(taken, entries, entries, path)
    assert isinstance(taken.value, nn.Module)
    found, _ = unwrapped(taken.value)
    check_finite(found, path)
    return found


def load_tensors(
    path: Path,
    targets: Mapping[str, Mapping[str, Any]],
    *,
    trust: Sequence[str] = (),
    key: str | None = None,
    prefix: str | None = None,
) -> dict[str, torch.Tensor]:
    """Return the state dict in `path` that fits one of `targets`, on the CPU, under that one's names.

    Args:
        path: a file by ``torch.save``, or a safetensors file: of a state dict, a checkpoint, or a whole model.
        targets: state dicts of the models that it may be of, by what they are called.
        trust: as for :func:`load_model`.
        key: as there.
        prefix: as there.

    Raises:
        InputError: as there.
    """
    content = _read(path, trust, ("torch", "safetensors"))
    entries = entries_of(content) if key is None else [named(content, key, path)]
    if not entries:
        raise weightless(content, path)
    states = [
        dataclasses.replace(entry, value=unwrapped(entry.value)[0].state_dict())
        if isinstance(entry.value, nn.Module)
        else entry
        for entry in entries
    ]
    chosen = choose(states, targets, path, prefix)
    if chosen.match.problems:
        raise misfit(chosen, states, path)
    tell(chosen, states, path)
    return {name: chosen.given[own] for name, own in chosen.match.names.items()}


def _read(path: Path, trust: Sequence[str], kinds: tuple[str, ...]) -> object:
    trusted = Trust.parse(trust)
    with open_file(path) as file:
        kind = kind_of(file)
        expect_kind(kind, kinds, path)
        if kind == "exported":
            return from_exported(read_program(file, path))
        return read_checkpoint(file, path, trusted) if kind == "torch" else _with_ties(read_safetensors(path), path)


def _with_ties(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Add the names that ``safetensors.torch.save_model`` left out, as its metadata says whose tensor each shares."""
    with safe_open(path, "pt") as content:
        metadata = content.metadata() or {}
    return {**{name: tensors[kept] for name, kept in metadata.items() if kept in tensors}, **tensors}


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
