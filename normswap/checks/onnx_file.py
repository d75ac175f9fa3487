"""An ONNX file as something that can be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normswap.errors import InputError, first_line
from normswap.runs.arguments import Named, dtype_name, named_leaves

__all__ = ["OnnxFile"]

ONNX_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


class OnnxFile:
    """An ONNX file as a callable: onnxruntime on the CPU, inputs bound by name or position."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        if path.suffix != ".onnx" or not path.is_file():
            raise InputError(
                f"{path} is not an .onnx file" if path.exists() else f"there is no file {path}",
                code="onnx-missing",
                hint="check the path; it ends with .onnx",
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = min(2, torch.get_num_threads())
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors only; they are raised as well
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as cause:
            raise InputError(
                f"onnxruntime cannot load {path}: {first_line(cause)}",
                code="onnx-load",
                hint="check the file with onnx.checker; a newer opset needs a newer onnxruntime",
            ) from cause
        self.path = path

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Named:
        """Run the file and return its outputs by name."""
        feed = self.bind(args, kwargs)
        names = [output.name for output in self.session.get_outputs()]
        return list(zip(names, self.session.run(names, feed), strict=True))

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arrays by input name; what is no tensor is a constant in the file and is passed over.

        Positional inputs go by position, the tensors within one by the names that the file has for them: of an input
        ``d`` that is a dict with ``a`` and ``b``, those are ``d_a`` and ``d_b``, in whatever order the dict is written.
        """
        expected = self.session.get_inputs()
        given = [(name, x) for name, x in named_leaves(kwargs or list(args)) if isinstance(x, Tensor)]
        if kwargs and {name for name, _ in given} != {node.name for node in expected}:
            raise self.misfit("got the inputs " + ", ".join(name for name, _ in given))
        if len(given) != len(expected):
            raise self.misfit(f"got {len(given)} input tensors")
        names = [node.name for node in expected]
        tensors = [dict(given)[name] for name in names] if kwargs else _in_order(args, names)
        for node, x in zip(expected, tensors, strict=True):
            fits = len(node.shape) == x.ndim and all(
                not isinstance(size, int) or size == n for size, n in zip(node.shape, x.shape, strict=True)
            )
            if not fits or ONNX_DTYPES.get(node.type) != x.dtype:
                raise self.misfit(f"got {dtype_name(x)} {list(x.shape)} for {node.name!r}")
        return {node.name: x.cpu().numpy() for node, x in zip(expected, tensors, strict=True)}

    def example(self, batch: int = 2) -> tuple[Tensor, ...] | None:
        """Return seeded noise of the sizes that the file states; None where it leaves more than the first axis open."""
        generator = torch.Generator().manual_seed(0)
        inputs = []
        for node in self.session.get_inputs():
            sizes = [
                size if isinstance(size, int) else batch if not axis else 0 for axis, size in enumerate(node.shape)
            ]
            dtype = ONNX_DTYPES.get(node.type)
            if dtype is None or not dtype.is_floating_point or 0 in sizes:
                return None
            inputs.append(torch.randn(sizes, generator=generator).to(dtype))
        return tuple(inputs)

    def misfit(self, got: str) -> InputError:
        """Return the error that says what the file takes."""
        takes = ", ".join(
            f"{node.name}: {dtype_name(ONNX_DTYPES[node.type]) if node.type in ONNX_DTYPES else node.type} "
            f"[{', '.join(map(str, node.shape))}]"
            for node in self.session.get_inputs()
        )
        return InputError(f"{self.path.name}: {got}", code="onnx-inputs", hint=f"the file takes {takes}")


def _in_order(args: tuple[Any, ...], names: list[str]) -> list[Tensor]:
    """Return the tensors of positional inputs in the order of the file's names, as many as there are."""
    found: list[Tensor] = []
    for arg in args:
        leaves = {name: x for name, x in named_leaves((arg,), "") if isinstance(x, Tensor)}
        own = names[len(found) : len(found) + len(leaves)]
        suffixes = {name.removeprefix("_0"): x for name, x in leaves.items()}  # _a of {"a": x}, nothing of a tensor
        prefixes = {own[0].removesuffix(suffix) for suffix in suffixes} if own else set()
        by_name = next(
            (fits for prefix in prefixes if (fits := {prefix + s: x for s, x in suffixes.items()}).keys() == set(own)),
            None,
        )
        found += [by_name[name] for name in own] if by_name is not None else leaves.values()
    return found
