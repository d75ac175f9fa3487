"""Recurrent layers: what a parametrization and a layer normalization cost, and what a swap keeps of a trained LSTM.

    python benchmarks/recurrent.py time            # times relative to nn.LSTM, on one thread
    python benchmarks/recurrent.py onnx            # the exported file beside torch's own form of it
    python benchmarks/recurrent.py swap            # accuracy after a swap, and after a short training; three seeds

``time`` measures forward, and forward with backward, as the median of interleaved runs. The *loop* is the usual way to
write a layer-normalized LSTM, a cell per step that normalizes input and state.

``swap`` trains an LSTM of 64 units on two tasks: the rows of MNIST digits (28 steps of 28 pixels, 20,000 digits) and
spoken words (49 steps of 10 MFCCs, 800 of 1,000). It needs the data folder (NORMSWAP_DATA). *Copied* is a
``LayerNormLSTM`` that has the LSTM's matrices and biases and fresh gains, as a state dict gives them.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap as ns
from normswap.nn import LayerNormGRU, LayerNormLSTM, LayerNormLSTMCell
from normswap.records import text_table

DATA = Path(os.environ.get("NORMSWAP_DATA", "../shared/data"))
SIZES = ((50, 32, 256, 256), (50, 8, 64, 128), (28, 64, 28, 64))
"""Steps, batch, inputs, units."""


class Loop(nn.Module):
    """A layer-normalized LSTM written as a loop over a cell."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.cell = LayerNormLSTMCell(inputs, units)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        state, outputs = None, []
        for x_t in x:
            state = self.cell(x_t, state)
            outputs.append(state[0])
        return torch.stack(outputs), state


def medians(runs: dict[str, Callable[[], Any]], count: int) -> dict[str, float]:
    """Return the median CPU time of each of ``runs``, which take turns."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(count + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if number:  # the first one warms up
                taken[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def measure_time(count: int) -> None:
    rows = []
    for steps, batch, inputs, units in SIZES:
        x = torch.randn(steps, batch, inputs)
        plain = nn.Sequential(nn.LSTM(inputs, units))
        layers: dict[str, nn.Module] = {"nn.LSTM": plain[0]}
        for recipe in ("wn", "aws"):
            layers[recipe] = ns.swap_norms(plain, None, recurrent=recipe, check=False)[0]
        layers |= {
            "LayerNormLSTM": LayerNormLSTM(inputs, units),
            "without LN(c)": LayerNormLSTM(inputs, units, cell_norm=False),
            "loop": Loop(inputs, units),
            "nn.GRU": nn.GRU(inputs, units),
            "LayerNormGRU": LayerNormGRU(inputs, units),
        }

        def forward(layer: nn.Module, x: Tensor = x) -> Callable[[], Any]:
            def run() -> None:
                with torch.no_grad():
                    layer(x)

            return run

        def both(layer: nn.Module, x: Tensor = x) -> Callable[[], Any]:
            return lambda: layer(x)[0].sum().backward()

        for what, make in (("forward", forward), ("and backward", both)):
            found = medians({name: make(layer) for name, layer in layers.items()}, count)
            size = f"{steps}, {batch}, {inputs}, {units}"
            ratios = [f"{found[name] / found['nn.LSTM']:.2f}" for name in layers]
            rows.append((size, what, f"{1000 * found['nn.LSTM']:.1f}", *ratios[1:]))
    header = ("steps, batch, inputs, units", "pass", "nn.LSTM, ms", *list(layers)[1:])
    print(text_table(header, rows))


def run_session(session: Any, feed: Any) -> None:
    session.run(None, {session.get_inputs()[0].name: feed})


def measure_onnx(count: int) -> None:
    import onnxruntime

    class Sequences(nn.Module):
        def __init__(self, rnn: nn.Module) -> None:
            super().__init__()
            self.rnn = rnn

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    rows = []
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    kinds: tuple[Any, ...] = (nn.LSTM, nn.GRU, nn.RNN, LayerNormLSTM, LayerNormGRU)
    for kind in kinds:
        for steps, batch, inputs, units in SIZES[1:]:
            model, x = Sequences(kind(inputs, units)).eval(), torch.randn(steps, batch, inputs)
            sessions = {}
            with tempfile.TemporaryDirectory() as folder:
                ns.export_onnx(model, Path(folder) / "a.onnx", example_inputs=x, dynamic_time=0)
                sessions["normswap"] = onnxruntime.InferenceSession(Path(folder) / "a.onnx", options)
                torch.onnx.export(
                    model, (x,), Path(folder) / "b.onnx", dynamo=True, opset_version=18, external_data=False
                )
                sessions["torch"] = onnxruntime.InferenceSession(Path(folder) / "b.onnx", options)
            feed = x.numpy()
            found = medians({name: partial(run_session, one, feed) for name, one in sessions.items()}, count)
            size = f"{steps}, {batch}, {inputs}, {units}"
            rows.append((kind.__name__, size, *(f"{1000 * found[name]:.2f}" for name in sessions)))
    print(text_table(("layer", "steps, batch, inputs, units", "any length, ms", "torch's, of one length, ms"), rows))


# ------------------------------------------------------------------------------------------------ accuracy after a swap


class Classifier(nn.Module):
    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(inputs, 64, batch_first=True), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(x)[0][:, -1])
        return logits


def tasks() -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor, int]]:
    """Yield name, training inputs and labels, test inputs and labels, and epochs."""
    with np.load(DATA / "mnist.npz") as found:
        images = [torch.from_numpy(found[f"{part}_images"]).float() / 255 for part in ("train", "test")]
        labels = [torch.from_numpy(found[f"{part}_labels"]).long() for part in ("train", "test")]
    yield "rows of digits", images[0], labels[0], images[1], labels[1], 8
    with np.load(DATA / "speech_commands_mfcc.npz") as found:
        x, y = torch.from_numpy(found["features"]).float(), torch.from_numpy(found["labels"]).long()
    x, order = (x - x.mean((0, 1))) / x.std((0, 1)), torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    yield "spoken words", x[:800], y[:800], x[800:], y[800:], 60


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float) -> nn.Module:
    """Train with Adam, batches of 100, the rate falling to zero along a line."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    steps = epochs * (len(x) // 100)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(100)[: len(x) // 100]:
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model.eval()(x).argmax(1) == y).float().mean())


def copied(model: nn.Module, *, cell_norm: bool) -> nn.Module:
    """Return the model with a LayerNormLSTM that has the LSTM's state dict."""
    found = copy.deepcopy(model)
    old = found.rnn
    found.rnn = LayerNormLSTM(old.input_size, old.hidden_size, batch_first=True, cell_norm=cell_norm)
    found.rnn.load_state_dict(old.state_dict(), strict=False)
    return found


def measure_swap(seeds: int, rate: float, only: list[str]) -> None:
    for name, x, y, test_x, test_y, epochs in tasks():
        rows: dict[str, list[tuple[float, float]]] = {}
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = train(Classifier(x.shape[-1], int(y.max()) + 1), x, y, epochs, 5e-3)
            data = x[:500]
            variants: dict[str, nn.Module] = {"LSTM": copy.deepcopy(model)}
            for recipe in ("wn", "aws", "ws"):
                variants[recipe] = ns.swap_norms(model, None, recurrent=recipe, calibration=data)
            for spread in (1, 3, 10, 30):
                asked = {"recipe": "ln", "spread": spread}
                variants[f"ln, spread {spread}"] = ns.swap_norms(model, None, recurrent=asked, calibration=data)
            tuned = {"calibration": list(data.split(50)), "init": "tune"}
            for label, asked in (("spread 3", {"spread": 3}), ("LN(c)", {"cell_norm": True})):
                asked = {"recipe": "ln", **asked}
                variants[f"ln, {label}"] = ns.swap_norms(model, None, recurrent=asked, calibration=data)
                variants[f"ln, {label}, tuned"] = ns.swap_norms(model, None, recurrent=asked, **tuned)
            variants["copied"] = copied(model, cell_norm=False)
            variants["copied, LN(c)"] = copied(model, cell_norm=True)
            for variant, one in variants.items():
                if not any(fnmatchcase(variant, glob) for glob in only):
                    continue
                before = accuracy(one, test_x, test_y)
                torch.manual_seed(seed)
                after = accuracy(train(one, x, y, max(1, epochs // 8), rate), test_x, test_y)
                rows.setdefault(variant, []).append((before, after))
        print(f"\n{name}, {seeds} seeds, top-1 in %, mean ± half the range")
        lines = [(v, *(_spread([pair[i] for pair in found]) for i in (0, 1))) for v, found in rows.items()]
        print(text_table(("layer", "swapped", f"after {max(1, epochs // 8)} epochs at {rate:g}"), lines))


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {(max(values) - min(values)) / 2:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("time", "onnx"):
        parts.add_parser(name).add_argument("--runs", type=int, default=15)
    part = parts.add_parser("swap")
    part.add_argument("--seeds", type=int, default=3)
    part.add_argument("--rate", type=float, default=1e-3)
    part.add_argument("--only", nargs="+", default=["*"], help="globs of the variants to measure")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "time":
        measure_time(given.runs)
    elif given.part == "onnx":
        measure_onnx(given.runs)
    else:
        measure_swap(given.seeds, given.rate, given.only)


if __name__ == "__main__":
    main()
