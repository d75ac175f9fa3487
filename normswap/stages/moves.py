"""Where a converted model's parameters come from: for each the old ones that it is linear in, under their full names.

What follows a parameter in training has to follow it through a swap: an optimizer's momentum, a later checkpoint. So a
conversion remembers the linear part of the map from the old parameters to the new ones, as one factor per channel for
each pair, and the old values per channel of what it replaced. Nothing here is of the size of a weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normswap.nn import FilterLayout
from normswap.nn.recurrent import ROWS
from normswap.norms import Along, Assignment, LinearOf
from normswap.records import InitRow
from normswap.stages.bound import BoundPlan, BoundStep
from normswap.stages.recurrent import BoundRecurrent
from normswap.stages.rewriting import Placed

__all__ = ["Move", "Moves", "Recording", "Scale", "old_tensors"]

_MAIN = ("norm.bias", "norm.weight", "layer.weight", "layer.bias")
"""Of several old parameters that meet a new one value by value, that whose gradient is nearest to the new one's."""


@dataclass(frozen=True)
class Move:
    """Where one new parameter comes from.

    Args:
        terms: The old parameters that it is linear in, by their full names, the main one first.
        near: Old parameters among whose like it belongs, such as in an optimizer's group, the nearest first.
        filters: The new parameter that holds the filters whose directions the terms mean; None where none do.
        layout: How the filters lie in a weight.
        reason: Why nothing is carried where there are no terms.
    """

    terms: tuple[LinearOf, ...]
    near: tuple[str, ...]
    filters: str | None = None
    layout: FilterLayout = field(default_factory=FilterLayout)
    reason: str = "nothing of the old model leads to it"


@dataclass(frozen=True)
class Scale:
    """What cross-layer equalization multiplied an old parameter with, before all else.

    Args:
        outputs: Along the channels that it gives, None for 1. ``(C,)``
        inputs: Along the channels that a weight reads, None for 1. ``(in,)``
        layout: How the filters lie.
    """

    outputs: Tensor | None
    inputs: Tensor | None
    layout: FilterLayout = field(default_factory=FilterLayout)

    def times(self, value: Tensor, power: int = 1) -> Tensor:
        """Return ``value``, shaped as the parameter, times the scale to a power."""
        if self.outputs is not None:
            factor = self.outputs.to(value.device) ** power
            value = value * factor if value.ndim == 1 else self.layout.multiply_outputs(value, factor)
        if self.inputs is not None:
            value = self.layout.multiply_inputs(value, self.inputs.to(value.device) ** power)
        return value


@dataclass(frozen=True, eq=False)
class Moves:
    """What a conversion remembers of the parameters that it replaced.

    Args:
        moves: Where the new parameters come from, by name; one that is not here is the old one of its name.
        scales: What old parameters were multiplied with first, by name.
        before: The old values per channel of all that was replaced or absorbed, by their names in the old state dict.
        old: The old model's parameters, and those of the copy that was converted, while anybody else holds them, by
            name; empty after loading from a file.
    """

    moves: Mapping[str, Move]
    scales: Mapping[str, Scale] = field(default_factory=dict)
    before: Mapping[str, Tensor] = field(default_factory=dict)
    old: Mapping[str, tuple[weakref.ref[nn.Parameter], ...]] = field(default_factory=dict)


class Recording:
    """Notes what a conversion does to parameters: begun before the model is changed, read afterwards."""

    def __init__(
        self,
        original: nn.Module,
        source: nn.Module,
        target: nn.Module,
        bound: BoundPlan,
        scales: Mapping[str, Scale],
    ) -> None:
        self._source, self._scales = source, scales
        self._recurrent = bound.recurrent
        self._of_matrices = {one.site.name: _terms_of_matrices(source, one) for one in bound.recurrent}
        self._terms: dict[str, Mapping[str, tuple[LinearOf, ...]]] = {}
        copies = dict(target.named_parameters())
        self._old = {
            name: tuple(weakref.ref(one) for one in (parameter, copies[name]) if name in copies)
            for name, parameter in original.named_parameters()
        }
        known = {id(tensor): name for name, tensor in (*original.named_buffers(), *original.named_parameters())}
        self._names: dict[str, dict[str, str]] = {}
        self._before: dict[str, Tensor] = {}
        for step in bound.steps:
            tensors = {part: old for part, old in old_tensors(original, step).items() if id(old) in known}
            self._names[step.site.norm] = {part: known[id(old)] for part, old in tensors.items()}
            self._before |= {
                known[id(old)]: old.detach().clone() for old in tensors.values() if old.ndim < 2 and not old.is_meta
            }

    def noting(self, values: Callable[[BoundStep], Assignment]) -> Callable[[BoundStep], Assignment]:
        """Return what gives the same values and notes what they come from, but not the values: they fill the memory."""

        def noted(step: BoundStep) -> Assignment:
            found = values(step)
            self._terms[step.site.norm] = {name: new.terms for name, new in found.items()}
            return found

        return noted

    def moves(self, target: nn.Module, placed: Sequence[Placed], rows: Iterable[InitRow]) -> Moves:
        """Return what is to be remembered, once ``target`` has its values; ``rows`` say which of them were fitted."""
        names = {id(parameter): name for name, parameter in target.named_parameters()}
        fitted = {row.name for row in rows if row.method == "matched"}
        moves: dict[str, Move] = {}
        for one in placed:
            found = self._of_site(one, names)
            if one.name in fitted:
                found = self._refitted(one, found, dict(target.named_parameters()))
            moves |= found
        readers = {one.bound.step.reader for one in placed}
        for recurrent in self._recurrent:
            moves |= self._of_recurrent(recurrent, target, took_up_a_norm=recurrent.site.name in readers)
        return Moves(moves, self._scales, self._before, self._old)

    def _of_site(self, one: Placed, names: Mapping[int, str]) -> dict[str, Move]:
        """Return where the parameters of one site come from, by name."""
        old, site = self._names[one.name], one.bound.site
        values = self._terms.get(one.name, {})
        layer = one.layer if one.layer is not None else one.reader
        layout = FilterLayout() if layer is None else FilterLayout.of(layer)
        own = {name: id(one.tensor(name)) for name in values if not _parametrized_since(one, name)}
        filters = next((names[own[n]] for n in own if own[n] in names and _stores_filters(values[n])), None)
        found: dict[str, Move] = {}
        for name, known in values.items():
            if own.get(name) not in names:
                continue
            terms = sorted((t for t in known if t.old in old), key=_order)
            near = [*([terms[0].old] if terms and _is_direct(terms[0]) else []), "norm.weight", *_MAIN]
            found[names[own[name]]] = Move(
                tuple(replace(t, old=old[t.old], factor=_bare(t.factor)) for t in terms),
                tuple(dict.fromkeys(old[part] for part in near if part in old)),
                filters,
                layout,
            )
        for part in one.parts:
            for parameter in part.parameters():
                full = names.get(id(parameter))
                if full is not None and full not in found and full not in old.values():
                    near = [old[part] for part in _MAIN if part in old]
                    found[full] = Move((), tuple(near), None, layout, f"'{site.norm}' was started afresh")
        return found

    def _of_recurrent(self, one: BoundRecurrent, target: nn.Module, *, took_up_a_norm: bool) -> dict[str, Move]:
        """Return where the parameters of a recurrent layer come from, by name."""
        name, found = one.site.name, dict[str, Move]()
        if one.weight is None:
            for own, _ in target.get_submodule(name).named_parameters():
                full = f"{name}.{own}"
                near = tuple(old for old in (full, f"{name}.weight_hh_l0", f"{name}.weight_hh") if old in self._old)
                found[full] = Move((), near, reason=f"another layer has taken the place of '{name}'")
            return found
        for key, (old, terms, filters) in self._of_matrices[name].items():
            found[key] = Move(
                () if took_up_a_norm else terms, (old,), filters, ROWS, "it took a norm up and changed its form"
            )
        return found

    def _refitted(self, one: Placed, moves: Mapping[str, Move], new: Mapping[str, nn.Parameter]) -> dict[str, Move]:
        """Return the moves of a site that was fitted to data, with the factors by which its values now differ.

        A filter's is that of least squares, ``⟨new_c, old_c⟩/⟨old_c, old_c⟩``, a gain's what keeps the filter's
        length, γ's the quotient of both; β is taken as it is.
        """
        old = self._names[one.name]
        weight = old.get("layer.weight")
        source = {**dict(self._source.named_buffers()), **dict(self._source.named_parameters())}
        if weight is None or one.layer is None:
            return dict(moves)
        layout = FilterLayout.of(one.layer)
        rows = _spread(layout.flatten(source[weight].detach().double()), one)
        whole = _spread(layout.flatten(FilterLayout.weight(one.layer).detach().double()), one)
        size = rows.square().sum(1)
        scale = _quotient((whole * rows).sum(1), size)
        found: dict[str, Move] = {}
        for name, move in moves.items():
            value, terms = new[name].detach().double(), []
            for term in move.terms:
                if term.old == weight and term.along is Along.VALUES:
                    stored = _spread(layout.flatten(value), one)
                    terms.append(replace(term, factor=_quotient((stored * rows).sum(1), size)))
                elif term.old == weight and term.along is not Along.MEAN:
                    sign = torch.where(scale < 0, -1.0, 1.0)
                    terms.append(replace(term, factor=_quotient(value.flatten() * sign, size.sqrt())))
                elif term.old == old.get("norm.weight") and name.endswith("weight"):
                    gamma = source[term.old].detach().double()
                    terms.append(replace(term, factor=_quotient(value.flatten(), gamma)))
                elif term.old == old.get("norm.bias"):
                    terms.append(term)
                elif term.old == old.get("layer.bias"):
                    terms.append(replace(term, factor=scale))
            found[name] = replace(move, terms=tuple(terms))
        return found


def old_tensors(model: nn.Module, step: BoundStep) -> dict[str, Tensor]:
    """Return the old tensors of a step's parts, ``layer.weight`` and so on."""
    found: dict[str, Tensor] = {}
    for part, fqn in (("layer", step.site.layer), ("reader", step.step.reader)):
        if fqn is not None:
            tensors = model.get_submodule(fqn)._parameters.items()
            found |= {f"{part}.{name}": tensor for name, tensor in tensors if tensor is not None}
    owner, _, name = step.site.norm.partition(":")
    own: dict[str, Tensor | None]
    if step.source.call is None:
        module = model.get_submodule(owner)
        own = {**module._parameters, **module._buffers}
    else:
        holder = owner if name else owner.rpartition(".")[0]
        own = {**step.source.call.tensors_of(model.get_submodule(holder))}
    return found | {f"norm.{name}": tensor for name, tensor in own.items() if tensor is not None}


_Terms = dict[str, tuple[str, tuple[LinearOf, ...], str | None]]
"""Of each new parameter of a matrix: the matrix, the terms, and the parameter that holds the filters."""


def _terms_of_matrices(source: nn.Module, one: BoundRecurrent) -> _Terms:
    """Return where the parameters that a recurrent layer's matrices are made of come from, by name."""
    found: _Terms = {}
    for matrix in one.matrices if one.weight is not None else ():
        assert one.weight is not None
        old = f"{one.site.name}.{matrix}"
        value = source.get_parameter(old).detach()
        if value.is_meta:
            continue
        ones = value.new_ones(value.shape[0], dtype=torch.float64)
        values = one.weight.encode(ROWS, value.double(), ones, value.dtype).values
        names = {key: f"{one.site.name}.{key.replace('.weight.', f'.{matrix}.', 1)}" for key in values}
        filters = next((names[key] for key, new in values.items() if _stores_filters(new.terms)), None)
        for key, new in values.items():
            kept = [term for term in new.terms if term.old == "layer.weight"]
            found[names[key]] = old, tuple(replace(t, old=old, factor=_bare(t.factor)) for t in kept), filters
    return found


def _parametrized_since(one: Placed, name: str) -> bool:
    """Tell whether a value's tensor is stored in another form: a recurrent layer's, which took the norm up before."""
    part, _, own = name.partition(".")
    return part == "reader" and one.reader is not None and parametrize.is_parametrized(one.reader, own)


def _is_direct(term: LinearOf) -> bool:
    return term.along is Along.VALUES


def _stores_filters(terms: Iterable[LinearOf]) -> bool:
    return any(term.old == "layer.weight" and _is_direct(term) for term in terms)


def _order(term: LinearOf) -> tuple[bool, int]:
    return not _is_direct(term), _MAIN.index(term.old) if term.old in _MAIN else len(_MAIN)


def _bare(factor: Tensor | None) -> Tensor | None:
    """Return a factor, None where it is 1 throughout."""
    return None if factor is None or bool((factor == 1).all()) else factor.detach()


def _spread(rows: Tensor, one: Placed) -> Tensor:
    """Return filters without their means, where the form of the weight loses these."""
    return rows - rows.mean(1, keepdim=True) if one.bound.weight.centres else rows


def _quotient(value: Tensor, by: Tensor) -> Tensor:
    """Return value/by, 0 where by is 0."""
    return torch.where(by == 0, torch.zeros_like(value), value / by)
