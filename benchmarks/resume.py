"""How training goes on after a swap: with the optimizer's state migrated, and with a fresh optimizer.

    python benchmarks/resume.py [--steps 100] [--before 300] [--batch 32] [--recipes wn,wn+mobn,gn+ws] [--frozen]
        [--scratch] [--seed 0]

The pretrained CIFAR-10 ResNet-20 is first trained for `--before` steps, so that the optimizer has a state; then it is
swapped, inexact recipes with 500 images of calibration, and training goes on with the same batches. Printed is the loss
in the mean over ten steps, of the unswapped network and of the swapped one in both ways, and the mean distance of each
curve from the unswapped one, over the first ten steps and over all, and the mean loss. With `--frozen` BatchNorms and
mean-only norms keep their statistics after the swap. With `--scratch` the network is a new one, at ten times the rates,
which is in the middle of its training when it is swapped.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from pretrained import MODELS, cifar10_train, load

import normswap as ns

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]
MAKERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-4),
}


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    steps: range,
    given: argparse.Namespace,
) -> list[float]:
    """Take the steps of these numbers, each on its own batch, and return the losses."""
    (images, labels), batch = data, given.batch
    losses = []
    model.train(not given.frozen)
    for step in steps:
        generator = torch.Generator().manual_seed(1_000_000 * given.seed + step)
        chosen = torch.randint(len(images), (batch,), generator=generator)
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def tens(losses: list[float]) -> list[float]:
    """The mean of each ten losses."""
    return [sum(losses[i : i + 10]) / len(losses[i : i + 10]) for i in range(0, len(losses), 10)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--before", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--recipes", default="wn,wn+mobn,gn+ws")
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--scratch", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the new network's weights, and of the batches")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = cifar10_train(given.images)
    before, after = range(given.before), range(given.before, given.before + given.steps)
    for name, make in MAKERS.items():
        torch.manual_seed(given.seed)
        model = MODELS["cifar10_resnet20"].build() if given.scratch else load("cifar10_resnet20")[0]
        optimizer = make(model.parameters())
        for group in optimizer.param_groups:
            group["lr"] *= 10 if given.scratch else 1
        train(model, optimizer, data, before, argparse.Namespace(**{**vars(given), "frozen": False}))
        model.eval()
        curves: dict[str, list[float]] = {}

        def fresh(twin: nn.Module, make: Make = make, rate: float = optimizer.param_groups[0]["lr"]) -> Any:
            made = make(twin.parameters())
            made.param_groups[0]["lr"] = rate
            return made

        for recipe in given.recipes.split(","):
            exact = ns.all_recipes()[recipe].exact
            result = ns.convert(model, recipe, **{"example_inputs" if exact else "calibration": (data[0][:500],)})
            migrated = ns.migrate_optimizer(optimizer, result).optimizer
            twin = copy.deepcopy(result.model)
            curves[f"{recipe}, migrated"] = train(result.model, migrated, data, after, given)
            curves[f"{recipe}, fresh"] = train(twin, fresh(twin), data, after, given)
        unswapped = train(model, optimizer, data, after, given)
        print(
            f"{name}: loss, each figure the mean of ten steps; distance from BatchNorm's in the first ten, and in all; "
            "mean loss"
        )
        for label, losses in {"BatchNorm": unswapped, **curves}.items():
            far = [abs(a - b) for a, b in zip(losses, unswapped, strict=True)]
            ends = f"   {sum(far[:10]) / len(far[:10]):.3f}  {sum(far) / len(far):.3f}  {sum(losses) / len(losses):.4f}"
            print(f"{label:20}" + "".join(f"{loss:7.3f}" for loss in tens(losses)) + ends, flush=True)


if __name__ == "__main__":
    main()
