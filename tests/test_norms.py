"""Every norm knows its modules, says what becomes of them in a deployed model, and fold and export believe it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import SMALL, distance
from torch import Tensor, nn
from zoo import FrozenBatchNorm2d, NormRelu, randomize_

import normswap as ns
import normswap.nn
from normswap.deploy.affines import standing_alone
from normswap.deploy.unfolded import needs_package
from normswap.errors import NormswapError
from normswap.nn import ChannelAffine, ChannelLayerNorm, EstimatedStatistics, MeanOnlyBatchNorm, StreamingNorm
from normswap.norms import Affine, Encoding, Incoming, Norm, Stays, deployed, is_convertible, norm_of
from normswap.norms.base import registered
from normswap.norms.batch import BatchNormalization
from normswap.norms.batch_channel import BatchEstimates
from normswap.norms.group import Groups
from normswap.norms.layer import LayerNormChannels, LayerNormLastAxes
from normswap.norms.mean_only import MeanOnly
from normswap.norms.none import Nothing
from normswap.norms.others import (
    InstanceNormalization,
    LocalResponseNormalization,
    RootMeanSquareNormalization,
)
from normswap.norms.streaming import Streaming
from normswap.recipes import Recipe, make_recipe
from normswap.records import Site

# ---------------------------------------------------------------------------------------------- which norm is it


class FrozenBatchNorm(FrozenBatchNorm2d):
    """As detectron2 and timm have them: no base class in common with torch's."""


MODULES: tuple[tuple[nn.Module, type[Norm]], ...] = (
    (nn.BatchNorm1d(4), BatchNormalization),
    (nn.BatchNorm2d(4), BatchNormalization),
    (nn.BatchNorm3d(4), BatchNormalization),
    (nn.SyncBatchNorm(4), BatchNormalization),
    (nn.LazyBatchNorm2d(), BatchNormalization),
    (NormRelu(4), BatchNormalization),
    (FrozenBatchNorm2d(4), BatchNormalization),
    (FrozenBatchNorm(4), BatchNormalization),
    (nn.GroupNorm(2, 4), Groups),
    (nn.LayerNorm(4), LayerNormLastAxes),
    (ChannelLayerNorm(4), LayerNormChannels),
    (MeanOnlyBatchNorm(4), MeanOnly),
    (ChannelAffine(4), Nothing),
    (EstimatedStatistics(4), BatchEstimates),
    (StreamingNorm(4), Streaming),
    (nn.InstanceNorm1d(4), InstanceNormalization),
    (nn.InstanceNorm2d(4), InstanceNormalization),
    (nn.InstanceNorm3d(4), InstanceNormalization),
    (nn.RMSNorm(4), RootMeanSquareNormalization),
    (nn.LocalResponseNorm(2), LocalResponseNormalization),
)
EACH = pytest.mark.parametrize(("module", "norm"), MODULES, ids=[type(module).__name__ for module, _ in MODULES])


def subclassed(module: nn.Module) -> nn.Module:
    """Return the module as one of a user's subclass."""
    module = copy.copy(module)  # a lazy one cannot be copied deeply
    module.__class__ = type("Mine" + type(module).__name__, (type(module),), {"__module__": "mine"})
    return module


@EACH
def test_a_norm_recognizes_its_modules_and_their_subclasses(module: nn.Module, norm: type[Norm]) -> None:
    assert norm_of(module) is norm
    assert norm_of(subclassed(module)) is norm
    assert is_convertible(module) is norm.converts


def test_every_norm_of_the_package_and_every_module_that_one_names_was_looked_at() -> None:
    own = [norm for norm in registered() if norm.__module__.startswith("normswap.")]
    assert {norm for _, norm in MODULES} == set(own)
    for norm in own:
        for cls in norm.modules:
            assert any(isinstance(module, cls) and found is norm for module, found in MODULES), cls


def test_the_closest_class_decides() -> None:
    """A ChannelLayerNorm is a LayerNorm by inheritance, and another norm all the same."""
    assert isinstance(ChannelLayerNorm(4), nn.LayerNorm)
    assert norm_of(ChannelLayerNorm(4)) is LayerNormChannels

    class OfGroups(nn.GroupNorm):
        pass

    class OfThose(OfGroups):
        pass

    assert norm_of(OfThose(2, 4)) is Groups  # looked up, and remembered, before there is a norm of its own

    @dataclass(frozen=True)
    class OwnNorm(Norm):
        modules = (OfGroups,)

        def __str__(self) -> str:
            return "own"

    assert norm_of(OfGroups(2, 4)) is OwnNorm
    assert norm_of(OfThose(2, 4)) is OwnNorm
    assert norm_of(nn.GroupNorm(2, 4)) is Groups


def test_a_norm_without_modules_of_its_own_claims_none() -> None:
    """An abstract norm between two, or one that says something else of its parent's modules, registers nothing."""

    class Between(Groups):
        pass

    assert Between not in registered()
    assert norm_of(nn.GroupNorm(2, 4)) is Groups


class FrozenScale2d(nn.Module):
    """The four tensors under another name: nothing says that it normalizes."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(4))


class BatchNormLess2d(nn.Module):
    """The name without the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


@pytest.mark.parametrize("module", [FrozenScale2d(), BatchNormLess2d(), nn.Conv2d(3, 4, 1), nn.Identity()])
def test_what_has_but_the_name_or_but_the_tensors_is_no_norm(module: nn.Module) -> None:
    assert norm_of(module) is None
    assert deployed(module) is None
    assert not is_convertible(module)


def test_a_frozen_batch_norm_is_known_by_name_and_says_that_it_is_frozen() -> None:
    assert BatchNormalization.read(FrozenBatchNorm(4)).frozen
    assert not BatchNormalization.read(nn.BatchNorm2d(4).requires_grad_(False)).frozen


def test_parametrized_layers_and_containers_of_norms_are_no_norms() -> None:
    assert norm_of(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))) is None
    assert norm_of(nn.Sequential(nn.BatchNorm2d(4))) is None


# ----------------------------------------------------------------------------------------------- what becomes of it

VARIANTS: tuple[Recipe, ...] = (
    *(make_recipe(name) for name in ns.all_recipes()),
    make_recipe("ln", {"axes": "channel"}),
    make_recipe("gn+ws", {"gain": False, "depthwise": True}),
    make_recipe("ws", {"gain": False}),
)
EACH_RECIPE = pytest.mark.parametrize("recipe", VARIANTS, ids=lambda r: " ".join([r.name, *map(str, r.options())]))


def network(rank: int, frozen: bool = False) -> nn.Module:
    """A norm behind a layer, one behind an activation, which gets an affine, and one that starts the network."""
    if rank == 2:
        layer, norm = (lambda: nn.Linear(6, 6)), nn.BatchNorm1d
    else:
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 3]
        layer, norm = (lambda: conv(6, 6, 3, padding=1)), (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 3]
    if frozen:
        norm = FrozenBatchNorm2d  # type: ignore[assignment]
    return randomize_(nn.Sequential(norm(6), layer(), norm(6), nn.ReLU(), norm(6), nn.ReLU(), layer()), 3).double()


def example(rank: int, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(batch, 6, *(7, 5, 4)[: rank - 2], generator=generator, dtype=torch.float64)


def converted(recipe: Recipe, rank: int, **options: Any) -> nn.Module:
    with SMALL:
        return ns.convert(network(rank, **options), recipe, example_inputs=example(rank), check=False).model


def norms_in(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if norm_of(module) is not None)


def is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") and getattr(nn, type(module).__name__, None) is type(module)


def as_affine(affine: Affine, x: Tensor) -> Tensor:
    """``scale·x + shift`` along axis 1, written anew."""
    return (x.movedim(1, -1) * affine.factor + affine.shift).movedim(-1, 1)


@EACH_RECIPE
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_a_norm_becomes_what_it_says_it_becomes(recipe: Recipe, rank: int) -> None:
    """For all that the recipe leaves in a model: an affine is what the module computes, what stays is none of torch."""
    seen = 0
    for name, module in norms_in(converted(recipe, rank)):
        answer, x, seen = deployed(module), example(rank), seen + 1
        if isinstance(answer, Affine):
            with torch.no_grad():
                assert distance(as_affine(answer, x), module(x)) < 1e-12, name
                assert answer.rank in (None, rank)
                if answer.otherwise is None:
                    alone = standing_alone(answer, rank, x)
                    assert alone is not None
                    assert distance(alone(x), module(x)) < 1e-12, name
                else:
                    assert answer.otherwise is module
        elif isinstance(answer, Stays):
            assert not is_torchs(module), name
            assert type(module).__name__ in answer.reason or "normswap" in answer.reason
        else:
            assert answer is module
            assert is_torchs(module), name
    assert seen or recipe.name in ("none", "wn")


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(6),
        nn.BatchNorm2d(6, affine=False),
        nn.BatchNorm2d(6, eps=0.1, momentum=None),
        nn.SyncBatchNorm(6),
        FrozenBatchNorm2d(6),
    ],
)
def test_a_batch_norm_is_an_affine_by_its_statistics(norm: nn.Module) -> None:
    norm, x = randomize_(norm, 1).double().requires_grad_(False), example(4)
    answer = deployed(norm)
    assert isinstance(answer, Affine)
    assert distance(as_affine(answer, x), norm(x)) < 1e-12
    assert answer.otherwise is norm


def test_a_batch_norm_without_statistics_is_itself() -> None:
    norm = nn.BatchNorm2d(6, track_running_stats=False)
    assert deployed(norm) is norm


def test_a_users_norm_of_a_known_kind_stays_for_its_file_is_needed() -> None:
    mine = subclassed(nn.GroupNorm(2, 4))
    answer = deployed(mine)
    assert isinstance(answer, Stays)
    assert "MineGroupNorm" in answer.reason
    assert "mine must be there" in answer.reason


def test_the_comparison_with_an_affine_sees_a_wrong_one() -> None:
    """The control of the tests above: a scale, a shift or an axis that is off by a little."""
    affine, x = ChannelAffine(6, 4).double().requires_grad_(False), example(4)
    nn.init.normal_(affine.weight)
    answer = deployed(affine)
    assert isinstance(answer, Affine)
    assert distance(as_affine(answer, x), affine(x)) < 1e-12
    for wrong in (
        Affine(answer.factor * (1 + 1e-9), answer.shift),
        Affine(answer.factor, answer.shift + 1e-9),
        Affine(answer.factor.flip(0), answer.shift),
    ):
        assert distance(as_affine(wrong, x), affine(x)) > 1e-12


# ------------------------------------------------------------------------------------- fold and export ask the same


def refusal(model: nn.Module, rank: int, folder: Path) -> str:
    """Return the code of what export refuses: what is unfolded comes before the opset, which is no opset here."""
    with pytest.raises(NormswapError) as caught:
        ns.export_onnx(model, folder / "model.onnx", example_inputs=example(rank), opset=99)
    return str(caught.value.code)


FOLDED, UNFOLDED = "export-opset", "export-unfolded"


@EACH_RECIPE
@pytest.mark.parametrize("rank", [2, 4])
def test_export_accepts_what_fold_gives_and_what_fold_says_it_left(recipe: Recipe, rank: int, tmp_path: Path) -> None:
    folding = ns.fold_with_report(converted(recipe, rank), example_inputs=example(rank))
    assert refusal(folding.model, rank, tmp_path) == FOLDED
    left = {row.name for row in folding.left}
    kept = {name for name, module in norms_in(folding.model) if not is_torchs(module)}
    foreign = {name for name, module in folding.model.named_modules() if type(module).__module__.startswith("normswap")}
    assert kept <= left
    assert foreign <= left
    assert all(row.reason for row in folding.left)


@pytest.mark.parametrize("name", sorted(ns.all_recipes()))
def test_export_refuses_what_fold_would_change(name: str, tmp_path: Path) -> None:
    model = converted(make_recipe(name), 4)
    unfolded = any(module.__class__.__module__.startswith(("normswap", "torch.nn.utils")) for module in model.modules())
    assert refusal(model, 4, tmp_path) == (UNFOLDED if unfolded else FOLDED)
    if unfolded:
        assert ns.fold_with_report(model, example_inputs=example(4)).rows, "refused, and there is nothing to fold"


def test_some_recipes_need_a_fold_and_others_do_not() -> None:
    """The control of the test above: it has seen both."""
    found = {
        any(module.__class__.__module__.startswith(("normswap", "torch.nn.utils")) for module in model.modules())
        for model in (converted(make_recipe("gn+ws"), 4), network(4))
    }
    assert found == {True, False}


PER_STEP = {"max_length": 3}
STANDING: list[tuple[str, dict[str, Any]]] = [
    (name, options)
    for name in normswap.nn.__all__
    if isinstance(kind := getattr(normswap.nn, name), type)
    and issubclass(kind, nn.Module)
    and not hasattr(kind, "right_inverse")  # what stands in a module, not what computes its weight
    for options in ([{}, PER_STEP] if name.startswith("BatchNorm") else [{}])
]


def standing(name: str, options: dict[str, Any]) -> nn.Module:
    """A module of this package that is made directly, and not by a conversion."""
    kind = getattr(normswap.nn, name)
    sizes: tuple[int, ...] = (4,)
    if issubclass(kind, (nn.RNNBase, nn.RNNCellBase, nn.Linear)):
        sizes = (4, 4)
    elif issubclass(kind, nn.modules.conv._ConvNd):
        sizes = (4, 4, 3)
    module: nn.Module = kind(*sizes, **options)
    return module


@pytest.mark.parametrize(("name", "options"), STANDING, ids=lambda value: str(value))
def test_a_fold_lists_whatever_goes_on_needing_normswap(name: str, options: dict[str, Any]) -> None:
    model = nn.Sequential(OrderedDict(part=standing(name, options))).eval()
    folding = ns.fold_with_report(model)
    assert needs_package(folding.model) == [row.name for row in folding.left]
    assert all(row.reason for row in folding.left)


def test_some_modules_need_normswap_after_a_fold_and_others_do_not() -> None:
    """The control of the test above: it has seen both, also of one class."""
    shared, per_step = (standing("BatchNormLSTM", options).eval() for options in ({}, PER_STEP))
    assert not needs_package(ns.fold(nn.Sequential(shared).eval()))
    assert needs_package(ns.fold(nn.Sequential(per_step).eval())) == ["0"]
    assert isinstance(deployed(shared), nn.LSTM)
    answer = deployed(per_step)
    assert isinstance(answer, Stays)
    assert answer.reason == (
        "it has statistics of its own for each step, which torch's LSTM has not: normswap must be there to load the "
        "model"
    )


class Hidden(nn.Module):
    """An affine of an earlier conversion, which only a hook's owner and a branch on values see."""

    def __init__(self, rank: int | None, hooked: bool) -> None:
        super().__init__()
        self.affine, self.conv = ChannelAffine(6, rank), nn.Conv2d(6, 6, 3, padding=1)
        if hooked:
            self.affine.register_forward_hook(lambda module, args, output: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.affine(torch.relu(x))))


def test_what_fold_leaves_for_a_hooks_sake_is_no_reason_to_fold_again(tmp_path: Path) -> None:
    model = Hidden(4, hooked=True).double().eval()
    folding = ns.fold_with_report(model, example_inputs=example(4))
    assert [row.reason for row in folding.left] == ["a forward hook is on it"]
    assert refusal(folding.model, 4, tmp_path) == FOLDED
    assert refusal(Hidden(4, hooked=False).double().eval(), 4, tmp_path) == UNFOLDED


def test_what_fold_could_not_do_without_inputs_it_does_with_them(tmp_path: Path) -> None:
    model = nn.Sequential(ChannelAffine(6), nn.Tanh()).double().eval()
    folding = ns.fold_with_report(model)
    assert "example_inputs" in folding.left[0].reason
    with pytest.raises(NormswapError, match="example_inputs") as caught:
        ns.export_onnx(folding.model, tmp_path / "model.onnx", example_inputs=example(4))
    assert caught.value.code == UNFOLDED
    assert refusal(ns.fold(folding.model, example_inputs=example(4)), 4, tmp_path) == FOLDED


def test_a_model_with_a_norm_that_stays_is_exported_and_computes_the_same(tmp_path: Path) -> None:
    folding = ns.fold_with_report(converted(make_recipe("ln", {"axes": "channel"}), 4).float(), example_inputs=None)
    assert folding.left
    artifact = ns.export_onnx(folding.model, tmp_path / "model.onnx", example_inputs=example(4).float())
    assert artifact.verification is not None
    assert artifact.verification.ok


# ------------------------------------------------------------------------------------------- why the others stay

STAYING = {
    "MeanOnlyBatchNorm": (MeanOnlyBatchNorm(6), "a mean-only BatchNorm already, from an earlier conversion"),
    "ChannelAffine": (ChannelAffine(6), "a per-channel affine, from an earlier conversion"),
    "EstimatedStatistics": (EstimatedStatistics(6), "batch part, from an earlier conversion"),
    "ChannelLayerNorm": (ChannelLayerNorm(6), "ChannelLayerNorm"),
    "InstanceNorm2d": (nn.InstanceNorm2d(6), "InstanceNorm2d"),
    "RMSNorm": (nn.RMSNorm([6, 7, 5]), "RMSNorm"),
    "LayerNorm": (nn.LayerNorm([6, 7, 5]), "LayerNorm"),
    "GroupNorm": (nn.GroupNorm(2, 6), "GroupNorm"),
    "LocalResponseNorm": (nn.LocalResponseNorm(2), "LocalResponseNorm"),
}


@pytest.mark.parametrize("name", STAYING)
@pytest.mark.parametrize("given", [True, False])
def test_a_norm_that_stays_is_in_the_plan_with_its_reason(name: str, given: bool) -> None:
    norm, reason = STAYING[name]
    model = nn.Sequential(nn.Conv2d(6, 6, 1), copy.deepcopy(norm), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)).double()
    plan = ns.plan(model.eval(), "gn", example_inputs=example(4) if given else None)
    (skip,) = (skip for skip in plan.skips if skip.what == "norm")
    assert (skip.name, skip.type, skip.code) == ("1", name, "not-batch-norm")
    assert reason in skip.reason
    assert [step.site.norm for step in plan.steps] == ["3"]
    assert skip.reason in str(plan)


@pytest.mark.parametrize(("first", "what"), [("wn+mobn", "mean-only"), ("mobn", "mean-only"), ("gn", "affine")])
def test_a_second_conversion_tells_of_the_first_ones_norms(first: str, what: str) -> None:
    once = ns.convert(network(4), first, exclude=["2"], example_inputs=example(4), check=False).model
    plan = ns.plan(once, "gn", example_inputs=example(4))
    assert [step.site.norm for step in plan.steps] == ["2"]
    told = {skip.name: skip.reason for skip in plan.skips if skip.what == "norm"}
    assert set(told) == {name for name, _ in norms_in(once)} - {"2"}
    assert any(what in reason and "from an earlier conversion" in reason for reason in told.values())


def test_a_norm_of_ones_own_says_why_it_stays() -> None:
    class Whitening(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean()

    @dataclass(frozen=True)
    class WhiteningNorm(Norm):
        modules = (Whitening,)

        @classmethod
        def why_kept(cls, module: nn.Module) -> str:
            return "it whitens"

        def build(self, site: Site, like: Tensor) -> nn.Module:
            return Whitening()

        def encode(self, incoming: Incoming) -> Encoding:
            return Encoding()

        def __str__(self) -> str:
            return "Whitening"

    plan = ns.plan(nn.Sequential(nn.Conv2d(6, 6, 1), Whitening()).eval(), "gn")
    assert [skip.reason for skip in plan.skips if skip.what == "norm"] == ["it whitens"]


# --------------------------------------------------------------------------------------- what other code expects of one


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),  # what a norm of this package stands in the place of
        ChannelAffine(4),
        ChannelLayerNorm(4),
        EstimatedStatistics(4, eps=1e-5),
        MeanOnlyBatchNorm(4),
        StreamingNorm(4),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_a_norm_keeps_the_memory_format(norm: nn.Module, layout: torch.memory_format) -> None:
    x = torch.randn(2, 4, 3, 5).to(memory_format=layout)
    for training in (True, False):
        y = norm.train(training)(x)
        assert y.stride() == x.stride()
        if layout is torch.contiguous_format:
            assert y.view(2, -1).shape == (2, 60)


def test_a_mean_only_norm_lets_statistics_begin_anew_and_takes_no_variance() -> None:
    """As loops do that average weights: Lightning's StochasticWeightAveraging assigns both statistics."""
    norm, x = MeanOnlyBatchNorm(4).train(), torch.randn(8, 4)
    norm(x)
    norm.running_mean, norm.running_var = torch.zeros_like(norm.running_mean), torch.ones_like(norm.running_var)
    assert "running_var" not in norm.state_dict()
    norm.momentum, norm.num_batches_tracked = None, norm.num_batches_tracked * 0
    norm(x)
    torch.testing.assert_close(norm.running_mean, x.mean(0))
    with pytest.raises(NormswapError, match="divides by none"):
        norm.running_var = torch.full((4,), 2.0)
