"""Batch-normalized recurrent layers: the papers' equations step by step, and the interface of torch's layers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from recurrent_models import Tagger
from recurrent_oracles import Array, layers
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import normswap as ns
from normswap.errors import InputError, VerificationError
from normswap.nn import BatchNormGRU, BatchNormLSTM, BatchNormRNN

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

KINDS: dict[str, tuple[type[nn.RNNBase], type[nn.RNNBase]]] = {
    "LSTM": (BatchNormLSTM, nn.LSTM),
    "GRU": (BatchNormGRU, nn.GRU),
    "RNN": (BatchNormRNN, nn.RNN),
}
SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "LSTM without biases, inputs alone": ("LSTM", {"bias": False, "input_only": True}),
    "LSTM, layers, both directions, projection": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "GRU, layers, both directions": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "RNN, relu": ("RNN", {"nonlinearity": "relu"}),
}
STEPWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM, c normalized": ("LSTM", {"max_length": 4, "cell_norm": True}),
    "LSTM, both directions, projection": ("LSTM", {"max_length": 9, "bidirectional": True, "proj_size": 3}),
    "LSTM, layers, inputs alone": ("LSTM", {"max_length": 4, "num_layers": 2, "input_only": True}),
    "GRU, layers, both directions": ("GRU", {"max_length": 3, "num_layers": 2, "bidirectional": True}),
    "RNN": ("RNN", {"max_length": 1}),
}
FORMS = {**{f"shared: {k}": v for k, v in SHARED.items()}, **{f"per step: {k}": v for k, v in STEPWISE.items()}}
IN, SIZE, STEPS, BATCH = 5, 4, 6, 7


def made(form: str, **more: Any) -> Any:
    """A layer in float64 all of whose values are random."""
    kind, options = FORMS[form]
    layer = KINDS[kind][0](IN, SIZE, dtype=torch.float64, **options, **more)
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            value.copy_(torch.rand_like(value) + 0.5 if "_var_" in name else torch.randn_like(value))
    return layer


def inputs(steps: int = STEPS) -> Tensor:
    return torch.randn(steps, BATCH, IN, dtype=torch.float64)


def values_of(layer: Any) -> dict[str, Array]:
    return {name: value.detach().numpy().copy() for name, value in layer.state_dict().items()}


def expected(layer: Any, p: dict[str, Array], x: Tensor, *, batch: bool = False) -> tuple[Array, dict[str, list[Any]]]:
    """What the equations give, and with ``batch`` the statistics of each step's samples, which then are used.

    ``BN(a; γ) = γ (a − μ)/√(var + eps)`` per unit; the bias, which is outside of the norm in the papers too, is added.
    """
    seen: dict[str, list[Any]] = {}

    def norm(a: Array, part: str, end: str, t: int) -> Array:
        if f"bn_{part}_weight_{end}" not in p:
            return a
        mean, var = (p[f"bn_{part}_{kind}_{end}"] for kind in ("mean", "var"))
        if mean.ndim == 2:
            mean, var = (value[min(t, len(value) - 1)] for value in (mean, var))
        if batch:
            mean, var = a.mean(0), ((a - a.mean(0)) ** 2).mean(0)
            seen.setdefault(f"{part}_{end}", []).append((mean, var * len(a) / (len(a) - 1)))
        return p[f"bn_{part}_weight_{end}"] * (a - mean) / np.sqrt(var + layer.eps)

    def gates_of(end: str) -> Callable[[Array, Array], tuple[Array, Array]]:
        time = itertools.count()

        def gates(x_t: Array, h: Array) -> tuple[Array, Array]:
            t, b = next(time), [p.get(f"bias_{part}_{end}", 0.0) for part in ("ih", "hh")]
            u, w = x_t @ p[f"weight_ih_{end}"].T, h @ p[f"weight_hh_{end}"].T
            return norm(u, "ih", end, t) + b[0], norm(w, "hh", end, t) + b[1]

        return gates

    def cell_of(end: str) -> Callable[[Array], Array]:
        time = itertools.count()
        return lambda c: norm(c, "c", end, next(time)) + p[f"bn_c_bias_{end}"]

    y, *_ = layers(
        {"RNN_TANH": "TANH", "RNN_RELU": "RELU"}.get(layer.mode, layer.mode),
        p,
        x.numpy(),
        layer.proj_size or SIZE,
        SIZE,
        num_layers=layer.num_layers,
        bidirectional=layer.bidirectional,
        gates_of=gates_of,
        cell_of=cell_of if layer.cell_norm else None,
    )
    return y, seen


# --- the equations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_in_evaluation_the_stored_statistics_are_used(form: str) -> None:
    """Per step: those of the last step from there on."""
    layer, x = made(form).eval(), inputs()
    p = values_of(layer)
    with torch.no_grad():
        y = layer(x)[0].numpy()
    np.testing.assert_allclose(y, expected(layer, p, x)[0], rtol=0, atol=1e-12)
    for name in ("bn_ih_var_l0", "bn_ih_weight_l0"):
        assert np.abs(expected(layer, p | {name: p[name] * 1.01}, x)[0] - y).max() > 1e-5


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("per step")])
def test_per_step_training_takes_the_statistics_of_the_steps_samples(form: str) -> None:
    """And the running ones follow: ``0.9·old + 0.1·new`` with the unbiased variance, the last entry once per step."""
    layer, x = made(form).train(), inputs()
    before = values_of(layer)
    y = layer(x)[0].detach().numpy()
    outputs, seen = expected(layer, before, x, batch=True)
    np.testing.assert_allclose(y, outputs, rtol=0, atol=1e-10)
    assert np.abs(expected(layer, before, x)[0] - y).max() > 1e-2
    after = values_of(layer)
    for part, steps in seen.items():
        for i, kind in enumerate(("mean", "var")):
            name = f"bn_{part.replace('_', f'_{kind}_', 1)}"
            running = before[name].copy()
            for t, found in enumerate(steps):
                k = min(t, len(running) - 1)
                running[k] = 0.9 * running[k] + 0.1 * found[i]
            np.testing.assert_allclose(after[name], running, rtol=0, atol=1e-11)
            assert np.abs(after[name] - before[name]).max() > 1e-2


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("shared")])
def test_shared_over_time_training_takes_the_batchs_for_the_input_and_the_running_ones_for_the_state(form: str) -> None:
    layer, x = made(form).train(), inputs()
    p, ends = values_of(layer), [end for end in layer._ends() if end.startswith("l0")]
    for end in ends:  # of the first layer, whose inputs are known
        u = (x.numpy() @ p[f"weight_ih_{end}"].T).reshape(STEPS * BATCH, -1)
        p |= {f"bn_ih_mean_{end}": u.mean(0), f"bn_ih_var_{end}": u.var(0)}
    single = copy.deepcopy(layer)
    single.num_layers = 1
    y, (h_0, size) = single(x)[0].detach().numpy(), (0.0, layer.proj_size or SIZE)
    np.testing.assert_allclose(y, expected(single, p, x)[0], rtol=0, atol=1e-12)
    for d, end in enumerate(ends):  # what W_hh gave, over all steps and samples, and what W_ih gave
        own = y[..., d * size : (d + 1) * size]
        first = np.full((1, BATCH, size), h_0)
        states = np.concatenate([own[1:], first] if d else [first, own[:-1]]).reshape(STEPS * BATCH, -1)
        rows = STEPS * BATCH / (STEPS * BATCH - 1)
        for part, seen in (("ih", x.numpy().reshape(-1, IN)), ("hh", states)):
            if f"bn_{part}_mean_{end}" in p:
                a, old = seen @ p[f"weight_{part}_{end}"].T, values_of(layer)
                mean, var = (values_of(single)[f"bn_{part}_{kind}_{end}"] for kind in ("mean", "var"))
                np.testing.assert_allclose(
                    mean, 0.9 * old[f"bn_{part}_mean_{end}"] + 0.1 * a.mean(0), rtol=0, atol=1e-12
                )
                np.testing.assert_allclose(
                    var, 0.9 * old[f"bn_{part}_var_{end}"] + 0.1 * a.var(0) * rows, rtol=0, atol=1e-12
                )


def test_gains_start_at_a_tenth_and_biases_at_nothing() -> None:
    layer = BatchNormLSTM(IN, SIZE, max_length=3, cell_norm=True)
    gains = [p for n, p in layer.named_parameters() if "bn_" in n and "weight" in n]
    assert all(bool((p == 0.1).all()) for p in gains)
    assert not any(bool(p.any()) for n, p in layer.named_parameters() if "bias" in n)
    assert {tuple(b.shape) for b in layer.buffers()} == {(3, 16), (3, 4)}
    missing, unexpected = layer.load_state_dict(nn.LSTM(IN, SIZE).state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("bn_") for name in missing)


@pytest.mark.parametrize("form", ["shared: GRU, layers, both directions", "per step: LSTM, c normalized"])
def test_gradients(form: str) -> None:
    """In training, with the running values held (``momentum=0``), as what W_hh gives is normalized by those."""
    layer, x = made(form, momentum=0.0).train(), inputs(3)[:, :3]
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))[0]  # type: ignore[no-any-return]

    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *values), fast_mode=True)


# --- the interface ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_sequence_is_each_of_its_sequences(form: str) -> None:
    layer, x, lengths = made(form).eval(), inputs(), [3, 6, 1, 4, 4, 2, 6]
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    with torch.no_grad():
        y, last = layer(packed)
        outputs = pad_packed_sequence(y)[0]
        for n, length in enumerate(lengths):
            alone, state = layer(x[:length, n : n + 1])
            torch.testing.assert_close(outputs[:length, n : n + 1], alone, rtol=0, atol=1e-12)
            for a, b in zip(*((s if isinstance(s, tuple) else (s,)) for s in (last, state)), strict=True):
                torch.testing.assert_close(a[:, n : n + 1], b, rtol=0, atol=1e-12)
        assert not torch.allclose(outputs[0, :1], layer(x[1:4, :1])[0][0], atol=1e-6)


def test_the_statistics_of_a_packed_batch_are_those_of_the_steps_that_there_are() -> None:
    """A direction counts from where it begins, in each sequence by itself; who goes on alone has no statistics."""
    layer, x, lengths = made("per step: LSTM, both directions, projection", momentum=1.0).train(), inputs(), [6, 4, 4]
    layer(pack_padded_sequence(x[:, :3], torch.tensor(lengths)))
    before = made("per step: LSTM, both directions, projection")
    for end, turn in (("l0", False), ("l0_reverse", True)):
        weight = layer.get_parameter(f"weight_ih_{end}").detach()
        found = layer.get_buffer(f"bn_ih_mean_{end}")
        for t in range(4):
            rows = [x[length - 1 - t if turn else t, n] for n, length in enumerate(lengths)]
            torch.testing.assert_close(found[t], (torch.stack(rows) @ weight.mT).mean(0), rtol=0, atol=1e-12)
        assert not torch.allclose(found[4], (x[1 if turn else 4, 0] @ weight.mT), atol=1e-3)
    assert before.max_length == 9


@pytest.mark.parametrize("form", ["shared: LSTM", "per step: LSTM, c normalized"])
def test_other_ways_of_being_called(form: str) -> None:
    layer, x = made(form).eval(), inputs()
    y, (h, c) = layer(x)
    first = copy.deepcopy(layer)
    first.batch_first = True
    torch.testing.assert_close(first(x.transpose(0, 1))[0].transpose(0, 1), y)
    torch.testing.assert_close(layer(x[:, 0])[0], y[:, 0])
    torch.testing.assert_close(layer(x[:, 0])[1][1], c[:, 0])
    if "shared" in form:  # of statistics per step the second half has others
        half, state = layer(x[:3])
        torch.testing.assert_close(torch.cat([half, layer(x[3:], state)[0]]), y)
        torch.testing.assert_close(layer(x[3:], state)[1][0], h)
    layer.train()(x)[0].sum().backward()
    again = copy.deepcopy(layer).eval()
    torch.testing.assert_close(again(x)[0], layer.eval()(x)[0], rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        loose = layer.float()(x.float())[0]
    torch.testing.assert_close(loose.double(), again(x)[0], rtol=0, atol=0.1)


def test_what_has_no_statistics_is_refused() -> None:
    for options, words in (
        ({"cell_norm": True}, "statistics per step: give max_length"),
        ({"max_length": 0}, "at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            BatchNormLSTM(IN, SIZE, **options)
    with pytest.raises(TypeError, match="this layer has no c"):
        BatchNormGRU(IN, SIZE, cell_norm=True, max_length=2)
    with pytest.raises(ValueError, match="'tanh' or 'relu', got 'sin'"):
        BatchNormRNN(IN, SIZE, nonlinearity="sin")
    with pytest.raises(ValueError, match="more than one value per unit, and has 1"):
        BatchNormLSTM(IN, SIZE)(torch.randn(1, 1, IN))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNormLSTM(IN, SIZE, max_length=3)(torch.randn(4, 1, IN))
    with pytest.raises(InputError, match="whose statistics follow its training"):
        ns.update_statistics(nn.Sequential(BatchNormLSTM(IN, SIZE)), torch.randn(6, 4, IN))


# --- folding ----------------------------------------------------------------------------------------------------------


class Sequences(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("shared")])
def test_with_statistics_shared_over_time_it_folds_to_torchs_layer(form: str) -> None:
    model, x = Sequences(made(form)).eval(), inputs()
    calls: list[int] = []
    model.rnn.register_forward_hook(lambda *_: calls.append(1))
    folding = ns.fold_with_report(model, example_inputs=x)
    assert type(folding.model.rnn) is KINDS[FORMS[form][0]][1]
    calls.clear()
    torch.testing.assert_close(folding.model(x), model(x), rtol=0, atol=1e-12)
    assert len(calls) == 2
    assert {row.name for row in folding.rows} == {f"rnn.{name}" for name, _ in folding.model.rnn.named_parameters()}
    torch.testing.assert_close(copy.deepcopy(folding.model).train()(x), model(x), rtol=0, atol=1e-12)
    with torch.no_grad():
        folding.model.rnn.bias_ih_l0 += 1e-2
    assert not torch.allclose(folding.model(x), model(x), rtol=0, atol=1e-6)


class AsksForTheLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = BatchNormLSTM(IN, SIZE, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0] * (1.0 if self.rnn.max_length is None else 0.5)


def test_a_fold_blames_the_inputs_for_nothing_but_their_own() -> None:
    with pytest.raises(VerificationError, match="'LSTM' object has no attribute 'max_length'") as caught:
        ns.fold(AsksForTheLength().eval(), example_inputs=inputs())
    assert caught.value.hint.startswith("a forward asks a part for what its like in torch.nn does not have")
    with pytest.raises(InputError, match="the model does not run on the inputs"):  # negative control
        ns.fold(AsksForTheLength().eval(), example_inputs=inputs()[..., 1:])


def test_with_statistics_per_step_it_stays() -> None:
    model, x = Sequences(made("per step: LSTM, c normalized")).eval(), inputs()
    folded = ns.fold(model, example_inputs=x)
    assert type(folded.rnn) is BatchNormLSTM
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=0)


def test_onnx_at_two_lengths(tmp_path: Path) -> None:
    """It is one LSTM there, folded or not; of statistics per step a loop of the example's length, which is refused."""
    words = torch.randint(11, (3, 7))
    model = ns.swap_norms(Tagger(bidirectional=True).eval(), None, recurrent="bn", calibration=words)
    artifact = ns.export_onnx(model, tmp_path / "tagger.onnx", example_inputs=words, dynamic_time=True)
    assert artifact.ops["LSTM"] == 1
    session = onnxruntime.InferenceSession(tmp_path / "tagger.onnx")
    longer = torch.randint(11, (2, 12))
    np.testing.assert_allclose(
        session.run(None, {"words": longer.numpy()})[0], model(longer).detach().numpy(), rtol=0, atol=1e-5
    )
    stepwise = Tagger()
    stepwise.rnn = BatchNormLSTM(5, 6, batch_first=True, max_length=9)
    with pytest.raises(ns.NormswapError, match="cannot export Tagger"):
        ns.export_onnx(stepwise.eval(), tmp_path / "no.onnx", example_inputs=words, dynamic_time=True)
    assert not (tmp_path / "no.onnx").exists()


# --- the recipe -------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "LSTM, layers, both directions, projection": (
        "LSTM",
        {"num_layers": 2, "bidirectional": True, "proj_size": 3, "dropout": 0.1},
    ),
    "LSTM without bias, batch first": ("LSTM", {"bias": False, "batch_first": True}),
    "GRU, layers, both directions": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "RNN, relu, layers": ("RNN", {"nonlinearity": "relu", "num_layers": 2}),
}


@pytest.mark.parametrize("form", OPTIONS)
@pytest.mark.parametrize("input_only", [False, True])
def test_a_trained_layer_becomes_one_that_computes_the_same(form: str, input_only: bool, tmp_path: Path) -> None:
    """And normalizes what its matrices give on the data to mean 0 and variance 1, times √(var + eps)."""
    kind, options = OPTIONS[form]
    model = Sequences(KINDS[kind][1](IN, SIZE, dtype=torch.float64, **options)).eval()
    data, x = 2 * inputs() + 1, inputs()
    recurrent = {"recipe": "bn", "input_only": input_only}
    result = ns.convert(model, None, recurrent=recurrent, calibration=data)
    layer = result.model.rnn
    assert type(layer) is KINDS[kind][0]
    assert result.exact
    assert result.check is not None
    assert result.check.ok
    assert [row.method for row in result.init.rows] == ["exact"]
    torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=1e-12)
    assert hasattr(layer, "bn_hh_mean_l0") is not input_only
    u = data.flatten(0, 1) @ layer.weight_ih_l0.mT
    torch.testing.assert_close(layer.bn_ih_mean_l0, u.mean(0))
    torch.testing.assert_close(layer.bn_ih_var_l0, u.var(0, correction=0))
    torch.testing.assert_close(layer.bn_ih_weight_l0, (layer.bn_ih_var_l0 + 1e-5).sqrt())
    folded = ns.fold(result.model, example_inputs=x)
    assert type(folded.rnn) is KINDS[kind][1]
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-12)
    ns.save(result.model, tmp_path / "model.safetensors")
    fresh = Sequences(KINDS[kind][1](IN, SIZE, dtype=torch.float64, **options))
    again = ns.load(tmp_path / "model.safetensors", model=fresh)
    torch.testing.assert_close(again(x), result.model(x), rtol=0, atol=0)
    with torch.no_grad():
        layer.bn_ih_weight_l0[0] *= 1.001
    assert not torch.allclose(result.model(x), model(x), rtol=0, atol=1e-7)


def test_in_training_the_calibration_data_themselves_move_nothing() -> None:
    """The batch's statistics are then the stored ones; those of other data are not."""
    model = Sequences(nn.LSTM(IN, SIZE, dtype=torch.float64)).eval()
    data = inputs()
    normalized = ns.swap_norms(model, None, recurrent="bn", calibration=data).train()
    torch.testing.assert_close(copy.deepcopy(normalized)(data), model(data), rtol=0, atol=1e-9)
    assert not torch.allclose(normalized(3 * data), model(3 * data), atol=1e-2)


def test_the_recipe_wants_data_and_leaves_cells() -> None:
    with pytest.raises(InputError, match=r"recurrent='bn' needs data.*and none was given"):
        ns.convert(Tagger(), None, recurrent="bn")
    with pytest.raises(InputError, match="momentum must be from 0 to 1, got 2"):
        ns.plan(Tagger(), None, recurrent={"recipe": "bn", "momentum": 2.0})

    class Stepped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(x)

    (skip,) = [s for s in ns.plan(Stepped(), None, recurrent="bn").skips if s.what == "recurrent layer"]
    assert "there are no statistics over time" in skip.reason
