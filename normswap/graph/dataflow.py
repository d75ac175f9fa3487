"""Dataflow analysis: which layer feeds a norm and nothing else, over all graphs of a capture.

A pattern is proven, not guessed. A layer may be absorbed where, in every run of the model, each of its calls feeds the
norm and nothing else, and the norm is fed by nothing else; where no one else reads its weight; and where its output
channels are the norm's. Names and the order of registration prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from normswap.errors import Text, argument
from normswap.graph.calls import Call, Calls
from normswap.graph.choices import Choices
from normswap.graph.linearity import scales_with_its_parameters
from normswap.graph.ops import is_leaf, order_of
from normswap.graph.ranks import input_of, only_rank, rank_of
from normswap.graph.recorder import changed_in_place, untracked
from normswap.graph.records import Trace
from normswap.graph.tracer import hook_barrier
from normswap.nn import FilterLayout
from normswap.nn.kinds import class_of, is_layer
from normswap.norms import norm_of
from normswap.operations.table import of_module, reads_no_value

__all__ = ["Dataflow", "Finding"]


@dataclass(frozen=True)
class Finding:
    """The layer that feeds a norm; with a reason, why it may not be absorbed; with a gap, what is not proven."""

    layer: str | None = None
    reason: str | None = None
    gap: str | None = None
    recorded: bool = False
    """Whether no symbolic trace, but only the record of a run, shows it."""
    axis: int = 1
    """The axis of the layer's output that is the norm's axis 1: 1, or −1 where it is moved between the two."""


class Dataflow(Calls):
    """What feeds each norm, and whether that is proven."""

    @cached_property
    def choices(self) -> Choices:
        """What another run may call than those that were seen."""
        return Choices(self)

    def rank(self, key: str, shape: tuple[int, int] | None = None) -> int | None:
        """Return the number of axes of the input of ``key``: by its class, by the shape seen, or by the graph."""
        module = self.capture.modules.get(key)
        operation = None if module is None else of_module(module, inherited=True)
        if operation is not None and isinstance(operation.axes, int):
            return operation.axes
        if shape:
            return shape[0]
        norm = None if module is None else norm_of(module)
        able = () if module is None or norm is None else norm.axes(module)
        ranks: set[int | None] = set()
        for calls in self.calls.get(key, {}).values():
            for call in calls:
                module_of = partial(self.capture.module_of, call.trace)
                source = input_of(call.node)
                known = rank_of(source, module_of) if isinstance(source, fx.Node) else None
                if known is None and call.trace.recorded:  # another run may move no axes
                    continue
                ranks.add(only_rank(call.node, able, module_of) if known is None else known)
        return ranks.pop() if len(ranks) == 1 else None

    def layer_feeding(
        self, key: str, channels: int, rank: int | None, is_source: Callable[[nn.Module], bool] = is_layer
    ) -> Finding:
        """Find the layer that feeds the norm ``key`` in every run, and whether that is proven.

        Args:
            key: The norm's fqn or key.
            channels: The norm's channels.
            rank: The number of axes of the norm's input, None where unknown.
            is_source: Which modules count as a layer.
        """
        runs = self.calls.get(key, {})
        if not runs:
            hidden = self.opaque_ancestor(key)
            return Finding(reason=f"{hidden} could not be traced" if hidden else "no traced forward calls it")
        layers: set[str] = set()
        shown: dict[int, bool] = {}  # the runs that show what feeds the norm, and whether they are recorded
        axes: set[int] = set()
        unseen: str | None = None
        for run, calls in runs.items():
            found = self._layer_in_run(run, calls, rank, is_source, layers)
            if found.gap:
                unseen = found.gap
            elif found.reason:
                return found
            else:
                shown[run] = found.recorded
                axes.add(found.axis)
        if not shown:
            return Finding(reason=unseen)
        recorded = all(shown.values())
        if len(layers) > 1:
            return Finding(reason=_several(layers), recorded=recorded)
        (layer,) = layers
        for run in set(self.calls[layer]) - set(shown):
            if any(self._goes_further(call) for call in self.calls[layer][run]):
                why = f"{layer} is also called where the norm is not: in train mode or with other arguments"
                return Finding(layer, why, recorded=recorded)
        axis = axes.pop() if len(axes) == 1 else 0
        if reason := self._unfit(layer, channels, rank, axis):
            return Finding(layer, reason, recorded=recorded)
        hidden = self.opaque_ancestor(layer) or self.opaque_ancestor(key)
        if reason := self.choices.why_not_always(layer, key, channels):
            return Finding(layer, reason, recorded=recorded)
        gap = f"{hidden} could not be traced and might use {layer}, too" if hidden else None
        if gap is None and (recorded or unseen):
            gap = f"one run shows {layer} in front of it, which does not prove that nothing else uses it"
        return Finding(layer, gap=gap, recorded=recorded, axis=axis)

    def _layer_in_run(
        self,
        run: int,
        calls: Sequence[Call],
        rank: int | None,
        is_source: Callable[[nn.Module], bool],
        layers: set[str],
    ) -> Finding:
        """Find the one layer that feeds all of a norm's ``calls`` in one run; those found are added to ``layers``."""
        axes: set[int] = set()
        for call in calls:
            found = self._producer(call, rank, is_source)
            if found.gap:
                return found
            if found.reason or found.layer is None:
                return replace(found, recorded=call.trace.recorded)
            layers.add(found.layer)
            axes.add(found.axis)
        recorded = calls[0].trace.recorded
        if len(layers) > 1:
            return Finding(reason=_several(layers), recorded=recorded)
        (layer,) = layers
        made = self.calls[layer].get(run, [])
        times = f"{layer} is called {len(made)} times and the norm {len(calls)} times"
        axis = axes.pop() if len(axes) == 1 else 0
        return Finding(layer, times if len(made) != len(calls) else None, recorded=recorded, axis=axis)

    def sources_of(self, key: str) -> set[str]:
        """Return the layers whose output goes into a call of ``key`` and nowhere else."""
        calls = (call for run in self.calls.get(key, {}).values() for call in run)
        found = (self._producer(call, None, is_layer) for call in calls)
        return {finding.layer for finding in found if finding.layer and not finding.reason}

    def _goes_further(self, call: Call) -> bool:
        """Tell whether a layer's call goes where its norm is not, unless the trace ends before that could be seen."""
        users = call.node.users
        if call.trace.recorded:
            return bool(users)
        return not call.trace.scope or any(user.op != "output" for user in users)

    def _producer(self, call: Call, rank: int | None, is_source: Callable[[nn.Module], bool]) -> Finding:
        """Find the layer whose output is this call's input, axes moved or not, and whether it goes nowhere else.

        The answer is a gap where the trace of a part of the model, or a record, does not show it.
        """
        source, consumer = input_of(call.node), call.node
        forks: list[str] = []
        order = plain = tuple(range(rank or 0))
        while isinstance(source, fx.Node):
            module = self.capture.module_of(call.trace, source)
            others = (user for user in source.users if user is not consumer and not reads_no_value(user))
            forks += [_describe(call.trace, user) for user in others]
            if module is not None and is_source(module):
                layer = self.capture.aliases[call.trace.fqn(str(source.target))]
                used = f"the output of {layer} is also used by {forks[0]}" if forks else None
                axis = 1 if order == plain else -1 if order == _last_to_channels(rank or 0) else 0
                return Finding(layer, used, axis=axis)
            before = order_of(source, module, rank)
            if before is None:
                break
            order = tuple(before[axis] for axis in order)
            consumer, source = source, input_of(source)
        if not isinstance(source, fx.Node):
            return Finding(reason="its input is not a value that the trace follows")
        if source.op == "placeholder":
            why = "its input is an input of the module that calls it"
            return Finding(gap=why) if call.trace.scope else Finding(reason=why)
        if source.target is untracked:
            return Finding(gap="its input was made where calls cannot be recorded (a thread, TorchScript, vmap)")
        if source.target is changed_in_place:
            return Finding(reason="its input is changed in place before it")
        if source.target is hook_barrier:
            return Finding(reason="a forward hook sees its input")
        return Finding(reason=f"its input comes from {_describe(call.trace, source)}")

    def _unfit(self, fqn: str, channels: int, rank: int | None, axis: int) -> str | None:
        """Return why ``fqn``, which feeds the norm, cannot absorb its statistics; None if it can."""
        layer = self.capture.modules[fqn]
        if reason := self.why_shared(fqn):
            return reason
        if not is_layer(layer):
            return None
        own = FilterLayout.of(layer).out_channels(FilterLayout.weight(layer))
        if own != channels:
            return f"{fqn} has {own} output channels and the norm {channels}"
        if isinstance(layer, nn.Linear) and rank is None:
            return Text(
                f"whether the norm's channels are those of {fqn} depends on the rank of its input: "
                f"give {argument('example_inputs')}"
            )
        if axis not in (1, -1) or (axis == -1 and not isinstance(layer, nn.Linear)):
            return f"the axes of the output of {fqn} are moved before the norm, and so are its channels"
        if rank is not None and (axis == -1 or rank == 2) != isinstance(layer, nn.Linear):
            return f"the norm's channels are not those of {fqn}: its input has {rank} axes"
        if not scales_with_its_parameters(layer):
            what = f"the forward of {class_of(layer).__name__}"
            return f"{what} is not linear in its weight, or does not run on random inputs"
        return None

    def why_shared(self, fqn: str) -> str | None:
        """Return why new parameters of ``fqn`` would change more than its calls; None if they would not."""
        module = self.capture.modules[fqn]
        if parametrize.is_parametrized(module) or (is_layer(module) and module._parameters.get("weight") is None):
            return f"the weight of {fqn} is already parametrized"
        if any(is_lazy(p) for p in module._parameters.values() if p is not None):
            return f"{fqn} is not initialized yet: run the model once, then convert"
        for name, tensor in module._parameters.items():
            if tensor is None:
                continue
            if owner := self._other_owner(tensor, f"{fqn}.{name}"):
                return f"the {name} of {fqn} is tied to {owner}"
            if self.reads(tensor):
                return f"the model reads the {name} of {fqn} outside of its call"
        return None

    def _other_owner(self, parameter: Tensor, name: str) -> str | None:
        """Return another owner of ``parameter``, by identity or, where it has memory, by that."""
        owners = self._owners[id(parameter)]
        if not parameter.is_meta and parameter.numel():
            owners = owners + self._places[parameter.data_ptr()]
        return next((owner for owner in owners if owner != name), None)

    def opaque_ancestor(self, key: str) -> str | None:
        """Return an opaque module inside which ``key``, under any of its names, lies."""
        for opaque in self.capture.opaque:
            for name in self.capture.names[key.partition(":")[0]]:
                if opaque == "" or name == opaque or name.startswith(opaque + "."):
                    return opaque or "the model"
        return None

    def enclosing_leaf(self, fqn: str) -> str | None:
        """Return the class of the torch module, or norm or layer subclass, inside which ``fqn`` lies."""
        parent = fqn.rpartition(".")[0]
        while parent:
            module = self.capture.modules[self.capture.aliases[parent]]
            if is_leaf(module):
                return class_of(module).__name__
            parent = parent.rpartition(".")[0]
        return None


def _last_to_channels(rank: int) -> tuple[int, ...]:
    """Return the order of the axes after ``movedim(-1, 1)``: a linear layer's channels become a norm's."""
    return (0, rank - 1, *range(1, rank - 1)) if rank > 2 else ()


def _several(layers: set[str]) -> str:
    return f"it normalizes the outputs of several layers ({', '.join(sorted(layers)[:3])})"


def _describe(trace: Trace, node: fx.Node) -> str:
    if node.op == "call_module":
        return trace.fqn(str(node.target))
    if node.op == "output":
        return "the output"
    return getattr(node.target, "__name__", str(node.target))
