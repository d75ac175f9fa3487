"""Data-dependent initialization of recurrent layers: the pre-activations of their gates, against NumPy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from recurrent_models import Tagger
from recurrent_oracles import Array, layers, sigmoid
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import normswap as ns
from normswap.errors import InitializationError
from normswap.nn import BatchNormLSTM, LayerNormGRU

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

IN, SIZE, STEPS, BATCH = 5, 4, 12, 16
FORMS: dict[str, tuple[Callable[..., nn.RNNBase], dict[str, Any]]] = {
    "LSTM": (nn.LSTM, {}),
    "LSTM, layers, both directions, projection": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "GRU": (nn.GRU, {}),
    "GRU, layers, both directions": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "RNN": (nn.RNN, {}),
    "RNN, relu, layers": (nn.RNN, {"nonlinearity": "relu", "num_layers": 2}),
}
EACH = pytest.mark.parametrize("form", FORMS)


class Sequences(nn.Module):
    """A recurrent layer alone, called with what it is given."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.rnn(*args, **kwargs)[0]


def made(form: str, recurrent: str | None = "wn", **more: Any) -> Any:
    """A model in float64; ``recurrent`` parametrizes its matrices."""
    kind, options = FORMS[form]
    torch.manual_seed(0)
    model = Sequences(kind(IN, SIZE, dtype=torch.float64, **options, **more)).eval()
    return model if recurrent is None else ns.swap_norms(model, None, recurrent=recurrent)


def sequences() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, BATCH, IN, generator=generator, dtype=torch.float64) * torch.arange(1, IN + 1) + 2


def preactivations(layer: Any, x: Tensor) -> dict[str, Array]:
    """Each gate's pre-activation at all steps, by layer and direction; ``r (W_hn h + b_hn)`` is a new value's part."""
    names = [name for group in layer.all_weights_names for name in group] if hasattr(layer, "all_weights_names") else []
    names = names or layer._flat_weights_names
    p = {name: getattr(layer, name).detach().numpy() for name in names}
    seen: dict[str, list[Array]] = {}

    def gates_of(end: str) -> Callable[[Array, Array], tuple[Array, Array]]:
        def gates(x_t: Array, h: Array) -> tuple[Array, Array]:
            u = x_t @ p[f"weight_ih_{end}"].T + p.get(f"bias_ih_{end}", 0.0)
            w = h @ p[f"weight_hh_{end}"].T + p.get(f"bias_hh_{end}", 0.0)
            brought = w.copy()
            if layer.mode == "GRU":
                brought[:, 2 * SIZE :] *= sigmoid(u[:, :SIZE] + w[:, :SIZE])
            seen.setdefault(end, []).append(u + brought)
            return u, w

        return gates

    kind = {"RNN_TANH": "TANH", "RNN_RELU": "RELU"}.get(layer.mode, layer.mode)
    form = {"num_layers": layer.num_layers, "bidirectional": layer.bidirectional}
    layers(kind, p, x.numpy(), layer.proj_size or SIZE, SIZE, gates_of=gates_of, **form)
    return {end: np.concatenate(steps) for end, steps in seen.items()}


def worst(layer: Any, x: Tensor) -> tuple[float, float]:
    """The greatest |mean| and |deviation − 1| of any gate."""
    found = preactivations(layer, x)
    return (
        max(float(np.abs(a.mean(0)).max()) for a in found.values()),
        max(float(np.abs(a.std(0) - 1).max()) for a in found.values()),
    )


@EACH
@pytest.mark.parametrize("recurrent", ["wn", "aws", None])
def test_every_gates_preactivation_is_standardized_over_all_steps(form: str, recurrent: str | None) -> None:
    model, x = made(form, recurrent), sequences()
    before = copy.deepcopy(model)
    (row,) = ns.initialize(model, x, recurrent=True).rows
    assert (row.name, row.method) == ("rnn", "scale and bias")
    assert "the rows of W_hh keep their scale" in row.notes
    mean, deviation = worst(model.rnn, x)
    assert mean < 1e-3
    assert deviation < 1e-2
    assert min(worst(before.rnn, x)) > 0.1  # else the test shows nothing
    for name in ("weight_hh_l0", "bias_hh_l0"):
        torch.testing.assert_close(getattr(model.rnn, name), getattr(before.rnn, name), rtol=0, atol=0)
    with torch.no_grad():  # the rows keep their directions
        old, new = before.rnn.weight_ih_l0, model.rnn.weight_ih_l0
        torch.testing.assert_close(torch.cosine_similarity(new, old), torch.ones(len(old)).double())


def test_of_a_sequence_without_state_it_is_the_papers_equation() -> None:
    """Where W_hh is zero: ``g = 1/σ[t]`` and ``b = −μ[t]/σ[t]``, t = v·x/‖v‖ (Salimans & Kingma 2016, eq. 5-6)."""
    model, x = made("LSTM", None), sequences()
    with torch.no_grad():
        model.rnn.weight_hh_l0.zero_()
        model.rnn.bias_hh_l0.zero_()
    model = ns.swap_norms(model, None, recurrent="wn")
    ns.initialize(model, x, recurrent=True)
    g, v = (getattr(model.rnn.parametrizations.weight_ih_l0, f"original{i}").detach().numpy() for i in range(2))
    t = x.numpy().reshape(-1, IN) @ (v / np.linalg.norm(v, axis=1, keepdims=True)).T
    np.testing.assert_allclose(g.reshape(-1), 1 / t.std(0), rtol=1e-12)
    np.testing.assert_allclose(model.rnn.bias_ih_l0.detach(), -t.mean(0) / t.std(0), rtol=1e-11, atol=1e-12)
    assert np.abs(g.reshape(-1) - 1).max() > 0.1


def test_what_follows_sees_the_new_output() -> None:
    torch.manual_seed(0)
    model, words = Tagger(), torch.randint(11, (32, 9))
    report = ns.initialize(model, words, recurrent=True)
    assert {row.name: row.method for row in report.rows} == {"rnn": "scale and bias", "head": "scale and bias"}
    with torch.no_grad():
        out = model(words).flatten(0, 1)
    assert float(out.mean(0).abs().max()) < 1e-3
    assert float((out.std(0, correction=0) - 1).abs().max()) < 1e-2


@pytest.mark.parametrize("form", ["LSTM, layers, both directions, projection", "GRU, layers, both directions"])
def test_ways_of_being_called_give_the_same_values(form: str) -> None:
    """Batch first, packed, with a state of zeros, and unbatched; packed sequences of other lengths do not."""
    x = sequences()
    expected = made(form)
    ns.initialize(expected, x, recurrent=True)
    wanted = expected.state_dict()

    def same(model: nn.Module) -> bool:
        found = model.state_dict()
        return all(torch.allclose(found[name], value, rtol=1e-8, atol=1e-10) for name, value in wanted.items())

    first = made(form, batch_first=True)
    ns.initialize(first, x.transpose(0, 1).contiguous(), recurrent=True)
    assert same(first)
    with_state = made(form)
    rnn = with_state.rnn
    state = tuple(x.new_zeros(4, BATCH, size) for size in (rnn.proj_size or SIZE, SIZE))
    ns.initialize(with_state, {"input": x, "hx": state if rnn.mode == "LSTM" else state[0]}, recurrent=True)
    assert same(with_state)
    for lengths in ([STEPS] * BATCH, [STEPS - n // 4 for n in range(BATCH)]):
        packed = made(form)
        ns.initialize(packed, (pack_padded_sequence(x, torch.tensor(lengths)),), recurrent=True)
        assert same(packed) is (lengths[-1] == STEPS)


def test_the_statistics_are_those_of_the_steps_that_there_are() -> None:
    model, x = made("LSTM"), sequences()
    lengths = [STEPS - n // 4 for n in range(BATCH)]
    ns.initialize(model, (pack_padded_sequence(x, torch.tensor(lengths)),), recurrent=True)
    a = preactivations(model.rnn, x)["l0"].reshape(STEPS, BATCH, -1)
    there = np.concatenate([a[:length, n] for n, length in enumerate(lengths)])
    assert np.abs(there.mean(0)).max() < 1e-3
    assert np.abs(there.std(0) - 1).max() < 1e-2
    assert np.abs(a.mean((0, 1))).max() > 1e-3


def test_rows_that_cannot_be_scaled_keep_their_scale_and_are_counted() -> None:
    x = sequences()
    model = made("RNN", None)
    with torch.no_grad():
        model.rnn.weight_ih_l0[1] = 0  # gives a constant
        model.rnn.weight_hh_l0[2] = torch.tensor([2.0, 0, 0, 2])  # gives too much without any input
    (row,) = ns.initialize(model, x, recurrent=True).rows
    assert row.notes[1].startswith("2 rows of W_ih, too: ")
    a = preactivations(model.rnn, x)["l0"]
    assert np.abs(a.mean(0)).max() < 1e-3
    assert np.abs(a.std(0)[[0, 3]] - 1).max() < 1e-2
    assert np.abs(a.std(0)[[1, 2]] - 1).min() > 0.1


def test_a_layer_that_does_not_settle_is_left() -> None:
    """What W_hh brings is larger than all else, and of either sign: with each bias the state jumps."""
    model, x = made("RNN", None), sequences()
    with torch.no_grad():
        model.rnn.weight_hh_l0 *= 100
    before = copy.deepcopy(model.state_dict())
    (row,) = ns.initialize(model, x, recurrent=True).rows
    assert (row.method, row.notes) == (
        "not initialized",
        ("what layer 0 sees goes on changing with its scales",),
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_biases_it_sets_the_scale_alone() -> None:
    model, x = made("GRU", bias=False), sequences()
    (row,) = ns.initialize(model, x, recurrent=True).rows
    assert row.method == "scale"
    assert "bias-free: scale only" in row.notes
    mean, deviation = worst(model.rnn, x)
    assert deviation < 1e-2 < mean


class Stepped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(IN, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        state = self.cell(x[0])
        return self.cell(x[1], state)[0]


class Own(nn.GRU):
    pass


LEFT = {
    "cell": (Stepped, "a cell, which sees one step at a time"),
    "layer norm": (lambda: Sequences(LayerNormGRU(IN, SIZE)), "it is normalized already"),
    "batch norm": (lambda: Sequences(BatchNormLSTM(IN, SIZE)), "it is normalized already"),
    "own class": (lambda: Sequences(Own(IN, SIZE)), "Own is a class of its own"),
    "torch's weight norm": (
        lambda: Sequences(nn.utils.parametrizations.weight_norm(nn.LSTM(IN, SIZE), "weight_ih_l0")),
        "torch computes its matrices",
    ),
    "tied": (lambda: Sequences(tied()), "tied to one that is initialized already"),
    "not asked for": (lambda: Sequences(nn.LSTM(IN, SIZE)), "recurrent=True sets it"),
}


def tied() -> nn.Module:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.GRU(IN, SIZE), nn.GRU(IN, SIZE)
            self.b.weight_ih_l0 = self.a.weight_ih_l0

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.a(x)[0] + self.b(x)[0],)

    return Twice()


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_says_why(name: str) -> None:
    make, reason = LEFT[name]
    model = make()
    before = copy.deepcopy(model.state_dict())
    *_, row = ns.initialize(model, sequences().float(), recurrent=name != "not asked for").rows
    assert row.method == "not initialized"
    assert reason in row.notes[0]
    own = {key: value for key, value in model.state_dict().items() if ".a." not in key and "ih_l0" not in key}
    assert all(torch.equal(value, before[key]) for key, value in own.items())


def test_a_shared_layer_is_initialized_at_its_first_call() -> None:
    class Twice(Sequences):
        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0] + self.rnn(3 * x)[0]

    x = sequences()
    model, once = Twice(made("GRU").rnn), made("GRU")
    (row,) = ns.initialize(model, x, recurrent=True).rows
    ns.initialize(once, x, recurrent=True)
    assert row.notes[-1] == "shared: initialized at its first call"
    assert all(torch.equal(value, once.state_dict()[name]) for name, value in model.state_dict().items())


def test_what_is_not_finite_leaves_the_model_as_it_was() -> None:
    model, x = made("RNN, relu, layers", None), sequences()
    with torch.no_grad():
        model.rnn.weight_hh_l0.fill_(1e200)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InitializationError, match="what 'rnn' computes is not finite"):
        ns.initialize(model, x, recurrent=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
