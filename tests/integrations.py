"""Other people's training loops: each framework's own way to convert, train, save, resume and load a small network."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from zoo_packages import import_timm, import_torchvision

import normswap as ns

IMAGES, LABELS = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4


def needs(name: str) -> Any:
    """Return a package, or skip the test, saying so, where it is missing."""
    import_torchvision()
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


def settled(model: nn.Module, run: Callable[[nn.Module], Any]) -> nn.Module:
    """Give a new network running statistics."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            run(model)
    return model.eval()


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


class Loop:
    """A training loop of one's own around a framework's network; a framework that has one overrides it.

    Args:
        folder: Where checkpoints go.
    """

    to: ClassVar[str] = "gn+ws"
    repeatable: ClassVar[bool] = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.load_package()

    def load_package(self) -> None:
        raise NotImplementedError

    def build(self) -> Any:
        """Return the framework's network, new."""
        raise NotImplementedError

    def forward(self, model: Any) -> Tensor:
        return model(IMAGES)

    def loss(self, model: Any) -> Tensor:
        return F.cross_entropy(self.forward(model), LABELS)

    def convert(self) -> tuple[Any, ns.Conversion]:
        torch.manual_seed(0)
        result = ns.convert(settled(self.build(), self.forward), self.to, example_inputs=self.example())
        return result.model, result

    def example(self) -> Any:
        return (IMAGES[:4],)

    def rebuilt(self, result: ns.Conversion) -> Any:
        """Return the converted network anew, without its values."""
        return ns.convert(self.build().eval(), plan=result.plan, example_inputs=self.example(), check=False).model

    def network(self, model: Any) -> nn.Module:
        return model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(ns.parameter_groups(model, weight_decay=0.01), lr=1e-3)

    def train(self, model: Any, steps: int, resume: Path | None = None) -> Path:
        """Train to a total of so many steps, from a checkpoint where one is given; return one."""
        optimizer, done = self.optimizer(model.train()), 0
        if resume is not None:
            done = self.read(resume, model, optimizer)
        for _ in range(done, steps):
            optimizer.zero_grad()
            self.loss(model).backward()
            optimizer.step()
        return self.write(model, optimizer, steps)

    def write(self, model: Any, optimizer: Any, steps: int) -> Path:
        path = self.folder / f"{steps}.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "steps": steps}, path)
        return path

    def read(self, path: Path, model: Any, optimizer: Any) -> int:
        held = torch.load(path)
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        return int(held["steps"])

    def load(self, path: Path, result: ns.Conversion) -> Any:
        model = self.rebuilt(result)
        model.load_state_dict(torch.load(path)["model"])
        return model


class Lightning(Loop):
    """A callback converts before the optimizer is made; the checkpoint holds the plan."""

    def load_package(self) -> None:
        self.pl = needs("lightning.pytorch")
        to = self.to

        class Classifier(self.pl.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.net = classifier()

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x)

            def training_step(self, batch: Any, _: int) -> Tensor:
                return F.cross_entropy(self(batch[0]), batch[1])

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW(ns.parameter_groups(self, weight_decay=0.01), lr=1e-3)

            def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["normswap"] = self.plan.to_json()

            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                if not hasattr(self, "plan"):  # load_from_checkpoint has made it with its BatchNorms
                    self.swap(plan=ns.Plan.from_json(checkpoint["normswap"]), check=False)

            def swap(self, *args: Any, **options: Any) -> ns.Conversion:
                result = ns.convert(self.net, *args, **options)
                self.net, self.plan = result.model, result.plan
                return result

        class Swap(self.pl.Callback):  # type: ignore[misc, name-defined]
            def setup(self, trainer: Any, module: Any, stage: str) -> None:
                if not hasattr(module, "plan"):
                    module.swap(to)

        self.module, self.callback = Classifier, Swap

    def convert(self) -> tuple[Any, ns.Conversion]:
        model = self.module()
        settled(model.net, lambda net: net(IMAGES))
        return model, model.swap(self.to)

    def network(self, model: Any) -> nn.Module:
        return model.net

    def train(self, model: Any, steps: int, resume: Path | None = None) -> Path:
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        trainer = self.pl.Trainer(
            max_steps=steps, accelerator="cpu", callbacks=[self.callback()], default_root_dir=self.folder, **quiet
        )
        trainer.fit(model, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=16), ckpt_path=resume)
        trainer.save_checkpoint(self.folder / f"{steps}.ckpt")
        return self.folder / f"{steps}.ckpt"

    def load(self, path: Path, result: ns.Conversion) -> Any:
        return self.module.load_from_checkpoint(path)

    def rebuilt(self, result: ns.Conversion) -> Any:
        return self.module()  # the callback converts it


class HuggingFace(Loop):
    """``from_pretrained`` builds BatchNorms; the plan beside the weights makes the converted network."""

    def load_package(self) -> None:
        self.hf = needs("transformers")
        needs("accelerate")
        self.config = self.hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
        )

    def build(self) -> Any:
        return self.hf.ResNetForImageClassification(self.config)

    def forward(self, model: Any) -> Tensor:
        return model(IMAGES).logits

    def example(self) -> Any:
        return {"pixel_values": IMAGES[:4]}

    def train(self, model: Any, steps: int, resume: Path | None = None) -> Path:
        class Rows(Dataset[dict[str, Tensor]]):
            def __len__(self) -> int:
                return 16

            def __getitem__(self, i: int) -> dict[str, Tensor]:
                return {"pixel_values": IMAGES[i], "labels": LABELS[i]}

        arguments = self.hf.TrainingArguments(
            str(self.folder), max_steps=steps, save_steps=steps, per_device_train_batch_size=16, use_cpu=True,
            report_to=[], disable_tqdm=True, lr_scheduler_type="constant", learning_rate=1e-3, logging_strategy="no",
        )  # fmt: skip
        optimizer = self.optimizer(model)  # in place of one that decays g
        trainer = self.hf.Trainer(model, arguments, train_dataset=Rows(), optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return self.folder / f"checkpoint-{steps}"

    def load(self, path: Path, result: ns.Conversion) -> Any:
        from safetensors.torch import load_file

        model = self.rebuilt(result)
        model.load_state_dict(load_file(path / "model.safetensors"))
        return model


class Timm(Loop):
    """As ``train.py --model-ema``: timm's saver, its average of weights and its resuming."""

    def load_package(self) -> None:
        self.timm = import_timm()

    def build(self) -> Any:
        return self.timm.create_model("resnet10t", num_classes=4)

    def train(self, model: Any, steps: int, resume: Path | None = None) -> Path:
        from timm.utils import ModelEmaV3

        self.ema = ModelEmaV3(model, decay=0.5)
        return super().train(model, steps, resume)

    def write(self, model: Any, optimizer: Any, steps: int) -> Path:
        from timm.utils import CheckpointSaver

        self.ema.update(model)
        folder = self.folder / str(steps)
        folder.mkdir(exist_ok=True)
        saver = CheckpointSaver(
            model, optimizer, args=Namespace(model="resnet10t"), model_ema=self.ema, checkpoint_dir=str(folder)
        )
        saver.save_checkpoint(steps - 1, 0.0)
        return folder / "last.pth.tar"

    def read(self, path: Path, model: Any, optimizer: Any) -> int:
        from timm.models import load_checkpoint, resume_checkpoint

        load_checkpoint(self.ema.module, str(path), use_ema=True)
        return int(resume_checkpoint(model, str(path), optimizer, log_info=False))

    def load(self, path: Path, result: ns.Conversion) -> Any:
        from timm.models import load_checkpoint

        model = self.rebuilt(result)
        load_checkpoint(model, str(path), use_ema=False)
        return model


class Opacus(Loop):
    """Differential privacy, which BatchNorm does not allow; without noise here, so that two runs are the same."""

    to = "gn"

    def load_package(self) -> None:
        self.opacus = needs("opacus")

    def build(self) -> Any:
        return classifier()

    def train(self, model: Any, steps: int, resume: Path | None = None) -> Path:
        assert self.opacus.validators.ModuleValidator.validate(model.train()) == []
        engine = self.opacus.PrivacyEngine()
        module, optimizer, loader = engine.make_private(
            module=model, optimizer=self.optimizer(model), data_loader=DataLoader(TensorDataset(IMAGES, LABELS), 16),
            noise_multiplier=0.0, max_grad_norm=1.0, poisson_sampling=False,
        )  # fmt: skip
        done = 0
        if resume is not None:
            done = engine.load_checkpoint(path=resume, module=module, optimizer=optimizer)["steps"]
        for _ in range(done, steps):
            for x, labels in loader:
                optimizer.zero_grad()
                F.cross_entropy(module(x), labels).backward()
                optimizer.step()
        path = self.folder / f"{steps}.pt"
        engine.save_checkpoint(path=path, module=module, optimizer=optimizer, checkpoint_dict={"steps": steps})
        module.remove_hooks()
        return path

    def load(self, path: Path, result: ns.Conversion) -> Any:
        model = self.rebuilt(result)
        state = torch.load(path, weights_only=False)["module_state_dict"]
        model.load_state_dict({name.removeprefix("_module."): value for name, value in state.items()})
        return model


class Ultralytics(Loop):
    """A YOLO: its own loss; ``fuse()`` is what ``fold`` does."""

    def load_package(self) -> None:
        needs("ultralytics")

    def build(self) -> Any:
        from ultralytics.nn.tasks import DetectionModel

        model = DetectionModel("yolov8n.yaml", nc=3, verbose=False)
        model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)
        return model

    def example(self) -> Any:
        return (F.interpolate(IMAGES[:2], 64),)

    def forward(self, model: Any) -> Tensor:
        found = model(self.example()[0])
        return found[0] if isinstance(found, tuple) else torch.zeros(())

    def loss(self, model: Any) -> Tensor:
        boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.3, 0.3]])
        batch = {"img": self.example()[0], "batch_idx": torch.arange(2.0), "cls": torch.zeros(2, 1), "bboxes": boxes}
        return model(batch)[0].sum()


class Monai(Loop):
    """A U-Net for segmentation."""

    def load_package(self) -> None:
        self.monai = needs("monai")

    def build(self) -> Any:
        from monai.networks.nets import UNet

        return UNet(2, 3, 2, (8, 16, 32), (2, 2), norm="BATCH", num_res_units=1)

    def forward(self, model: Any) -> Tensor:
        from monai.inferers import sliding_window_inference

        return model(IMAGES) if model.training else sliding_window_inference(IMAGES[:2], (16, 16), 2, model)

    def loss(self, model: Any) -> Tensor:
        from monai.losses import DiceLoss

        return DiceLoss(sigmoid=True)(model(IMAGES), (IMAGES[:, :2] > 0).float())


class Geometric(Loop):
    """A graph network, whose norms stand behind layers that pass messages: they convert with an affine in front."""

    to = "wn+mobn"

    def load_package(self) -> None:
        needs("torch_geometric")

    def example(self) -> Any:
        ring = torch.arange(16)
        return IMAGES[:, :, 0, 0], torch.stack([ring, ring.roll(1)])

    def build(self) -> Any:
        from torch_geometric.nn.models import GCN

        return GCN(3, 8, 2, 4, norm="batch_norm")

    def forward(self, model: Any) -> Tensor:
        return model(*self.example())


class StableBaselines(Loop):
    """A policy that holds its own optimizer."""

    to = "wn+mobn"
    repeatable = False

    def load_package(self) -> None:
        gym, sb3 = needs("gymnasium"), needs("stable_baselines3")
        from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

        class Walk(gym.Env):  # type: ignore[misc, name-defined]
            observation_space = gym.spaces.Box(-1, 1, (4,))
            action_space = gym.spaces.Discrete(2)

            def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
                super().reset(seed=seed)
                self.steps = 0
                return self.observation_space.sample(), {}

            def step(self, action: Any) -> Any:
                self.steps += 1
                return self.observation_space.sample(), float(action), self.steps >= 8, False, {}

        class Features(BaseFeaturesExtractor):  # type: ignore[misc]
            def __init__(self, space: Any) -> None:
                super().__init__(space, 8)
                self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x)

        self.make = lambda: sb3.PPO(
            "MlpPolicy", Walk(), n_steps=16, batch_size=8, n_epochs=1, device="cpu", seed=0,
            policy_kwargs={"features_extractor_class": Features},
        )  # fmt: skip

    def example(self) -> Any:
        return (torch.linspace(-1, 1, 16).view(4, 4),)

    def _swapped(self, agent: Any, **how: Any) -> ns.Conversion:
        # In place: the policy holds distributions with gradients, which nothing copies. Its forward draws actions.
        result = ns.convert(agent.policy, example_inputs=self.example(), inplace=True, check=False, **how)
        ns.migrate_optimizer(agent.policy.optimizer, result, inplace=True)
        return result

    def convert(self) -> tuple[Any, ns.Conversion]:
        agent = self.make()
        agent.learn(16)
        return agent, self._swapped(agent, to=self.to)

    def rebuilt(self, result: ns.Conversion) -> Any:
        agent = self.make()
        self._swapped(agent, to=self.to, plan=result.plan)
        return agent

    def network(self, model: Any) -> nn.Module:
        return model.policy

    def forward(self, model: Any) -> Tensor:
        model = getattr(model, "policy", model)
        return model.get_distribution(*self.example()).distribution.logits

    def train(self, model: Any, steps: int, resume: Path | None = None) -> Path:
        if resume is not None:
            model.set_parameters(resume)  # PPO.load would build BatchNorms
        model.learn(16 * steps)
        model.save(self.folder / f"{steps}.zip")
        return self.folder / f"{steps}.zip"

    def load(self, path: Path, result: ns.Conversion) -> Any:
        agent = self.rebuilt(result)
        agent.set_parameters(path)
        return agent


FRAMEWORKS: dict[str, type[Loop]] = {
    "Lightning": Lightning,
    "Hugging Face": HuggingFace,
    "timm": Timm,
    "Opacus": Opacus,
    "ultralytics": Ultralytics,
    "MONAI": Monai,
    "torch_geometric": Geometric,
    "stable-baselines3": StableBaselines,
}
