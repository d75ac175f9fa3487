"""The demo: every recipe on a trained network and real digits, from the swap to the ONNX file in onnxruntime.

# Note [Latency of the files]
The files take turns, so that a machine that slows down slows all of them down, and the median is reported, which a
few interrupted runs do not move. One thread: a network this small has no work for a second one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.checks.comparison import verify
from normswap.checks.onnx_file import OnnxFile
from normswap.demo.data import load_calibration, load_digits, load_network
from normswap.deploy.folding import fold
from normswap.deploy.onnx.export import export_onnx
from normswap.errors import InputError
from normswap.norms import is_convertible
from normswap.pipeline import swap_norms
from normswap.recipes import all_recipes, make_recipe
from normswap.records import text_table

__all__ = ["DemoReport", "DemoRow", "run_demo"]

REFERENCE = "bn"
"""The row of the network as it is, its BatchNorms folded away for deployment."""

CALIBRATED = ("gn+ws", "ws")
"""The recipes that take something away from a weight, and so do better where they see data."""

THREADS = 1
WARM_UP, RUNS = 20, 300

HEADER = ("recipe", "fresh", "swapped", "folded", "onnx", "fold diff", "onnx diff", "ms/image", "trained", "deployed")
ACCURACIES = 4  # columns of the first table; both fit into 80 columns

LEGEND = """\
fresh      top-1 in % with fresh norms, which is what other converters give
swapped    after swap_norms without data; calibrated: {calibration} unlabelled digits
folded     top-1 in % after fold: plain weights, no parametrization left
onnx       top-1 in % of the ONNX file in onnxruntime
fold diff  largest difference of the folded network, relative to its output
onnx diff  the same of the ONNX file from the folded network
ms/image   the ONNX file in onnxruntime, batch 1, {threads} thread, median of runs
trained    parameters of the swapped network, the one to train
deployed   parameters of the folded network"""

OPENING = """\
The ONNX files are in {folder}
See one: drop it onto https://netron.app
Run one:
    import numpy, onnxruntime
    file = {file!r}
    session = onnxruntime.InferenceSession(file)
    print(session.run(None, {{"images": numpy.zeros((1, 1, 8, 8), "float32")}}))"""


@dataclass(frozen=True)
class DemoRow:
    """What one recipe did to the network. Accuracies are top-1 in percent on the held-out digits.

    Args:
        recipe: The recipe's name, ``bn`` for the network as it is.
        calibrated: Whether the swap saw the unlabelled calibration digits.
        fresh: The accuracy with fresh norms; None for the network as it is.
        swapped: The accuracy after the swap.
        folded: The accuracy after folding.
        onnx: The accuracy of the ONNX file in onnxruntime.
        fold_difference: Largest difference, folded against swapped, relative to the largest output.
        onnx_difference: Largest difference, ONNX file against folded, relative to the largest output.
        ok: Whether both differences are within the tolerance of :func:`normswap.verify`.
        milliseconds: The file's time for one image, see Note [Latency of the files].
        trained_parameters: Parameters of the swapped network.
        deployed_parameters: Parameters of the folded network.
        file: The ONNX file.
    """

    recipe: str
    calibrated: bool
    fresh: float | None
    swapped: float
    folded: float
    onnx: float
    fold_difference: float
    onnx_difference: float
    ok: bool
    milliseconds: float
    trained_parameters: int
    deployed_parameters: int
    file: str

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table."""
        values = (
            "–" if self.fresh is None else f"{self.fresh:.1f}",
            f"{self.swapped:.1f}",
            f"{self.folded:.1f}",
            f"{self.onnx:.1f}",
            _small(self.fold_difference),
            _small(self.onnx_difference),
            f"{self.milliseconds:.3f}",
            f"{self.trained_parameters:,}",
            f"{self.deployed_parameters:,}",
        )
        name = f"{self.recipe}, calibrated" if self.calibrated else self.recipe
        return (name, *(value.rjust(len(head)) for value, head in zip(values, HEADER[1:], strict=True)))


@dataclass(frozen=True)
class DemoReport:
    """What the demo found; prints as a table, turns to JSON.

    Args:
        model: The network's class.
        norms: Its BatchNorms.
        digits: The held-out digits that every accuracy is measured on.
        calibration: The unlabelled digits of the calibrated rows.
        rows: One row per recipe, the network as it is first.
        threads: Threads of torch and onnxruntime.
        seconds: What the demo took.
        output: The folder of the ONNX files.
    """

    model: str
    norms: int
    digits: int
    calibration: int
    rows: tuple[DemoRow, ...]
    threads: int
    seconds: float
    output: str

    @property
    def ok(self) -> bool:
        """Whether every folded network and every file computes what it should."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    def __str__(self) -> str:
        head = f"{self.model}: {self.norms} BatchNorms, {self.digits} held-out handwritten digits"
        if wrong := [row.cells()[0] for row in self.rows if not row.ok]:
            verdict = f"NOT VERIFIED: {'; '.join(wrong)}"
        else:
            verdict = f"all {len(self.rows)} files verified against torch, {self.seconds:.0f} s"
        cells = [row.cells() for row in self.rows]
        end = 1 + ACCURACIES
        parts = [
            head,
            text_table(HEADER[:end], [row[:end] for row in cells]),
            text_table((HEADER[0], *HEADER[end:]), [(row[0], *row[end:]) for row in cells]),
            LEGEND.format(calibration=self.calibration, threads=self.threads),
            verdict,
        ]
        if self.rows and Path(self.rows[-1].file).is_file():  # a temporary folder is gone by now
            parts.append(OPENING.format(folder=self.output, file=self.rows[-1].file))
        return "\n\n".join(parts)

    def to_json(self, indent: int | None = 2) -> str:
        """Return the record as JSON; a difference that is not finite is null."""
        record = {"ok": self.ok, **dataclasses.asdict(self)}
        for row in record["rows"]:
            row.update({k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)})
        return json.dumps(record, indent=indent, ensure_ascii=False, allow_nan=False)


def run_demo(
    output: Path,
    *,
    recipes: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> DemoReport:
    """Swap the demo network's norms for each recipe, fold, export and run it, and measure every stage.

    Args:
        output: The folder for the ONNX files; is made where it is missing.
        recipes: The recipes' names; default all of them.
        progress: Is called with one line before each step.

    Raises:
        InputError: The folder cannot be used, or there is no such recipe.
    """
    start = time.perf_counter()
    names = [make_recipe(name).name for name in (all_recipes() if recipes is None else recipes)]
    folder = _folder(Path(output))
    say = progress or (lambda line: None)
    network, (images, labels), calibration = load_network(), load_digits(), load_calibration()
    with _threads(THREADS):
        results = [_measure(REFERENCE, network, None, folder, images, labels, say)]
        for name in names:
            fresh = swap_norms(network, name, init="fresh", example_inputs=images[:2])
            before = _top1(fresh(images), labels)
            swapped = swap_norms(network, name, example_inputs=images[:2])
            results.append(_measure(name, swapped, before, folder, images, labels, say))
            if name in CALIBRATED:
                swapped = swap_norms(network, name, calibration=calibration)
                results.append(_measure(name, swapped, before, folder, images, labels, say, calibrated=True))
        say("timing the ONNX files")
        milliseconds = _latencies([row.file for row in results], images[:1])
    return DemoReport(
        model=type(network).__name__,
        norms=sum(map(is_convertible, network.modules())),
        digits=len(images),
        calibration=len(calibration),
        rows=tuple(dataclasses.replace(row, milliseconds=ms) for row, ms in zip(results, milliseconds, strict=True)),
        threads=THREADS,
        seconds=time.perf_counter() - start,
        output=str(folder),
    )


def _measure(
    name: str,
    swapped: nn.Module,
    fresh: float | None,
    folder: Path,
    images: Tensor,
    labels: Tensor,
    say: Callable[[str], None],
    *,
    calibrated: bool = False,
) -> DemoRow:
    """Fold and export one swapped network, and measure all but the latency, which needs every file."""
    say(f"{name}, calibrated" if calibrated else name)
    file = folder / f"digits-{name}{'-calibrated' if calibrated else ''}.onnx"
    folded = fold(swapped, example_inputs=images[:2])
    export_onnx(folded, file, example_inputs=images[:2], verify_outputs=False)  # is done below, on all images
    checks = verify(swapped, folded, images), verify(folded, file, images)
    return DemoRow(
        recipe=name,
        calibrated=calibrated,
        fresh=fresh,
        swapped=_top1(swapped(images), labels),
        folded=_top1(folded(images), labels),
        onnx=_top1(torch.from_numpy(OnnxFile(file)((images,), {})[0][1]), labels),
        fold_difference=checks[0].max_rel,
        onnx_difference=checks[1].max_rel,
        ok=all(check.ok for check in checks),
        milliseconds=math.nan,
        trained_parameters=sum(p.numel() for p in swapped.parameters()),
        deployed_parameters=sum(p.numel() for p in folded.parameters()),
        file=str(file),
    )


def _small(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _top1(logits: Tensor, labels: Tensor) -> float:
    return 100 * int((logits.argmax(1) == labels).sum()) / len(labels)


def _latencies(files: Sequence[str], image: Tensor) -> list[float]:
    """Return each file's median time for one image in milliseconds, see Note [Latency of the files]."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    for path in files:
        file = OnnxFile(Path(path))
        calls.append((file.session, file.bind((image,), {})))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(WARM_UP + RUNS):
        for taken, (session, feed) in zip(times, calls, strict=True):
            start = time.perf_counter()
            session.run(None, feed)
            taken.append(time.perf_counter() - start)
    return [1000 * statistics.median(taken[WARM_UP:]) for taken in times]


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise InputError(
            f"{str(path)!r} cannot be used as a folder: {cause.strerror or cause}",
            code="demo-output",
            hint="name a folder, which is made where it is missing",
        ) from cause
    return path


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run torch, and with it onnxruntime, on ``count`` threads and without gradients."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)
