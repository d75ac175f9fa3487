"""What operations do to channels that are scaled (:mod:`normswap.graph.channels`): one rule for each that is known.

A rule takes what is known of an operation's arguments and returns what is then known of its result; None says that
nothing is, and that the channels of its arguments must stay as they are. So a rule that asks for too much costs little,
and one that asks for too little makes a network wrong: in doubt it is None.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

__all__ = ["MODULES", "RULES", "VALUE_FREE", "Numbering", "Value", "reads_attribute", "values_in"]


@dataclass(frozen=True)
class Value:
    """What is known of a tensor ``(N, C, …)``.

    Args:
        numbers: The numbers of its channels.
        rank: How many axes it has.
        gate: Whether its channels are fixed: multiplied with it, another value keeps its scales.
        flat: Whether each channel stands several times in a row, as flattening leaves it.
    """

    numbers: Tensor
    rank: int
    gate: bool = False
    flat: bool = False


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


Rule = Callable[[Numbering, Sequence[Any], Mapping[str, Any]], Any]


def _rule(names: str, rule: Callable[..., Any], **defaults: Any) -> Rule:
    """Return a rule that is called with the arguments ``names``, and is None where others are given."""
    order = names.split()

    def bound(numbering: Numbering, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if len(args) > len(order) or set(kwargs) - set(order):
            return None
        given = dict(zip(order, args, strict=False)) | dict(kwargs)
        return rule(numbering, *(given.get(name, defaults.get(name)) for name in order))

    return bound


def _same(_: Numbering, x: Any, *options: Any) -> Any:
    """An operation on each channel by itself that keeps a positive factor, and all axes."""
    return x if isinstance(x, Value) and not values_in(options) else None


def _over_space(axes: int) -> Callable[..., Any]:
    """Return the same over so many axes: with one less the channels would be taken for space."""

    def rule(_: Numbering, x: Any, *options: Any) -> Any:
        return x if isinstance(x, Value) and x.rank == axes + 2 and not values_in(options) else None

    return rule


def _gated(numbering: Numbering, x: Any, *_: Any) -> Any:
    """An operation on each value by itself that keeps no factor."""
    numbering.fix(x)
    return replace(x, gate=True) if isinstance(x, Value) else None


def _aligned(a: Any, b: Any) -> bool:
    """Tell whether both are values whose channels meet one by one, whatever is broadcast over space."""
    both = isinstance(a, Value) and isinstance(b, Value)
    return both and a.rank == b.rank and len(a.numbers) == len(b.numbers) and not (a.flat or b.flat)


def _add(numbering: Numbering, a: Any, b: Any, alpha: Any = None) -> Any:
    if not _aligned(a, b) or values_in(alpha):
        return None
    numbering.tie(a.numbers, b.numbers)
    return replace(a, gate=a.gate and b.gate)


def _multiply(numbering: Numbering, a: Any, b: Any) -> Any:
    if isinstance(a, (int, float)):
        a, b = b, a
    if isinstance(a, Value) and a.gate and _aligned(a, b):
        return b
    return _multiply_in_place(numbering, a, b)


def _multiply_in_place(_: Numbering, a: Any, b: Any) -> Any:
    """Here a gate that is written to would no longer be one, wherever else it is used."""
    if isinstance(a, Value) and isinstance(b, (int, float)) and not isinstance(b, bool):
        return a
    return a if _aligned(a, b) and b.gate else None


def _divide(_: Numbering, a: Any, b: Any) -> Any:
    return a if isinstance(a, Value) and isinstance(b, (int, float)) else None


def _join(_: Numbering, parts: Any, axis: Any) -> Any:
    known = isinstance(parts, (list, tuple)) and all(isinstance(part, Value) and not part.flat for part in parts)
    if not known or not parts or len({part.rank for part in parts}) > 1 or axis not in (1, 1 - parts[0].rank):
        return None
    return Value(torch.cat([part.numbers for part in parts]), parts[0].rank, all(part.gate for part in parts))


def _reduce(_: Numbering, x: Any, axes: Any, keep: Any) -> Any:
    """A mean, sum or maximum over all of space or some of it."""
    axes = (axes,) if isinstance(axes, int) else axes
    if not isinstance(x, Value) or not axes or not _integers(axes) or not isinstance(keep, bool):
        return None
    if any(axis % x.rank < 2 for axis in axes):
        return None
    return x if keep else replace(x, rank=x.rank - len(axes))


def _flatten(_: Numbering, x: Any, start: Any, end: Any) -> Any:
    if not isinstance(x, Value) or not _integers((start, end)):
        return None
    if (start, end % x.rank) == (2, x.rank - 1) and x.rank > 2:
        return replace(x, rank=3)
    return replace(x, rank=2, flat=x.flat or x.rank > 2) if (start, end % x.rank) == (1, x.rank - 1) else None


def _pad(numbering: Numbering, x: Any, sides: Any, mode: Any, value: Any) -> Any:
    if not isinstance(x, Value) or x.flat or not _integers(sides) or (mode == "constant" and value not in (None, 0)):
        return None
    space = 2 * (x.rank - 2)
    before, after = sides[space : space + 2] if len(sides) == space + 2 else (0, 0)
    if len(sides) > space + 2 or min(before, after) < 0:
        return None
    return replace(x, numbers=torch.cat([numbering.new(before), x.numbers, numbering.new(after)]), gate=False)


def _item(_: Numbering, x: Any, index: Any) -> Any:
    """A choice of samples, channels and positions that leaves all axes, or a part of a value that was split."""
    if isinstance(x, (list, tuple)) and isinstance(index, int):
        return x[index]
    index = index if isinstance(index, tuple) else (index,)
    if not isinstance(x, Value) or not all(isinstance(i, slice) for i in index):
        return None
    if len(index) < 2 or index[1] == slice(None):
        return x
    ends = (index[1].start, index[1].stop, index[1].step)
    if x.flat or not _integers([end for end in ends if end is not None]):
        return None
    return replace(x, numbers=x.numbers[index[1]])


def _parts(split: Callable[..., Any]) -> Callable[..., Any]:
    def rule(_: Numbering, x: Any, sizes: Any, axis: Any) -> Any:
        sizes = list(sizes) if isinstance(sizes, (list, tuple)) else sizes
        if not isinstance(x, Value) or x.flat or axis not in (1, 1 - x.rank):
            return None
        if not _integers(sizes if isinstance(sizes, list) else [sizes]):
            return None
        return [replace(x, numbers=numbers) for numbers in split(x.numbers, sizes)]

    return rule


def _integers(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)


_POOL = "input kernel_size stride padding dilation ceil_mode"
_MEAN_POOL = "input kernel_size stride padding ceil_mode count_include_pad divisor_override"
RULES: dict[Any, Rule] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _rule("input inplace", _same)),
    F.leaky_relu: _rule("input negative_slope inplace", _same),
    **dict.fromkeys((F.dropout, F.dropout2d, F.dropout3d), _rule("input p training inplace", _same)),
    **dict.fromkeys(
        (torch.clone, torch.detach, torch.neg, operator.neg, "neg", "clone", "contiguous", "detach", "float"),
        _rule("input memory_format", _same),
    ),
    F.interpolate: _rule(
        "input size scale_factor mode align_corners recompute_scale_factor antialias", _same
    ),
    **{f: _rule(_POOL, _over_space(n)) for n, f in ((1, F.max_pool1d), (2, F.max_pool2d), (3, F.max_pool3d))},
    torch.max_pool2d: _rule(_POOL, _over_space(2)),
    **{f: _rule(_MEAN_POOL, _over_space(n)) for n, f in ((1, F.avg_pool1d), (2, F.avg_pool2d), (3, F.avg_pool3d))},
    **{
        f: _rule("input output_size", _over_space(n))
        for n, f in (
            (1, F.adaptive_avg_pool1d), (2, F.adaptive_avg_pool2d), (3, F.adaptive_avg_pool3d),
            (1, torch.adaptive_avg_pool1d), (2, F.adaptive_max_pool2d),
        )
    },
    **dict.fromkeys(
        (torch.sigmoid, torch.tanh, F.sigmoid, F.tanh, "sigmoid", "tanh", "sigmoid_", "tanh_"), _rule("input", _gated)
    ),
    **dict.fromkeys(
        (F.hardsigmoid, F.silu, F.hardswish, F.relu6, F.mish), _rule("input inplace", _gated)
    ),
    F.gelu: _rule("input approximate", _gated),
    **dict.fromkeys(
        (torch.add, operator.add, operator.iadd, "add", "add_", "__add__", "__iadd__", "__radd__", torch.sub,
         operator.sub, operator.isub, "sub", "sub_", "__sub__", "__isub__"),
        _rule("input other alpha", _add),
    ),
    **dict.fromkeys((torch.mul, operator.mul, "mul", "__mul__", "__rmul__"), _rule("input other", _multiply)),
    **dict.fromkeys((operator.imul, "mul_", "__imul__"), _rule("input other", _multiply_in_place)),
    **dict.fromkeys(
        (torch.div, operator.truediv, operator.itruediv, "div", "div_", "__truediv__"), _rule("input other", _divide)
    ),
    **dict.fromkeys((torch.cat, torch.concat), _rule("tensors dim", _join, dim=0)),
    **dict.fromkeys(
        (torch.mean, torch.sum, torch.amax, "mean", "sum", "amax"), _rule("input dim keepdim", _reduce, keepdim=False)
    ),
    **dict.fromkeys((torch.flatten, "flatten"), _rule("input start_dim end_dim", _flatten, start_dim=0, end_dim=-1)),
    F.pad: _rule("input pad mode value", _pad, mode="constant"),
    **dict.fromkeys((operator.getitem, "__getitem__"), _rule("input index", _item)),
    **dict.fromkeys((torch.split, "split"), _rule("tensor split_size_or_sections dim", _parts(torch.split), dim=0)),
    **dict.fromkeys((torch.chunk, "chunk"), _rule("input chunks dim", _parts(torch.chunk), dim=0)),
}  # fmt: skip
"""What is known of an operation's result, by the function or the method's name."""


def _module(rule: Callable[..., Any]) -> Callable[[Numbering, Any, Value], Value | None]:
    def known(numbering: Numbering, module: Any, x: Value) -> Value | None:
        result: Value | None = rule(numbering, x)
        return None if getattr(module, "return_indices", False) or getattr(module, "value", 0) != 0 else result

    return known


MODULES: dict[type[nn.Module], Callable[[Numbering, Any, Value], Value | None]] = {
    **dict.fromkeys(
        (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _module(_same)
    ),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), _module(_same)),
    **{
        kind: _module(_over_space(axes))
        for axes, kinds in (
            (1, (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.ReflectionPad1d, nn.ReplicationPad1d,
                 nn.ZeroPad1d, nn.ConstantPad1d)),
            (2, (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ReflectionPad2d,
                 nn.ReplicationPad2d, nn.ZeroPad2d, nn.ConstantPad2d)),
            (3, (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.ZeroPad3d, nn.ConstantPad3d)),
        )
        for kind in kinds
    },
    **dict.fromkeys(
        (nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.SiLU, nn.Hardswish, nn.GELU, nn.ReLU6, nn.ELU, nn.Mish, nn.Hardtanh),
        _module(_gated),
    ),
    nn.Flatten: lambda numbering, module, x: _flatten(numbering, x, module.start_dim, module.end_dim),
}  # fmt: skip
"""The same for modules that are called with one value."""
