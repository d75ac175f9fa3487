"""Batch-normalized cells: the equations, and that over all steps they are the layers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from recurrent_oracles import Array, gru_step, lstm_step
from torch import Tensor, nn

import normswap as ns
from normswap.errors import InputError
from normswap.nn import (
    BatchNormGRU,
    BatchNormGRUCell,
    BatchNormLSTM,
    BatchNormLSTMCell,
    BatchNormRNN,
    BatchNormRNNCell,
)

IN, SIZE, STEPS, BATCH = 5, 4, 6, 3
KINDS: dict[str, tuple[Any, Any, type[nn.RNNCellBase]]] = {
    "LSTM": (BatchNormLSTMCell, BatchNormLSTM, nn.LSTMCell),
    "GRU": (BatchNormGRUCell, BatchNormGRU, nn.GRUCell),
    "RNN": (BatchNormRNNCell, BatchNormRNN, nn.RNNCell),
}
SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "LSTM of the input alone, without bias": ("LSTM", {"input_only": True, "bias": False}),
    "GRU": ("GRU", {"eps": 1e-2, "momentum": 0.4}),
    "RNN, relu": ("RNN", {"nonlinearity": "relu"}),
}
PER_STEP: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM, c normalized": ("LSTM", {"max_length": 4, "cell_norm": True}),
    "LSTM": ("LSTM", {"max_length": 9}),
    "GRU, without bias": ("GRU", {"max_length": 4, "bias": False}),
    "RNN of the input alone": ("RNN", {"max_length": 4, "input_only": True}),
}


def pair(kind: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """A cell and a layer in float64 with the same tensors, all of them random."""
    cell, layer = (one(IN, SIZE, dtype=torch.float64, **options) for one in KINDS[kind][:2])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            tensor.normal_(generator=generator)
            if "_var_" in name:
                tensor.abs_().add_(0.1)
    cell.load_state_dict({name.replace("_l0", ""): value for name, value in layer.state_dict().items()})
    return cell, layer


def sequences() -> Tensor:
    return torch.randn(STEPS, BATCH, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def first_state(kind: str, batch: int = BATCH) -> Any:
    h, c = torch.randn(2, batch, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return (h, c) if kind == "LSTM" else h


def for_layer(state: Any) -> Any:
    return tuple(one[None] for one in state) if isinstance(state, tuple) else state[None]


def h_of(state: Any) -> Tensor:
    return state[0] if isinstance(state, tuple) else state


def expected(cell: Any, x: Array, h: Array, c: Array) -> Array:
    """h after one step, from the cell's tensors, in evaluation and at the statistics of step 0."""
    p = {name: value.detach().numpy() for name, value in cell.state_dict().items()}

    def normalized(part: str, a: Array) -> Array:
        bias = p.get("bn_c_bias" if part == "c" else f"bias_{part}", 0.0)
        if part == "hh" and cell.input_only:
            return a + bias
        gain, mean, var = (p[f"bn_{part}_{kind}"] for kind in ("weight", "mean", "var"))
        mean, var = (mean, var) if cell.max_length is None else (mean[0], var[0])
        return gain * (a - mean) / np.sqrt(var + cell.eps) + bias

    u, w = normalized("ih", x @ p["weight_ih"].T), normalized("hh", h @ p["weight_hh"].T)
    if cell.mode == "LSTM":
        return lstm_step(u + w, c, *([lambda c: normalized("c", c)] if cell.cell_norm else []))[0]
    if cell.mode == "GRU":
        return gru_step(u, w, h)
    return np.maximum(u + w, 0) if cell.mode == "RNN_RELU" else np.tanh(u + w)


@pytest.mark.parametrize("form", [*(("shared", name) for name in SHARED), *(("per step", name) for name in PER_STEP)])
def test_a_cell_computes_the_equations(form: tuple[str, str]) -> None:
    kind, options = (SHARED if form[0] == "shared" else PER_STEP)[form[1]]
    cell, x, state = pair(kind, options)[0].eval(), sequences()[0], first_state(kind)
    t = () if form[0] == "shared" else (0,)
    found = h_of(cell(x, state, *t)).detach().numpy()
    h, c = (one.numpy() for one in (state if kind == "LSTM" else (state, state)))
    np.testing.assert_allclose(found, expected(cell, x.numpy(), h, c), rtol=0, atol=1e-12)
    with torch.no_grad():
        cell.bn_ih_var += 1e-2
    assert np.abs(expected(cell, x.numpy(), h, c) - found).max() > 1e-6


@pytest.mark.parametrize("form", SHARED)
@pytest.mark.parametrize("training", [True, False])
def test_with_shared_statistics_it_is_the_layer_on_a_sequence_of_one_step(form: str, training: bool) -> None:
    kind, options = SHARED[form]
    cell, layer = (one.train(training) for one in pair(kind, options))
    x, state = sequences()[0], first_state(kind)
    for _ in range(2):
        found, (output, last) = cell(x, state), layer(x[None], for_layer(state))
        torch.testing.assert_close(h_of(found), output[0], rtol=0, atol=1e-12)
        if kind == "LSTM":
            torch.testing.assert_close(found[1], last[1][0], rtol=0, atol=1e-12)
        for one in (h_of(found), output):
            one.sum().backward()
    for name, value in layer.named_buffers():
        torch.testing.assert_close(getattr(cell, name.replace("_l0", "")), value, rtol=0, atol=1e-13)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(getattr(cell, name.replace("_l0", "")).grad, parameter.grad, rtol=0, atol=1e-10)
    before = pair(kind, options)[0]
    assert torch.equal(before.bn_ih_mean, cell.bn_ih_mean) is not training


@pytest.mark.parametrize("form", PER_STEP)
@pytest.mark.parametrize("training", [True, False])
def test_with_statistics_per_step_it_is_the_layer_over_all_steps(form: str, training: bool) -> None:
    kind, options = PER_STEP[form]
    cell, layer = (one.train(training) for one in pair(kind, options))
    x, state = sequences(), first_state(kind)
    output, _ = layer(x, for_layer(state))
    outputs = []
    for t, now in enumerate(x):
        state = cell(now, state, t)
        outputs.append(h_of(state))
    found = torch.stack(outputs)
    torch.testing.assert_close(found, output, rtol=0, atol=1e-12)
    for one in (found, output):
        one.square().sum().backward()
    for name, value in layer.named_buffers():
        torch.testing.assert_close(getattr(cell, name.replace("_l0", "")), value, rtol=0, atol=1e-13)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(getattr(cell, name.replace("_l0", "")).grad, parameter.grad, rtol=0, atol=1e-10)
    other = cell(x[1], first_state(kind), 0)
    assert not torch.allclose(h_of(other), h_of(cell(x[1], first_state(kind), 1)), atol=1e-3) or training


class Stepped(nn.Module):
    def __init__(self, cell: nn.Module, *, per_step: bool) -> None:
        super().__init__()
        self.cell, self.per_step = cell, per_step

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for t, now in enumerate(x.unbind()):
            state = self.cell(now, state, t) if self.per_step else self.cell(now, state)
        return h_of(state)


@pytest.mark.parametrize("form", SHARED)
def test_with_shared_statistics_it_folds_to_torchs_cell(form: str) -> None:
    kind, options = SHARED[form]
    model, x = Stepped(pair(kind, options)[0], per_step=False).eval(), sequences()
    folding = ns.fold_with_report(model, example_inputs=x)
    assert type(folding.model.cell) is KINDS[kind][2]
    assert not folding.left
    torch.testing.assert_close(folding.model(x), model(x), rtol=0, atol=1e-12)
    again = pickle.loads(pickle.dumps(folding.model.cell))
    with torch.no_grad():
        again.weight_ih[0, 0] += 1e-3
    assert not torch.allclose(h_of(again(x[0])), h_of(folding.model.cell(x[0])), rtol=0, atol=1e-8)


def test_with_statistics_per_step_it_stays_and_is_listed() -> None:
    model, x = Stepped(pair(*PER_STEP["LSTM"])[0], per_step=True).eval(), sequences()
    folding = ns.fold_with_report(model, example_inputs=x)
    assert torch.equal(folding.model(x), model(x))
    ((name, reason),) = ((row.name, row.reason) for row in folding.left)
    assert name == "cell"
    assert reason.startswith("it has statistics of its own for each step, which torch's LSTMCell has not")


def test_cells_and_layers_start_alike() -> None:
    torch.manual_seed(0)
    cell = BatchNormLSTMCell(IN, SIZE, max_length=2, cell_norm=True, gain=0.3)
    assert {float(value) for name, p in cell.named_parameters() if "bn" in name for value in p.detach()} == {
        0.0,
        float(np.float32(0.3)),
    }
    assert float(cell.bias_ih.detach().abs().max()) == float(cell.bn_hh_mean.abs().max()) == 0
    assert float(cell.bn_c_var.min()) == 1
    assert 0 < float(cell.weight_hh.detach().abs().max()) <= SIZE**-0.5
    copied = copy.deepcopy(cell)
    assert all(torch.equal(value, copied.state_dict()[name]) for name, value in cell.state_dict().items())
    assert "max_length=2" in str(cell)


def test_what_it_cannot_compute_is_refused() -> None:
    shared, per_step = BatchNormGRUCell(IN, SIZE), BatchNormGRUCell(IN, SIZE, max_length=3)
    x = torch.randn(BATCH, IN)
    with pytest.raises(ValueError, match="all steps share statistics: leave t"):
        shared(x, None, 0)
    with pytest.raises(ValueError, match="each step has statistics of its own: give t"):
        per_step(x)
    with pytest.raises(ValueError, match="t must be at least 0"):
        per_step(x, None, -1)
    with pytest.raises(ValueError, match="more than one value per unit, and has 1"):
        shared(x[:1])
    with pytest.raises(ValueError, match="more than one value per unit, and has 1"):
        shared(x[0])
    assert shared.eval()(x[0]).shape == (SIZE,)
    with pytest.raises(ValueError, match="needs statistics per step"):
        BatchNormLSTMCell(IN, SIZE, cell_norm=True)
    with pytest.raises(TypeError, match="cell_norm is an LSTM's"):
        BatchNormRNNCell(IN, SIZE, cell_norm=True, max_length=3)
    with pytest.raises(RuntimeError, match="expected a state of shape"):
        shared(x, torch.zeros(BATCH, SIZE + 1))
    with pytest.raises(InputError, match="whose statistics follow its training"):
        ns.update_statistics(Stepped(shared, per_step=False), torch.randn(4, 6, IN))


def test_a_plan_leaves_it() -> None:
    model = Stepped(BatchNormLSTMCell(IN, SIZE), per_step=False).eval()
    (skip,) = [skip for skip in ns.plan(model, None, recurrent="wn").skips if skip.name == "cell"]
    assert skip.reason == "it is normalized already"
