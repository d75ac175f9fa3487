"""What a swapped and folded network costs where it is deployed: onnxruntime, OpenVINO where it is installed, int8.

    python benchmarks/deployment.py                                    # ResNet-50, one image, about five minutes
    python benchmarks/deployment.py --network mobilenet_v3_large --batch 8
    python benchmarks/deployment.py --int8                             # and quantized by onnxruntime's own tool

Every file is of the same network and weights. In each round each one runs once, in turn, and its CPU time on one thread
is divided by that of the folded BatchNorm in the same round; the table has the median of these ratios and their
quartiles. Beside normswap's files run torch's own export of the same GroupNorm (``Mul`` and ``Add`` behind
InstanceNormalization), its opset-21 GroupNormalization, and the network without any norm.

"reorders" counts, in the graph that onnxruntime has optimized, the copies between its blocked layout (NCHWc), which
convolutions run in, and the plain one. With ``--int8``, the error is the largest difference from the float file's
output on held-out noise, relative to that output's largest value; for both.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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


def files(model: nn.Module, x: Tensor, folder: Path) -> Iterator[tuple[str, Path]]:
    """Write each form of the network, and yield its name and file."""
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
        yield name, path
    path = folder / "torch.onnx"
    torchs_own(norms["gn+ws"], path, x)
    yield "the same, torch's own export", path


def session(path: Path, threads: int, optimized: Path | None = None) -> ort.InferenceSession:
    """Return an onnxruntime session on the CPU; ``optimized`` is where its graph is written to."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def in_onnxruntime(path: Path, threads: int, optimized: Path | None = None) -> Run:
    """Return what runs a file in onnxruntime."""
    running = session(path, threads, optimized)
    name = running.get_inputs()[0].name
    return lambda x: running.run(None, {name: x})[0]


def in_openvino(path: Path, threads: int) -> Run:
    """Return what runs a file in OpenVINO."""
    import openvino  # type: ignore[import-not-found, unused-ignore]

    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda x: compiled(x)[0]


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


def has_openvino() -> bool:
    try:
        import openvino  # type: ignore[import-not-found, unused-ignore] # noqa: F401
    except ImportError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", default="resnet50", help="of torchvision.models")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--int8", action="store_true", help="quantize the files, and compare their outputs")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    x = torch.randn(options.batch, 3, options.side, options.side)
    rows, errors = [], []
    with tempfile.TemporaryDirectory() as place:
        paths = dict(files(network(options.network), x, Path(place)))
        graphs = {name: path.with_suffix(".optimized.onnx") for name, path in paths.items()}
        runs = {name: in_onnxruntime(path, options.threads, graphs[name]) for name, path in paths.items()}
        for name, (median, ratios) in compared(runs, x.numpy(), options.rounds).items():
            cells = (
                f"{median:.1f} ms",
                f"{statistics.median(ratios):.2f}",
                quartiles(ratios),
                str(reorders(graphs[name])),
            )
            rows.append(("onnxruntime", name, *cells))
        if has_openvino():
            runs = {name: in_openvino(path, options.threads) for name, path in paths.items()}
            expected = in_onnxruntime(paths["gn+ws, folded"], options.threads)(x.numpy())
            errors.append(("OpenVINO", "gn+ws, folded", relative_error(runs["gn+ws, folded"](x.numpy()), expected)))
            for name, (median, ratios) in compared(runs, x.numpy(), options.rounds).items():
                rows.append(
                    ("OpenVINO", name, f"{median:.1f} ms", f"{statistics.median(ratios):.2f}", quartiles(ratios), "–")
                )
        print(text_table(("runtime", "network", "CPU time", "ratio", "quartiles", "reorders"), rows), flush=True)
        for name in (REFERENCE, "wn+mobn, folded", "gn+ws, folded") if options.int8 else ():
            expected = in_onnxruntime(paths[name], options.threads)(x.numpy())
            run = in_onnxruntime(quantized(paths[name], x, options.threads), options.threads)
            errors.append(("int8 in onnxruntime", name, relative_error(run(x.numpy()), expected)))
    if errors:
        print("\n" + text_table(("", "network", "error"), [(a, b, f"{error:.1e}") for a, b, error in errors]))
    shape = "×".join(map(str, x.shape))
    print(
        f"\n{options.network}, {shape}, {options.threads} threads, {options.rounds} rounds, "
        f"onnxruntime {ort.__version__}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
