"""A trained LSTM under layer normalization: what it has learnt is kept, the closer the larger the offsets are."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from recurrent_models import Crnn, Tagger
from torch import Tensor, nn

import normswap as ns
from normswap.errors import InitializationError, InputError, PlanError
from normswap.initialization import recurrent
from normswap.initialization.null_space import offsets
from normswap.nn import BatchNormLSTM, LayerNormLSTM, LayerNormLSTMCell

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

WORDS = torch.randint(11, (64, 7))


@pytest.mark.parametrize(("rows", "columns"), [(16, 4), (16, 10), (256, 64), (32, 1)])
def test_scales_and_offsets_are_in_the_null_space(rows: int, columns: int) -> None:
    """``sᵀW = 0``, ``1ᵀo = 0``, ``oᵀDW = 0``: the mean is 0 and the variance has no mixed term, whatever x is."""
    weight = torch.randn(rows, columns, dtype=torch.float64)
    x = torch.randn(1000, columns, dtype=torch.float64)
    found = offsets(weight, x.mT @ x / len(x), 3.0, 1e-5)
    assert found is not None
    scale = (found.weight / weight)[:, 0]
    torch.testing.assert_close(found.weight, scale[:, None] * weight, rtol=1e-10, atol=1e-12)
    size = found.inner.norm()
    assert float((scale @ weight).abs().max()) < 1e-10
    assert abs(float(found.inner.sum())) < 1e-10 * float(size)
    assert float((found.inner @ found.weight).abs().max()) < 1e-9 * float(size)
    a = x @ found.weight.mT + found.inner
    assert float(a.mean(1).abs().max()) < 1e-9 * float(size)
    expected = (found.inner.square().sum() + (x @ found.weight.mT).square().sum(1)) / rows
    torch.testing.assert_close(a.var(1, correction=0), expected, rtol=1e-9, atol=0)
    ratio = size.square() / (x @ found.weight.mT).square().sum(1).mean()
    assert float(ratio) == pytest.approx(9.0, rel=1e-6)  # spread²
    moved = found.inner + 0.1 * size * torch.randn(rows, dtype=torch.float64) / rows**0.5
    assert float((moved @ found.weight).abs().max()) > 1e-6  # the negative control


def test_the_norm_comes_to_the_affine_map_as_the_offsets_grow() -> None:
    weight = torch.randn(64, 12, dtype=torch.float64)
    x = torch.randn(400, 12, dtype=torch.float64)
    expected = x @ weight.mT
    errors = []
    for spread in (1.0, 10.0, 100.0, 1000.0):
        found = offsets(weight, x.mT @ x / len(x), spread, 1e-5)
        assert found is not None
        a = nn.functional.layer_norm(x @ found.weight.mT + found.inner, (64,), found.gain, found.shift, 1e-5)
        errors.append(float((a - expected).square().mean().sqrt() / expected.std()))
    for before, after in itertools.pairwise(errors):
        assert 5 < before / after < 20, errors  # the offset itself is scaled by σ₀/σ: the error falls as 1/spread
    assert errors[-1] < 2e-3


def test_a_matrix_that_reads_too_much_has_no_null_space() -> None:
    for columns in (16, 15, 40):
        assert offsets(torch.randn(16, columns, dtype=torch.float64), torch.eye(columns).double(), 3.0, 1e-5) is None


class Sequences(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 6, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class AsksForTheClass(Sequences):
    def forward(self, x: Tensor) -> Tensor:
        y, state = self.rnn(x)
        return y + (state[1] if isinstance(self.rnn, nn.LSTM) else 0)


FORMS: dict[str, dict[str, Any]] = {
    "LSTM": {},
    "without bias, batch first": {"bias": False, "batch_first": True},
    "layers, both directions, projection": {"num_layers": 2, "bidirectional": True, "proj_size": 3, "dropout": 0.1},
}


def error(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        a, b = model.eval()(x), other.eval()(x)
    return float((a - b).square().mean().sqrt() / a.std())


@pytest.mark.parametrize("form", FORMS)
def test_the_layer_starts_as_nearly_the_lstm(form: str) -> None:
    model = Sequences(**FORMS[form]).eval()
    data = torch.randn(7, 64, 5)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    errors = []
    for spread in (1.0, 10.0, 100.0):
        result = ns.convert(model, None, recurrent={"recipe": "ln", "spread": spread}, calibration=data)
        layer = result.model.rnn
        assert type(layer) is LayerNormLSTM
        assert not layer.cell_norm
        assert [row.method for row in result.init.rows] == ["ln, on data"]
        errors.append(error(model, result.model, torch.randn(9, 32, 5)))
    assert errors[0] > 4 * errors[1] > 16 * errors[2], errors
    assert errors[2] < 0.01
    fresh = ns.swap_norms(model, None, recurrent="ln", calibration=data, init="fresh")
    assert error(model, fresh, data) > 0.3


class Stepped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for k in range(7):
            state = self.cell(x[:, k], state)
        return state[0]  # type: ignore[index]


def test_a_cell() -> None:
    model, data = Stepped(), torch.randn(64, 7, 5)
    converted = ns.swap_norms(model, None, recurrent={"recipe": "ln", "spread": 100}, calibration=data)
    assert type(converted.cell) is LayerNormLSTMCell
    assert error(model, converted, torch.randn(30, 7, 5)) < 0.01


# --- the norm of c ----------------------------------------------------------------------------------------------------


def test_gain_and_shift_of_c_are_those_of_least_squares() -> None:
    """With LN's deviation taken for constant: of ``c ≈ γ (c − mean c)/s + β``, per unit."""
    c = torch.randn(500, 6, dtype=torch.float64) * torch.rand(6) + torch.randn(6)
    sums = recurrent._Sums()
    sums.add(c)
    found = recurrent._of_cell("ln_c_l0", sums)
    centred = c - c.mean(1, keepdim=True)
    deviation = centred.square().mean().sqrt()
    for k in range(6):
        columns = torch.stack([centred[:, k] / deviation, torch.ones(500).double()], 1)
        expected = torch.linalg.lstsq(columns, c[:, k]).solution
        torch.testing.assert_close(found["ln_c_weight_l0"][k], expected[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found["ln_c_bias_l0"][k], expected[1], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found["ln_c_weight_l0"], torch.ones(6).double() * deviation, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_with_the_norm_of_c_it_starts_near_and_is_tuned_nearer(form: str) -> None:
    torch.manual_seed(3)
    model, x = Sequences(**FORMS[form]).eval(), torch.randn(9, 32, 5)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [torch.randn(7, 16, 5) for _ in range(10)]
    asked = {"recipe": "ln", "cell_norm": True}
    started, tuned = (
        ns.convert(model, None, recurrent=asked, calibration=data, init=init, tune_steps=120) for init in (None, "tune")
    )
    assert type(started.model.rnn) is LayerNormLSTM
    assert started.model.rnn.cell_norm
    assert "120 gradient steps took the held-out error from" in "".join(tuned.init.notes)
    errors = [error(model, result.model, x) for result in (started, tuned)]
    fresh = started.model
    for name, value in fresh.rnn.named_parameters():
        if name.startswith("ln_c"):
            value.data.fill_(float("weight" in name))
    assert errors[1] < 0.95 * errors[0] < 0.9 * error(model, fresh, x)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_a_cell_with_the_norm_of_c_is_tuned_by_what_the_model_gives() -> None:
    torch.manual_seed(3)
    model = Stepped().eval()
    data = [torch.randn(16, 7, 5) for _ in range(10)]
    asked = {"recipe": "ln", "cell_norm": True}
    started, tuned = (
        ns.swap_norms(model, None, recurrent=asked, calibration=data, init=init, tune_steps=120)
        for init in (None, "tune")
    )
    assert started.cell.cell_norm
    x = torch.randn(30, 7, 5)
    assert error(model, tuned, x) < 0.95 * error(model, started, x) < 0.9


def test_an_exact_recipe_leaves_nothing_to_tune() -> None:
    result = ns.convert(Tagger(), None, recurrent="wn", calibration=WORDS, init="tune")
    assert result.init.method == "absorb"


def test_it_is_stored_copied_and_folded_as_it_is(tmp_path: Path) -> None:
    model = ns.swap_norms(Tagger(bidirectional=True), None, recurrent="ln", calibration=WORDS)
    model.train()(WORDS).sum().backward()
    ns.save(model, tmp_path / "model.safetensors")
    again = ns.load(tmp_path / "model.safetensors", model=Tagger(bidirectional=True))
    assert error(model, again, WORDS) == 0
    folding = ns.fold_with_report(model.eval(), example_inputs=WORDS)
    assert type(folding.model.rnn) is LayerNormLSTM
    assert [(row.name, row.reason) for row in folding.left] == [
        ("rnn", "torch.nn has no layer-normalized recurrent layer: normswap must be there to load the model")
    ]
    assert error(model, folding.model, WORDS) == 0


def test_beside_other_norms_hooks_modes_and_frozen_values_stay() -> None:
    model, data = Crnn().eval(), torch.randn(40, 1, 8, 9)
    seen: list[str] = []
    model.rnn.register_forward_hook(lambda *_: seen.append("rnn"))
    model.rnn.requires_grad_(False)
    model.again = model.rnn
    converted = ns.swap_norms(model, "gn", recurrent="ln", calibration=data)
    assert converted.again is converted.rnn
    assert not converted.rnn.training
    assert not any(p.requires_grad for p in converted.rnn.parameters())
    seen.clear()
    converted(data)
    assert seen == ["rnn"]
    assert error(model, converted, torch.randn(20, 1, 8, 9)) < 0.5


def test_what_cannot_start_as_an_affine_map_is_refused() -> None:
    for kind in ("GRU", "RNN"):
        model = nn.Sequential(getattr(nn, kind)(5, 6))
        (skip,) = [skip for skip in ns.plan(model, None, recurrent="ln").skips if skip.what == "recurrent layer"]
        assert "none can start as an affine map" in skip.reason
    wide = nn.Sequential(nn.LSTM(30, 6))
    with pytest.raises(InitializationError, match="the weight_ih_l0 of '0' reads 30 values and gives 24"):
        ns.convert(wide, None, recurrent="ln", calibration=torch.randn(8, 64, 30))
    with pytest.raises(InputError, match=r"recurrent='ln' needs data"):
        ns.convert(Tagger(), None, recurrent="ln")
    for spread in (0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="spread of a recurrent layer must be > 0 and finite"):
            ns.plan(Tagger(), None, recurrent={"recipe": "ln", "spread": spread})
    held = Sequences()
    held.layers = [{"first": held.rnn}]
    for model, words in ((held, "layers holds it, too"), (AsksForTheClass(), "AsksForTheClass asks for its class")):
        (skip,) = [skip for skip in ns.plan(model, None, recurrent="ln").skips if skip.name == "rnn"]
        assert words in skip.reason
        assert ns.plan(model, None, recurrent="wn").recurrent  # which keeps the layer
    plan = ns.plan(nn.LSTM(5, 6), None, recurrent="ln")
    assert any("the model is the layer itself" in skip.reason for skip in plan.skips)


@pytest.mark.parametrize("to", ["wn", "ws", "ln"])
def test_in_place_and_beside_norms_that_are_fitted(to: str) -> None:
    model, data = Crnn().eval(), torch.randn(60, 1, 8, 9)
    apart = ns.swap_norms(model, "gn", recurrent=to, calibration=data)
    own = Crnn().eval()
    own.load_state_dict(model.state_dict())
    assert ns.swap_norms(own, "gn", recurrent=to, calibration=data, inplace=True) is own
    assert error(apart, own, data) == 0
    assert error(model, own, torch.randn(20, 1, 8, 9)) < 0.2


# ------------------------------------------------------------------------------- what another layer in its place keeps


def added_to(layer: nn.Module) -> nn.Module:
    """A layer with what a user may add to it, and no code of the user's."""
    layer.note, layer.inner = {"k": 1}, nn.Linear(2, 3)
    layer.register_buffer("table", torch.arange(3.0), persistent=False)
    layer.more = nn.Parameter(torch.ones(2))
    layer.register_full_backward_hook(lambda *_: None)
    layer.register_state_dict_post_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize("recurrent", ["ln", "bn"])
def test_what_was_added_to_a_layer_goes_along(recurrent: str) -> None:
    model = Tagger()
    added_to(model.rnn)
    model.eval()
    converted = ns.swap_norms(model, None, recurrent=recurrent, calibration=WORDS)
    assert set(model.rnn.state_dict()) - set(converted.rnn.state_dict()) == set()
    for rnn in (converted.rnn, ns.fold(converted).rnn):
        assert rnn.note == {"k": 1}
        assert torch.equal(rnn.inner.weight, model.rnn.inner.weight)
        assert torch.equal(rnn.table, model.rnn.table)
        assert "table" not in rnn.state_dict()
        assert torch.equal(rnn.more, model.rnn.more)
        assert len(rnn._backward_hooks) == len(rnn._state_dict_hooks) == 1
        assert rnn._is_full_backward_hook
    plain = ns.swap_norms(Tagger().eval(), None, recurrent=recurrent, calibration=WORDS).rnn  # negative control
    assert not {"note", "inner", "table", "more"} & {*vars(plain), *plain._parameters, *plain._modules, *plain._buffers}


@pytest.mark.parametrize("recurrent", ["ln", "bn"])
def test_a_layer_with_code_of_its_own_stays(recurrent: str) -> None:
    model = Tagger()
    ours = ns.plan(model, None, recurrent=recurrent)
    assert ours.recurrent  # negative control
    model.rnn.scale = torch.nn.functional.relu
    (skip,) = [skip for skip in ns.plan(model, None, recurrent=recurrent).skips if skip.name == "rnn"]
    assert skip.reason == "its scale was set on it alone, and may be code that is for a LSTM"
    assert ns.plan(model, None, recurrent="wn").recurrent  # which keeps the layer
    for add, words in (
        (lambda rnn: None, "its scale was set on it alone"),
        (lambda rnn: (vars(rnn).pop("scale"), setattr(rnn, "eps", 3)), "its eps has the name of something else"),
    ):
        add(model.rnn)
        with pytest.raises(PlanError, match=words):
            ns.convert(model, None, plan=ours, calibration=WORDS)


def test_a_batch_normalized_layer_with_a_forward_of_its_own_stays_when_it_is_folded() -> None:
    converted = ns.swap_norms(Tagger().eval(), None, recurrent="bn", calibration=WORDS)
    assert type(ns.fold(converted).rnn) is nn.LSTM  # negative control
    own = type("Own", (BatchNormLSTM,), {"forward": lambda self, x: BatchNormLSTM.forward(self, 2 * x)})
    converted.rnn.__class__ = own
    folding = ns.fold_with_report(converted)
    assert type(folding.model.rnn) is own
    assert [row.reason.split(":")[0] for row in folding.left] == ["Own has a forward of its own"]
    converted.rnn.__class__ = BatchNormLSTM
    converted.rnn.forward = lambda x: own.forward(converted.rnn, x)
    folding = ns.fold_with_report(converted)
    assert [row.reason.split(":")[0] for row in folding.left] == ["its forward was replaced on the instance"]


FLAGS = {
    "weight_ih_l0": {"ln_ih_weight_l0", "ln_ih_bias_l0", "bn_ih_weight_l0"},
    "weight_hh_l0": {"ln_hh_weight_l0", "ln_hh_bias_l0", "bn_hh_weight_l0"},
    "bias_ih_l0": set(),
}


@pytest.mark.parametrize("recurrent", ["ln", "bn"])
@pytest.mark.parametrize("frozen", FLAGS)
def test_what_was_frozen_stays_so_and_no_random_number_is_drawn(recurrent: str, frozen: str) -> None:
    model = Tagger().eval()
    model.rnn.get_parameter(frozen).requires_grad_(False)
    before = torch.get_rng_state()
    converted = ns.swap_norms(model, None, recurrent=recurrent, calibration=WORDS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), before)  # negative control
    own = {name for name, p in converted.rnn.named_parameters() if not p.requires_grad}
    assert own == {frozen} | {name for name in FLAGS[frozen] if name.startswith(recurrent)}
    if recurrent == "bn":
        folded = ns.fold(converted).rnn
        assert {name for name, p in folded.named_parameters() if not p.requires_grad} == {frozen}
