"""A number of axes that only example inputs show is held to: other inputs are refused, and never computed wrongly.

Behind ``Linear(8, 8)`` the channels of a BatchNorm1d are the layer's outputs on ``(N, 8)`` and the positions on
``(N, 8, 8)``; the original takes both (Note [Ranks that an example decided] in ``normswap.nn.rank_check``).
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, fx, nn

import normswap as ns
from normswap.errors import InputError, NothingToConvertError
from normswap.nn import ChannelAffine, RankCheck, StreamingNorm
from normswap.recipes import all_recipes

VECTORS, MAPS = torch.randn(4, 8), torch.randn(4, 8, 8)


def mlp() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    zoo.randomize_(model, 0)
    return model.eval()


def refuses(model: nn.Module, x: Tensor) -> bool:
    """Tell whether the model raises on ``x`` what torch raises for a wrong number of axes."""
    try:
        model(x)
    except (ValueError, RuntimeError, IndexError):
        return True
    return False


def distance(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((a(x) - b(x)).abs().max())


def checks(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, RankCheck)]


def without_checks(model: nn.Module) -> nn.Module:
    bare = copy.deepcopy(model)
    for name in checks(bare):
        bare.set_submodule(name, nn.Identity())
    return bare


EXACT = [name for name, recipe in all_recipes().items() if recipe.exact]
ABSORBING = [name for name in all_recipes() if name != "ws"]


@pytest.mark.parametrize("recipe", all_recipes())
def test_another_rank_than_the_examples_is_refused_where_a_layer_was_absorbed(recipe: str) -> None:
    original = mlp()
    converted = ns.swap_norms(original, recipe, example_inputs=VECTORS).eval()
    with pytest.raises(ValueError, match=r"expected an input with 2 axes, .* got 3, \(4, 8, 8\)"):
        converted(MAPS)
    assert distance(without_checks(converted), original, MAPS) > 0.1  # what it would have computed


@pytest.mark.parametrize("recipe", EXACT)
def test_what_no_layer_took_up_is_right_for_every_rank(recipe: str) -> None:
    original = mlp()
    converted = ns.swap_norms(original, recipe, example_inputs=MAPS).eval()
    assert distance(converted, original, MAPS) < 1e-5
    assert distance(converted, original, VECTORS) < 1e-5
    next(m for m in converted.modules() if isinstance(m, (ChannelAffine, StreamingNorm))).bias.data[0] += 1
    assert distance(converted, original, VECTORS) > 1e-2  # negative control


@pytest.mark.parametrize("given", [None, MAPS, VECTORS], ids=["no inputs", "maps", "vectors"])
@pytest.mark.parametrize("converted_with", [VECTORS, MAPS], ids=["from vectors", "from maps"])
@pytest.mark.parametrize("recipe", [name for name, recipe in all_recipes().items() if not recipe.needs_layer])
def test_a_folded_model_is_right_or_refuses(recipe: str, converted_with: Tensor, given: Tensor | None) -> None:
    converted = ns.swap_norms(mlp(), recipe, example_inputs=converted_with).eval()
    if given is not None and refuses(converted, given):
        with pytest.raises(InputError, match="expected an input with 2 axes"):
            ns.fold(converted, example_inputs=given)
        return
    folding = ns.fold_with_report(converted, example_inputs=given)
    assert folding.check is not None
    held = converted_with if given is None else given
    assert distance(folding.model, converted, held) < 1e-5
    other = MAPS if held is VECTORS else VECTORS
    assert refuses(folding.model, other)
    assert not any(type(module).__module__.startswith("normswap") for module in folding.model.modules())
    assert f"inputs of {held.ndim} axes" in str(folding)  # it says so


def test_the_fold_of_a_model_that_was_not_converted_holds_the_rank() -> None:
    original = mlp()
    folded = ns.fold(original, example_inputs=VECTORS)
    assert distance(folded, original, VECTORS) < 1e-5
    assert refuses(folded, MAPS)
    bare = copy.deepcopy(folded)
    bare[1] = nn.Identity()
    assert distance(bare, original, MAPS) > 0.3  # negative control


def test_the_reports_are_as_written() -> None:
    result = ns.convert(mlp(), "wn+mobn", example_inputs=VECTORS)
    assert result.plan.steps[0].notes == ("takes inputs of 2 axes alone, as the example inputs have",)
    rows = ns.fold_with_report(result.model.eval()).rows
    assert [row.result for row in rows] == [
        "a plain weight",
        "part of 0",
        "a Flatten(-1, 1), which lets inputs of 2 axes through alone",
    ]
    alone = ns.fold_with_report(ns.swap_norms(mlp(), "none", example_inputs=MAPS).eval())
    assert [row.result for row in alone.rows] == [
        "a depthwise 1×1 Conv1d for inputs of 3 axes alone, as the example inputs have"
    ]


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 8, 8)),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), torch.randn(2, 3, 8)),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4)), torch.randn(2, 3, 4)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)), torch.randn(2, 3, 8, 8)),
    ],
    ids=["2d", "1d", "flattened", "sync"],
)
def test_what_the_graph_shows_needs_no_check(model: nn.Module, x: Tensor) -> None:
    zoo.randomize_(model, 0)
    converted = ns.swap_norms(model.eval(), "gn", example_inputs=x, group_size=2)
    assert not checks(converted)
    assert not any(isinstance(module, nn.Flatten) and module.start_dim == -1 for module in ns.fold(model).modules())


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("running_mean", torch.randn(8))
        self.register_buffer("running_var", torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.fc(x), self.running_mean, self.running_var, training=self.training)


def test_a_call_of_batch_norm_is_held_to_its_rank_and_refused_where_it_stays() -> None:
    model = Functional().eval()
    converted = ns.swap_norms(model, "wn+mobn", example_inputs=VECTORS).eval()
    assert distance(converted, model, VECTORS) < 1e-5
    assert refuses(converted, MAPS)
    with pytest.raises(NothingToConvertError, match="only the example inputs show how many axes"):
        ns.convert(model, "ws", example_inputs=VECTORS)


def test_a_layer_behind_the_norm_that_takes_it_up_is_held_to_the_rank() -> None:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    zoo.randomize_(model, 0)
    converted = ns.swap_norms(model, "none", example_inputs=VECTORS).eval()
    assert distance(converted, model, VECTORS) < 1e-5
    assert refuses(converted, MAPS)
    assert distance(without_checks(converted), model, MAPS) > 0.1


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.same = self.bn

    def forward(self, x: Tensor) -> Tensor:
        return self.same(self.fc(x))


@pytest.mark.parametrize("recipe", ["gn", "ws"])
def test_a_norm_under_two_names_is_held_to_its_rank_under_both(recipe: str) -> None:
    converted = ns.swap_norms(TwoNames().eval(), recipe, example_inputs=VECTORS)
    assert converted.bn is converted.same
    assert refuses(converted, MAPS)
    assert not refuses(converted, VECTORS)


@pytest.mark.parametrize("training", [False, True])
def test_the_norm_that_stays_keeps_its_mode_and_its_hooks(training: bool) -> None:
    model, seen = mlp().train(training), []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    converted = ns.swap_norms(model, "ws", example_inputs=VECTORS)
    assert converted[1].norm.training is training
    seen.clear()
    converted(VECTORS)
    assert seen == [1]


def test_a_check_survives_copies_files_traces_and_scripts(tmp_path: Path) -> None:
    converted = ns.swap_norms(mlp(), "gn", example_inputs=VECTORS).eval()
    ns.save(converted, tmp_path / "a.safetensors")
    for again in (
        copy.deepcopy(converted),
        pickle.loads(pickle.dumps(converted)),
        ns.load(tmp_path / "a.safetensors").eval(),
        fx.symbolic_trace(converted),
    ):
        assert distance(again, converted, VECTORS) == 0
        assert refuses(again, MAPS)
    program = torch.export.export(converted, (VECTORS,))
    assert "flatten" not in str(program.graph)
    assert torch.equal(program.module()(VECTORS), converted(VECTORS))


def test_a_folded_model_exports(tmp_path: Path) -> None:
    folded = ns.fold(ns.swap_norms(mlp(), "gn", example_inputs=VECTORS).eval())
    artifact = ns.export_onnx(folded, tmp_path / "a.onnx", example_inputs=VECTORS)
    assert artifact.verification is not None
    assert artifact.verification.ok


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_the_module_that_stands_for_a_check_lets_one_rank_through(rank: int) -> None:
    plain = RankCheck(rank).plain()
    for axes in (1, 2, 3, 4, 5, 6):
        x = torch.randn(*(2,) * axes)
        if axes == rank:
            assert torch.equal(plain(x), x)
            assert torch.equal(RankCheck(rank)(x), x)
        else:
            assert refuses(plain, x)
            assert refuses(RankCheck(rank), x)
