"""Prints how much of published networks survives the swap, by what is done: fresh norms, γ and β copied, absorb, match.

    python benchmarks/fidelity.py cifar [--draws 3] [--images 1000] [--network ResNet-20 ...]
    python benchmarks/fidelity.py others
    python benchmarks/fidelity.py tune [--images 1000 20000]
    python benchmarks/fidelity.py cost [--networks resnet18 resnet50 ...]

``cifar``: top-1 on the 10,000 CIFAR-10 test images; calibrated on unlabelled training images, of which each draw takes
others (seeds 0, 1, 2); the mean of the draws. ``others``: networks for speech, pitch and earthquakes, calibrated on one
half of their data and measured on the other. ``tune``: gradient steps without labels on top. ``cost``: time and memory of
matching beside a forward pass of both networks. Weights and data lie in the folder NORMSWAP_DATA (default
../shared/data); nothing was chosen by looking at the test images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from pretrained import accuracy, cifar10_test, cifar10_train, data, load

import normswap as ns

NETWORKS = {"ResNet-20": "cifar10_resnet20", "ResNet-32": "cifar10_resnet32", "ResNet-8": "cifar10_resnet8"}
COLUMNS: dict[str, tuple[str, dict[str, Any]]] = {
    "`ln`": ("ln", {}),
    "`gn+aws`": ("gn+aws", {}),
    "`gn+ws`": ("gn+ws", {}),
    "`gn+ws`, auto": ("gn+ws", {"num_groups": "auto"}),
}


def images_of(name: str, part: str) -> tuple[Tensor, Tensor]:
    """Return images as the network takes them, and labels."""
    if name == "cifar10_resnet8":
        return data.cifar10_images(part)
    return cifar10_train() if part == "train" else cifar10_test()


def gamma_and_beta_copied(model: nn.Module, to: str, options: dict[str, Any]) -> nn.Module:
    """Return the model with fresh norms that have the BatchNorms' γ and β, as a careful walk over the modules gives."""
    usual = {key: value for key, value in options.items() if key != "num_groups"}
    converted = ns.swap_norms(model, to, init="none", **usual)
    for name, norm in model.named_modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            new = converted.get_submodule(name)
            with torch.no_grad():
                new.weight.copy_(norm.weight)
                new.bias.copy_(norm.bias)
    return converted


def draw(images: Tensor, count: int, seed: int) -> list[Tensor]:
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return list(images[chosen].split(250))


def cifar(networks: list[str], draws: int, count: int) -> None:
    print(f"| network (BatchNorm) | initialized by | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for title in networks:
        name = NETWORKS[title]
        model, _ = load(name)
        train, _ = images_of(name, "train")
        test, labels = images_of(name, "test")
        head = f"{title} ({accuracy(model, test, labels):.2f})"

        def row(how: str, cell: Callable[[str, dict[str, Any]], nn.Module], head: str, runs: int = 1) -> None:
            cells = []
            for to, options in COLUMNS.values():
                try:
                    scores = [accuracy(cell(to, options | {"seed": i}), test, labels) for i in range(runs)]
                except ns.NormswapError:
                    cells.append("–")
                    continue
                cells.append(f"{sum(scores) / runs:.2f}")
            print(f"| {head} | {how} | {' | '.join(cells)} |", flush=True)

        def usual(options: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in options.items() if key not in ("seed", "num_groups")}

        def matched(to: str, options: dict[str, Any]) -> nn.Module:
            seed = options["seed"]
            kept = {key: value for key, value in options.items() if key != "seed"}
            return ns.swap_norms(model, to, calibration=draw(train, count, seed), **kept)

        row("fresh norms", lambda to, o: ns.swap_norms(model, to, init="none", **usual(o)), head)
        row("γ and β copied", lambda to, o: gamma_and_beta_copied(model, to, usual(o)), head)
        row("absorb, no data", lambda to, o: ns.swap_norms(model, to, **usual(o)), head)
        row(f"match, {count} images", matched, head, draws)
    print(f"top-1 in % on 10,000 test images; mean of {draws} draws of the calibration images (seeds 0-{draws - 1})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    first = parts.add_parser("cifar")
    first.add_argument("--draws", type=int, default=3)
    first.add_argument("--images", type=int, default=1000)
    first.add_argument("--network", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    given = parser.parse_args()
    if given.part == "cifar":
        cifar(given.network, given.draws, given.images)


if __name__ == "__main__":
    main()
