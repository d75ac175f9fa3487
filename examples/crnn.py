"""A network of convolutions and an LSTM: converted, trained with single samples, exported for lines of any length.

python examples/crnn.py

The network reads lines of handwritten digits, one digit per step. BatchNorm cannot train it with one line at a time:
the convolutions get group normalization, the LSTM weight normalization, and both keep what they have learnt.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap as ns
from normswap.demo.data import load_digits


class Crnn(nn.Module):
    """Lines ``(N, 1, 8, 8·L)`` to scores ``(N, L, 10)``."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.rnn = nn.LSTM(64, 32, bidirectional=True, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, line: Tensor) -> Tensor:
        """Return the scores of each digit."""
        columns = self.rnn(self.features(line).flatten(1, 2).transpose(1, 2))[0]  # two columns per digit
        scores: Tensor = self.head(columns.unflatten(1, (-1, 2)).mean(2))
        return scores


def lines(images: Tensor, labels: Tensor, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Return lines of digits that are drawn at random, and what they say."""
    drawn = torch.randint(len(images), (count, length))
    return images[drawn].permute(0, 2, 3, 1, 4).flatten(3), labels[drawn]


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, batch: int, rate: float) -> nn.Module:
    """Train on lines of five digits."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    model.train()
    for _ in range(steps):
        x, y = lines(images, labels, batch, 5)
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> str:
    """Return the share of digits that are read right."""
    with torch.no_grad():
        return f"{100 * float((model.eval()(x).argmax(2) == y).float().mean()):.1f} %"


def main() -> None:
    """Train, convert, train with single lines, fold and export."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels = load_digits()
    known, held_out = (images[:700], labels[:700]), (images[700:], labels[700:])
    x, y = lines(*held_out, 200, 5)
    trained = train(Crnn(), *known, steps=250, batch=32, rate=4e-3)
    print(f"trained with BatchNorm, 32 lines at a time    {accuracy(trained, x, y)}")

    calibration = lines(*known, 300, 5)[0]
    result = ns.convert(trained, "gn", recurrent="wn", calibration=calibration)
    print(f"converted to group and weight normalization   {accuracy(result.model, x, y)}")
    print(f"  {result.plan.summary()}")

    norms = train(copy.deepcopy(trained), *known, steps=300, batch=1, rate=1e-3)
    print(f"300 lines, one at a time: with BatchNorm      {accuracy(norms, x, y)}")
    model = train(result.model, *known, steps=300, batch=1, rate=1e-3)
    print(f"300 lines, one at a time: converted           {accuracy(model, x, y)}")

    deploy = ns.fold(model, example_inputs=x[:2])
    print(f"folded: the LSTM is torch's own again         {type(deploy.rnn).__name__}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "crnn.onnx"
        artifact = ns.export_onnx(deploy, path, example_inputs=x[:2], dynamic_time={"line": 3})
        print(f"exported                                      {artifact.inputs[0]}")
        longer, _ = lines(*held_out, 3, 12)
        check = ns.verify(model, path, longer)
        print(f"onnxruntime on lines of twelve digits: outputs differ by {check.max_rel:.0e}")


if __name__ == "__main__":
    main()
