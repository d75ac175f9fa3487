"""What a swapped and folded network costs where it is deployed: onnxruntime, OpenVINO where it is installed, int8.

    python benchmarks/deployment.py                                    # ResNet-50, one image, about two minutes
    python benchmarks/deployment.py --network resnet50 mobilenet_v3_small --batch 1 8 --threads 1 2
    python benchmarks/deployment.py --int8                             # and quantized by onnxruntime's own tool

Every file is of the same network and weights. In each round each one runs once, in turn, and the CPU time of all its
threads is divided by that of the folded BatchNorm in the same round; the table has the median of these ratios and
their quartiles. Beside normswap's files run torch's own export of the same GroupNorm (``Mul`` and ``Add`` behind
InstanceNormalization), its opset-21 GroupNormalization, and the network without any norm. Where several settings are
asked for, the last table has all their ratios.

"reorders" counts, in the graph that onnxruntime has optimized, the copies between its blocked layout (NCHWc), which
convolutions run in, and the plain one. "error" is the largest difference from torch's output, relative to that output's
largest value, also of the files that ``--int8`` quantizes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

import normswap as ns
from normswap.loading.importing import import_quietly
from normswap.records import text_table

REFERENCE = "BatchNorm, folded"
Run = Callable[[np.ndarray[Any, Any]], Any]


def network(name: str) -> nn.Module:
    """Return a network of torchvision's whose BatchNorms have seen noise, so that what folds away is no identity."""
    model: nn.Module = getattr(import_quietly("torchvision.models"), name)(weights=None)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
    return model.eval()


def without_norms(model: nn.Module) -> nn.Module:
    """Return the network with nothing where its norms were: what is left to gain."""
    bare = copy.deepcopy(model)
    for module in bare.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return bare.eval()


def torchs_own(model: nn.Module, path: Path, x: Tensor) -> None:
    """Write a file by ``torch.onnx.export`` alone."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, dynamo=True, opset_version=18, external_data=False, verbose=False)


def files(model: nn.Module, x: Tensor, folder: Path) -> Iterator[tuple[str, Path, nn.Module]]:
    """Write each form of the network, and yield its name, its file and the form itself."""
    norms = {"gn+ws": ns.fold(ns.swap_norms(model, "gn+ws").eval()), "wn+mobn": ns.swap_norms(model, "wn+mobn").eval()}
    norms["wn+mobn"] = ns.fold(norms["wn+mobn"])
    forms = {
        REFERENCE: (ns.fold(model), 18),
        "wn+mobn, folded": (norms["wn+mobn"], 18),
        "gn+ws, folded": (norms["gn+ws"], 18),
        "the same, opset 21: torch's GroupNormalization": (norms["gn+ws"], 21),
        "no norm": (without_norms(model), 18),
    }
    for number, (name, (form, opset)) in enumerate(forms.items()):
        path = folder / f"{number}.onnx"
        ns.export_onnx(form, path, example_inputs=(x,), opset=opset, verify_outputs=False)
        yield name, path, form
    path = folder / "torch.onnx"
    torchs_own(norms["gn+ws"], path, x)
    yield "the same, torch's own export", path, norms["gn+ws"]


def session(path: Path, threads: int, written: Path | None = None) -> ort.InferenceSession:
    """Return an onnxruntime session on the CPU; ``written`` is where its graph goes, as it is optimized."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a thread that waits takes no CPU time
    if written is not None:
        options.optimized_model_filepath = str(written)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def in_onnxruntime(path: Path, threads: int) -> Run:
    """Return what runs a file in onnxruntime."""
    running = session(path, threads)
    name = running.get_inputs()[0].name
    return lambda x: running.run(None, {name: x})[0]


def in_openvino(path: Path, threads: int) -> Run:
    """Return what runs a file in OpenVINO."""
    import openvino  # type: ignore[import-not-found, unused-ignore]

    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda x: compiled(x)[0]


def optimized(path: Path, threads: int) -> Path:
    """Return the file of the graph that onnxruntime makes of a file."""
    written = path.with_suffix(".optimized.onnx")
    session(path, threads, written)
    return written


def reorders(path: Path) -> int:
    """Return how many copies between layouts an optimized graph has."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return sum(node.op_type in ("ReorderInput", "ReorderOutput") for node in nodes)


def compared(runs: dict[str, Run], x: np.ndarray[Any, Any], rounds: int) -> dict[str, tuple[float, list[float]]]:
    """Return each one's median in milliseconds of CPU time, and its ratios to the reference."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run(x)
            if number:
                times[name].append(time.process_time() - start)
    reference = times[REFERENCE]
    ratios = {name: [a / b for a, b in zip(own, reference, strict=True)] for name, own in times.items()}
    return {name: (1e3 * statistics.median(times[name]), ratios[name]) for name in runs}


class Noise:
    """The calibration data of onnxruntime's quantization: noise, as the networks were trained on none."""

    def __init__(self, name: str, x: Tensor, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.left = iter([{name: torch.randn(x.shape, generator=generator).numpy()} for _ in range(count)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.left, None)


def quantized(path: Path, x: Tensor, threads: int) -> Path:
    """Return a file with int8 convolutions and products, by onnxruntime's static quantization, per channel."""
    from onnxruntime import quantization

    prepared, result = path.with_suffix(".prepared.onnx"), path.with_suffix(".int8.onnx")
    name = session(path, threads).get_inputs()[0].name
    logging.getLogger().setLevel(logging.ERROR)
    quantization.quant_pre_process(path, prepared, skip_symbolic_shape=True)
    operators = ["Conv", "Gemm", "MatMul"]
    quantization.quantize_static(prepared, result, Noise(name, x, 8), op_types_to_quantize=operators, per_channel=True)
    return result


def relative_error(found: Any, expected: Any) -> float:
    """Return the largest difference, relative to the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def quartiles(values: Sequence[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:.2f}–{high:.2f}"


def runtimes() -> dict[str, Callable[[Path, int], Run]]:
    """Return what runs a file, by the runtime's name; a runtime that is not installed is left out with a sentence."""
    found = {f"onnxruntime {ort.__version__}": in_onnxruntime}
    try:
        import openvino  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        print("OpenVINO is not installed, so that only onnxruntime is measured (pip install openvino)\n")
        return found
    return {**found, f"OpenVINO {openvino.__version__.partition('-')[0]}": in_openvino}


@dataclass(frozen=True)
class Setting:
    """What is deployed, and on how many threads."""

    network: str
    batch: int
    side: int
    threads: int

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.network}, {self.batch}×3×{self.side}×{self.side}, {threads}"


def measured(setting: Setting, rounds: int, int8: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """Print what each form costs in each runtime, and yield the ratios, by the runtime and the form."""
    torch.manual_seed(0)
    torch.set_num_threads(setting.threads)
    x = torch.randn(setting.batch, 3, setting.side, setting.side)
    with tempfile.TemporaryDirectory() as place:
        written = list(files(network(setting.network), x, Path(place)))
        paths = {name: path for name, path, _ in written}
        with torch.no_grad():
            expected = {name: form(x).numpy() for name, _, form in written}
        rows = []
        for runtime, opened in runtimes().items():
            runs = {name: opened(path, setting.threads) for name, path in paths.items()}
            errors = {name: relative_error(run(x.numpy()), expected[name]) for name, run in runs.items()}
            for name, (median, ratios) in compared(runs, x.numpy(), rounds).items():
                copies = str(reorders(optimized(paths[name], setting.threads))) if opened is in_onnxruntime else "–"
                cells = f"{median:.1f} ms", f"{statistics.median(ratios):.2f}", quartiles(ratios), copies
                rows.append((runtime, name, *cells, f"{errors[name]:.1e}"))
            yield runtime, {row[1]: float(row[3]) for row in rows if row[0] == runtime}
        print(f"{setting}, {rounds} rounds\n")
        headings = ("runtime", "network", "CPU time", "ratio", "quartiles", "reorders", "error")
        print(text_table(headings, rows) + "\n", flush=True)
        rows = []
        for name in (REFERENCE, "wn+mobn, folded", "gn+ws, folded") if int8 else ():
            run = in_onnxruntime(quantized(paths[name], x, setting.threads), setting.threads)
            rows.append((name, f"{relative_error(run(x.numpy()), expected[name]):.1e}"))
        if rows:
            print(text_table(("int8 in onnxruntime", "error"), rows) + "\n", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", nargs="+", default=["resnet50"], help="of torchvision.models; one or more")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--side", type=int, nargs="+", default=[224])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--int8", action="store_true", help="quantize the files, and compare their outputs")
    options = parser.parse_args(arguments)
    summary: list[tuple[str, ...]] = []
    for choice in itertools.product(options.network, options.batch, options.side, options.threads):
        setting = Setting(*choice)
        for runtime, ratios in measured(setting, options.rounds, options.int8):
            summary.append((str(setting), runtime, *(f"{ratio:.2f}" for ratio in ratios.values())))
    print(text_table(("ratios", "runtime", *ratios), summary))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
