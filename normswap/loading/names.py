"""How the names in a file become those of an architecture, without a guess.

Note [Names that fit]
Trainers wrap models, and each wrapper adds a part to the names within it: ``module.layer1._orig_mod.0.weight``. Such a
part is dropped, wherever it stands, where the name is one of the architecture's without it. Of several ways the one
that drops least is taken. Where the file has all names of the architecture as they are, nothing is dropped at all;
where two different tensors of the file would get one name, none does; and a network is not put together of the parts of
two, such as the student's backbone and the teacher's head.

A name that is left over may be of a layer that the architecture given does not have, so that without it the network
would be another: that is refused. Left out are names outside of what all others are within (``fc.weight`` beside
``model.…``), of losses and metrics by their names (``criterion.weight``), and of a further copy of the whole model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import nn

from normswap.loading.entries import same
from normswap.loading.weight_norm_names import other_forms

__all__ = ["COUNTER", "Match", "behind", "fitting_prefixes", "match", "shape_of"]

NETWORKS = frozenset(("model", "net", "student", "teacher"))
"""The names of attributes that hold a network each."""
WRAPPERS = frozenset(
    (
        *("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"),
        *NETWORKS,
    )
)
MOST_PREFIXES = 50
"""How many are tried: each costs a pass over all names, and every name of a file may have another."""
AROUND = re.compile(r"criteri|loss|metric|accuracy|(^|_)acc$", re.IGNORECASE)
"""What losses and metrics are called."""
COUNTS = re.compile(r"^(train|val|valid|test)_.*\.(?!(weight|bias)$)\w+$", re.IGNORECASE)
"""What a metric's own counts are called; ``val_proj.weight`` may be a layer's that projects values."""
BATCHES = "num_batches_tracked"
COUNTER = "n_averaged"
"""What an ``AveragedModel`` holds beside the parameters."""

Shape = tuple[int, ...] | None


@dataclass(frozen=True)
class Match:
    """What of a state dict is which tensor of an architecture.

    Args:
        names: The architecture's names, and the file's name for each.
        missing: The architecture's names that have none.
        misshapen: Those of another shape in the file, or of no floating-point type where one is needed.
        clashes: Those that several different tensors of the file could be, and these.
        torn: Pairs of names that are one tensor in the architecture and two in the file.
        mixed: Pairs of what the networks are called that names were taken from.
        extra: What else the file has of the model, and the file's name for each.
        foreign: What else it has within the model and of something else, likewise.
        outside: What else it has.
        dropped: The wrappers' parts that were dropped.
        reformed: Whether names of weight normalization were changed.
    """

    names: dict[str, str]
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    clashes: dict[str, list[str]] = field(default_factory=dict)
    torn: list[tuple[str, str]] = field(default_factory=list)
    mixed: list[tuple[str, str]] = field(default_factory=list)
    extra: dict[str, str] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    reformed: bool = False

    @property
    def problems(self) -> int:
        """How many names do not fit."""
        lists = (self.missing, self.misshapen, self.clashes, self.torn, self.mixed, self.extra)
        return sum(len(one) for one in lists)

    @property
    def badness(self) -> tuple[bool, int, int]:
        """0 for whatever fits; beyond that the less, the nearer."""
        right = len(self.names) - len(self.misshapen) if self.problems else 0
        return bool(self.problems), -right, self.problems

    @property
    def left_out(self) -> int:
        """How many names of the file are of something else."""
        return len(self.foreign) + len(self.outside)


def shape_of(value: object) -> Shape:
    """Return the shape of a tensor, None where it has none yet or is none."""
    lazy = isinstance(value, nn.UninitializedParameter | nn.UninitializedBuffer)
    return tuple(value.shape) if isinstance(value, torch.Tensor) and not lazy else None


def match(state: Mapping[str, Any], expected: Mapping[str, Any], prefix: str | None = None) -> Match:
    """Return how `state` fits a model's state dict `expected`, see Note [Names that fit].

    Args:
        state: Tensors by the file's names.
        expected: Tensors by the architecture's names; the same tensor under two names is tied.
        prefix: What to take off; names that do not begin with it are outside.
    """
    inside = behind(state, prefix)
    rests = {name: rest for rest, name in inside.items()}
    known = {**other_forms(expected), **{name: name for name in expected}}
    own = [(known[rest], name) for rest, name in inside.items() if rest in known]
    found = dict(own)
    forms = {name: rests[name] for name in found.values()}
    clashes: dict[str, list[str]] = {}
    if len(found) < len(own) or not _covers(found, expected, state):
        found, clashes, forms = _reached(inside, known, expected, state)
    complete, missing, torn = _with_ties(found, clashes, expected, state)
    fronts = [_front(rests[name], forms[name]) for name in found.values()]
    start = _shared(fronts)
    left = {rest: name for rest, name in inside.items() if name not in forms}
    within = {rest[len(start) :]: name for rest, name in left.items() if rest.startswith(start)}
    extra, foreign = _sorted_out(within, expected, state, further=not missing)
    used = {*forms, *within.values()}
    return Match(
        complete,
        missing,
        [name for name in complete if not _fits(state[complete[name]], expected[name])],
        clashes,
        torn,
        _networks(fronts),
        extra,
        foreign,
        [name for name in state if name not in used],
        sorted({part for name in found.values() for part in _dropped(rests[name], forms[name])}),
        any(forms[given] != name for name, given in found.items()),
    )


def behind(state: Iterable[str], prefix: str | None) -> dict[str, str]:
    """Return the names behind `prefix`, and the file's name of each; wrappers' parts may stand in front of it."""
    if prefix is None:
        return {name: name for name in state}
    plain = prefix.rstrip(".") + "."
    if found := {name[len(plain) :]: name for name in state if name.startswith(plain)}:
        return found
    wrapped = re.compile(rf"(?:(?:{'|'.join(sorted(WRAPPERS))})\.)+?{re.escape(plain)}")
    pairs = [(name[start.end() :], name) for name in state if (start := wrapped.match(name))]
    return dict(pairs) if len(dict(pairs)) == len(pairs) else {}


def _covers(names: Mapping[str, str], expected: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """Return whether each tensor of `expected` is among `names`; those that count batches may be missing."""
    held = {_identity(name, expected[name]) for name, own in names.items() if _fits(state[own], expected[name])}
    return all(_identity(n, v) in held or n.endswith(BATCHES) for n, v in expected.items())


def _identity(name: str, value: object) -> object:
    """Return what is the same for two names of one tensor."""
    return id(value) if isinstance(value, torch.Tensor) else name


def _fits(found: object, wanted: object) -> bool:
    a, b = shape_of(found), shape_of(wanted)
    if a is None or b is None:
        return True
    assert isinstance(found, torch.Tensor) and isinstance(wanted, torch.Tensor)  # noqa: PT018
    return a == b and (found.is_floating_point() or not wanted.is_floating_point())  # quantized ones need their scales


def _reached(
    inside: Mapping[str, str], known: Mapping[str, str], expected: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, list[str]], dict[str, str]]:
    """Return the file's name for each name that is reached, the clashes, and the form that each name was taken in."""
    tree: dict[str | None, Any] = {}
    for name in known:
        node = tree
        for part in name.split("."):
            node = node.setdefault(part, {})
        node[None] = name
    sources: dict[str, list[str]] = defaultdict(list)
    forms: dict[str, str] = {}
    for rest, name in inside.items():
        ways = _ways(rest.split("."), tree)
        ways = [way for way in ways if _fits(state[name], expected[known[way[1]]])] or ways
        least = [form for drops, form in ways if drops == min(ways)[0]]
        if len(least) == 1:
            forms[name] = least[0]
            sources[known[least[0]]].append(name)
    clashes = {n: given for n, given in sources.items() if not all(same(state[given[0]], state[g]) for g in given[1:])}
    return {n: given[0] for n, given in sources.items() if n not in clashes}, clashes, forms


def _ways(parts: list[str], tree: dict[str | None, Any]) -> list[tuple[int, str]]:
    """Return the known names that `parts` give when wrappers' are dropped, and how many are."""
    places = {id(tree): (0, tree)}
    for part in parts:
        after: dict[int, tuple[int, dict[str | None, Any]]] = {}
        steps = [(drops, node[part]) for drops, node in places.values() if part in node]
        if part in WRAPPERS:
            steps += [(drops + 1, node) for drops, node in places.values()]
        for drops, node in steps:
            if drops < after.get(id(node), (drops + 1, node))[0]:
                after[id(node)] = drops, node
        places = after
    return [(drops, node[None]) for drops, node in places.values() if None in node]


def _with_ties(
    found: Mapping[str, str], clashes: Mapping[str, Any], expected: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[dict[str, str], list[str], list[tuple[str, str]]]:
    """Return `found` with the further names of tied tensors, what is missing then, and what the file has twice."""
    complete, missing, torn = dict(found), [], []
    first: dict[object, str] = {}
    for name in found:
        other = first.setdefault(_identity(name, expected[name]), name)
        if not same(state[found[other]], state[found[name]]):
            torn.append((other, name))
    for name, value in expected.items():
        if name in found or name in clashes:
            continue
        if (one := _identity(name, value)) in first:
            complete[name] = found[first[one]]
        else:
            missing.append(name)
    return complete, missing, torn


def _front(rest: str, form: str) -> str:
    """Return what was dropped at the beginning of a name."""
    if rest == form or rest.endswith(f".{form}"):
        return rest[: len(rest) - len(form)]
    front = ""
    for part in rest.split("."):
        if part not in WRAPPERS or form.startswith(f"{part}."):
            break
        front += f"{part}."
    return front


def _shared(fronts: list[str]) -> str:
    """Return what was dropped at the beginning of all names: what is outside of it is outside of the model."""
    columns = zip(*(front.split(".")[:-1] for front in fronts), strict=False)
    return "".join(f"{column[0]}." for column in takewhile(lambda column: len(set(column)) == 1, columns))


def _networks(fronts: list[str]) -> list[tuple[str, str]]:
    """Return pairs of networks that the names behind ``fronts`` are of, of which neither holds the other."""
    names = sorted({tuple(part for part in front.split(".") if part in NETWORKS) for front in fronts})
    return [(".".join(a), ".".join(b)) for a, b in pairwise(names) if b[: len(a)] != a]


def _dropped(rest: str, form: str) -> Iterator[str]:
    parts, kept = rest.split("."), form.split(".")
    yield from (part for part in set(parts) & WRAPPERS if parts.count(part) > kept.count(part))


def _sorted_out(
    left: Mapping[str, str], expected: Mapping[str, Any], state: Mapping[str, Any], *, further: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Return what is left over of the model, and of something around it, such as a copy that is a `further` one."""
    tops = {name.partition(".")[0] for name in expected}
    likely = _ending_in(left, expected) if further else []
    copies = tuple(f"{prefix}." for prefix in likely if _is_copy(prefix, left, expected, state))
    extra: dict[str, str] = {}
    foreign: dict[str, str] = {}
    for rest, name in left.items():
        parts = [part for part in rest.split(".") if part not in WRAPPERS]
        around = len(parts) > 1 and parts[0] not in tops and (AROUND.search(parts[0]) or COUNTS.match(".".join(parts)))
        (foreign if around or parts[-1:] == [COUNTER] or rest.startswith(copies) else extra)[rest] = name
    return extra, foreign


def _is_copy(prefix: str, left: Mapping[str, str], expected: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    there = {name: left.get(f"{prefix}.{name}") for name in expected if not name.endswith(BATCHES)}
    return all(own is not None and _fits(state[own], expected[name]) for name, own in there.items())


def _ending_in(names: Iterable[str], expected: Iterable[str]) -> list[str]:
    """Return the prefixes behind which `names` has one name of `expected`: what may be copies of the model."""
    short = min(expected, key=lambda name: name.count("."), default="")
    forms = [short, *(other for other, name in other_forms(expected).items() if name == short)]
    found = [name.removesuffix(f".{form}") for name in names for form in forms if name.endswith(f".{form}")]
    return list(dict.fromkeys(found))[:MOST_PREFIXES]


def fitting_prefixes(state: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return the prefixes behind which `state` has all of `expected`."""
    return [prefix for prefix in _ending_in(state, expected) if not match(state, expected, prefix).problems]
