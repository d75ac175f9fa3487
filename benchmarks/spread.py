"""What `spread` buys, and what it costs: fidelity, training on at batch size 2, and other inputs than calibration's.

    python benchmarks/spread.py [--to ln gn+ws] [--spread 0 2 6 20] [--rates 1e-4 1e-3] [--steps 600] [--images 2000]

At spread k, 1/(1 + k²) of the variance that a group is divided by is the sample's own. Each row is a network: ResNet-20
for CIFAR-10 with its BatchNorms in train mode, with them frozen, and matched on 500 unlabelled training images. Top-1
in percent on test images: as it is; after so many steps of SGD with momentum 0.9 on two images each, at a rate that
falls to zero along a cosine, the same images in the same order for all; and on test images that are darker (half the
brightness), of less contrast (half of it), and noisy (normal noise of deviation 0.05, of pixels in [0, 1]).

The weights and images lie in the folder NORMSWAP_DATA, default ../shared/data beside the repository.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from pretrained import accuracy, cifar10_test, cifar10_train, data, load

import normswap as ns

CALIBRATION, MOMENTUM = 500, 0.9


def shifted(images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return normalized images of which the pixels in [0, 1] were changed."""
    mean, std = data.IMAGENET_MEAN, data.IMAGENET_STD
    return (change(images * std + mean).clamp(0, 1) - mean) / std


def shifts(images: Tensor) -> Iterator[Tensor]:
    """Yield the images darker, of less contrast, and noisy."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    yield shifted(images, lambda x: x / 2)
    yield shifted(images, lambda x: (x + x.mean((1, 2, 3), keepdim=True)) / 2)
    yield shifted(images, lambda x: x + 0.05 * noise)


def frozen(model: nn.Module) -> nn.Module:
    """Return the model with BatchNorms that keep their statistics in training."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(model)

        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.model(x)
            return out

    return Frozen().eval()


def trained(model: nn.Module, images: Tensor, labels: Tensor, rate: float, steps: int) -> nn.Module:
    """Return a copy of ``model``, trained on."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    order = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        batch = torch.randint(len(labels), (2,), generator=order)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", nargs="+", default=["ln", "gn+ws"])
    parser.add_argument("--spread", nargs="+", type=float, default=[0, 2, 6, 20])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 1e-3])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--images", type=int, default=2000)
    given = parser.parse_args()
    model, _ = load("cifar10_resnet20")
    images, labels = cifar10_train()
    test, right = cifar10_test(given.images)
    others = list(shifts(test))
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:CALIBRATION]
    calibration = list(images[chosen].split(100))

    def row(name: str, start: nn.Module) -> None:
        after = [accuracy(trained(start, images, labels, rate, given.steps), test, right) for rate in given.rates]
        scores = [accuracy(start, test, right), *after, *(accuracy(start, other, right) for other in others)]
        print(f"| {name} | {' | '.join(f'{score:.1f}' for score in scores)} |", flush=True)

    heads = (*(f"after {given.steps} steps at {rate:g}" for rate in given.rates), "darker", "less contrast", "noisy")
    print(f"| norms | before | {' | '.join(heads)} |")
    print("|---" + "|--:" * (len(heads) + 1) + "|")
    row("BatchNorm, train mode", model)
    row("BatchNorm, frozen", frozen(model))
    for to in given.to:
        for spread in given.spread:
            row(f"`{to}`, spread {spread:g}", ns.swap_norms(model, to, calibration=calibration, spread=spread))
    print(f"{len(test)} test images, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
