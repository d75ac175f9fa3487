"""Prints how much of published networks survives the swap: with fresh norms, γ and β copied, absorbed and matched.

    python benchmarks/fidelity.py cifar [--network ResNet-20 ...] [--draws 3] [--images 1000]
    python benchmarks/fidelity.py imagenet [--to gn+ws ...] [--init absorb synthetic match tune] [--draws 3]
        [--images 200] [--steps 300]
    python benchmarks/fidelity.py others
    python benchmarks/fidelity.py synthetic [--images 64] [--steps 100]
    python benchmarks/fidelity.py tune [--images 1000] [--steps 300]
    python benchmarks/fidelity.py cost [--network resnet18 ...] [--images 64]

cifar   Top-1 on the 10,000 CIFAR-10 test images. Calibrated on unlabelled training images, others in each draw (seeds
        0, 1, 2); the mean of the draws.
imagenet  EfficientNet-Lite0 on photographs at 224×224: without data, matched on 64 synthetic ones, matched and tuned on
        unlabelled ones, others in each draw; measured on the rest, beside BatchNorm's own top-1 there.
others  Networks for speech commands, earthquakes, pitch and vision, calibrated on one half of their data and measured
        on the other.
synthetic  The networks of both, without data and matched on synthetic samples; measured as there.
tune    ResNet-20, gn+ws, with gradient steps without labels on top.
cost    CPU time and memory of matching, against a forward pass of both networks over the same data.

Weights and data lie in the folder NORMSWAP_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from pretrained import accuracy, cifar10_test, cifar10_train, data, load

import normswap as ns
from normswap.loading.importing import import_quietly

NETWORKS = {"ResNet-20": "cifar10_resnet20", "ResNet-32": "cifar10_resnet32", "ResNet-8": "cifar10_resnet8"}
COLUMNS: dict[str, tuple[str, dict[str, Any]]] = {
    "`ln`": ("ln", {}),
    "`gn+aws`": ("gn+aws", {}),
    "`gn+ws`": ("gn+ws", {}),
    '`gn+ws`, `num_groups="auto"`': ("gn+ws", {"num_groups": "auto"}),
}


def fresh(model: nn.Module, to: str) -> nn.Module:
    """Return the model with norms as they are constructed, which is what other converters give."""
    return ns.swap_norms(model, to, init="fresh")


def gamma_and_beta_copied(model: nn.Module, to: str) -> nn.Module:
    """Return the model with fresh norms that have the BatchNorms' γ and β."""
    converted = fresh(model, to)
    for name, norm in model.named_modules():
        if isinstance(norm, _BatchNorm):
            new = next(m for m in converted.get_submodule(name).modules() if isinstance(m, nn.GroupNorm))
            new.load_state_dict({"weight": norm.weight, "bias": norm.bias})
    return converted


def draw(images: Tensor, count: int, seed: int) -> list[Tensor]:
    """Return ``count`` of the images, drawn with ``seed``, in batches."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return list(images[chosen].split(250))


def cifar(titles: list[str], draws: int, count: int) -> None:
    """Print the table of the CIFAR-10 networks."""
    print(f"| network (BatchNorm) | initialized by | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for title in titles:
        raw = title == "ResNet-8"
        train, _ = data.cifar10_images("train") if raw else cifar10_train()
        test, labels = data.cifar10_images("test") if raw else cifar10_test()
        model, _ = load(NETWORKS[title])
        name = f"{title} ({accuracy(model, test, labels):.2f})"
        rows: dict[str, list[str]] = {"fresh norms": [], "γ and β copied": [], "absorb, no data": []}
        rows[f"match, {count} images"] = []
        for to, options in COLUMNS.values():
            matched = [
                accuracy(ns.swap_norms(model, to, calibration=draw(train, count, seed), **options), test, labels)
                for seed in range(draws)
            ]
            without_data = [] if options else [fresh, gamma_and_beta_copied, ns.swap_norms]
            scores = [f"{accuracy(make(model, to), test, labels):.2f}" for make in without_data] or ["", "", ""]
            for cells, score in zip(rows.values(), [*scores, f"**{sum(matched) / draws:.2f}**"], strict=True):
                cells.append(score)
        for how, cells in rows.items():
            print(f"| {name} | {how} | {' | '.join(cells)} |", flush=True)
    print(f"top-1 in %, {draws} draws (seeds 0 to {draws - 1}), torch {torch.__version__}")


def imagenet(recipes: list[str], ways: list[str], draws: int, count: int, steps: int) -> None:
    """Print the table of EfficientNet-Lite0."""
    images, labels = data.photographs()
    model, _ = load("imagenet_efficientnet_lite0")
    before = _scores(model, images)
    print("| recipe | initialized by | top-1 | of BatchNorm's | same class | relative error | time |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for to in recipes:
        for init in ways:
            rows, after, took = [], None, 0.0
            for seed in range(draws):
                order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
                train, test = order[:count], order[count:]
                if after is None:
                    start = time.perf_counter()
                    converted = _converted(model, to, init, images[train], steps)
                    took = time.perf_counter() - start
                if init in ("absorb", "synthetic"):  # the same in each draw
                    after = _scores(converted, images) if after is None else after
                    found = after[test]
                else:
                    found = _scores(converted, images[test])
                expected = before[test]
                right = [float((o.argmax(1) == labels[test]).float().mean()) * 100 for o in (found, expected)]
                same = float((found.argmax(1) == expected.argmax(1)).float().mean()) * 100
                error = float((found - expected).norm() / expected.norm())
                rows.append((right[0], 100 * right[0] / right[1], same, error, took))
            top, share, same, error, took = torch.tensor(rows).mean(0).tolist()
            how = {"absorb": "absorb, no data", "synthetic": "match, no data, 64 synthetic samples"}.get(
                init, f"{init}, {count} photographs"
            )
            print(
                f"| `{to}` | {how} | {top:.2f} | {share:.1f} % | {same:.1f} | {error:.3f} | {took:.0f} s |", flush=True
            )
    print(f"{draws} draws, {len(images) - count} photographs measured, {torch.get_num_threads()} threads")


def _converted(model: nn.Module, to: str, init: str, photographs: Tensor, steps: int) -> nn.Module:
    example = photographs[:1]
    if init == "absorb":
        return ns.swap_norms(model, to, example_inputs=example)
    if init == "synthetic":
        return ns.swap_norms(model, to, calibration=ns.synthesize_samples(model, example))
    options = {"tune_steps": steps} if init == "tune" else {}
    return ns.swap_norms(
        model, to, example_inputs=example, calibration=list(photographs.split(25)), init=init, **options
    )


@torch.no_grad()
def _scores(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(50)])


def relative_error(model: nn.Module, reference: nn.Module, x: Tensor) -> str:
    """Return ``‖model(x) − reference(x)‖ / ‖reference(x)‖``."""
    with torch.no_grad():
        expected, found = reference(x), model(x)
    return f"{float((found - expected).norm() / expected.norm()):.3f}"


def picks(model: nn.Module, waveforms: Tensor, p: Tensor, s: Tensor) -> str:
    """Return the share of P and S arrivals that are found within 0.1 s, in percent."""
    with torch.no_grad():
        found = model(waveforms).argmax(2)
    shares = [float(((found[:, i] - true).abs() <= 10).float().mean()) * 100 for i, true in ((1, p), (2, s))]
    return f"{shares[0]:.1f} / {shares[1]:.1f}"


def others() -> None:
    """Print the table of the other networks."""
    features, labels = data.speech_commands()
    waveforms, p, s = data.seismic_phases()
    frames, photographs = data.pitch_frames()[0], data.visual_wake_words_stand_in(400)
    every = slice(None, None, 2), slice(1, None, 2)
    tasks: dict[str, tuple[str, Tensor, Callable[[nn.Module, slice], str]]] = {
        "DS-CNN, top-1 in %": (
            "kws_dscnn",
            features,
            lambda m, rest: f"{accuracy(m, features[rest], labels[rest]):.1f}",
        ),
        "PhaseNet, P / S picks in %": (
            "phasenet",
            waveforms,
            lambda m, rest: picks(m, waveforms[rest], p[rest], s[rest]),
        ),
        "CREPE": ("crepe_tiny", frames, lambda *_: ""),
        "MobileNetV1": ("vww_mobilenetv1", photographs, lambda *_: ""),
    }
    print("| network | BatchNorm | recipe | fresh norms | absorb | match |\n|---|---|---|---|---|---|")
    constant = []
    for title, (name, inputs, score) in tasks.items():
        model, _ = load(name)
        calibration = list(inputs[every[0]].split(100))
        for to in ("ln", "gn+aws", "gn+ws"):
            models = [
                model,
                fresh(model, to),
                ns.swap_norms(model, to, calibration=calibration, init="absorb"),
                ns.swap_norms(model, to, calibration=calibration),
            ]
            scores = [score(m, every[1]) for m in models]
            errors = [relative_error(m, model, inputs[every[1]]) for m in models]
            before, *cells = (f"{a} ({e})" if a else f"({e})" for a, e in zip(scores, errors, strict=True))
            print(f"| {title} | {before} | `{to}` | {' | '.join(cells)} |", flush=True)
        with torch.no_grad():
            expected = model(inputs[every[1]])
        error = (expected - expected.mean(0)).norm() / expected.norm()
        constant.append(f"{title.split(',')[0]} {float(error):.3f}")
    print(f"In brackets: the relative error of the output. That of a constant, the mean: {', '.join(constant)}")


def synthetic(count: int, steps: int) -> None:
    """Print the table of networks that are matched without data."""
    test, raw = cifar10_test(), data.cifar10_images("test")
    speech, frames, photographs = data.speech_commands(), data.pitch_frames()[0], data.visual_wake_words_stand_in(400)
    measured: dict[str, tuple[str, Tensor, Tensor | None]] = {
        "ResNet-20": ("cifar10_resnet20", *test),
        "ResNet-32": ("cifar10_resnet32", *test),
        "ResNet-8": ("cifar10_resnet8", *raw),
        "DS-CNN": ("kws_dscnn", *(values[1::2] for values in speech)),
        "PhaseNet": ("phasenet", data.seismic_phases()[0][1::2], None),
        "CREPE": ("crepe_tiny", frames[1::2], None),
        "MobileNetV1": ("vww_mobilenetv1", photographs[1::2], None),
    }
    recipes = ("ln", "gn+aws", "gn+ws")
    print(f"| network | mismatch | initialized by | {' | '.join(f'`{to}`' for to in recipes)} |")
    print("|---" * 6 + "|")
    for title, (name, x, labels) in measured.items():
        model, _ = load(name)
        start = time.process_time()
        samples = ns.synthesize_samples(model, x[:1], count=count, steps=steps)
        took = time.process_time() - start

        def score(m: nn.Module, reference: nn.Module = model, x: Tensor = x, labels: Tensor | None = labels) -> str:
            top = "" if labels is None else f"{accuracy(m, x, labels):.2f} "
            return f"{top}({relative_error(m, reference, x[:1000])})"

        for how, given in (
            ("absorb", {"example_inputs": x[:1]}),
            (f"match, synthetic in {took:.0f} s", {"calibration": samples}),
        ):
            cells = [score(ns.swap_norms(model, to, **given)) for to in recipes]
            top = "" if labels is None else f" ({accuracy(model, x, labels):.2f})"
            change = "" if how == "absorb" else f"{samples.before:.2f} → {samples.after:.3f}"
            print(f"| {title}{top} | {change} | {how} | {' | '.join(cells)} |", flush=True)
    print(f"{count} samples, {steps} steps, {torch.get_num_threads()} threads; in brackets the output's relative error")


def tune(count: int, steps: int) -> None:
    """Print what gradient steps add on ResNet-20."""
    train, _ = cifar10_train()
    test, labels = cifar10_test()
    model, _ = load(NETWORKS["ResNet-20"])
    batches = [batch for some in draw(train, count, 0) for batch in some.split(50)]
    start = time.perf_counter()
    result = ns.convert(model, "gn+ws", calibration=batches, init="tune", tune_steps=steps)
    took = time.perf_counter() - start
    print(f"ResNet-20 {accuracy(model, test, labels):.2f}, gn+ws tuned on {count} images in {took:.0f} s: ", end="")
    print(f"{accuracy(result.model, test, labels):.2f}; {'; '.join(result.init.notes)}")


def cost(names: list[str], count: int) -> None:
    """Print time and memory of a match, against a forward pass of both networks."""
    models = import_quietly("torchvision").models
    x = torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    batches = list(x.split(16))
    print("| network | norms | forward of both | match | ratio | peak above the forward |\n|---|---|---|---|---|---|")
    for name in names:
        torch.manual_seed(0)
        model = models.get_model(name, weights=None).eval()
        other = ns.swap_norms(model, "gn+ws", init="fresh")
        with _Peak() as plain:
            start = time.process_time()
            with torch.no_grad():
                for batch in batches:
                    model(batch), other(batch)
            forward = time.process_time() - start
        with _Peak() as matching:
            start = time.process_time()
            result = ns.convert(model, "gn+ws", calibration=batches)
            took = time.process_time() - start
        above = (matching.bytes - plain.bytes) / 2**30
        norms = len(result.plan.steps)
        print(
            f"| {name} | {norms} | {forward:.1f} s | {took:.1f} s | {took / forward:.1f} | {above:.2f} GB |", flush=True
        )
    print(f"{count} images of 224×224 in batches of 16, {torch.get_num_threads()} threads, torch {torch.__version__}")


class _Peak:
    """The largest resident memory while it is open, by a thread that looks every 20 ms."""

    def __enter__(self) -> _Peak:
        self.bytes, self._open = 0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._open:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.bytes = max(self.bytes, pages * resource.getpagesize())
            time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("cifar")
    part.add_argument("--network", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    part.add_argument("--draws", type=int, default=3)
    part.add_argument("--images", type=int, default=1000)
    part = parts.add_parser("imagenet")
    part.add_argument("--to", nargs="+", default=["ln", "gn+aws", "gn+ws"])
    part.add_argument(
        "--init", nargs="+", choices=["absorb", "synthetic", "match", "tune"], default=["absorb", "match", "tune"]
    )
    part.add_argument("--draws", type=int, default=3)
    part.add_argument("--images", type=int, default=200)
    part.add_argument("--steps", type=int, default=300)
    parts.add_parser("others")
    part = parts.add_parser("synthetic")
    part.add_argument("--images", type=int, default=64)
    part.add_argument("--steps", type=int, default=100)
    part = parts.add_parser("tune")
    part.add_argument("--images", type=int, default=1000)
    part.add_argument("--steps", type=int, default=300)
    part = parts.add_parser("cost")
    part.add_argument("--network", nargs="+", default=["resnet18", "resnet50", "resnet101", "resnet152"])
    part.add_argument("--images", type=int, default=64)
    given = parser.parse_args()
    if given.part == "cifar":
        cifar(given.network, given.draws, given.images)
    elif given.part == "imagenet":
        imagenet(given.to, given.init, given.draws, given.images, given.steps)
    elif given.part == "others":
        others()
    elif given.part == "synthetic":
        synthetic(given.images, given.steps)
    elif given.part == "tune":
        tune(given.images, given.steps)
    else:
        cost(given.network, given.images)


if __name__ == "__main__":
    main()
