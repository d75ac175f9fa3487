"""Tracing one forward: ``torch.fx``'s tracer, made read-only; every use of a value is a node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from normswap.graph.ops import is_leaf
from normswap.graph.proxies import ValueProxy, WrittenProxy, hook_barrier
from normswap.operations.table import value_free_names
from normswap.runs.settings import settings

__all__ = ["ScopeTracer", "hook_barrier", "kept_attribute", "why_untraceable"]


def kept_attribute(value: Any) -> Any:
    """Stand in a graph for a use that no call shows: by whoever reads the attribute that keeps the value."""
    return value


def why_untraceable(cause: Exception) -> str:
    """Return one line that tells a person what in the forward stood in the way."""
    text = (str(cause).splitlines() or [""])[0].strip()
    if isinstance(cause, fx.proxy.TraceError):
        return "its forward branches or iterates on a value that a trace does not know"
    return f"{type(cause).__name__}: {text}"[:160]


class ScopeTracer(fx.Tracer):
    """``torch.fx``'s tracer, read-only and undeterred.

    Layers and norms are leaves whatever their class, as are torch.nn's other modules. A submodule whose forward
    cannot be traced becomes a leaf, too, and is listed in ``refused``. Buffers are recorded and not touched. Hooks
    are not run: a barrier node stands where one would see a value.

    Args:
        scope: The fqn of the module that is going to be traced.
        own_forward_only: Record only the module's own forward: every submodule is a leaf.
        rank: The number of axes of the inputs, where it is known: tests of it are then no branch.
        in_place: Record ``y *= a`` as the write to y that it is. Otherwise it is recorded as ``y = y * a``.
    """

    proxy_buffer_attributes = True

    def __init__(
        self, scope: str = "", *, own_forward_only: bool = False, rank: int | None = None, in_place: bool = False
    ) -> None:
        super().__init__(autowrap_functions=(hook_barrier,), param_shapes_constant=True)
        self.scope_fqn, self.own_forward_only, self.rank = scope, own_forward_only, rank
        self._proxies: type[ValueProxy] = WrittenProxy if in_place else ValueProxy
        self.lost = False  # whether the forward has asked what no trace knows
        self._settings: list[Any] = []
        self.refused: list[tuple[str, nn.Module, str]] = []
        self._owner = scope
        self._tensor_names: dict[int, str] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace ``root``."""
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            self._tensor_names.setdefault(id(tensor), name)
        with _DirectReads(self._tensor_names) as direct:
            graph = super().trace(root, concrete_args)
        self._refuse_lost()
        if self.own_forward_only:
            if direct.names:  # what was computed from it stands in the graph as a constant
                raise fx.proxy.TraceError(f"the forward reads {direct.names[0]} past the module's attributes")
        else:
            self._add_hidden_uses(root, graph, direct.names)
        return graph

    def _add_hidden_uses(self, root: nn.Module, graph: fx.Graph, read: list[str]) -> None:
        """Add to the graph the uses that no call in it shows: tensors read directly, values kept in an attribute."""
        (output,) = (node for node in graph.nodes if node.op == "output")
        known = set(graph.nodes)
        kept = [proxy.node for proxy in _kept_proxies(root) if proxy.tracer is self and proxy.node in known]
        with graph.inserting_before(output):
            for node in (*(graph.create_node("get_attr", name) for name in read), *kept):
                graph.create_node("call_function", kept_attribute, (node,)).meta["owner"] = self.scope_fqn
                node.meta.setdefault("owner", self.scope_fqn)

    def _refuse_lost(self) -> None:
        if self.lost:  # the forward has caught the error and gone another way than in a run
            raise fx.proxy.TraceError("the forward catches the error that it is given for what a trace does not know")

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refuse a branch."""
        self.lost = True
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Refuse a loop."""
        self.lost = True
        return super().iter(obj)

    def class_given(self, target: str) -> type | None:
        """Return the class of what the module of this name within the scope gives, None where that is not known."""
        module = self.root.get_submodule(target)
        if isinstance(module, (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention)):
            return tuple
        return Tensor if is_leaf(module) else None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a call of ``m`` is one node."""
        return self.own_forward_only or is_leaf(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return what the forward sees of ``node``."""
        if node.op == "placeholder" and self.rank is not None:
            return _RankedProxy(node, self)
        return self._proxies(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record whose forward made the node."""
        node = super().create_node(*args, **kwargs)
        node.meta["owner"] = self._owner
        if self.own_forward_only:  # the graph will be run in place of the forward
            now = settings()
            self._settings = self._settings or now
            if now != self._settings:
                raise fx.proxy.TraceError("the forward works in a context (no_grad, autocast), which no graph holds")
        return node

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a leaf as one node and trace through every other module, as far as that goes."""
        name = self.path_of_module(m)
        if m._forward_pre_hooks:
            args = self._barrier(args)
        if self.is_leaf_module(m, name):
            value = self.create_proxy("call_module", name, args, kwargs)
        else:
            value = self._trace_through(m, name, args, kwargs)
        return self._barrier(value) if m._forward_hooks else value

    def _trace_through(self, m: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        fqn = f"{self.scope_fqn}.{name}" if self.scope_fqn else name
        caller, before, lost = self._owner, len(self.graph.nodes), self.lost
        self._owner, self.lost = fqn, False
        try:
            if isinstance(m, torch.jit.ScriptModule):
                raise TypeError("TorchScript cannot be traced")
            value = m.forward(*args, **kwargs)
            self._refuse_lost()
            return value
        except Exception as cause:
            for node in list(self.graph.nodes)[: before - 1 : -1] if before else list(self.graph.nodes)[::-1]:
                self.graph.erase_node(node)
            self._owner = caller
            self.refused = [r for r in self.refused if not r[0].startswith(fqn + ".")]
            self.refused.append((fqn, m, why_untraceable(cause)))
            return self.create_proxy("call_module", name, args, kwargs)
        finally:
            self._owner, self.lost = caller, lost

    def _barrier(self, value: Any) -> Any:
        def guard(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Proxy):
                return leaf
            return self.create_proxy("call_function", hook_barrier, (leaf,), {})

        return pytree.tree_map(guard, value)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Return a proxy for a parameter or buffer; its shape stays a constant, so that tests of it are no branch."""
        if not isinstance(attr_val, Tensor):
            return attr_val
        name = self._tensor_names.get(id(attr_val))
        if name is None:
            return attr_val
        # Not cached: a cached node may stand in a part of the graph that is erased when a submodule is refused.
        return self.create_proxy(
            "get_attr",
            name,
            (),
            {},
            proxy_factory_fn=lambda node: _TensorProxy(node, self, attr_val),
        )


class _DirectReads(TorchFunctionMode):
    """Notes which of a model's tensors a trace computes with although no attribute of a module gave them.

    ``parameters()``, ``state_dict()``, and a list that holds a weight give the tensor itself and not its proxy: what is
    computed from it is a constant to the trace, and the read is in no node.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.known, self.value_free = names, value_free_names()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The getter of an attribute is named __get__; what it gets, it belongs to.
        if getattr(getattr(func, "__self__", func), "__name__", "") not in self.value_free:
            for leaf in pytree.tree_leaves((args, kwargs)):
                name = self.known.get(id(leaf)) if isinstance(leaf, Tensor) else None
                if name is not None and name not in self.names:
                    self.names.append(name)
        return func(*args, **(kwargs or {}))


_MODULE_TABLES = frozenset(vars(nn.Module()))


def _kept_proxies(root: nn.Module) -> Iterator[fx.Proxy]:
    """Yield the values of a trace that a forward has kept in an attribute, or in a list or dict that is one."""
    for module in root.modules():
        for name, value in vars(module).items():
            if name not in _MODULE_TABLES:
                yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Proxy))


class _RankedProxy(ValueProxy):
    """An input whose number of axes is known."""

    tracer: ScopeTracer

    @property
    def ndim(self) -> int:
        return self.tracer.rank or 0

    def dim(self) -> int:
        return self.ndim


class _TensorProxy(ValueProxy):
    """A parameter or buffer whose shape, dtype and device are known: asking for them is no dataflow."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.tensor = tensor

    def _class(self) -> type:
        return type(self.tensor)

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def ndim(self) -> int:
        return self.tensor.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def size(self, dim: int | None = None) -> Any:
        return self.tensor.size() if dim is None else self.tensor.size(dim)

    def dim(self) -> int:
        return self.tensor.dim()

    def numel(self) -> int:
        return self.tensor.numel()
