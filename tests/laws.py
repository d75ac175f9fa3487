"""What the laws are stated with: one conversion of every entry by every recipe, and the comparators.

Nothing here asks the package how it did what it did: filters, sharing and expected statistics are worked out
anew from torch's own documentation and the original model.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, wraps
from types import SimpleNamespace
from typing import Any, Protocol
from unittest import mock

import numpy as np
import torch
from oracle_export import name_in
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from zoo import ZOO, Entry, Inputs, leaves

import normswap as ns
from normswap.errors import NothingToConvertError
from normswap.nn import WeightStandardization
from normswap.norms import Affine, deployed, norm_of
from normswap.records import Plan, Step

BY_NAME = {entry.name: entry for entry in ZOO}
RECIPES = tuple(ns.all_recipes())
EXACT = tuple(name for name, recipe in ns.all_recipes().items() if recipe.exact)
INEXACT = tuple(name for name in RECIPES if name not in EXACT)


# ---------------------------------------------------------------------------------------------- conversions


# Inputs that a conversion makes up are as small as the zoo's own: no law depends on their size, the time does.
SMALL = mock.patch.dict("normswap.runs.inputs._SIDES", {1: (12,), 2: (8,), 3: (6,)})


@dataclass(frozen=True)
class Case:
    """One conversion. Its models are shared by the tests: a test that changes one takes a copy."""

    entry: Entry
    original: nn.Module
    inputs: Inputs
    other_inputs: Inputs | None
    model: nn.Module | None  # None where no norm could be converted
    plan: Plan
    before: dict[str, Any]
    after: dict[str, Any]

    def run(self, model: nn.Module, inputs: Inputs | None = None) -> Any:
        """The output of ``model`` for this case's inputs, without gradients and without a trace in the model."""
        with torch.no_grad():
            return self.entry.run(model, inputs or self.inputs)

    def fresh(self) -> nn.Module:
        """The original once more."""
        model = self.entry.model()
        return model.double() if self.original_is_double else model

    @property
    def original_is_double(self) -> bool:
        return self.inputs is not self.entry.inputs


@lru_cache(maxsize=4 * len(RECIPES))  # those of two entries
def case(entry: str, recipe: str, given: bool) -> Case:
    """The entry's conversion: in float64 and with its inputs as example inputs, or as it is and without any."""
    what = BY_NAME[entry]
    original = what.model().double() if given else what.model()
    inputs, other = (doubled(what.inputs), doubled(what.other_inputs)) if given else (what.inputs, what.other_inputs)
    assert inputs is not None
    examples = inputs() if given else None
    before = fingerprint(original)
    try:
        with SMALL:
            result = ns.convert(original, recipe, example_inputs=examples, check=False)
        model, plan = result.model, result.plan
    except NothingToConvertError:
        model, plan = None, ns.plan(original, recipe, example_inputs=examples)
    return Case(what, original, inputs, other, model, plan, before, fingerprint(original))


@lru_cache(maxsize=2 * len(RECIPES))
def replayed(entry: str, recipe: str) -> nn.Module:
    """A fresh model to which the plan of ``case(entry, recipe, True)`` was applied, after a trip through JSON."""
    known = case(entry, recipe, True)
    fresh = known.fresh()
    plan = Plan.from_json(known.plan.to_json())
    result = ns.convert(fresh, plan=plan, example_inputs=known.inputs(), inplace=True, check=False)
    assert result.model is fresh
    assert result.plan == known.plan
    return fresh


def doubled(inputs: Inputs | None) -> Inputs | None:
    if inputs is None:
        return None
    return lambda: tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs())


# ----------------------------------------------------------------------------------------------- comparators


def distance(found: Any, expected: Any) -> float:
    """The largest difference of two outputs, relative to the largest value of each tensor; inf for a NaN."""
    pairs = list(zip(leaves(found), leaves(expected), strict=True))
    assert pairs, "nothing to compare"
    worst = 0.0
    for a, b in pairs:
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        difference = (a.double() - b.double()).abs().amax() / b.double().abs().amax().clamp(min=1e-300)
        worst = max(worst, float(difference.nan_to_num(nan=float("inf"))))
    return worst


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a read-only function must leave alone, and what else a forward may change.

    That is each tensor (its values, place, gradient and hooks), each module, and whatever hangs on a module: hidden
    modules, containers in containers, objects of the model's own classes, attributes of these classes; the random
    generators and torch's settings.
    """
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    found: dict[str, Any] = {f"tensor {name}": _of_tensor(tensor) for name, tensor in tensors}
    seen: dict[int, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        seen[id(module)] = module
        found[f"module {name}"] = (id(module), type(module), module.training)
        found[f"order {name}"] = tuple(tuple(getattr(module, table).keys()) for table in _TABLES)
        for key, value in vars(module).items():
            if key.endswith(("_hooks", "_pre_hooks")):
                found[f"hooks {name}.{key}"] = list(value or ())
    for name, module in model.named_modules():
        _look(f"attribute {name}", vars(module), found, seen, skip=_TABLES)
        _look_at_class(type(module), found, seen)
    found["tables"] = sorted(model.state_dict())
    _, key, *rest = np.random.get_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    found["generators"] = (torch.get_rng_state(), random.getstate(), key.tobytes(), *rest, *devices)
    found["seeds for later"] = seeds_for_later()
    cudnn = torch.backends.cudnn
    found["settings"] = (
        *(torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), torch.get_default_device()),
        *(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        *(cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.get_float32_matmul_precision()),
        *(torch.is_anomaly_enabled(), torch.is_autocast_enabled("cpu")),
    )
    return found


_TABLES = ("_parameters", "_buffers", "_modules")


def _of_tensor(tensor: Tensor) -> Any:
    if is_lazy(tensor):
        return id(tensor), type(tensor)
    gradient = tensor.grad if tensor.is_leaf else None
    values = None if tensor.is_meta else tensor.detach().contiguous().flatten().clone().view(torch.uint8)
    return (
        *(id(tensor), type(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()),
        *(() if tensor.is_sparse else (tensor.untyped_storage()._cdata,)),
        *(tensor.requires_grad, values, gradient is not None and (id(gradient), gradient.detach().clone())),
        *(tuple(tensor._backward_hooks or ()), repr(sorted(vars(tensor)))),
    )


def _look(path: str, value: Any, found: dict[str, Any], seen: dict[int, Any], skip: tuple[str, ...] = ()) -> None:
    """Note what ``value`` is, and what it holds."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        found[path] = value
        return
    found[path] = type(value), id(value)
    if id(value) in seen:
        return
    seen[id(value)] = value
    if isinstance(value, Tensor):
        found[path] = _of_tensor(value)
    elif isinstance(value, dict):
        found[path] = id(value), tuple(map(repr, value))
        for key, item in value.items():
            if key not in skip:
                _look(f"{path}.{key}", item, found, seen)
    elif isinstance(value, (list, tuple, deque)):
        found[path] = type(value), len(value), None if isinstance(value, tuple) else id(value)
        for place, item in enumerate(value):
            _look(f"{path}.{place}", item, found, seen)
    elif isinstance(value, (set, frozenset, bytearray)):
        found[path] = id(value), sorted(map(repr, value))
    elif isinstance(value, np.ndarray):
        found[path] = id(value), value.shape, value.tobytes()
    elif isinstance(value, torch.Generator):
        found[path] = value.get_state()
    elif isinstance(value, random.Random):
        found[path] = value.getstate()
    elif isinstance(value, (np.random.Generator, np.random.RandomState)):
        found[path] = repr(value.__getstate__())
    elif isinstance(value, (nn.Module, torch.optim.Optimizer, SimpleNamespace)) or _is_of_a_model(type(value)):
        slots = {name: getattr(value, name, None) for name in getattr(value, "__slots__", ())}
        _look(path, slots or vars(value), found, seen)
        found[path] = id(value), type(value)
        _look_at_class(type(value), found, seen)


def _is_of_a_model(cls: type) -> bool:
    """Whether a class lies beside a model's: in a file that imports torch's modules."""
    return hasattr(sys.modules.get(cls.__module__), "nn") and cls.__module__.partition(".")[0] != "torch"


def _look_at_class(cls: type, found: dict[str, Any], seen: dict[int, Any]) -> None:
    for owner in cls.__mro__:
        if owner.__module__.partition(".")[0] not in ("builtins", "torch", "types") and id(owner) not in seen:
            seen[id(owner)] = owner
            for name, value in vars(owner).items():
                if not name.startswith("__") and isinstance(value, (int, float, str, Tensor, dict, list, set)):
                    _look(f"class {owner.__qualname__}.{name}", value, found, seen)


def seeds_for_later() -> tuple[Any, ...]:
    """What a device that is not in use yet gets as its seed once it is: ``torch.manual_seed`` leaves it there."""
    return tuple(torch.cuda._lazy_seed_tracker.get_calls())


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The entries of two fingerprints that differ."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return isinstance(b, Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
        if isinstance(a, tuple):
            return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
        return bool(a == b)

    return {
        k for k in before.keys() | after.keys() if k not in before or k not in after or not same(before[k], after[k])
    }


READ_ONLY = (
    *(
        "plan",
        "convert",
        "swap_norms",
        "rank_sites",
        "choose_recipes",
        "synthesize_samples",
        "fold",
        "fold_with_report",
        "export_onnx",
        "verify",
    ),
    *("save", "load", "write_report"),
)
"""The verbs that leave the models which they are given as they were."""


def reads_only(verb: Callable[..., Any]) -> Callable[..., Any]:
    """``verb``, held to it that no model which it is given changes, whether it succeeds, refuses or is interrupted."""

    @wraps(verb)
    def held(*args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)]
        if kwargs.get("inplace"):
            return verb(*args, **kwargs)
        before = [fingerprint(model) for model in given]
        try:
            return verb(*args, **kwargs)
        finally:
            for model, known in zip(given, before, strict=True):
                # A DataLoader draws from the global generator for its own: that is the caller's doing.
                touched = changed(known, fingerprint(model)) - ({"generators"} if "calibration" in kwargs else set())
                assert not touched, f"{verb.__name__} has changed the model: {sorted(touched)}"

    return held


def class_name(module: nn.Module) -> str:
    """The module's class; of a GraphModule, which has a class of its own and any name, that it is one."""
    cls = torch.fx.GraphModule if isinstance(module, torch.fx.GraphModule) else type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def structure(model: nn.Module) -> dict[str, Any]:
    """Module names and classes in order, and the state dict's keys, shapes and dtypes; no value and no device."""
    return {
        "modules": [(n, class_name(m), m.extra_repr()) for n, m in model.named_modules()],
        "tensors": [(n, tuple(t.shape), t.dtype) for n, t in model.state_dict().items()],
        "trainable": [(n, p.requires_grad) for n, p in model.named_parameters()],
        "sharing": sharing(model),
    }


def sharing(model: nn.Module, among: set[str] | None = None) -> set[frozenset[str]]:
    """The sets of names (of ``among``) under which one module goes."""
    names: dict[int, set[str]] = defaultdict(set)
    for name, module in model.named_modules(remove_duplicate=False):
        if among is None or name in among:
            names[id(module)].add(name)
    return {frozenset(group) for group in names.values()}


# --------------------------------------------------------------------------------------- layers, norms, names


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {fqn: m for fqn, m in model.named_modules() if isinstance(m, (_ConvNd, nn.Linear))}


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a BatchNorm of torch's or of the zoo's, told by name: the package is not asked."""
    names = [cls.__name__ for cls in type(module).__mro__]
    return any("BatchNorm" in name for name in names) and not any("MeanOnly" in name for name in names)


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    return {fqn: m for fqn, m in model.named_modules() if is_batch_norm(m)}


def zoo_name(norm: str) -> str:
    """A norm's name in a plan (``owner:running_mean`` for a functional one) as the zoo writes it."""
    return norm.replace(":", ".").lstrip(".")


def absorbed(plan: Plan) -> set[str]:
    """The norms of a plan whose layer takes them up."""
    return {zoo_name(step.site.norm) for step in plan.steps if step.site.layer is not None}


def new_norm(model: nn.Module, step: Step) -> nn.Module | None:
    """What stands in a converted model where the step's norm stood: a functional one becomes ``…norm``.

    None where a functional norm is still a call.
    """
    owner, _, name = step.site.norm.partition(":")
    if name:
        parent, _, leaf = name.rpartition(".")
        stem = leaf.replace("running_mean", "").strip("_")
        owner = ".".join(part for part in (owner, parent, f"{stem}_norm" if stem else "norm") if part)
    return dict(model.named_modules(remove_duplicate=False)).get(owner)


def old_tensor(model: nn.Module, step: Step, name: str) -> Tensor | None:
    """The tensor ``name`` (``running_var``, ``running_mean``) of the step's norm in the original model."""
    owner, _, functional = step.site.norm.partition(":")
    if functional:
        owner = ".".join(part for part in (owner, functional.rpartition(".")[0]) if part)
        name = functional.rpartition(".")[2].replace("running_mean", name)
    else:
        owner = name_in(model, owner)
    return getattr(model.get_submodule(owner), name, None)


def filters(layer: nn.Module, weight: Tensor) -> Tensor:
    """One row per output channel, by torch's documentation of the weights' shapes."""
    if not isinstance(layer, _ConvTransposeNd):
        return weight.flatten(1)
    split = weight.reshape(layer.groups, -1, *weight.shape[1:])  # (groups, in/groups, out/groups, *kernel)
    return split.movedim(2, 1).flatten(0, 1).flatten(1)


def per_filter(layer: nn.Module, values: Tensor, weight: Tensor) -> Tensor:
    """``values``, one per output channel, broadcast to the shape of ``weight``."""
    tail = (1,) * (weight.ndim - 2)
    if not isinstance(layer, _ConvTransposeNd):
        return values.view(-1, 1, *tail).expand_as(weight)
    rows = values.view(layer.groups, 1, -1, *tail).expand(-1, weight.shape[0] // layer.groups, -1, *weight.shape[2:])
    return rows.reshape(weight.shape)


# ------------------------------------------------------------------------------------------ expected statistics


class AtExpectedStatistics(nn.Module):
    """A per-sample norm's own affine with the mean and the variance that its input has over the data.

    It is read off the norm itself: two positions m + u and m − u of a sample have the mean m, and mean squares m² + u²
    in whatever groups; there ``y(m ± u) = scale·(m ± u) + shift``. A norm over the channels of one position has all of
    them at once: its γ and β tell.
    """

    def __init__(self, norm: nn.Module, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        like = next(norm.parameters())
        u = variance.double().sqrt().clamp(min=1e-6 * float(variance.max().sqrt()))  # a dead channel has a slope, too
        kind = norm_of(norm)
        assert kind is not None
        with torch.no_grad():
            if kind.per_position:
                own_mean = mean.mean()
                square = (variance.double() + mean.square()).mean() - own_mean.square()
                scale = norm.weight.double() / (square + norm.eps).sqrt()
                shift = norm.bias.double() - scale * own_mean
            else:
                positions = torch.stack([mean + u, mean - u], 1)
                up, down = copy.deepcopy(norm).double()(positions[None, :, :, None])[0, :, :, 0].unbind(1)
                scale = (up - down) / (2 * u)
                shift = (up + down) / 2 - scale * mean
        self.scale, self.shift = scale.to(like), shift.to(like)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *(1,) * (x.ndim - 2))
        return (x.to(self.scale) * self.scale.view(shape) + self.shift.view(shape)).to(x.dtype)


class Converted(Protocol):
    """What the law needs of a conversion."""

    @property
    def original(self) -> nn.Module: ...

    @property
    def plan(self) -> Plan: ...


def at_expected_statistics(
    case: Converted, model: nn.Module, excess: Callable[[Step], Tensor | float] = lambda step: 1.0
) -> nn.Module:
    """A copy of a converted model with each new norm at the statistics that the BatchNorm's own let it expect.

    BatchNorm's statistics say that ``(x − μ)/σ`` has the mean 0 and the variance ``var/(var + eps)``; ``excess`` is
    the factor per channel by which the layer's output is larger than that, where its form keeps no scale.
    """
    model = copy.deepcopy(model)
    for step in case.plan.steps:
        if step.weight == "cosine":
            at_expected_length_(case, model, step)
        found = new_norm(model, step)
        parts = () if found is None else (found, *found.children())
        norms = [part for part in parts if normalizes_each_sample(part)]
        for norm in norms:
            var = old_tensor(case.original, step, "running_var")
            assert var is not None
            ratio = var.double() / (var.double() + step.site.eps)
            mean = expected_mean(case, model, step, excess(step))
            replacement = AtExpectedStatistics(norm, mean, ratio * excess(step) ** 2)
            for parent in list(model.modules()):
                for name, child in parent._modules.items():
                    if child is norm:
                        parent._modules[name] = replacement
    return model


@torch.no_grad()
def expected_mean(case: Converted, model: nn.Module, step: Step, excess: Tensor | float) -> Tensor:
    """The mean of what reaches the new norm, per channel, where the BatchNorm's input has the recorded one.

    The layer, or the affine in front, gives ``f (x − b) + b'`` where the old layer gave x, b and b' the biases. A
    layer's |f| is ``excess/σ``, and its sign that of its filters or, where these are zero, of the norm's γ.
    """
    mean, var = (old_tensor(case.original, step, name) for name in ("running_mean", "running_var"))
    found = new_norm(model, step)
    assert mean is not None
    assert var is not None
    assert found is not None
    parts = [found, *found.children()]
    mean = mean.double()
    if any((kind := norm_of(part)) is not None and kind.follows_batches for part in parts):
        return torch.zeros_like(mean)  # its estimates have taken the mean away
    if step.site.layer is None:
        affine = next(part for part in found.children() if not normalizes_each_sample(part))
        return affine.weight.double() * mean + affine.bias.double()
    layer, old = (one.get_submodule(step.site.layer or "") for one in (model, case.original))
    sign = (filters(layer, layer.weight) * filters(old, old.weight)).double().sum(1).sign()
    for part, gamma in ((p, old_tensor(case.original, step, "weight")) for p in parts if normalizes_each_sample(p)):
        own = part.weight if gamma is None else part.weight * gamma
        sign = torch.where(sign == 0, own.double().sign(), sign)
    before, after = (0 if one.bias is None else one.bias.double() for one in (old, layer))
    factor = sign * excess * (var.double() + step.site.eps).rsqrt()
    return factor * (mean - before) + after


@torch.no_grad()
def at_expected_length_(case: Converted, model: nn.Module, step: Step) -> None:
    """Let a layer that divides by ‖u‖ divide by one length ρ for each group instead: that of which its gains tell.

    ``‖W_c‖ = ρ ‖w_c‖ |γ_c|/σ_c``, and ρ is the same for all channels that read the same.
    """
    layer, old = (one.get_submodule(step.site.layer or "") for one in (model, case.original))
    var = old_tensor(case.original, step, "running_var")
    assert var is not None
    gammas = [old_tensor(case.original, step, name) for name in ("weight", "gamma")]
    if ":" in step.site.norm:  # its γ may be named after nothing
        gammas.append(getattr(case.original.get_submodule(step.site.norm.partition(":")[0]), "gamma", None))
    gamma = next((one for one in gammas if one is not None and one.shape == var.shape), None)
    factor = (var.double() + step.site.eps).rsqrt() * (1 if gamma is None else gamma.double().abs())
    weight = layer.weight.detach().clone()
    found, asked = filters(layer, weight).double().norm(dim=1), filters(old, old.weight).double().norm(dim=1) * factor
    groups = getattr(layer, "groups", 1)
    length = (found.view(groups, -1).square().sum(1) / asked.view(groups, -1).square().sum(1)).sqrt()
    length = torch.where(length > 0, length, torch.ones_like(length)).repeat_interleave(len(found) // groups)
    torch.testing.assert_close(found, length * asked, rtol=1e-2 if weight.dtype == torch.bfloat16 else 1e-5, atol=1e-7)
    if parametrize.is_parametrized(layer):
        layer.__class__ = type(layer).__mro__[1]
        del layer._modules["parametrizations"]
    layer.__class__ = type(old)
    rows = per_filter(layer, length, weight)
    layer.register_parameter("weight", nn.Parameter((weight.double() / rows).to(weight)))


def normalizes_each_sample(module: nn.Module) -> bool:
    """Whether ``module`` is a norm and not affine in evaluation."""
    return norm_of(module) is not None and not isinstance(deployed(module), Affine)


def standardized(model: nn.Module) -> Iterator[tuple[str, nn.Module, WeightStandardization]]:
    """The layers whose weight is standardized."""
    for name, layer in layers_of(model).items():
        if parametrize.is_parametrized(layer, "weight") and isinstance(
            layer.parametrizations["weight"][0], WeightStandardization
        ):
            yield name, layer, layer.parametrizations["weight"][0]


@torch.no_grad()
def without_centring_(model: nn.Module) -> nn.Module:
    """Give standardized layers the plain weight ``gain_c/(std_c·sqrt(n)) · v``: standardization but for the mean."""
    for _, layer, ws in list(standardized(model)):
        originals = layer.parametrizations["weight"]
        v = originals.original0 if ws.gain else originals.original
        rows = filters(layer, v)
        std = (rows.var(1, correction=0) + ws.eps).sqrt()
        gain = originals.original1 / rows.shape[1] ** 0.5 if ws.gain else torch.ones_like(std)
        weight = v * per_filter(layer, gain / std, v)
        assert weight.dtype == v.dtype
        del layer._modules["parametrizations"]
        layer.__class__ = type(layer).__mro__[1]
        layer.register_parameter("weight", nn.Parameter(weight))
    return model


def loss(output: Any) -> Tensor:
    """A number that depends on every value of the output, differently."""
    generator = torch.Generator().manual_seed(3)
    terms = [(t.float() * torch.randn(t.shape, generator=generator)).sum() for t in leaves(output)]
    return torch.stack(terms).sum()


def not_finite(model: nn.Module) -> set[str]:
    """The parameters whose value or gradient holds NaN or infinity."""
    return {
        name
        for name, p in model.named_parameters()
        if not bool(torch.isfinite(p).all()) or (p.grad is not None and not bool(torch.isfinite(p.grad).all()))
    }
