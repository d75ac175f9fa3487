"""Other people's training loops: a swap in the middle of them, and what follows; ``docs/training.md`` has the table."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations import FRAMEWORKS, IMAGES, LABELS, Loop, Opacus, needs, settled
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


def test_hugging_faces_own_loading_of_a_class_that_converts_itself(loops: Any) -> None:
    loop = loops("Hugging Face")
    model, result = loop.convert()

    class Converted(type(model)):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            ns.convert(self.eval(), plan=ns.Plan.from_json(config.normswap), inplace=True, check=False)

    model.config.normswap = result.plan.to_json()
    model.save_pretrained(loop.folder / "own")
    again, told = Converted.from_pretrained(loop.folder / "own", output_loading_info=True)
    assert not any(told.values())
    assert torch.equal(output(loop, again), output(loop, model))


def test_a_lightning_callback_converts_before_the_optimizer_is_made(loops: Any) -> None:
    loop = loops("Lightning")
    model = loop.module()
    loop.train(model, 2)
    assert isinstance(model.net[0][1], nn.GroupNorm)
    held = {id(p) for group in model.trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_lightnings_average_of_weights_gets_statistics_of_its_own(loops: Any) -> None:
    loop = loops("Lightning")
    model = loop.module()
    settled(model.net, lambda net: net(IMAGES))
    model.swap("wn+mobn")
    model.train()  # Lightning keeps modes
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, LABELS), 4)
    averaging = loop.pl.callbacks.StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    loop.pl.Trainer(max_epochs=3, accelerator="cpu", callbacks=[averaging], **quiet).fit(model, loader)
    norm = model.net[0][1]
    assert (norm.momentum, int(norm.num_batches_tracked)) == (0.1, len(loader))  # of its last pass alone
    assert 0 < norm.running_mean.abs().max() < 1


@pytest.mark.parametrize(("to", "mode"), [("gn+ws", "ew"), ("wn", "ew"), ("wn+mobn", "hooks")])
def test_what_opacus_refuses_it_refuses_in_words(to: str, mode: str, loops: Any) -> None:
    loop: Opacus = loops("Opacus")
    model = ns.swap_norms(loop.build().eval(), to).train()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"Expanded Weights|buffers"):
        run_privately(model, mode)


@pytest.mark.parametrize(("to", "mode"), [("gn+ws", "hooks"), ("wn", "hooks"), ("gn+ws", "functorch"), ("ln", "ew")])
def test_what_opacus_takes(to: str, mode: str, loops: Any) -> None:
    run_privately(ns.swap_norms(loops("Opacus").build().eval(), to).train(), mode)


PRIVATE: tuple[tuple[str, dict[str, Any]], ...] = (
    *((to, {}) for to in ("gn", "gn+ws", "gn+aws", "ln", "wn", "cosine", "none")),
    ("ln", {"axes": "channel"}),
)


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize(("to", "options"), PRIVATE, ids=str)
def test_gradients_of_samples_are_those_that_each_gives_alone(to: str, options: dict[str, Any], mode: str) -> None:
    wrap_model = needs("opacus.grad_sample").wrap_model
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
    head = (nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), nn.BatchNorm1d(6))
    model = settled(nn.Sequential(*layers, *head, nn.Linear(6, 4)), lambda net: net(IMAGES))
    model = ns.swap_norms(model, to, example_inputs=(IMAGES,), **options).train()
    alone = []
    for x, label in zip(IMAGES, LABELS, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[None]), label[None]).backward()
        alone.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    wrapped = wrap_model(model, grad_sample_mode=mode, batch_first=True, loss_reduction="mean")
    nn.functional.cross_entropy(wrapped(IMAGES), LABELS).backward()
    for p, expected in zip(model.parameters(), map(torch.stack, zip(*alone, strict=True)), strict=True):
        assert (p.grad_sample - expected).norm() < 1e-5 * expected.norm() + 1e-6
        assert len(p) == 1 or (p.grad_sample.roll(1, 0) - expected).norm() > 0.1 * expected.norm()  # the control


def run_privately(model: nn.Module, mode: str) -> None:
    opacus = needs("opacus")
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


def test_yolos_own_trainer_builds_batch_norms_and_one_of_ours_converts(tmp_path: Path, loops: Any) -> None:
    loops("ultralytics")
    from PIL import Image
    from ultralytics import YOLO
    from ultralytics.models.yolo.detect import DetectionTrainer
    from ultralytics.nn.tasks import DetectionModel

    for name, x in zip("abcd", IMAGES, strict=False):
        for folder, suffix in (("images", "png"), ("labels", "txt")):
            (tmp_path / folder).mkdir(exist_ok=True)
            path = tmp_path / folder / f"{name}.{suffix}"
            if folder == "labels":
                path.write_text("0 0.5 0.5 0.4 0.4\n")
            else:
                Image.fromarray((x.sigmoid() * 255).byte().permute(1, 2, 0).numpy()).resize((64, 64)).save(path)
    data = tmp_path / "data.yaml"
    data.write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames: {{0: a}}\n")
    how: dict[str, Any] = dict.fromkeys(("verbose", "plots", "amp"), False)
    how |= {"data": data, "project": tmp_path, "epochs": 1, "imgsz": 64, "batch": 2, "device": "cpu", "workers": 0}

    class Trainer(DetectionTrainer):  # type: ignore[misc]
        def get_model(self, *args: Any, **options: Any) -> Any:
            model = super().get_model(*args, **options)
            model.__class__ = Unfused
            return ns.swap_norms(model.eval(), "gn+ws", example_inputs=(torch.zeros(1, 3, 64, 64),))

        def save_model(self) -> Any:
            average = self.ema.ema
            self.ema.ema = ns.fold(average.eval())
            try:
                return super().save_model()
            finally:
                self.ema.ema = average

    class Unfused(DetectionModel):  # type: ignore[misc]
        def fuse(self, *args: Any, **options: Any) -> Any:
            return self

    globals()["Unfused"], Unfused.__qualname__ = Unfused, "Unfused"  # for pickle, which finds classes by their names
    yolo = YOLO("yolov8n.yaml", verbose=False)
    yolo.model = ns.swap_norms(yolo.model.eval(), "gn", example_inputs=(torch.zeros(1, 3, 64, 64),))
    yolo.train(**how)
    assert any(isinstance(module, nn.BatchNorm2d) for module in yolo.model.modules())
    yolo.train(trainer=Trainer, **how)
    again = YOLO(yolo.trainer.best).model.float().eval()
    for model in (again, yolo.trainer.model):
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    x = torch.rand(1, 3, 64, 64)
    expected = ns.fold(yolo.trainer.ema.ema.eval())(x)[0]
    assert (again(x)[0] - expected).norm() < 1e-2 * expected.norm()  # half precision: the file's


def test_a_target_network_is_converted_by_the_online_networks_plan(loops: Any) -> None:
    loop = loops("stable-baselines3")
    sb3 = needs("stable_baselines3")
    by_name = needs("stable_baselines3.common.utils").get_parameters_by_name
    policy = loop.make()
    agent = sb3.DQN(
        "MlpPolicy", policy.env, learning_starts=8, train_freq=4, batch_size=8, device="cpu", seed=0,
        policy_kwargs=policy.policy_kwargs, target_update_interval=32,
    )  # fmt: skip
    agent.learn(64)
    agent.policy.set_training_mode(False)
    before = agent.q_net(*loop.example())
    assert len(agent.policy.optimizer.state)
    result = ns.convert(agent.q_net, "wn+mobn", example_inputs=loop.example(), inplace=True)
    ns.convert(agent.q_net_target, plan=result.plan, example_inputs=loop.example(), inplace=True)
    agent.q_net_target.load_state_dict(agent.q_net.state_dict())
    ns.migrate_optimizer(agent.policy.optimizer, result, inplace=True)
    agent.batch_norm_stats = by_name(agent.q_net, ["running_"])
    agent.batch_norm_stats_target = by_name(agent.q_net_target, ["running_"])
    torch.testing.assert_close(agent.q_net(*loop.example()), before, rtol=1e-4, atol=1e-5)
    trained = copy.deepcopy(agent.q_net.state_dict())
    agent.learn(64)  # the last step updates the target
    found, target = agent.q_net.state_dict(), agent.q_net_target.state_dict()
    assert not any(torch.equal(found[name], trained[name]) for name, _ in agent.q_net.named_parameters())
    held = [name for name in found if not name.endswith("num_batches_tracked")]
    assert all(not torch.equal(target[name], trained[name]) for name in held)
