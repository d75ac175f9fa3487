"""Dataflow: who calls what, over all graphs of a capture, and which layer feeds a norm and nothing else.

A pattern is proven, not guessed. A layer may be absorbed where, in every run of the model, each of its calls feeds the
norm and nothing else, and the norm is fed by nothing else; where no one else reads its weight; and where its output
channels are the norm's. Names and the order of registration prove nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from normswap.graph.functional import read_functional_norm
from normswap.graph.linearity import scales_with_its_parameters
from normswap.graph.ops import LAYER_CALLS, is_functional_norm, is_leaf, norm_argument, passes_through, rank_of
from normswap.graph.recorded import changed_in_place, untracked
from normswap.graph.symbolic import Capture, Trace, has_optional_arguments, hook_barrier
from normswap.nn import FilterLayout
from normswap.nn.kinds import class_of, is_layer
from normswap.norms import norm_of
from normswap.norms.functional import FunctionalNorm

__all__ = ["Dataflow", "Finding"]


@dataclass(frozen=True)
class _Call:
    trace: Trace
    node: fx.Node


@dataclass(frozen=True)
class Finding:
    """The layer that feeds a norm; with a reason, why it may not be absorbed; with a gap, what is not proven."""

    layer: str | None = None
    reason: str | None = None
    gap: str | None = None
    recorded: bool = False
    """Whether no symbolic trace, but only the record of a run, shows it."""


@dataclass
class Dataflow:
    """The calls and reads that a capture holds, by what is called and read.

    Args:
        capture: The capture.
        calls: The calls of each leaf module and functional norm, by run.
        functional: The functional norms: their owner's fqn and what they are, by key.
        refused: The functional norms that cannot be replaced, and why, by key.
        functional_layers: The layers that a forward calls functionally, by key.
        frozen: The functional norms that use their stored statistics in training, too.
        order: When each is first called.
    """

    capture: Capture
    calls: dict[str, dict[int, list[_Call]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    functional: dict[str, tuple[str, FunctionalNorm]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    functional_layers: dict[str, str] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    order: dict[str, int] = field(default_factory=dict)
    _reads: set[int] = field(default_factory=set)  # ids of tensors that some forward reads itself
    _owners: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))  # of a parameter, by its id
    _places: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))  # the same by its address

    def __post_init__(self) -> None:
        capture = self.capture
        for fqn, module in capture.modules.items():
            for name, parameter in module._parameters.items():
                if parameter is not None and not is_lazy(parameter):
                    self._owners[id(parameter)].append(f"{fqn}.{name}")
                    if not parameter.is_meta and parameter.numel():
                        self._places[parameter.data_ptr()].append(f"{fqn}.{name}")
        # Scopes are traced one after the other: only runs know in which order they are called.
        for trace in capture.traces:
            if trace.recorded:
                self._note_order(trace)
        trained: dict[str, dict[int, set[bool]]] = defaultdict(lambda: defaultdict(set))
        recorded: list[_Call] = []
        for trace in capture.traces:
            for node in trace.graph.nodes:
                if node.op == "call_module":
                    self._add(capture.aliases[trace.fqn(str(node.target))], trace, node)
                elif node.op == "get_attr":
                    self._note_read(trace, node)
                elif is_functional_norm(node) and trace.recorded:
                    recorded.append(_Call(trace, node))
                elif is_functional_norm(node):
                    self._add_functional(trace, node, trained)
                elif node.target in LAYER_CALLS:
                    owner = capture.aliases[node.meta["owner"]]
                    self.functional_layers.setdefault(f"{owner}:{self._name(owner, node)}", node.target.__name__)
        for key, runs in trained.items():
            flags = set().union(*runs.values())
            calls = [call for run in self.calls[key].values() for call in run]
            if any(len(flags_in_run) > 1 for flags_in_run in runs.values()):
                self._refuse(key, "of its calls some use the batch's statistics and some the stored ones", calls)
                del self.functional[key]
            elif flags == {True}:
                self._refuse(
                    key, "it uses the batch's statistics in eval mode, too, so it has none to take over", calls
                )
                del self.functional[key]
            elif flags == {False}:
                self.frozen.add(key)
        for call in recorded:
            self._add_recorded(call)

    def _add(self, key: str, trace: Trace, node: fx.Node) -> None:
        self.calls[key][trace.run].append(_Call(trace, node))
        self.order.setdefault(key, len(self.order))

    def _note_order(self, trace: Trace) -> None:
        for node in trace.graph.nodes:
            if node.op == "call_module":
                self.order.setdefault(self.capture.aliases[trace.fqn(str(node.target))], len(self.order))

    def _add_functional(self, trace: Trace, node: fx.Node, trained: dict[str, dict[int, set[bool]]]) -> None:
        owner = self.capture.aliases[node.meta["owner"]]
        prefix = node.meta["owner"].removeprefix(trace.scope).lstrip(".")
        module = self.capture.modules[owner]
        norm = read_functional_norm(node, module, prefix)
        if not isinstance(module, fx.GraphModule) and has_optional_arguments(module):
            norm = "its forward has optional arguments, of which a rewritten forward would know one way only"
        if isinstance(norm, str):
            self._refuse(f"{owner}:{self._name(owner, node)}", norm, [_Call(trace, node)])
            return
        key = f"{owner}.{norm.name}".lstrip(".") if norm.holder else f"{owner}:{norm.name}"
        self.functional.setdefault(key, (owner, norm))
        self._add(key, trace, node)
        trained[key][trace.run].add(norm.training)

    def _name(self, owner: str, node: fx.Node) -> str:
        """Return how a functional call is named in a plan: a GraphModule's calls have names of their own."""
        own = isinstance(self.capture.modules[owner], fx.GraphModule)
        return node.name if own else node.target.__name__  # type: ignore[union-attr]

    def _add_recorded(self, call: _Call) -> None:
        """Add a functional norm that a record holds: a further call of one that is known, else one to refuse."""
        fqn = call.node.meta["owner"]
        owner = self.capture.aliases[fqn]
        norm = read_functional_norm(call.node, self.capture.modules[owner], fqn)
        if isinstance(norm, str):
            self._refuse(f"{owner}:batch_norm", norm, [call])
            return
        key = f"{owner}.{norm.name}".lstrip(".") if norm.holder else f"{owner}:{norm.name}"
        if key in self.functional:
            self._add(key, call.trace, call.node)
        elif f"{owner}:batch_norm" not in self.refused:
            why = self.capture.opaque.get(owner, "it was seen in a run only")
            what = f"it is a call in the forward of {owner or 'the model'}, which cannot be rewritten"
            self._refuse(key, f"{what} ({why}): make it a BatchNorm module", [call])

    def _refuse(self, key: str, reason: str, calls: list[_Call]) -> None:
        """Refuse a functional norm; it goes on reading its tensors."""
        self.refused.setdefault(key, reason)
        for call in calls:
            for node in call.node.all_input_nodes:
                if node.op == "get_attr":
                    self._add_read(call.trace, node)

    def refuse(self, key: str, reason: str) -> None:
        """Refuse a functional norm that was found."""
        del self.functional[key]
        self.frozen.discard(key)
        self._refuse(key, reason, [call for run in self.calls[key].values() for call in run])

    def _note_read(self, trace: Trace, node: fx.Node) -> None:
        """Note which tensor a node reads; the functional norm that takes it is no other reader."""
        if not all(is_functional_norm(user) for user in node.users):
            self._add_read(trace, node)

    def _add_read(self, trace: Trace, node: fx.Node) -> None:
        holder, _, name = trace.fqn(str(node.target)).rpartition(".")
        value = getattr(self.capture.modules.get(self.capture.aliases.get(holder, holder)), name, None)
        if isinstance(value, Tensor):
            self._reads.add(id(value))

    def reads(self, tensor: Tensor) -> bool:
        """Tell whether some forward reads ``tensor`` outside of the call of the module that owns it."""
        return id(tensor) in self._reads

    def rank(self, key: str, shape: tuple[int, int] | None = None) -> int | None:
        """Return the number of axes of the input of ``key``: by its class, by the shape seen, or by the graph."""
        module = self.capture.modules.get(key)
        norm = None if module is None else norm_of(module)
        if module is not None and norm is not None and (known := norm.rank_of(module)) is not None:
            return known
        if shape:
            return shape[0]
        ranks: set[int | None] = set()
        for calls in self.calls.get(key, {}).values():
            for call in calls:
                module_of = partial(self.capture.module_of, call.trace)
                source = _input_of(call.node)
                ranks.add(rank_of(source, module_of) if isinstance(source, fx.Node) else None)
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
        unseen: str | None = None
        for run, calls in runs.items():
            for call in calls:
                found = self._producer(call, is_source)
                if found.gap:
                    unseen = found.gap
                    break
                if found.reason or found.layer is None:
                    return replace(found, recorded=call.trace.recorded)
                layers.add(found.layer)
            else:
                recorded = shown[run] = calls[0].trace.recorded
                if len(layers) > 1:
                    several = ", ".join(sorted(layers)[:3])
                    return Finding(reason=f"it normalizes the outputs of several layers ({several})", recorded=recorded)
                (layer,) = layers
                made = self.calls[layer].get(run, [])
                if len(made) != len(calls):
                    why = f"{layer} is called {len(made)} times and the norm {len(calls)} times"
                    return Finding(layer, why, recorded=recorded)
        if not shown:
            return Finding(reason=unseen)
        (layer,) = layers
        recorded = all(shown.values())
        for run in set(self.calls[layer]) - set(shown):
            if any(self._goes_further(call) for call in self.calls[layer][run]):
                return Finding(
                    layer,
                    f"{layer} is also called where the norm is not: in train mode or with other arguments",
                    recorded=recorded,
                )
        if reason := self._unfit(layer, channels, rank):
            return Finding(layer, reason, recorded=recorded)
        hidden = self.opaque_ancestor(layer) or self.opaque_ancestor(key)
        gap = f"{hidden} could not be traced and might use {layer}, too" if hidden else None
        if gap is None and (recorded or unseen):
            gap = f"one run shows {layer} in front of it, which does not prove that nothing else uses it"
        return Finding(layer, gap=gap, recorded=recorded)

    def sources_of(self, key: str) -> set[str]:
        """Return the layers whose output goes into a call of ``key`` and nowhere else."""
        calls = (call for run in self.calls.get(key, {}).values() for call in run)
        found = (self._producer(call, is_layer) for call in calls)
        return {finding.layer for finding in found if finding.layer and not finding.reason}

    def _goes_further(self, call: _Call) -> bool:
        """Tell whether a layer's call goes where its norm is not, unless the trace ends before that could be seen."""
        users = call.node.users
        if call.trace.recorded:
            return bool(users)
        return not call.trace.scope or any(user.op != "output" for user in users)

    def _producer(self, call: _Call, is_source: Callable[[nn.Module], bool]) -> Finding:
        """Find the layer whose output is this call's input, and whether it goes nowhere else.

        The answer is a gap where the trace of a part of the model, or a record, does not show it.
        """
        source, consumer = _input_of(call.node), call.node
        forks: list[str] = []
        while isinstance(source, fx.Node):
            module = self.capture.module_of(call.trace, source)
            forks += [_describe(call.trace, user) for user in source.users if user is not consumer]
            if module is not None and is_source(module):
                layer = self.capture.aliases[call.trace.fqn(str(source.target))]
                return Finding(layer, f"the output of {layer} is also used by {forks[0]}" if forks else None)
            if not passes_through(source, module):
                break
            consumer, source = source, _input_of(source)
        if not isinstance(source, fx.Node):
            return Finding(reason="its input is no traced value")
        if source.op == "placeholder":
            why = "its input is an input of its scope"
            return Finding(gap=why) if call.trace.scope else Finding(reason=why)
        if source.target is untracked:
            return Finding(gap="its input comes from where no record sees (a thread, TorchScript, vmap)")
        if source.target is changed_in_place:
            return Finding(reason="its input is changed in place before it")
        if source.target is hook_barrier:
            return Finding(reason="a forward hook sees its input")
        return Finding(reason=f"its input comes from {_describe(call.trace, source)}")

    def _unfit(self, fqn: str, channels: int, rank: int | None) -> str | None:
        """Return why ``fqn``, which feeds the norm, cannot take its statistics up; None if it can."""
        layer = self.capture.modules[fqn]
        if reason := self.why_shared(fqn):
            return reason
        if not is_layer(layer):
            return None
        own = FilterLayout.of(layer).out_channels(FilterLayout.weight(layer))
        if own != channels:
            return f"{fqn} has {own} output channels and the norm {channels}"
        if isinstance(layer, nn.Linear) and rank is None:
            return f"whether the norm's channels are those of {fqn} hangs on its input's rank: give example inputs"
        if rank is not None and (rank == 2) != isinstance(layer, nn.Linear):
            return f"the norm's channels are not those of {fqn}: its input has {rank} axes"
        if not scales_with_its_parameters(layer):
            return f"the forward of {class_of(layer).__name__} is not linear in its weight, or could not be tried"
        return None

    def why_shared(self, fqn: str) -> str | None:
        """Return why the parameters of ``fqn`` cannot be changed for its own calls' sake; None if they can."""
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


def _input_of(node: fx.Node) -> Any:
    if is_functional_norm(node):
        return norm_argument(node, "input")
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def _describe(trace: Trace, node: fx.Node) -> str:
    if node.op == "call_module":
        return trace.fqn(str(node.target))
    if node.op == "output":
        return "the output"
    return getattr(node.target, "__name__", str(node.target))
