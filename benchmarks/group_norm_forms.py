"""Group normalization as standard operators of ONNX: what each way to write it costs in a runtime.

    python benchmarks/group_norm_forms.py                                  # ResNet-50, one image, about three minutes
    python benchmarks/group_norm_forms.py --network mobilenet_v3_small

Each form is the file that normswap writes with its normalizations written another way. Times are ratios to the folded
BatchNorm, as in ``deployment.py``. "reorders" are onnxruntime's copies between layouts. "error" is that of the whole
network; "error, mean 1000" that of one layer whose channels have a mean of 1000 standard deviations: what a variance
from ``E[x²] − E[x]²`` loses there.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deployment
import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

import normswap as ns
from normswap.records import text_table

Array = np.ndarray[Any, Any]


class Writer:
    """Writes the nodes of one normalization: ``group`` groups of channels, ``γ`` and ``β`` per channel."""

    def __init__(self, graph: onnx.GraphProto, y: str, gamma: Array, beta: Array, groups: int, eps: float) -> None:
        self.graph, self.y, self.gamma, self.beta, self.groups, self.eps = graph, y, gamma, beta, groups, eps
        self.nodes: list[onnx.NodeProto] = []

    def __call__(self, kind: str, *inputs: str | Array, **attributes: Any) -> str:
        """Append a node, and return its output; arrays become constants."""
        place = f"{self.y}/{len(self.nodes)}"
        names = [i if isinstance(i, str) else self._constant(f"{place}/{n}", i) for n, i in enumerate(inputs)]
        self.nodes.append(helper.make_node(kind, names, [place], name=place, **attributes))
        return place

    def _constant(self, name: str, array: Array) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def per_channel(self, array: Array) -> Array:
        return array.reshape(1, -1, 1, 1)

    def over_groups(self, pooled: str) -> str:
        """Return the mean over each group of ``(N, C, 1, 1)``, for each of its channels."""
        width = self.gamma.size // self.groups
        grouped = self("Reshape", pooled, np.array([0, self.groups, width, 1]))
        mean = self("ReduceMean", grouped, np.array([2]), keepdims=1)
        spread = self("Expand", mean, np.array([1, self.groups, width, 1]))
        return self("Reshape", spread, np.array([0, self.gamma.size, 1, 1]))

    def root(self, variance: str) -> str:
        return self("Sqrt", self("Add", variance, np.float32(self.eps)))

    def normalized(self, x: str) -> str:
        """Return ``(x − mean)/std`` by InstanceNormalization over groups."""
        grouped = self("Reshape", x, np.array([0, self.groups, -1]))
        ones = np.ones(self.groups, np.float32)
        y = self("InstanceNormalization", grouped, ones, np.zeros_like(ones), epsilon=self.eps)
        return self("Reshape", y, self("Shape", x))


def batch_norm(write: Writer, x: str) -> str:
    ones = np.ones_like(write.gamma)
    return write("BatchNormalization", write.normalized(x), write.gamma, write.beta, 0 * ones, ones, epsilon=0.0)


def multiplied(write: Writer, x: str) -> str:
    scaled = write("Mul", write.normalized(x), write.per_channel(write.gamma))
    return write("Add", scaled, write.per_channel(write.beta))


def depthwise(write: Writer, x: str) -> str:
    weight = write.gamma.reshape(-1, 1, 1, 1)
    return write("Conv", write.normalized(x), weight, write.beta, group=write.gamma.size, kernel_shape=[1, 1])


def centred(write: Writer, x: str) -> str:
    difference = write("Sub", x, write.over_groups(write("GlobalAveragePool", x)))
    variance = write.over_groups(write("GlobalAveragePool", write("Mul", difference, difference)))
    scaled = write("Mul", difference, write("Div", write.per_channel(write.gamma), write.root(variance)))
    return write("Add", scaled, write.per_channel(write.beta))


def squared(write: Writer, x: str) -> str:
    mean = write.over_groups(write("GlobalAveragePool", x))
    square = write.over_groups(write("GlobalAveragePool", write("Mul", x, x)))
    scale = write("Div", write.per_channel(write.gamma), write.root(write("Sub", square, write("Mul", mean, mean))))
    shift = write("Sub", write.per_channel(write.beta), write("Mul", mean, scale))
    return write("Add", write("Mul", x, scale), shift)


def reduced(write: Writer, x: str) -> str:
    grouped = write("Reshape", x, np.array([0, write.groups, -1]))
    difference = write("Sub", grouped, write("ReduceMean", grouped, np.array([2]), keepdims=1))
    variance = write("ReduceMean", write("Mul", difference, difference), np.array([2]), keepdims=1)
    y = write("Reshape", write("Div", difference, write.root(variance)), write("Shape", x))
    weight = write.gamma.reshape(-1, 1, 1, 1)
    return write("Conv", y, weight, write.beta, group=write.gamma.size, kernel_shape=[1, 1])


FORMS: dict[str, Callable[[Writer, str], str]] = {
    "InstanceNormalization, BatchNormalization (normswap's)": batch_norm,
    "InstanceNormalization, Mul, Add (torch's)": multiplied,
    "InstanceNormalization, depthwise 1×1 Conv": depthwise,
    "ReduceMean, Sub, Mul, ReduceMean, Div, depthwise 1×1 Conv": reduced,
    "GlobalAveragePool, Sub, Mul, GlobalAveragePool, Mul, Add": centred,
    "GlobalAveragePool of x and x², Mul, Add": squared,
}


def rewritten(source: Path, form: Callable[[Writer, str], str], target: Path) -> Path:
    """Write a file of normswap's with another form of its group normalizations, and return its path."""
    model = onnx.load(source)
    graph = model.graph
    producers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes, gone = [], set()
    for node in graph.node:
        back = producers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        norm = producers.get(back.input[0]) if back is not None and back.op_type == "Reshape" else None
        if back is None or norm is None or norm.op_type != "InstanceNormalization":
            nodes.append(node)
            continue
        grouped = producers[norm.input[0]]
        gone.update((back.output[0], back.input[1], norm.output[0], grouped.output[0]))
        gamma, beta = constants[node.input[1]], constants[node.input[2]]
        write = Writer(graph, node.output[0], gamma, beta, constants[norm.input[1]].size, norm.attribute[0].f)
        form(write, grouped.input[0])
        write.nodes[-1].output[0] = node.output[0]
        nodes.extend(write.nodes)
    nodes = [node for node in nodes if node.output[0] not in gone]
    read = {name for node in nodes for name in node.input}
    initializers = [tensor for tensor in graph.initializer if tensor.name in read]
    for field, values in ((graph.node, nodes), (graph.initializer, initializers), (graph.value_info, ())):
        del field[:]
        field.extend(values)  # type: ignore[attr-defined]
    onnx.checker.check_model(model)
    onnx.save(model, target)
    return target


def far_from_zero(folder: Path) -> tuple[Path, Array, Array]:
    """Return a file of one layer with a mean of 1000 standard deviations, its input, and its output in float64."""
    layers = nn.Sequential(nn.Conv2d(16, 32, 1), nn.GroupNorm(2, 32)).eval()
    with torch.no_grad():
        layers[0].weight /= layers[0].weight.norm(dim=1, keepdim=True)
        layers[0].bias.fill_(1000)
        layers[1].weight.uniform_(0.5, 1.5)
        layers[1].bias.uniform_(-1, 1)
        x = torch.randn(1, 16, 32, 32)
        path = folder / "far.onnx"
        ns.export_onnx(layers, path, example_inputs=(x,), verify_outputs=False)
        return path, x.numpy(), layers.double()(x.double()).numpy()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", default="resnet50", help="of torchvision.models")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(1, 3, 224, 224)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = deployment.network(options.network)
        swapped = ns.fold(ns.swap_norms(model, "gn+ws").eval())
        paths = {deployment.REFERENCE: folder / "bn.onnx", "": folder / "gn.onnx"}
        for path, form in zip(paths.values(), (ns.fold(model), swapped), strict=True):
            ns.export_onnx(form, path, example_inputs=(x,), verify_outputs=False)
        source = paths.pop("")
        paths.update({n: rewritten(source, form, folder / f"{i}.onnx") for i, (n, form) in enumerate(FORMS.items())})
        far, far_x, far_y = far_from_zero(folder)
        with torch.no_grad():
            expected = swapped(x).numpy()
        for runtime, opened in deployment.runtimes().items():
            runs = {name: opened(path, 1) for name, path in paths.items()}
            for name, (median, ratios) in deployment.compared(runs, x.numpy(), options.rounds).items():
                row = [runtime, name, f"{median:.1f} ms", f"{statistics.median(ratios):.2f}"]
                row.append(deployment.quartiles(ratios))
                copies = deployment.reorders(deployment.optimized(paths[name], 1))
                row.append(str(copies) if opened is deployment.in_onnxruntime else "–")
                errors: tuple[float, ...] = ()
                if name in FORMS:
                    alone = opened(rewritten(far, FORMS[name], folder / "alone.onnx"), 1)
                    errors = tuple(
                        deployment.relative_error(found, wanted)
                        for found, wanted in ((runs[name](x.numpy()), expected), (alone(far_x), far_y))
                    )
                rows.append((*row, *(f"{error:.1e}" for error in errors), *[""] * (2 - len(errors))))
    headings = ("runtime", "form", "CPU time", "ratio", "quartiles", "reorders", "error", "error, mean 1000")
    print(text_table(headings, rows))
    print(f"\n{options.network}, 1×3×224×224, 1 thread, {options.rounds} rounds")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
