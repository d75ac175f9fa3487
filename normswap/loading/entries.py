"""Find what may be weights in a checkpoint: models and state dicts, at any depth, by dotted names.

Note [Which entry is taken]
An entry that the architecture takes goes before one that it does not. Of several, the first by the order of `ENTRIES`:
the weights that were trained, then averages of them; whatever was not taken is told. Where that order says nothing, as
of two names that are not in it, the file is refused until ``key`` names the one.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap.errors import InputError, Text, argument

__all__ = ["ENTRIES", "Entry", "entries_of", "modules_in", "named", "preferred", "same", "tell_choice", "weightless"]

logger = logging.getLogger(__name__)

AVERAGES = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "model_state_dict_ema", "params_ema")
ENTRIES = (
    *("model", "state_dict", "model_state_dict", "params", "net", "module", "weights", "generator"),
    *AVERAGES,
)
"""Names of entries in the order of preference, see Note [Which entry is taken]."""
SHOWN = 5


@dataclass(frozen=True, eq=False)
class Entry:
    """A model, or a mapping of names to tensors.

    Args:
        key: Its names from the top, joined by dots; '' is the file as a whole.
        value: The model or the mapping.
        plain: Whether nothing but tensors is in the mapping; another is used where nothing else is there.
    """

    key: str
    value: nn.Module | Mapping[str, torch.Tensor]
    plain: bool = True

    @property
    def unlisted(self) -> tuple[str, ...]:
        """Its names that the order of preference does not know."""
        return tuple(part for part in self.key.split(".") if self.key and part not in ENTRIES)

    @property
    def rank(self) -> tuple[bool, int]:
        """Its place in the order of preference."""
        known = [ENTRIES.index(part) for part in self.key.split(".") if part in ENTRIES]
        return bool(self.unlisted), max(known, default=len(ENTRIES) if self.key else -1)

    def __str__(self) -> str:
        return repr(self.key) if self.key else "the top of the file"


def _walk(content: object) -> Iterator[tuple[tuple[object, ...], object]]:
    """Yield everything within mappings, lists and tuples with the keys that lead there, each container once."""
    seen: set[int] = set()
    stack: list[tuple[tuple[object, ...], object]] = [((), content)]
    while stack:
        path, value = stack.pop()
        yield path, value
        if not isinstance(value, Mapping | list | tuple) or id(value) in seen:
            continue
        seen.add(id(value))
        inside = value.items() if isinstance(value, Mapping) else enumerate(value)
        stack += [((*path, key), item) for key, item in inside][::-1]


def modules_in(content: object) -> list[nn.Module]:
    """Return every module that is an entry of `content`, at any depth."""
    return [value for _, value in _walk(content) if isinstance(value, nn.Module)]


def entries_of(content: object) -> list[Entry]:
    """Return what may be weights in `content`; the states of optimizers are not."""
    found: list[Entry] = []
    optimizers: set[tuple[object, ...]] = set()
    for path, value in _walk(content):
        if any(path[:length] in optimizers for length in range(len(path))):
            continue
        if isinstance(value, Mapping) and "param_groups" in value:
            optimizers.add(path)
        elif isinstance(value, nn.Module | Mapping) and all(isinstance(key, str | int) for key in path):
            key = ".".join(map(str, path))
            if isinstance(value, nn.Module):
                losses = key and key not in ENTRIES and next(value.parameters(), None) is None
                found += [] if losses else [Entry(key, value)]
                continue
            tensors = _tensors_of(value)
            sizes = [tensor.ndim for tensor in tensors.values() if isinstance(tensor, torch.Tensor)]
            if any(sizes) or (sizes and not path):  # scalars are a best loss, or counters
                found.append(Entry(key, tensors, len(tensors) == len(value)))
    return found


def _tensors_of(mapping: Mapping[object, object]) -> OrderedDict[str, torch.Tensor]:
    """Return the tensors of a mapping by their names, with the versions by which torch converts old layouts."""
    found: OrderedDict[str, Any] = OrderedDict(
        (name, value)
        for name, value in mapping.items()
        if isinstance(name, str) and (isinstance(value, torch.Tensor) or name.endswith("_extra_state"))
    )
    if hasattr(mapping, "_metadata"):
        found._metadata = mapping._metadata  # type: ignore[attr-defined]
    return found


def named(content: object, key: str, path: Path) -> Entry:
    """Return the entry `key`.

    Raises:
        InputError: there is none, or it holds no weights.
    """
    found = entries_of(content)
    if wanted := [entry for entry in found if entry.key == key]:
        return wanted[0]
    if not found:
        raise weightless(content, path)
    if [entry.key for entry in found] == [""]:
        what = "a state dict" if isinstance(found[0].value, Mapping) else f"a {type(found[0].value).__name__}"
        raise InputError(
            f"{str(path)!r} is {what} as a whole: {argument('key', key)} names no entry of it",
            code="key-unused",
            hint=f"leave {argument('key', key)} out",
        )
    there = any(".".join(map(str, keys)) == key for keys, _ in _walk(content))
    raise InputError(
        f"{str(path)!r} has {'no weights in its' if there else 'no'} entry {key!r}",
        code="key-unknown",
        hint="it holds weights in " + ", ".join(str(entry) for entry in found[:SHOWN]),
    )


def weightless(content: object, path: Path) -> InputError:
    """Return the error for a file without weights."""
    holds = type(content).__name__
    if isinstance(content, Mapping):
        keys = [repr(key) for key in content]
        more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        holds = "a dictionary of " + (", ".join(keys[:SHOWN]) + more if keys else "nothing")
    return InputError(
        f"{str(path)!r} holds {holds}, and no model or state dict",
        code="no-weights",
        hint=f"save the model, its state dict, or either under one of the keys {', '.join(ENTRIES)}",
    )


def same(a: object, b: object) -> bool:
    """Return whether two entries, or two of their values, are equal."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a is b or (a.keys() == b.keys() and all(same(a[name], b[name]) for name in a))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.dtype == b.dtype and torch.equal(a, b))
    return a is b


def preferred(entries: Sequence[Entry], path: Path) -> Entry:
    """Return the entry to take, see Note [Which entry is taken].

    Raises:
        InputError: the order does not say which.
    """
    first = min(entries, key=lambda entry: entry.rank)
    for other in entries:
        unclear = other.rank == first.rank or (first.unlisted and other.unlisted != first.unlisted)
        if other is not first and unclear and not same(first.value, other.value):
            raise InputError(
                f"{str(path)!r} holds weights in {', '.join(map(str, entries))}, and nothing says which are meant",
                code="weights-ambiguous",
                hint="give " + " or ".join(argument("key", entry.key) for entry in (first, other) if entry.key),
            )
    return first


def tell_choice(taken: Entry, fitting: Sequence[Entry], entries: Sequence[Entry], path: Path) -> None:
    """Log which entry was taken, which others fit as well (`fitting`), and which look like weights and do not."""
    fit = [entry for entry in fitting if entry is not taken]
    rest = [str(entry) for entry in entries if entry.plain and entry is not taken and entry not in fit]
    text = ""
    if fit:
        average = any(part in AVERAGES for part in fit[0].key.split("."))
        takes = f"{argument('key', fit[0].key)} takes {'the average' if average else 'those'}"
        text = f" (there are also {', '.join(map(str, fit))}): {takes}"
    if rest:
        more = f" and {len(rest) - SHOWN} more" if len(rest) > SHOWN else ""
        text += f"; {', '.join(rest[:SHOWN])}{more} {'does' if len(rest) == 1 else 'do'} not fit"
    if taken.key or text:
        level = logging.WARNING if fit else logging.INFO
        logger.log(level, "%s: the weights are taken from %s%s", path, str(taken), Text(text))
