"""Recurrent layers in ONNX: one operator per layer, right for any length and any batch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from recurrent_models import Crnn, Tagger
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree as pytree
from typer.testing import CliRunner

import normswap as ns
from normswap.cli import app
from normswap.deploy.onnx.program import lowered
from normswap.errors import ExportError, InputError, NormswapError, VerificationError
from normswap.nn import LayerNormGRU, LayerNormLSTM, LayerNormRNN

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

ROUNDING = 2e-6
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "LSTM without bias": ("LSTM", {"bias": False}),
    "LSTM, layers, both directions": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "LSTM, projection, layers, both directions": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "GRU": ("GRU", {}),
    "GRU, layers, both directions": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "RNN": ("RNN", {}),
    "RNN, relu, both directions": ("RNN", {"nonlinearity": "relu", "bidirectional": True}),
}


class Sequences(nn.Module):
    """A recurrent layer, and all that it returns."""

    def __init__(self, form: str, *, batch_first: bool = True) -> None:
        super().__init__()
        kind, options = FORMS[form]
        self.rnn = getattr(nn, kind)(5, 6, batch_first=batch_first, **options)

    def forward(self, x: Tensor) -> Any:
        self.rnn.flatten_parameters()
        return self.rnn(x)


class FromState(nn.Module):
    """A recurrent layer that starts from a state which is computed."""

    def __init__(self, form: str) -> None:
        super().__init__()
        kind, options = FORMS[form]
        self.rnn = getattr(nn, kind)(5, 6, batch_first=True, **options)

    def forward(self, x: Tensor) -> Any:
        rows = self.rnn.num_layers * (2 if self.rnn.bidirectional else 1)
        state = x[:, 0].sum(1).tanh()[None, :, None] * torch.linspace(-1, 1, rows)[:, None, None]
        h = state.expand(-1, -1, self.rnn.proj_size or 6)
        return self.rnn(x, (h, state.expand(-1, -1, 6) / 2) if isinstance(self.rnn, nn.LSTM) else h)


def differs(path: Path, model: nn.Module, *shape: int) -> float:
    """How far the file's outputs are from the model's, on random inputs of a shape."""
    x = torch.randn(shape)
    session = onnxruntime.InferenceSession(path)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = pytree.tree_leaves(model(x))
    assert [a.shape for a in found] == [tuple(b.shape) for b in expected]
    return max(float(np.abs(a - b.numpy()).max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_right_at_other_lengths_and_batches(form: str, tmp_path: Path) -> None:
    model, path = Sequences(form).eval(), tmp_path / "a.onnx"
    artifact = ns.export_onnx(model, path, example_inputs=torch.randn(2, 4, 5), dynamic_time=True)
    assert artifact.inputs[0].shape == ("batch", "time", 5)
    assert artifact.verification is not None
    names = {row.name for row in artifact.verification.rows}
    assert any("twice as long" in name for name in names)
    assert any("batch 3" in name for name in names)
    kind, options = FORMS[form]
    assert artifact.ops[kind] == options.get("num_layers", 1)
    assert "Loop" not in artifact.ops
    for batch, length in itertools.product((1, 2, 5), (1, 4, 9)):
        assert differs(path, model, batch, length, 5) < ROUNDING


@pytest.mark.parametrize("form", ["LSTM", "LSTM, projection, layers, both directions", "GRU, layers, both directions"])
def test_a_state_that_is_given(form: str, tmp_path: Path) -> None:
    model, path = FromState(form).eval(), tmp_path / "a.onnx"
    ns.export_onnx(model, path, example_inputs=torch.randn(2, 4, 5), dynamic_time=True)
    assert differs(path, model, 3, 7, 5) < 10 * ROUNDING  # a projection's state goes through its pseudoinverse


NORMALIZED: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "LSTM": (LayerNormLSTM, {}),
    "LSTM, c not normalized, no biases": (LayerNormLSTM, {"cell_norm": False, "bias": False, "eps": 1e-2}),
    "LSTM, projection, layers, both": (LayerNormLSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "GRU, layers, both": (LayerNormGRU, {"num_layers": 2, "bidirectional": True}),
    "RNN, both": (LayerNormRNN, {"bidirectional": True}),
    "RNN, relu": (LayerNormRNN, {"nonlinearity": "relu", "num_layers": 2}),
}


@pytest.mark.parametrize("form", NORMALIZED)
def test_a_layer_normalized_layer_is_a_scan(form: str, tmp_path: Path) -> None:
    make, options = NORMALIZED[form]
    model, path = Sequences("LSTM"), tmp_path / "a.onnx"
    model.rnn = make(5, 6, batch_first=True, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    before = {name: value.clone() for name, value in model.eval().state_dict().items()}
    artifact = ns.export_onnx(model, path, example_inputs=torch.randn(2, 4, 5), dynamic_time=True)
    directions = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    assert artifact.ops["Scan"] == directions
    for batch, length in itertools.product((1, 3), (1, 4, 11)):
        assert differs(path, model, batch, length, 5) < 1e-5
    assert type(model.rnn) is make
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_normalized_gru_from_a_state(tmp_path: Path) -> None:
    model, path = FromState("LSTM, layers, both directions").eval(), tmp_path / "a.onnx"
    model.rnn = LayerNormGRU(5, 6, num_layers=2, bidirectional=True, batch_first=True)
    ns.export_onnx(model.eval(), path, example_inputs=torch.randn(2, 4, 5), dynamic_time=True)
    assert differs(path, model, 3, 7, 5) < 1e-5


def test_time_on_axis_0(tmp_path: Path) -> None:
    model, path = Sequences("LSTM, layers, both directions", batch_first=False).eval(), tmp_path / "a.onnx"
    artifact = ns.export_onnx(model, path, example_inputs=torch.randn(1, 1, 5), dynamic_time=0)
    assert artifact.inputs[0].shape == ("time", "batch", 5)
    assert differs(path, model, 7, 3, 5) < ROUNDING


def test_time_along_the_width_of_an_image(tmp_path: Path) -> None:
    model, path = ns.fold(Crnn().eval(), example_inputs=torch.randn(2, 1, 8, 6)), tmp_path / "a.onnx"
    artifact = ns.export_onnx(model, path, example_inputs=torch.randn(2, 1, 8, 6), dynamic_time={"image": 3})
    assert artifact.inputs[0].shape == ("batch", 1, 8, "time")
    assert differs(path, model, 3, 1, 8, 14) < ROUNDING
    again = ns.export_onnx(model, tmp_path / "b.onnx", example_inputs=torch.randn(2, 1, 8, 6), dynamic_time=3)
    assert again.inputs == artifact.inputs


def test_without_asking_the_length_is_that_of_the_example(tmp_path: Path) -> None:
    artifact = ns.export_onnx(Sequences("RNN").eval(), tmp_path / "a.onnx", example_inputs=torch.randn(2, 4, 5))
    assert artifact.inputs[0].shape == ("batch", 4, 5)
    assert artifact.ops["RNN"] == 1


class Loop(nn.Module):
    """A loop over time written in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 6)
        for x_t in x.unbind(1):
            h = self.cell(x_t, h)
        return h


class Counts(nn.Module):
    """A length as a number of Python's, which torch.export takes for that of the example."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.tensor(float(x.detach().shape[1])) if not torch.compiler.is_exporting() else torch.tensor(8.0)
        return self.rnn(x)[0].sum(1) / steps


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.full((x.shape[0],), x.shape[1]), True)
        return self.rnn(packed)[0].data


@pytest.mark.parametrize(("make", "error"), [(Loop, ExportError), (Counts, VerificationError), (Packs, ExportError)])
def test_a_length_that_is_built_in_is_refused_and_no_file_is_written(
    make: type[nn.Module], error: type[Exception], tmp_path: Path
) -> None:
    """``Counts`` is right at the length that it is exported with: another length alone shows it."""
    path = tmp_path / "a.onnx"
    with pytest.raises(error):
        ns.export_onnx(make().eval(), path, example_inputs=torch.randn(2, 4, 5), dynamic_time=True)
    assert not path.exists()


@pytest.mark.parametrize("asked", [4, {"y": 1}, {"x": 3}, -1])
def test_an_axis_that_there_is_not_is_refused(asked: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not fit the inputs x") as caught:
        ns.export_onnx(
            Sequences("GRU").eval(), tmp_path / "a.onnx", example_inputs=torch.randn(2, 4, 5), dynamic_time=asked
        )
    assert caught.value.code == "export-time"


def test_the_model_keeps_its_layers(tmp_path: Path) -> None:
    model = Sequences("LSTM").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ns.export_onnx(model, tmp_path / "a.onnx", example_inputs=torch.randn(2, 4, 5))
    assert type(model.rnn) is nn.LSTM
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert lowered(nn.Linear(2, 2)).__class__ is nn.Linear  # and a model without any is not copied


def test_a_layer_that_is_parametrized_is_folded_first(tmp_path: Path) -> None:
    converted = ns.swap_norms(Sequences("LSTM").eval(), None, recurrent="wn").eval()
    with pytest.raises(NormswapError, match="parametrized"):
        ns.export_onnx(converted, tmp_path / "a.onnx", example_inputs=torch.randn(2, 4, 5))
    ns.export_onnx(ns.fold(converted), tmp_path / "a.onnx", example_inputs=torch.randn(2, 4, 5), dynamic_time=True)
    assert differs(tmp_path / "a.onnx", converted, 3, 9, 5) < ROUNDING


@pytest.mark.parametrize(
    ("model", "example", "axis", "to"),
    [
        (Tagger(bidirectional=True), torch.randint(11, (2, 5)), 1, []),
        (Crnn(), torch.randn(2, 1, 8, 6), 3, []),
        (Crnn(), torch.randn(2, 1, 8, 6), 3, ["--to", "wn+mobn"]),
    ],
    ids=["tagger", "CRNN", "CRNN, its norms too"],
)
def test_one_command_takes_a_trained_network_to_a_file(
    model: nn.Module, example: Tensor, axis: int, to: list[str], tmp_path: Path
) -> None:
    given, inputs, deployed, onnx = (tmp_path / name for name in ("model.pt", "inputs.pt", "folded.pt", "model.onnx"))
    torch.save(model.eval(), given)
    torch.save(example, inputs)
    command = [
        "convert",
        given,
        "--recurrent",
        "wn",
        *to,
        "--fold",
        "--onnx",
        onnx,
        "--dynamic-time",
        axis,
        "-o",
        deployed,
    ]
    trust = ["--trust", "recurrent_models"]
    done = CliRunner().invoke(app, list(map(str, [*command, "--input-file", inputs, *trust])))
    assert done.exit_code == 0, done.output
    assert "1 of 1 recurrent layers" in done.output
    longer = torch.cat([example, example.flip(axis)], axis)[[0, 1, 0]]
    check = ns.verify(model, onnx, longer)
    assert check.ok
    assert check.max_rel < 1e-5
    folded = torch.load(deployed, weights_only=False)
    assert type(folded.rnn) is nn.LSTM
    assert ns.verify(model, folded, longer).max_rel < 1e-5
    exported = CliRunner().invoke(
        app,
        list(
            map(
                str,
                ["export", deployed, "-o", tmp_path / "b.onnx", "--dynamic-time", axis, "--input-file", inputs, *trust],
            )
        ),
    )
    assert exported.exit_code == 0, exported.output
    assert ns.verify(model, tmp_path / "b.onnx", longer).ok


def test_what_onnxruntime_has_no_operator_for_stays_as_torch_exports_it(tmp_path: Path) -> None:
    model, x = Sequences("RNN").double().eval(), torch.randn(2, 4, 5, dtype=torch.float64)
    artifact = ns.export_onnx(model, tmp_path / "a.onnx", example_inputs=x)
    assert "RNN" not in artifact.ops
    assert artifact.verification is not None
    assert artifact.verification.ok
