"""Equivalence classes of channels that must hold one scale, for cross-layer equalization (Nagel et al. 2019).

Note [Channels that may be scaled]
A channel c of a value may be multiplied by any s > 0 and the model stays the same function, if whatever gives it (a
layer's filter, a norm's γ and β) is multiplied by s and all weights that it meets are divided by s: in between lie only
operations with ``f(s z) = s f(z)`` per channel, such as ReLU and pooling. An addition ties its addends' channels to one
another. An operation that the table does not know fixes the channels of its inputs: they keep their scale. So do the
model's output, a hook that sees a value, and a linear layer without a norm, whose input people take for the features.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from normswap.graph.dataflow import Dataflow
from normswap.graph.linearity import is_torchs_own
from normswap.graph.records import Capture, Trace
from normswap.nn import FilterLayout
from normswap.nn.kinds import is_layer
from normswap.norms import is_convertible
from normswap.operations.channel_rules import Value, values_in
from normswap.operations.table import of_call, of_module, reads_no_value
from normswap.runs.wrappers import entry_of

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


def find_channels(flow: Dataflow, norms: Mapping[str, Sequence[nn.Module]], layers: Sequence[str]) -> Channels:
    """Number the channels of a model.

    Args:
        flow: The model's dataflow.
        norms: The norms whose γ and β may be changed, by fqn, with what each does after normalizing.
        layers: The layers in front of them.
    """
    return _Numbering(flow, norms, frozenset(layers)).run()


@dataclass
class _Numbering:
    flow: Dataflow
    norms: Mapping[str, Sequence[nn.Module]]
    layers: frozenset[str]
    count: int = 1
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    tied: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def run(self) -> Channels:
        """Follow all graphs and return what they tie together."""
        self.capture = self.flow.capture
        self.shown = _shown(self.capture)
        self.storages = _storages(self.capture)
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
            self._fix(one.numbers)

    def _fix(self, numbers: Tensor) -> None:
        self.tie(numbers, torch.full_like(numbers, FIXED))

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
        if node.op in ("placeholder", "get_attr") or reads_no_value(node):
            return None
        given = {n: values.get(n) for n in node.all_input_nodes}
        known: Any = {n: _UNKNOWN if value is None else value for n, value in given.items()}
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        found = None
        if node.op == "call_module":
            fqn = self.capture.aliases[trace.fqn(str(node.target))]
            alone = len(args) == 1 and not kwargs
            found = self._module(fqn, self.capture.modules[fqn], args[0] if alone else None)
        elif operation := of_call(node, _meant(node)):
            found = operation.on_channels(self, operation.bind(args, kwargs))
        if found is None:  # whatever happens there, it happens to the values as they are
            self.fix(list(given.values()))
        return found

    def _module(self, fqn: str, module: nn.Module, x: Any) -> Any:
        """Return what a module gives for ``x``, its only argument, None where it has others."""
        if is_layer(module):
            return self._layer(fqn, module, x)
        if is_convertible(module):
            return self._norm(fqn, module, x)
        return _applied(self, module, x)

    def _layer(self, fqn: str, layer: nn.Module, x: Any) -> Value | None:
        weight = FilterLayout.weight(layer)
        if fqn not in self.inputs:
            layout = FilterLayout.of(layer)
            self.inputs[fqn] = self.new(layout.in_channels(weight))
            self.outputs[fqn] = self.new(layout.out_channels(weight))
            if not self._is_free(fqn, layer) or not is_torchs_own(layer):
                self._fix(self.inputs[fqn])
                self._fix(self.outputs[fqn])
            elif isinstance(layer, nn.Linear) and fqn not in self.layers:
                self._fix(self.inputs[fqn])
        inputs, outputs = self.inputs[fqn], self.outputs[fqn]
        taken = _taken(x, layer, len(inputs)) if isinstance(x, Value) else None
        if taken is None or not isinstance(x, Value):
            self._fix(inputs)
            self._fix(outputs)
            return None
        self.tie(taken, inputs)
        return Value(outputs, x.rank)

    def _norm(self, fqn: str, norm: nn.Module, x: Any) -> Value | None:
        self.fix(x)
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if fqn not in self.norms or not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
            return None
        if fqn not in self.outputs:
            self.outputs[fqn] = self.new(weight.numel())
            if not self._is_free(fqn, norm):
                self._fix(self.outputs[fqn])
        rank = self._rank(fqn, norm, x)
        value = None if x is None or rank is None else Value(self.outputs[fqn], rank)
        for module in self.norms[fqn]:
            value = _applied(self, module, value)
        if value is None:
            self._fix(self.outputs[fqn])
        return value

    def _rank(self, fqn: str, norm: nn.Module, x: Any) -> int | None:
        seen = {rank for rank, _ in self.capture.shapes.get(fqn, ())}
        found = seen.pop() if len(seen) == 1 else getattr(x, "rank", None)
        operation = of_module(norm, inherited=True)
        return operation.axes if operation is not None and isinstance(operation.axes, int) else found

    def _is_free(self, fqn: str, module: nn.Module) -> bool:
        """Tell whether weight and bias are the module's own floating point tensors, and its calls are shown."""
        tensors = [getattr(module, name, None) for name in ("weight", "bias")]
        own = [*module._parameters.values(), *module._buffers.values()]
        if any(t is not None and not any(t is one for one in own) for t in tensors):
            return False
        given = [t for t in tensors if isinstance(t, Tensor)]
        if not all(t.is_floating_point() and self.storages[_storage(t)] < 2 for t in given):
            return False
        return fqn in self.shown and self.flow.why_shared(fqn) is None


def _meant(node: fx.Node) -> Any:
    """Return the operation that ``node`` may stand for: symbolic traces hold ``a *= b`` as ``a * b``."""
    first = node.args[0] if node.args else None
    shared = isinstance(first, fx.Node) and len(first.users) > 1
    return operator.imul if node.target is operator.mul and shared else node.target


def _applied(numbering: _Numbering, module: nn.Module, x: Any) -> Value | None:
    operation = of_module(module)
    if operation is None or not isinstance(x, Value) or "forward" in module.__dict__:
        return None
    found: Value | None = operation.on_channels(numbering, operation.bind_module(module, x))
    return found


def _taken(x: Value, layer: nn.Module, count: int) -> Tensor | None:
    """Return the numbers of the ``count`` channels that ``layer`` takes of ``x``; None where they do not fit."""
    if not isinstance(layer, nn.Linear):
        fits = len(x.numbers) == count and x.rank == FilterLayout.weight(layer).ndim
        return x.numbers if fits else None
    repeats = count // max(len(x.numbers), 1) if x.flat else 1
    fits = x.rank == 2 and repeats * len(x.numbers) == count
    return x.numbers.repeat_interleave(repeats) if fits else None


# Note [Shown in full]
# A record shows what one run did, and a symbolic trace whatever runs of its scope's forward may do; but of optional
# arguments it knows two ways. So channels are free of those modules alone that a symbolic trace calls whose scope has
# no options but one flag, which is traced both ways; and none is free where a layer or norm is never called: some way
# through the model was not seen then.


def _shown(capture: Capture) -> frozenset[str]:
    """Return the modules all of whose calls are known (Note [Shown in full])."""
    if capture.opaque and not any(trace.recorded for trace in capture.traces):
        return frozenset()
    shown, called = set(), set()
    for trace in capture.traces:
        scope = capture.modules[capture.aliases[trace.scope]] if trace.scope else entry_of(capture.model)[1]
        closed = not trace.recorded and _has_known_ways(scope, not trace.scope)
        for node in trace.graph.nodes:
            if node.op == "call_module":
                fqn = capture.aliases[trace.fqn(str(node.target))]
                called.add(fqn)
                shown |= {fqn} if closed else set()
    wholes = called - set(capture.opaque)  # a call of what holds a module is one of it, too
    for fqn, module in capture.modules.items():
        if (is_layer(module) or is_convertible(module)) and not any(name in wholes for name in _outwards(fqn)):
            return frozenset()
    return frozenset(shown)


def _outwards(fqn: str) -> Iterator[str]:
    while fqn:
        yield fqn
        fqn = fqn.rpartition(".")[0]


def _has_known_ways(scope: nn.Module, is_model: bool) -> bool:
    parameters = list(inspect.signature(type(scope).forward).parameters.values())[1:]
    optional = [p for p in parameters if p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return not optional or (is_model and len(optional) == 1 and isinstance(optional[0].default, bool))


def _storage(tensor: Tensor) -> int:
    if tensor.is_meta:
        return id(tensor)
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except Exception:  # of a tensor without storage
        return id(tensor)


def _storages(capture: Capture) -> Counter[int]:
    """Return how many parameters and buffers lie in each piece of memory."""
    tensors = (t for m in capture.modules.values() for t in (*m._parameters.values(), *m._buffers.values()))
    return Counter(_storage(t) for t in tensors if t is not None and not is_lazy(t))


_UNKNOWN = object()
