"""What operations do to channels that are scaled (:mod:`normswap.capture.channels`): one rule for each that is known.

A rule takes what is known of an operation's arguments and returns what is then known of its result; None says that
nothing is, and that the channels of its arguments must stay as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

__all__ = ["MODULES", "RULES", "VALUE_FREE", "Numbering", "Value", "reads_attribute", "values_in"]


@dataclass(frozen=True)
class Value:
    """What is known of a tensor ``(N, C, …)``: its channels' numbers and, where it is known, its number of axes.

    ``gate`` says that its channels are fixed: multiplied with it, another value keeps its scales. A value of two axes
    may hold each channel several times in a row, as flattening does.
    """

    numbers: Tensor
    rank: int | None
    gate: bool = False


class Numbering(Protocol):
    """What rules may do to the numbers of channels."""

    def new(self, channels: int) -> Tensor:
        """Return numbers that nobody has."""

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Let channels of ``a`` and ``b`` have one scale, one by one."""

    def fix(self, value: Any) -> None:
        """Let the channels of ``value``, or of several, stay as they are."""


def values_in(value: Any) -> list[Value]:
    """Return what is known of a value, or of those in a list or tuple."""
    if isinstance(value, Value):
        return [value]
    return [one for item in value for one in values_in(item)] if isinstance(value, (list, tuple)) else []


VALUE_FREE: frozenset[Any] = frozenset({"size", "dim", "ndimension", "numel", "__len__", "is_floating_point"})


def reads_attribute(node: fx.Node) -> bool:
    """Tell whether ``node`` reads an attribute that tells nothing of a tensor's values."""
    return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")


def _argument(place: int, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], default: Any = None) -> Any:
    return args[place] if place < len(args) else kwargs.get(name, default)


def _same(numbering: Numbering, args: Any, kwargs: Any) -> Any:
    """An operation on each channel by itself that keeps a positive factor, and all axes."""
    x = _argument(0, "input", args, kwargs)
    alone = len(values_in([*args, *kwargs.values()])) == 1 and not kwargs.get("return_indices")
    return x if isinstance(x, Value) and alone else None


def _gate(numbering: Numbering, args: Any, kwargs: Any) -> Any:
    """An operation on each value by itself that keeps no factor."""
    x = _argument(0, "input", args, kwargs)
    return _gated(numbering, None, x) if isinstance(x, Value) else None


def _gated(numbering: Numbering, module: nn.Module | None, x: Value) -> Value:
    numbering.fix(x)
    return Value(x.numbers, x.rank, gate=True)


def _aligned(a: Any, b: Any) -> bool:
    """Tell whether both are values whose channels meet one by one, whatever is broadcast over space."""
    both = isinstance(a, Value) and isinstance(b, Value)
    return both and a.rank is not None and a.rank == b.rank and len(a.numbers) == len(b.numbers)


def _add(numbering: Numbering, args: Any, kwargs: Any) -> Any:
    a, b = _argument(0, "input", args, kwargs), _argument(1, "other", args, kwargs)
    if not _aligned(a, b):
        return None
    numbering.tie(a.numbers, b.numbers)
    return Value(a.numbers, a.rank, a.gate and b.gate)


def _multiply(numbering: Numbering, args: Any, kwargs: Any) -> Any:
    a, b = _argument(0, "input", args, kwargs), _argument(1, "other", args, kwargs)
    if not isinstance(a, Value):
        a, b = b, a
    if isinstance(a, Value) and isinstance(b, (int, float)) and not isinstance(b, bool):
        return a
    if not _aligned(a, b):
        return None
    return Value(b.numbers, b.rank) if a.gate else Value(a.numbers, a.rank) if b.gate else None


def _divide(numbering: Numbering, args: Any, kwargs: Any) -> Any:
    a, b = _argument(0, "input", args, kwargs), _argument(1, "other", args, kwargs)
    return a if isinstance(a, Value) and isinstance(b, (int, float)) else None


def _join(numbering: Numbering, args: Any, kwargs: Any) -> Any:
    parts, axis = _argument(0, "tensors", args, kwargs), _argument(1, "dim", args, kwargs, 0)
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, Value) for part in parts):
        return None
    ranks = {part.rank for part in parts}
    rank = ranks.pop() if len(ranks) == 1 else None
    if axis != 1 and (rank is None or axis != 1 - rank):
        return None
    return Value(torch.cat([part.numbers for part in parts]), rank, all(part.gate for part in parts))


def _reduce(numbering: Numbering, args: Any, kwargs: Any) -> Any:
    """A mean, sum or maximum over all of space or some of it."""
    x, axes = _argument(0, "input", args, kwargs), _argument(1, "dim", args, kwargs)
    keep = _argument(2, "keepdim", args, kwargs, False)
    axes = (axes,) if isinstance(axes, int) else axes
    if not isinstance(x, Value) or x.rank is None or not axes or set(kwargs) - {"input", "dim", "keepdim"}:
        return None
    if any(axis % x.rank < 2 for axis in axes):
        return None
    return Value(x.numbers, x.rank if keep else x.rank - len(axes), x.gate)


def _flatten(numbering: Numbering, args: Any, kwargs: Any) -> Any:
    x, start = _argument(0, "input", args, kwargs), _argument(1, "start_dim", args, kwargs, 0)
    end = _argument(2, "end_dim", args, kwargs, -1)
    return _flattened(x, start, end)


def _flattened(x: Any, start: Any, end: Any) -> Any:
    if not isinstance(x, Value) or x.rank is None:
        return None
    if (start, end % x.rank) == (2, x.rank - 1) and x.rank > 2:
        return Value(x.numbers, 3, x.gate)
    return Value(x.numbers, 2, x.gate) if (start, end % x.rank) == (1, x.rank - 1) else None


def _pad(numbering: Numbering, args: Any, kwargs: Any) -> Any:
    x, sides = _argument(0, "input", args, kwargs), _argument(1, "pad", args, kwargs)
    mode, value = _argument(2, "mode", args, kwargs, "constant"), _argument(3, "value", args, kwargs)
    fits = isinstance(x, Value) and x.rank is not None and isinstance(sides, (list, tuple))
    if not fits or not all(isinstance(side, int) for side in sides) or (mode == "constant" and value not in (None, 0)):
        return None
    space = 2 * (x.rank - 2)
    before, after = sides[space : space + 2] if len(sides) == space + 2 else (0, 0)
    if len(sides) > space + 2 or min(before, after) < 0:
        return None
    return Value(torch.cat([numbering.new(before), x.numbers, numbering.new(after)]), x.rank)


def _item(numbering: Numbering, args: Any, kwargs: Any) -> Any:
    """A choice of samples, channels and positions that leaves all axes, or a part of a value that was split."""
    x, index = args[0], args[1]
    if isinstance(x, (list, tuple)) and isinstance(index, int):
        return x[index]
    index = index if isinstance(index, tuple) else (index,)
    if not isinstance(x, Value) or not all(isinstance(i, slice) for i in index):
        return None
    if any(not isinstance(end, (int, type(None))) for i in index[1:2] for end in (i.start, i.stop, i.step)):
        return None
    return Value(x.numbers[index[1]] if len(index) > 1 else x.numbers, x.rank, x.gate)


def _split(numbering: Numbering, args: Any, kwargs: Any) -> Any:
    return _parts(args, kwargs, "split_size", torch.split)


def _chunk(numbering: Numbering, args: Any, kwargs: Any) -> Any:
    return _parts(args, kwargs, "chunks", torch.chunk)


def _parts(args: Any, kwargs: Any, name: str, split: Callable[..., Any]) -> Any:
    x, sizes, axis = (
        _argument(0, "input", args, kwargs),
        _argument(1, name, args, kwargs),
        _argument(2, "dim", args, kwargs, 0),
    )
    sizes = list(sizes) if isinstance(sizes, (list, tuple)) else sizes
    if not isinstance(x, Value) or axis != 1 or not isinstance(sizes, (int, list)):
        return None
    return [Value(numbers, x.rank, x.gate) for numbers in split(x.numbers, sizes)]


_Rule = Callable[[Numbering, Any, Any], Any]
RULES: dict[Any, _Rule] = {
    **dict.fromkeys(
        (
            F.relu, F.relu_, torch.relu, torch.relu_, F.leaky_relu, F.dropout, F.dropout2d, F.dropout3d,
            F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
            F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool2d,
            torch.max_pool2d, torch.adaptive_avg_pool1d, F.interpolate, torch.clone, torch.detach,
            torch.neg, operator.neg,
            "relu", "relu_", "neg", "clone", "contiguous", "detach", "float",
        ),
        _same,
    ),
    **dict.fromkeys(
        (torch.sigmoid, torch.tanh, F.sigmoid, F.tanh, F.hardsigmoid, F.silu, F.hardswish, F.gelu, F.relu6, F.elu,
         F.mish, F.hardtanh, "sigmoid", "tanh", "sigmoid_", "tanh_"),
        _gate,
    ),
    **dict.fromkeys(
        (torch.add, operator.add, operator.iadd, "add", "add_", "__add__", "__iadd__", "__radd__", torch.sub,
         operator.sub, operator.isub, "sub", "sub_", "__sub__", "__isub__"),
        _add,
    ),
    **dict.fromkeys(
        (torch.mul, operator.mul, operator.imul, "mul", "mul_", "__mul__", "__imul__", "__rmul__"), _multiply
    ),
    **dict.fromkeys((torch.div, operator.truediv, operator.itruediv, "div", "div_", "__truediv__"), _divide),
    **dict.fromkeys((torch.cat, torch.concat), _join),
    **dict.fromkeys((torch.mean, torch.sum, torch.amax, "mean", "sum", "amax"), _reduce),
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    F.pad: _pad,
    **dict.fromkeys((operator.getitem, "__getitem__"), _item),
    **dict.fromkeys((torch.split, "split"), _split),
    **dict.fromkeys((torch.chunk, "chunk"), _chunk),
}  # fmt: skip


def _unchanged(numbering: Numbering, module: nn.Module, x: Value) -> Value | None:
    return None if getattr(module, "return_indices", False) else x


def _zero_padded(numbering: Numbering, module: nn.Module, x: Value) -> Value | None:
    return x if getattr(module, "value", 0) == 0 else None


MODULES: dict[type[nn.Module], Callable[[Numbering, Any, Value], Value | None]] = {
    **dict.fromkeys(
        (
            nn.Identity, nn.ReLU, nn.LeakyReLU, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
            nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
            nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d,
            nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
            nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d,
        ),
        _unchanged,
    ),
    **dict.fromkeys(
        (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), _zero_padded
    ),
    **dict.fromkeys(
        (nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.SiLU, nn.Hardswish, nn.GELU, nn.ReLU6, nn.ELU, nn.Mish, nn.Hardtanh),
        _gated,
    ),
    nn.Flatten: lambda _, module, x: _flattened(x, module.start_dim, module.end_dim),
}  # fmt: skip
