"""Group normalization in ONNX: one operator for its affine.

# Note [GroupNorm below opset 21]
torch writes GroupNorm as Reshape → InstanceNormalization → Reshape → Mul(γ) → Add(β): two passes over the
feature map for the affine alone. Here they become one ``BatchNormalization(γ, β, mean 0, var 1, epsilon 0)``,
which is ``γ (x − 0)/sqrt(1 + 0) + β``: the same function in one pass. A γ of ones with a β of zeros needs no
operator at all. From opset 21 on, torch writes GroupNormalization, which is left as it is; onnxruntime's CPU
runs that slower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["lower_group_norms"]


def lower_group_norms(model: ir.Model) -> None:
    """Replace the Mul and Add after each normalization, in place, see Note [GroupNorm below opset 21]."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for norm in [node for node in model.graph if node.op_type == "InstanceNormalization"]:
        reshape = _only_consumer(norm, "Reshape")
        multiply = _only_consumer(reshape, "Mul")
        add = _only_consumer(multiply, "Add")
        if reshape and multiply and add:
            _merge_affine(model, reshape.outputs[0], multiply, add)
    RemoveUnusedNodesPass()(model)  # and the constants of what is gone


def _merge_affine(model: ir.Model, x: ir.Value, multiply: ir.Node, add: ir.Node) -> None:
    """Replace ``x · γ + β`` by one BatchNormalization where γ and β are constants per channel."""
    import numpy as np
    import onnx_ir as ir

    y, graph = add.outputs[0], model.graph
    gamma = _per_channel(multiply, x, y)
    beta = _per_channel(add, multiply.outputs[0], y)
    if gamma is None or beta is None or gamma.shape != beta.shape or gamma.dtype != np.float32:
        return
    if (gamma == 1).all() and (beta == 0).all() and not y.is_graph_output():
        y.replace_all_uses_with(x)
        x.shape, x.type = y.shape, y.type
        graph.remove([multiply, add], safe=True)
        return
    constants = []
    for name, array in {
        f"{y.name}/scale": gamma,
        f"{y.name}/bias": beta,
        f"zeros/{gamma.size}": np.zeros_like(gamma),  # shared by all norms of this width
        f"ones/{gamma.size}": np.ones_like(gamma),
    }.items():
        if name not in graph.initializers:
            tensor, shape = ir.tensor(array, name=name), ir.Shape(array.shape)
            graph.register_initializer(ir.Value(None, name=name, shape=shape, type=x.type, const_value=tensor))
        constants.append(graph.initializers[name])
    affine = ir.node("BatchNormalization", [x, *constants], {"epsilon": 0.0}, name=add.name)
    affine.metadata_props.update(add.metadata_props)
    out = affine.outputs[0]
    out.shape, out.type = y.shape, y.type
    ir.convenience.replace_nodes_and_values(graph, add, [multiply, add], [affine], [y], [out])


def _only_consumer(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """Return the one node that reads the node's output, if it is of this type and all that reads it."""
    if node is None or node.outputs[0].is_graph_output():
        return None
    uses = list(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 and uses[0].node.op_type == op_type else None


def _per_channel(node: ir.Node, x: ir.Value, y: ir.Value) -> Any:
    """Return the operand beside ``x`` as an array ``(C,)``, if it is a constant of axis 1 alone."""
    other = node.inputs[1] if node.inputs[0] is x else node.inputs[0]
    if other is None or other.const_value is None or y.shape is None or len(y.shape) < 2:
        return None
    array = other.const_value.numpy()
    channels = y.shape[1]
    trailing = (1,) * (len(y.shape) - 2)
    shape = array.shape[array.ndim - 1 - len(trailing) :]  # without leading ones
    if array.size != channels or shape != (channels, *trailing):
        return None
    return array.reshape(-1)
