"""Train the demo network on scikit-learn's handwritten digits and write the file that normswap.demo loads.

    pip install normswap scikit-learn
    python examples/train_digits.py                      # prints the accuracy, writes nothing
    python examples/train_digits.py --output digits.safetensors

The 1797 images are split by class into 897 for training and 900 held out. Nothing is chosen by the held-out
images: the number of epochs is fixed and the last weights are kept. Both parts come from the same 13
writers, so the accuracy says nothing about an unknown hand.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import sklearn
import torch
import torch.nn.functional as F
from safetensors.torch import save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from normswap.demo.data import MAX_PIXEL, WEIGHTS
from normswap.demo.network import DigitsResNet

SEED = 0
HELD_OUT = 900
CALIBRATION = 768
EPOCHS = 120
BATCH_SIZE = 64


def split_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, held-out images and labels; images (N, 8, 8), uint8 in 0..16."""
    digits = load_digits()
    train_images, held_images, train_labels, held_labels = train_test_split(
        digits.images.astype("uint8"),
        digits.target.astype("uint8"),
        test_size=HELD_OUT,
        stratify=digits.target,
        random_state=SEED,
    )
    as_tensor = torch.from_numpy
    return as_tensor(train_images), as_tensor(train_labels), as_tensor(held_images), as_tensor(held_labels)


def augment(images: Tensor) -> Tensor:
    """Shift each image by up to one pixel, turn it by up to 10 degrees, scale it by up to 10 percent."""
    n = len(images)
    angle = torch.deg2rad(torch.empty(n).uniform_(-10, 10))
    scale = torch.empty(n).uniform_(0.9, 1.1)
    pixel = 2 / images.shape[-1]  # the grid's unit: it spans [-1, 1]
    shift = torch.empty(n, 2, 1).uniform_(-pixel, pixel)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(n, 2, 2)
    grid = F.affine_grid(torch.cat([rotation, shift], dim=2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train(images: Tensor, labels: Tensor) -> DigitsResNet:
    """Train by SGD with Nesterov momentum and one cycle of the learning rate."""
    torch.manual_seed(SEED)
    network = DigitsResNet()
    steps = EPOCHS * (len(images) // BATCH_SIZE)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    for epoch in range(1, EPOCHS + 1):
        losses = []
        # Whole batches only: BatchNorm's statistics over a last batch of one image would be noise.
        for batch in torch.randperm(len(images))[: len(images) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
            loss = F.cross_entropy(network(augment(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        if epoch % 10 == 0:
            print(f"epoch {epoch:3d}/{EPOCHS}  training loss {torch.stack(losses).mean():.4f}")
    return network.eval()


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write the file whole or not at all."""
    draft = path.with_name(path.name + ".part")
    draft.write_bytes(save(tensors, metadata))
    os.replace(draft, path)
    print(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)")


def main() -> None:
    """Train, score once on the held-out digits, and write the file if asked to."""
    parser = argparse.ArgumentParser(description="Train the demo network on scikit-learn's handwritten digits.")
    parser.add_argument("--output", type=Path, help="file to write (safetensors); without it nothing is written")
    output = parser.parse_args().output
    if output is not None and not output.parent.is_dir():
        parser.error(f"--output: the folder {str(output.parent)!r} does not exist")

    torch.set_num_threads(1)  # sums in another order give other weights; so the same machine repeats them
    train_pixels, train_labels, held_pixels, held_labels = split_digits()
    start = time.perf_counter()
    network = train(train_pixels.unsqueeze(1).float() / MAX_PIXEL, train_labels.long())
    seconds = time.perf_counter() - start
    with torch.no_grad():
        logits = network(held_pixels.unsqueeze(1).float() / MAX_PIXEL)
    correct = int((logits.argmax(1) == held_labels).sum())
    best, second = logits.topk(2).values.T
    parameters = sum(p.numel() for p in network.parameters())
    print(f"{parameters} parameters, trained on {len(train_pixels)} digits in {seconds:.0f} s")
    print(f"held-out accuracy {correct}/{len(held_pixels)} = {correct / len(held_pixels):.2%}")
    print(f"smallest margin between the two best logits: {(best - second).min():.4f}")

    if output is not None:
        tensors = {WEIGHTS + name: tensor for name, tensor in network.state_dict().items()}
        tensors["heldout.images"], tensors["heldout.labels"] = held_pixels, held_labels
        tensors["calibration.images"] = train_pixels[:CALIBRATION].clone()
        metadata = {
            "accuracy": f"{correct / len(held_pixels):.4f}",
            "heldout_correct": str(correct),
            "heldout_total": str(len(held_pixels)),
            "trained_by": "examples/train_digits.py",
            "torch": torch.__version__,
            "scikit_learn": sklearn.__version__,
            "digits": "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine "
            "Learning Repository 1998, https://doi.org/10.24432/C50P49; the images of "
            "sklearn.datasets.load_digits, stored as uint8, values unchanged",
            "digits_license": "CC BY 4.0",
        }
        write(output, tensors, metadata)


if __name__ == "__main__":
    main()
