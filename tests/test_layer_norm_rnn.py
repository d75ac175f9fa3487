"""Layer-normalized recurrent layers: the papers' equations step by step, and the interface of torch's layers."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recurrent_oracles import Array, layers, sigmoid, standardized
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import normswap as ns
from normswap.nn import (
    LayerNormGRU,
    LayerNormGRUCell,
    LayerNormLSTM,
    LayerNormLSTMCell,
    LayerNormRNN,
    LayerNormRNNCell,
)

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

KINDS: dict[str, tuple[type[nn.RNNBase], type[nn.RNNBase]]] = {
    "LSTM": (LayerNormLSTM, nn.LSTM),
    "GRU": (LayerNormGRU, nn.GRU),
    "RNN": (LayerNormRNN, nn.RNN),
}
CELLS = {"LSTM": LayerNormLSTMCell, "GRU": LayerNormGRUCell, "RNN": LayerNormRNNCell}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "LSTM, c not normalized": ("LSTM", {"cell_norm": False}),
    "LSTM without biases, eps": ("LSTM", {"bias": False, "eps": 1e-2}),
    "LSTM, layers, both directions, projection": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "GRU": ("GRU", {}),
    "GRU, layers, both directions": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "RNN, layers": ("RNN", {"num_layers": 3}),
    "RNN, relu, both directions": ("RNN", {"bidirectional": True, "nonlinearity": "relu"}),
}
IN, SIZE, STEPS, BATCH = 5, 4, 6, 3


def made(form: str, **more: Any) -> Any:
    """A layer in float64 all of whose parameters are random."""
    kind, options = FORMS[form]
    layer = KINDS[kind][0](IN, SIZE, dtype=torch.float64, **options, **more)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def first_state(layer: Any, batch: int = BATCH) -> Any:
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(rows, batch, layer.proj_size or SIZE, dtype=torch.float64)
    return (h, torch.randn(rows, batch, SIZE, dtype=torch.float64)) if layer.mode == "LSTM" else h


def expected(layer: Any, x: Tensor, state: Any, **changed: Array) -> tuple[Array, Array, Array]:
    """What the equations give, from the layer's own tensors; ``x`` is (time, batch, features)."""
    p = {name: value.detach().numpy() for name, value in layer.named_parameters()} | changed
    eps, size = layer.eps, SIZE

    def summed(x_t: Array, h: Array, end: str) -> tuple[Array, Array]:
        b = [p.get(f"bias_{part}_{end}", 0.0) for part in ("ih", "hh")]
        return x_t @ p[f"weight_ih_{end}"].T + b[0], h @ p[f"weight_hh_{end}"].T + b[1]

    def norm(a: Array, part: str, end: str, units: slice = slice(None)) -> Array:
        return standardized(a[..., units], p[f"ln{part}_weight_{end}"][units], p[f"ln{part}_bias_{end}"][units], eps)

    def gates_of(end: str) -> Callable[[Array, Array], tuple[Array, Array]]:
        def gates(x_t: Array, h: Array) -> tuple[Array, Array]:
            u, w = summed(x_t, h, end)
            if layer.mode == "LSTM":
                return norm(u, "_ih", end), norm(w, "_hh", end)
            if layer.mode == "GRU":
                parts = (slice(0, 2 * size), slice(2 * size, None))
                made = [[norm(a, part, end, s) for s in parts] for a, part in ((u, "_ih"), (w, "_hh"))]
                return np.concatenate(made[0], -1), np.concatenate(made[1], -1)
            return norm(u + w, "", end), np.zeros_like(w)

        return gates

    h, c = state if isinstance(state, tuple) else (state, torch.zeros(*state.shape[:2], SIZE))
    kind = {"RNN_TANH": "TANH", "RNN_RELU": "RELU"}.get(layer.mode, layer.mode)
    cell = (lambda end: lambda c: norm(c, "_c", end)) if layer.cell_norm else None
    return layers(
        kind,
        p,
        x.numpy(),
        h.shape[-1],
        SIZE,
        num_layers=layer.num_layers,
        bidirectional=layer.bidirectional,
        state=(h.numpy(), c.double().numpy()),
        gates_of=gates_of,
        cell_of=cell,
    )


# --- the equations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_computes_the_equations_step_by_step(form: str) -> None:
    layer, x = made(form), torch.randn(STEPS, BATCH, IN, dtype=torch.float64)
    state = first_state(layer)
    y, last = layer(x, state)
    outputs, h, c = expected(layer, x, state)
    np.testing.assert_allclose(y.detach().numpy(), outputs, rtol=0, atol=1e-12)
    if layer.mode == "LSTM":
        np.testing.assert_allclose(last[0].detach().numpy(), h, rtol=0, atol=1e-12)
        np.testing.assert_allclose(last[1].detach().numpy(), c, rtol=0, atol=1e-12)
    else:
        np.testing.assert_allclose(last.detach().numpy(), h, rtol=0, atol=1e-12)
    name = next(name for name, _ in layer.named_parameters() if name.startswith("ln"))
    bent = layer.get_parameter(name).detach().numpy() * 1.001
    assert np.abs(expected(layer, x, state, **{name: bent})[0] - outputs).max() > 1e-6


def test_the_published_form() -> None:
    """Ba et al. 2016, eq. 20-22, in the letters of the paper: α is what is added, β what is multiplied.

    The control carries LN(c) on, as some public implementations do.
    """
    layer, x = made("LSTM"), torch.randn(STEPS, 1, IN, dtype=torch.float64)
    with torch.no_grad():
        layer.bias_ih_l0.zero_()
        layer.bias_hh_l0.zero_()
    p = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    alpha1, beta1, alpha2, beta2 = (p[f"ln_{part}_l0"] for part in ("hh_bias", "hh_weight", "ih_bias", "ih_weight"))
    alpha1, b = 0 * alpha1, alpha1 + alpha2
    alpha2 = 0 * alpha2

    def ln(z: Array, alpha: Array, beta: Array) -> Array:
        return (z - z.mean()) / np.sqrt(z.var() + layer.eps) * beta + alpha

    def run(carried: bool) -> list[Array]:
        h, c, found = np.zeros(SIZE), np.zeros(SIZE), []
        for x_t in x[:, 0].numpy():
            gates = ln(p["weight_hh_l0"] @ h, alpha1, beta1) + ln(p["weight_ih_l0"] @ x_t, alpha2, beta2) + b  # eq. 20
            i, f, g, o = np.split(gates, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)  # eq. 21
            normed = ln(c, p["ln_c_bias_l0"], p["ln_c_weight_l0"])
            h = sigmoid(o) * np.tanh(normed)  # eq. 22
            c = normed if carried else c
            found.append(h)
        return found

    y = layer(x)[0][:, 0].detach().numpy()
    np.testing.assert_allclose(y, run(carried=False), rtol=0, atol=1e-12)
    assert np.abs(y - run(carried=True)).max() > 1e-2


def test_it_begins_as_published() -> None:
    for kind, (ours, _) in KINDS.items():
        for name, value in ours(IN, SIZE).named_parameters():
            if name.startswith("weight"):
                assert float(value.detach().abs().max()) <= SIZE**-0.5, kind
            else:
                assert bool((value == float("_weight_" in name)).all()), name


@pytest.mark.parametrize("form", FORMS)
def test_weights_may_be_scaled_and_shifted(form: str) -> None:
    """Ba et al. 2016, table 1: invariant to re-scaling and re-centring a weight matrix; not to a single row's scale."""
    layer = made(form)
    layer.eps = 1e-12
    x = torch.randn(STEPS, BATCH, IN, dtype=torch.float64)
    state = first_state(layer)
    before = layer(x, state)[0]
    size = SIZE if layer.mode == "GRU" else 0
    with torch.no_grad():
        for name, value in layer.named_parameters():
            if name.startswith(("weight_ih", "weight_hh", "bias")):
                value.mul_(3)
                if value.ndim == 2:  # the same vector is added to each row that is normalized together
                    value[: 2 * size or None].add_(torch.randn(value.shape[1], dtype=torch.float64))
    torch.testing.assert_close(layer(x, state)[0], before, rtol=0, atol=1e-7)
    with torch.no_grad():
        layer.weight_hh_l0[0].mul_(2)
    assert not torch.allclose(layer(x, state)[0], before, atol=1e-3)


def rescaled_matrix(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0"):
            _stored(layer, name).mul_(3)
    return x


def recentred_matrix(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0"):
            stored = _stored(layer, name)
            stored.add_(torch.randn(stored.shape[1], dtype=stored.dtype))
    return x


def rescaled_row(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        _stored(layer, "weight_ih_l0")[2].mul_(3)
    return x


def rescaled_data(layer: nn.Module, x: Tensor) -> Tensor:
    return 3 * x


def recentred_data(layer: nn.Module, x: Tensor) -> Tensor:
    return x + 0.5


def rescaled_sample(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([3 * x[:, :1], x[:, 1:]], 1)


def _stored(layer: nn.Module, name: str) -> Tensor:
    """The tensor that is trained: v of a normalized weight."""
    if "parametrizations" not in layer._modules:
        return layer.get_parameter(name)
    return layer.get_parameter(f"parametrizations.{name}.original1")


TABLE = {
    rescaled_matrix: ("wn", "ln"),
    recentred_matrix: ("ln",),
    rescaled_row: ("wn",),
    rescaled_data: ("ln",),
    recentred_data: (),
    rescaled_sample: ("ln",),
}
"""Ba et al. 2016, table 1: which normalization of a layer is invariant to what."""


@pytest.mark.parametrize(("change", "kind"), [(change, kind) for change in TABLE for kind in ("wn", "ln")])
def test_the_papers_table_of_invariances(change: Callable[[nn.Module, Tensor], Tensor], kind: str) -> None:
    layer: Any = nn.LSTM(IN, SIZE, dtype=torch.float64)
    if kind == "wn":
        layer = ns.swap_norms(layer, None, recurrent="wn")
    else:
        layer = LayerNormLSTM(IN, SIZE, bias=False, eps=1e-14, dtype=torch.float64)
    x = torch.randn(STEPS, BATCH, IN, dtype=torch.float64)
    before = layer(x)[0]
    after = layer(change(layer, x))[0]
    moved = float((after - before).detach().abs().max())
    assert moved < 1e-9 if kind in TABLE[change] else moved > 1e-3


@pytest.mark.parametrize(
    ("form", "cell"), [("LSTM", "LSTM"), ("LSTM, c not normalized", "LSTM"), ("GRU", "GRU"), ("RNN", "RNN")]
)
def test_a_cell_is_one_step_of_its_layer(form: str, cell: str) -> None:
    kind, options = FORMS.get(form, ("RNN", {}))
    layer = KINDS[kind][0](IN, SIZE, dtype=torch.float64, **options)
    own = CELLS[cell](IN, SIZE, dtype=torch.float64, **options)
    assert {f"{name}_l0" for name, _ in own.named_parameters()} == {name for name, _ in layer.named_parameters()}
    with torch.no_grad():
        for name, value in own.named_parameters():
            layer.get_parameter(f"{name}_l0").copy_(value.normal_())
    x = torch.randn(STEPS, BATCH, IN, dtype=torch.float64)
    state = None
    for x_t, y_t in zip(x, layer(x)[0], strict=True):
        state = own(x_t, state)
        torch.testing.assert_close(state[0] if kind == "LSTM" else state, y_t, rtol=0, atol=1e-13)
    alone = own(x[0, 0], None)
    torch.testing.assert_close(alone[0] if kind == "LSTM" else alone, layer(x)[0][0, 0], rtol=0, atol=1e-13)
    torchs = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell}[cell](IN, SIZE)
    assert {n: p.shape for n, p in torchs.named_parameters()}.items() <= {
        n: p.shape for n, p in own.named_parameters()
    }.items()


# --- the interface ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "batch_first"), list(itertools.product(FORMS, (False, True))))
def test_arguments_parameters_and_results_have_torchs_names_and_shapes(form: str, batch_first: bool) -> None:
    kind, options = FORMS[form]
    plain = {name: value for name, value in options.items() if name not in ("cell_norm", "eps")}
    ours, torchs = (
        KINDS[kind][0](IN, SIZE, batch_first=batch_first, **options),
        KINDS[kind][1](IN, SIZE, batch_first=batch_first, **plain),
    )
    shapes = {name: value.shape for name, value in ours.named_parameters()}
    assert {name: value.shape for name, value in torchs.named_parameters()}.items() <= shapes.items()
    assert all(name.startswith("ln") for name in shapes.keys() - dict(torchs.named_parameters()).keys())
    missing = ours.load_state_dict(torchs.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert ours.all_weights[0][0] is ours.weight_ih_l0  # type: ignore[union-attr]
    for shape in ((BATCH, STEPS, IN), (STEPS, IN), (1, 1, IN)):
        found, other = ours(torch.randn(shape)), torchs(torch.randn(shape))
        leaves = [torch.utils._pytree.tree_leaves(one) for one in (found, other)]
        assert [a.shape for a in leaves[0]] == [b.shape for b in leaves[1]]
        assert isinstance(found[1], tuple) == isinstance(other[1], tuple)


@pytest.mark.parametrize("form", FORMS)
def test_axes_may_be_in_any_order_and_a_sample_alone(form: str) -> None:
    layer, first = made(form), made(form, batch_first=True)
    first.load_state_dict(layer.state_dict())
    x, state = torch.randn(STEPS, BATCH, IN, dtype=torch.float64), first_state(layer)
    y, last = layer(x, state)
    y_first, last_first = first(x.transpose(0, 1), state)
    torch.testing.assert_close(y_first.transpose(0, 1), y, rtol=0, atol=0)
    own = tuple(s[:, 1] for s in state) if isinstance(state, tuple) else state[:, 1]
    alone, last_alone = layer(x[:, 1], own)
    torch.testing.assert_close(alone, y[:, 1], rtol=0, atol=1e-12)
    h, h_alone = (value[0] if isinstance(value, tuple) else value for value in (last, last_alone))
    torch.testing.assert_close(h_alone, h[:, 1], rtol=0, atol=1e-12)
    assert torch.equal(h, last_first[0] if isinstance(last_first, tuple) else last_first)


@pytest.mark.parametrize(("form", "given", "in_order"), list(itertools.product(FORMS, (False, True), (False, True))))
def test_a_packed_sequence_is_each_sequence_by_itself(form: str, given: bool, in_order: bool) -> None:
    layer = made(form)
    lengths = [6, 4, 1, 4] if in_order else [4, 1, 6, 4]
    if in_order:
        lengths.sort(reverse=True)
    x = torch.randn(6, 4, IN, dtype=torch.float64)
    state = first_state(layer, 4) if given else None
    packed, last = layer(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=in_order), state)
    assert isinstance(packed, PackedSequence)
    padded, found = pad_packed_sequence(packed)
    assert found.tolist() == lengths
    for n, length in enumerate(lengths):
        own = state
        if state is not None:
            own = tuple(s[:, n : n + 1] for s in state) if isinstance(state, tuple) else state[:, n : n + 1]
        y, end = layer(x[:length, n : n + 1], own)
        torch.testing.assert_close(padded[:length, n : n + 1], y, rtol=0, atol=1e-12)
        pairs = zip(last, end, strict=True) if isinstance(last, tuple) else [(last, end)]
        for a, b in pairs:
            torch.testing.assert_close(a[:, n : n + 1], b, rtol=0, atol=1e-12)


def test_dropout_is_between_layers_and_in_training_alone() -> None:
    layer = LayerNormGRU(IN, SIZE, num_layers=2, dropout=0.5)
    first, second = LayerNormGRU(IN, SIZE), LayerNormGRU(SIZE, SIZE)
    for k, one in enumerate((first, second)):
        one.load_state_dict({n.replace(f"l{k}", "l0"): v for n, v in layer.state_dict().items() if f"_l{k}" in n})
    x = torch.randn(STEPS, BATCH, IN)
    torch.manual_seed(1)
    found = layer(x)[0]
    torch.manual_seed(1)
    dropped = F.dropout(first(x)[0].flatten(0, 1), 0.5).unflatten(0, (STEPS, BATCH))
    torch.testing.assert_close(found, second(dropped)[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.eval()(x)[0], second(first(x)[0])[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_function(form: str) -> None:
    layer = made(form)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(3, 2, IN, dtype=torch.float64, requires_grad=True)
    state = first_state(layer, 2)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        y, last = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, state))
        return torch.cat([y.flatten(), *(s.flatten() for s in (last if isinstance(last, tuple) else (last,)))])

    values = [value.detach().clone().requires_grad_() for value in layer.parameters()]
    torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_it_can_be_copied_pickled_and_cast_after_a_forward_with_gradients(form: str) -> None:
    kind, options = FORMS[form]
    layer = KINDS[kind][0](IN, SIZE, **options)
    x = torch.randn(STEPS, BATCH, IN)
    layer(x)[0].sum().backward()
    y = layer(x)[0]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).double().float()):
        assert torch.equal(twin(x)[0], y)
    fresh = KINDS[kind][0](IN, SIZE, **options)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x)[0], y)
    torch.testing.assert_close(copy.deepcopy(layer).double()(x.double())[0].float(), y, rtol=0, atol=1e-4)
    assert "eps" not in repr(layer) or layer.eps


def test_its_matrices_may_be_parametrized() -> None:
    layer = LayerNormLSTM(IN, SIZE, bidirectional=True)
    x = torch.randn(STEPS, BATCH, IN)
    y = layer(x)[0]
    nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    layer(x)[0].sum().backward()
    torch.testing.assert_close(copy.deepcopy(layer)(x)[0], y, rtol=0, atol=1e-5)


def test_what_has_no_variance_has_finite_gradients() -> None:
    for kind, (ours, _) in KINDS.items():
        layer = ours(1, 1, num_layers=2)
        layer(torch.zeros(STEPS, 1, 1))[0].sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.grad is not None), kind


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    layer, x = KINDS[kind][0](IN, 16, num_layers=2), torch.randn(STEPS, BATCH, IN)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)[0]
        found.float().square().sum().backward()
    torch.testing.assert_close(found.float(), layer(x)[0], rtol=0, atol=0.05)  # bfloat16 has 8 bits
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_what_does_not_fit_is_refused() -> None:
    layer = LayerNormLSTM(IN, SIZE)
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        layer(torch.randn(2, 2, IN + 1))
    with pytest.raises(RuntimeError, match="hidden size"):
        layer(torch.randn(2, 2, IN), (torch.zeros(1, 3, SIZE), torch.zeros(1, 3, SIZE)))
    with pytest.raises(ValueError, match="without steps"):
        layer(torch.randn(0, 2, IN))
    with pytest.raises(ValueError, match="tanh' or 'relu'"):
        LayerNormRNN(IN, SIZE, nonlinearity="gelu")
    with pytest.raises(RuntimeError, match="expected a state of shape"):
        LayerNormGRUCell(IN, SIZE)(torch.randn(2, IN), torch.zeros(3, SIZE))


def test_it_learns() -> None:
    """Whether the first value of a sequence was positive, five steps later."""
    layer, head = LayerNormLSTM(2, 12), nn.Linear(12, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], 0.02)

    def drawn(batch: int) -> Tensor:
        x = torch.randn(6, batch, 2)
        x[:, :, 1] = 0
        x[0, :, 1] = 3  # marks the first step
        return x

    for _ in range(100):
        x = drawn(64)
        loss = F.binary_cross_entropy_with_logits(head(layer(x)[0][-1])[:, 0], (x[0, :, 0] > 0).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = drawn(500)
    with torch.no_grad():
        assert float(((head(layer(x)[0][-1])[:, 0] > 0) == (x[0, :, 0] > 0)).float().mean()) > 0.9


def test_a_plan_leaves_it_and_a_conversion_goes_around_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv1d(3, IN, 3), nn.BatchNorm1d(IN)
            self.rnn, self.cell = LayerNormLSTM(IN, SIZE, batch_first=True), LayerNormGRUCell(SIZE, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(self.rnn(self.bn(self.conv(x)).transpose(1, 2))[0][:, -1])

    model, x = Net().eval(), torch.randn(2, 3, 9)
    result = ns.convert(model, "wn+mobn", recurrent="wn", example_inputs=x)
    assert [(s.name, s.reason) for s in result.plan.skips if s.what == "recurrent layer"] == [
        ("rnn", "it is normalized already"),
        ("cell", "it is normalized already"),
    ]
    assert ns.verify(model, ns.fold(result.model.eval(), example_inputs=x), x).ok
