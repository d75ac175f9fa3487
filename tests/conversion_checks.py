"""Everything that a conversion promises, checked on one random network."""

from __future__ import annotations

import copy
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import laws
import oracle_export
import torch
import torch.nn.functional as F
from random_networks import Network
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import normswap as ns
from normswap.errors import InitializationError, NothingToConvertError
from normswap.initialization import absorb
from normswap.norms import norm_of
from normswap.records import Plan

# Double precision: a wrong term is a good part of the output. A dead channel multiplies by up to 1/sqrt(eps) = 316 per
# norm, and its rounding with it.
ALLOWED = 1e-7


class BrokenPromiseError(AssertionError):
    """A promise that a network's conversion broke; ``kind`` says which."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclass(frozen=True)
class Findings:
    """What was found of a network that kept every promise.

    Args:
        norms: How many norms it has.
        sites: How many sites, by kind and what becomes of the layer.
        refusals: The reasons for which norms stay.
        alone: The reasons for which norms convert without a layer.
        unlisted: How many functional norms no plan can list: their forward cannot be traced.
        pairs_left: The reasons for which a pair that torch.export's graph shows is left alone.
        exported: Whether the network could be exported.
    """

    norms: int
    sites: Counter[str]
    refusals: Counter[str]
    alone: Counter[str]
    unlisted: int
    pairs_left: Counter[str]
    exported: bool


def recipes_for(network: Network, all_recipes: bool = False) -> tuple[str, ...]:
    """Return one exact and one inexact recipe, which depend on the network alone, or all of them."""
    if all_recipes:
        return laws.RECIPES
    number = zlib.crc32(network.source.encode())
    return laws.EXACT[number % len(laws.EXACT)], laws.INEXACT[number % len(laws.INEXACT)]


def check(network: Network, recipes: Sequence[str] | None = None, *, oracle: bool = True) -> Findings:
    """Check every promise on ``network``; without ``oracle``, all but those about torch.export's graph.

    Raises:
        BrokenPromiseError: One is broken, or something crashed.
    """
    try:
        return _check(network, recipes_for(network) if recipes is None else recipes, oracle)
    except BrokenPromiseError:
        raise
    except Exception as cause:
        raise BrokenPromiseError(f"crash ({type(cause).__name__})", f"{str(cause).splitlines()[:1]}") from cause


def _check(network: Network, recipes: Sequence[str], oracle: bool) -> Findings:
    original = network.model()
    options = given_options(network)
    before = laws.fingerprint(original)
    with laws.SMALL:
        plan = ns.plan(original, "gn", **options)
        bare = ns.plan(original, "gn")
    promise(not laws.changed(before, laws.fingerprint(original)), "touched", "planning changed the model")
    promise(Plan.from_json(plan.to_json()) == plan, "plan", "its JSON is another plan")
    unlisted = [accounted_for(one, original, network.norms) for one in (plan, bare)]

    modes = (False, True) if "use in training" in network.features else (False,)
    modes = modes if oracle else ()
    exported = oracle_export.export(copy.deepcopy(original), network.inputs(), modes=modes)
    seen = oracle_export.compare(plan, exported)
    promise(not seen.wrong, "wrong pair", "; ".join(seen.wrong))
    promise(not seen.unexplained, "no reason", ", ".join(seen.unexplained))
    promise(not oracle_export.compare(bare, exported).wrong, "wrong pair", "without inputs")

    folded_is_same(network, original, "the folded original")
    for recipe in recipes:
        for given in (options, {}) if bare.steps != plan.steps else (options,):
            _check_recipe(network, original, recipe, given)
    promise(not laws.changed(before, laws.fingerprint(original)), "touched", "converting changed the model")

    norms = [skip for skip in plan.skips if skip.what == "norm" and skip.code != "not-batch-norm"]
    return Findings(
        network.norms,
        Counter(f"{s.site.kind}, {'with its layer' if s.site.layer else 'alone'}, {s.site.proof}" for s in plan.steps),
        Counter(f"{skip.code}: {general(skip.reason)}" for skip in norms),
        Counter(general(s.site.reason or "") for s in plan.steps if s.site.layer is None),
        unlisted[0],
        Counter(general(reason) for _, _, reason in seen.missed),
        bool(exported.graphs),
    )


def given_options(network: Network) -> dict[str, Any]:
    """Return the inputs that a user would give; as data, too, where a norm stores no statistics."""
    options: dict[str, Any] = {"example_inputs": network.inputs()}
    if "norm: no statistics" in network.features:
        options["calibration"] = network.inputs()
    return options


def promise(kept: bool, kind: str, text: str) -> None:
    if not kept:
        raise BrokenPromiseError(kind, text)


def general(reason: str) -> str:
    """Return a reason without the names of this network."""
    return re.sub(r"\b(?:block|conv|bn|fc|seq|parts|act|same|pool|gn|n|v|w)\d+(?:[._]\w+)*\b|\bBlock\d+\b", "…", reason)


def accounted_for(plan: Plan, model: nn.Module, norms: int) -> int:
    """Check that every norm and layer stands in the plan once; return how many norms an untraceable forward hides."""
    in_plan = Counter(step.site.norm for step in plan.steps)
    in_plan += Counter(s.name for s in plan.skips if s.what == "norm" and s.code != "not-batch-norm")
    in_plan = Counter(oracle_export.name_in(model, name) for name in in_plan.elements())
    layers = Counter(step.site.layer for step in plan.steps if step.site.layer is not None)
    layers += Counter(s.name for s in plan.skips if s.what == "layer" and s.code != "functional-layer")
    promise(layers == Counter(list(laws.layers_of(model))), "incomplete plan", f"layers {layers}")
    missing = set(laws.norms_of(model)) - set(in_plan)
    promise(not missing, "incomplete plan", f"no word of {missing}")
    promise(set(in_plan.values()) <= {1}, "incomplete plan", f"norms {in_plan}")
    hidden = norms - len(in_plan)
    opaque = any(skip.what == "scope" for skip in plan.skips)
    promise(hidden == 0 or (hidden > 0 and opaque), "incomplete plan", f"{len(in_plan)} of {norms} norms: {in_plan}")
    return hidden


# ------------------------------------------------------------------------------------------------- one recipe


def _check_recipe(network: Network, original: nn.Module, recipe: str, given: dict[str, Any]) -> None:
    what = recipe + ("" if given else " without inputs")
    try:
        with laws.SMALL:
            result = ns.convert(original, recipe, check=False, **given)
    except NothingToConvertError:
        return
    except InitializationError as refusal:  # what is measured of such a model is another model's
        promise(refusal.code == "calibration-state" and "writes state" in network.features, "refusal", str(refusal))
        return
    model = result.model
    if ns.all_recipes()[recipe].exact:
        same(network, model, original, what)
        if "norm: no statistics" not in network.features:  # it has none to hold
            with held(original, model):
                same(network, model, original, f"{what} in train mode with the statistics held")
            if "overrides train" in network.features and not network.features & _CALLS:
                frozen_stay_frozen(network, model, original, what)
    elif "calibration" not in given:  # the law is about stored statistics
        law = at_expected_statistics(original, result.plan, model, given)
        same(network, law, original, f"{what} at the expected statistics")
    if given:
        folded_is_same(network, model, f"folded {what}")


_CALLS = {"norm: functional", "norm: holder"}
"""Norms that take their mode from a module which no train() holds."""


def frozen_stay_frozen(network: Network, model: nn.Module, original: nn.Module, what: str) -> None:
    """Check that a model whose train() holds all its norms trains as before and moves no statistics."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        same(network, model.train(), original.train(), f"{what} in train mode, its norms frozen")
    finally:
        model.eval()
        original.eval()
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    promise(not moved, "moved", f"{what}: {moved} in train mode, although frozen")


def folded_is_same(network: Network, model: nn.Module, what: str) -> None:
    with laws.SMALL:
        folded = ns.fold(model.eval(), example_inputs=network.inputs())
    same(network, folded, model, what)


def same(network: Network, found: nn.Module, expected: nn.Module, what: str) -> None:
    """Check that two models give the same, on inputs that the conversion has seen and on others."""
    other = "norm chosen at run time" in network.features and "norm: no statistics" not in network.features
    for domain in (0, 1) if other else (0,):
        with in_domain(domain, found, expected):
            for inputs, options in all_inputs(network, expected):
                error = distance(run(found, inputs(), **options), run(expected, inputs(), **options))
                promise(error <= ALLOWED, "wrong output", f"{what}: {error:.1e} {options or ''} domain {domain}")


@contextmanager
def in_domain(domain: int, *models: nn.Module) -> Iterator[None]:
    """Models whose norms that an attribute chooses are the other ones."""
    modules = [module for model in models for module in model.modules() if hasattr(module, "domain")]
    try:
        for module in modules:
            module.domain = domain
        yield
    finally:
        for module in modules:
            del module.domain  # the class has the usual one


def all_inputs(network: Network, model: nn.Module) -> Iterator[tuple[Callable[[], tuple[Tensor, ...]], dict[str, Any]]]:
    yield network.inputs, {}
    if "norm: no statistics" in network.features:  # those are the batch's: another batch has others
        return
    yield lambda: network.inputs(2, 5), {}
    if "optional argument" in network.features:
        yield network.inputs, {"more": True}
    if "norm chosen by argument" in network.features:
        yield network.inputs, {"which": 1}
    for shape in network.others:
        inputs = (torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64),)
        with suppress(Exception):  # it need not run on them
            run(model, given_again(inputs))
            yield partial(given_again, inputs), {}


def given_again(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return copies: a forward may write to what it is given."""
    return tuple(x.clone() for x in inputs)


@torch.no_grad()
def run(model: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(0)  # dropout
            random.seed(0)
            return laws.leaves(copy.deepcopy(model)(*inputs, **options))  # a copy: its forward may write what it holds
    finally:
        random.setstate(state)


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value of any output; infinite for NaN or other shapes."""
    if [t.shape for t in found] != [t.shape for t in expected] or not found:
        return float("inf")
    scale = max(float(t.abs().max()) for t in expected)
    worst = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    error = worst / max(scale, 1e-6)
    return error if error == error else float("inf")


class _Held(TorchFunctionMode):
    """Functional norms use their stored statistics."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is F.batch_norm:
            given |= dict(zip(_BATCH_NORM, args, strict=False))
            if given["running_mean"] is not None:
                given["training"] = False
            return func(**given)
        return func(*args, **given)


_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


@contextmanager
def held(*models: nn.Module) -> Iterator[None]:
    """Models in train mode, in which every norm that has statistics uses them: what training alone does is seen."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.train()
            for module in model.modules():
                stored = getattr(module, "running_mean", None) is not None
                if stored and norm_of(module) is not None:
                    module.training = False
        with _Held():
            yield
    finally:
        for module, training in flags:
            module.training = training


@dataclass(frozen=True)
class _Converted:
    original: nn.Module
    plan: Plan


def at_expected_statistics(original: nn.Module, plan: Plan, model: nn.Module, given: dict[str, Any]) -> nn.Module:
    """Return the converted model with each new norm at (0, r), where it is affine, and no filter's mean removed."""
    known = _Converted(original, plan)
    if not any(step.weight == "ws" for step in plan.steps):
        return laws.at_expected_statistics(known, model)
    uncentred = mock.patch.object(
        absorb, "centre", lambda layout, weight, _: (weight, weight.new_zeros(layout.out_channels(weight)))
    )
    with laws.SMALL, uncentred:
        model = ns.convert(original, plan=plan, check=False, **given).model
    return laws.without_centring_(laws.at_expected_statistics(known, model))
