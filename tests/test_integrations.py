"""Other people's training loops: a swap in the middle of them, and what follows; ``docs/training.md`` has the table."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from integrations import FRAMEWORKS, Loop, Opacus, needs
from torch import nn

import normswap as ns

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda name: FRAMEWORKS[name](tmp_path_factory.mktemp("loop")))


@pytest.fixture(params=FRAMEWORKS)
def loop(request: pytest.FixtureRequest, loops: Any) -> Loop:
    found: Loop = loops(request.param)
    return found


def state(loop: Loop, model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in loop.network(model).state_dict().items()}


def output(loop: Loop, model: Any) -> torch.Tensor:
    loop.network(model).eval()
    with torch.no_grad():
        return loop.forward(model)


def test_convert(loop: Loop) -> None:
    model, result = loop.convert()
    assert result.plan.steps
    assert not [skip for skip in result.plan.skips if skip.what == "norm"]
    left = [m for m in loop.network(model).modules() if type(m) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)]
    assert not left


def test_train(loop: Loop) -> None:
    model, _ = loop.convert()
    before = state(loop, model)
    loop.train(model, 2)
    after = state(loop, model)
    assert all(bool(value.isfinite().all()) for value in after.values())
    trained = [name for name, p in loop.network(model).named_parameters() if p.requires_grad]
    moved = [name for name in trained if not torch.equal(before[name], after[name])]
    assert len(moved) > 0.9 * len(trained) > 0


def test_save(loop: Loop) -> None:
    model, result = loop.convert()
    path = loop.train(model, 2)
    loaded = loop.load(path, result)
    assert torch.equal(output(loop, loaded), output(loop, model))
    assert not torch.equal(output(loop, loop.convert()[0]), output(loop, model))  # the control: training has done much


def test_resume(loop: Loop) -> None:
    whole, result = loop.convert()
    loop.train(whole, 4)
    path = loop.train(loop.convert()[0], 2)
    again = loop.rebuilt(result)
    loop.train(again, 4, resume=path)
    if loop.repeatable:
        found, expected = state(loop, again), state(loop, whole)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_deploy(loop: Loop) -> None:
    model, _ = loop.convert()
    loop.train(model, 2)
    expected = output(loop, model)
    folding = ns.fold_with_report(loop.network(model).eval())
    assert not folding.left
    with torch.no_grad():
        torch.testing.assert_close(loop.forward(folding.model), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------ what each of them is told


def test_hugging_faces_own_loading_makes_batch_norms(loops: Any) -> None:
    loop = loops("Hugging Face")
    model, _ = loop.convert()
    model.save_pretrained(loop.folder / "saved")
    wrong = type(model).from_pretrained(loop.folder / "saved")
    expected = output(loop, model)
    assert (output(loop, wrong) - expected).norm() > 0.1 * expected.norm()
    ns.save(model, loop.folder / "model.safetensors")
    again = ns.load(loop.folder / "model.safetensors", model=type(model)(model.config))
    assert torch.equal(output(loop, again), expected)


def test_a_lightning_callback_converts_before_the_optimizer_is_made(loops: Any) -> None:
    loop = loops("Lightning")
    model = loop.module()
    loop.train(model, 2)
    assert isinstance(model.net[0][1], nn.GroupNorm)
    held = {id(p) for group in model.trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(("to", "mode"), [("gn+ws", "ew"), ("wn", "ew"), ("wn+mobn", "hooks")])
def test_what_opacus_refuses_it_refuses_in_words(to: str, mode: str, loops: Any) -> None:
    loop: Opacus = loops("Opacus")
    model = ns.swap_norms(loop.build().eval(), to).train()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"Expanded Weights|buffers"):
        run_privately(model, mode)


@pytest.mark.parametrize(("to", "mode"), [("gn+ws", "hooks"), ("wn", "hooks"), ("gn+ws", "functorch"), ("ln", "ew")])
def test_what_opacus_takes(to: str, mode: str, loops: Any) -> None:
    run_privately(ns.swap_norms(loops("Opacus").build().eval(), to).train(), mode)


def run_privately(model: nn.Module, mode: str) -> None:
    opacus = needs("opacus")
    from integrations import IMAGES, LABELS

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, LABELS), 16)
    module, optimizer, private = opacus.PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), data_loader=loader, noise_multiplier=1.0,
        max_grad_norm=1.0, poisson_sampling=False, grad_sample_mode=mode,
    )  # fmt: skip
    for x, labels in private:
        nn.functional.cross_entropy(module(x), labels).backward()
        optimizer.step()


def test_a_folded_yolo_needs_no_fuse(loops: Any) -> None:
    loop = loops("ultralytics")
    model, _ = loop.convert()
    folded = ns.fold(model.eval())
    folded.fuse = lambda *_, **__: folded  # what ultralytics' predictors and validators call
    assert torch.equal(loop.forward(folded.fuse(verbose=False)), loop.forward(ns.fold(model)))
    with pytest.raises(AttributeError, match="running_mean"):
        model.fuse(verbose=False)


def test_a_policy_says_that_it_holds_an_optimizer(loops: Any) -> None:
    loop = loops("stable-baselines3")
    _, result = loop.convert()
    assert "the model holds an optimizer, 'optimizer'" in str(result.init)
