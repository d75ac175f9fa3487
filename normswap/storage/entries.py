"""The entries of a stored model's file: its plans, its contents, and its skeleton as text.

See Note [What a stored model is] in :mod:`normswap.storage.store`.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from normswap.errors import InputError, PlanError, argument, marked
from normswap.loading.checkpoints import read_checkpoint
from normswap.loading.importing import first_line, scripts_as_main
from normswap.loading.refusals import INSTEAD
from normswap.loading.trust import Trust
from normswap.recipes import Recipe, make_recipe
from normswap.records import Plan
from normswap.stages.moves import Moves
from normswap.storage.contents import Contents
from normswap.storage.origin import Origin, forget
from normswap.storage.remembered import moves_from_text, moves_to_text
from normswap.storage.replay import copied
from normswap.version import __version__

__all__ = [
    "FORMAT_KEY",
    "MISFITS",
    "SKELETON_KEY",
    "Stored",
    "damaged",
    "header_of",
    "read_stored",
    "recipe_of",
    "unpack",
    "unpacked",
]

FORMAT = 2  # 1 had other gains of weight standardization
FORMAT_KEY, _VERSION, _PLANS, _CONTENTS, SKELETON_KEY, _MOVES = (
    f"normswap_{name}" for name in ("format", "version", "plans", "contents", "skeleton", "moves")
)
_LARGEST_SKELETON = 32 << 20
"""Bytes of a packed skeleton; a safetensors header may have 100 MB. Real ones have 20 to 200 kB."""


MISFITS = (ValueError, KeyError, TypeError, AttributeError, RuntimeError)
"""What entries that contradict each other may raise."""


@dataclass(frozen=True)
class Stored:
    """What a file holds: its plans, each with the class of a recipe that is a user's, its contents, and its skeleton.

    And where the parameters come from, for each plan, where the file says it.
    """

    plans: list[tuple[Plan, str]]
    contents: Contents
    skeleton: str | None
    moves: list[Moves | None]


def header_of(origins: Sequence[Origin], contents: Contents, skeleton: nn.Module | None) -> dict[str, str]:
    """Return the metadata of the file: everything but the tensors."""
    metadata = {
        FORMAT_KEY: str(FORMAT),
        _VERSION: __version__,
        _PLANS: json.dumps([_plan_entry(origin) for origin in origins], ensure_ascii=False),
        _CONTENTS: contents.to_json(),
    }
    moves = moves_to_text([origin.moves for origin in origins])
    if moves is not None:
        metadata[_MOVES] = moves
    packed = None if skeleton is None else _pack(skeleton)
    if packed is not None:
        metadata[SKELETON_KEY] = packed
    return metadata


def _plan_entry(origin: Origin) -> dict[str, Any]:
    """Return a plan as JSON, with the class of a recipe that is not this package's."""
    plan, recipe = origin.plan, origin.recipe
    try:
        text = plan.to_json(indent=None)
    except (TypeError, ValueError) as cause:
        raise InputError(
            f"the options of the recipe '{plan.recipe}' cannot be written as JSON: {first_line(cause)}",
            code="storage-recipe",
            hint="options that are numbers, texts, or None can be stored",
        ) from cause
    try:
        known = make_recipe(plan.recipe, plan.options) == recipe
    except InputError:
        known = False
    custom = "" if known else f"{type(recipe).__module__}.{type(recipe).__qualname__}"
    return {"plan": json.loads(text), "custom": custom}


def recipe_of(plan: Plan, custom: str, given: Recipe | None) -> Recipe:
    """Return the recipe of a stored plan: ``given``, where it is that of a user (``custom``), or this package's."""
    if given is not None and given.name == plan.recipe:
        return given
    if custom:
        found = "none was given" if given is None else f"'{given.name}' was given"
        raise InputError(
            f"the model was converted by '{plan.recipe}', a recipe of its user ({custom}); {found}",
            code="storage-recipe",
            hint=f"give {argument('recipe')}",
        )
    return make_recipe(plan.recipe, plan.options)


def read_stored(path: Path) -> Stored:
    """Read the file."""
    try:
        with safe_open(path, "pt") as content:
            metadata = content.metadata() or {}
            if FORMAT_KEY not in metadata:
                raise InputError(
                    f"{str(path)!r} is a safetensors file that normswap.save did not write",
                    code="storage-foreign",
                    hint="load a state dict with load_state_dict, into a model that was converted or not, as it was",
                )
            if metadata[FORMAT_KEY] != str(FORMAT):
                raise InputError(
                    f"{str(path)!r} has the format {metadata[FORMAT_KEY][:20]!r}, this version reads {FORMAT}",
                    code="storage-format",
                    hint=f"install the normswap that wrote it: {metadata.get(_VERSION, 'a newer one')[:20]}",
                )
            tensors: dict[str, Tensor] = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        plans = [(Plan.from_json(json.dumps(e["plan"])), str(e["custom"])) for e in json.loads(metadata[_PLANS])]
        contents = Contents.from_json(metadata[_CONTENTS], tensors)
        moves = moves_from_text(metadata.get(_MOVES), len(plans))
    except (
        SafetensorError,
        PlanError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        zlib.error,
    ) as cause:
        raise damaged(path, cause) from cause
    return Stored(plans, contents, metadata.get(SKELETON_KEY), moves)


def damaged(path: Path, cause: Exception) -> InputError:
    """Return the error for a file whose entries cannot be read, or contradict each other."""
    what = marked(cause.message) if isinstance(cause, PlanError) else f"{type(cause).__name__}: {first_line(cause)}"
    return InputError(
        f"{str(path)!r} is damaged: {what}",
        code="file-truncated" if "incomplete" in str(cause).lower() else "file-damaged",
        hint="copy it again",
    )


def _pack(skeleton: nn.Module) -> str | None:
    """Return the skeleton as text, None where it cannot be pickled."""
    bare, buffer = copied(skeleton), io.BytesIO()
    forget(bare)
    try:
        with scripts_as_main():
            torch.save(bare, buffer)
    except Exception:  # local classes, hooks that are functions in functions: what a class does on being pickled
        return None
    packed = base64.b64encode(zlib.compress(buffer.getvalue(), 9)).decode("ascii")
    return packed if len(packed) <= _LARGEST_SKELETON else None


def unpacked(skeleton: str, path: Path) -> bytes:
    """Return the file by torch.save that a skeleton's text is."""
    try:
        decompressor = zlib.decompressobj()
        data = decompressor.decompress(base64.b64decode(skeleton, validate=True), 16 * _LARGEST_SKELETON)
        if not decompressor.eof:
            raise ValueError("its skeleton is cut short or too large")
    except (ValueError, binascii.Error, zlib.error) as cause:
        raise damaged(path, cause) from cause
    return data


def unpack(stored: Stored, path: Path, trust: Trust) -> nn.Module:
    """Return the skeleton, read by the rules for any model file."""
    fresh = f"give a fresh model of the same architecture: {argument('model')}"
    if stored.skeleton is None:
        raise InputError(
            f"{str(path)!r} holds the {stored.plans[0][0].model if stored.plans else 'model'}'s values and not its "
            "structure, which could not be pickled",
            code="storage-no-skeleton",
            hint=fresh,
        )
    data = unpacked(stored.skeleton, path)
    try:
        skeleton = read_checkpoint(io.BytesIO(data), path, trust)
    except InputError as cause:
        raise InputError(
            f"the structure of the model in {str(path)!r} is not read: {marked(cause.message)}",
            code=cause.code,
            hint=hint.replace(INSTEAD, fresh) if INSTEAD in (hint := marked(cause.hint)) else fresh,
        ) from cause
    if not isinstance(skeleton, nn.Module):
        raise damaged(path, ValueError(f"its skeleton is a {type(skeleton).__name__}"))
    return skeleton
