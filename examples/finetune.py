"""Fine-tune at batch size 2: BatchNorm, fresh group norms, and norms swapped by normswap.

    python examples/finetune.py

A network that has learnt digits gets them as photographic negatives, and memory allows two images at a time: either
any two, or two of the same class, as neighbouring frames of a video are. BatchNorm copes with the first here, for
two 8×8 images still have many pixels, and not with the second: two alike are no sample of the data. 450 of the
digits that the network has never seen are for fine-tuning, 450 for the test.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap as ns
from normswap.demo.data import load_calibration, load_digits, load_network

BATCH_SIZE, STEPS, LEARNING_RATE = 2, 300, 1e-3


def negative(images: Tensor) -> Tensor:
    """Return the images with ink for paper and paper for ink."""
    return 1 - images


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 in percent."""
    return 100 * (model.eval()(images).argmax(1) == labels).float().mean().item()


def batches(labels: Tensor, *, alike: bool) -> Iterator[Tensor]:
    """Yield the indices of ``STEPS`` batches, the same ones for every model."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        digit = torch.randint(10, (), generator=generator)
        choice = (labels == digit).nonzero()[:, 0] if alike else torch.arange(len(labels))
        yield choice[torch.randperm(len(choice), generator=generator)[:BATCH_SIZE]]


def finetune(model: nn.Module, images: Tensor, labels: Tensor, *, alike: bool) -> nn.Module:
    """Train a copy of ``model`` by SGD and return it."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(ns.parameter_groups(model, weight_decay=5e-4), lr=LEARNING_RATE, momentum=0.9)
    for batch in batches(labels, alike=alike):
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def main() -> None:
    """Fine-tune each contestant on both kinds of batches and print their accuracies."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels = load_digits()
    training = negative(images[:450]), labels[:450]
    test = negative(images[450:]), labels[450:]
    seen = load_calibration()  # unlabelled digits of the kind that the network was trained on
    contestants = {
        "BatchNorm": load_network(),
        "gn, fresh": ns.swap_norms(load_network(), "gn", init="fresh"),  # what other converters give
        "gn": ns.swap_norms(load_network(), "gn"),
        "gn+ws, calibrated": ns.swap_norms(load_network(), "gn+ws", calibration=seen),
        "wn+mobn": ns.swap_norms(load_network(), "wn+mobn"),
    }
    print(f"top-1 in %; {STEPS} steps on negatives, {BATCH_SIZE} images each")
    columns = ("digits", "negatives", "any two", "two alike", "seconds")
    print("norms".ljust(20) + "".join(column.rjust(11) for column in columns))
    for name, model in contestants.items():
        before = accuracy(model, images[450:], labels[450:]), accuracy(model, *test)
        start = time.perf_counter()
        after = [accuracy(finetune(model, *training, alike=alike), *test) for alike in (False, True)]
        values = (*before, *after, time.perf_counter() - start)
        print(name.ljust(20) + "".join(f"{value:11.1f}" for value in values), flush=True)


if __name__ == "__main__":
    main()
