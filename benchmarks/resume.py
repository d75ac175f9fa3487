"""How training goes on after a swap: with the optimizer's state migrated, and with a fresh optimizer.

    python benchmarks/resume.py [--steps 100] [--before 300] [--batch 32] [--recipes wn,wn+mobn,gn+ws] [--frozen]
        [--scratch] [--seeds 1] [--optimizers SGD,AdamW]

The pretrained CIFAR-10 ResNet-20 is first trained for `--before` steps, so that the optimizer has a state; then it is
swapped, inexact recipes with 500 images of calibration, and training goes on with the same batches. Printed is the loss
in the mean over ten steps, of the unswapped network and of the swapped one in both ways, and the mean distance of each
curve from the unswapped one, over the first ten steps and over all, and the mean loss. With `--frozen` BatchNorms and
mean-only norms keep their statistics after the swap. With `--scratch` the network is a new one, at ten times the rates,
which is in the middle of its training when it is swapped.

With several `--seeds`, of the new network's weights and of the batches, the figures are means over them. The last
column is the mean loss less that of the same network, on the same batches, with a fresh optimizer, and its standard
error.
"""

from __future__ import annotations

import argparse
import copy
import statistics
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
    seed: int,
    *,
    frozen: bool,
) -> list[float]:
    """Take the steps of these numbers, each on its own batch, and return the losses."""
    (images, labels), batch = data, given.batch
    losses = []
    model.train(not frozen)
    for step in steps:
        generator = torch.Generator().manual_seed(1_000_000 * seed + step)
        chosen = torch.randint(len(images), (batch,), generator=generator)
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def tens(runs: list[list[float]]) -> list[float]:
    """The mean of each ten losses, over all runs."""
    steps = [statistics.mean(losses) for losses in zip(*runs, strict=True)]
    return [statistics.mean(steps[i : i + 10]) for i in range(0, len(steps), 10)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--before", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--recipes", default="wn,wn+mobn,gn+ws")
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--scratch", action="store_true")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--optimizers", default=",".join(MAKERS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = cifar10_train(given.images)
    for name in given.optimizers.split(","):
        runs = [curves(MAKERS[name], data, given, seed) for seed in range(given.seeds)]
        print(
            f"{name}: loss, each figure the mean of ten steps; distance from BatchNorm's in the first ten, and in all; "
            "mean loss; less that with a fresh optimizer"
        )
        for label in runs[0]:
            losses = [run[label] for run in runs]
            far = [[abs(a - b) for a, b in zip(run[label], run["BatchNorm"], strict=True)] for run in runs]
            near, apart, mean = (
                statistics.mean(statistics.mean(one[:end]) for one in values)
                for values, end in ((far, 10), (far, None), (losses, None))
            )
            shown = "".join(f"{loss:7.3f}" for loss in tens(losses))
            print(f"{label:20}{shown}   {near:.3f}  {apart:.3f}  {mean:.4f}{saved(runs, label)}", flush=True)


def saved(runs: list[dict[str, list[float]]], label: str) -> str:
    """How much lower the mean loss is for the migrated state, with the standard error over the runs."""
    recipe, _, how = label.partition(", ")
    if how != "migrated":
        return ""
    less = [statistics.mean(run[label]) - statistics.mean(run[f"{recipe}, fresh"]) for run in runs]
    error = f" ± {statistics.stdev(less) / len(less) ** 0.5:.4f}" if len(less) > 1 else ""
    return f"  {statistics.mean(less):+.4f}{error}"


def curves(make: Make, data: tuple[Tensor, Tensor], given: argparse.Namespace, seed: int) -> dict[str, list[float]]:
    """Train, swap in each way, and train on; return the losses after the swap by what was done."""
    before, after = range(given.before), range(given.before, given.before + given.steps)
    torch.manual_seed(seed)
    model = MODELS["cifar10_resnet20"].build() if given.scratch else load("cifar10_resnet20")[0]
    optimizer = make(model.parameters())
    for group in optimizer.param_groups:
        group["lr"] *= 10 if given.scratch else 1
    rate = optimizer.param_groups[0]["lr"]
    train(model, optimizer, data, before, given, seed, frozen=False)
    model.eval()
    found: dict[str, list[float]] = {"BatchNorm": []}
    for recipe in given.recipes.split(","):
        exact, some = ns.all_recipes()[recipe].exact, (data[0][:500],)
        result = ns.convert(model, recipe, example_inputs=some, calibration=None if exact else some)
        migrated = ns.migrate_optimizer(optimizer, result).optimizer
        twin = copy.deepcopy(result.model)
        fresh = make(twin.parameters())
        fresh.param_groups[0]["lr"] = rate
        for label, trained, by in (("migrated", result.model, migrated), ("fresh", twin, fresh)):
            found[f"{recipe}, {label}"] = train(trained, by, data, after, given, seed, frozen=given.frozen)
    found["BatchNorm"] = train(model, optimizer, data, after, given, seed, frozen=given.frozen)
    return found


if __name__ == "__main__":
    main()
