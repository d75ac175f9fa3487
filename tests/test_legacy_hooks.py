"""What a verb wrote every verb reads: all verbs × everything that may compute a layer's weight."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooked import HOOKS, KINDS, LEGACY, net
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from typer.testing import CliRunner

import normswap as ns
from normswap.cli import app
from normswap.errors import ExportError, InputError
from normswap.loading import load_model
from normswap.nn.plain import legacy_hooks

PLACES = [0, 3]
STEADY = [kind for kind in KINDS if kind != "noisy"]
FOLDS = [kind for kind in STEADY if kind != "a user's hook"]
RECIPES = ["wn+mobn", "none", "gn+ws"]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def images(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-5, rtol=1e-4)


def is_plain(model: nn.Module) -> bool:
    """Whether every tensor of the model is one of torch's plain layers."""
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks, *m._load_state_dict_pre_hooks)]
    hooks += [h for m in model.modules() for h in m._state_dict_hooks]
    return not (
        hooks or any(map(parametrize.is_parametrized, model.modules())) or any(n.endswith(LEGACY) for n in names)
    )


# ------------------------------------------------------------------------------------------------------------- fold


def by_numpy(kind: str, layer: nn.Module) -> np.ndarray[Any, Any]:
    """The weight that a layer computes in evaluation, by the equations."""
    t = {name: value.detach().double().numpy() for name, value in layer.state_dict().items()}
    if kind == "spectral norm, legacy":
        rows = t["weight_orig"].reshape(len(t["weight_orig"]), -1)
        return t["weight_orig"] / (t["weight_u"] @ rows @ t["weight_v"])
    if kind == "spectral norm":
        original = t["parametrizations.weight.original"]
        u, v = t["parametrizations.weight.0._u"], t["parametrizations.weight.0._v"]
        return original / (u @ original.reshape(len(original), -1) @ v)
    if kind == "weight norm, legacy":
        norm = np.sqrt((t["weight_v"] ** 2).sum((1, 2, 3), keepdims=True))
        return t["weight_v"] * t["weight_g"] / norm
    return t["weight_orig"] * t["weight_mask"]


@pytest.mark.parametrize("kind", ["spectral norm, legacy", "spectral norm", "weight norm, legacy", "pruned"])
def test_the_folded_weight_is_that_of_the_equation(kind: str) -> None:
    model = net(kind, 3)
    expected = by_numpy(kind, model[3])
    found = ns.fold(model, example_inputs=images())[3].weight
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(found.detach().numpy(), expected * 1.001, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", FOLDS)
def test_a_fold_leaves_plain_weights_and_the_output(kind: str, place: int) -> None:
    model = net(kind, place)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not is_plain(model)  # the negative control
    folding = ns.fold_with_report(model, example_inputs=images())
    assert same(folding.model(images(2)), model(images(2)))
    assert is_plain(folding.model)
    assert not folding.left
    assert [row.name for row in folding.rows if row.result == "a plain weight"]
    assert isinstance(folding.model[1], nn.Identity)  # the BatchNorm went into the plain weight
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = net(kind, place)
    again.load_state_dict(before)  # the model's own hooks are there as before
    folding.model.load_state_dict(copy.deepcopy(folding.model.state_dict()))


def test_a_fold_of_several_hooks_undoes_the_last_one_first() -> None:
    model = net("pruned direction", 3)
    assert [hook.tensor for hook in legacy_hooks(model[3])] == ["weight", "weight_v"]
    rows = ns.fold_with_report(model, example_inputs=images()).rows
    assert [row.name for row in rows][:2] == ["3.weight_v", "3.weight"]


@pytest.mark.parametrize("kind", HOOKS)
def test_a_frozen_weight_stays_frozen(kind: str) -> None:
    model = net(kind, 3)
    assert ns.fold(model)[3].weight.requires_grad
    for parameter in model[3].parameters():
        parameter.requires_grad_(False)
    assert not any(p.requires_grad for p in ns.fold(model)[3].parameters())


def test_a_weight_that_changes_with_each_reading_is_left_and_said_to_be() -> None:
    folding = ns.fold_with_report(net("noisy", 3), example_inputs=images())
    assert [(row.name, row.reason) for row in folding.left] == [
        ("3.weight", "weight changes from one reading to the next")
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_export_writes_a_folded_model_and_refuses_another(kind: str) -> None:
    if kind != "a user's hook":
        with pytest.raises(ExportError, match="is not folded") as error:
            ns.export_onnx(net(kind, 3), "m.onnx", example_inputs=images())
        assert "fold it first" in error.value.hint
        assert not Path("m.onnx").exists()
    if kind == "noisy":
        return
    artifact = ns.export_onnx(ns.fold(net(kind, 3), example_inputs=images()), "m.onnx", example_inputs=images())
    assert artifact.verification is not None
    assert artifact.verification.ok


# -------------------------------------------------------------------------------------------------- the whole way


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", STEADY)
def test_a_model_goes_all_the_way_in_python(kind: str, place: int, recipe: str) -> None:
    model = net(kind, place)
    converted = ns.swap_norms(model, recipe, example_inputs=images())
    expected = converted(images(2))
    if recipe != "gn+ws":
        assert same(expected, model(images(2)))
    ns.save(converted, "m.safetensors")
    loaded = ns.load("m.safetensors", model=net(kind, place))
    assert same(loaded(images(2)), expected)
    folded = ns.fold(loaded, example_inputs=images())
    assert same(folded(images(2)), expected)
    if kind == "a user's hook":
        assert len(folded[place]._forward_pre_hooks) == 1
        return
    assert is_plain(folded)
    torch.save(folded, "m.pt")
    assert same(load_model("m.pt")(images(2)), expected)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def succeed(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("kind", FOLDS)
def test_a_model_goes_all_the_way_on_the_command_line(kind: str) -> None:
    """The model comes from its architecture and a state dict, as a file of it is refused with a reason."""
    model = net(kind, 3)
    torch.save(model.state_dict(), "state.pt")
    arch = ("--arch", "hooked:net", "--arch-kwargs", f'{{"kind": "{kind}", "place": 3}}')
    shape = ("--input-shape", "2,3,9,9")
    assert "1 BatchNorm site" in succeed("inspect", "state.pt", *arch)
    shown = succeed("convert", "state.pt", "--to", "wn+mobn", "-o", "m.safetensors", *arch, *shape)
    assert "m.safetensors cannot hold the structure of this model: to read it again, give --arch" in shown
    succeed("inspect", "m.safetensors", *arch)
    succeed("verify", "state.pt", "m.safetensors", *arch, *shape)
    succeed("fold", "m.safetensors", "-o", "folded.pt", *arch, *shape)
    assert "made plain" in succeed("fold", "state.pt", "-o", "plain.pt", *arch, *shape)
    succeed("convert", "state.pt", "--to", "none", "--fold", "-o", "direct.pt", *arch, *shape)
    for file in ("folded.pt", "plain.pt", "direct.pt"):
        assert is_plain(load_model(file))
        assert same(load_model(file)(images(2)), model(images(2)))
        succeed("inspect", file)
        succeed("verify", file, "plain.pt", *shape)
        succeed("export", file, "-o", "m.onnx", *shape)
        succeed("verify", file, "m.onnx", *shape)
        succeed("fold", file, "-o", "again.pt", *shape)


def test_a_model_whose_structure_a_file_can_hold_is_read_without_its_architecture() -> None:
    """The negative control of the note."""
    torch.save(net(), "model.pt")
    assert "cannot hold" not in succeed("convert", "model.pt", "--to", "wn+mobn", "-o", "m.safetensors")
    succeed("fold", "m.safetensors", "-o", "folded.pt", "--input-shape", "2,3,9,9")


@pytest.mark.parametrize("kind", HOOKS)
def test_a_file_with_torchs_hooks_is_refused_with_what_to_do(kind: str) -> None:
    torch.save(net(kind, 3), "model.pt")
    with pytest.raises(InputError, match=r"torch\.nn\.utils") as error:
        load_model("model.pt")
    assert "remove" in error.value.hint


class Functional(nn.Module):
    """Its folded forward is a graph, which names no class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.register_buffer("running_mean", torch.zeros(6))
        self.register_buffer("running_var", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(self.conv(x), self.running_mean, self.running_var, training=self.training)


def functional() -> nn.Module:
    return nn.Sequential(Functional(), nn.ReLU()).eval()


def noisy() -> nn.Module:
    return net("noisy", 3)


@pytest.mark.parametrize(("build", "code"), [("functional", "output-unreadable"), ("noisy", "not-picklable")])
def test_what_could_not_be_read_again_is_not_written(build: str, code: str) -> None:
    torch.save(globals()[build]().state_dict(), "state.pt")
    arch = ("--arch", f"test_legacy_hooks:{build}", "--input-shape", "2,3,9,9")
    result = run("convert", "state.pt", "--to", "none", "--fold", "-o", "folded.pt", *arch)
    assert result.exit_code == 2
    assert f"error[{code}]" in result.output
    assert sorted(path.name for path in Path().iterdir()) == ["state.pt"]
    if build == "functional":
        succeed("convert", "state.pt", "--to", "none", "--fold", "-o", "folded.pt2", *arch)
        succeed("verify", "state.pt", "folded.pt2", *arch)


def test_torch_still_leaves_the_hook_that_the_fold_takes_away() -> None:
    """``remove_spectral_norm`` looks past torch's own wrapper of its load hook; the day it does not, ours can go."""
    model = net("spectral norm, legacy", 3)
    nn.utils.remove_spectral_norm(model[3])
    assert len(model[3]._load_state_dict_pre_hooks) == 1
    assert prune.is_pruned(net("pruned", 3))
