"""Measure what a conversion costs, as ratios to torch's own work on the same model in the same run.

    python benchmarks/engine.py                       # everything, about ten minutes
    python benchmarks/engine.py planning --profile    # one part, and where its time goes

Both sides of a ratio run in turn and their CPU time is taken, so that a machine's load falls on neither; a ratio is one
of medians. Memory beside a model is what a process of its own holds more at its peak than before, as Linux tells it,
Python's objects included; where there is no /proc these rows are left out. The exit code is 1 if a required ratio is
not met.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import gc
import json
import os
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile

import normswap as ns
from normswap.graph import capture_recorded
from normswap.loading.importing import import_quietly
from normswap.recipes import make_recipe
from normswap.records import text_table
from normswap.stages.bound import BoundPlan, bind
from normswap.stages.rewriting import rewrite

PLANNING, REWRITING, INITIALIZING, GROWING, RECORDING, REMEMBERING = 5.0, 3.0, 1.5, 1.5, 1.5, 1.2
CONVERTING, BESIDE, IN_PLACE, BILLION, STREAM = 30.0, 1.2, 0.2, 0.2, 1.1
SECONDS, DETECTOR = 10.0, 20.0  # for a plan of a billion parameters, and a detector without inputs
RECIPES = ("gn+ws", "wn+mobn")


@dataclass(frozen=True)
class Ratio:
    """What was measured against what: medians in seconds of CPU time, in ``unit`` "ms" or "s", or bytes in "MB"."""

    what: str
    against: str
    value: float
    reference: float
    allowed: float | None = None
    unit: str = "ms"

    @property
    def ratio(self) -> float:
        return self.value / self.reference

    @property
    def ok(self) -> bool:
        return self.allowed is None or self.ratio <= self.allowed

    def cells(self) -> tuple[str, ...]:
        required = "–" if self.allowed is None else f"≤ {self.allowed:g}"
        factor = {"ms": 1e3, "s": 1, "MB": 1e-6}[self.unit]
        values = (f"{value * factor:.1f} {self.unit}" for value in (self.value, self.reference))
        return self.what, self.against, *values, f"{self.ratio:.2f}", required, "ok" if self.ok else "MISSED"


def medians(repetitions: int, *works: Callable[[], Callable[[], Any]]) -> list[float]:
    """Return the median CPU seconds of each work, run in turn after one warm-up; a work returns what is to be timed."""
    times: list[list[float]] = [[] for _ in works]
    for repetition in range(repetitions + 1):
        for work, measured in zip(works, times, strict=True):
            timed = work()
            gc.collect()
            gc.disable()  # or one side pays for the other's garbage
            start = time.process_time()
            timed()
            if repetition:
                measured.append(time.process_time() - start)
            gc.enable()
    return [statistics.median(measured) for measured in times]


def resnet50() -> nn.Module:
    model: nn.Module = import_quietly("torchvision.models").resnet50(weights=None)
    return model.eval()


def chain(pairs: int) -> nn.Sequential:
    """Return a chain of ``pairs`` tiny convolutions, each with its BatchNorm."""
    return nn.Sequential(*(layer for _ in range(pairs) for layer in (nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))))


def planning(repetitions: int) -> Iterator[Ratio]:
    """Planning against one symbolic trace of torch's."""
    model = resnet50()
    plan, trace = medians(repetitions, lambda: lambda: ns.plan(model), lambda: lambda: fx.symbolic_trace(model))
    yield Ratio("plan of ResNet-50", "torch.fx.symbolic_trace", plan, trace, PLANNING)


def recording(repetitions: int) -> Iterator[Ratio]:
    """One recorded run against a plain forward pass without gradients: its time, and the memory at its peak."""
    model, batch = resnet50(), torch.randn(1, 3, 224, 224)

    def record() -> None:
        capture_recorded(model, (batch,), modes=(False,))

    def forward() -> None:
        evaluate(model, batch)

    time_of_record, time_of_forward = medians(repetitions, lambda: record, lambda: forward)
    what = "record of ResNet-50, 1×3×224×224"
    yield Ratio(what, "one forward pass", time_of_record, time_of_forward, RECORDING)
    most = [peak_memory(work) for work in (record, forward)]
    yield Ratio(f"{what}: memory beside the weights", "one forward pass", *most, REMEMBERING, "MB")


def peak_memory(work: Callable[[], Any]) -> float:
    """Return the bytes of tensors that ``work`` holds at its peak, as torch's allocator tells them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def rewriting(repetitions: int) -> Iterator[Ratio]:
    """Putting the new modules in against copying the model; the copy that is rewritten is not counted in."""
    model = resnet50()
    for name in RECIPES:
        bound = bind(ns.plan(model, name), make_recipe(name), model)

        def prepared(bound: BoundPlan = bound) -> Callable[[], Any]:
            target = copy.deepcopy(model)
            return lambda: rewrite(target, bound)

        change, copying = medians(repetitions, prepared, lambda: lambda: copy.deepcopy(model))
        yield Ratio(f"rewrite of ResNet-50 to {name}", "copy.deepcopy", change, copying, REWRITING)


def initializing(repetitions: int) -> Iterator[Ratio]:
    """Data-dependent initialization against one forward pass of the same batch."""
    for name in ("BatchNorm", *RECIPES):
        model = resnet50()
        model = model if name == "BatchNorm" else ns.swap_norms(model, name, init="fresh", inplace=True)
        for side in (64, 112):
            batch = torch.randn(8, 3, side, side)
            work, forward = medians(
                repetitions,
                lambda model=model, batch=batch: lambda: ns.initialize(model, batch),  # type: ignore[misc]
                lambda model=model, batch=batch: lambda: evaluate(model, batch),  # type: ignore[misc]
            )
            what = f"initialize of ResNet-50 with {name}, 8×3×{side}×{side}"
            yield Ratio(what, "one forward pass", work, forward, INITIALIZING)


def evaluate(model: nn.Module, batch: Tensor) -> None:
    with torch.no_grad():
        model(batch)


def converting(repetitions: int) -> Iterator[Ratio]:
    """Conversion without data: its time against a forward pass of one image, its memory against the model's."""
    model, image = resnet50(), torch.randn(1, 3, 224, 224)
    times = medians(
        max(2, repetitions // 5),
        lambda: lambda: ns.swap_norms(model, "gn+ws"),
        lambda: lambda: [evaluate(model, image) for _ in range(10)],
    )
    what, against = "swap_norms(ResNet-50, 'gn+ws')", "one forward pass, 1×3×224×224"
    yield Ratio(what, against, times[0], times[1] / 10, CONVERTING)
    what = "swap_norms(ResNet-152, 'gn+ws'"
    yield from beside("resnet152", f"{what})", BESIDE)
    yield from beside("resnet152 in place", f"{what}, inplace=True)", IN_PLACE)
    yield from beside("resnet152 in place, not scaled", f"{what}, inplace=True, scale=False)", IN_PLACE)
    detector = import_quietly("torchvision.models.detection").fasterrcnn_resnet50_fpn
    model = detector(weights=None, weights_backbone=None).eval()
    (seconds,) = medians(1, lambda: lambda: ns.swap_norms(model, "gn+ws"))
    yield Ratio("swap_norms(fasterrcnn_resnet50_fpn, 'gn+ws')", "one second", seconds, 1.0, DETECTOR, "s")


def growing(repetitions: int) -> Iterator[Ratio]:
    """Long chains per conv-bn pair, a billion parameters, and a stream of calibration data."""
    sizes = (100, 1_000, 10_000)
    models = [chain(pairs) for pairs in sizes]
    times = medians(max(2, repetitions // 5), *(lambda m=m: lambda: ns.plan(m) for m in models))  # type: ignore[misc]
    first, *others = (seconds / pairs for seconds, pairs in zip(times, sizes, strict=True))
    for pairs, seconds in zip(sizes[1:], others, strict=True):
        yield Ratio(f"plan of {pairs:,} conv-bn pairs, per pair", "of 100 pairs, per pair", seconds, first, GROWING)
    with torch.device("meta"):
        model = billion()
    count = sum(parameter.numel() for parameter in model.parameters())
    (seconds,) = medians(1, lambda: lambda: ns.plan(model))
    what = f"plan of {count / 1e9:.2f}·10⁹ parameters on the meta device"
    yield Ratio(what, "one second", seconds, 1.0, SECONDS, "s")
    for recipe in RECIPES:
        options = "'gn+ws', scale=False" if recipe == "gn+ws" else f"'{recipe}'"
        yield from beside(f"billion to {recipe}", f"the same in bfloat16, convert({options}, inplace=True)", BILLION)
    if has_proc():
        few, many = (resident(f"stream of {samples}")["peak"] for samples in (1_000, 50_000))
        what = "convert of a small network, calibration streams 50,000 samples: memory"
        yield Ratio(what, "streams 1,000", many, few, STREAM, "MB")


class Block(nn.Module):
    """A bottleneck block, ``relu(x + f(x))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        shapes = ((4 * width, width, 1), (width, width, 3), (width, 4 * width, 1))
        pairs = [(nn.Conv2d(i, o, k, padding=k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o, k in shapes]
        self.body = nn.Sequential(*[layer for pair in pairs for layer in pair][:-1])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def billion() -> nn.Sequential:
    """Return a residual network of 1.0·10⁹ parameters, in bfloat16."""
    width = 1024
    stem = nn.Conv2d(3, 4 * width, 16, 16, bias=False), nn.BatchNorm2d(4 * width), nn.ReLU()
    return nn.Sequential(*stem, *(Block(width) for _ in range(56))).to(torch.bfloat16).eval()


# ------------------------------------------------------------------------------------ memory, in a process of its own


def beside(case: str, what: str, allowed: float) -> Iterator[Ratio]:
    """Yield what a conversion holds beside its model at its peak, against the model."""
    if has_proc():
        found = resident(case)
        yield Ratio(f"{what}: memory beside the model", "the model", found["beside"], found["model"], allowed, "MB")


def has_proc() -> bool:
    return Path("/proc/self/clear_refs").exists()


def resident(case: str) -> dict[str, float]:
    """Measure one of ``CASES`` in a process of its own, and return what :func:`measure` prints there."""
    code = f"import engine; engine.measure({case!r})"
    # What is freed goes back to the system at once, or the peak would depend on what torch had freed before.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=environment, check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def measure(case: str) -> None:
    """Print, in bytes, what a case held at its peak, what of it beside the model, and the model's size."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work, model = CASES[case]()
    ns.swap_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), "gn+ws")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    work()
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    print(json.dumps({"peak": _status("VmHWM"), "beside": _status("VmHWM") - before, "model": size}))


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _converted(make: Callable[[], nn.Module], *recipe: str, **options: Any) -> Callable[[], Case]:
    def case() -> Case:
        model = make()
        return lambda: ns.swap_norms(model, *recipe, **options), model

    return case


def _stream(samples: int) -> Callable[[], Case]:
    """Return a case whose BatchNorms store no statistics: they are measured on all samples."""

    def batches() -> Iterator[Tensor]:
        for _ in range(samples // 50):
            yield torch.randn(50, 3, 32, 32)

    def case() -> Case:
        pairs = ((nn.Conv2d(i, o, 3, 2), nn.BatchNorm2d(o, track_running_stats=False)) for i, o in ((3, 8), (8, 8)))
        model = nn.Sequential(*(layer for pair in pairs for layer in pair))
        return lambda: ns.swap_norms(model, "gn+ws", calibration=batches(), init="absorb"), model

    return case


def _resnet152() -> nn.Module:
    model: nn.Module = import_quietly("torchvision.models").resnet152(weights=None)
    return model.eval()


Case = tuple[Callable[[], Any], nn.Module]
"""What is measured, and the model beside which it is."""
CASES: dict[str, Callable[[], Case]] = {
    "resnet152": _converted(_resnet152, "gn+ws"),
    "resnet152 in place": _converted(_resnet152, "gn+ws", inplace=True),
    "resnet152 in place, not scaled": _converted(_resnet152, "gn+ws", inplace=True, scale=False),
    "billion to gn+ws": _converted(billion, "gn+ws", inplace=True, scale=False),
    "billion to wn+mobn": _converted(billion, "wn+mobn", inplace=True),
    "stream of 1000": _stream(1_000),
    "stream of 50000": _stream(50_000),
}


def evaluating(repetitions: int) -> Iterator[Ratio]:
    """A forward pass that computes its weights in each call, or once for ten, against one of the folded model."""
    batch = torch.randn(1, 3, 224, 224)
    for name in RECIPES:
        model = ns.swap_norms(resnet50(), name, init="fresh").eval()
        folded = ns.fold(model)

        def ten_cached(model: nn.Module = model) -> None:
            with parametrize.cached():
                for _ in range(10):
                    evaluate(model, batch)

        once, ten, deployed = medians(
            repetitions,
            lambda model=model: lambda: evaluate(model, batch),  # type: ignore[misc]
            lambda work=ten_cached: work,  # type: ignore[misc]
            lambda folded=folded: lambda: evaluate(folded, batch),  # type: ignore[misc]
        )
        what = f"forward pass of ResNet-50 with {name}, not folded, 1×3×224×224"
        yield Ratio(what, "folded", once, deployed)
        yield Ratio(f"{what}, within parametrize.cached() for ten", "folded", ten / 10, deployed)


STAGES = (planning, recording, rewriting, initializing, converting, growing, evaluating)
PARTS = {part.__name__: part for part in STAGES}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"only {', '.join(PARTS)}")
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="show where the time of each part goes")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {sorted(unknown)[0]!r}; choose from {', '.join(PARTS)}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    ratios: list[Ratio] = []
    for part in options.parts or PARTS:
        profile = cProfile.Profile()
        if options.profile:
            profile.enable()
        ratios += PARTS[part](options.repetitions)
        if options.profile:
            profile.disable()
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    print(text_table(("what", "against", "median", "its median", "ratio", "required", ""), [r.cells() for r in ratios]))
    few = max(2, options.repetitions // 5)
    print(f"\nCPU times; ratios of medians of {options.repetitions} interleaved runs (chains: {few}) after a warm-up")
    print(f"seed {options.seed}, {options.threads} threads, torch {torch.__version__}")
    return 0 if all(ratio.ok for ratio in ratios) else 1


if __name__ == "__main__":
    raise SystemExit(main())
