"""What reports and errors say, word for word: each cause by its own name, and a remedy that helps."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn
from typer.testing import CliRunner

import normswap as ns
from normswap.cli import app
from normswap.errors import ExportError, InputError, NormswapError, VerificationError
from normswap.loading import load_model
from normswap.loading.trust import Trust
from normswap.records import Agreement
from normswap.runs import inputs
from normswap.runs.cell_calls import refuse_misfitting_cells


def conv_net() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    zoo.randomize_(model, 0)
    return model.eval()


# ---------------------------------------------------------------------------------------------- why a norm is left


class Between(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).relu())


class Hooked(Between):
    def __init__(self) -> None:
        super().__init__()
        self.bn.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Read(Between):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn.running_mean.mean()


class Called(Between):
    def forward(self, x: Tensor) -> Tensor:
        n = self.bn
        return F.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight, n.bias)


class Unused(Between):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Tied(Between):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 4, 3)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.other(x)


class Branching(Between):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x if x.sum() > 0 else -x))


class Reader(Between):
    def __init__(self) -> None:
        super().__init__()
        self.after = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.bn(self.conv(x).relu()))


LEFT = {
    Between: "its input comes from relu",
    Hooked: "a forward hook is on it",
    Read: "the model reads its parameters or statistics outside of its call",
    Called: "a forward calls batch_norm with its tensors",
    Unused: "no traced forward calls it",
    Tied: "the weight of conv is tied to other.weight",
    Branching: "the model could not be traced: give example_inputs=",
    Reader: "its input comes from relu; after, which reads it, cannot take it up: "
    "its zero padding stands for values behind the norm",
}


@pytest.mark.parametrize("kind", LEFT, ids=lambda kind: kind.__name__)
def test_a_norm_that_folding_leaves_is_left_for_a_reason_of_its_own(kind: type[nn.Module]) -> None:
    model = kind().eval()
    zoo.randomize_(model, 0)
    folding = ns.fold_with_report(model)
    assert isinstance(folding.model.bn, nn.BatchNorm2d)
    assert [(row.name, row.reason) for row in folding.left] == [("bn", f"no layer takes it up: {LEFT[kind]}")]


def test_a_run_on_inputs_may_show_what_no_trace_does() -> None:
    model = Branching().eval()
    zoo.randomize_(model, 0)
    folding = ns.fold_with_report(model, example_inputs=torch.randn(2, 3, 8, 8))
    assert not folding.left


# ----------------------------------------------------------------------------------------------------- what fails


@pytest.mark.parametrize("verb", [ns.convert, ns.fold])
@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("running_mean", float("nan"), "error[weights-not-finite]: '1.running_mean' holds NaN or infinite values"),
        ("running_var", float("inf"), "error[weights-not-finite]: '1.running_var' holds NaN or infinite values"),
        ("weight", float("nan"), "error[weights-not-finite]: '1.weight' holds NaN or infinite values"),
        ("running_var", -1.0, "error[negative-variance]: '1.running_var' holds negative values, which no variance has"),
    ],
)
def test_values_that_are_none_are_named_by_every_verb(verb: object, name: str, value: float, text: str) -> None:
    model = conv_net()
    getattr(model[1], name).data[0] = value
    with pytest.raises(InputError) as error:
        verb(model)  # type: ignore[operator]
    assert str(error.value).splitlines()[0] == text


class Stubborn(nn.Module):
    """Runs as it is, and not where a norm of its is another module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(8, 8), nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if self.extra():
            raise RuntimeError("Given groups=8")
        return y

    def extra(self) -> bool:
        return "BatchNorm2d" not in str(self)


@pytest.mark.parametrize(
    "verb", [lambda m, x: ns.fold(m, example_inputs=x), lambda m, x: ns.convert(m, "none", example_inputs=x)]
)
def test_no_verb_lets_an_exception_of_torch_through_its_own_check(verb: object) -> None:
    model = Stubborn().eval()
    zoo.randomize_(model, 0)
    with pytest.raises(VerificationError) as error:
        verb(model, torch.randn(2, 3, 8, 8))  # type: ignore[operator]
    assert error.value.message == ("the original runs and the model made of it does not: RuntimeError: Given groups=8")
    model.extra = lambda: False  # type: ignore[method-assign]
    verb(model, torch.randn(2, 3, 8, 8))  # type: ignore[operator]  # negative control


VERBS = {
    "plan": lambda m, x, _: ns.plan(m, "none", example_inputs=x),
    "convert": lambda m, x, _: ns.convert(m, "none", example_inputs=x),
    "convert on data": lambda m, x, _: ns.convert(m, "gn", calibration=x),
    "rank": lambda m, x, _: ns.rank_sites(m, "gn", calibration=x),
    "choose": lambda m, x, _: ns.choose_recipes(m, calibration=x, recipes=["gn"]),
    "initialize": lambda m, x, _: ns.initialize(ns.swap_norms(m, "wn+mobn"), x),
    "fold": lambda m, x, _: ns.fold(m, example_inputs=x),
    "fold of a converted one": lambda m, x, _: ns.fold(ns.swap_norms(m, "gn").eval(), example_inputs=x),
    "verify": lambda m, x, _: ns.verify(m, m, x),
    "export": lambda m, x, path: ns.export_onnx(ns.fold(m), path / "a.onnx", example_inputs=x),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("x", [torch.randn(2, 5), torch.zeros(2, 3, 8, 8).long(), (), {"y": torch.randn(2, 3, 8, 8)}])
def test_inputs_that_a_model_does_not_take_are_an_error_of_the_package(verb: str, x: object, tmp_path: Path) -> None:
    with pytest.raises(NormswapError):
        VERBS[verb](conv_net(), x, tmp_path)


# -------------------------------------------------------------------------------------------- what fold leaves over


class Tanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.tanh(self.a(x)))


@pytest.mark.parametrize("recipe", ["mobn", "none"])
def test_an_export_names_what_folds_an_affine_that_was_left(recipe: str, tmp_path: Path) -> None:
    converted, x = ns.swap_norms(Tanh().eval(), recipe).eval(), torch.randn(2, 8)
    folding = ns.fold_with_report(converted)
    assert [(row.name, row.reason) for row in folding.left] == [
        ("bn", "its input's number of axes is unknown: give example_inputs=")
    ]
    with pytest.raises(ExportError) as error:
        ns.export_onnx(folding.model, tmp_path / "a.onnx", example_inputs=x)
    assert str(error.value) == (
        "error[export-unfolded]: 'bn' is not folded: it is a ChannelAffine\n"
        "  hint: fold it first: normswap.fold(model), with example_inputs="
    )
    ns.export_onnx(ns.fold(folding.model, example_inputs=x), tmp_path / "a.onnx", example_inputs=x)


class Projected(nn.Module):
    def __init__(self, proj_size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, proj_size=proj_size, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class OwnLSTM(nn.LSTM):
    pass


def test_an_lstm_with_a_projection_of_a_class_of_its_own_has_no_onnx_form(tmp_path: Path) -> None:
    model = Projected(4).eval()
    model.lstm = OwnLSTM(8, 16, proj_size=4, batch_first=True)
    with pytest.raises(ExportError) as error:
        ns.export_onnx(model.eval(), tmp_path / "a.onnx", example_inputs=torch.randn(2, 5, 8))
    assert str(error.value) == (
        "error[export-projection]: 'lstm' is an OwnLSTM with proj_size=4, and the LSTM of ONNX has no projection\n"
        "  hint: deploy it as a program (torch.export, `normswap fold -o MODEL.pt2`), or train an LSTM without "
        "proj_size with a Linear behind it"
    )
    ns.export_onnx(Projected(0).eval(), tmp_path / "a.onnx", example_inputs=torch.randn(2, 5, 8))


# --------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize(
    ("samples", "words"),
    [(4, "output on 4 samples, the same that it was fitted to"), (20, "output on 4 held-out samples")],
)
def test_an_agreement_says_what_it_was_measured_on(samples: int, words: str) -> None:
    found = ns.convert(conv_net(), "gn", calibration=torch.randn(samples, 3, 8, 8)).init.agreement
    assert found is not None
    assert found.samples == 4
    assert str(found).startswith(f"{words}: relative error")


def test_an_agreement_in_full() -> None:
    assert str(Agreement(4, 0.0, 1.0, 1.0, held_out=False)) == (
        "output on 4 samples, the same that it was fitted to: relative error 0.000, cosine 1.0000, "
        "same class in 100.0 %"
    )


# ----------------------------------------------------------------------------------------------- the command line


def run(*arguments: str) -> tuple[str, str, int]:
    result = CliRunner().invoke(app, list(arguments))
    return result.stdout, result.stderr, result.exit_code


def test_a_note_about_a_file_is_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_of_reasons.py").write_text("from torch import nn\ndef net():\n    return nn.Linear(8, 3)\n")
    state = nn.Linear(8, 3).state_dict()
    for name in ("a.pt", "b.pt"):
        torch.save({"model": state, "ema": state}, tmp_path / name)
    for pair in (("a.pt", "b.pt"), ("a.pt", "a.pt")):
        _, notes, code = run("verify", *pair, "--arch", "nets_of_reasons:net", "--input-shape", "2x8")
        expected = [
            f"note: {name}: the weights are taken from 'model' (there are also 'ema'): --key ema takes the average"
            for name in dict.fromkeys(pair)
        ]
        assert (notes.splitlines(), code) == (expected, 0)


@pytest.mark.parametrize(("dtype", "noted"), [(torch.float16, True), (torch.float64, True), (torch.float32, False)])
def test_values_that_change_their_dtype_are_noted(
    dtype: torch.dtype, noted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_of_dtypes.py").write_text("from torch import nn\ndef net():\n    return nn.BatchNorm2d(8)\n")
    torch.save(nn.BatchNorm2d(8).to(dtype).state_dict(), "w.pt")
    with caplog.at_level(logging.WARNING, "normswap"):
        model = load_model("w.pt", arch="nets_of_dtypes:net")
    assert model.weight.dtype is torch.float32
    name = str(dtype).removeprefix("torch.")
    assert caplog.messages == [f"w.pt: 4 {name} tensors became float32, as nets_of_dtypes:net has them"] * noted


def test_what_a_conversion_with_fold_has_left_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.BatchNorm1d(8)).eval(), "m.pt")
    _, notes, code = run("convert", "m.pt", "--to", "none", "--fold", "-o", "f.pt")
    assert code == 0
    assert (
        "note: folding left 1 module (2): its input's number of axes is unknown: give --input-shape or --input-file"
        in notes.splitlines()
    )
    _, notes, _ = run("convert", "m.pt", "--to", "none", "--fold", "-o", "g.pt", "--input-shape", "2x8")
    assert "folding left" not in notes


# ------------------------------------------------------------------------------------------------------------ time


class Slow(nn.Module):
    """Takes as long as it is told to, as a detector does, which enlarges any image."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.conv, self.bn, self.steps, self.done = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), steps, 0

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:  # opaque: such a model is tried on inputs that are made up
            return x
        y = self.bn(self.conv(x))
        for _ in range(self.steps):
            time.sleep(0.01)
            with contextlib.suppress(Exception):
                y = y + 0
        return y


def test_no_input_is_made_up_where_a_run_takes_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inputs, "_LONGEST", 0.3)
    model = Slow(10_000).eval()
    start = time.monotonic()
    with caplog.at_level(logging.INFO, "normswap"):
        result = ns.convert(model, "gn+ws")
    assert time.monotonic() - start < 5
    assert len(result.plan.steps) == 1
    text = "no inputs were made up, as a run takes longer than 0.3 s: give example_inputs="
    assert set(caplog.messages) == {text}
    caplog.clear()
    assert inputs.make_up_inputs(Slow(1).eval()) is not None  # negative control
    assert not caplog.messages


def test_the_command_line_says_which_flag_gives_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_LONGEST", 0.3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    torch.save(Slow(10_000).eval(), "slow.pt")
    _, notes, code = run("convert", "slow.pt", "--to", "wn+mobn", "--trust", "test_reasons", "-o", "a.safetensors")
    assert code == 0
    said = "note: no inputs were made up, as a run takes longer than 0.3 s: give --input-shape or --input-file"
    assert notes.splitlines().count(said) == 1


# ----------------------------------------------------------------------------------------------- cells without a batch


class Steps(nn.Module):
    """A loop over time that makes its state from the batch's size, as everyone writes it."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], 3)
        for one in x:
            new = self.cell(one, (h, h) if isinstance(self.cell, nn.LSTMCell) else h)
            h = new[0] if isinstance(new, tuple) else new
        return self.head(h)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_no_size_is_tried_on_which_a_recurrent_cell_ends_the_process(kind: type[nn.RNNCellBase]) -> None:
    model = Steps(kind(3, 3)).eval()
    made_up = inputs.make_up_inputs(model)
    assert made_up is not None
    assert made_up[0].ndim == 3  # (2, 3), which is tried first, gives x[t] no batch axis
    check = ns.fold_with_report(model).check
    assert check is not None
    assert check.ok


@pytest.mark.parametrize(
    "call",
    [
        lambda x, h: torch.ops.aten.lstm_cell.default(x, (h, h), torch.ones(12, 3), torch.ones(12, 3)),
        lambda x, h: torch.lstm_cell(input=x, hx=(h, h), w_ih=torch.ones(12, 3), w_hh=torch.ones(12, 3)),
        lambda x, h: torch.gru_cell(x, h, torch.ones(9, 3), torch.ones(9, 3)),
    ],
)
def test_a_cell_is_refused_a_state_with_an_axis_too_many_and_no_other(call: Callable[[Tensor, Tensor], object]) -> None:
    with refuse_misfitting_cells():
        call(torch.ones(2, 3), torch.ones(2, 3))  # negative control
        with pytest.raises(ValueError, match=r"a recurrent cell takes \(N, features\) and got \("):
            call(torch.ones(1, 3), torch.ones(1, 3, 3))


class Unbatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(3, 3)
        return self.cell(x[0], (h, h))[0]


def test_no_inputs_are_made_up_for_an_lstm_cell_in_torchscript() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and yet in use
        cell, other = torch.jit.script(Unbatched()), torch.jit.script(nn.Linear(3, 3))
    assert inputs.make_up_inputs(nn.Sequential(nn.Linear(3, 3), cell).eval()) is None
    assert inputs.make_up_inputs(nn.Sequential(nn.Linear(3, 3), other).eval()) is not None  # negative control


# ------------------------------------------------------------------------------------------------- no module at all

PICTURES = torch.randn(4, 3, 8, 8)
OF_A_MODEL: dict[str, Callable[[Any], object]] = {
    "plan": ns.plan,
    "convert": ns.convert,
    "swap_norms": ns.swap_norms,
    "rank_sites": lambda model: ns.rank_sites(model, calibration=PICTURES),
    "choose_recipes": lambda model: ns.choose_recipes(model, calibration=PICTURES),
    "fold": ns.fold,
    "save": lambda model: ns.save(model, "model.safetensors"),
    "initialize": lambda model: ns.initialize(model, PICTURES),
    "synthesize_samples": lambda model: ns.synthesize_samples(model, PICTURES, count=2, steps=1),
}
NO_MODULES: dict[str, tuple[Callable[[], object], str, str]] = {
    "nothing": (lambda: None, "the model is None, and no torch.nn.Module", "give a torch.nn.Module"),
    "a number": (lambda: 5, "the model is of type int, and no", "give a torch.nn.Module"),
    "a class": (lambda: Between, "the model is the class Between, and no", "give an instance of it: Between(...)"),
    "a state dict": (lambda: conv_net().state_dict(), "the model is of type OrderedDict", "model.load_state_dict(...)"),
    "a path": (lambda: Path("model.pt"), "Path, and no", "read the file first: normswap.load reads"),
    "a conversion": (lambda: ns.convert(conv_net(), "wn+mobn"), "of type Conversion", "give its attribute model"),
}


@pytest.mark.parametrize("verb", OF_A_MODEL)
@pytest.mark.parametrize("name", NO_MODULES)
def test_what_is_no_module_is_refused_by_what_it_is(
    verb: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, words, hint = NO_MODULES[name]
    with pytest.raises(InputError) as caught:
        OF_A_MODEL[verb](make())
    assert caught.value.code == "no-module"
    assert words in caught.value.message
    assert hint in caught.value.hint
    try:
        OF_A_MODEL[verb](conv_net())  # negative control
    except NormswapError as error:
        assert error.code == "not-converted"  # noqa: PT017


@pytest.mark.parametrize("verb", ["plan", "fold", "initialize", "synthesize_samples"])
def test_a_torchscript_model_is_refused_and_a_part_is_not(verb: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and yet in use
        scripted = torch.jit.script(conv_net())
        activation = torch.jit.script(nn.ReLU())
    with pytest.raises(InputError, match="is a TorchScript model") as caught:
        OF_A_MODEL[verb](scripted)
    assert caught.value.hint == "give the Python model that it was made from"
    model = conv_net()
    model[2] = activation
    OF_A_MODEL[verb](model.eval())  # negative control


# ----------------------------------------------------------------------------------- arguments of another type

WRONG: dict[str, tuple[Callable[[Any], object], Any, Any, str]] = {
    "a recurrent recipe in a list": (
        lambda value: ns.plan(nn.Sequential(nn.LSTM(3, 4)), None, recurrent=value),
        ["wn"],
        "wn",
        "there is no recipe ['wn'] for recurrent layers",
    ),
    "a glob that is a number": (
        lambda value: ns.plan(conv_net(), {value: "gn"}),
        5,
        "*",
        "to= has 5, which is no glob of names",
    ),
    "a plan that is its text": (
        lambda value: ns.convert(conv_net(), plan=value),
        "plan",
        ns.plan(conv_net(), "gn"),
        "plan= is of type str",
    ),
    "progress that is no function": (
        lambda value: ns.synthesize_samples(conv_net(), PICTURES, count=2, steps=1, progress=value),
        True,
        lambda *_: None,
        "progress= is of type bool",
    ),
    "a tolerance that is a text": (
        lambda value: ns.verify(conv_net(), conv_net(), PICTURES, rtol=value),
        "1e-3",
        1e-3,
        "rtol= must be a finite number ≥ 0, got '1e-3'",
    ),
    "a report of a model": (
        lambda value: ns.write_report(value, "report.html"),
        conv_net(),
        ns.convert(conv_net(), "gn"),
        "the conversion is of type Sequential",
    ),
    "trust in a number": (lambda value: Trust.parse(value), [5], ["timm"], "trust=[5] is no list of texts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_argument_of_another_type_is_refused_by_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, wrong, right, words = WRONG[name]
    with pytest.raises(InputError) as caught:
        call(wrong)
    assert words in str(caught.value)
    assert caught.value.hint
    call(right)  # negative control
