"""The names that torch's two forms of weight normalization give to the same tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["other_forms", "renamed"]

WEIGHT_NORM = (("original0", "_g"), ("original1", "_v"))


def other_forms(expected: Iterable[str]) -> dict[str, str]:
    """Return the names of weight normalization's other form, and what each is called in `expected`.

    Of torch's two forms one has ``weight_g`` and ``weight_v``, the other ``parametrizations.weight.original0`` and
    ``original1``: g and v, of the same shapes for every ``dim``. torch itself only reads the first into the second.
    """
    names, found = set(expected), {}
    for name in names:
        head, _, leaf = name.rpartition(".")
        owner, _, tensor = head.rpartition(".")
        for original, suffix in WEIGHT_NORM:
            if leaf == original and owner.rpartition(".")[2] == "parametrizations":
                found[f"{owner.removesuffix('parametrizations')}{tensor}{suffix}"] = name
            elif leaf.endswith(suffix):
                place = f"{head}." if head else ""
                found[f"{place}parametrizations.{leaf.removesuffix(suffix)}.{original}"] = name
    return {other: name for other, name in found.items() if other not in names}


def renamed(state: Mapping[str, Any], expected: Iterable[str]) -> dict[str, Any]:
    """Return `state` with weight normalization's names as `expected` has them; nothing else is changed."""
    changed = {other: name for other, name in other_forms(expected).items() if name not in state}
    return {changed.get(name, name): value for name, value in state.items()}
