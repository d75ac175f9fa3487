"""A BatchNorm checkpoint becomes one of the converted model, and back: the same function, and the same values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import BY_NAME, SMALL
from torch import Tensor, nn
from zoo import randomize_

import normswap as ns
from normswap.errors import InputError, NothingToConvertError
from normswap.loading import load_model

EXACT = [name for name, recipe in ns.all_recipes().items() if recipe.exact]
NETWORKS = (
    "conv_bn_relu_chain", "residual_block", "preactivation", "norm_first", "pair_called_twice", "aliases",
    "depthwise_separable", "transposed_conv2d_grouped", "linear_after_flatten", "conv3d", "dead_channels",
    "norm_drop_act_subclass", "functional_and_module_mix", "functional_without_layer", "float64", "no_affine",
    "frozen_batchnorm",
)  # fmt: skip


def later(model: nn.Module) -> nn.Module:
    """The same network after more training: all its values are others."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in other.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
                tensor.mul_(1 + 0.1 * noise.abs() if "var" in name else 1 + 0.1 * noise)
                if "var" not in name:
                    tensor.add_(0.05 * noise.roll(1))
    return other.eval()


def outputs(model: nn.Module, entry: Any) -> Any:
    with torch.no_grad():
        return entry.run(copy.deepcopy(model).eval(), entry.inputs)


def first(found: Any) -> Tensor:
    while not isinstance(found, Tensor):
        found = next(iter(found.values() if isinstance(found, dict) else found))
    return found


def far(found: Any, expected: Any) -> float:
    a, b = first(found).detach().double(), first(expected).detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("recipe", EXACT)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_later_checkpoint_goes_there_and_back(name: str, recipe: str) -> None:
    """There: the function of the later network. Back: its values, but where γ and W cannot be told apart by them."""
    entry = BY_NAME[name]
    model = entry.model().eval()
    with SMALL:
        try:
            result = ns.convert(model, recipe, example_inputs=entry.inputs(), check=False)
        except NothingToConvertError:
            pytest.skip("no norm of it can be converted by this recipe")
        new = later(model)
        there = ns.migrate_state_dict(new.state_dict(), result)
        assert (there.to, there.exact) == ("converted", True)
        converted = copy.deepcopy(result.model)
        converted.load_state_dict(there.state)
        expected = outputs(new, entry)
        assert far(outputs(converted, entry), expected) < 2e-5  # as every exact conversion in float32
        assert far(outputs(result.model, entry), expected) > 1e-3 or name in ("dead_channels",)  # it is another network
        try:
            back = ns.migrate_state_dict(there.state, result)
        except InputError as refusal:
            if refusal.code != "not-representable" or name not in ("no_affine", "functional_and_module_mix"):
                raise
            return
    assert back.to == "batchnorm"
    again = copy.deepcopy(model)
    again.load_state_dict(back.state)
    assert far(outputs(again, entry), expected) < 2e-5


@pytest.mark.parametrize("recipe", EXACT)
@pytest.mark.parametrize("name", NETWORKS[:15])
def test_the_checkpoint_of_the_conversion_comes_back_with_its_values(name: str, recipe: str) -> None:
    entry = BY_NAME[name]
    model = entry.model().double().eval()
    with SMALL:
        try:
            inputs = tuple(x.double() if x.is_floating_point() else x for x in entry.inputs())
            result = ns.convert(model, recipe, example_inputs=inputs, check=False)
        except NothingToConvertError:
            pytest.skip("no norm of it can be converted by this recipe")
        back = ns.migrate_state_dict(result.model.state_dict(), result).state
    dead = name == "dead_channels"  # γ = 0 leaves nothing of W in W' = γ/σ·W
    for key, value in model.state_dict().items():
        if not value.is_floating_point() or dead:
            continue
        error = (back[key] - value).abs().max() / value.abs().max().clamp(min=1e-30)
        assert float(error) < 1e-6, key


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16)]
        return randomize_(nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 5)), seed + 1).eval()


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_an_inexact_recipe_is_what_a_conversion_without_data_gives_and_says_so() -> None:
    model, new = net(), net(1)
    result = ns.convert(model, "gn+ws", calibration=X)
    found = ns.migrate_state_dict(new.state_dict(), result)
    assert not found.exact
    assert "not exact" in str(found)
    loaded = copy.deepcopy(result.model)
    loaded.load_state_dict(found.state)
    expected = ns.convert(new, "gn+ws", plan=result.plan).model
    assert far(loaded(X), expected(X)) < 1e-5
    assert far(result.model(X), expected(X)) > 1e-2
    with pytest.raises(InputError, match="inexact-recipe"):
        ns.migrate_state_dict(result.model.state_dict(), result)


def test_a_trained_converted_model_goes_back() -> None:
    for recipe in EXACT:
        result = ns.convert(net(), recipe, example_inputs=(X,))
        trained = later(result.model)
        back = net(2)
        back.load_state_dict(ns.migrate_state_dict(trained.state_dict(), result, to="batchnorm").state)
        assert far(back(X), trained(X)) < 1e-5
        assert far(net(2)(X), trained(X)) > 1e-2


def test_a_conversion_from_a_file_and_one_of_two_steps(tmp_path: Path) -> None:
    model, new = net(), net(1)
    ns.save(ns.convert(model, "wn+mobn").model, tmp_path / "m.safetensors")
    loaded = ns.load(tmp_path / "m.safetensors")
    there = ns.migrate_state_dict(new.state_dict(), loaded)
    loaded.load_state_dict(there.state)
    assert far(loaded(X), new(X)) < 1e-5
    back = net()
    back.load_state_dict(ns.migrate_state_dict(there.state, loaded).state)
    assert far(back(X), new(X)) < 1e-5
    twice = ns.convert(ns.convert(model, "wn", include=["1"]).model, "mobn")
    found = ns.migrate_state_dict(new.state_dict(), twice)
    twice.model.load_state_dict(found.state)
    assert far(twice.model(X), new(X)) < 1e-5
    again = net()
    again.load_state_dict(ns.migrate_state_dict(found.state, twice).state)
    assert far(again(X), new(X)) < 1e-5


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("dim", [0, 1, 2, -1, None])
def test_legacy_weight_norm_and_its_parametrization_exchange_state_dicts(dim: int | None) -> None:
    def both() -> tuple[nn.Module, nn.Module]:
        old = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3), dim=dim))
        new = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3), dim=dim))
        return old, new

    for source, target in (both(), both()[::-1]):
        assert far(source(X), target(X)) > 1e-2
        found = ns.migrate_state_dict(source.state_dict(), target)
        assert found.to == "renamed"
        target.load_state_dict(found.state)
        assert far(target(X), source(X)) < 1e-6
        assert ns.migrate_state_dict(target.state_dict(), target).state.keys() == target.state_dict().keys()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_file_of_the_parametrization_loads_into_an_architecture_with_the_old_weight_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    torch.save(new.state_dict(), tmp_path / "new.pt")
    (tmp_path / "old_arch.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n    return nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3)))\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert far(load_model(tmp_path / "new.pt", arch="old_arch:net")(X), new(X)) < 1e-6


def test_what_does_not_fit_is_refused() -> None:
    model = net()
    result = ns.convert(model, "wn")
    state = model.state_dict()
    for old, target, options, code in (
        ({**state, "extra": X}, result, {}, "state-dict-mismatch"),
        ({name: value for name, value in state.items() if name != "1.bias"}, result, {}, "state-dict-mismatch"),
        ({**state, "1.bias": X}, result, {}, "state-dict-mismatch"),
        (state, result, {"to": "batchnorm"}, "state-dict-mismatch"),
        (state, result, {"to": "wn"}, "unknown-form"),
        (state, nn.Linear(2, 2), {}, "state-dict-mismatch"),
        (state, 3, {}, "not-a-model"),
        (3, result, {}, "no-state-dict"),
    ):
        with pytest.raises(InputError) as caught:
            ns.migrate_state_dict(old, target, **options)
        assert caught.value.code == code
        assert caught.value.hint


WRAPPED: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "DistributedDataParallel": lambda model: nn.DataParallel(model).state_dict(),  # the same names, without processes
    "compile": lambda model: {f"_orig_mod.{name}": value for name, value in model.state_dict().items()},
    "AveragedModel": lambda model: torch.optim.swa_utils.AveragedModel(model).state_dict(),
    "both": lambda model: torch.optim.swa_utils.AveragedModel(nn.DataParallel(model)).state_dict(),
}


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_names_of_a_wrapper_are_understood_both_ways(wrapped: Callable[[nn.Module], dict[str, Any]]) -> None:
    result, other = ns.convert(model := net(), "wn+mobn"), later(net())
    assert wrapped(other).keys() != other.state_dict().keys()
    expected, found = (ns.migrate_state_dict(one(other), result).state for one in (nn.Module.state_dict, wrapped))
    assert found.keys() == expected.keys() == result.model.state_dict().keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    back = ns.migrate_state_dict(wrapped(result.model), result).state
    assert back.keys() == model.state_dict().keys()


def test_of_two_networks_in_one_state_dict_none_is_taken() -> None:
    result, state = ns.convert(net(), "wn"), net().state_dict()
    both = {f"{network}.{name}": value for network in ("student", "teacher") for name, value in state.items()}
    both["teacher.1.bias"] = both["teacher.1.bias"] + 1
    with pytest.raises(InputError, match="does not fit"):
        ns.migrate_state_dict(both, result)


def test_a_mean_only_model_says_what_to_do_with_a_batchnorm_checkpoint() -> None:
    result = ns.convert(net(), "mobn")
    with pytest.raises(RuntimeError, match=r"normswap\.migrate_state_dict"):
        result.model.load_state_dict(net().state_dict())
    result.model.load_state_dict(result.model.state_dict())


class LastAxis(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def network_over_the_last_axis() -> nn.Module:
    return randomize_(nn.Sequential(nn.Linear(6, 5), LastAxis(5), nn.ReLU(), nn.Linear(5, 3)), 0).eval()


@pytest.mark.parametrize("recipe", EXACT)
def test_a_norm_that_was_opened_goes_there_and_back(recipe: str) -> None:
    """A subclass that moves the axes: its tensors have other names in the converted model, and the old ones again."""
    model, x = network_over_the_last_axis(), torch.randn(4, 5, 6)
    converted = ns.swap_norms(model, recipe, example_inputs=x)
    other = later(model)
    there = ns.migrate_state_dict(other.state_dict(), converted)
    again = copy.deepcopy(converted)
    again.load_state_dict(there.state)
    assert there.exact
    with torch.no_grad():
        torch.testing.assert_close(again(x), other(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(converted(x), other(x), atol=1e-2)
    back = ns.migrate_state_dict(there.state, again)
    assert back.state.keys() == model.state_dict().keys()
    restored = network_over_the_last_axis()
    restored.load_state_dict(back.state)
    with torch.no_grad():
        torch.testing.assert_close(restored(x), other(x), rtol=1e-5, atol=1e-5)


def test_recipes_per_site_go_there_and_back() -> None:
    entry = BY_NAME["residual_block"]
    model = entry.model(0).eval()
    names = [step.site.norm for step in ns.plan(model, "wn").steps]
    converted = ns.swap_norms(model, {names[0]: "wn+mobn", names[1]: "none", "*": "wn"})
    other = later(model)
    there = ns.migrate_state_dict(other.state_dict(), converted)
    again = copy.deepcopy(converted)
    again.load_state_dict(there.state)
    assert there.exact
    with torch.no_grad():
        assert far(entry.run(again.eval(), entry.inputs), entry.run(other, entry.inputs)) < 1e-5
    back = ns.migrate_state_dict(there.state, again)
    restored = copy.deepcopy(model)
    restored.load_state_dict(back.state)
    with torch.no_grad():
        assert far(entry.run(restored.eval(), entry.inputs), entry.run(other, entry.inputs)) < 1e-5


class Tagger(nn.Module):
    """A convolution with a norm, and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.lstm, self.fc = nn.LSTM(6, 8, batch_first=True, bidirectional=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(torch.relu(self.bn(self.conv(x))).transpose(1, 2))[0])


@pytest.mark.parametrize("to", ["wn+mobn", None])
def test_recurrent_layers_go_there_and_back(to: str | None) -> None:
    model, x = randomize_(Tagger(), 0).eval(), torch.randn(4, 4, 9)
    converted = ns.swap_norms(model, to, recurrent="wn", example_inputs=x)
    other = later(model)
    there = ns.migrate_state_dict(other.state_dict(), converted)
    again = ns.swap_norms(model, to, recurrent="wn", example_inputs=x)
    again.load_state_dict(there.state)
    with torch.no_grad():
        torch.testing.assert_close(again(x), other(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(converted(x), other(x), atol=1e-2)
    back = ns.migrate_state_dict(there.state, again)
    restored = Tagger().eval()
    restored.load_state_dict(back.state)
    with torch.no_grad():
        torch.testing.assert_close(restored(x), other(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recurrent", ["ln", "ws", "bn"])
def test_recurrent_layers_that_got_their_values_from_data_do_not_go_there_and_only_exact_ones_back(
    recurrent: str,
) -> None:
    model, x = randomize_(Tagger(), 0).eval(), torch.randn(40, 4, 9)
    converted = ns.swap_norms(model, None, recurrent=recurrent, calibration=x)
    with pytest.raises(InputError, match=f"'lstm' got its values from calibration data, for recurrent='{recurrent}'"):
        ns.migrate_state_dict(model.state_dict(), converted)
    if recurrent != "bn":
        with pytest.raises(InputError, match=f"recurrent='{recurrent}' is not exact"):
            ns.migrate_state_dict(converted.state_dict(), converted)
        return
    back = ns.migrate_state_dict(later(converted).state_dict(), converted)
    restored = Tagger().eval()
    restored.load_state_dict(back.state)
    with torch.no_grad():
        torch.testing.assert_close(restored(x), later(converted).eval()(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(restored(x), model(x), atol=1e-2)


@pytest.mark.parametrize("recurrent", ["wn", "aws"])
def test_an_optimizer_goes_on_training_recurrent_layers(recurrent: str) -> None:
    model, x = randomize_(Tagger(), 0), torch.randn(4, 4, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    result = ns.convert(model.eval(), None, recurrent=recurrent, example_inputs=x)
    found = ns.migrate_optimizer(optimizer, result)
    held = {id(p) for group in found.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in result.model.parameters()}
    rows = {row.parameter: row.what for row in found.rows}
    assert (
        rows["lstm.parametrizations.weight_hh_l0.original1" if recurrent == "wn" else "lstm.bias_hh_l0"] == "unchanged"
    )
    assert "fresh" not in rows.values()


def test_the_parameters_of_a_layer_in_a_recurrent_layers_place_are_held_and_start_afresh() -> None:
    model, x = randomize_(Tagger(), 0), torch.randn(40, 4, 9)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).square().mean().backward()
    optimizer.step()
    result = ns.convert(model.eval(), None, recurrent="ln", calibration=x)
    found = ns.migrate_optimizer(optimizer, result)
    held = {id(p) for group in found.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in result.model.parameters()}
    assert {row.what for row in found.rows if row.parameter.startswith("lstm.weight")} == {"fresh"}
