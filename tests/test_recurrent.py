"""Recurrent layers: in every plan, parametrized on request with the same function, folded back to torch's own."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recurrent_models import Crnn, Tagger
from recurrent_oracles import direction, layers, offset_standardized, standardized, weight_normalized
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import normswap as ns
from normswap.cli.spelling import spell
from normswap.errors import InputError, NothingToConvertError, PlanError
from normswap.nn.recurrent import LiveLSTM
from normswap.pipeline import convert
from normswap.recipes.recurrent import all_recurrent, make_recurrent
from normswap.recipes.recurrent.base import Start
from normswap.records import Plan

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

EXACT = [name for name, recipe in all_recurrent().items() if recipe.exact]
PARAMETRIZED = [name for name in EXACT if all_recurrent()[name].start is Start.WEIGHTS]
ROUNDING = 2e-6
"""A parametrized row is its length times a unit vector, each rounded once: a few float32 ulps, over a few steps."""

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "LSTM, batch first": ("LSTM", {"batch_first": True}),
    "LSTM, layers, both directions, projection": (
        "LSTM",
        {"num_layers": 2, "bidirectional": True, "proj_size": 3, "dropout": 0.1},
    ),
    "LSTM without bias": ("LSTM", {"bias": False}),
    "GRU, layers, both directions": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "RNN": ("RNN", {}),
    "RNN, relu, layers": ("RNN", {"nonlinearity": "relu", "num_layers": 2}),
}


class Alone(nn.Module):
    def __init__(self, form: str = "LSTM", dtype: torch.dtype | None = None) -> None:
        super().__init__()
        kind, options = FORMS[form]
        self.rnn = getattr(nn, kind)(5, 6, dtype=dtype, **options)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return self.rnn(x, state)


WORDS, SEQUENCE, IMAGES = torch.randint(11, (3, 7)), torch.randn(7, 3, 5), torch.randn(3, 1, 8, 9)


def data_for(recipe: str, *inputs: Any) -> dict[str, Any]:
    """What a conversion wants: example inputs, or data that the layers' matrices see."""
    return {"example_inputs": inputs} if recipe in PARAMETRIZED else {"calibration": [inputs]}


def moved(model: nn.Module, other: nn.Module, *inputs: Any) -> float:
    """How far two models' first outputs are apart, relative to the largest value."""
    with torch.no_grad():
        a, b = (one.eval()(*inputs) for one in (model, other))
    a, b = (value[0] if isinstance(value, tuple) else value for value in (a, b))
    return float((a - b).abs().max() / a.abs().max())


# --- every plan ------------------------------------------------------------------------------------------------------


def test_a_plan_names_each_recurrent_layer_once_and_says_what_to_give() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.LSTM(5, 4), nn.GRU(4, 4), nn.RNN(4, 4)
            self.d, self.e, self.f = nn.LSTMCell(4, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4)
            self.again = self.a

        def forward(self, x: Tensor) -> Tensor:
            y = self.c(self.b(self.a(x)[0])[0])[0][0]
            return self.f(self.e(self.d(y)[0]))

    plan = ns.plan(Net(), "ln")
    skips = [skip for skip in plan.skips if skip.what == "recurrent layer"]
    assert [(skip.name, skip.type, skip.code) for skip in skips] == [
        *(("a", "LSTM", "recurrent"), ("b", "GRU", "recurrent"), ("c", "RNN", "recurrent")),
        *(("d", "LSTMCell", "recurrent"), ("e", "GRUCell", "recurrent"), ("f", "RNNCell", "recurrent")),
    ]
    assert "recurrent='wn'" in skips[0].reason
    assert "--recurrent wn" in spell(skips[0].reason)
    assert str(plan).count("recurrent layer") >= 1
    asked = ns.plan(Net(), None, recurrent="wn")
    assert [(step.site.name, step.site.type, step.weight) for step in asked.recurrent] == [
        (name, kind, "wn")
        for name, kind in zip("abcdef", ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"), strict=True)
    ]
    assert asked.recurrent[0].site.aliases == ("again",)
    assert not any(skip.what == "recurrent layer" for skip in asked.skips)
    assert asked.summary() == "6 of 6 recurrent layers convert"


def test_without_asking_nothing_changes() -> None:
    model = ns.swap_norms(Crnn().eval(), "none", example_inputs=IMAGES)
    assert type(model.rnn) is nn.LSTM
    plan = ns.plan(Crnn(), "none", example_inputs=IMAGES)
    assert not plan.recurrent
    assert "recurrent" not in plan.summary()
    assert '"normswap_plan": 1' in plan.to_json()


def test_a_plan_is_read_back_and_replayed() -> None:
    model = Crnn().eval()
    first = ns.convert(model, "wn+mobn", recurrent="aws", example_inputs=IMAGES)
    text = first.plan.to_json()
    assert '"normswap_plan": 2' in text
    plan = Plan.from_json(text)
    assert plan == first.plan
    again = ns.convert(model, plan=plan, example_inputs=IMAGES)
    assert again.plan == plan
    assert moved(first.model, again.model, IMAGES) == 0
    with pytest.raises(InputError, match="beside a plan"):
        ns.convert(model, plan=plan, recurrent="wn")


def test_a_plan_for_other_sizes_does_not_fit() -> None:
    plan = ns.plan(Tagger(), None, recurrent="wn")
    with pytest.raises(PlanError, match=r"'rnn' is LSTM 5 → 6, 2 layers; the plan says LSTM 5 → 6"):
        ns.convert(Tagger(num_layers=2), plan=plan)


def test_names_choose_among_recurrent_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.GRU(5, 5), nn.GRU(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)[0])[0]

    for options in ({"include": ["first"]}, {"exclude": "sec*"}):
        plan = ns.plan(Net(), None, recurrent="wn", **options)
        assert [step.site.name for step in plan.recurrent] == ["first"]
        assert [skip.code for skip in plan.skips if skip.name == "second"] == ["excluded"]
    with pytest.raises(InputError, match="matches no norm and no recurrent layer"):
        ns.plan(Net(), None, recurrent="wn", include=["third"])
    with pytest.raises(InputError, match=r"recurrent='xn'.*\n.*choose from aws, bn, ln, wn, ws"):
        ns.plan(Net(), None, recurrent="xn")
    with pytest.raises(NothingToConvertError, match="recurrent='wn'"):
        ns.convert(Net(), None)


def test_every_recurrent_recipe_says_what_it_is() -> None:
    assert set(all_recurrent()) == {"aws", "bn", "ln", "wn", "ws"}
    for name, recipe in all_recurrent().items():
        assert recipe.name == name
        assert recipe.equation
        assert recipe.paper
        assert "Source:" in (recipe.__doc__ or "")
    assert make_recurrent("aws", {"eps": 1e-3}).options() == {"eps": 1e-3}  # type: ignore[union-attr]
    with pytest.raises(InputError, match="no option 'axes'"):
        make_recurrent("aws", {"axes": 1})
    with pytest.raises(InputError, match="eps must be > 0"):
        make_recurrent("aws", {"eps": 0.0})


# --- the same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "form"), list(itertools.product(PARAMETRIZED, FORMS)))
def test_the_layer_computes_what_it_did(recipe: str, form: str) -> None:
    model = Alone(form).eval()
    result = ns.convert(model, None, recurrent=recipe, example_inputs=SEQUENCE)
    converted = result.model
    assert result.exact
    assert result.check is not None
    assert result.check.ok
    assert [(row.name, row.method) for row in result.init.rows] == [("rnn", "exact")]
    assert moved(model, converted, SEQUENCE) < ROUNDING
    assert set(converted.rnn.parametrizations) == {n for n, _ in model.rnn.named_parameters() if "weight" in n}
    bent = copy.deepcopy(converted)
    with torch.no_grad():
        gain = "original0" if recipe == "wn" else "original1"  # the direction v has a length of no account
        bent.rnn.parametrizations.weight_hh_l0.get_parameter(gain).mul_(1.01)
    assert moved(model, bent, SEQUENCE) > 10 * ROUNDING


@pytest.mark.parametrize("form", ["LSTM, layers, both directions, projection", "GRU, layers, both directions", "RNN"])
def test_weight_norm_is_the_papers_per_row(form: str) -> None:
    """Changed g and v, so that a layer which forgets that they are computed cannot pass; in float64, to rounding."""
    model = ns.swap_norms(Alone(form, torch.float64), None, recurrent="wn").eval()
    parameters = {}
    with torch.no_grad():
        for name, both in model.rnn.parametrizations.items():
            for value in (both.original0, both.original1):
                value.copy_(torch.randn_like(value))
            g, v = (value.numpy() for value in (both.original0, both.original1))
            parameters[name] = weight_normalized(g, v)
    parameters |= {name: p.detach().numpy() for name, p in model.rnn.named_parameters() if name.startswith("bias")}
    kind, options = FORMS[form]
    x = SEQUENCE.double()
    state = torch.randn(2, len([n for n in parameters if n.startswith("weight_hh")]), 3, 6, dtype=torch.float64)
    h, c = state[0][..., : options.get("proj_size", 6)], state[1]
    form_of = {name: options[name] for name in ("num_layers", "bidirectional") if name in options}
    kind = "TANH" if kind == "RNN" else kind
    expected = layers(kind, parameters, x.numpy(), h.shape[-1], 6, state=(h.numpy(), c.numpy()), **form_of)
    found, last = model(x, (h.contiguous(), c) if kind == "LSTM" else h)
    np.testing.assert_allclose(found.detach().numpy(), expected[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose((last[0] if kind == "LSTM" else last).detach().numpy(), expected[1], atol=1e-12)
    parameters["weight_hh_l0"] = parameters["weight_hh_l0"] * 1.001
    broken = layers(kind, parameters, x.numpy(), h.shape[-1], 6, state=(h.numpy(), c.numpy()), **form_of)
    assert np.abs(broken[0] - expected[0]).max() > 1e-6


def test_the_gradient_of_a_gain_is_the_papers() -> None:
    """``∂L/∂g_j = ∂L/∂W_j · v_j/‖v_j‖`` (Salimans & Kingma 2016, eq. 3)."""
    plain = Alone(dtype=torch.float64)
    model = ns.swap_norms(plain, None, recurrent="wn")
    for one in (plain, model):
        one(SEQUENCE.double())[0].square().sum().backward()
    both = model.rnn.parametrizations.weight_hh_l0
    v = both.original1.detach()
    expected = (plain.rnn.weight_hh_l0.grad * v).sum(1) / v.norm(dim=1)
    torch.testing.assert_close(both.original0.grad.flatten(), expected, rtol=1e-10, atol=1e-12)


def test_standardized_rows_are_the_equations() -> None:
    model = ns.swap_norms(Alone(dtype=torch.float64), None, recurrent="aws")
    both = model.rnn.parametrizations.weight_ih_l0
    with torch.no_grad():
        for value in both.parameters():
            value.copy_(torch.randn_like(value))
    v, gain, offset = (p.detach().numpy() for p in both.parameters())
    found = model.rnn.weight_ih_l0.detach().numpy()
    np.testing.assert_allclose(found, offset_standardized(v, gain, offset), rtol=1e-12, atol=1e-12)
    assert np.abs(found - offset_standardized(v, gain, offset, eps=1e-4)).max() > 1e-6


@pytest.mark.parametrize("recipe", PARAMETRIZED)
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_compute_what_they_did(recipe: str, kind: str) -> None:
    class Stepped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = getattr(nn, kind)(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for x_t in x:
                state = self.cell(x_t, state)
            return state[0] if isinstance(state, tuple) else state  # type: ignore[return-value]

    model = Stepped()
    converted = ns.swap_norms(model, None, recurrent=recipe, example_inputs=SEQUENCE)
    assert moved(model, converted, SEQUENCE) < ROUNDING
    folded = ns.fold(converted.eval(), example_inputs=SEQUENCE)
    assert type(folded.cell) is getattr(nn, kind)
    assert moved(model, folded, SEQUENCE) < ROUNDING


@pytest.mark.parametrize("recipe", EXACT)
def test_packed_sequences(recipe: str) -> None:
    model = Alone("LSTM, layers, both directions, projection").eval()
    converted = ns.swap_norms(model, None, recurrent=recipe, **data_for(recipe, SEQUENCE)).eval()
    packed = pack_padded_sequence(SEQUENCE, torch.tensor([3, 7, 5]), enforce_sorted=False)
    with torch.no_grad():
        a, b = (pad_packed_sequence(one.rnn(packed)[0])[0] for one in (model, converted))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", EXACT)
def test_rows_that_are_zero_or_tiny_stay_so(recipe: str) -> None:
    model = Alone()
    with torch.no_grad():
        model.rnn.weight_hh_l0[:3] = 0
        model.rnn.weight_ih_l0[2] = 1e-30
    converted = ns.swap_norms(model, None, recurrent=recipe, **data_for(recipe, SEQUENCE))
    assert moved(model, converted, SEQUENCE) < ROUNDING
    converted.train()(SEQUENCE)[0].sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in converted.parameters() if p.grad is not None)


# --- weight standardization without an offset: not exact, and fitted to data ------------------------------------------


class Positive(nn.Module):
    """What a layer reads is positive, so that the mean of a row gives much."""

    def __init__(self, form: str) -> None:
        super().__init__()
        kind, options = FORMS[form]
        self.rnn = getattr(nn, kind)(5, 6, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.relu() + 1)[0]


SAMPLES = torch.randn(7, 64, 5)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("LSTM, batch first", "LSTM without bias")])
def test_standardized_rows_keep_most_where_data_is_given(form: str) -> None:
    model = Positive(form).eval()
    data = [SAMPLES[:, i : i + 16] for i in range(0, 64, 16)]
    result = ns.convert(model, None, recurrent="ws", calibration=data)
    assert not result.exact
    assert [row.method for row in result.init.rows] == ["ws, on data"]
    projection = {name for name, _ in model.rnn.named_parameters() if "weight_hr" in name}
    assert (
        set(result.model.rnn.parametrizations)
        == {n for n, _ in model.rnn.named_parameters() if "weight" in n} - projection
    )
    for name in result.model.rnn.parametrizations:
        rows = getattr(result.model.rnn, name).detach()
        assert float(rows.sum(1).abs().max()) < 1e-5
    naive = ns.swap_norms(model, None, recurrent="ws", calibration=data, init="fresh").eval()
    fresh = torch.randn(7, 100, 5)
    assert error(model, result.model.eval(), fresh) < 0.35 * error(model, naive, fresh)
    folded = ns.fold(result.model, example_inputs=fresh)
    assert type(folded.rnn) is type(model.rnn)
    assert moved(result.model, folded, fresh) < ROUNDING


def error(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        a, b = model(x), other(x)
    return float((a - b).square().mean() / a.var())


@pytest.mark.parametrize(("kind", "end"), list(itertools.product(["LSTM", "GRU", "RNN"], ["l0", "l0_reverse"])))
def test_what_a_row_gives_in_the_mean_stays(kind: str, end: str) -> None:
    """``mean(W₀ x + b₀) = mean(W x + b)`` for both matrices, over the inputs and the states before each step."""
    model = getattr(nn, kind)(5, 6, bidirectional=True, dtype=torch.float64)
    p = {name: value.detach().numpy() for name, value in model.named_parameters()}
    x = (SAMPLES.double().relu() + 1).numpy()
    zeros = np.zeros((64, 6))
    y = direction({"RNN": "TANH"}.get(kind, kind), p, end, x, zeros, zeros)[0]
    y = y[::-1] if end.endswith("_reverse") else y
    seen = {"ih": x.reshape(-1, 5), "hh": np.concatenate([zeros[None], y[:-1]]).reshape(-1, 6)}
    converted = ns.swap_norms(
        model, None, recurrent="ws", calibration=torch.from_numpy(x), example_inputs=torch.from_numpy(x)
    )
    for part, inputs in seen.items():
        old, new = p[f"weight_{part}_{end}"], getattr(converted, f"weight_{part}_{end}").detach().numpy()
        bias = getattr(converted, f"bias_{part}_{end}").detach().numpy()
        expected = (inputs @ old.T).mean(0) + p[f"bias_{part}_{end}"]
        np.testing.assert_allclose((inputs @ new.T).mean(0) + bias, expected, rtol=0, atol=1e-10)
        assert np.abs((inputs @ new.T).mean(0) - expected).max() > 1e-3
        np.testing.assert_allclose(new.sum(1), 0, atol=1e-10)
        both = converted.parametrizations[f"weight_{part}_{end}"]
        v, gain = (value.detach().numpy() for value in both.parameters())
        n = v.shape[1]
        rows = standardized(v, np.ones(n), np.zeros(n)) * gain[:, None] / np.sqrt(n)
        np.testing.assert_allclose(new, rows, rtol=0, atol=1e-12)


def test_packed_sequences_and_cells_show_what_they_see() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(5, 6, num_layers=2, bidirectional=True, batch_first=True)
            self.cell = nn.LSTMCell(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            lengths = torch.tensor([7, 2, 5, 7] * 9)[: len(x)]
            packed = pack_padded_sequence(x.relu() + 1, lengths, batch_first=True, enforce_sorted=False)
            y, state = pad_packed_sequence(self.rnn(packed)[0])[0], None
            for y_t in y:
                state = self.cell(y_t + 1, state)
            return state[0]  # type: ignore[index]

    model, data = Both().eval(), SAMPLES.transpose(0, 1)
    converted = ns.swap_norms(model, None, recurrent="ws", calibration=data).eval()
    naive = ns.swap_norms(model, None, recurrent="ws", calibration=data, init="fresh").eval()
    fresh = torch.randn(32, 7, 5)
    assert error(model, converted, fresh) < 0.5 * error(model, naive, fresh)


def test_standardized_rows_need_data_and_biases() -> None:
    with pytest.raises(InputError, match=r"recurrent='ws' needs data(.|\n)*give calibration="):
        ns.convert(Alone(), None, recurrent="ws")
    plan = ns.plan(Alone("LSTM without bias"), None, recurrent="ws")
    assert [skip.reason for skip in plan.skips] == ["it has no biases, which make up for the means that the rows lose"]
    plan = ns.plan(Crnn(), "none", recurrent="ws", example_inputs=IMAGES)
    (skip,) = [skip for skip in plan.skips if skip.name == "rnn"]
    assert skip.reason == "a BatchNorm goes into its matrix, for which it gets values as it is"
    assert [step.weight for step in ns.plan(Crnn(), "gn", recurrent="ws", example_inputs=IMAGES).recurrent] == ["ws"]


ONE_VALUE: dict[str, tuple[nn.Module, str]] = {
    "a series of one variable": (nn.LSTM(1, 6), "weight_ih_l0"),
    "a state of one value": (nn.GRU(5, 1), "weight_hh_l0"),
    "a projection on one value": (nn.LSTM(5, 6, proj_size=1), "weight_hh_l0"),
    "a cell of one value": (nn.RNNCell(5, 1), "weight_hh"),
}


@pytest.mark.parametrize("recipe", ["ws", "aws"])
@pytest.mark.parametrize("name", ONE_VALUE)
def test_rows_of_one_value_are_not_standardized(recipe: str, name: str) -> None:
    layer, matrix = ONE_VALUE[name]
    plan = ns.plan(nn.Sequential(layer), None, recurrent=recipe)
    reason = f"a row of one value, as its {matrix} has, has no deviation to divide by"
    assert [skip.reason for skip in plan.skips] == [reason]
    assert ns.plan(nn.Sequential(layer), None, recurrent="wn").recurrent  # negative control: a length it has
    both = nn.Sequential(nn.LSTM(2, 3, 2, bidirectional=True, proj_size=2))
    (step,) = ns.plan(both, None, recurrent=recipe).recurrent  # negative control: rows of two values and more
    shapes = {name: both[0].get_parameter(name).shape[1] for name in step.site.matrices}
    assert {name: step.site.fan_in(name) for name in step.site.matrices} == shapes


def test_a_stored_model_with_standardized_rows_is_made_again(tmp_path: Path) -> None:
    model = trained(ns.swap_norms(Tagger(), None, recurrent="ws", calibration=torch.randint(11, (40, 7))))
    ns.save(model, tmp_path / "model.safetensors")
    assert moved(model, ns.load(tmp_path / "model.safetensors", model=Tagger()), WORDS) == 0


# --- with the rest of a network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "recurrent"),
    [("none", "wn"), ("wn", "wn"), ("wn+mobn", "wn"), (None, "wn"), ("wn+mobn", "bn"), (None, "bn")],
)
def test_a_network_with_convolutions_and_an_lstm_stays_exact(to: str | None, recurrent: str, tmp_path: Path) -> None:
    model = Crnn().eval()
    result = ns.convert(model, to, recurrent=recurrent, **data_for(recurrent, IMAGES))
    assert result.exact
    assert moved(model, result.model, IMAGES) < ROUNDING
    assert len(result.plan.steps) == (0 if to is None else 3)
    ns.save(result.model, tmp_path / "model.safetensors")
    again = ns.load(tmp_path / "model.safetensors", model=Crnn())
    assert moved(result.model, again, IMAGES) == 0
    folded = ns.fold(again.eval(), example_inputs=IMAGES)
    assert type(folded.rnn) is nn.LSTM
    assert moved(model, folded, IMAGES) < ROUNDING


def test_a_norm_in_front_of_the_layer_goes_into_the_plain_matrix_first() -> None:
    result = ns.convert(Crnn().eval(), "none", recurrent="wn", example_inputs=IMAGES)
    assert {step.site.norm: step.reader for step in result.plan.steps}["bn"] == "rnn"
    assert not list(result.model.bn.parameters())


def test_inexact_norms_are_fitted_beside_it() -> None:
    data = torch.randn(40, 1, 8, 9)
    model = Crnn().eval()
    with_layers = ns.convert(model, "gn", recurrent="wn", calibration=data)
    without = ns.convert(model, "gn", calibration=data)
    assert not with_layers.exact
    assert moved(without.model, with_layers.model, IMAGES) < 1e-4  # the fits, of float32, amplify the rounding


def test_an_initialization_says_that_it_passes_the_layer_over() -> None:
    converted = ns.swap_norms(Crnn().eval(), "wn", recurrent="wn", example_inputs=IMAGES)
    rows = {row.name: row for row in ns.initialize(converted, IMAGES).rows}
    assert rows["rnn"].method == "not initialized"
    assert rows["features.0"].method == "scale and bias"


def test_it_is_converted_in_place() -> None:
    model = Tagger()
    held = model.rnn
    assert ns.swap_norms(model, None, recurrent="wn", inplace=True) is model
    assert model.rnn is held
    assert isinstance(held, LiveLSTM)


def test_the_model_may_be_the_layer_itself() -> None:
    model = nn.GRU(5, 6, num_layers=2).eval()
    converted = ns.swap_norms(model, None, recurrent="wn", example_inputs=SEQUENCE)
    assert moved(model, converted, SEQUENCE) < ROUNDING
    folded = ns.fold(converted.eval(), example_inputs=SEQUENCE)
    assert type(folded) is nn.GRU
    assert moved(model, folded, SEQUENCE) < ROUNDING
    skips = ns.plan(model, "ln").skips
    assert [(s.name, s.code) for s in skips if s.what == "recurrent layer"] == [("", "recurrent")]


# --- a live layer is a usual module -----------------------------------------------------------------------------------


def trained(model: nn.Module, words: Tensor = WORDS) -> nn.Module:
    """The model after three steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(words).flatten(0, 1), words.flatten() % 3).backward()
        optimizer.step()
    return model


def test_it_can_be_copied_cast_and_stored_after_a_forward_with_gradients(tmp_path: Path) -> None:
    model = trained(ns.swap_norms(Tagger(bidirectional=True), None, recurrent="wn"))
    model.train()(WORDS)  # torch's own layer keeps the computed tensors of this forward, and cannot be copied
    twin = copy.deepcopy(model)
    assert moved(model, twin, WORDS) == 0
    trained(twin)
    assert moved(model, twin, WORDS) > 1e-3  # a copy of its own
    assert moved(model, copy.deepcopy(model).double(), WORDS) < ROUNDING
    fresh = ns.swap_norms(Tagger(bidirectional=True), None, recurrent="wn")
    fresh.load_state_dict(model.state_dict())
    assert moved(model, fresh, WORDS) == 0
    ns.save(model, tmp_path / "model.safetensors")
    assert moved(model, ns.load(tmp_path / "model.safetensors", model=Tagger(bidirectional=True)), WORDS) == 0


def test_torchs_own_parametrized_layer_cannot_be_copied() -> None:
    """What the live layer is for; once torch can, it is needed no more."""
    layer = nn.utils.parametrizations.weight_norm(nn.LSTM(5, 6), "weight_hh_l0")
    layer(SEQUENCE)
    layer.double()
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        copy.deepcopy(layer)


def test_it_trains_as_the_plain_layer_with_the_same_gradients_of_biases() -> None:
    model = Alone()
    converted = ns.swap_norms(model, None, recurrent="wn")
    for one in (model, converted):
        one.train()(SEQUENCE)[0].square().sum().backward()
    torch.testing.assert_close(model.rnn.bias_hh_l0.grad, converted.rnn.bias_hh_l0.grad, rtol=1e-4, atol=1e-6)


def test_functional_calls_see_the_tensors_that_they_are_given() -> None:
    model = ns.swap_norms(Alone(), None, recurrent="wn").eval()
    other = ns.swap_norms(Alone(), None, recurrent="wn").eval()
    values = {name: p.detach() for name, p in other.named_parameters()}
    with torch.no_grad():
        found = torch.func.functional_call(model, values, (SEQUENCE,))[0]
        torch.testing.assert_close(found, other(SEQUENCE)[0], rtol=0, atol=0)


def test_each_matrix_is_computed_once_per_call() -> None:
    model = ns.swap_norms(Alone(), None, recurrent="wn")
    calls: list[str] = []
    model.rnn.parametrizations.weight_hh_l0.register_forward_hook(lambda *_: calls.append("hh"))
    model(SEQUENCE)
    assert calls == ["hh"]
    assert not parametrize._cache_enabled


def test_it_folds_to_torchs_own_layer() -> None:
    for form in FORMS:
        model = Alone(form).eval()
        converted = trained_alone(ns.swap_norms(model, None, recurrent="wn"))
        folding = ns.fold_with_report(converted.eval(), example_inputs=SEQUENCE)
        folded = folding.model
        assert type(folded.rnn) is type(model.rnn)
        assert moved(converted, folded, SEQUENCE) < ROUNDING
        assert list(folded.state_dict()) == list(model.state_dict())
        assert all(a is b for a, b in zip(folded.rnn._flat_weights, folded.rnn.parameters(), strict=True))
        assert {row.result for row in folding.rows} == {"a plain weight"}
        again = pickle.loads(pickle.dumps(folded))
        assert moved(folded, again, SEQUENCE) == 0
        assert moved(folded, copy.deepcopy(folded).double().float(), SEQUENCE) == 0


def trained_alone(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(SEQUENCE)[0].square().mean().backward()
        optimizer.step()
    return model


def test_a_fold_gives_a_layer_that_torch_has_parametrized_its_own_tensors() -> None:
    model = parametrized().eval()
    with torch.no_grad():
        expected = model(SEQUENCE)[0]
        folded = ns.fold(model, example_inputs=SEQUENCE)
        torch.testing.assert_close(folded(SEQUENCE)[0], expected, rtol=1e-6, atol=1e-7)
        folded.rnn.weight_hh_l0.zero_()
        assert not torch.allclose(folded(SEQUENCE)[0], expected, atol=1e-3)  # it reads what it shows


# --- awkward models: right or refused ---------------------------------------------------------------------------------


class Shared(nn.Module):
    """One LSTM under two names, called twice, with its state passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.LSTM(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.first(x)
        return self.second(y, state)[0]


class Untraceable(nn.Module):
    """A loop whose length depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        while x.abs().sum() > 1e3 or x.shape[0] > 7:
            x = x / 2
        return self.rnn(x)[0] * (2 if bool(x.sum() > 0) else 1)


class InUntraceable(nn.Module):
    """An untraceable forward that writes a matrix: what it writes would be lost in a parametrized layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > -1e9):
            self.rnn.weight_hh_l0.data.clamp_(-0.1, 0.1)
        return self.rnn(x)[0]


class ReadByAttribute(nn.Module):
    """A penalty on a matrix, read by attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.rnn(x)[0], self.rnn.weight_hh_l0.square().sum()


class WeightDropped(nn.Module):
    """The recurrent matrix is dropped out in each call, and is no parameter (Merity et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 5)
        self.raw = nn.Parameter(self.rnn.weight_hh_l0.detach().clone())
        del self.rnn._parameters["weight_hh_l0"]
        self.rnn.weight_hh_l0 = self.raw.detach()

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.weight_hh_l0 = F.dropout(self.raw, 0.5, self.training)
        return self.rnn(x)[0]


class Tied(nn.Module):
    """Two layers with one recurrent matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.RNN(5, 5), nn.RNN(5, 5)
        self.second.weight_hh_l0 = self.first.weight_hh_l0

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[0])[0]


class TiedEmbedding(nn.Module):
    """The head is the embedding; the recurrent layer stands between and is tied to neither."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(11, 5), nn.GRU(5, 5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x))[0])


class Packs(nn.Module):
    """Packs its input within its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 4, bidirectional=True, proj_size=2, batch_first=True)

    def forward(self, x: list[Tensor]) -> Tensor:
        lengths = torch.tensor([len(one) for one in x])
        packed = pack_padded_sequence(pad_sequence(x, True), lengths, True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], True)[0]


class OwnLSTM(nn.LSTM):
    """A class of one's own."""


def clamp(module: nn.Module, args: Any) -> None:
    module.weight_hh_l0.data.clamp_(-0.1, 0.1)


class Hooked(nn.Module):
    """A pre-hook that writes a matrix before each call."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 5)
        self.rnn.register_forward_pre_hook(clamp)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def parametrized() -> nn.Module:
    model = Alone()
    nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    return model


def legacy() -> nn.Module:
    model = Alone()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.rnn, "weight_hh_l0")
    return model


def own_class() -> nn.Module:
    model = Alone()
    model.rnn = OwnLSTM(5, 6)
    return model


def replaced_forward() -> nn.Module:
    model = Alone()
    former = model.rnn.forward
    model.rnn.forward = lambda *inputs: (3 * former(*inputs)[0], None)
    return model


def functional() -> nn.Module:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            zeros = torch.zeros(1, x.shape[1], 5)
            weights = self.rnn._flat_weights
            return torch.lstm(x, (zeros, zeros), weights, True, 1, 0.0, False, False, False)[0]  # type: ignore[no-any-return]

    return Functional()


RIGHT: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "shared, called twice, state passed on": (Shared, SEQUENCE),
    "untraceable": (Untraceable, SEQUENCE),
    "tied embedding": (TiedEmbedding, WORDS),
    "packs within": (Packs, ([torch.randn(4, 5), torch.randn(6, 5)],)),
}
REFUSED: dict[str, tuple[Callable[[], nn.Module], bool, str]] = {
    "read by attribute": (ReadByAttribute, True, "reads the weight_hh_l0 of rnn outside of its call"),
    "written where no trace comes": (
        InUntraceable,
        False,
        "cannot be traced and names weight_hh_l0: give example_inputs=",
    ),
    "written, as a run shows": (InUntraceable, True, "reads the weight_hh_l0 of rnn outside of its call"),
    "weight dropped": (WeightDropped, True, "its weight_hh_l0 is no parameter: the model computes it"),
    "tied": (Tied, True, "the weight_hh_l0 of first is tied to second.weight_hh_l0"),
    "a class of its own": (own_class, True, "OwnLSTM is a class of its own"),
    "a forward of its own": (replaced_forward, True, "its forward was replaced on the instance"),
    "hooked": (Hooked, True, "a forward pre-hook is on it"),
    "parametrized": (parametrized, True, "its matrices are already parametrized"),
    "legacy weight norm": (legacy, True, "a torch.nn.utils.weight_norm hook computes its weight_hh_l0"),
    "functional": (functional, True, "outside of its call"),
}


@pytest.mark.parametrize(("recipe", "name"), list(itertools.product(EXACT, RIGHT)))
def test_an_awkward_model_converts_exactly(recipe: str, name: str) -> None:
    make, inputs = RIGHT[name]
    model = make().eval()
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    for given in (data_for(recipe, *args), {} if recipe in PARAMETRIZED else data_for(recipe, *args)):
        converted = ns.swap_norms(model, None, recurrent=recipe, **given)
        assert moved(model, converted, *args) < ROUNDING
        assert moved(model, ns.fold(converted.eval()), *args) < ROUNDING
    kept = ns.fold(converted.eval())
    assert {type(m) for m in model.modules()} - {type(m) for m in kept.modules()} <= {nn.LSTM, nn.GRU, nn.RNN}


@pytest.mark.parametrize("name", REFUSED)
def test_what_might_come_out_wrong_is_refused(name: str) -> None:
    make, with_inputs, words = REFUSED[name]
    model = make().eval()
    plan = ns.plan(model, None, recurrent="wn", example_inputs=SEQUENCE if with_inputs else None)
    reasons = {skip.name: skip.reason for skip in plan.skips if skip.what == "recurrent layer"}
    assert not plan.recurrent
    assert any(words in str(reason) for reason in reasons.values()), reasons
    with pytest.raises(NothingToConvertError) as caught:  # the plain convert: torch's layers note their tensors anew
        convert(model, None, recurrent="wn", example_inputs=SEQUENCE if with_inputs else None)
    assert "no recurrent layer by 'wn'" in str(caught.value)


def test_a_program_shows_its_recurrent_layers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own layer notes its tensors anew while it is exported
        program = torch.export.export(Tagger().eval(), (WORDS,))
    plan = ns.plan(ns.from_exported(program), "ln")
    assert [(s.name, s.code) for s in plan.skips if s.what == "recurrent layer"] == [(":lstm", "functional-recurrent")]
