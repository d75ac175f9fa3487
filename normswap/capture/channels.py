"""Channels: which of a model's layers and norms give and take one and the same channel, over all graphs of a capture.

Note [Channels that may be scaled]
A channel c of a value may be multiplied by any s > 0 and the model stays the same function, if whatever gives it (a
layer's filter, a norm's γ and β) is multiplied by s and all weights that it meets are divided by s: in between lie only
operations with ``f(s z) = s f(z)`` per channel, such as ReLU and pooling. An addition ties its addends' channels to one
another. What an operation does that is not known here, nobody may scale: it fixes the channels of its inputs. So do the
model's output, a hook that sees a value, and a linear layer without a norm, whose input people take for the features.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normswap.capture.batch_norms import after_norm
from normswap.capture.dataflow import Dataflow
from normswap.capture.ops import class_of, is_layer, is_norm
from normswap.capture.probes import scales_with_its_inputs
from normswap.capture.symbolic import Capture, Trace
from normswap.nn import FilterLayout

__all__ = ["FIXED", "Channels", "find_channels"]

FIXED = 0
"""The number of all channels that must stay as they are."""


@dataclass(frozen=True)
class Channels:
    """The numbers of the channels that modules take and give: two with one number hold one scale.

    Args:
        count: How many numbers there are; :data:`FIXED` is the first.
        inputs: Those that a layer takes, by its fqn. ``(in_channels,)``
        outputs: Those that a layer or norm gives, by its fqn. ``(channels,)``
    """

    count: int
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


def find_channels(capture: Capture, norms: Sequence[str], layers: Sequence[str]) -> Channels:
    """Number the channels of a model.

    Args:
        capture: The model's graphs.
        norms: The norms whose γ and β may be changed.
        layers: The layers in front of them.
    """
    return _Numbering(capture, frozenset(norms), frozenset(layers)).run()


@dataclass(frozen=True)
class _Value:
    """What is known of a tensor ``(N, C, …)``: its channels' numbers and, where it is known, its number of axes.

    ``gate`` says that its channels are fixed: multiplied with it, another value keeps its scales. A value of two axes
    may hold each channel several times in a row, as flattening does.
    """

    numbers: Tensor
    rank: int | None
    gate: bool = False


@dataclass
class _Numbering:
    capture: Capture
    norms: frozenset[str]
    layers: frozenset[str]
    count: int = 1
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    tied: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def run(self) -> Channels:
        """Follow all graphs and return what they tie together."""
        self.flow = Dataflow(self.capture)
        self.recorded = any(trace.recorded for trace in self.capture.traces)
        for trace in self.capture.traces:
            values: dict[fx.Node, Any] = {}
            for node in trace.graph.nodes:
                values[node] = self._follow(trace, node, values)
        labels = self._connected()
        inputs = {name: labels[numbers] for name, numbers in self.inputs.items()}
        outputs = {name: labels[numbers] for name, numbers in self.outputs.items()}
        return Channels(self.count, inputs, outputs)

    # ---------------------------------------------------------------------------------------- numbers

    def _new(self, channels: int) -> Tensor:
        self.count += channels
        return torch.arange(self.count - channels, self.count)

    def _tie(self, a: Tensor, b: Tensor) -> None:
        self.tied.append((a, b))

    def _fix(self, value: Any) -> None:
        for one in _values(value):
            self._tie(one.numbers, torch.full_like(one.numbers, FIXED))

    def _connected(self) -> Tensor:
        """Return the least number that each is tied to, directly or through others."""
        labels = torch.arange(self.count)
        if not self.tied:
            return labels
        a, b = (torch.cat(side) for side in zip(*self.tied, strict=True))
        while True:
            least = torch.minimum(labels[a], labels[b])
            found = labels.scatter_reduce(0, labels[a], least, "amin").scatter_reduce(0, labels[b], least, "amin")
            found = found[found]
            if torch.equal(found, labels):
                return labels
            labels = found

    # ----------------------------------------------------------------------------------------- graphs

    def _follow(self, trace: Trace, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """Return what is known of ``node``'s value: a :class:`_Value`, several, or None."""
        if node.op in ("placeholder", "get_attr") or node.target in _VALUE_FREE or _reads_attribute(node):
            return None
        known: Any = {n: _UNKNOWN if values[n] is None else values[n] for n in node.all_input_nodes}
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        if node.op == "call_module":
            fqn = self.capture.aliases[trace.fqn(str(node.target))]
            found = self._module(fqn, self.capture.modules[fqn], args, kwargs)
        elif node.op in ("call_function", "call_method") and node.target in _RULES:
            found = _RULES[node.target](self, args, kwargs)
        else:
            found = None
        if found is None:  # whatever happens there, it happens to the values as they are
            self._fix([values[n] for n in node.all_input_nodes])
        return found

    def _module(self, fqn: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = [*args, *kwargs.values()]
        x = given[0] if len(given) == 1 else None
        if is_layer(module):
            return self._layer(fqn, module, x)
        if is_norm(module):
            return self._norm(fqn, module, x)
        kind = class_of(module)
        return _MODULES[kind](self, module, x) if isinstance(x, _Value) and kind in _MODULES else None

    def _layer(self, fqn: str, layer: nn.Module, x: Any) -> Any:
        weight = layer.weight
        if not isinstance(weight, Tensor):
            return None
        layout, linear = FilterLayout.of(layer), isinstance(layer, nn.Linear)
        rank = weight.ndim if not linear else x.rank if isinstance(x, _Value) else None
        if fqn not in self.inputs:
            self.inputs[fqn] = self._new(layout.in_channels(weight))
            self.outputs[fqn] = self._new(layout.out_channels(weight))
            if not self._is_free(fqn) or not scales_with_its_inputs(layer):
                self._fix([_Value(self.inputs[fqn], None), _Value(self.outputs[fqn], None)])
            elif linear and fqn not in self.layers:
                self._fix(_Value(self.inputs[fqn], None))
        inputs = self.inputs[fqn]
        repeats = len(inputs) // len(x.numbers) if isinstance(x, _Value) and len(x.numbers) else 0
        fits = repeats == 1 or (linear and repeats > 1 and repeats * len(x.numbers) == len(inputs))
        if isinstance(x, _Value) and fits and rank is not None and x.rank in (rank, None) and (not linear or rank == 2):
            self._tie(x.numbers.repeat_interleave(repeats), inputs)
        else:
            self._fix([x, _Value(inputs, None)])
        return _Value(self.outputs[fqn], rank)

    def _norm(self, fqn: str, norm: nn.Module, x: Any) -> Any:
        self._fix(x)
        after = after_norm(norm) if fqn in self.norms else ""
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if isinstance(after, str) or not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
            return None
        if fqn not in self.outputs:
            self.outputs[fqn] = self._new(weight.numel())
            if not self._is_free(fqn):
                self._fix(_Value(self.outputs[fqn], None))
        seen = {rank for rank, _ in self.capture.shapes.get(fqn, ())}
        rank = seen.pop() if len(seen) == 1 else getattr(x, "rank", None)
        rank = next((n for kind, n in _RANKS.items() if isinstance(norm, kind)), rank)
        value = _Value(self.outputs[fqn], rank)
        for module in after:
            rule = _MODULES.get(class_of(module))
            found = None if rule is None else rule(self, module, value)
            if found is None:
                self._fix(value)
                return None
            value = found
        return value

    def _is_free(self, fqn: str) -> bool:
        """Tell whether the parameters of ``fqn`` are its own, and all its calls were seen."""
        hidden = self.flow.opaque_ancestor(fqn) is not None and not self.recorded
        return not hidden and self.flow.why_shared(fqn) is None


_UNKNOWN = object()
_RANKS = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}


def _values(value: Any) -> list[_Value]:
    if isinstance(value, _Value):
        return [value]
    return [one for item in value for one in _values(item)] if isinstance(value, (list, tuple)) else []


# ------------------------------------------------------------------------------------------- operations

_VALUE_FREE: frozenset[Any] = frozenset({"size", "dim", "ndimension", "numel", "__len__", "is_floating_point"})


def _reads_attribute(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")


def _argument(place: int, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], default: Any = None) -> Any:
    return args[place] if place < len(args) else kwargs.get(name, default)


def _same(numbering: _Numbering, args: Any, kwargs: Any) -> Any:
    """An operation on each channel by itself that keeps a positive factor, and all axes."""
    x = _argument(0, "input", args, kwargs)
    alone = len(_values([*args, *kwargs.values()])) == 1 and not kwargs.get("return_indices")
    return x if isinstance(x, _Value) and alone else None


def _gate(numbering: _Numbering, args: Any, kwargs: Any) -> Any:
    """An operation on each value by itself that keeps no factor."""
    x = _argument(0, "input", args, kwargs)
    return _gated(numbering, None, x) if isinstance(x, _Value) else None


def _gated(numbering: _Numbering, module: nn.Module | None, x: _Value) -> _Value:
    numbering._fix(x)
    return _Value(x.numbers, x.rank, gate=True)


def _aligned(a: Any, b: Any) -> bool:
    """Tell whether both are values whose channels meet one by one, whatever is broadcast over space."""
    both = isinstance(a, _Value) and isinstance(b, _Value)
    return both and a.rank is not None and a.rank == b.rank and len(a.numbers) == len(b.numbers)


def _add(numbering: _Numbering, args: Any, kwargs: Any) -> Any:
    a, b = _argument(0, "input", args, kwargs), _argument(1, "other", args, kwargs)
    if not _aligned(a, b):
        return None
    numbering._tie(a.numbers, b.numbers)
    return _Value(a.numbers, a.rank, a.gate and b.gate)


def _multiply(numbering: _Numbering, args: Any, kwargs: Any) -> Any:
    a, b = _argument(0, "input", args, kwargs), _argument(1, "other", args, kwargs)
    if not isinstance(a, _Value):
        a, b = b, a
    if isinstance(a, _Value) and isinstance(b, (int, float)) and not isinstance(b, bool):
        return a
    if not _aligned(a, b):
        return None
    return _Value(b.numbers, b.rank) if a.gate else _Value(a.numbers, a.rank) if b.gate else None


def _divide(numbering: _Numbering, args: Any, kwargs: Any) -> Any:
    a, b = _argument(0, "input", args, kwargs), _argument(1, "other", args, kwargs)
    return a if isinstance(a, _Value) and isinstance(b, (int, float)) else None


def _join(numbering: _Numbering, args: Any, kwargs: Any) -> Any:
    parts, axis = _argument(0, "tensors", args, kwargs), _argument(1, "dim", args, kwargs, 0)
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, _Value) for part in parts):
        return None
    ranks = {part.rank for part in parts}
    rank = ranks.pop() if len(ranks) == 1 else None
    if axis != 1 and (rank is None or axis != 1 - rank):
        return None
    return _Value(torch.cat([part.numbers for part in parts]), rank, all(part.gate for part in parts))


def _reduce(numbering: _Numbering, args: Any, kwargs: Any) -> Any:
    """A mean, sum or maximum over all of space or some of it."""
    x, axes = _argument(0, "input", args, kwargs), _argument(1, "dim", args, kwargs)
    keep = _argument(2, "keepdim", args, kwargs, False)
    axes = (axes,) if isinstance(axes, int) else axes
    if not isinstance(x, _Value) or x.rank is None or not axes or set(kwargs) - {"input", "dim", "keepdim"}:
        return None
    if any(axis % x.rank < 2 for axis in axes):
        return None
    return _Value(x.numbers, x.rank if keep else x.rank - len(axes), x.gate)


def _flatten(numbering: _Numbering, args: Any, kwargs: Any) -> Any:
    x, start = _argument(0, "input", args, kwargs), _argument(1, "start_dim", args, kwargs, 0)
    end = _argument(2, "end_dim", args, kwargs, -1)
    return _flattened(x, start, end)


def _flattened(x: Any, start: Any, end: Any) -> Any:
    if not isinstance(x, _Value) or x.rank is None:
        return None
    if (start, end % x.rank) == (2, x.rank - 1) and x.rank > 2:
        return _Value(x.numbers, 3, x.gate)
    return _Value(x.numbers, 2, x.gate) if (start, end % x.rank) == (1, x.rank - 1) else None


def _pad(numbering: _Numbering, args: Any, kwargs: Any) -> Any:
    x, sides = _argument(0, "input", args, kwargs), _argument(1, "pad", args, kwargs)
    mode, value = _argument(2, "mode", args, kwargs, "constant"), _argument(3, "value", args, kwargs)
    fits = isinstance(x, _Value) and x.rank is not None and isinstance(sides, (list, tuple))
    if not fits or not all(isinstance(side, int) for side in sides) or (mode == "constant" and value not in (None, 0)):
        return None
    space = 2 * (x.rank - 2)
    before, after = sides[space : space + 2] if len(sides) == space + 2 else (0, 0)
    if len(sides) > space + 2 or min(before, after) < 0:
        return None
    return _Value(torch.cat([numbering._new(before), x.numbers, numbering._new(after)]), x.rank)


def _item(numbering: _Numbering, args: Any, kwargs: Any) -> Any:
    """A choice of samples, channels and positions that leaves all axes, or a part of a value that was split."""
    x, index = args[0], args[1]
    if isinstance(x, (list, tuple)) and isinstance(index, int):
        return x[index]
    index = index if isinstance(index, tuple) else (index,)
    if not isinstance(x, _Value) or not all(isinstance(i, slice) for i in index):
        return None
    if any(not isinstance(end, (int, type(None))) for i in index[1:2] for end in (i.start, i.stop, i.step)):
        return None
    return _Value(x.numbers[index[1]] if len(index) > 1 else x.numbers, x.rank, x.gate)


def _split(numbering: _Numbering, args: Any, kwargs: Any) -> Any:
    return _parts(args, kwargs, "split_size", torch.split)


def _chunk(numbering: _Numbering, args: Any, kwargs: Any) -> Any:
    return _parts(args, kwargs, "chunks", torch.chunk)


def _parts(args: Any, kwargs: Any, name: str, split: Callable[..., Any]) -> Any:
    x, sizes, axis = (
        _argument(0, "input", args, kwargs),
        _argument(1, name, args, kwargs),
        _argument(2, "dim", args, kwargs, 0),
    )
    sizes = list(sizes) if isinstance(sizes, (list, tuple)) else sizes
    if not isinstance(x, _Value) or axis != 1 or not isinstance(sizes, (int, list)):
        return None
    return [_Value(numbers, x.rank, x.gate) for numbers in split(x.numbers, sizes)]


_Rule = Callable[[_Numbering, Any, Any], Any]
_RULES: dict[Any, _Rule] = {
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


def _unchanged(numbering: _Numbering, module: nn.Module, x: _Value) -> _Value | None:
    return None if getattr(module, "return_indices", False) else x


def _zero_padded(numbering: _Numbering, module: nn.Module, x: _Value) -> _Value | None:
    return x if getattr(module, "value", 0) == 0 else None


_MODULES: dict[type[nn.Module], Callable[[_Numbering, Any, _Value], _Value | None]] = {
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
