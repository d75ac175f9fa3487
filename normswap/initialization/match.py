"""Match a converted network to its original on unlabelled data, site by site, in closed form.

At a site the original computes ``y = γ (x − μ)/σ + β`` and the converted network ``y' = γ' N(W u + b) + β'``, u its own
input, which carries the errors of all sites before. Without a gradient are fitted, in this order:

1. W and b, by ridge regression (:mod:`normswap.initialization.regression`) towards the original's ``(x − μ)/σ``;
   where y is added to a shortcut, towards what makes the shortcut's error good, too
   (:mod:`normswap.initialization.lockstep`);
2. the signs and offsets of the channels, which are free (:mod:`normswap.initialization.steadying`);
3. γ' and β' per channel, by least squares of y on ``N(W u + b)``.

Every fifth sample is held out: it chooses the ridge, and among the candidates, of which the absorbed BatchNorm is one,
so that on those samples no site is worse than without the fit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.capture.guard import set_mode, untouched
from normswap.capture.observed import Batch, run_on_data
from normswap.capture.ops import is_layer
from normswap.initialization.absorb import absorb
from normswap.initialization.lockstep import Place, Visit, run_side_by_side, tensors_of
from normswap.initialization.moments import moments_of_covariance, patches
from normswap.initialization.regression import Covariances, SecondMoments, Solution, solve
from normswap.initialization.steadying import SPREAD, steady
from normswap.nn import ChannelAffine, ChannelLayerNorm, FilterLayout
from normswap.recipes.parts import Takes, WeightPart
from normswap.records import Agreement, Fit, InitRow, NormKind
from normswap.rewriting import Placed

__all__ = ["agreement", "match_to"]

_RIDGES = (1.0, 1e-2, 1e-4)
_HOLD_OUT = 5  # every fifth sample
_MOST_VALUES = 2**24  # of patches at once: 64 MB in float32
_MOST_PRODUCTS = 2**24  # patches × fan-in that the second moments of a site are taken from
_FLOOR = 1e-3  # of the mean variance: a channel that varies less keeps about the gain it had
_COMPENSATION_FLOOR = 1e-2  # of the mean |γ|: a channel with less is not asked to make good a shortcut's error


def match_to(
    original: nn.Module,
    converted: nn.Module,
    placed: Sequence[Placed],
    batches: Sequence[Batch],
    *,
    least_group: int | None = None,
    spread: float = SPREAD,
    isolated: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, InitRow]:
    """Fit ``converted``, whose sites hold the absorbed BatchNorms, to ``original``.

    Args:
        original: The original; left as it is.
        converted: The rewritten copy; the values of its new parts are changed in place.
        placed: What was put into it.
        batches: Unlabelled inputs.
        least_group: Give each group normalization the number of groups that has the least error, of those with at least
            so many channels in a group; None leaves them as they are.
        spread: See :mod:`normswap.initialization.steadying`.
        isolated: Let the original's values go on after each site, such that each site's error is its own alone.
        progress: Called with a site's name, how many were fitted, and how many there are.

    Returns:
        A row for each site that was reached, by its norm's name, and for each fitted head.
    """
    sites = {one.step.site.norm: one for one in placed}
    goals = {name: _Goal.at(one, original) for name, one in sites.items()}
    places = _places(original, placed)
    heads = _heads(original, converted, {id(place.source) for place in places}, batches[0])
    goals |= {place.name: _Goal.of_layer(place.source) for place in heads}
    places += heads
    rows: dict[str, InitRow] = {}

    def fit(place: Place, visits: Sequence[Visit]) -> list[Tensor] | None:
        goal = goals[place.name]
        with torch.no_grad():
            fitting = _Fitting(place, goal, visits, least_group, spread)
            rows[place.name] = fitting.run(sites.get(place.name))
        if progress is not None:
            progress(place.name, len(rows), len(places))
        return [goal.targets(visit)[1] for visit in visits] if isolated else None

    run_side_by_side(original, converted, places, batches, fit)
    for place in places:  # no parameter, and so put back with all else that the forwards may have changed
        if (row := rows.get(place.name)) and row.fit and row.fit.num_groups is not None and place.norm is not None:
            place.norm.__dict__["num_groups"] = row.fit.num_groups
    return rows


def agreement(original: nn.Module, converted: nn.Module, batches: Sequence[Batch]) -> Agreement | None:
    """Compare both networks' outputs on the held-out samples, on all where there are too few to hold any out.

    Both networks are only read. What is not finite in the original's output is left out.

    Returns:
        How far they agree; None where the outputs hold nothing to compare.
    """
    pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}
    with untouched(original, values=True), untouched(converted, values=True):
        set_mode(original, False)
        set_mode(converted, False)
        for inputs in batches:
            outputs = (tensors_of(run_on_data(model, inputs)) for model in (original, converted))
            for i, (a, b) in enumerate(zip(*outputs, strict=False)):
                if a.ndim > 0 and a.shape == b.shape and a.numel():
                    pairs.setdefault(i, []).append((a.double(), b.double()))
    error = size = 0.0
    cosines: list[Tensor] = []  # those of each output
    same: list[Tensor] = []  # of the first one
    for i, several in pairs.items():
        samples, seen, of_this = sum(len(a) for a, _ in several), 0, []
        for a, b in several:
            held = _is_held_out(len(a), seen).to(a.device) | (samples < 2 * _HOLD_OUT)
            seen += len(a)
            if i == min(pairs) and a.ndim == 2 and a.shape[1] > 1:
                same.append((a.argmax(1) == b.argmax(1))[held].double())
            valued = a.isfinite()
            a, b = (torch.where(valued, t, 0.0)[held].unsqueeze(1).flatten(1) for t in (a, b))
            error, size = error + float((b - a).square().sum()), size + float(a.square().sum())
            of_this.append(torch.cosine_similarity(a, b))
        cosines.append(torch.cat(of_this))
    if not cosines:
        return None
    return Agreement(
        samples=len(cosines[0]),
        relative_error=math.sqrt(error / max(size, 1e-30)),
        cosine=float(torch.stack([c.mean() for c in cosines]).mean()),
        top1=float(torch.cat(same).mean()) if same else None,
    )


def _places(original: nn.Module, placed: Sequence[Placed]) -> list[Place]:
    """Return where the sites that can be fitted lie in both networks, in the plan's order."""
    places = []
    for one in placed:
        source = one.layer if one.layer is not None else one.affine
        if one.norm_part.takes is not Takes.NORMALIZATION or source is None or one.norm is None:
            continue
        name = one.step.site.norm
        owner, _, buffer = name.partition(":")
        module = original.get_submodule(owner)
        if one.step.site.kind == NormKind.MODULE:
            places.append(Place(name, source, one.norm, module))
        elif isinstance(mean := getattr(module, buffer or "running_mean", None), Tensor):
            places.append(Place(name, source, one.norm, None, mean))
    return places


def _heads(original: nn.Module, converted: nn.Module, taken: set[int], inputs: Batch) -> list[Place]:
    """Return the layers without a norm whose output the model returns, such as a classifier, in the order of calls."""
    outputs: dict[str, list[Any]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, args, output: outputs.setdefault(name, []).append(output)

    handles = []
    owners = Counter(id(p) for m in converted.modules() for p in m._parameters.values())
    reads: Counter[int] = Counter()
    try:
        with untouched(original, values=True), _Reads(reads):
            set_mode(original, False)
            for name, layer in converted.named_modules():
                own = [p for p in layer._parameters.values() if p is not None]
                alone = layer._parameters.get("weight") is not None and all(owners[id(p)] == 1 for p in own)
                if is_layer(layer) and id(layer) not in taken and alone:
                    handles.append(original.get_submodule(name).register_forward_hook(note(name)))
            returned = {id(tensor) for tensor in tensors_of(run_on_data(original, inputs))}
    finally:
        for handle in handles:
            handle.remove()
    heads = []
    for name, found in outputs.items():
        layer, before = converted.get_submodule(name), original.get_submodule(name)
        once = len(found) == 1 and all(reads[id(p)] == 1 for p in before._parameters.values() if p is not None)
        # Channels lie on axis 1 of a batch; more axes of a linear layer come before them.
        axes = 2 if isinstance(layer, nn.Linear) else FilterLayout.weight(layer).ndim
        if once and isinstance(found[0], Tensor) and id(found[0]) in returned and found[0].ndim == axes:
            heads.append(Place(name, layer, None, before))
    return heads


class _Reads(TorchFunctionMode):
    """Counts, by id, how often each parameter is computed with."""

    def __init__(self, counts: Counter[int]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # .shape and the like
            values = (*args, *(kwargs or {}).values())
            self.counts.update({id(value) for value in values if isinstance(value, nn.Parameter)})
        return func(*args, **(kwargs or {}))


def _is_held_out(samples: int, seen: int) -> Tensor:
    """Return which of ``samples`` samples, that come after ``seen`` others, are held out."""
    return (torch.arange(samples) + seen) % _HOLD_OUT == _HOLD_OUT - 1


@dataclass(frozen=True)
class _Goal:
    """What the original does at a site, per channel ``(C,)``: ``y = gain·t + shift``, ``t = (x − mean)·scale``.

    ``anchor`` are the filters that give t on the original's own input, ``(C, fan_in)``; ``part`` is how the layer's
    weight is parametrized.
    """

    gain: Tensor
    shift: Tensor
    mean: Tensor
    scale: Tensor
    anchor: Tensor
    part: WeightPart | None

    @classmethod
    def at(cls, placed: Placed, original: nn.Module) -> _Goal:
        state = placed.state
        assert state.mean is not None
        anchor = state.inverse_std[:, None]
        if placed.step.site.layer is not None:
            layer = original.get_submodule(placed.step.site.layer)
            anchor = FilterLayout.of(layer).flatten(FilterLayout.weight(layer).detach().double()) * anchor
        gain, shift, mean = state.gamma.float(), state.beta.float(), state.mean.float()
        return cls(gain, shift, mean, state.inverse_std.float(), anchor, placed.weight_part)

    @classmethod
    def of_layer(cls, layer: nn.Module) -> _Goal:
        """Return the goal of a layer that is fitted alone: to give what the original's gives."""
        weight = FilterLayout.weight(layer).detach()
        anchor = FilterLayout.of(layer).flatten(weight.double())
        ones, zeros = (f(len(anchor), device=weight.device) for f in (torch.ones, torch.zeros))
        return cls(ones, zeros, zeros, ones, anchor, None)

    def targets(self, visit: Visit) -> tuple[Tensor, Tensor]:
        """Return t, which the source is to give, and y, which the norm is to give, shaped as the original's output."""
        shape = (1, -1, *(1,) * (visit.reference.ndim - 2))
        gain = self.gain.view(shape)
        t = (visit.reference.float() - self.mean.view(shape)) * self.scale.view(shape)
        y = gain * t + self.shift.view(shape)
        if visit.beside is not None:
            error = visit.beside[0].float() - visit.beside[1].float()
            floor = _COMPENSATION_FLOOR * gain.abs().mean()
            t, y = t + error * gain / (gain.square() + floor.square()).clamp(min=1e-30), y + error
        return t, y


@dataclass(frozen=True)
class _Chunk:
    """Some samples: the source's input, the targets t and y, and which of the samples are held out."""

    x: Tensor
    t: Tensor
    y: Tensor
    held: Tensor


@dataclass(frozen=True)
class _Candidate:
    """What a site may get: its source's filters ``(C, fan_in)`` and bias ``(C,)``, their signs, and the group count."""

    weight: Tensor
    bias: Tensor
    signs: Tensor
    num_groups: int | None
    ridge: float


@dataclass(frozen=True)
class _Result:
    """How a candidate did on the held-out samples, and the values that the site has with it.

    ``noise`` is ``E‖y' − y‖² / Var y``; ``mean`` and ``std`` are those of y'.
    """

    noise: float
    mean: float
    std: float
    values: tuple[Tensor, ...]
    num_groups: int | None
    ridge: float | None


class _Fitting:
    """The fit of one site to what all batches bring there."""

    def __init__(
        self, place: Place, goal: _Goal, visits: Sequence[Visit], least_group: int | None, spread: float
    ) -> None:
        self.place, self.goal = place, goal
        self.visits = [visit for visit in visits if visit.x.numel() and visit.reference.numel()]
        self.least_group, self.spread = least_group, spread
        self.source, self.norm = place.source, place.norm
        self.parameters = (*self.source.parameters(), *(() if self.norm is None else self.norm.parameters()))
        self.samples = sum(len(visit.x) for visit in visits)
        self.holds_out = self.samples >= 2 * _HOLD_OUT
        self.target = _Sums()  # of y, over the held-out samples

    def run(self, placed: Placed | None) -> InitRow:
        """Fit the site and return its row.

        Args:
            placed: What was put there; None for a layer that is fitted alone.
        """
        name = self.place.name
        if not self.visits:
            return InitRow(name, "absorbed", ("no sample reaches it: not fitted",))
        if not all(self._agrees(visit) for visit in self.visits):
            return InitRow(name, "absorbed", ("the networks' shapes differ here: not fitted",))
        moments = self._moments()
        if placed is not None and placed.step.site.layer and self.goal.part is not None and self.goal.part.centres:
            inputs = moments[0]  # absorbed anew, now that it is known what reaches the layer
            known = moments_of_covariance(inputs.input_mean, inputs.inputs, inputs.count)
            absorb(placed, {placed.step.site.layer: known})
        before = best = self._measure(None)
        if not math.isfinite(before.noise):
            return InitRow(name, "absorbed", ("its values are not finite: not fitted",))
        for candidate in self._candidates(*moments):
            found = self._measure(candidate)
            best = found if found.noise < best.noise else best
            self._restore(before)
        self._restore(best)
        notes = [] if self.holds_out else [f"{self.samples} samples: none was held out"]
        if self.visits[0].beside is not None:
            notes.append("makes good its shortcut's error")
        fit = Fit(
            samples=self.samples,
            mean=self.target.total_mean,
            std=self.target.total_std,
            mean_before=before.mean,
            std_before=before.std,
            noise_before=before.noise,
            mean_after=best.mean,
            std_after=best.std,
            noise_after=best.noise,
            num_groups=best.num_groups,
            ridge=best.ridge,
        )
        return InitRow(name, "absorbed" if best is before else "matched", tuple(notes), fit)

    def _agrees(self, visit: Visit) -> bool:
        return len(visit.x) == len(visit.reference) and (
            self.source(visit.x[:1]).shape[1:] == visit.reference.shape[1:]
        )

    def _chunks(self) -> Iterator[_Chunk]:
        layout, weight = self._layout, self._weight
        seen = 0
        for visit in self.visits:
            t, y = self.goal.targets(visit)
            positions = max(1, t[:1].numel() // t.shape[1])
            size = max(1, _MOST_VALUES // (positions * layout.groups * layout.fan_in(weight)))
            held = _is_held_out(len(t), seen).to(t.device) & self.holds_out
            seen += len(t)
            yield from map(_Chunk, visit.x.split(size), t.split(size), y.split(size), held.split(size))

    @property
    def _layout(self) -> FilterLayout:
        channel_wise = isinstance(self.source, ChannelAffine)
        return FilterLayout(groups=len(self.goal.gain)) if channel_wise else FilterLayout.of(self.source)

    @property
    def _weight(self) -> Tensor:
        weight = FilterLayout.weight(self.source)
        return weight[:, None] if isinstance(self.source, ChannelAffine) else weight

    def _patches(self, x: Tensor) -> Tensor:
        if isinstance(self.source, ChannelAffine):
            return x.movedim(1, -1).reshape(-1, x.shape[1], 1)
        return patches(self.source, x)

    def _moments(self) -> tuple[Covariances, Covariances, Tensor]:
        """Return the moments of the samples to fit to and of those held out, and what the norm takes means over."""
        layout, weight = self._layout, self._weight
        limit = _MOST_PRODUCTS // (layout.groups * layout.fan_in(weight))
        rows_in_all = sum(visit.reference.numel() for visit in self.visits) // len(self.goal.gain)
        share = min(1.0, max(limit, 64) / rows_in_all)
        generator = torch.Generator().manual_seed(0)
        fit, held, units = SecondMoments(), SecondMoments(), []
        for chunk in self._chunks():
            t = chunk.t.movedim(1, -1)
            by_position = isinstance(self.norm, ChannelLayerNorm)
            means = t.flatten(1, -2).mean(1) if t.ndim > 2 else t
            rows = t.reshape(-1, t.shape[-1])
            is_held = chunk.held.repeat_interleave(len(rows) // len(t))
            u = self._patches(chunk.x)
            if share < 1:
                some = torch.randperm(len(rows), generator=generator)[: max(1, round(share * len(rows)))]
                some = some.sort().values.to(rows.device)
                rows, is_held, u = rows[some], is_held[some], u[some]
            units.append(rows[~is_held] if by_position else means[~chunk.held])
            u = u.to(rows.dtype)
            if not bool(is_held.any()):
                fit.add(u, rows)
                continue
            fit.add(u[~is_held], rows[~is_held])
            held.add(u[is_held], rows[is_held])
        fitted = fit.read()
        return fitted, held.read() if held.count else fitted, torch.cat(units)

    def _candidates(self, fit: Covariances, held: Covariances, units: Tensor) -> Iterator[_Candidate]:
        groups = self._layout.groups
        anchor = self.goal.anchor.unflatten(0, (groups, -1))
        zero_sum = self.goal.part is not None and self.goal.part.centres
        importance = self.goal.gain.double().square().view(groups, -1)
        solution: Solution | None = None
        least = float("inf")
        # Where no sample is held out a weaker ridge would always seem better.
        for ridge in _RIDGES if self.holds_out else _RIDGES[:2]:
            found = solve(fit, anchor, ridge, zero_sum=zero_sum)
            error = float((held.error(found) * importance).sum())
            if error >= least:
                break
            solution, least = found, error
        if solution is None:  # the moments are not finite
            return
        weight, bias = solution.weight.flatten(0, 1), solution.bias.flatten()
        if self.norm is None:
            yield _Candidate(weight, bias, torch.ones_like(bias), None, solution.ridge)
            return
        for count in self._group_counts():
            signs, offsets = steady(units, count or 1, self.spread)
            signs, offsets = signs.double(), offsets.double()
            yield _Candidate(weight * signs[:, None], bias * signs + offsets, signs, count, solution.ridge)

    def _group_counts(self) -> list[int | None]:
        present = getattr(self.norm, "num_groups", None)
        if present is None or self.least_group is None:
            return [present]
        channels = len(self.goal.gain)
        most = channels // max(2, self.least_group)
        return [count for count in range(1, most + 1) if channels % count == 0] or [present]

    def _measure(self, candidate: _Candidate | None) -> _Result:
        """Give the site the candidate's values, fit the norm's affine, and measure the held-out error.

        None is what the site has, its affine included.
        """
        if candidate is not None:
            self._load(candidate)
            if self.norm is not None:
                _set_affine(self.norm, torch.ones_like(self.goal.gain), torch.zeros_like(self.goal.gain))
        fit, held, before = _Sums(), _Sums(), _Sums()
        for chunk in self._chunks():
            z = self.source(chunk.x)
            h = (z if self.norm is None else self.norm(z)).float()
            if candidate is not None:
                before.add(z.float(), z.float())
            keep = ~chunk.held
            fit.add(h[keep], chunk.y[keep])
            held.add(h[chunk.held], chunk.y[chunk.held])
        judged = held if self.holds_out else fit
        self.target = judged
        if candidate is None or self.norm is None:
            ones = torch.ones_like(self.goal.gain, dtype=torch.float64)
            return self._result(judged, ones, torch.zeros_like(ones), candidate)
        # The gain of a channel that hardly varies on these samples: γ times what the norm divides by elsewhere.
        size = (before.variance.mean() / fit.variance.mean().clamp(min=1e-30)).sqrt()
        prior = self.goal.gain.double() * candidate.signs * size
        floor = _FLOOR * fit.variance.mean().clamp(min=1e-30)
        gain = (fit.covariance + floor * prior) / (fit.variance + floor)
        shift = fit.target_mean - gain * fit.mean
        _set_affine(self.norm, gain, shift)
        return self._result(judged, gain, shift, candidate)

    def _result(self, sums: _Sums, gain: Tensor, shift: Tensor, candidate: _Candidate | None) -> _Result:
        mean = gain * sums.mean + shift
        variance = gain.square() * sums.variance
        return _Result(
            noise=float(sums.error(gain, shift).sum() / sums.target_variance.sum().clamp(min=1e-30)),
            mean=float(mean.mean()),
            std=float((variance.mean() + mean.var(correction=0)).sqrt()),
            values=tuple(p.detach().clone() for p in self.parameters),
            num_groups=getattr(self.norm, "num_groups", None),
            ridge=candidate.ridge if candidate else None,
        )

    def _load(self, candidate: _Candidate) -> None:
        if candidate.num_groups is not None and self.norm is not None:
            self.norm.__dict__["num_groups"] = candidate.num_groups
        weight = self._layout.unflatten(candidate.weight, self._weight)
        excess = torch.ones_like(candidate.bias)
        if isinstance(self.source, ChannelAffine):
            self.source.weight.copy_(weight[:, 0])
        elif self.goal.part is not None:
            # The filters' lengths are free and decide what a learning rate does to them: the original's is kept.
            length = (self.goal.anchor.norm(dim=1) / self.goal.scale.double()).square().mean().sqrt()
            found = candidate.weight.norm(dim=1).square().mean().sqrt()
            stretch = length / found if bool(length > 0) and bool(found > 0) else torch.ones_like(found)
            excess = self.goal.part.load(self.source, weight * stretch, excess / stretch)
        else:
            self.source.weight.copy_(weight)  # type: ignore[operator]
        if isinstance(self.source.bias, Tensor):
            self.source.bias.copy_(excess * candidate.bias)

    def _restore(self, result: _Result) -> None:
        for parameter, value in zip(self.parameters, result.values, strict=True):
            parameter.copy_(value)
        if result.num_groups is not None and self.norm is not None:
            self.norm.__dict__["num_groups"] = result.num_groups


def _set_affine(norm: nn.Module, gain: Tensor, shift: Tensor) -> None:
    norm.weight.copy_(gain)  # type: ignore[operator]
    norm.bias.copy_(shift)  # type: ignore[operator]


class _Sums:
    """Means, variances and covariance of two values per channel, accumulated in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: Tensor | None = None
        self._origins: tuple[Tensor, Tensor] | None = None  # the first values' means, which spare the squares digits

    def add(self, h: Tensor, y: Tensor) -> None:
        """Take in values ``(N, C, ...)``."""
        if not len(h):
            return
        axes = [0, *range(2, h.ndim)]
        if self._origins is None:
            self._origins = h.mean(axes, keepdim=True), y.mean(axes, keepdim=True)
        shape = (1, -1, *(1,) * (h.ndim - 2))
        h, y = h - self._origins[0].view(shape), y - self._origins[1].view(shape)
        sums = torch.stack([v.sum(axes).double() for v in (h, y, h * h, h * y, y * y)])
        self._sums = sums if self._sums is None else self._sums + sums
        self.count += h.numel() // h.shape[1]

    def _mean(self, index: int) -> Tensor:
        assert self._sums is not None
        return self._sums[index] / self.count

    def _full_mean(self, index: int) -> Tensor:
        assert self._origins is not None
        return self._mean(index) + self._origins[index].double().flatten()

    @property
    def mean(self) -> Tensor:
        return self._full_mean(0)

    @property
    def target_mean(self) -> Tensor:
        return self._full_mean(1)

    @property
    def variance(self) -> Tensor:
        return (self._mean(2) - self._mean(0).square()).clamp(min=0)

    @property
    def covariance(self) -> Tensor:
        return self._mean(3) - self._mean(0) * self._mean(1)

    @property
    def target_variance(self) -> Tensor:
        return (self._mean(4) - self._mean(1).square()).clamp(min=0)

    @property
    def total_mean(self) -> float:
        return float(self.target_mean.mean())

    @property
    def total_std(self) -> float:
        return float((self.target_variance.mean() + self.target_mean.var(correction=0)).sqrt())

    def error(self, gain: Tensor, shift: Tensor) -> Tensor:
        """Return ``E (gain·h + shift − y)²`` per channel."""
        offset = gain * self.mean + shift - self.target_mean
        spread = gain.square() * self.variance - 2 * gain * self.covariance + self.target_variance
        return spread.clamp(min=0) + offset.square()
