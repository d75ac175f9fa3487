"""An optimizer's state through a swap: how each entry follows the linear map from old to new parameters.

Near the swap a new parameter is ``N = Σ_k T_k O_k + const`` of the old ones (:mod:`normswap.stages.moves`); with it the
converted network is the function that the old one is, so a step δO of the old parameters and the step ``δN = Σ_k T_k
δO_k`` of the new ones move the function alike, to first order.

Note [What a first moment is]
A momentum buffer was summed up from gradients, and a gradient follows the transpose of the inverse of T: 1/f where the
value follows f. But what a buffer is *for* is the step that the optimizer takes with it, ``−lr·buffer``, and a step is
a change of values: it follows T. Carried as a gradient, the momentum would go on moving the function by f² times too
little, and with the g of weight normalization (f = ‖w‖/σ) by more than that. So a first moment is carried by its step:

- SGD, RMSprop with momentum: ``buffer' = Σ_k (lr_k/lr') T_k buffer_k``;
- Adam and its kin divide elementwise by D = √second + eps, each by its own:
  ``m' = D' ⊙ Σ_k (lr_k/lr') T_k (m_k / D_k)``, with both bias corrections where the counts of steps differ.

Old momentum then displaces the function by what it would have, ``Σ μ^i lr·buffer``, while gradients of the new
parameters replace it. *They* move the function by J Jᵀ of the new parameters, not of the old ones: no state of an
optimizer could change that.

Second moments are of the gradients to come, and follow the square of the inverse: of the main term alone, ``s' = s/f²``
value by value, ``Σ_i u_i² s_i/f²`` where a filter's direction u gives one value. (The sum leaves out the covariances of
the filter's gradients, which no optimizer here keeps.) Adadelta's mean square of steps follows f².
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn, optim

from normswap.errors import InputError, argument
from normswap.norms import Along, LinearOf
from normswap.stages.moves import Move, Moves

__all__ = ["OPTIMIZERS", "Entries", "Held", "carried", "is_unchanged", "refuse_misshapen", "terms_of"]


class Kind(Enum):
    """What an entry of an optimizer's state is."""

    STEP = "a sum of gradients, times the rate a step"
    MEAN = "a mean of gradients, over a root of second moments a step"
    GRADIENT = "a mean of gradients that second moments are compared with"
    SQUARE = "a mean of squared gradients"
    SIZE = "a largest gradient"
    SQUARED_STEP = "a mean of squared steps"


Entries = Mapping[str, Kind]

_ADAM: Entries = {"exp_avg": Kind.MEAN, "exp_avg_sq": Kind.SQUARE, "max_exp_avg_sq": Kind.SQUARE}
OPTIMIZERS: Mapping[type, Entries] = {
    optim.SGD: {"momentum_buffer": Kind.STEP},
    optim.Adam: _ADAM,
    optim.AdamW: _ADAM,
    optim.NAdam: _ADAM,
    optim.RAdam: _ADAM,
    optim.Adamax: {"exp_avg": Kind.MEAN, "exp_inf": Kind.SIZE},
    optim.RMSprop: {"square_avg": Kind.SQUARE, "momentum_buffer": Kind.STEP, "grad_avg": Kind.GRADIENT},
    optim.Adagrad: {"sum": Kind.SQUARE},
    optim.Adadelta: {"square_avg": Kind.SQUARE, "acc_delta": Kind.SQUARED_STEP},
}
"""The entries of the size of a parameter that each optimizer keeps; all others are counts."""


@dataclass(frozen=True)
class Held:
    """An old parameter that an optimizer holds.

    Args:
        group: The place of its group.
        options: The group's options.
        state: Its state, empty before the first step.
    """

    group: int
    options: Mapping[str, Any]
    state: Mapping[str, Any]

    @property
    def rate(self) -> float:
        """The learning rate."""
        return float(self.options.get("lr", 1.0))


def terms_of(name: str, moves: Moves) -> tuple[LinearOf, ...]:
    """Return the old parameters that the new one ``name`` is linear in, the main one first."""
    move = moves.moves.get(name)
    return (LinearOf(name),) if move is None else move.terms


def is_unchanged(name: str, moves: Moves) -> bool:
    """Tell whether the new parameter ``name`` has the values of an old one."""
    terms = terms_of(name, moves)
    plain = len(terms) == 1 and terms[0].factor is None and terms[0].along is Along.VALUES
    return plain and terms[0].old not in moves.scales


def refuse_misshapen(held: Mapping[str, Held], moves: Moves, model: nn.Module, entries: Entries) -> None:
    """Raise where a state has not the shape of the old parameter that it is said to be of."""
    new = dict(model.named_parameters())
    for name, value in new.items():
        for term in terms_of(name, moves)[:1]:
            one = held.get(term.old)
            if one is None:
                continue
            for key in entries:
                found = one.state.get(key)
                wanted = value.numel()
                filters = moves.moves[name].filters if name in moves.moves else None
                if term.along.reduces and filters is not None:
                    wanted = new[filters].numel()
                if isinstance(found, Tensor) and found.numel() != wanted:
                    raise InputError(
                        f"{key!r} of '{term.old}' has the shape {tuple(found.shape)}, the parameter {wanted} values",
                        code="optimizer-shape",
                        hint=f"give {argument('names')}, the old model's parameters in the order of the optimizer",
                    )


def carried(
    name: str,
    value: Tensor,
    filters: Tensor | None,
    moves: Moves,
    held: Mapping[str, Held],
    options: Mapping[str, Any],
    entries: Entries,
) -> dict[str, Any]:
    """Return the state of a new parameter.

    Args:
        name: Its name.
        value: It.
        filters: The filters whose directions its terms mean.
        moves: The map from old to new.
        held: The old parameters that the optimizer holds, by name.
        options: The options of the group that it comes into.
        entries: What the optimizer keeps.
    """
    terms = [term for term in terms_of(name, moves) if term.old in held and held[term.old].state]
    if not terms or terms[0].along is Along.FILTERS:  # what remains is no parameter of its kind
        return {}
    main = held[terms[0].old].state
    found = {key: _copied(entry) for key, entry in main.items() if key not in entries}
    mapped = _Map(moves.moves.get(name, Move((), ())), value, filters, moves)
    rate = float(options.get("lr", 1.0))
    for key, kind in entries.items():
        if kind is Kind.MEAN or not isinstance(main.get(key), Tensor):
            continue
        like = main[key]
        if is_unchanged(name, moves):
            new = like.detach().clone()
        elif kind is Kind.STEP:
            new = mapped.step(terms, {t.old: held[t.old].state.get(key) for t in terms}, _ratios(terms, held, rate))
        elif kind is Kind.SIZE:
            new = mapped.squared(terms[0], like.double().square(), -2).sqrt()
        elif kind is Kind.GRADIENT:
            new = mapped.gradient(terms[0], like.double())
        else:
            new = mapped.squared(terms[0], like.double(), 2 if kind is Kind.SQUARED_STEP else -2)
        found[key] = _like(new, like, value)
    for key in (key for key, kind in entries.items() if kind is Kind.MEAN and isinstance(main.get(key), Tensor)):
        if is_unchanged(name, moves):
            found[key] = main[key].detach().clone()
            continue
        directions = {t.old: _direction(held[t.old], key) for t in terms}
        step = mapped.step(terms, directions, _ratios(terms, held, rate))
        found[key] = _like(step * _divisor(found, options, step.device), main[key], value)
    return found


def _ratios(terms: list[LinearOf], held: Mapping[str, Held], rate: float) -> dict[str, float]:
    return {t.old: 1.0 if held[t.old].rate == rate or not rate else held[t.old].rate / rate for t in terms}


def _direction(held: Held, key: str) -> Tensor | None:
    """Return the step of an adaptive optimizer at the rate 1, but for the sign."""
    first = held.state.get(key)
    if not isinstance(first, Tensor):
        return None
    first = first.detach().double()
    divisor = _divisor(held.state, held.options, first.device)
    return torch.where(divisor > 0, first / divisor, torch.zeros_like(first))


def _divisor(state: Mapping[str, Any], options: Mapping[str, Any], device: torch.device) -> Tensor:
    """Return by what Adam divides its first moment, both bias corrections included."""
    steps = max(float(state.get("step", 1)), 1.0)
    first, second = map(float, options.get("betas", (0.0, 0.0)))
    one, two = 1 - math.pow(first, steps), 1 - math.pow(second, steps)
    if "exp_inf" in state:
        largest: Tensor = state["exp_inf"].detach().double().to(device)
        return one * largest
    square: Tensor = state["max_exp_avg_sq" if "max_exp_avg_sq" in state else "exp_avg_sq"].detach().double().to(device)
    return one * ((square / two).sqrt() + float(options.get("eps", 0.0)))


def _like(new: Tensor, old: Tensor, parameter: Tensor) -> Tensor:
    """Return an entry in the dtype of the old one, finite, and laid out as the parameter is."""
    new = torch.nan_to_num(new, nan=0.0, posinf=0.0, neginf=0.0).to(parameter.device, old.dtype)
    return torch.empty_like(parameter, dtype=old.dtype, requires_grad=False).copy_(new)


def _copied(entry: Any) -> Any:
    return entry.detach().clone() if isinstance(entry, Tensor) else entry


class _Map:
    """The map to one new parameter, for steps, gradients and squares."""

    def __init__(self, move: Move, value: Tensor, filters: Tensor | None, moves: Moves) -> None:
        self.move, self.moves = move, moves
        self.value = value.detach().double()
        self.filters = None if filters is None else filters.detach().double()

    def step(self, terms: list[LinearOf], steps: Mapping[str, Tensor | None], ratios: Mapping[str, float]) -> Tensor:
        """Return ``Σ_k ratio_k T_k step_k``, shaped as the new parameter."""
        total = torch.zeros_like(self.value)
        for term in terms:
            if (old := steps[term.old]) is not None:
                total += ratios[term.old] * self._pushed(term, self._scaled(term, old.detach().double())).to(
                    total.device
                )
        return total

    def _scaled(self, term: LinearOf, old: Tensor, power: int = 1) -> Tensor:
        scale = self.moves.scales.get(term.old)
        return old if scale is None else scale.times(old, power)

    def _pushed(self, term: LinearOf, old: Tensor) -> Tensor:
        """Return what a change of the old parameter makes of the new one."""
        if term.along is Along.VALUES:
            return self._multiplied(old, term, term.factor)
        if term.along is Along.FILTERS:
            factor = old if term.factor is None else old * term.factor.to(old)
            return self._multiplied(self.value.to(old.device), term, factor)
        rows = self.move.layout.flatten(old)
        found = (rows * self._unit(term, rows)).sum(1)
        return (found if term.factor is None else found * term.factor.to(found)).view(self.value.shape)

    def gradient(self, main: LinearOf, old: Tensor) -> Tensor:
        """Return a gradient of the new parameter, from one of its main old one."""
        inverse = None if main.factor is None else 1 / main.factor
        old = self._scaled(main, old, -1)
        if main.along is Along.VALUES:
            return self._multiplied(old, main, inverse)
        rows = self.move.layout.flatten(old)
        unit = torch.ones_like(rows) if main.along is Along.MEAN else self._unit(main, rows)
        found = (rows * unit).sum(1)
        return (found if inverse is None else found * inverse.to(found)).view(self.value.shape)

    def squared(self, main: LinearOf, old: Tensor, power: int) -> Tensor:
        """Return squares of the new parameter's gradients (power −2) or steps (2), from its main old one's."""
        factor = None if main.factor is None else main.factor.abs() ** power
        old = self._scaled(main, old, power)
        if main.along is Along.VALUES:
            return self._multiplied(old, main, factor)
        rows = self.move.layout.flatten(old)
        whole = main.along is Along.MEAN and power < 0
        unit = torch.ones_like(rows) if whole else self._unit(main, rows)
        found = (rows * unit.square()).sum(1)
        return (found if factor is None else found * factor.to(found)).view(self.value.shape)

    def _multiplied(self, old: Tensor, term: LinearOf, factor: Tensor | None) -> Tensor:
        if factor is None:
            return old.reshape(self.value.shape)
        factor = factor.to(old)
        if old.ndim < 2:
            return (old * factor).view(self.value.shape)
        layout = self.move.layout
        return layout.multiply_inputs(old, factor) if term.over_inputs else layout.multiply_outputs(old, factor)

    def _unit(self, term: LinearOf, like: Tensor) -> Tensor:
        """Return by what each value of a filter is multiplied, so that their sum is the new value. ``(C, n)``"""
        if term.along is Along.MEAN:
            return torch.full_like(like, 1 / like.shape[1])
        assert self.filters is not None
        rows = self.move.layout.flatten(self.filters).to(like)
        if term.along is Along.SPREAD:
            rows = rows - rows.mean(1, keepdim=True)
        length: Tensor = rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
        return rows / length
