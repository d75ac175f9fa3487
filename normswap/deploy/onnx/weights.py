"""Weights that an ONNX graph computes from constants: they are found, and computed once and for all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from normswap.deploy.onnx.quiet import quiet
from normswap.errors import ExportError, function

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["fold_weights", "weight_arithmetic"]

WEIGHTED = {"Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (1, 2), "MatMul": (0, 1)}
"""The inputs of each operator that are weights."""


def weight_arithmetic(model: onnx.ModelProto | ir.Model) -> list[str]:
    """Return the weights of Conv, ConvTranspose, Gemm and MatMul nodes that the file computes from constants.

    A weight that depends on the network's input (dynamic convolution) is none of these.

    Returns:
        One sentence for each, empty for a constant-folded graph.
    """
    import onnx_ir as ir

    graph = (model if isinstance(model, ir.Model) else ir.from_proto(model)).graph
    constant = {value for value in graph.initializers.values() if not value.is_graph_input()}
    found = []
    for node in graph.all_nodes():
        constant.update(value for sub in _subgraphs(node) for value in sub.initializers.values())
        # A body reads values of the graph around it that are no inputs of its node.
        pure = not node.op_type.startswith("Random") and not any(_subgraphs(node))
        if pure and all(value in constant for value in node.inputs if value is not None):
            constant.update(node.outputs)
        for position in WEIGHTED.get(node.op_type, ()):
            value = node.inputs[position] if position < len(node.inputs) else None
            producer = value.producer() if value else None
            if value in constant and producer is not None and producer.op_type != "Constant":
                found.append(f"{node.op_type} {node.name!r} has a weight computed by {producer.op_type}")
    return found


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    import onnx_ir as ir

    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()


def fold_weights(model: ir.Model) -> None:
    """Compute, in place, the weights that the graph still computes from constants.

    torch.onnx leaves those of more than 8,192 values to the runtime: a weight standardization written out in
    a user's own layer, the transpose of a tied weight.

    Raises:
        ExportError: Some are left.
    """
    if weight_arithmetic(model):
        _fold_constants(model)
    if left := weight_arithmetic(model):
        raise ExportError(
            f"{len(left)} weights are computed in the graph; the first: {left[0]}",
            code="export-weight-arithmetic",
            hint=f"make each weight a plain parameter first: {function('fold')}",
        )


def _fold_constants(model: ir.Model) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    with quiet():
        fold_constants(model, input_size_limit=1 << 40, output_size_limit=1 << 40)
        RemoveUnusedNodesPass()(model)
