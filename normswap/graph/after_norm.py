"""What a BatchNorm's class does after normalizing, such as an activation."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from normswap.graph.ops import is_functional_norm
from normswap.graph.tracer import ScopeTracer
from normswap.nn.kinds import class_of
from normswap.norms import NormState, norm_of
from normswap.operations.table import of_call
from normswap.runs.guard import set_mode, untouched

__all__ = ["after_norm"]


# Note [After the norm]
# timm's BatchNormAct2d and its like normalize, drop and activate in one forward: what follows the normalization must
# survive. The forward is traced and its end taken apart: submodules and plain activations, up to the normalization
# itself, and whether that part is the affine map of the statistics is checked by running it. What fails is refused.


def after_norm(module: nn.Module) -> tuple[nn.Module, ...] | str:
    """Return the modules that ``module``'s forward applies after normalizing, or why that cannot be told.

    The result is () for torch's own BatchNorms; for a subclass with an activation it is that activation, the very
    submodule where there is one (Note [After the norm]).
    """
    norm = norm_of(module)
    if norm is None or norm.only_normalizes(module):
        return ()
    name = class_of(module).__name__
    with untouched(module):
        set_mode(module, False)
        try:
            graph = ScopeTracer(own_forward_only=True, rank=_rank(module)).trace(module)
        except Exception as cause:
            what = f"the forward of {name} cannot be traced ({type(cause).__name__}), so what it does is unknown"
            return f"{what}: where it moves axes, let a module do so that calls a plain BatchNorm"
    after = _tail(module, graph)
    if isinstance(after, str):
        return f"the forward of {name} {after}"
    try:
        known = module.__dict__.get("forward") is None and _is_affine_then(module, norm.read(module), after)
    except Exception as cause:
        return f"the forward of {name} cannot be run on noise ({type(cause).__name__}), so what it does is unknown"
    return after if known else f"the forward of {name} does more than normalize with its statistics and then activate"


def _tail(module: nn.Module, graph: fx.Graph) -> tuple[nn.Module, ...] | str:
    (output,) = (node for node in graph.nodes if node.op == "output")
    if any(node.target is operator.setitem for node in graph.nodes):
        return "writes to its output"
    node, after = output.args[0], list[nn.Module]()
    while isinstance(node, fx.Node):
        if is_functional_norm(node) or node.op == "placeholder":
            break
        operation = of_call(node)
        if node.op != "call_module" and (operation is None or operation.rebuild is None):
            break  # a frozen BatchNorm's arithmetic: whether it is one is checked by running it
        if len(node.all_input_nodes) != 1:
            return "combines values after normalizing"
        if operation is None:
            activation: nn.Module | None = module.get_submodule(str(node.target))
        else:
            activation = operation.rebuilt(operation.bind(node.args, node.kwargs))
        if activation is None:
            break
        if type(activation) is not nn.Identity:
            after.append(activation)
        node = node.all_input_nodes[0]
    else:
        return "does not return one tensor"
    return tuple(reversed(after))


def _rank(module: nn.Module) -> int:
    """Return a number of axes that ``module``, a norm, takes."""
    norm = norm_of(module)
    return max((4,) if norm is None else norm.axes(module) or (4,))


def _is_affine_then(module: nn.Module, state: NormState, after: tuple[nn.Module, ...]) -> bool:
    """Run the norm on noise and compare it with its affine map followed by ``after``; trusted where nothing can run."""
    if state.gamma.is_meta or state.mean is None or state.var is None:
        return True
    axes = _rank(module)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, state.num_features, *(3,) * (axes - 2), generator=generator)
    shape = (1, -1, *(1,) * (axes - 2))
    std = (state.var.double() + state.eps).sqrt().view(shape)
    x = (noise.to(std) * std + state.mean.double().view(shape)).to(state.gamma.dtype)
    with untouched(module), torch.no_grad():
        set_mode(module, False)
        for m in after:
            m.eval()
        found = module(x.clone()).double()
        value = (x.double() - state.mean.double().view(shape)) / std
        value = (value * state.gamma.double().view(shape) + state.beta.double().view(shape)).to(x.dtype)
        for m in after:
            value = m(value)
        scale = value.double().abs().amax().clamp(min=1e-12)
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(x.dtype, 3e-2)
        return bool((found - value.double()).abs().amax() <= tolerance * scale)
