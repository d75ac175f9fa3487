"""Read files by torch.save, with the weights-only unpickler and an allow-list made for each file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from normswap.errors import InputError, argument
from normswap.loading.admission import admit
from normswap.loading.entries import modules_in
from normswap.loading.importing import first_line
from normswap.loading.methods import Noted, bind
from normswap.loading.scanning import scan_pickle
from normswap.loading.trust import Trust

__all__ = ["check_finite", "read_checkpoint"]

HOOK_TABLES = {name for name in vars(nn.Module()) if name.endswith("_hooks")}


def read_checkpoint(file: BinaryIO, path: Path, trust: Trust) -> object:
    """Return what torch.save wrote into `file`, on the CPU.

    The scan reads the same open file through the same archive reader as torch.load, so that an archive
    cannot show one pickle to the check and another one to the unpickler.

    Raises:
        InputError: a name is not admitted, the file is damaged, or its content does not fit the classes.
    """
    try:
        data = torch._C.PyTorchFileReader(file).get_record("data.pkl")
    except (RuntimeError, OSError, ValueError) as error:
        raise _damaged(path, error) from None
    allowed = admit(scan_pickle(data), trust)
    file.seek(0)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
            warnings.simplefilter("ignore")  # about storage types and moved classes: nothing the user could do
            found: object = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:
        raise _damaged(path, error) from error
    for module in modules_in(found):
        _check_module(module, path, trusting=bool(trust.packages or trust.scripts))
    return found


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{str(path)!r} cannot be read: {type(error).__name__}: {first_line(error)}",
        code="file-damaged",
        hint="copy it again, or save it with the installed versions of torch and of the model's package",
    )


def _check_module(root: nn.Module, path: Path, *, trusting: bool) -> None:
    """Refuse a module tree that a file has bent: tables of wrong kinds, loops, a replaced method."""
    ancestors: list[tuple[nn.Module, frozenset[int]]] = [(root, frozenset())]
    seen: set[int] = set()
    noted: list[tuple[nn.Module, str, Noted]] = []
    while ancestors:
        module, above = ancestors.pop()
        own = vars(module)
        tables = [own.get(table) for table in ("_parameters", "_buffers", "_modules")]
        names = [*own, *(name for table in tables if isinstance(table, dict) for name in table)]
        if not all(isinstance(name, str) for name in names):
            raise _bent(path, f"a {type(module).__name__} in it has an attribute whose name is not text")
        if id(module) in above or not all(isinstance(table, dict) for table in tables):
            raise _bent(path, f"a {type(module).__name__} in it has no module tree")
        noted += _checked_attributes(module, path, trusting=trusting)
        if id(module) in seen:
            continue
        seen.add(id(module))
        for name, child in own["_modules"].items():
            if not isinstance(child, nn.Module | None):
                raise _bent(path, f"{name!r} in it is a {type(child).__name__} and no module")
            if child is not None:
                ancestors.append((child, above | {id(module)}))
        for table in tables[:2]:
            if not all(isinstance(value, torch.Tensor | None) for value in table.values()):  # type: ignore[union-attr]
                raise _bent(path, f"a {type(module).__name__} in it has a parameter that is not a tensor")
    for module, name, value in noted:  # at the end: a module that stands in several places was visited as often
        if not bind(module, name, value):
            raise _bent(path, f"{name!r} of a {type(module).__name__} in it is a method, {value.name!r}")


def _checked_attributes(module: nn.Module, path: Path, *, trusting: bool) -> Iterator[tuple[nn.Module, str, Noted]]:
    """Refuse replaced methods and filled hook tables; yield what stands for a bound method."""
    for name, value in vars(module).items():
        if isinstance(value, Noted):
            yield module, name, value
        if trusting:  # a class of the user's may well keep such things
            break
        method = callable(getattr(type(module), name, None)) or name == "_compiled_call_impl"
        if method and callable(value):
            raise _bent(path, f"a {type(module).__name__} in it has its method {name!r} replaced")
        if name in HOOK_TABLES and (not isinstance(value, dict) or value):
            raise _bent(path, f"a {type(module).__name__} in it has entries in {name!r}")


def _bent(path: Path, what: str) -> InputError:
    return InputError(
        f"{str(path)!r} does not hold a sound model: {what}",
        code="model-damaged",
        hint=f"save it again, or save its state dict and give {argument('arch')}",
    )


def check_finite(model: nn.Module, path: Path) -> None:
    """Refuse NaN anywhere and infinity in parameters and running statistics, naming the first tensor.

    Other buffers may hold infinity on purpose: attention masks do.

    Raises:
        InputError: with the tensor's name and how many of its values are not finite.
    """
    named: list[tuple[str, torch.Tensor, bool]]
    named = [(name, parameter, True) for name, parameter in model.named_parameters()]
    named += [(name, tensor, "running_" in name) for name, tensor in model.named_buffers()]
    for name, tensor, strict in named:
        if tensor.is_meta or tensor.layout != torch.strided or not tensor.is_floating_point():
            continue
        value = tensor.detach()
        value = value.float() if value.element_size() == 1 else value  # no tests are written for float8
        bad = ~torch.isfinite(value) if strict else torch.isnan(value)
        if bad.any():
            count = f"{int(bad.sum())} of {value.numel()} values"
            raise InputError(
                f"{name!r} in {str(path)!r} is not finite: {count} are NaN or infinite",
                code="weights-not-finite",
                hint="the training has diverged: take an earlier checkpoint",
            )
