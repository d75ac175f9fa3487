"""Layer-normalized recurrent layers in ONNX: a Scan over time per layer and direction, for sequences of any length.

What the inputs give is normalized for all steps at once, by operators of the graph around it. For the loop there stands
a symbolic operator while torch exports (``normswap::Steps``, see Note [The length of a sequence] in
:mod:`normswap.deploy.onnx.recurrent`); afterwards each becomes a Scan, whose body is one step of
:mod:`normswap.nn.layer_norm_steps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normswap.deploy.onnx.recurrent import Lowered
from normswap.nn import LayerNormGRU, LayerNormLSTM, LayerNormRNN
from normswap.nn.layer_norm_rnn import LayerNormRNNBase

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["lower_normalized", "write_scans"]

_DOMAIN = "normswap"


class _Normalized(Lowered):
    """A layer-normalized layer that calls the symbolic operator."""

    def _layer(self, k: int, x: Tensor, h: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return all outputs ``(T, D, N, size)`` and the last states of layer ``k``."""
        assert isinstance(self, LayerNormRNNBase)
        found = []
        for d, end in enumerate(end for end in self._ends() if end.removesuffix("_reverse") == f"l{k}"):
            p = self._direction(end)
            u, _ = self._step(p, x)
            size, units, batch = self.proj_size or self.hidden_size, self.hidden_size, x.shape[1]
            state = [x.new_zeros(batch, size) if h is None else h[d]]
            if self.mode == "LSTM":
                state.append(x.new_zeros(batch, units) if c is None else c[d])
            w, projection = (self._parameters.get(f"onnx_{name}_{end}") for name in ("w", "p"))
            norm, cell = p.ih if p.hh is None else p.hh, p.c or (None, None)
            shapes: list[Sequence[Any]] = [one.shape for one in state]
            outputs = torch.onnx.ops.symbolic_multi_out(
                f"{_DOMAIN}::Steps",
                [*state, u, w, p.b_hh, *norm, *cell, projection],
                {"kind": self.mode, "units": units, "epsilon": p.eps, "reverse": d},
                dtypes=[x.dtype] * (len(state) + 1),
                shapes=[*shapes, (x.shape[0], batch, size)],
                version=1,
            )
            found.append((outputs[-1], outputs[0], outputs[1] if len(state) > 1 else outputs[0]))
        y, h_last, c_last = (torch.stack(one, i) for one, i in zip(zip(*found, strict=True), (1, 0, 0), strict=True))
        return y, h_last, c_last


class _NormalizedLSTM(_Normalized, LayerNormLSTM):
    pass


class _NormalizedGRU(_Normalized, LayerNormGRU):
    pass


class _NormalizedRNN(_Normalized, LayerNormRNN):
    pass


_CLASSES: dict[type[nn.Module], type[LayerNormRNNBase]] = {
    LayerNormLSTM: _NormalizedLSTM,
    LayerNormGRU: _NormalizedGRU,
    LayerNormRNN: _NormalizedRNN,
}


def lower_normalized(model: nn.Module) -> None:
    """Let the layer-normalized layers of ``model`` call the symbolic operator, in place."""
    if not hasattr(torch.onnx, "ops"):  # a torch before 2.8 writes each step, for the example's length alone
        return
    for layer in model.modules():
        if (kind := _CLASSES.get(type(layer))) is not None:
            assert isinstance(layer, LayerNormRNNBase)
            layer.__class__ = kind
            for end in layer._ends():
                for name, short in (("weight_hh", "w"), ("weight_hr", "p")):
                    if (matrix := layer._parameters.get(f"{name}_{end}")) is not None:
                        transposed = nn.Parameter(matrix.detach().T.contiguous(), requires_grad=False)
                        layer.register_parameter(f"onnx_{short}_{end}", transposed)


def write_scans(model: ir.Model) -> None:
    """Replace each symbolic operator by a Scan, in place."""
    import onnx_ir as ir

    graph = model.graph
    for number, node in enumerate([node for node in graph if node.domain == _DOMAIN]):
        states = len(node.outputs) - 1
        given = [*node.inputs, *[None] * (10 - len(node.inputs))]
        body = _Body(f"steps{number}", given[states + 1 :], node)
        direction = node.attributes["reverse"].as_int()
        attributes: dict[str, Any] = {
            "body": body.graph(states),
            "num_scan_inputs": 1,
            "scan_input_directions": [direction],
            "scan_output_directions": [direction],
        }
        scan = ir.Node(
            "",
            "Scan",
            given[: states + 1],
            ir.convenience.convert_attributes(attributes),
            num_outputs=states + 1,
            name=f"steps{number}",
        )
        ir.convenience.replace_nodes_and_values(graph, node, [node], [scan], node.outputs, scan.outputs)
    model.opset_imports.pop(_DOMAIN, None)


class _Body:
    """The graph of one step; the tensors of the layer are values of the graph around it."""

    def __init__(self, name: str, tensors: Sequence[Any], node: ir.Node) -> None:
        self.name, self.nodes = name, list[Any]()
        self.w, self.bias, *norms, self.projection = tensors[:7]
        self.norm, self.cell = norms[:2], norms[2:]
        self.kind = node.attributes["kind"].as_string()
        self.units = node.attributes["units"].as_int()
        self.epsilon = node.attributes["epsilon"].as_float()
        self.type = node.inputs[0].type if node.inputs[0] is not None else None

    def op(self, name: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node and return its output, or its outputs where there are several."""
        import onnx_ir as ir

        made = ir.convenience.convert_attributes(attributes)
        node = ir.Node("", name, inputs, made, num_outputs=outputs, name=f"{self.name}/{len(self.nodes)}")
        for i, value in enumerate(node.outputs):
            value.name = f"{node.name}_{i}"
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def parts(self, x: Any, sizes: Sequence[int]) -> Any:
        """Split the last axis."""
        import onnx_ir as ir

        constant = self.op("Constant", value=ir.tensor(list(sizes), dtype=ir.DataType.INT64))
        return self.op("Split", x, constant, outputs=len(sizes), axis=-1)

    def layer_norm(self, x: Any, values: Sequence[Any]) -> Any:
        return self.op("LayerNormalization", x, *values, axis=-1, epsilon=self.epsilon)

    def of_state(self, h: Any) -> Any:
        product = self.op("MatMul", h, self.w)
        return product if self.bias is None else self.op("Add", product, self.bias)

    def graph(self, states: int) -> ir.Graph:
        """Return the graph: states and the step's input to new states and the step's output."""
        import onnx_ir as ir

        inputs = [ir.Value(name=f"{self.name}/in{i}", type=self.type) for i in range(states + 1)]
        u, h = inputs[-1], inputs[0]
        if self.kind == "LSTM":
            new = self.lstm(u, h, inputs[1])
        else:
            new = (self.gru(u, h) if self.kind == "GRU" else self.rnn(u, h),)
        outputs = [*new, self.op("Identity", new[0])]
        for value in outputs:
            value.type = self.type
        return ir.Graph(inputs, outputs, nodes=self.nodes, name=self.name)

    def lstm(self, u: Any, h: Any, c: Any) -> tuple[Any, ...]:
        i, f, g, o = self.parts(self.op("Add", u, self.layer_norm(self.of_state(h), self.norm)), [self.units] * 4)
        kept, new = self.op("Mul", self.op("Sigmoid", f), c), self.op("Mul", self.op("Sigmoid", i), self.op("Tanh", g))
        c = self.op("Add", kept, new)
        seen = c if self.cell[0] is None else self.layer_norm(c, self.cell)
        h = self.op("Mul", self.op("Sigmoid", o), self.op("Tanh", seen))
        return (h if self.projection is None else self.op("MatMul", h, self.projection)), c

    def gru(self, u: Any, h: Any) -> Any:
        sizes = [2 * self.units, self.units]
        (u_gates, u_new), (a_gates, a_new) = self.parts(u, sizes), self.parts(self.of_state(h), sizes)
        gains, shifts = ([self.op("Slice", value, *self.bounds(a, b)) for a, b in self.spans()] for value in self.norm)
        gates = self.op("Sigmoid", self.op("Add", u_gates, self.layer_norm(a_gates, (gains[0], shifts[0]))))
        r, z = self.parts(gates, [self.units] * 2)
        n = self.op("Tanh", self.op("Add", u_new, self.op("Mul", r, self.layer_norm(a_new, (gains[1], shifts[1])))))
        return self.op("Add", n, self.op("Mul", z, self.op("Sub", h, n)))

    def spans(self) -> list[tuple[int, int]]:
        return [(0, 2 * self.units), (2 * self.units, 3 * self.units)]

    def bounds(self, first: int, end: int) -> list[Any]:
        import onnx_ir as ir

        return [self.op("Constant", value=ir.tensor([n], dtype=ir.DataType.INT64)) for n in (first, end)]

    def rnn(self, u: Any, h: Any) -> Any:
        a = self.layer_norm(self.op("Add", u, self.of_state(h)), self.norm)
        return self.op("Relu" if self.kind == "RNN_RELU" else "Tanh", a)
