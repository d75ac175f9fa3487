"""Prints what each recipe keeps of published CIFAR-10 networks, before any training and without any data.

    python benchmarks/cifar.py

The weights are those of a public implementation of He et al. (2016), as safetensors in the folder NORMSWAP_DATA
(default ../shared/data), beside the 10,000 test images; tests/pretrained has the definitions and names the files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from pretrained import accuracy, cifar10_test, load

import normswap as ns

RECIPES = ("ln", "gn", "gn+aws", "gn+ws", "wn+mobn")
NETWORKS = {"ResNet-20": "cifar10_resnet20", "ResNet-32": "cifar10_resnet32"}


def main() -> None:
    images, labels = cifar10_test()
    print("| | BatchNorm | fresh `gn+ws` | " + " | ".join(f"`{to}`" for to in RECIPES) + " |")
    print("|---|" + "---|" * (len(RECIPES) + 2))
    for title, name in NETWORKS.items():
        model, _ = load(name)
        models = [model, ns.swap_norms(model, "gn+ws", init="none"), *(ns.swap_norms(model, to) for to in RECIPES)]
        cells = [f"{accuracy(m, images, labels):.2f}" for m in models]
        print(f"| {title} | " + " | ".join(cells) + " |", flush=True)
    print(f"top-1 in %, {len(images)} test images; torch {torch.__version__}")


if __name__ == "__main__":
    main()
