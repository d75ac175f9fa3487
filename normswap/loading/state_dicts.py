"""Find the state dict in a checkpoint, and put it into a model whole or not at all."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap.errors import InputError, parameter

__all__ = ["choose_entry", "fit", "renamed", "stripped"]

logger = logging.getLogger(__name__)

ENTRIES = (
    "model",
    "state_dict",
    "model_state_dict",
    "ema",
    "model_ema",
    "ema_state_dict",
    "net",
    "module",
    "weights",
)
PREFIXES = ("module.", "_orig_mod.", "model.")
SHOWN = 5
WEIGHT_NORM = (("original0", "_g"), ("original1", "_v"))


def _is_state_dict(value: object) -> bool:
    """Return whether `value` maps names to tensors (``_extra_state`` entries may hold anything)."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(entry, torch.Tensor) for entry in value.values())
        and all(
            isinstance(key, str) and (isinstance(entry, torch.Tensor) or key.endswith("_extra_state"))
            for key, entry in value.items()
        )
    )


def choose_entry(content: object, path: Path) -> nn.Module | dict[str, torch.Tensor]:
    """Return the model or state dict in `content`, which may be wrapped in a training checkpoint.

    Of several entries the first of `ENTRIES` is taken; the log says which, as a warning where there was a
    choice.

    Raises:
        InputError: there is neither a model nor a state dict.
    """
    if isinstance(content, nn.Module):
        return content
    if _is_state_dict(content):
        assert isinstance(content, Mapping)
        return _copy(content)
    entries = dict(content) if isinstance(content, Mapping) else {}
    usable = [k for k in ENTRIES if isinstance(entries.get(k), nn.Module) or _is_state_dict(entries.get(k))]
    if not usable:
        holds = type(content).__name__
        if isinstance(content, Mapping):
            holds = "a dictionary of " + (_some([repr(key) for key in entries]) if entries else "nothing")
        raise InputError(
            f"{str(path)!r} holds {holds}, and no model or state dict",
            code="no-weights",
            hint=f"save the model, its state dict, or either under one of the keys {', '.join(ENTRIES)}",
        )
    taken, others = usable[0], usable[1:]
    logger.log(
        logging.WARNING if others else logging.INFO,
        "%s: the weights are taken from %r%s",
        path,
        taken,
        f" (there are also {', '.join(map(repr, others))})" if others else "",
    )
    value = entries[taken]
    return value if isinstance(value, nn.Module) else _copy(value)


def _copy(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a shallow copy that keeps the versions of the modules, by which torch converts old layouts."""
    copied = OrderedDict(state)
    if hasattr(state, "_metadata"):
        copied._metadata = state._metadata  # type: ignore[attr-defined]
    return copied


def stripped(state: dict[str, torch.Tensor], expected: Iterable[str], path: Path) -> dict[str, torch.Tensor]:
    """Take off wrappers' prefixes (data parallel, compile, a trainer's own) that the model does not have."""
    expected = list(expected)
    if "n_averaged" in state and "n_averaged" not in expected:  # an AveragedModel counts its updates
        state = {name: tensor for name, tensor in state.items() if name != "n_averaged"}
    for _ in range(len(PREFIXES)):
        for prefix in PREFIXES:
            wrapped = all(name.startswith(prefix) for name in state)
            if wrapped and not all(name.startswith(prefix) for name in expected):
                logger.info("%s: the prefix %r is taken off all names", path, prefix)
                state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def renamed(state: Mapping[str, Any], expected: Iterable[str]) -> dict[str, Any]:
    """Return `state` with weight normalization's names as `expected` has them; nothing else is changed.

    Of torch's two forms one has ``weight_g`` and ``weight_v``, the other ``parametrizations.weight.original0`` and
    ``original1``: g and v, of the same shapes for every ``dim``. torch itself only reads the first into the second.
    """
    names, left = dict.fromkeys(expected), dict(state)
    changed: dict[str, str] = {}
    for name in names:
        if name in state:
            continue
        head, _, leaf = name.rpartition(".")
        owner, _, tensor = head.rpartition(".")
        for original, suffix in WEIGHT_NORM:
            if leaf == original and owner.rpartition(".")[2] == "parametrizations":
                found = f"{owner.removesuffix('parametrizations')}{tensor}{suffix}"
            elif leaf.endswith(suffix):
                place = f"{head}." if head else ""
                found = f"{place}parametrizations.{leaf.removesuffix(suffix)}.{original}"
            else:
                continue
            if found in left and found not in names:
                changed[found] = name
    return {changed.get(name, name): value for name, value in left.items()}


def fit(model: nn.Module, state: dict[str, torch.Tensor], path: Path, arch: str) -> None:
    """Load `state` into `model`.

    Raises:
        InputError: names are missing, left over, or of another shape; all are counted and up to five of
            each shown.
    """
    expected = model.state_dict(keep_vars=True)
    state = stripped(state, expected, path)
    if (changed := renamed(state, expected)).keys() != state.keys():
        logger.info("%s: weight normalization's names are changed to those of %s", path, arch)
        state = changed
    wanted = {name: _shape(tensor) for name, tensor in expected.items()}
    misshapen = [
        f"{name} is {_shape(state[name])}, {arch} has {shape}"
        for name, shape in wanted.items()
        if name in state and None not in (shape, _shape(state[name])) and _shape(state[name]) != shape
    ]
    names = {line.partition(" is ")[0] for line in misshapen}
    rest = _copy(state)
    for name in names:
        del rest[name]
    try:
        result = model.load_state_dict(rest, strict=False)
    except Exception as error:
        raise InputError(
            f"{str(path)!r} does not load into {arch}: {error}",
            code="state-dict-mismatch",
            hint=f"check {parameter('arch')}",
        ) from error
    _note_dtypes(expected, state, path, arch)
    missing = [f"{name} {wanted.get(name)}" for name in result.missing_keys if name not in names]
    extra = [f"{name} {_shape(state.get(name))}" for name in result.unexpected_keys]
    problems = [
        f"{len(lines)} {what}: {_some(lines)}"
        for what, lines in (
            ("missing", missing),
            ("not in the model", extra),
            ("of another shape", misshapen),
        )
        if lines
    ]
    if problems:
        raise InputError(
            f"{str(path)!r} does not fit {arch}: {'; '.join(problems)}",
            code="state-dict-mismatch",
            hint=f"check {parameter('arch')} and its arguments, {parameter('arch_kwargs')}, for instance num_classes",
        )


def _note_dtypes(expected: Mapping[str, object], state: Mapping[str, torch.Tensor], path: Path, arch: str) -> None:
    """Log where the model holds the file's floating point values in another dtype: more bytes, or fewer digits."""
    changed: Counter[tuple[str, str]] = Counter()
    for name, tensor in expected.items():
        found = state.get(name)
        if not isinstance(tensor, torch.Tensor) or not isinstance(found, torch.Tensor):
            continue
        if found.is_floating_point() and tensor.dtype != found.dtype:
            changed[str(found.dtype).removeprefix("torch."), str(tensor.dtype).removeprefix("torch.")] += 1
    for (before, after), count in changed.items():
        tensors = f"{count} {before} tensor{'s' * (count > 1)}"
        logger.warning("%s: %s became %s, as %s has them", path, tensors, after, arch)


def _shape(value: object) -> tuple[int, ...] | None:
    lazy = isinstance(value, (nn.UninitializedParameter, nn.UninitializedBuffer))
    return tuple(value.shape) if isinstance(value, torch.Tensor) and not lazy else None


def _some(lines: list[str]) -> str:
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return ", ".join(lines[:SHOWN]) + more
