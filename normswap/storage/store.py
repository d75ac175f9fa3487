"""Store a converted model in one safetensors file, and make it again; no code is pickled.

Note [What a stored model is]
A converted model cannot be pickled: torch makes a class for each parametrized layer. So the file holds what made it, as
safetensors metadata, and what it holds, as tensors:

* the *skeleton*, the model as it was before the conversion and without its values. It is read by the rules for any
  model file (:mod:`normswap.loading`), and nothing in it is called. It may be missing, or need trust: then a fresh
  model of the same architecture takes its place;
* the plans of its conversions, in order, which are replayed on the skeleton;
* every parameter and buffer, persistent or not, and every other tensor that is an attribute of a module;
* what training may change besides: modes, ``requires_grad``, ties, memory layouts, plain attributes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from normswap.errors import InputError, NormswapError, argument
from normswap.loading.files import expect_kind, kind_of, open_file
from normswap.loading.readable import why_unreadable
from normswap.loading.trust import Trust
from normswap.recipes import Recipe
from normswap.runs.wrappers import refuse_no_module, refuse_script, refuse_sharded
from normswap.storage.contents import collect, give
from normswap.storage.entries import (
    FORMAT_KEY,
    MISFITS,
    SKELETON_KEY,
    damaged,
    header_of,
    read_stored,
    recipe_of,
    unpack,
    unpacked,
)
from normswap.storage.origin import origin_of
from normswap.storage.replay import copied, history, refuse_changed, replayed_on, warn_of_hooks, warn_of_lost
from normswap.storage.writing import check_target, reported, staged

__all__ = ["holds_structure", "is_stored", "load", "save"]


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Store a converted model in the safetensors file ``path``; :func:`load` makes it again.

    A file that is there is replaced once the new one is complete, and stays as it was if anything fails.

    Args:
        model: What ``swap_norms`` or ``convert`` returned, or a copy of it: trained or not, on any device. Only read.
        path: The file.

    Raises:
        InputError: The model was not converted, or its structure has changed since; or the file cannot be written.
    """
    path = Path(path)
    check_target(path)
    refuse_sharded(model)
    origins = history(model)
    skeleton = origins[0].skeleton
    replayed = None
    if skeleton is not None:
        replayed = replayed_on(copied(skeleton), [(origin.plan, origin.recipe) for origin in origins])
        refuse_changed(model, replayed)
        warn_of_hooks(model, replayed)
        warn_of_lost(model, replayed)
    contents = collect(model, replayed)
    metadata = header_of(origins, contents, skeleton)
    with staged(path) as place, reported(path):
        save_file(contents.tensors, place(path), metadata)


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    trust: Sequence[str] = (),
    recipe: Recipe | None = None,
) -> nn.Module:
    """Return the converted model that :func:`save` stored, on the CPU, as it was: values, modes, ties, layouts.

    Args:
        path: The file.
        model: A fresh model of the architecture that was converted, built with the same arguments; needed where its
            classes may not be read from the file. Its values and modes do not matter; it may be on the meta device, and
            stays as it is.
        trust: Packages, and scripts for ``__main__`` classes, whose classes the file may name; as for a model file.
        recipe: The recipe, where it is not one of this package's.

    Raises:
        InputError: The file is no such file or is damaged, or one of the arguments is needed or does not fit.
        PlanError: ``model`` has another architecture.
    """
    path = Path(path)
    trusted = Trust.parse(trust)
    if model is not None:
        refuse_no_module(model)
        refuse_script(model)
    if recipe is not None and not isinstance(recipe, Recipe):
        raise InputError(
            f"{argument('recipe', recipe)} is no recipe",
            code="option-type",
            hint="the file names its recipe; give an instance where its class is not one of this package's",
        )
    with open_file(path) as file:
        expect_kind(kind_of(file), ("safetensors",), path)
    stored = read_stored(path)
    steps = [(plan, recipe_of(plan, custom, recipe)) for plan, custom in stored.plans]
    if model is None:
        skeleton = unpack(stored, path, trusted)
    elif origin_of(model) is not None:
        raise InputError(
            f"the {type(model).__name__} given as {argument('model')} was converted already",
            code="storage-model",
            hint="give the model as it is before a conversion: load() converts it",
        )
    else:
        skeleton = copied(model)
    try:
        return give(replayed_on(skeleton, steps, stored.moves), stored.contents)
    except NormswapError:
        raise
    except MISFITS as cause:
        raise damaged(path, cause) from cause


def holds_structure(path: Path) -> bool:
    """Tell whether :func:`load` can read the structure from a file by :func:`save`, so that it needs no ``model``."""
    with safe_open(path, "pt") as content:
        skeleton = (content.metadata() or {}).get(SKELETON_KEY)
    return skeleton is not None and why_unreadable(io.BytesIO(unpacked(skeleton, path))) is None


def is_stored(path: str | os.PathLike[str]) -> bool:
    """Tell whether ``path`` is a file by :func:`save`, from its header alone; False for whatever cannot be read."""
    try:
        with Path(path).open("rb") as file:
            if kind_of(file) != "safetensors":
                return False
        with safe_open(path, "pt") as content:
            return FORMAT_KEY in (content.metadata() or {})
    except (OSError, ValueError, SafetensorError):
        return False
