"""Choose the state dict in a checkpoint that an architecture takes, and put it into a model whole or not at all."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap.errors import InputError, Text, argument, parameter
from normswap.loading.entries import Entry, preferred, tell_choice
from normswap.loading.names import COUNTER, Match, behind, fitting_prefixes, match, shape_of

__all__ = ["Chosen", "choose", "fit", "misfit", "tell"]

logger = logging.getLogger(__name__)

SHOWN = 5


@dataclass(frozen=True)
class Chosen:
    """A state dict, and how it fits what is expected.

    Args:
        entry: Where in the file it is.
        fitting: All entries that fit as well.
        match: Which tensor is which.
        arch: What it is compared with.
        expected: That one's state dict.
    """

    entry: Entry
    fitting: Sequence[Entry]
    match: Match
    arch: str
    expected: Mapping[str, Any]

    @property
    def given(self) -> Mapping[str, Any]:
        """The tensors by the file's names."""
        assert isinstance(self.entry.value, Mapping)
        return self.entry.value

    @property
    def state(self) -> OrderedDict[str, Any]:
        """The tensors by the architecture's names, and what else is within it, with the versions of the modules."""
        names = {**self.match.foreign, **self.match.extra, **self.match.names}
        found = OrderedDict((name, self.given[own]) for name, own in names.items())
        versions: Mapping[str, Any] = getattr(self.given, "_metadata", {})
        owners = {"": "", **{_owner(name): _owner(own) for name, own in names.items() if _leaf(name) == _leaf(own)}}
        moved = {new: versions[old] for new, old in owners.items() if old in versions}
        found._metadata = {**versions, **moved}  # type: ignore[attr-defined]
        return found


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def choose(
    entries: Sequence[Entry], targets: Mapping[str, Mapping[str, Any]], path: Path, prefix: str | None
) -> Chosen:
    """Return the entry that fits one of `targets` best, the first by the order of preference where several do.

    Args:
        entries: State dicts.
        targets: The state dicts expected, by what they are of.
        path: The file.
        prefix: What is to be taken off the names.

    Raises:
        InputError: no name begins with `prefix`.
    """
    names = [name for entry in entries if isinstance(entry.value, Mapping) for name in entry.value]
    if prefix is not None and not behind(names, prefix):
        raise InputError(
            f"no name in {str(path)!r} begins with {argument('prefix', prefix)}",
            code="prefix-unknown",
            hint=f"its names begin with {_some(list(dict.fromkeys(name.partition('.')[0] for name in names)))}",
        )
    best: dict[Entry, tuple[Match, str]] = {}
    for entry in entries:
        assert isinstance(entry.value, Mapping)
        tried = [(match(entry.value, expected, prefix), arch) for arch, expected in targets.items()]
        best[entry] = min(tried, key=lambda one: (one[0].badness, one[0].left_out))
    least = min(found.badness for found, _ in best.values())
    fitting = [entry for entry in entries if best[entry][0].badness == least]
    entry = min(fitting, key=lambda entry: entry.rank)
    found, arch = best[entry]
    return Chosen(entry, fitting, found, arch, targets[arch])


def fit(model: nn.Module, entries: Sequence[Entry], path: Path, arch: str, prefix: str | None = None) -> None:
    """Load the state dict among `entries` that fits into `model`.

    Raises:
        InputError: none fits: of the nearest, names are missing, left over, or of another shape, which all are counted
            and up to five of each shown; or several do, and nothing says which is meant.
    """
    chosen = choose(entries, {arch: model.state_dict(keep_vars=True)}, path, prefix)
    found, state = chosen.match, chosen.state
    refused = {*found.misshapen, *found.clashes}
    rest = OrderedDict((name, value) for name, value in state.items() if name not in refused)
    rest._metadata = state._metadata  # type: ignore[attr-defined]
    try:
        result = model.load_state_dict(rest, strict=False)
    except Exception as error:
        raise InputError(
            f"{str(path)!r} does not load into {arch}: {error}",
            code="state-dict-mismatch",
            hint=f"check {parameter('arch')}",
        ) from error
    missing = [name for name in result.missing_keys if name not in refused]
    extra = [name for name in result.unexpected_keys if name in found.extra]
    if missing or extra or refused or found.torn or found.mixed:
        raise misfit(chosen, entries, path, missing, extra)
    tell(chosen, entries, path)
    _note_dtypes(chosen.expected, state, path, arch)


def tell(chosen: Chosen, entries: Sequence[Entry], path: Path) -> None:
    """Log which entry was taken, what was done to its names, and what was left out.

    Raises:
        InputError: others fit as well, and nothing says which is meant.
    """
    tell_choice(preferred(chosen.fitting, path), chosen.fitting, entries, path)
    found, arch = chosen.match, chosen.arch
    if found.dropped:
        logger.info("%s: taken off the names: %s", path, Text(", ".join(f"{part}." for part in found.dropped)))
    if found.reformed:
        logger.info("%s: weight normalization's names are changed to those of %s", path, arch)
    names = [name for name in (*found.foreign.values(), *found.outside) if _leaf(name) != COUNTER]
    if names:
        lines = _some([f"{name} {shape_of(chosen.given[name])}" for name in names])
        prefixes = fitting_prefixes({name: chosen.given[name] for name in names}, chosen.expected)
        text = Text(f"{lines}; {argument('prefix', prefixes[0])} takes those") if prefixes else lines
        logger.warning("%s: left out, as no part of %s: %s", path, arch, text)


def misfit(
    chosen: Chosen,
    entries: Sequence[Entry],
    path: Path,
    missing: Sequence[str] | None = None,
    extra: Sequence[str] | None = None,
) -> InputError:
    """Return the error that says where the nearest state dict does not fit."""
    found, given, expected, arch = chosen.match, chosen.given, chosen.expected, chosen.arch
    lists = {
        "missing": [
            f"{name} {shape_of(expected.get(name))}" for name in (found.missing if missing is None else missing)
        ],
        "not in the model": [
            f"{found.extra[name]} {shape_of(given[found.extra[name]])}"
            for name in (found.extra if extra is None else extra)
        ],
        "of another shape": [
            f"{name} is {shape}, {arch} has {shape_of(expected[name])}"
            for name in found.misshapen
            if (shape := shape_of(given[found.names[name]])) != shape_of(expected[name])
        ],
        "of another type": [
            f"{name} is {given[own].dtype}, {arch} has {expected[name].dtype}"
            for name in found.misshapen
            if shape_of(given[own := found.names[name]]) == shape_of(expected[name])
        ],
        "of several values": [f"{name} may be {' or '.join(own)}" for name, own in found.clashes.items()],
        "of two networks": [f"some are of {a} and some of {b}" for a, b in found.mixed],
        f"one tensor in {arch} and two in the file": [f"{a} and {b}" for a, b in found.torn],
    }
    problems = "; ".join(f"{len(lines)} {what}: {_some(lines)}" for what, lines in lists.items() if lines)
    nearest = f"the nearest, {chosen.entry}, has " if len(entries) > 1 else ""
    parts = _fitting_parts(entries, expected)
    return InputError(
        f"{str(path)!r} does not fit {arch}: {nearest}{problems}",
        code="state-dict-mismatch",
        hint="give "
        + " or ".join(f"{argument('key', k)} {argument('prefix', p)}" if k else argument("prefix", p) for k, p in parts)
        if parts
        else f"check {parameter('arch')} and its arguments, {parameter('arch_kwargs')}, for instance num_classes",
    )


def _fitting_parts(entries: Sequence[Entry], expected: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the keys and prefixes of parts that fit; no key where there is but one entry."""
    found: list[tuple[str, str]] = []
    for entry in entries[: 2 * SHOWN]:
        assert isinstance(entry.value, Mapping)
        key = entry.key if len(entries) > 1 else ""
        found += [(key, prefix) for prefix in fitting_prefixes(entry.value, expected)]
    return found[:SHOWN]


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


def _some(lines: list[str]) -> str:
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return ", ".join(lines[:SHOWN]) + more
