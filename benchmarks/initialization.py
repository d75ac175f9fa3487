"""Whether residual networks without BatchNorm train from data-dependent initialization and Fixup, beside BatchNorm.

    python benchmarks/initialization.py [--blocks 3 9] [--rates 0.1 0.01] [--steps 100] [--batch 32]
        [--networks NAME ...]

CIFAR-10 ResNets of depth 6n + 2 with n blocks in a stage (3: ResNet-20, 9: ResNet-56), new ones, trained by SGD with
momentum 0.9 on batches of the same images in the same order. Printed is the mean loss of the last 25 steps; chance is
2.303. "eq. 5-6 alone" gives deviation 1 everywhere, also where a branch ends. Weights and data lie in the folder
NORMSWAP_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from pretrained import cifar10_train
from pretrained.cifar_resnet import CifarResNet

import normswap as ns

_SMALL = "normswap.initialization.data_dependent._SMALL_STD"


def initialized(to: str, small: float = 0.1) -> Callable[[nn.Module, Tensor], nn.Module]:
    """Return what swaps a network and initializes it, with this deviation where a branch ends."""

    def make(model: nn.Module, images: Tensor) -> nn.Module:
        converted = ns.swap_norms(model.eval(), to)
        with mock.patch(_SMALL, small):
            ns.initialize(converted, images, fresh=True)
        return converted

    return make


NETWORKS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "BatchNorm": lambda model, _: model,
    "`wn`, eq. 5-6 alone": initialized("wn", small=1.0),
    "`wn`": initialized("wn"),
    "`none`": initialized("none"),
    "`none`, Fixup": lambda model, _: ns.swap_norms(model.eval(), "none", multiplier=True, init="fixup"),
}


def loss_after(model: nn.Module, data: tuple[Tensor, Tensor], rate: float, steps: int, batch: int) -> float:
    """Train a network and return the mean loss of its last 25 steps."""
    images, labels = data
    optimizer = torch.optim.SGD(model.train().parameters(), lr=rate, momentum=0.9)
    losses: list[float] = []
    for step in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not torch.isfinite(loss):
            return float("nan")
    return sum(losses[-25:]) / len(losses[-25:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 9])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.01])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = cifar10_train(5000)
    columns = [(n, rate) for n in given.blocks for rate in given.rates]
    print(f"| | {' | '.join(f'ResNet-{6 * n + 2}, {rate:g}' for n, rate in columns)} |")
    print("|---" + "|---:" * len(columns) + "|")
    for name in given.networks:
        make, cells = NETWORKS[name], []
        for blocks, rate in columns:
            torch.manual_seed(0)
            model = make(CifarResNet(blocks), data[0][:256])
            cells.append(f"{loss_after(model, data, rate, given.steps, given.batch):.2f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
