"""Recording one run: which value came from which call, written down as the graph that a symbolic trace would have.

Note [What a record knows]
Hooks see the calls of modules, a ``TorchFunctionMode`` all other calls that a forward makes. A tensor is known by its
identity, by its version and by its address: one that was written through a view or whose storage was exchanged is not
the value that a node once gave, and stands in the graph as ``changed_in_place``. A tensor that appears from nowhere
(of a thread, a TorchScript function, ``vmap``, a region without torch functions) stands there as ``untracked``. What
consumes a tensor in such places, no record sees. So a record is an observation: where it shows a layer in front of a
norm, the perturbation test must agree (perturbation.py).
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from normswap.graph.ops import is_leaf
from normswap.graph.tracer import hook_barrier
from normswap.norms import is_convertible
from normswap.operations.table import TABLE, called_by
from normswap.runs.calling import run_on
from normswap.runs.cycles import new_cycles
from normswap.runs.guard import set_mode, untouched

__all__ = ["Recorder", "changed_in_place", "untracked"]

_VALUE_FREE: frozenset[Any] = frozenset(
    call
    for row in TABLE.rows
    if row.value_free
    for call in (*called_by(row), *(getattr(Tensor, name).__get__ for name in row.attributes))
)
"""What a run asks a tensor for that tells nothing of its values, and so is no use of it."""
_PLAIN = (
    *(type(None), bool, int, float, complex, str, type(Ellipsis)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def changed_in_place(value: Any) -> Any:
    """Stand in a record for a tensor whose values were changed by no call that the record holds."""
    return value


def untracked() -> Any:
    """Stand in a record for a tensor that no call which the record holds has made."""


@dataclass(frozen=True)
class _Known:
    """The node that made a tensor, and what the tensor was then."""

    tensor: weakref.ref[Tensor]
    node: fx.Node
    state: tuple[int, int]


@dataclass
class _Call:
    """The call of a module that is going on: a leaf's with the nodes of its arguments."""

    module: nn.Module
    fqn: str
    arguments: Any = None
    given: frozenset[int] = frozenset()  # ids of the tensors that it was given
    own: frozenset[int] = frozenset()  # ids of its parameters and buffers


class Recorder(TorchFunctionMode):
    """Writes one run down as a graph.

    Args:
        modules: Each module under its first fqn.
        model: The model.
    """

    def __init__(self, modules: Mapping[str, nn.Module], model: nn.Module) -> None:
        super().__init__()
        self.modules = modules
        self.graph = fx.Graph()
        self.shapes: dict[str, set[tuple[int, int]]] = defaultdict(set)
        self._named = {id(t): (name, t) for name, t in (*model.named_buffers(), *model.named_parameters())}
        self._known: dict[int, _Known] = {}
        self._calls: list[_Call] = [_Call(model, "")]
        self._leaf: _Call | None = None
        self._thread = threading.get_ident()
        self._lock = threading.Lock()

    def record(self, model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any], training: bool) -> fx.Graph:
        """Run ``model`` and return the graph of the run."""
        inputs = pytree.tree_map_only(Tensor, torch.clone, inputs)  # a forward may write to them
        for tensor in _tensors(inputs):
            self._note(tensor, self.graph.create_node("placeholder", "input"))
        with new_cycles() as collect, untouched(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            set_mode(model, training)
            for fqn, module in self.modules.items():
                if not isinstance(module, torch.jit.ScriptModule):  # takes no hooks: its output will be untracked
                    self._watch(fqn, module)
            with self:
                output = run_on(model, inputs)
            self._end(output, collect)
        self._known.clear()
        return self.graph

    def _watch(self, fqn: str, module: nn.Module) -> None:
        leaf, norm = is_leaf(module), is_convertible(module)
        sees_input, sees_output = bool(module._forward_pre_hooks), bool(module._forward_hooks)
        own = frozenset(map(id, (*module.parameters(), *module.buffers()))) if leaf else frozenset()

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if threading.get_ident() != self._thread:
                if leaf:
                    self._call_elsewhere(fqn)
                return
            call = _Call(module, fqn)
            with torch._C.DisableTorchFunction():
                if norm:
                    self._note_shape(fqn, args[0] if args else kwargs.get("input"))
                if self._leaf is None and (leaf or sees_input):
                    arguments = self._arguments((args, kwargs))
                    given = _tensors((args, kwargs))
                    if sees_input:
                        arguments = pytree.tree_map_only(fx.Node, self._barrier, arguments)
                        for tensor in given:
                            self._note(tensor, self._barrier(self._node_of(tensor)))
                    if leaf:
                        self._leaf = call
                        call.arguments, call.given, call.own = arguments, frozenset(map(id, given)), own
            self._calls.append(call)

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if threading.get_ident() != self._thread or self._calls[-1].module is not module:
                return  # not entered here: in another thread, or stopped by a hook before
            call = self._calls.pop()
            with torch._C.DisableTorchFunction():
                if call is self._leaf:
                    self._leaf = None
                    self._note_results(output, self._create("call_module", fqn, *call.arguments))
                if sees_output and self._leaf is None:
                    for tensor in _tensors(output):
                        self._note(tensor, self._barrier(self._node_of(tensor)))

        module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
        module.register_forward_hook(leave, with_kwargs=True, always_call=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _VALUE_FREE:
            return func(*args, **kwargs)
        if self._leaf is not None:
            self._look_into(self._leaf, (args, kwargs))
            return func(*args, **kwargs)
        given, named = self._arguments((args, kwargs))
        if func is F.batch_norm:
            self._note_functional_shape(args, kwargs)
        result = func(*args, **kwargs)
        op, target = _target(func)
        if target in (getattr, setattr):
            given = (*given, getattr(getattr(func, "__self__", None), "__name__", "a property"))
        self._note_results(result, self._create(op, target, given, named))
        return result

    # Nodes

    def _create(self, op: str, target: Any, args: Any = (), kwargs: Any = None) -> fx.Node:
        with self._lock:
            node = self.graph.create_node(op, target, tuple(args), dict(kwargs or {}))
        node.meta["owner"] = self._calls[-1].fqn
        return node

    def _barrier(self, node: fx.Node) -> fx.Node:
        return self._create("call_function", hook_barrier, (node,))

    def _call_elsewhere(self, fqn: str) -> None:
        """Note a call in another thread, of which no more is known."""
        self._create("call_module", fqn, (self._create("call_function", untracked),))

    def _arguments(self, value: Any) -> Any:
        """Return ``value`` as a node's argument: tensors as nodes, and nothing that keeps memory."""
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, (list, tuple)):
            return tuple(map(self._arguments, value))
        if isinstance(value, dict):
            return {str(k): self._arguments(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*map(self._arguments, (value.start, value.stop, value.step)))
        return value if isinstance(value, _PLAIN) else None

    def _node_of(self, tensor: Tensor) -> fx.Node:
        if id(tensor) in self._named:
            return self._create("get_attr", self._named[id(tensor)][0])
        known = self._known.get(id(tensor))
        if known is None or known.tensor() is not tensor:
            node = self._create("call_function", untracked)
        elif _state(tensor) == known.state:
            return known.node
        else:
            node = self._create("call_function", changed_in_place, (known.node,))
        self._note(tensor, node)
        return node

    def _note(self, tensor: Tensor, node: fx.Node) -> None:
        """Note that ``tensor``'s values are those of ``node``, now."""
        key, state = id(tensor), _state(tensor)
        if key in self._named:
            return
        if state is None:
            self._known.pop(key, None)
            return

        def forget(dead: weakref.ref[Tensor]) -> None:
            known = self._known.get(key)
            if known is not None and known.tensor is dead:  # the id may already be another tensor's
                del self._known[key]

        self._known[key] = _Known(weakref.ref(tensor, forget), node, state)

    def _note_results(self, result: Any, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            self._note(result, node)
        elif isinstance(result, (list, tuple, dict)):
            items = result.items() if isinstance(result, dict) else enumerate(result)
            for key, value in items:
                if _tensors(value):
                    plain = key if isinstance(key, _PLAIN) else None
                    self._note_results(value, self._create("call_function", operator.getitem, (node, plain)))

    def _look_into(self, leaf: _Call, arguments: Any) -> None:
        """Note what a leaf's own code reads beside its arguments and its own parameters."""
        for tensor in _tensors(arguments):
            key = id(tensor)
            if key in leaf.given or key in leaf.own:
                continue
            known = self._known.get(key)
            if key in self._named or (known is not None and known.tensor() is tensor):
                given, named = leaf.arguments
                leaf.arguments = (*given, self._node_of(tensor)), named

    def _note_shape(self, key: str, x: Any) -> None:
        if isinstance(x, Tensor):
            self.shapes[key].add((x.ndim, prod(x.shape[2:])))

    def _note_functional_shape(self, args: Any, kwargs: Any) -> None:
        given = dict(zip(("input", "running_mean"), args, strict=False)) | kwargs
        mean = given.get("running_mean")
        if id(mean) in self._named:
            with torch._C.DisableTorchFunction():
                self._note_shape(self._named[id(mean)][0], given["input"])

    def _end(self, output: Any, collect: Callable[[], None]) -> None:
        """Make the output node: it uses what the output holds, and what the model or anyone else still holds."""
        if self._held() - {id(t) for t in _tensors(output)}:
            collect()
        held = self._held()
        kept = [known.node for key, known in self._known.items() if key in held]
        self.graph.create_node("output", "output", (tuple(dict.fromkeys(kept)),))

    def _held(self) -> set[int]:
        alive = ((key, known) for key, known in list(self._known.items()) if known.tensor() is not None)
        return {key for key, known in alive if known.node.op != "placeholder"}


def _state(tensor: Tensor) -> tuple[int, int] | None:
    """Return what changes when a tensor's values do; None where it cannot be told."""
    try:
        return tensor._version, tensor.data_ptr()
    except Exception:  # vmap's tensors have no address, inference tensors no version, sparse ones no storage
        return None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _target(func: Callable[..., Any]) -> tuple[str, Any]:
    """Return the op and the target under which a symbolic trace holds ``func``."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):  # of a property
        return "call_function", getattr if name == "__get__" else setattr
    if getattr(Tensor, name, None) is func:
        return "call_method", name
    return "call_function", func
