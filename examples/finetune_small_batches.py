"""Fine-tune a published network at batch size 2: BatchNorm, naive GroupNorm, and gn+ws from a match.

    python examples/finetune_small_batches.py [--steps 600] [--plot curves.png]

ResNet-20 for CIFAR-10 (He et al. 2016), published weights, is trained on, two images at a time:

BatchNorm     in train mode: normalized by the two images' statistics, which the running ones follow.
naive gn      each BatchNorm's place taken by a GroupNorm that gets its γ and β, the layers as they are.
gn+ws, match  `normswap.swap_norms(model, "gn+ws", calibration=...)` on 500 of the training images, no labels.

All see the same images in the same order, by SGD with momentum 0.9 and a rate that falls to zero along a cosine. The
peak rate is chosen for each of them alone, by short runs, on training images that are held out of the steps. (The
published network has seen those, too; the test images it has not, and nothing is chosen by them.)

The weights and images lie in the folder NORMSWAP_DATA, default ../shared/data beside the repository.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from pretrained import accuracy, available, cifar10_test, cifar10_train, data_folder, load

import normswap as ns

BATCH_SIZE, MOMENTUM = 2, 0.9
RATES = (1e-5, 1e-4, 1e-3)
CALIBRATION, HELD_OUT, CURVE, POINTS = 500, 1000, 1000, 6  # images, and points of a curve
Images = tuple[Tensor, Tensor]


def naive_group_norm(model: nn.Module) -> nn.Module:
    """Return the model with GroupNorms in its BatchNorms' places that have their γ and β."""
    converted = ns.swap_norms(model, "gn", init="fresh")
    for name, norm in model.named_modules():
        if isinstance(norm, _BatchNorm):
            new = next(m for m in converted.get_submodule(name).modules() if isinstance(m, nn.GroupNorm))
            new.load_state_dict({"weight": norm.weight, "bias": norm.bias})
    return converted


def finetune(
    model: nn.Module, training: Images, rate: float, steps: int, watched: Images | None = None
) -> tuple[nn.Module, list[tuple[int, float]]]:
    """Train a copy of ``model``; return it, and its accuracy on ``watched`` along the way."""
    model = copy.deepcopy(model).train()
    images, labels = training
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    order = torch.Generator().manual_seed(0)
    curve = []
    for step in range(steps + 1):
        if watched is not None and step % max(1, steps // POINTS) == 0:
            curve.append((step, accuracy(model, *watched)))
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        batch = torch.randint(len(labels), (BATCH_SIZE,), generator=order)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), curve


def plot(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Draw the accuracies along the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (name, curve), marker in zip(curves.items(), "osD^v", strict=False):
        axes.plot(*zip(*curve, strict=True), label=name, marker=marker)
    axes.set_xlabel(f"steps, {BATCH_SIZE} images each")
    axes.set_ylabel(f"top-1 on {CURVE} test images (%)")
    axes.set_title("ResNet-20 on CIFAR-10, trained on at batch size 2")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Choose each contestant's rate, fine-tune it, print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--search-steps", type=int, default=200, help="of each run that chooses a rate")
    parser.add_argument("--images", type=int, default=10_000, help="test images; fewer also shorten everything else")
    parser.add_argument("--plot", type=Path, help="draw the curves into this .png (needs matplotlib)")
    given = parser.parse_args()
    if not available():
        print(f"skipped: no weights and images in {data_folder()}: name their folder in NORMSWAP_DATA")
        return
    if given.plot is not None and importlib.util.find_spec("matplotlib") is None:
        print("skipped: --plot draws with matplotlib, which is not installed: pip install matplotlib")
        return
    model, _ = load("cifar10_resnet20")
    images, labels = cifar10_train()
    few = min(given.images, CALIBRATION)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = shuffled[: min(given.images, HELD_OUT)], shuffled[HELD_OUT:]
    training, validation = (images[rest], labels[rest]), (images[held_out], labels[held_out])
    test = cifar10_test(given.images)
    watched = test[0][:CURVE], test[1][:CURVE]
    calibration = list(training[0][:few].split(100))
    contestants = {
        "BatchNorm": model,
        "naive gn": naive_group_norm(model),
        "gn+ws, match": ns.swap_norms(model, "gn+ws", calibration=calibration),
    }
    print(f"{given.steps} steps of {BATCH_SIZE} images; top-1 in % on {len(test[1])} test images")
    print("norms".ljust(16) + "".join(column.rjust(14) for column in ("before", "after", "rate", "ms per step")))
    curves = {}
    for name, start in contestants.items():
        scores = {r: accuracy(finetune(start, training, r, given.search_steps)[0], *validation) for r in RATES}
        rate = max(scores, key=scores.__getitem__)
        clock = time.perf_counter()
        tuned, _ = finetune(start, training, rate, min(100, given.steps))
        each = 1e3 * (time.perf_counter() - clock) / min(100, given.steps)
        tuned, curves[name] = finetune(start, training, rate, given.steps, watched)
        before, after = accuracy(start, *test), accuracy(tuned, *test)
        print(f"{name:16}{before:14.2f}{after:14.2f}{rate:14.0e}{each:14.0f}", flush=True)
        tried = ", ".join(f"{score:.1f} at {r:.0e}" for r, score in scores.items())
        print(f"  on {len(held_out)} held-out training images after {given.search_steps} steps: {tried}", flush=True)
    if given.plot is not None:
        plot(curves, given.plot)


if __name__ == "__main__":
    main()
