"""`load_inputs`: example or calibration inputs from NumPy, torch and safetensors files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from normswap.errors import InputError
from normswap.loading.checkpoints import read_checkpoint
from normswap.loading.files import expect_kind, kind_of, open_file
from normswap.loading.importing import first_line
from normswap.loading.models import read_safetensors
from normswap.loading.trust import Trust

__all__ = ["explain_dtype", "load_inputs"]


def load_inputs(path: str | os.PathLike[str]) -> tuple[Any, ...] | dict[str, Any]:
    """Return the inputs in `path`: a tuple for ``model(*inputs)``, or a dict for ``model(**inputs)``.

    A single array or tensor is a tuple of one. ``.npz`` files written without names (``arr_0``, …) and
    lists are tuples; names give a dict. A ``.pt`` file may nest lists, tuples and dicts of tensors
    (``([image, image],)`` for a detector). Values keep their dtype, so that uint8 images stay uint8.

    Raises:
        InputError: the file cannot be read, holds something else than numbers, nothing at all, or NaN or
            infinity.
    """
    path = Path(path)
    with open_file(path) as file:
        kind = kind_of(file)
        if path.suffix == ".npz" and kind == "zip":  # np.savez() of nothing
            kind = "npz"
        expect_kind(kind, ("npz", "npy", "torch", "safetensors"), path)
        if kind in ("npz", "npy"):
            content: object = _read_numpy(file, path)
        elif kind == "torch":
            content = read_checkpoint(file, path, Trust())
        else:
            content = read_safetensors(path)
    if isinstance(content, torch.Tensor):
        content = (content,)
    if not isinstance(content, tuple | list | dict):
        raise _unfit(path, f"holds a {type(content).__name__}", "save a tensor, or a tuple or dict of tensors")
    count = 0
    for name, value in _leaves(content):
        _check(name, value, path)
        count += 1
    if not count:
        raise _unfit(path, "holds no inputs", "save at least one tensor")
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else tuple(content)


def _read_numpy(file: BinaryIO, path: Path) -> object:
    try:
        loaded = np.load(file, allow_pickle=False)
        arrays = {name: loaded[name] for name in loaded} if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
    except Exception as error:
        if "Object arrays" in str(error):
            raise _unfit(
                path, "holds an object array, which would run code", "save one array of numbers per input"
            ) from None
        raise InputError(
            f"{str(path)!r} cannot be read as NumPy arrays: {first_line(error)}",
            code="file-damaged",
            hint="copy or save it again",
        ) from None
    if not isinstance(arrays, dict):
        return (_tensor("the array", arrays, path),)
    tensors = {name: _tensor(repr(name), array, path) for name, array in arrays.items()}
    if list(tensors) == [f"arr_{index}" for index in range(len(tensors))]:
        return tuple(tensors.values())
    return tensors


def _tensor(name: str, array: np.ndarray[Any, Any], path: Path) -> torch.Tensor:
    try:
        native = np.array(array, dtype=array.dtype.newbyteorder("="))
        return torch.from_numpy(native)
    except TypeError:
        raise _unfit(path, f"{name} has the dtype {array.dtype}", "save numbers: float32, uint8, int64, …") from None


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield every leaf of nested lists, tuples and dicts with its place."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(entry, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from _leaves(entry, f"{name}[{index}]")
    else:
        yield name, value


def _check(name: str, value: object, path: Path) -> None:
    if not isinstance(value, torch.Tensor):
        raise _unfit(path, f"{name} is a {type(value).__name__}", "save tensors alone, with torch.save or np.savez")
    if value.numel() == 0:
        raise _unfit(path, f"{name} is empty, of shape {tuple(value.shape)}", "save at least one example")
    if value.is_meta:
        raise _unfit(path, f"{name} is on the meta device and has no values", "save a real tensor")
    if value.layout == torch.strided and (value.is_floating_point() or value.is_complex()):
        finite = torch.isfinite(value.float() if value.element_size() == 1 else value)
        if not finite.all():
            raise _unfit(
                path,
                f"{name} holds {int((~finite).sum())} values that are NaN or infinite, of {value.numel()}",
                "drop those examples",
            )


def _unfit(path: Path, what: str, hint: str) -> InputError:
    return InputError(f"{str(path)!r}: {what}", code="inputs-invalid", hint=hint)


def explain_dtype(inputs: tuple[Any, ...] | Mapping[str, Any], model: nn.Module) -> str:
    """Return a hint where an input's dtype is not the model's, or "" where all fit.

    Integers of 32 and 64 bits and booleans are taken for indices and masks and pass.
    """
    wanted = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for name, value in _leaves(inputs):
        if not isinstance(value, torch.Tensor) or value.dtype in (
            wanted,
            torch.int64,
            torch.int32,
            torch.bool,
        ):
            continue
        if value.dtype == torch.uint8:
            return (
                f"{name} is uint8 and the model's weights are {wanted}: images are not scaled on loading; "
                "save them prepared as for training, e.g. (images / 255 - mean) / std, channels first"
            )
        return f"{name} is {value.dtype} and the model's weights are {wanted}: save it as {wanted}"
    return ""
