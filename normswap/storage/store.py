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

import base64
import binascii
import io
import json
import os
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from normswap.errors import InputError, PlanError, argument, marked
from normswap.loading.checkpoints import read_checkpoint
from normswap.loading.files import expect_kind, kind_of, open_file
from normswap.loading.importing import first_line, scripts_as_main
from normswap.loading.refusals import INSTEAD
from normswap.loading.trust import Trust
from normswap.recipes import Recipe, make_recipe
from normswap.records import Plan
from normswap.stages.bound import bind
from normswap.stages.rewriting import rewrite
from normswap.storage.contents import Contents, collect, differences, give
from normswap.storage.origin import Origin, forget, origin_of, remember, skeleton_of, slots
from normswap.storage.writing import check_target, reported, staged
from normswap.version import __version__

__all__ = ["is_stored", "load", "save"]

FORMAT = 2  # 1 had other gains of weight standardization
_FORMAT, _VERSION, _PLANS, _CONTENTS, _SKELETON = (
    f"normswap_{name}" for name in ("format", "version", "plans", "contents", "skeleton")
)
_LARGEST_SKELETON = 32 << 20
"""Bytes of a packed skeleton; a safetensors header may have 100 MB. Real ones have 20 to 200 kB."""


_MISFITS = (ValueError, KeyError, TypeError, AttributeError, RuntimeError)
"""What entries that contradict each other may raise."""


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
    history = _history(model)
    skeleton = history[0].skeleton
    replayed = None
    if skeleton is not None:
        replayed = _replayed(_copied(skeleton), [(origin.plan, origin.recipe) for origin in history])
        _refuse_changed(model, replayed)
        _warn_of_hooks(model, replayed)
    contents = collect(model, replayed)
    metadata = {
        _FORMAT: str(FORMAT),
        _VERSION: __version__,
        _PLANS: json.dumps([_plan_entry(origin) for origin in history], ensure_ascii=False),
        _CONTENTS: contents.to_json(),
    }
    packed = None if skeleton is None else _pack(skeleton)
    if packed is not None:
        metadata[_SKELETON] = packed
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
    with open_file(path) as file:
        expect_kind(kind_of(file), ("safetensors",), path)
    stored = _read(path)
    steps = [(plan, _recipe(plan, custom, recipe)) for plan, custom in stored.plans]
    if model is None:
        skeleton = _unpack(stored, path, trusted)
    elif origin_of(model) is not None:
        raise InputError(
            f"the {type(model).__name__} given as {argument('model')} was converted already",
            code="storage-model",
            hint="give the model as it is before a conversion: load() converts it",
        )
    else:
        skeleton = _copied(model)
    replayed = _replayed(skeleton, steps)
    try:
        return give(replayed, stored.contents)
    except _MISFITS as cause:
        raise _damaged(path, cause) from cause


def is_stored(path: str | os.PathLike[str]) -> bool:
    """Tell whether ``path`` is a file by :func:`save`, from its header alone; False for whatever cannot be read."""
    try:
        with Path(path).open("rb") as file:
            if kind_of(file) != "safetensors":
                return False
        with safe_open(path, "pt") as content:
            return _FORMAT in (content.metadata() or {})
    except (OSError, ValueError, SafetensorError):
        return False


# ------------------------------------------------------------------------------------------- conversions, again


def _history(model: nn.Module) -> list[Origin]:
    """Return the conversions that made ``model``, the first one first."""
    if origin_of(model) is None:
        inner = [name for name, module in model.named_modules() if origin_of(module) is not None]
        hint = "torch.save stores it"
        if inner:
            hint = f"its submodule '{inner[0]}' is one: save that, and load it into its place"
        raise InputError(
            f"this {type(model).__name__} is not what a conversion returned", code="not-converted", hint=hint
        )
    history: list[Origin] = []
    current: nn.Module | None = model
    while current is not None and (origin := origin_of(current)) is not None:
        history.insert(0, origin)
        current = origin.skeleton
    return history


def _copied(skeleton: nn.Module) -> nn.Module:
    copied = skeleton_of(skeleton)
    if copied is None:
        raise InputError(
            f"the {type(skeleton).__name__} cannot be copied",
            code="not-copyable",
            hint="take out what copy.deepcopy refuses, such as open files or locks",
        )
    return copied


def _replayed(skeleton: nn.Module, steps: Sequence[tuple[Plan, Recipe]]) -> nn.Module:
    """Carry the plans out on ``skeleton``, in place."""
    for plan, recipe in steps:
        origin = Origin(plan, recipe, skeleton_of(skeleton))
        rewrite(skeleton, bind(plan, recipe, skeleton))
        remember(skeleton, origin)
    return skeleton


def _structure(model: nn.Module) -> dict[str, Any]:
    """Return what a replay must reproduce: modules by class (and by what they are aliases of), tensors by shape."""
    first: dict[int, str] = {}
    found: dict[str, Any] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        alias = first.setdefault(id(module), fqn)
        code = module.code if isinstance(module, fx.GraphModule) else ""
        found[fqn] = type(module).__qualname__ if alias == fqn else f"'{alias}'"
        if code:
            found[f"{fqn}.forward"] = code
    for slot in slots(model):
        if slot.kind != "attribute":
            found[slot.name] = f"a {slot.kind} of shape {tuple(slot.tensor.shape)}"
    return found


def _refuse_changed(model: nn.Module, replayed: nn.Module) -> None:
    different = differences(_structure(model), _structure(replayed), "the model", "its conversion")
    if not different:
        return
    if _own_parts(replayed) and not _own_parts(model):
        raise InputError(
            f"the {type(model).__name__} was folded: nothing of the conversion is left in it",
            code="storage-folded",
            hint="a folded model is plain PyTorch: torch.save(model, path), or torch.save its state dict",
        )
    raise InputError(
        f"the {type(model).__name__} is no longer what its conversion made: {different}",
        code="storage-changed",
        hint="change the model (replace its head) before converting it; or store this one as it is by torch.save of "
        "fold(model), or of its state dict",
    )


def _own_parts(model: nn.Module) -> bool:
    return any(
        parametrize.is_parametrized(module) or type(module).__module__.startswith("normswap.nn.")
        for module in model.modules()
    )


def _warn_of_hooks(model: nn.Module, replayed: nn.Module) -> None:
    before = dict(replayed.named_modules())
    for fqn, module in model.named_modules():
        for table in ("_forward_hooks", "_forward_pre_hooks"):
            if len(vars(module)[table]) > len(vars(before[fqn])[table]):
                warnings.warn(
                    f"'{fqn}' has forward hooks that were registered after the conversion: they are not stored",
                    stacklevel=3,
                )
                return


# --------------------------------------------------------------------------------------------------- the entries


@dataclass(frozen=True)
class _Stored:
    plans: list[tuple[Plan, str]]
    contents: Contents
    skeleton: str | None


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


def _recipe(plan: Plan, custom: str, given: Recipe | None) -> Recipe:
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


def _read(path: Path) -> _Stored:
    try:
        with safe_open(path, "pt") as content:
            metadata = content.metadata() or {}
            if _FORMAT not in metadata:
                raise InputError(
                    f"{str(path)!r} is a safetensors file that normswap.save did not write",
                    code="storage-foreign",
                    hint="load a state dict with load_state_dict, into a model that was converted or not, as it was",
                )
            if metadata[_FORMAT] != str(FORMAT):
                raise InputError(
                    f"{str(path)!r} has the format {metadata[_FORMAT][:20]!r}, this version reads {FORMAT}",
                    code="storage-format",
                    hint=f"install the normswap that wrote it: {metadata.get(_VERSION, 'a newer one')[:20]}",
                )
            tensors: dict[str, Tensor] = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        plans = [(Plan.from_json(json.dumps(e["plan"])), str(e["custom"])) for e in json.loads(metadata[_PLANS])]
        contents = Contents.from_json(metadata[_CONTENTS], tensors)
    except (
        SafetensorError,
        PlanError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
    ) as cause:
        raise _damaged(path, cause) from cause
    return _Stored(plans, contents, metadata.get(_SKELETON))


def _damaged(path: Path, cause: Exception) -> InputError:
    what = marked(cause.message) if isinstance(cause, PlanError) else f"{type(cause).__name__}: {first_line(cause)}"
    return InputError(
        f"{str(path)!r} is damaged: {what}",
        code="file-truncated" if "incomplete" in str(cause).lower() else "file-damaged",
        hint="copy it again",
    )


def _pack(skeleton: nn.Module) -> str | None:
    """Return the skeleton as text, None where it cannot be pickled."""
    bare, buffer = _copied(skeleton), io.BytesIO()
    forget(bare)
    try:
        with scripts_as_main():
            torch.save(bare, buffer)
    except Exception:  # local classes, hooks that are functions in functions: what a class does on being pickled
        return None
    packed = base64.b64encode(zlib.compress(buffer.getvalue(), 9)).decode("ascii")
    return packed if len(packed) <= _LARGEST_SKELETON else None


def _unpack(stored: _Stored, path: Path, trust: Trust) -> nn.Module:
    fresh = f"give a fresh model of the same architecture: {argument('model')}"
    if stored.skeleton is None:
        raise InputError(
            f"{str(path)!r} holds the {stored.plans[0][0].model if stored.plans else 'model'}'s values and not its "
            "structure, which could not be pickled",
            code="storage-no-skeleton",
            hint=fresh,
        )
    try:
        decompressor = zlib.decompressobj()
        data = decompressor.decompress(base64.b64decode(stored.skeleton, validate=True), 16 * _LARGEST_SKELETON)
        if not decompressor.eof:
            raise ValueError("its skeleton is cut short or too large")
    except (ValueError, binascii.Error, zlib.error) as cause:
        raise _damaged(path, cause) from cause
    try:
        skeleton = read_checkpoint(io.BytesIO(data), path, trust)
    except InputError as cause:
        raise InputError(
            f"the structure of the model in {str(path)!r} is not read: {marked(cause.message)}",
            code=cause.code,
            hint=hint.replace(INSTEAD, fresh) if INSTEAD in (hint := marked(cause.hint)) else fresh,
        ) from cause
    if not isinstance(skeleton, nn.Module):
        raise _damaged(path, ValueError(f"its skeleton is a {type(skeleton).__name__}"))
    return skeleton
