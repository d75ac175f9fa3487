"""What kind of file a file is, by its content; the kinds that cannot be read each say what to do instead."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch

from normswap.errors import InputError, Text, parameter

__all__ = ["expect_kind", "kind_of", "open_file"]

LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # torch.save before 1.6

REFUSALS = {
    "empty": (
        "file-empty",
        "is empty",
        "save it again; a full disk or an aborted download leaves such a file",
    ),
    "truncated": (
        "file-truncated",
        "is a zip archive without its end",
        "it was cut short while it was copied or saved: copy it again",
    ),
    "torchscript": (
        "torchscript",
        "is a TorchScript archive, a compiled program without the model's Python classes",
        "save the original model with torch.save(model, path), or its state dict",
    ),
    "exported": ("file-kind", "is an exported program (.pt2)", "give the model first"),
    "legacy": (
        "file-legacy",
        "is in torch's format from before version 1.6",
        "where you trust it, read and write it once: "
        "torch.save(torch.load(path, map_location='cpu', weights_only=False), new_path)",
    ),
    "pickle": (
        "file-pickle",
        "is a bare pickle and not a file by torch.save",
        "where you trust it, unpickle it and write it with torch.save(model, path)",
    ),
    "onnx": (
        "file-onnx",
        "is an ONNX file; a conversion starts from the PyTorch model",
        "give the checkpoint from which it was exported",
    ),
    "hdf5": ("file-hdf5", "is an HDF5 file (Keras)", "convert the weights to a PyTorch state dict first"),
    "lfs": ("file-lfs-pointer", "is a Git LFS pointer, the file itself is missing", "run `git lfs pull`"),
    "text": (
        "file-text",
        "is a text file",
        "give the checkpoint; a download may have saved a web page instead",
    ),
    "zip": (
        "file-unknown",
        "is a zip archive that torch.save did not write",
        "unpack it, or give the checkpoint",
    ),
    "unknown": (
        "file-unknown",
        "is in no format that is known here",
        "write it with torch.save or safetensors",
    ),
    "torch": ("file-kind", "is a file by torch.save", ""),
    "safetensors": ("file-kind", "is a safetensors file", ""),
    "npz": (
        "file-kind",
        "holds NumPy arrays",
        Text(f"give the model first; arrays are inputs: {parameter('calibration')} or {parameter('example_inputs')}"),
    ),
    "npy": (
        "file-kind",
        "holds a NumPy array",
        Text(f"give the model first; arrays are inputs: {parameter('calibration')} or {parameter('example_inputs')}"),
    ),
}


def open_file(path: Path) -> BinaryIO:
    """Open `path` for reading, or say in one sentence why that is not possible."""
    try:
        if path.is_dir():
            raise InputError(
                f"{str(path)!r} is a directory",
                code="file-is-directory",
                hint="give the checkpoint file in it",
            )
        if path.is_fifo() or path.is_socket() or path.is_char_device():
            raise InputError(
                f"{str(path)!r} is no file but a pipe or a device, which cannot be read back and forth",
                code="file-not-seekable",
                hint="write what it gives to a file, and give that",
            )
        return path.open("rb")
    except FileNotFoundError:
        where = "" if path.is_absolute() else f" in {os.getcwd()}"
        raise InputError(f"there is no file {str(path)!r}{where}", code="file-missing", hint="check the path") from None
    except PermissionError:
        raise InputError(
            f"no permission to read {str(path)!r}", code="file-permission", hint="change it with chmod +r"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be opened: {error}", code="file-unreadable") from None


def kind_of(file: BinaryIO) -> str:
    """Return the kind of `file`, one of the keys of `REFUSALS`; the file is left at its start."""
    file.seek(0)
    head = file.read(512)
    file.seek(0)
    if not head:
        return "empty"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _kind_of_zip(file)
    if head.startswith(LEGACY_MAGIC):
        return "legacy"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(b"\x89HDF"):
        return "hdf5"
    if len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 1 << 27:
        return "safetensors"
    if len(head) > 1 and head[0] == 0x80 and head[1] <= 5:
        return "pickle"
    if head[0] == 0x08 and head[1] < 32 and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a", b"\x42"):
        return "onnx"  # ModelProto: field 1 is the IR version; then the producer's name or the graph
    if head.startswith(b"version https://git-lfs"):
        return "lfs"
    return "text" if _is_text(head) else "unknown"


def _kind_of_zip(file: BinaryIO) -> str:
    """Tell the archives apart by the names of their records, read by torch's own reader where it can."""
    try:
        records = set(torch._C.PyTorchFileReader(file).get_all_records())
    except (RuntimeError, OSError, ValueError):  # ValueError: names that are no UTF-8
        return _kind_of_other_zip(file)
    finally:
        file.seek(0)
    if "constants.pkl" in records:
        return "torchscript"
    if "archive_format" in records or "serialized_exported_program.json" in records:
        return "exported"
    return "torch" if "data.pkl" in records else "zip"


def _kind_of_other_zip(file: BinaryIO) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "truncated"
    finally:
        file.seek(0)
    if any(name.endswith("serialized_exported_program.json") for name in names):
        return "exported"
    return "npz" if all(name.endswith(".npy") for name in names) else "zip"


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # else a character cut in two by the end of the sample
            return False
        text = head[: error.start].decode("utf-8")
    return all(character.isprintable() or character.isspace() for character in text)


def expect_kind(kind: str, wanted: tuple[str, ...], path: Path) -> None:
    """Raise the refusal that belongs to `kind` unless it is `wanted`."""
    if kind not in wanted:
        code, what, hint = REFUSALS[kind]
        raise InputError(f"{str(path)!r} {what}", code=code, hint=hint)
