"""Running statistics over a loader are those of all its samples, and nothing else of the model changes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from laws import changed, fingerprint
from torch import Tensor, nn
from zoo import FrozenBatchNorm2d, randomize_

import normswap as ns
from normswap.errors import InitializationError, InputError


def batches(sizes: tuple[int, ...] = (5, 3, 2, 7)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(n, 3, 6, 6, generator=generator, dtype=torch.float64) * (i + 1) + i for i, n in enumerate(sizes)
    ]


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 3)]
        layers.append(nn.BatchNorm2d(5))
        return randomize_(nn.Sequential(*layers), 1).double()


def seen(model: nn.Module, name: str, data: list[Tensor]) -> np.ndarray:
    """All values that reach a norm, (C, n), the norms in front of it in train mode."""
    model, found = randomless(model), []
    module = model.get_submodule(name)
    module.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    for batch in data:
        model(batch)
    return np.concatenate([x.numpy().transpose(1, 0, 2, 3).reshape(x.shape[1], -1) for x in found], axis=1)


def randomless(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return model


@pytest.mark.parametrize("to", [None, "wn+mobn", "mobn", "ws"])
def test_they_are_the_mean_and_variance_of_all_values(to: str | None) -> None:
    model = net() if to is None else ns.swap_norms(net(), to)
    data = batches()
    expected = {name: seen(model, name, data) for name in ("1", "5")}
    found = ns.update_statistics(model, data)
    assert found.updated == ("1", "5")
    assert found.samples == 17
    for name, values in expected.items():
        norm = model.get_submodule(name)
        np.testing.assert_allclose(norm.running_mean.numpy(), values.mean(1), rtol=1e-12)
        assert int(norm.num_batches_tracked) == 4
        if "running_var" in dict(norm.named_buffers()):
            np.testing.assert_allclose(norm.running_var.numpy(), values.var(1, ddof=1), rtol=1e-12)


def test_a_mean_of_the_batches_variances_is_something_else() -> None:
    """The negative control: what torch's update_bn finds, on batches whose means differ."""
    ours, torchs, data = net(), net(), batches()
    ns.update_statistics(ours, data)
    torch.optim.swa_utils.update_bn(data, torchs)
    assert not torch.allclose(ours[1].running_var, torchs[1].running_var, rtol=0.05)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_else_changes(training: bool) -> None:
    model = net().train(training)
    model[3].eval()
    before = fingerprint(model)
    ns.update_statistics(model, batches())
    names = {"running_mean", "running_var", "num_batches_tracked"}
    assert changed(before, fingerprint(model)) == {f"tensor {i}.{name}" for i in (1, 5) for name in names}


def test_frozen_norms_and_those_not_reached_are_left_with_the_reason() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.BatchNorm2d(3), FrozenBatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)
    )
    model.train().double()
    model[0].eval()
    model.add_module("aside", nn.ModuleList([nn.BatchNorm2d(3)]))
    model.forward = lambda x: model[3](model[2](model[1](model[0](x))))  # type: ignore[method-assign]
    before = fingerprint(model)
    found = ns.update_statistics(model, batches())
    assert dict(found.left) == {
        "0": "is frozen",
        "2": "is frozen",
        "3": "stores no statistics",
        "aside.0": "the data does not reach it",
    }
    assert {name.split(" ")[1].split(".")[0] for name in changed(before, fingerprint(model))} == {"1"}
    assert "aside.0 left: the data does not reach it" in str(found)


def test_labels_are_left_out_and_a_function_may_call_the_model() -> None:
    first, second, data = net(), net(), batches()
    assert ns.update_statistics(first, [(x, torch.zeros(len(x))) for x in data]).notes
    ns.update_statistics(second, [{"image": x} for x in data], forward_fn=lambda model, batch: model(batch["image"]))
    assert torch.equal(first[5].running_var, second[5].running_var)


def test_bad_data_leaves_the_model_as_it_was() -> None:
    model, linear = net(), nn.Linear(2, 2)
    with torch.no_grad():
        broken = net()
        broken[0].weight[0, 0, 0, 0] = float("inf")
    before = fingerprint(model)
    for one, data, kind, code in (
        (model, [], InputError, "no-data"),
        (model, [torch.full((2, 3, 6, 6), float("nan")).double()], InputError, "inputs-not-finite"),
        (model, [torch.ones(2, 7, 6, 6).double()], InputError, "inputs-do-not-run"),
        (model, 3, InputError, "inputs-type"),
        (linear, [torch.ones(1, 2)], InputError, "no-statistics"),
        (broken, batches(), InitializationError, "not-finite"),
    ):
        with pytest.raises(kind) as caught:
            ns.update_statistics(one, data)
        assert caught.value.code == code
    assert not changed(before, fingerprint(model))


def test_a_last_batch_of_one_sample_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match="batch 2 gives a norm one value per channel") as caught:
        ns.update_statistics(model, [torch.randn(4, 3), torch.randn(4, 3), torch.randn(1, 3)])
    assert caught.value.code == "one-sample"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ns.update_statistics(model, [torch.randn(4, 3), torch.randn(2, 3)])
