"""Build the model that ``arch`` names: torchvision's, timm's, or the user's own."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from normswap.errors import InputError, argument, parameter
from normswap.exported.program import from_exported
from normswap.loading.files import expect_kind, kind_of, open_file
from normswap.loading.importing import first_line, import_paths, import_quietly
from normswap.loading.programs import read_program

__all__ = ["build"]

FORMS = "torchvision:NAME, timm:NAME, package.module:callable or PROGRAM.pt2"


def build(arch: str, kwargs: Mapping[str, object]) -> nn.Module:
    """Return a fresh model of `arch` in eval mode; torch's random state is as before.

    Args:
        arch: ``torchvision:resnet50``, ``timm:NAME``, the file of an exported program, ``PROGRAM.pt2``, or
            ``package.module:callable``, found from the current directory as ``python -m`` would. The last runs the
            user's own code.
        kwargs: arguments of the builder.

    Raises:
        InputError: no such builder, or it fails.
    """
    if arch.endswith(".pt2"):
        return _program(Path(arch))
    source, colon, name = arch.partition(":")
    if not colon or not source or not name:
        raise InputError(f"{argument('arch', arch)} has no known form", code="arch-invalid", hint=f"give {FORMS}")
    find = {"torchvision": _torchvision, "timm": _timm}.get(source)
    with import_paths(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # builders warn about the initial values that are replaced at once
        builder, defaults = find(name) if find else (_own(source, name), {})
        try:
            model = builder(**{**defaults, **kwargs})
        except (Exception, SystemExit) as error:
            given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
            raise InputError(
                f"{arch} cannot be built with ({given}): {type(error).__name__}: {first_line(error)}",
                code="arch-failed",
                hint=f"check the arguments in {parameter('arch_kwargs')}",
            ) from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{arch} returns a {type(model).__name__} and no torch.nn.Module",
            code="arch-failed",
            hint="name a class or function that returns the model",
        )
    return model.eval()


def _program(path: Path) -> nn.Module:
    with open_file(path) as file:
        expect_kind(kind_of(file), ("exported",), path)
        return from_exported(read_program(file, path)).eval()


def _package(name: str) -> ModuleType:
    try:
        return import_quietly(name)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{parameter('arch')} needs {name!r}, which cannot be imported: {first_line(error)}",
            code="module-missing",
            hint=f"install {name.partition('.')[0]}, or run from the directory that holds it",
        ) from error


def _torchvision(name: str) -> tuple[Callable[..., Any], dict[str, object]]:
    models: Any = _package("torchvision.models")
    try:
        builder = models.get_model_builder(name)
    except ValueError:
        raise _unknown("torchvision", name, models.list_models()) from None
    options = inspect.signature(builder).parameters
    # Without these a detector would download its backbone.
    return builder, {key: None for key in ("weights", "weights_backbone") if key in options}


def _timm(name: str) -> tuple[Callable[..., Any], dict[str, object]]:
    timm: Any = _package("timm")
    if not timm.is_model(name):  # also every "hf-hub:" name, which would be fetched
        raise _unknown("timm", name, timm.list_models())
    return timm.create_model, {"model_name": name, "pretrained": False}


def _own(module_name: str, name: str) -> Callable[..., Any]:
    found: Any = _package(module_name)
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(
                f"{module_name!r} has no {name!r}",
                code="arch-unknown",
                hint=f"give {argument('arch', module_name + ':NAME')} with a class or function of that module",
            )
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{module_name}:{name} is not callable", code="arch-unknown", hint=f"give {FORMS}")
    builder: Callable[..., Any] = found
    return builder


def _unknown(source: str, name: str, known: Iterable[str]) -> InputError:
    near = difflib.get_close_matches(name, list(known), n=3)
    hint = f"did you mean {', '.join(f'{source}:{n}' for n in near)}?" if near else f"see {source}'s list of models"
    return InputError(f"{source} has no model {name!r}", code="arch-unknown", hint=hint)
