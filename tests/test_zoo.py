"""Is the zoo what it says it is? Calls are counted, and every norm is really folded into every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from zoo import ZOO, Entry, FrozenBatchNorm2d, leaves, randomize_

ENTRIES = pytest.mark.parametrize("entry", ZOO, ids=str)
BY_NAME = {entry.name: entry for entry in ZOO}


# ---------------------------------------------------------------------------------------- an independent look


@dataclass(frozen=True)
class Affine:
    """BN's eval map per channel: ``scale * y + shift``."""

    scale: Tensor
    shift: Tensor


def affine(mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Affine:
    scale = (var + eps).rsqrt() * (1.0 if gamma is None else gamma.detach())
    return Affine(scale, (0.0 if beta is None else beta.detach()) - mean * scale)


class NormProbe(TorchFunctionMode):
    """Sees every `F.batch_norm`: counts it, keeps its affine, and removes the norm ``without``.

    ``hold`` makes training calls use the running statistics, so that train mode has an exact fold too.
    """

    def __init__(self, model: nn.Module, without: str | None = None, hold: bool = False) -> None:
        super().__init__()
        self.names = {id(tensor): fqn for fqn, tensor in tensors(model)}
        self.holders = {fqn for fqn, module in model.named_modules() if isinstance(module, _BatchNorm)}
        self.without, self.hold = without, hold
        self.calls: Counter[str] = Counter()
        self.affines: dict[str, Affine] = {}
        self.on_batch_statistics: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            return self.batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        key = self.names[id(weight if running_mean is None else running_mean)]
        owner = key.rpartition(".")[0]
        name = owner if owner in self.holders else key
        self.calls[name] += 1
        training = training and not (self.hold and running_mean is not None)
        if training:
            self.on_batch_statistics.add(name)
        elif running_mean is not None and running_var is not None:
            self.affines[name] = affine(running_mean, running_var, weight, bias, eps)
        if name == self.without:
            return x.clone()
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by its first fqn."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {fqn: m for fqn, m in model.named_modules() if isinstance(m, (_ConvNd, nn.Linear))}


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    return {fqn: m for fqn, m in model.named_modules() if isinstance(m, (_BatchNorm, FrozenBatchNorm2d))}


@contextmanager
def hooked(model: nn.Module, without: str | None) -> Iterator[tuple[Counter[str], dict[str, Affine]]]:
    """Count module calls; frozen norms are no `F.batch_norm`, so their affine and removal are hooks too."""
    calls: Counter[str] = Counter()
    frozen: dict[str, Affine] = {}

    def watch(fqn: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            calls[fqn] += 1
            if not isinstance(module, FrozenBatchNorm2d):
                return None
            frozen[fqn] = affine(module.running_mean, module.running_var, module.weight, module.bias, module.eps)
            return args[0].clone() if fqn == without else None

        return hook

    watched = {**layers_of(model), **norms_of(model)}
    handles = [module.register_forward_hook(watch(fqn)) for fqn, module in watched.items()]
    try:
        yield calls, frozen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Observation:
    outputs: list[Tensor]
    calls: Counter[str]
    affines: dict[str, Affine]
    on_batch_statistics: set[str]


def observe(
    entry: Entry, model: nn.Module, *, without: str | None = None, train: bool = False, other: bool = False
) -> Observation:
    """One forward of ``model`` in double precision, with the norm ``without`` removed."""
    inputs = entry.other_inputs if other else entry.inputs
    assert inputs is not None
    model.train(train)
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        with hooked(model, without) as (calls, frozen), NormProbe(model, without, hold=train) as probe:
            output = entry.run(model, lambda: tuple(x.double() if x.is_floating_point() else x for x in inputs()))
    # A norm module's own call and the F.batch_norm in it are one call.
    counted = calls + Counter({name: n for name, n in probe.calls.items() if name not in calls})
    return Observation(leaves(output), counted, {**probe.affines, **frozen}, probe.on_batch_statistics)


def fold_(layer: nn.Module, to: Affine) -> None:
    """W ← s·W and b ← s·b + t along the output channels, in place, so that whoever shares them sees it."""
    if parametrize.is_parametrized(layer):
        parametrize.remove_parametrizations(layer, "weight")
    weight, groups = layer.weight.data, getattr(layer, "groups", 1)
    if isinstance(layer, _ConvTransposeNd):
        split = weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
        split.mul_(to.scale.view(groups, 1, -1, 1))
    else:
        weight.mul_(to.scale.view(-1, *[1] * (weight.dim() - 1)))
    if layer.bias is None:
        layer.bias = nn.Parameter(to.shift.clone())
    else:
        layer.bias.data.mul_(to.scale).add_(to.shift)


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    """max |left − right|, relative to max |right|; different structures are infinitely far apart."""
    if [x.shape for x in left] != [x.shape for x in right]:
        return float("inf")
    scale = max(float(x.abs().max()) for x in right)
    return max(float((x - y).abs().max()) for x, y in zip(left, right, strict=True)) / scale


def fresh(entry: Entry) -> nn.Module:
    return entry.model().double()


@cache
def original(entry_name: str, train: bool, other: bool = False) -> Observation:
    """What the untouched model does."""
    entry = BY_NAME[entry_name]
    return observe(entry, fresh(entry), train=train, other=other)


def fold_error(entry: Entry, norm: str, layer: str, *, other: bool = False) -> float:
    """How far folding ``norm`` into ``layer`` moves the outputs, in the worse of eval and train mode."""
    worst = 0.0
    # A norm that only training calls is known from there.
    to = {**original(entry.name, train=True).affines, **original(entry.name, train=False).affines}.get(norm)
    for train in (False, True):
        before, folded = original(entry.name, train, other), fresh(entry)
        target = layers_of(folded)[layer]
        features = getattr(target, "out_channels", getattr(target, "out_features", None))
        if to is None or norm in before.on_batch_statistics or to.scale.numel() != features:
            return float("inf")
        fold_(target, to)
        after = observe(entry, folded, without=norm, train=train, other=other)
        worst = max(worst, distance(after.outputs, before.outputs))
    return worst


@cache
def best_fold(entry_name: str) -> dict[str, float]:
    """The smallest fold error of every norm that is called in eval or train mode, over all layers."""
    entry = BY_NAME[entry_name]
    model = fresh(entry)
    called = original(entry_name, train=False).calls + original(entry_name, train=True).calls
    norms = sorted(set(called) - set(layers_of(model)))
    return {norm: min(fold_error(entry, norm, layer) for layer in layers_of(model)) for norm in norms}


# ------------------------------------------------------------------------------------------------ every entry


def test_names_are_distinct() -> None:
    assert len(BY_NAME) == len(ZOO)


@ENTRIES
def test_entry_runs_in_eval_and_train_mode_and_backward(entry: Entry) -> None:
    model = entry.model()
    assert not any(module.training for module in model.modules())
    for train in (False, True):
        outputs = leaves(entry.run(model.train(train)))
        assert outputs
        assert all(torch.isfinite(x).all() for x in outputs)
        sum(x.float().square().mean() for x in outputs).backward()
    assert all(x.dim() == 0 or x.shape[0] >= 2 for x in outputs)


@ENTRIES
def test_entry_is_deterministic_for_a_seed_and_different_for_another(entry: Entry) -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first, again, other = entry.model(5), entry.model(5), entry.model(6)
    assert torch.equal(state, torch.random.get_rng_state()), "building an entry moved the global generator"
    assert first.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in first.state_dict().items())
    with torch.no_grad():
        output, same, different = (leaves(entry.run(model)) for model in (first, again, other))
    assert all(torch.equal(x, y) for x, y in zip(output, same, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(output, different, strict=True))


@ENTRIES
def test_statistics_and_gammas_are_far_from_those_of_a_fresh_norm(entry: Entry) -> None:
    model = entry.model()
    seen = 0
    for fqn, tensor in tensors(model):
        owner = model.get_submodule(fqn.rpartition(".")[0])
        in_norm = isinstance(owner, (_BatchNorm, FrozenBatchNorm2d))
        if fqn.endswith("running_mean"):
            assert (tensor.abs() > 0.2).float().mean() >= 0.5
        elif fqn.endswith("running_var"):
            assert (tensor - 1).abs().max() > 0.1
        elif fqn.endswith("gamma") or (in_norm and fqn.endswith("weight")):
            assert tensor.max() > 0.3
            assert tensor.min() < -0.3 or tensor.numel() == 1
        else:
            continue
        seen += 1
    assert seen


def test_the_check_of_the_statistics_fails_on_a_fresh_norm() -> None:
    class Fresh(Entry):
        def model(self, seed: int = 0) -> nn.Module:
            return self.build()

    with pytest.raises(AssertionError):
        test_statistics_and_gammas_are_far_from_those_of_a_fresh_norm(Fresh(**vars(BY_NAME["conv_bn_relu_chain"])))


@ENTRIES
def test_layers_and_norms_are_as_many_as_claimed(entry: Entry) -> None:
    model = fresh(entry)
    called = observe(entry, model).calls + observe(entry, fresh(entry), train=True).calls
    assert len(layers_of(model)) == entry.layers
    assert len((set(called) - set(layers_of(model))) | set(norms_of(model))) == entry.norms
    named = entry.absorbable | entry.given_rank | entry.conditional | entry.batch_statistics
    assert named <= set(called) - set(layers_of(model))


@ENTRIES
def test_layers_and_norms_are_called_as_often_as_claimed(entry: Entry) -> None:
    model = fresh(entry)
    calls = observe(entry, model).calls
    names = {*calls, *layers_of(model), *norms_of(model)}
    assert set(entry.calls) <= names
    assert {name: calls[name] for name in names} == {name: entry.calls.get(name, 1) for name in names}


@ENTRIES
def test_norms_on_batch_statistics_in_eval_mode_are_as_claimed(entry: Entry) -> None:
    assert observe(entry, fresh(entry)).on_batch_statistics == entry.batch_statistics


class LeafTracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (_ConvNd, nn.Linear, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)


@ENTRIES
def test_symbolic_tracing_gets_through_where_claimed(entry: Entry) -> None:
    model = entry.model()
    if entry.traceable:
        LeafTracer().trace(model)
    else:
        with pytest.raises((torch.fx.proxy.TraceError, TypeError), match=r"control flow|item assignment"):
            LeafTracer().trace(model)


@ENTRIES
def test_a_norm_folds_into_a_layer_exactly_where_claimed(entry: Entry) -> None:
    """In double precision a right fold is off by rounding only, a wrong one by more than a hundredth."""
    errors = best_fold(entry.name)
    assert not {norm: error for norm, error in errors.items() if 1e-13 < error < 1e-2}, "neither right nor wrong"
    right = {norm for norm, error in errors.items() if error <= 1e-13}
    assert right == entry.absorbable | entry.given_rank | entry.conditional
    assert len(right) == len(entry.absorbable) + len(entry.given_rank) + len(entry.conditional), "sets overlap"


# --------------------------------------------------------------------------------------------- single entries


@pytest.mark.parametrize(
    ("check", "lie"),
    [
        (test_layers_and_norms_are_as_many_as_claimed, {"norms": 2}),
        (test_layers_and_norms_are_as_many_as_claimed, {"layers": 2}),
        (test_layers_and_norms_are_called_as_often_as_claimed, {"calls": {"conv": 2}}),
        (test_norms_on_batch_statistics_in_eval_mode_are_as_claimed, {"batch_statistics": frozenset({"bn"})}),
        (test_symbolic_tracing_gets_through_where_claimed, {"traceable": False}),
        (test_a_norm_folds_into_a_layer_exactly_where_claimed, {"absorbable": frozenset()}),
        (test_a_norm_folds_into_a_layer_exactly_where_claimed, {"conditional": frozenset({"bn"})}),
    ],
)
def test_a_false_claim_is_found(check: Callable[[Entry], None], lie: dict[str, Any]) -> None:
    entry = BY_NAME["pair_called_twice"]
    check(entry)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(replace(entry, **lie))


def test_a_fold_with_one_weight_broken_is_seen() -> None:
    entry = BY_NAME["conv_bn_relu_chain"]
    before, folded = observe(entry, fresh(entry)), fresh(entry)
    layer = layers_of(folded)["0"]
    fold_(layer, before.affines["1"])
    assert distance(observe(entry, folded, without="1").outputs, before.outputs) < 1e-13
    layer.weight.data[0, 0, 0, 0] += 1e-2
    assert distance(observe(entry, folded, without="1").outputs, before.outputs) > 1e-4


@pytest.mark.parametrize(
    ("name", "norm", "right", "wrong"),
    [
        ("registration_order_lies", "bn", "up", "conv"),
        ("preactivation", "bn2", "conv1", "conv2"),
        ("containers", "norms.first", "convs.1", "convs.0"),
    ],
)
def test_the_layer_next_to_the_norm_by_name_is_the_wrong_one(name: str, norm: str, right: str, wrong: str) -> None:
    assert fold_error(BY_NAME[name], norm, right) < 1e-13
    assert fold_error(BY_NAME[name], norm, wrong) > 1e-2


def test_a_hidden_branch_makes_a_fold_right_on_one_input_and_wrong_on_another() -> None:
    entry = BY_NAME["branch_hides_a_use"]
    assert fold_error(entry, "bn", "conv") < 1e-13
    assert fold_error(entry, "bn", "conv", other=True) > 1e-2


def test_a_second_use_in_training_is_invisible_in_eval_mode() -> None:
    entry = BY_NAME["second_use_in_training"]
    before, folded = observe(entry, fresh(entry)), fresh(entry)
    fold_(layers_of(folded)["conv"], before.affines["bn"])
    assert distance(observe(entry, folded, without="bn").outputs, before.outputs) < 1e-13
    assert fold_error(entry, "bn", "conv") > 1e-2


def test_square_sequence_lets_a_wrong_fuser_run() -> None:
    error = fold_error(BY_NAME["linear_on_square_sequence"], "bn", "fc")
    assert 1e-2 < error < float("inf")


def test_unbatched_conv1d_lets_a_wrong_fuser_run() -> None:
    error = fold_error(BY_NAME["conv1d_unbatched"], "1", "0")
    assert 1e-2 < error < float("inf")


@pytest.mark.parametrize("name", ["tied_weights", "tied_gammas"])
def test_tied_tensors_are_one_parameter(name: str) -> None:
    model = BY_NAME[name].model()
    assert (model.conv1.weight is model.conv2.weight) == (name == "tied_weights")
    assert (model.bn1.weight is model.bn2.weight) == (name == "tied_gammas")


def test_aliases_name_one_module_thrice() -> None:
    model = BY_NAME["aliases"].model()
    assert model.conv is model.project
    assert model.conv is model.layers[0]


def test_special_tensors_are_what_their_entries_say() -> None:
    assert [int(n) for n in (BY_NAME["zero_filters"].model()[0].weight.flatten(1).norm(dim=1) == 0).nonzero()] == [1, 4]
    gamma = BY_NAME["negative_and_zero_gammas"].model()[1].weight
    assert gamma[0] == gamma[3] == 0
    assert gamma[1] < 0
    assert BY_NAME["dead_channels"].model()[1].running_var[:2].tolist() == pytest.approx([0.0, 1e-12], abs=1e-20)
    assert not any(p.requires_grad for n, p in BY_NAME["frozen_parameters"].model().named_parameters() if n[0] in "14")
    assert not list(BY_NAME["frozen_batchnorm"].model()[1].parameters())


def test_bfloat16_entries_have_the_dtypes_they_claim() -> None:
    assert {p.dtype for p in BY_NAME["bfloat16"].model().parameters()} == {torch.bfloat16}
    mixed = BY_NAME["bfloat16_norms_in_float32"].model()
    assert (mixed[0].weight.dtype, mixed[1].weight.dtype) == (torch.bfloat16, torch.float32)


def test_hooked_norm_counts_its_calls() -> None:
    entry = BY_NAME["hooked_norm"]
    model = entry.model()
    entry.run(model)
    entry.run(model)
    assert model[1].count == 2


def test_user_graphs_are_graph_modules_with_the_flag_baked_in() -> None:
    for name, flag in (("user_graph", False), ("user_graph_traced_in_training", True)):
        model = BY_NAME[name].model()
        assert isinstance(model, torch.fx.GraphModule)
        (node,) = [n for n in model.graph.nodes if n.target is F.batch_norm]
        assert node.kwargs["training"] is flag


@pytest.mark.parametrize(
    "name",
    [
        "pair_called_twice",
        "block_called_twice",
        "two_calls_two_norms",
        "one_norm_two_convs",
        "functional_norm",
    ],
)
def test_torch_export_sees_the_same_number_of_calls(name: str) -> None:
    entry = BY_NAME[name]
    model = entry.model()
    graph = torch.export.export(model, entry.inputs(), entry.kwargs()).graph
    ops = Counter(str(node.target).split(".")[1] for node in graph.nodes if node.op == "call_function")
    calls = observe(entry, fresh(entry)).calls
    layers = sum(n for fqn, n in calls.items() if fqn in layers_of(model))
    assert ops["conv2d"] == layers
    assert ops["batch_norm"] == sum(calls.values()) - layers


def test_randomize_returns_the_model_in_eval_mode() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)).train()
    assert randomize_(model, 0) is model
    assert not model[1].training
    assert (model[1].weight < 0).sum() == 2
