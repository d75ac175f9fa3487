"""Channels: which of a model's layers and norms give and take one and the same channel, over all graphs of a capture.

Note [Channels that may be scaled]
A channel c of a value may be multiplied by any s > 0 and the model stays the same function, if whatever gives it (a
layer's filter, a norm's γ and β) is multiplied by s and all weights that it meets are divided by s: in between lie only
operations with ``f(s z) = s f(z)`` per channel, such as ReLU and pooling. An addition ties its addends' channels to one
another. What an operation does that is not known here, nobody may scale: it fixes the channels of its inputs. So do the
model's output, a hook that sees a value, and a linear layer without a norm, whose input people take for the features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.capture.batch_norms import after_norm
from normswap.capture.channel_rules import MODULES, RULES, VALUE_FREE, Value, reads_attribute, values_in
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
        values: dict[fx.Node, Any] = {}  # of all graphs: what a module keeps of one trace may come up in another
        for trace in self.capture.traces:
            for node in trace.graph.nodes:
                values[node] = self._follow(trace, node, values)
        labels = self._connected()
        inputs = {name: labels[numbers] for name, numbers in self.inputs.items()}
        outputs = {name: labels[numbers] for name, numbers in self.outputs.items()}
        return Channels(self.count, inputs, outputs)

    # ---------------------------------------------------------------------------------------- numbers

    def new(self, channels: int) -> Tensor:
        """Return numbers that nobody has."""
        self.count += channels
        return torch.arange(self.count - channels, self.count)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Let channels of ``a`` and ``b`` have one scale, one by one."""
        self.tied.append((a, b))

    def fix(self, value: Any) -> None:
        """Let the channels of ``value``, or of several, stay as they are."""
        for one in values_in(value):
            self.tie(one.numbers, torch.full_like(one.numbers, FIXED))

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
        """Return what is known of ``node``'s value: a :class:`Value`, several, or None."""
        if node.op in ("placeholder", "get_attr") or node.target in VALUE_FREE or reads_attribute(node):
            return None
        given = {n: values.get(n) for n in node.all_input_nodes}
        known: Any = {n: _UNKNOWN if value is None else value for n, value in given.items()}
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        if node.op == "call_module":
            fqn = self.capture.aliases[trace.fqn(str(node.target))]
            found = self._module(fqn, self.capture.modules[fqn], args, kwargs)
        elif node.op in ("call_function", "call_method") and node.target in RULES:
            found = RULES[node.target](self, args, kwargs)
        else:
            found = None
        if found is None:  # whatever happens there, it happens to the values as they are
            self.fix(list(given.values()))
        return found

    def _module(self, fqn: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = [*args, *kwargs.values()]
        x = given[0] if len(given) == 1 else None
        if is_layer(module):
            return self._layer(fqn, module, x)
        if is_norm(module):
            return self._norm(fqn, module, x)
        kind = class_of(module)
        return MODULES[kind](self, module, x) if isinstance(x, Value) and kind in MODULES else None

    def _layer(self, fqn: str, layer: nn.Module, x: Any) -> Any:
        weight = layer.weight
        if not isinstance(weight, Tensor):
            return None
        layout, linear = FilterLayout.of(layer), isinstance(layer, nn.Linear)
        rank = weight.ndim if not linear else x.rank if isinstance(x, Value) else None
        if fqn not in self.inputs:
            self.inputs[fqn] = self.new(layout.in_channels(weight))
            self.outputs[fqn] = self.new(layout.out_channels(weight))
            if not self._is_free(fqn) or not scales_with_its_inputs(layer):
                self.fix([Value(self.inputs[fqn], None), Value(self.outputs[fqn], None)])
            elif linear and fqn not in self.layers:
                self.fix(Value(self.inputs[fqn], None))
        inputs = self.inputs[fqn]
        if isinstance(x, Value) and (taken := _taken(x, layer, len(inputs))) is not None:
            self.tie(taken, inputs)
        else:
            self.fix([x, Value(inputs, None)])
        return Value(self.outputs[fqn], rank)

    def _norm(self, fqn: str, norm: nn.Module, x: Any) -> Any:
        self.fix(x)
        after = after_norm(norm) if fqn in self.norms else ""
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if isinstance(after, str) or not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
            return None
        if fqn not in self.outputs:
            self.outputs[fqn] = self.new(weight.numel())
            if not self._is_free(fqn):
                self.fix(Value(self.outputs[fqn], None))
        seen = {rank for rank, _ in self.capture.shapes.get(fqn, ())}
        rank = seen.pop() if len(seen) == 1 else getattr(x, "rank", None)
        rank = next((n for kind, n in _RANKS.items() if isinstance(norm, kind)), rank)
        value = Value(self.outputs[fqn], rank)
        for module in after:
            rule = MODULES.get(class_of(module))
            found = None if rule is None else rule(self, module, value)
            if found is None:
                self.fix(value)
                return None
            value = found
        return value

    def _is_free(self, fqn: str) -> bool:
        """Tell whether the parameters of ``fqn`` are its own, and all its calls were seen."""
        hidden = self.flow.opaque_ancestor(fqn) is not None and not self.recorded
        return not hidden and self.flow.why_shared(fqn) is None


def _taken(x: Value, layer: nn.Module, count: int) -> Tensor | None:
    """Return the numbers of the ``count`` channels that ``layer`` takes of ``x``; None where they do not fit."""
    if not isinstance(layer, nn.Linear):
        fits = len(x.numbers) == count and x.rank in (FilterLayout.weight(layer).ndim, None)
        return x.numbers if fits else None
    repeats = count // max(len(x.numbers), 1)
    fits = x.rank == 2 and repeats * len(x.numbers) == count
    return x.numbers.repeat_interleave(repeats) if fits else None


_UNKNOWN = object()
_RANKS = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
