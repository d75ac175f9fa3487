"""Call sites: which node calls which module or functional norm, and who reads which tensor, in all graphs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx
from torch.nn.parameter import is_lazy

from normswap.graph.functional import read_functional_norm
from normswap.graph.ops import LAYER_CALLS, is_functional_norm
from normswap.graph.records import Capture, Trace, has_optional_arguments
from normswap.norms.functional import FunctionalNorm

__all__ = ["Call", "Calls"]


@dataclass(frozen=True)
class Call:
    """One call, in one trace."""

    trace: Trace
    node: fx.Node


@dataclass
class Calls:
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
    calls: dict[str, dict[int, list[Call]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    functional: dict[str, tuple[str, FunctionalNorm]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    functional_layers: dict[str, str] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    order: dict[str, int] = field(default_factory=dict)
    _reads: set[int] = field(default_factory=set)  # ids of tensors that some forward reads itself
    _owners: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))  # of a parameter, by its id
    _places: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))  # the same by its address

    def __post_init__(self) -> None:
        self._note_owners()
        # Scopes are traced one after the other: only runs know in which order they are called.
        for trace in self.capture.traces:
            if trace.recorded:
                self._note_order(trace)
        trained: dict[str, dict[int, set[bool]]] = defaultdict(lambda: defaultdict(set))
        recorded = [call for trace in self.capture.traces for call in self._follow(trace, trained)]
        for key, runs in trained.items():
            self._judge(key, runs)
        for call in recorded:
            self._add_recorded(call)

    def _note_owners(self) -> None:
        for fqn, module in self.capture.modules.items():
            for name, parameter in module._parameters.items():
                if parameter is not None and not is_lazy(parameter):
                    self._owners[id(parameter)].append(f"{fqn}.{name}")
                    if not parameter.is_meta and parameter.numel():
                        self._places[parameter.data_ptr()].append(f"{fqn}.{name}")

    def _follow(self, trace: Trace, trained: dict[str, dict[int, set[bool]]]) -> Iterator[Call]:
        """Note what ``trace`` calls and reads; yield the calls of functional norms that only a record shows."""
        for node in trace.graph.nodes:
            if node.op == "call_module":
                self._add(self.capture.aliases[trace.fqn(str(node.target))], trace, node)
            elif node.op == "get_attr":
                self._note_read(trace, node)
            elif is_functional_norm(node) and trace.recorded:
                yield Call(trace, node)
            elif is_functional_norm(node):
                self._add_functional(trace, node, trained)
            elif node.target in LAYER_CALLS:
                owner = self.capture.aliases[node.meta["owner"]]
                self.functional_layers.setdefault(f"{owner}:{self._name(owner, node)}", node.target.__name__)

    def _judge(self, key: str, runs: Mapping[int, set[bool]]) -> None:
        """Refuse or keep a functional norm by the train flags that its calls have in each run in eval mode."""
        flags = set[bool]().union(*runs.values())
        if any(len(flags_in_run) > 1 for flags_in_run in runs.values()):
            self.refuse(key, "of its calls some use the batch's statistics and some the stored ones")
        elif flags == {True}:
            self.refuse(key, "it uses the batch's statistics in eval mode, too, so it has none to take over")
        elif flags == {False}:
            self.frozen.add(key)

    def _add(self, key: str, trace: Trace, node: fx.Node) -> None:
        self.calls[key][trace.run].append(Call(trace, node))
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
            self._refuse(f"{owner}:{self._name(owner, node)}", norm, [Call(trace, node)])
            return
        key = f"{owner}.{norm.name}".lstrip(".") if norm.holder else f"{owner}:{norm.name}"
        self.functional.setdefault(key, (owner, norm))
        self._add(key, trace, node)
        trained[key][trace.run].add(norm.training)

    def _name(self, owner: str, node: fx.Node) -> str:
        """Return how a functional call is named in a plan: a GraphModule's calls have names of their own."""
        own = isinstance(self.capture.modules[owner], fx.GraphModule)
        return node.name if own else node.target.__name__  # type: ignore[union-attr]

    def _add_recorded(self, call: Call) -> None:
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
            why = self.capture.opaque.get(owner, "only a recorded run shows it")
            what = f"it is a call in the forward of {owner or 'the model'}, which cannot be rewritten"
            self._refuse(key, f"{what} ({why}): make it a BatchNorm module", [call])

    def _refuse(self, key: str, reason: str, calls: list[Call]) -> None:
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
