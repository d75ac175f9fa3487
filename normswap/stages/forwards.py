"""Forwards that call a norm functionally: found, and rewritten to call a module instead.

Note [Two forwards]
A symbolic trace fixes ``self.training`` at the value that it finds. So the forward is traced twice, in train and in
eval mode, and the owner's class becomes a subclass of itself, made for it, that runs the one or the other.
Its state dict keys, its methods and ``isinstance`` stay as they are. A GraphModule is edited in place instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from normswap.errors import PlanError
from normswap.graph.functional import read_functional_norm
from normswap.graph.ops import is_functional_norm, norm_argument
from normswap.graph.tracer import ScopeTracer
from normswap.norms.functional import FunctionalNorm
from normswap.runs.guard import untouched
from normswap.runs.settings import seed_generators

__all__ = ["find_functional_norms", "is_rewritten", "replace_functional_norms", "trace_own_forward"]

_MARK = "_normswap_rewritten"


def trace_own_forward(owner: nn.Module, training: bool) -> fx.Graph:
    """Return the graph of ``owner``'s own forward, its submodules as leaves, in the given mode.

    Raises:
        PlanError: The forward cannot be traced, or does what no graph holds: it writes the owner's state.
    """
    with untouched(owner):
        owner.__dict__["training"] = training
        graphs = []
        try:
            for seed in (0, 1):
                with untouched(owner) as before:
                    seed_generators(seed)
                    graphs.append(ScopeTracer(own_forward_only=True, in_place=True).trace(owner))
        except Exception as cause:
            raise PlanError(
                f"the forward of {type(owner).__name__}, which calls a norm functionally, cannot be traced: {cause}",
                code="untraceable-forward",
                hint="exclude this norm, or move it into a submodule",
            ) from cause
    if before.changed:
        raise PlanError(
            f"the forward of {type(owner).__name__}, which calls a norm functionally, keeps state: it writes an "
            "attribute or computes with a tensor that no attribute gives, and a rewritten forward would not",
            code="untraceable-forward",
            hint="exclude this norm, or move it into a submodule",
        )
    graph, other = graphs
    if graph.python_code("self").src != other.python_code("self").src:
        raise PlanError(
            f"the forward of {type(owner).__name__}, which calls a norm functionally, computes with a random number, "
            "and a rewritten forward would always take the same",
            code="untraceable-forward",
            hint="exclude this norm, or move it into a submodule",
        )
    return graph


def find_functional_norms(owner: nn.Module) -> dict[str, FunctionalNorm]:
    """Return the functional norms of ``owner``'s own forward by name."""
    graph = owner.graph if isinstance(owner, fx.GraphModule) else trace_own_forward(owner, owner.training)
    norms = (read_functional_norm(n, owner, "") for n in graph.nodes if is_functional_norm(n))
    return {norm.name: norm for norm in norms if isinstance(norm, FunctionalNorm)}


def replace_functional_norms(
    owner: nn.Module, replacements: Mapping[str, nn.Module], found: Mapping[str, FunctionalNorm]
) -> None:
    """Make ``owner``'s forward call ``replacements`` instead of ``batch_norm``; drop the tensors it no longer reads.

    Args:
        owner: The module; its class changes, or its graph if it is a GraphModule.
        replacements: The new norms by the functional norm's name.
        found: What :func:`find_functional_norms` gave.
    """
    children: dict[str, str] = {}
    if isinstance(owner, fx.GraphModule):
        graphs = {"forward": owner.graph}
    else:
        graphs = {f"forward_{mode}": trace_own_forward(owner, mode == "train") for mode in ("train", "eval")}
    for name, replacement in replacements.items():
        child = name if found[name].holder else _free_name(owner, name)
        parent, _, leaf = child.rpartition(".")
        owner.get_submodule(parent)._modules[leaf] = replacement
        children[name] = child
    for graph in graphs.values():
        _redirect(owner, graph, children)
    read = {str(n.target) for graph in graphs.values() for n in graph.nodes if n.op == "get_attr"}
    for name in replacements:
        if not found[name].holder:
            _drop(owner, [t for t in found[name].tensors if t is not None and t not in read])
    if isinstance(owner, fx.GraphModule):
        owner.graph.lint()
        owner.recompile()
    else:
        owner.__class__ = _subclass(type(owner), graphs)


def is_rewritten(module: nn.Module) -> bool:
    """Tell whether ``module``'s forward was rewritten by :func:`replace_functional_norms`."""
    return _MARK in vars(type(module))


def _redirect(owner: nn.Module, graph: fx.Graph, children: Mapping[str, str]) -> None:
    for node in list(graph.nodes):
        if not is_functional_norm(node):
            continue
        name = _name_of(node, children)
        if name is None:
            continue
        with graph.inserting_before(node):
            call = graph.create_node("call_module", children[name], (norm_argument(node, "input"),))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _name_of(node: fx.Node, children: Mapping[str, str]) -> str | None:
    """Return which of ``children`` the call's running mean stands for: by its own name or by that of its holder."""
    mean = norm_argument(node, "running_mean")
    if not isinstance(mean, fx.Node):
        return None
    target = str(mean.target)
    return next((name for name in (target, target.rpartition(".")[0]) if name in children), None)


def _free_name(owner: nn.Module, mean: str) -> str:
    """Return a name for the new norm beside its running mean: ``mid_running_mean`` → ``mid_norm``."""
    parent, _, leaf = mean.rpartition(".")
    stem = leaf.replace("running_mean", "").strip("_")
    holder = owner.get_submodule(parent)
    base = f"{stem}_norm" if stem else "norm"
    name, count = base, 1
    while hasattr(holder, name):
        name, count = f"{base}{count}", count + 1
    return f"{parent}.{name}" if parent else name


def _drop(owner: nn.Module, tensors: list[str]) -> None:
    for name in tensors:
        parent, _, leaf = name.rpartition(".")
        holder = owner.get_submodule(parent)
        if leaf in holder._parameters or leaf in holder._buffers:
            delattr(holder, leaf)


def _subclass(cls: type[nn.Module], graphs: Mapping[str, fx.Graph]) -> type[nn.Module]:
    """Return a subclass of ``cls`` whose forward runs the graphs (Note [Two forwards])."""
    namespace: dict[str, Any] = {_MARK: True, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    for name, graph in graphs.items():
        code = graph.python_code("self")
        scope = dict(code.globals)
        exec(code.src, scope)  # the graph's own code, as torch.fx's GraphModule runs it
        namespace[name] = scope["forward"]
    names = ", ".join(str(n.target) for n in graphs["forward_eval"].nodes if n.op == "placeholder")
    scope = {}
    exec(
        f"def forward(self, {names}):\n"
        f"    return self.forward_train({names}) if self.training else self.forward_eval({names})\n",
        scope,
    )
    namespace["forward"] = scope["forward"]
    namespace["forward"].__doc__ = inspect.getdoc(cls.forward)
    return type(cls.__name__, (cls,), namespace)
