"""Code that looks norms up by their class: a ``train()`` that freezes them, update_bn, fuse(), groups for weight decay.

After a conversion each such idiom is right, or it is refused, or the plan says that it will not find the norm.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import is_batch_norm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn
from zoo import NormDropAct, NormRelu, conv3, randomize_

import normswap as ns
from normswap.errors import InputError
from normswap.graph.class_lookups import class_lookups
from normswap.nn import ChannelAffine, MeanOnlyBatchNorm
from normswap.runs.modes import Held, held_modules

EXACT = ["mobn", "wn+mobn", "none", "wn"]
MEAN_ONLY = ["mobn", "wn+mobn"]
NORM_CLASSES = (nn.BatchNorm1d, nn.BatchNorm2d)


class Net(nn.Module):
    """Two pairs, the second of which is by itself what a detector calls a block."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(4, 6), norm(6)
        self.conv2, self.bn2 = conv3(6, 5), norm(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class ByBaseClass(Net):
    """As in mmdetection's backbones."""

    def train(self, mode: bool = True) -> ByBaseClass:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


class ByClass(Net):
    def train(self, mode: bool = True) -> ByClass:
        super().train(mode)
        self.apply(lambda module: module.eval() if type(module) is nn.BatchNorm2d else None)
        return self


class ByName(Net):
    def train(self, mode: bool = True) -> ByName:
        super().train(mode)
        for name, module in self.named_modules():
            if name.startswith("bn"):
                module.eval()
        return self


class ByNameOfClass(Net):
    def train(self, mode: bool = True) -> ByNameOfClass:
        super().train(mode)
        for module in self.modules():
            if "BatchNorm" in module.__class__.__name__:
                module.eval()
        return self


class Frozen(nn.BatchNorm2d):
    """A norm that never goes into train mode."""

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


def by_instance() -> nn.Module:
    """A model whose norms' ``train`` were replaced, as latent diffusion does it."""
    model = Net().eval()
    model.bn1.train = model.bn2.train = lambda mode=True: model  # type: ignore[method-assign]
    return model


class FunctionalHeld(nn.Module):
    """The call of batch_norm takes its mode from its owner, which is held."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv3(4, 6)
        self.register_buffer("running_mean", torch.zeros(6))
        self.register_buffer("running_var", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.running_mean, self.running_var, training=self.training)

    def train(self, mode: bool = True) -> FunctionalHeld:
        return super().train(False)


HOLDING: dict[str, Callable[[], nn.Module]] = {
    "by base class": ByBaseClass,
    "by class": ByClass,
    "by name": ByName,
    "by the class's name": ByNameOfClass,
    "norms that never train": lambda: Net(Frozen),
    "by instance": by_instance,
    "inside of another": lambda: nn.Sequential(ByBaseClass()),
    "functional": FunctionalHeld,
}


def images(seed: int = 1) -> Tensor:
    return torch.randn(4, 4, 9, 9, generator=torch.Generator().manual_seed(seed))


def built(make: Callable[[], nn.Module]) -> nn.Module:
    return randomize_(make(), 0).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(model: nn.Module) -> list[str]:
    """The tensors that two training passes move."""
    before = state(model)
    for seed in (5, 6):
        model(images(seed) + 1)
    return [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]


# ------------------------------------------------------------------------------------------- train() of the model


@pytest.mark.parametrize("recipe", EXACT)
@pytest.mark.parametrize("name", HOLDING)
def test_a_norm_that_train_holds_in_eval_mode_stays_frozen(name: str, recipe: str) -> None:
    model = built(HOLDING[name])
    result = ns.convert(model, recipe, example_inputs=images())
    assert result.plan.steps
    assert all(step.site.frozen and step.site.held for step in result.plan.steps)
    assert "frozen: train() leaves it in eval mode" in str(result.plan)
    result.model.train()
    torch.testing.assert_close(result.model(images(2)), model.train()(images(2)))
    assert moved(result.model) == []


@pytest.mark.parametrize("recipe", MEAN_ONLY)
def test_a_norm_that_nothing_holds_moves_and_is_not_called_frozen(recipe: str) -> None:
    result = ns.convert(built(Net), recipe, example_inputs=images())
    assert not any(step.site.frozen or step.site.held for step in result.plan.steps)
    assert "frozen" not in str(result.plan)
    assert "bn1.running_mean" in moved(result.model.train())


@pytest.mark.parametrize("recipe", ["gn+ws", "ln", "ws"])
def test_an_inexact_recipe_says_that_the_norm_was_frozen(recipe: str) -> None:
    assert "frozen: train() leaves it in eval mode" in str(ns.plan(built(ByBaseClass), recipe))


class HoldsOne(Net):
    def train(self, mode: bool = True) -> HoldsOne:
        super().train(mode)
        self.bn1.eval()
        return self


def test_only_those_that_are_held_are_frozen() -> None:
    result = ns.convert(built(HoldsOne), "mobn", example_inputs=images())
    assert [step.site.held for step in result.plan.steps] == [True, False]
    assert isinstance(result.model.bn2, MeanOnlyBatchNorm)
    assert moved(result.model.train()) == ["bn2.running_mean", "bn2.num_batches_tracked"]


class WritesInTrain(Net):
    """A train() that writes whatever one can write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen: list[bool] = []
        self.register_buffer("count", torch.zeros(1))

    def train(self, mode: bool = True) -> WritesInTrain:
        super().train(mode)
        self.calls += 1
        self.seen.append(mode)
        self.count += torch.rand(1)
        self.bn1.eval()
        self.bn1.weight.requires_grad = False
        self.late = nn.Linear(2, 2)
        return self


class RaisesInTrain(WritesInTrain):
    def train(self, mode: bool = True) -> RaisesInTrain:
        super().train(mode)
        if mode:
            raise RuntimeError("not to be trained")
        return self


@pytest.mark.parametrize("kind", [WritesInTrain, RaisesInTrain])
def test_asking_what_train_holds_changes_nothing(kind: type[nn.Module]) -> None:
    model = randomize_(kind(), 0)
    for module in model.modules():
        module.__dict__["training"] = False
    for parameter in model.parameters():
        parameter.requires_grad_(True)

    def fingerprint() -> list[Any]:
        rng = torch.get_rng_state().tolist()
        tensors = [(n, v.tolist()) for n, v in model.state_dict().items()]
        flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
        return [model.calls, list(model.seen), [m.training for m in model.modules()], tensors, flags, rng]

    before = fingerprint()
    held = held_modules(model).in_eval
    assert fingerprint() == before
    assert held == (frozenset() if kind is RaisesInTrain else frozenset([id(model.bn1)]))
    model.__dict__.update(calls=-1)
    assert fingerprint() != before  # the comparison sees a change


def test_train_is_not_called_where_nobody_overrides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(self: nn.Module, mode: bool = True) -> nn.Module:
        raise AssertionError("train() was called")

    model = built(Net)
    monkeypatch.setattr(nn.Module, "train", no)
    assert held_modules(model) == Held()


class HalfHeld(nn.Module):
    """The norm's module is held, and the call that uses its tensors asks the owner for the mode."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.both = conv3(4, 6), nn.BatchNorm2d(6), both

    def forward(self, x: Tensor) -> Tensor:
        n = self.bn
        return F.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight, n.bias, self.training)

    def train(self, mode: bool = True) -> HalfHeld:
        super().train(mode and not self.both)
        self.bn.eval()
        return self


def test_a_call_of_which_it_is_open_whether_it_is_frozen_is_refused() -> None:
    plan = ns.plan(built(lambda: HalfHeld(False)), "mobn", example_inputs=images())
    assert not plan.steps
    assert any("whether it is frozen is open" in skip.reason for skip in plan.skips)
    held = ns.plan(built(lambda: HalfHeld(True)), "mobn", example_inputs=images())
    assert [step.site.held for step in held.steps] == [True]


class AlwaysBatch(Net):
    """Test-time adaptation: the norms take the batch's statistics in evaluation, too."""

    def train(self, mode: bool = True) -> AlwaysBatch:
        super().train(mode)
        self.bn1.train()
        return self


class AlwaysBatchInEval(Net):
    def eval(self) -> AlwaysBatchInEval:
        super().eval()
        self.bn1.train()
        return self


@pytest.mark.parametrize("kind", [AlwaysBatch, AlwaysBatchInEval])
def test_a_norm_that_never_leaves_train_mode_is_no_site(kind: type[nn.Module]) -> None:
    result = ns.convert(built(kind), "mobn", example_inputs=images())
    assert [step.site.norm for step in result.plan.steps] == ["bn2"]
    reasons = {skip.name: skip.reason for skip in result.plan.skips}
    assert "keeps it in train mode in evaluation" in reasons["bn1"]


class DropsInside(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = conv3(4, 6), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def train(self, mode: bool = True) -> DropsInside:
        super().train(mode)
        self.bn.eval()
        return self


def test_a_frozen_norm_with_dropout_inside_stays() -> None:
    """Its dropout is frozen with it, and would not be beside a new norm."""
    plan = ns.plan(built(lambda: DropsInside(NormDropAct(6))), "mobn", example_inputs=images())
    assert [skip.code for skip in plan.skips if skip.what == "norm"] == ["held-dropout"]
    assert len(ns.plan(built(lambda: DropsInside(NormRelu(6))), "mobn", example_inputs=images()).steps) == 1


def test_a_stored_model_keeps_its_frozen_norms(tmp_path: Any) -> None:
    model = built(ByBaseClass)
    ns.save(ns.convert(model, "wn+mobn").model, tmp_path / "m.safetensors")
    again = ns.load(tmp_path / "m.safetensors", model=ByBaseClass()).train()
    torch.testing.assert_close(again(images()), model.train()(images()))


# ------------------------------------------------------------------------------------------ loops in the user's code


FINDERS: dict[str, Callable[[nn.Module], bool]] = {
    "_BatchNorm": lambda module: isinstance(module, _BatchNorm),
    "BatchNorm2d": lambda module: isinstance(module, nn.BatchNorm2d),
    "a tuple": lambda module: isinstance(module, NORM_CLASSES),
    "name": lambda module: "BatchNorm" in type(module).__name__,
    "statistics": lambda module: hasattr(module, "running_mean") and hasattr(module, "running_var"),
}


@pytest.mark.parametrize("recipe", MEAN_ONLY)
@pytest.mark.parametrize("finder", FINDERS)
def test_a_loop_that_freezes_batch_norms_freezes_mean_only_ones(finder: str, recipe: str) -> None:
    model = built(Net)
    converted = ns.swap_norms(model, recipe, example_inputs=images())
    found = []
    for one in (model, converted):
        norms = [module for module in one.train().modules() if FINDERS[finder](module)]
        for norm in norms:
            norm.eval()
            for parameter in norm.parameters():
                parameter.requires_grad = False
        found.append(len(norms))
    assert found == [2, 2]
    torch.testing.assert_close(converted(images(2)), model(images(2)))
    assert moved(converted) == []
    assert not any(p.requires_grad for n, p in converted.named_parameters() if n.startswith("bn"))


@pytest.mark.parametrize(("make", "kind"), [
    (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), nn.BatchNorm1d),
    (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), nn.BatchNorm1d),
    (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), nn.BatchNorm2d),
    (lambda: nn.Sequential(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)), nn.BatchNorm3d),
])  # fmt: skip
def test_a_mean_only_norm_is_of_the_class_that_it_replaces(make: Callable[[], nn.Module], kind: type) -> None:
    model = built(make)
    sizes = {nn.Linear: (3, 4), nn.Conv1d: (3, 4, 8), nn.Conv2d: (3, 4, 8, 8), nn.Conv3d: (3, 4, 8, 8, 8)}
    converted = ns.swap_norms(model, "mobn", example_inputs=torch.randn(sizes[type(model[0])]))
    (norm,) = (module for module in converted.modules() if isinstance(module, MeanOnlyBatchNorm))
    assert [base for base in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) if isinstance(norm, base)] == [kind]


def test_other_recipes_leave_nothing_that_moves() -> None:
    for recipe in ("gn+ws", "ln", "none", "wn"):
        converted = ns.swap_norms(built(Net), recipe, example_inputs=images()).train()
        assert not any(isinstance(module, _BatchNorm) for module in converted.modules())
        assert moved(converted) == []


@pytest.mark.parametrize("recipe", MEAN_ONLY)
def test_update_bn_estimates_the_means_of_mean_only_norms_anew(recipe: str) -> None:
    converted = ns.swap_norms(built(Net), recipe, example_inputs=images())
    batches = [images(seed) + seed for seed in range(3)]
    update_bn(batches, converted)
    means = []
    with torch.no_grad():
        for batch in batches:
            means.append(converted.conv1(batch).mean((0, 2, 3)))
    torch.testing.assert_close(converted.bn1.running_mean, torch.stack(means).mean(0))
    assert converted.bn1.num_batches_tracked == 3
    assert converted.bn1.momentum == 0.1


def test_a_norm_that_update_bn_passes_by_is_seen() -> None:
    """The negative control: with the mean of before the comparison fails."""
    converted = ns.swap_norms(built(Net), "mobn", example_inputs=images())
    before = converted.bn1.running_mean.clone()
    update_bn([images(3) + 2], converted)
    assert not torch.allclose(converted.bn1.running_mean, before)


def test_statistics_are_reset_as_those_of_a_batch_norm() -> None:
    norm, plain = MeanOnlyBatchNorm.of_rank(4)(5), nn.BatchNorm2d(5)
    for one in (norm, plain):
        one.train()(torch.randn(2, 5, 3, 3) + 1)
        assert one.running_mean.abs().min() > 0
        one.reset_running_stats()
    assert torch.equal(norm.running_mean, plain.running_mean)
    assert torch.equal(norm.running_var, plain.running_var)
    assert norm.num_batches_tracked == plain.num_batches_tracked == 0


def test_statistics_that_are_not_tracked_do_not_move() -> None:
    norm = MeanOnlyBatchNorm(5)
    norm.track_running_stats = False
    norm.train()(torch.randn(2, 5, 3, 3) + 1)
    assert not norm.running_mean.any()


@pytest.mark.parametrize("recipe", MEAN_ONLY)
def test_convert_sync_batchnorm_does_not_replace_a_mean_only_norm(recipe: str) -> None:
    converted = ns.swap_norms(built(Net), recipe, example_inputs=images())
    expected = converted(images())
    with pytest.raises(InputError, match=r"'inner\.bn1' is a mean-only BatchNorm") as caught:
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.ModuleDict({"inner": converted}))
    assert caught.value.code == "sync-mean-only"
    assert "before it is converted" in caught.value.hint
    with pytest.raises(InputError, match="the module is a mean-only"):
        nn.SyncBatchNorm.convert_sync_batchnorm(converted.bn1)
    assert isinstance(converted.bn1, MeanOnlyBatchNorm)
    assert torch.equal(converted(images()), expected)


@pytest.mark.parametrize("recipe", MEAN_ONLY)
def test_a_sync_batch_norm_becomes_a_synchronized_mean_only_norm(recipe: str) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(built(Net))
    norm = ns.swap_norms(model, recipe, example_inputs=images()).bn1
    assert isinstance(norm, MeanOnlyBatchNorm)
    assert norm.synchronized
    assert "MeanOnlyBatchNorm, synchronized" in str(ns.plan(model, recipe))


def test_no_norm_is_lost_to_convert_sync_batchnorm_after_other_recipes() -> None:
    for recipe in ("gn+ws", "ln", "none"):
        model = built(Net)
        converted = ns.swap_norms(model, recipe, example_inputs=images())
        expected = converted(images())
        torch.testing.assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(converted)(images()), expected)


def test_statistics_taken_away_are_refused() -> None:
    """As test-time adaptation and torch.func do it."""
    norm = MeanOnlyBatchNorm(4)
    for value in (None, torch.full((4,), 2.0)):
        with pytest.raises(InputError, match="running variance"):
            norm.running_var = value
    norm.running_var = torch.ones(4)


# ------------------------------------------------------------------------------------------------ fuse() of a model


def yolo(conv: nn.Module, norm: nn.Module) -> nn.Conv2d:
    """Conv and norm as one layer, by the formula of YOLO's ``fuse_conv_and_bn``."""
    fused = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, bias=True)
    with torch.no_grad():
        w_conv = conv.weight.clone().view(conv.out_channels, -1)
        w_bn = torch.diag(norm.weight.div(torch.sqrt(norm.eps + norm.running_var)))
        fused.weight.copy_(torch.mm(w_bn, w_conv).view(fused.weight.shape))
        b_conv = torch.zeros(conv.weight.size(0)) if conv.bias is None else conv.bias
        b_bn = norm.bias - norm.weight.mul(norm.running_mean).div(torch.sqrt(norm.running_var + norm.eps))
        fused.bias.copy_(torch.mm(w_bn, b_conv.reshape(-1, 1)).reshape(-1) + b_bn)
    return fused


def repvgg(conv: nn.Module, norm: nn.Module) -> nn.Conv2d:
    """The same by the formula of RepVGG's ``switch_to_deploy``."""
    fused = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, bias=True)
    std = (norm.running_var + norm.eps).sqrt()
    t = (norm.weight / std).reshape(-1, 1, 1, 1)
    fused.weight.data, fused.bias.data = conv.weight * t, norm.bias - norm.running_mean * norm.weight / std
    return fused


FUSING = {"torch": fuse_conv_bn_eval, "yolo": yolo, "repvgg": repvgg}


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize(("recipe", "how"), [
    ("mobn", "torch"), ("mobn", "yolo"), ("mobn", "repvgg"), ("wn+mobn", "yolo"), ("wn+mobn", "repvgg"),
])  # fmt: skip
def test_formulas_that_fuse_batch_norms_are_exact(recipe: str, how: str, eps: float | None) -> None:
    converted = ns.swap_norms(built(Net), recipe, example_inputs=images())
    expected = converted(images())
    for one in ("1", "2"):
        conv, norm = getattr(converted, f"conv{one}"), getattr(converted, f"bn{one}")
        if eps is not None:
            norm.eps = eps  # as YOLO sets it for all its norms
        setattr(converted, f"conv{one}", FUSING[how](conv, norm))
        setattr(converted, f"bn{one}", nn.Identity())
    torch.testing.assert_close(converted(images()), expected, atol=1e-5, rtol=1e-5)


def test_a_formula_of_another_gain_is_seen() -> None:
    converted = ns.swap_norms(built(Net), "mobn", example_inputs=images())
    fused = yolo(converted.conv1, converted.bn1)
    fused.weight.data *= 1.001
    expected = converted.bn1(converted.conv1(images()))
    assert not torch.allclose(fused(images()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", FUSING)
@pytest.mark.parametrize("recipe", ["gn+ws", "ln", "none", "wn"])
def test_a_formula_raises_where_no_batch_norm_is_left(recipe: str, how: str) -> None:
    converted = ns.swap_norms(built(Net), recipe, example_inputs=images())
    with pytest.raises((AttributeError, KeyError, TypeError, AssertionError)):
        FUSING[how](converted.conv1, converted.bn1)
    folded = ns.fold(ns.swap_norms(built(Net), "mobn", example_inputs=images()))
    with pytest.raises(AttributeError):
        FUSING[how](folded.conv1, folded.bn1)


# -------------------------------------------------------------------------------------------- groups for weight decay


def groups(model: nn.Module) -> tuple[set[str], set[str]]:
    """The names of parameters with and without weight decay, by class, as YOLO groups them."""
    norms = tuple(value for name, value in vars(nn).items() if "Norm" in name and isinstance(value, type))
    decayed, spared = set(), set()
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            (spared if "bias" in name or isinstance(module, norms) else decayed).add(full)
    return decayed, spared


@pytest.mark.parametrize("recipe", ["mobn", "wn+mobn", "gn+ws", "gn", "ln"])
def test_parameters_of_norms_are_spared_weight_decay_by_class(recipe: str) -> None:
    converted = ns.swap_norms(built(Net), recipe, example_inputs=images())
    decayed, spared = groups(converted)
    assert decayed | spared == {name for name, _ in converted.named_parameters()}
    assert not any(name.startswith("bn") for name in decayed)
    assert any(name.startswith("conv") for name in decayed)


def test_an_optimizer_with_the_constant_gain_in_it_changes_nothing() -> None:
    """Older scripts put ``bn.weight`` into a group without asking whether it is a parameter."""
    converted = ns.swap_norms(built(Net), "mobn", example_inputs=images()).train()
    norms = [module for module in converted.modules() if isinstance(module, nn.BatchNorm2d)]
    optimizer = torch.optim.SGD([norm.weight for norm in norms] + [norm.bias for norm in norms], lr=1.0)
    before = converted.bn1.bias.clone()
    converted(images()).square().sum().backward()
    optimizer.step()
    assert torch.equal(converted.bn1.weight, torch.ones(6))
    assert not torch.equal(converted.bn1.bias, before)


# ------------------------------------------------------------------------------------------------- files of before


def test_a_mean_only_norm_stores_what_it_stored_before() -> None:
    for rank in (None, 2, 4, 5):
        assert list(MeanOnlyBatchNorm.of_rank(rank)(3).state_dict()) == ["bias", "running_mean", "num_batches_tracked"]


def test_a_norm_that_was_pickled_before_it_was_a_batch_norm_works() -> None:
    norm = MeanOnlyBatchNorm(3)
    assert not {"eps", "affine", "track_running_stats", "weight", "running_var"} & {*vars(norm)}
    buffer = io.BytesIO()
    torch.save(norm, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    again.train()(torch.randn(4, 3) + 1)
    assert again.running_mean.abs().min() > 0
    assert torch.equal(again.weight, torch.ones(3))


def test_a_mean_only_norm_is_no_site_of_a_second_conversion() -> None:
    converted = ns.swap_norms(built(Net), "mobn", example_inputs=images())
    plan = ns.plan(converted, "gn")
    assert not plan.steps
    assert {skip.reason for skip in plan.skips if skip.what == "norm"} == {
        "it is a mean-only BatchNorm already, from an earlier conversion"
    }


# --------------------------------------------------------------------------------------- methods that look norms up


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def merged(conv: nn.Module, norm: nn.Module) -> Tensor:
    return conv.weight / norm.running_var.sqrt()


class Detector(Net):
    """Each method but those of ``silent`` looks for BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self._start()

    def _start(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)

    def by_isinstance(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

    def by_tuple(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, NORMS)]

    def by_type(self) -> bool:
        return type(self.bn1) is nn.BatchNorm2d

    def by_class_attribute(self) -> bool:
        return self.bn1.__class__ == nn.BatchNorm2d

    def by_name_of_class(self) -> bool:
        return type(self.bn1).__name__ in ("BatchNorm1d", "BatchNorm2d")

    def by_hasattr(self) -> bool:
        return hasattr(self.bn1, "running_mean")

    def by_statistics(self) -> Tensor:
        return self.bn1.running_var.sqrt()

    def by_function(self) -> Tensor:
        return merged(self.conv1, self.bn1)

    def by_own_method(self) -> bool:
        return self._asked()

    def _asked(self) -> bool:
        return isinstance(self.bn1, nn.modules.batchnorm._BatchNorm)

    def by_apply(self) -> None:
        def visit(module: nn.Module) -> None:
            if isinstance(module, nn.SyncBatchNorm):
                module.eval()

        self.apply(visit)

    def silent_builds_one(self) -> nn.Module:
        return nn.BatchNorm2d(6)

    def silent_asks_something_else(self, value: int) -> nn.Module:
        layer = nn.BatchNorm2d(value)
        return layer if isinstance(value, int) and type(value) is int else nn.Identity()

    def silent_reads_the_weight(self) -> Tensor:
        return self.bn1.weight

    def silent_calls_forward(self, x: Tensor) -> Tensor:
        return self.forward(x)


LOUD = sorted(name for name in vars(Detector) if name.startswith("by_"))


def test_methods_that_look_for_batch_norms_are_found_and_no_others() -> None:
    assert len(LOUD) == 10
    assert class_lookups(Detector()) == {"": tuple(f"Detector.{name}" for name in vars(Detector) if name in LOUD)}
    assert class_lookups(Net()) == {}
    assert class_lookups(nn.Sequential(Net(), Detector())).keys() == {"1"}


def test_they_are_found_without_their_source() -> None:
    scope: dict[str, Any] = {"nn": nn, "__name__": "somewhere"}
    code = "class Net(nn.Module):\n    def fuse(self):\n        return isinstance(self.bn, nn.BatchNorm2d)\n"
    exec(code, scope)
    assert class_lookups(scope["Net"]()) == {"": ("Net.fuse",)}


class Fused(Net):
    def fuse(self) -> None:
        if hasattr(self, "bn1"):
            self.conv1 = yolo(self.conv1, self.bn1)
            self.bn1 = nn.Identity()


@pytest.mark.parametrize(("recipe", "found"), [
    ("mobn", True), ("wn+mobn", True), ("ws", True), ("gn+ws", False), ("ln", False), ("none", False), ("wn", False),
])  # fmt: skip
def test_the_plan_names_methods_that_will_not_find_the_new_norm(recipe: str, found: bool) -> None:
    model = built(Fused)
    plan = ns.plan(model, recipe, example_inputs=images())
    notes = [note for step in plan.steps for note in step.notes if "Fused.fuse" in note]
    assert notes == ([] if found else ["Fused.fuse will not find it as a BatchNorm"] * 2)
    assert ns.Plan.from_json(plan.to_json()) == plan
    converted = ns.swap_norms(model, recipe, example_inputs=images())
    if not found:
        with pytest.raises(AttributeError):
            converted.fuse()
        return
    expected = converted(images())
    converted.fuse()
    torch.testing.assert_close(converted(images()), expected, atol=1e-5, rtol=1e-5)


def _norms(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, (MeanOnlyBatchNorm, ChannelAffine)))


def test_a_mean_only_norm_behind_an_affine_is_named_as_well() -> None:
    """What goes by the old name then is a sequence, which the method does not know."""

    class NoLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x)

        def fuse(self) -> Tensor:
            return self.bn.running_var.sqrt()

    result = ns.convert(built(NoLayer), "mobn", example_inputs=images())
    assert len(list(_norms(result.model))) == 2
    assert "NoLayer.fuse will not find it as a BatchNorm" in result.plan.steps[0].notes
    with pytest.raises(AttributeError):
        result.model.fuse()


def test_the_helpers_of_tests_tell_mean_only_norms_from_batch_norms() -> None:
    assert is_batch_norm(nn.BatchNorm2d(2))
    assert not is_batch_norm(MeanOnlyBatchNorm.of_rank(4)(2))
    assert copy.deepcopy(MeanOnlyBatchNorm(2)).num_features == 2
