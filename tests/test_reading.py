"""The checkpoints that trainers write, read through the command line: nested, wrapped, tied, averaged, ambiguous."""

from __future__ import annotations

import argparse
import collections
import copy
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typer.testing import CliRunner
from zoo import randomize_

import normswap as ns
from normswap.cli import app
from normswap.errors import InputError
from normswap.loading import load_model
from normswap.loading.entries import ENTRIES, Entry
from normswap.loading.names import WRAPPERS, match

ARCHITECTURES = """
from collections import OrderedDict
from torch import nn

def block(i, o):
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

def net(blocks=2, classes=5):
    layer1 = nn.Sequential(*(block(16, 16) for _ in range(blocks)))
    head = [("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten()), ("fc", nn.Linear(16, classes))]
    return nn.Sequential(OrderedDict([("stem", block(3, 16)), ("layer1", layer1), *head]))

def tied():
    model = nn.Sequential(OrderedDict(a=nn.Conv2d(3, 3, 3), b=nn.Conv2d(3, 3, 3), bn=nn.BatchNorm2d(3)))
    model.b.weight = model.a.weight
    return model

def vocoder(form):
    norm = nn.utils.weight_norm if form == "legacy" else nn.utils.parametrizations.weight_norm
    return nn.Sequential(OrderedDict(a=norm(nn.Conv1d(3, 4, 3)), ups=nn.ModuleList([norm(nn.Conv1d(4, 4, 3))])))
"""
ARCH = "--arch reading_nets:net"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The architectures, as a module that can be imported."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "reading_nets.py").write_text(ARCHITECTURES, encoding="utf-8")
    sys.path.insert(0, str(folder))
    import reading_nets  # type: ignore[import-not-found]

    yield reading_nets
    sys.path.remove(str(folder))
    del sys.modules["reading_nets"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nets: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def network(seed: int) -> nn.Module:
    from reading_nets import net

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomize_(net(), seed)


@cache
def trained(seed: int) -> State:
    return dict(network(seed).state_dict())


def run(command: str) -> Result:
    return CliRunner().invoke(app, command.split())


def starting(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def wrapped(state: State) -> State:
    """As FSDP and activation checkpointing name what is below the modules that they wrap."""
    inner = ("layer1.", "layer1._fsdp_wrapped_module."), ("1.0.", "1._checkpoint_wrapped_module.0.")
    found = {}
    for name, value in state.items():
        for old, new in inner:
            name = name.replace(old, new)
        found[f"_fsdp_wrapped_module.{name}"] = value
    return found


def optimizer(seed: int = 1) -> dict[str, Any]:
    model = network(seed)
    made = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3, 4, 4)).sum().backward()
    made.step()
    return made.state_dict()


W, E = 1, 2
"""The seeds of the trained weights and of an average of them; most forms below hold both."""


def lightning(state: State) -> dict[str, Any]:
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.3), "best_k_models": {}}},
        "optimizer_states": [optimizer()],
        "hyper_parameters": {"lr": 0.1},
    }


CRITERION = {"criterion.weight": torch.arange(5.0)}
HEAD = {"classifier.weight": torch.ones(3, 16), "classifier.bias": torch.ones(3)}
# What is in the file, with which flags it is read, whose weights come out, and what is said.
FORMS: dict[str, tuple[Callable[[State, State], Any], str, int, str]] = {
    "a state dict": (lambda w, e: w, "", W, ""),
    "timm": (
        lambda w, e: {"epoch": 1, "state_dict": w, "state_dict_ema": e, "optimizer": optimizer(), "metric": 1.0},
        "",
        W,
        "taken from 'state_dict' (there are also 'state_dict_ema'): --key state_dict_ema takes the average",
    ),
    "timm's average": (lambda w, e: {"state_dict": w, "state_dict_ema": e}, "--key state_dict_ema", E, ""),
    "torchvision": (
        lambda w, e: {
            "model": w,
            "optimizer": optimizer(),
            "lr_scheduler": {"step_size": 30},
            "model_ema": {"n_averaged": torch.tensor(3), **starting("module.", e)},
        },
        "",
        W,
        "taken from 'model' (there are also 'model_ema'): --key model_ema takes the average",
    ),
    "torchvision's average": (
        lambda w, e: {"model": w, "model_ema": {"n_averaged": torch.tensor(3), **starting("module.", e)}},
        "--key model_ema",
        E,
        "taken off the names: module.",
    ),
    "Lightning": (
        lambda w, e: lightning({**starting("model.", w), **CRITERION}),
        "",
        W,
        "left out, as no part of reading_nets:net: criterion.weight (5,)",
    ),
    "Lightning, and the module is the net": (
        lambda w, e: lightning({**w, **CRITERION}),
        "",
        W,
        "left out, as no part of reading_nets:net: criterion.weight (5,)",
    ),
    "Lightning, compiled, with a name of its own": (
        lambda w, e: lightning({**starting("backbone._orig_mod.", w), **CRITERION}),
        "--prefix backbone",
        W,
        "taken off the names: _orig_mod.",
    ),
    "an average beside the net": (
        lambda w, e: {**starting("net.", w), **starting("ema_net.", e)},
        "",
        W,
        "--prefix ema_net takes those",
    ),
    "the net and its teacher": (
        lambda w, e: {**w, **starting("teacher.", e)},
        "",
        W,
        "--prefix teacher takes those",
    ),
    "that average": (lambda w, e: {**starting("net.", w), **starting("ema_net.", e)}, "--prefix ema_net", E, ""),
    "BasicSR": (
        lambda w, e: {"params": w, "params_ema": e},
        "",
        W,
        "taken from 'params' (there are also 'params_ema'): --key params_ema takes the average",
    ),
    "BasicSR, the average alone": (lambda w, e: {"params_ema": w}, "", W, "taken from 'params_ema'"),
    "a generator and a discriminator": (
        lambda w, e: {"discriminator": {"conv.weight": torch.ones(2, 2)}, "generator": w, "steps": 3},
        "",
        W,
        "taken from 'generator'; 'discriminator' does not fit",
    ),
    "what fits goes before what comes first": (
        lambda w, e: {"model": {"conv.weight": torch.ones(2, 2)}, "ema": w},
        "",
        W,
        "taken from 'ema'; 'model' does not fit",
    ),
    "nested": (lambda w, e: {"model": {"state_dict": w, "step": 3}}, "", W, "taken from 'model.state_dict'"),
    "nested averages": (
        lambda w, e: {"checkpoint": {"state_dict": w, "state_dict_ema": e}},
        "",
        W,
        "--key checkpoint.state_dict_ema takes the average",
    ),
    "a pair": (lambda w, e: [3, w], "", W, "taken from '1'"),
    "numbers among the tensors": (lambda w, e: {**w, "epoch": 3, "args": {"lr": 0.1}}, "", W, ""),
    "folds": (lambda w, e: {0: {"model": w}, 1: {"model": e}}, "--key 1.model", E, ""),
    "data parallel, compiled": (lambda w, e: starting("module._orig_mod.", w), "", W, "_orig_mod., module."),
    "compiled, data parallel": (lambda w, e: {"net": starting("_orig_mod.module.", w)}, "", W, "_orig_mod., module."),
    "FSDP": (lambda w, e: wrapped(w), "", W, "_checkpoint_wrapped_module., _fsdp_wrapped_module."),
    "a student and a teacher": (
        lambda w, e: {**starting("module.student.", w), **starting("module.teacher.", e)},
        "--prefix teacher",
        E,
        "left out, as no part of reading_nets:net: module.student.stem.0.weight (16, 3, 3, 3)",
    ),
    "DINO": (
        lambda w, e: {"student": starting("module.backbone.", w), "teacher": starting("backbone.", e)},
        "--key teacher --prefix backbone",
        E,
        "",
    ),
    "MoCo": (
        lambda w, e: {"state_dict": {**starting("module.encoder_q.", w), **starting("module.encoder_k.", e)}},
        "--prefix module.encoder_q",
        W,
        "",
    ),
    "Hugging Face": (lambda w, e: {**starting("resnet.", w), **HEAD}, "--prefix resnet", W, "classifier.weight"),
    "twice the same": (lambda w, e: {"best": w, "last": dict(w)}, "", W, "taken from 'best'"),
    "a name twice with one value": (lambda w, e: {**starting("model.", w), **starting("net.", w)}, "", W, ""),
    "a history": (
        lambda w, e: {"state_dict": w, "history": collections.defaultdict(list, {"loss": [1.0, 0.5]}), "n": {}},
        "",
        W,
        "taken from 'state_dict'",
    ),
    "an averaged model's state": (lambda w, e: AveragedModel(network(W)).state_dict(), "", W, "names: module."),
    "a pickled averaged model": (lambda w, e: AveragedModel(network(W)), "", W, "the AveragedModel was taken off"),
    "models": (
        lambda w, e: {"model": network(W), "ema": AveragedModel(network(E)), "criterion": nn.CrossEntropyLoss()},
        "--key ema",
        E,
        "",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_trainers_write_is_read(form: str) -> None:
    build, flags, seed, said = FORMS[form]
    torch.save(build(trained(W), trained(E)), "checkpoint.pt")
    torch.save(network(seed), "expected.pt")
    result = run(f"verify expected.pt checkpoint.pt {ARCH} {flags} --input-shape 2x3x8x8 --rtol 0")
    assert result.exit_code == 0, result.output
    assert said in result.stderr


def test_the_comparison_tells_the_weights_from_their_average() -> None:
    torch.save({"state_dict": trained(W), "state_dict_ema": trained(E)}, "checkpoint.pt")
    torch.save(network(W), "expected.pt")
    for key, code in (("state_dict", 0), ("state_dict_ema", 1)):
        verify = f"verify expected.pt checkpoint.pt {ARCH} --key {key} --input-shape 2x3x8x8"
        assert run(verify).exit_code == code


def test_every_command_takes_key_and_prefix() -> None:
    torch.save({"a": starting("enc.", trained(W)), "b": starting("enc.", trained(E))}, "c.pt")
    how = f"c.pt {ARCH} --key b --prefix enc"
    for command in (
        f"inspect {how}",
        f"convert {how} --to wn -o wn.safetensors",
        f"fold {how} -o f.pt",
        "export f.pt -o f.onnx --input-shape 1x3x8x8",
        f"verify f.pt {how} --input-shape 2x3x8x8",
        "migrate c.pt --key a --prefix enc --like wn.safetensors -o a.safetensors",
        f"verify a.safetensors {how.replace('--key b', '--key a')} --input-shape 2x3x8x8",
    ):
        assert (result := run(command)).exit_code == 0, result.output
    assert "does not fit" in run("migrate c.pt --like wn.safetensors -o b.safetensors").stderr


@pytest.mark.parametrize("form", ["timm's average", "Lightning", "FSDP", "torchvision's average", "models", "DINO"])
def test_migrate_reads_the_same_files(form: str) -> None:
    build, flags, seed, _ = FORMS[form]
    torch.save(build(trained(W), trained(E)), "later.pt")
    ns.save(ns.swap_norms(network(0), "wn"), "wn.safetensors")
    result = run(f"migrate later.pt {flags} --like wn.safetensors -o new.safetensors")
    assert result.exit_code == 0, result.output
    x = torch.randn(2, 3, 8, 8)
    assert ns.verify(network(seed), ns.load("new.safetensors"), (x,)).ok
    assert not ns.verify(network(3 - seed), ns.load("new.safetensors"), (x,)).ok


# --- ties and weight normalization


def test_tied_weights_come_from_the_metadata_of_save_model(nets: Any) -> None:
    model = nets.tied()
    save_model(model, "tied.safetensors")
    save_model(nn.DataParallel(model), "parallel.safetensors")
    save_file({n: v.clone() for n, v in model.state_dict().items() if n != "b.weight"}, "untold.safetensors")
    assert "b.weight" not in load_file("tied.safetensors")
    torch.save(model, "expected.pt")
    for name in ("tied", "parallel", "untold"):  # the last is as Hugging Face writes it
        result = run(f"verify expected.pt {name}.safetensors --arch reading_nets:tied --input-shape 2x3x8x8 --rtol 0")
        assert result.exit_code == 0, result.output
    sys.modules["reading_nets"].untied = lambda: nn.Sequential(  # type: ignore[attr-defined]
        collections.OrderedDict(a=nn.Conv2d(3, 3, 3), b=nn.Conv2d(3, 3, 3), bn=nn.BatchNorm2d(3))
    )
    assert torch.equal(load_model("tied.safetensors", arch="reading_nets:untied").b.weight, model.a.weight)
    with pytest.raises(InputError, match=r"1 missing: b\.weight \(3, 3, 3, 3\)"):  # nothing says whose it is
        load_model("untold.safetensors", arch="reading_nets:untied")


def test_two_values_for_one_tied_tensor_are_refused(nets: Any) -> None:
    state = {**nets.tied().state_dict(), "b.weight": torch.ones(3, 3, 3, 3)}
    save_file(state, "w.safetensors")
    result = run("inspect w.safetensors --arch reading_nets:tied")
    assert "1 one tensor in reading_nets:tied and two in the file: a.weight and b.weight" in result.stderr


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("there", ["legacy", "new"])
@pytest.mark.parametrize("here", ["legacy", "new"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_weight_normalization_of_either_form_is_read_below_wrappers(
    nets: Any, here: str, there: str, prefix: str
) -> None:
    model = nets.vocoder(there)
    state = {
        name.replace("ups.", f"ups.{prefix}"): value for name, value in starting(prefix, model.state_dict()).items()
    }
    torch.save({"generator": state, "discriminator": {"weight_g": torch.ones(3)}, "optim_g": optimizer()}, "g.pt")
    result = run(f"inspect g.pt --arch reading_nets:vocoder --arch-kwargs form={here}")
    assert result.exit_code == 0, result.output
    assert ("weight normalization's names" in result.stderr) == (here != there)
    loaded = load_model("g.pt", arch="reading_nets:vocoder", arch_kwargs={"form": here})
    x = torch.randn(2, 3, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded.ups[0](loaded.a(x)), model.ups[0](model.a(x)), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_both_forms_of_weight_normalization_with_two_values_are_refused(nets: Any) -> None:
    state, old = nets.vocoder("new").state_dict(), nets.vocoder("legacy").state_dict()
    name = "a.parametrizations.weight.original0"
    expected = nets.vocoder("new").state_dict()
    assert not match({**state, "a.weight_g": state[name].clone()}, expected).problems
    found = match({**state, "a.weight_g": old["a.weight_g"]}, expected)
    assert found.clashes == {name: [name, "a.weight_g"]}


# --- refusals


def refused(command: str, code: str, *texts: str) -> None:
    result = run(command)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error[{code}]: "), result.output
    assert len(result.stderr.splitlines()) == 2, result.stderr
    for text in texts:
        assert text in result.stderr


def test_what_may_be_either_of_two_is_refused() -> None:
    w, e = trained(W), trained(E)
    for content, code, texts in (
        ({"a": w, "b": e}, "weights-ambiguous", ["weights in 'a', 'b'", "--key a or --key b"]),
        ({"x": {"model": w}, "y": {"state_dict": e}}, "weights-ambiguous", ["--key x.model or --key y.state_dict"]),
        (
            {"state_dict": {**starting("student.", w), **starting("teacher.", e)}},
            "state-dict-mismatch",
            [
                "stem.0.weight may be student.stem.0.weight or teacher.stem.0.weight",
                "--prefix student or --prefix teach",
            ],
        ),
        (
            {**starting("model.", w), "fc.weight": e["fc.weight"], "fc.bias": e["fc.bias"]},
            "state-dict-mismatch",
            ["fc.weight may be model.fc.weight or fc.weight", "give --prefix model"],
        ),
    ):
        torch.save(content, "c.pt")
        refused(f"inspect c.pt {ARCH}", code, "'c.pt'", *texts)
    torch.save({"a": network(W), "b": network(E)}, "c.pt")
    refused("inspect c.pt", "weights-ambiguous", "--key a or --key b")


def test_a_network_is_not_put_together_of_two() -> None:
    w, e = trained(W), trained(E)
    body = {name: value for name, value in w.items() if not name.startswith("fc.")}
    head = {name: value for name, value in e.items() if name.startswith("fc.")}
    torch.save({**starting("student.", body), **starting("teacher.", head)}, "c.pt")
    refused(f"inspect c.pt {ARCH}", "state-dict-mismatch", "1 of two networks: some are of student and some of teacher")
    torch.save({**starting("student.", w), **starting("teacher.", head)}, "c.pt")
    refused(f"inspect c.pt {ARCH}", "state-dict-mismatch", "--prefix student")
    for front in ("model.", "module.", ""):  # one network may be within another, or have a head beside it
        assert not match({**starting(f"{front}net.", body), **starting(front, head)}, w).problems


def test_a_metrics_counts_are_left_out_and_a_layer_of_such_a_name_is_not() -> None:
    w = trained(W)
    assert not match({**w, "val_f1.tp": torch.ones(5)}, w).problems
    assert match({**w, "val_proj.weight": torch.ones(5, 5)}, w).problems


def test_weights_of_whole_numbers_are_refused() -> None:
    w = trained(W)
    for kind, fits in ((torch.int8, False), (torch.complex64, False), (torch.float64, True)):
        torch.save({**w, "fc.weight": w["fc.weight"].to(kind)}, "c.pt")
        if fits:
            assert run(f"inspect c.pt {ARCH}").exit_code == 0
        else:
            refused(f"inspect c.pt {ARCH}", "state-dict-mismatch", f"1 of another type: fc.weight is {kind}")


def test_a_refusal_names_the_nearest_entry_and_the_names_that_differ() -> None:
    w = trained(W)
    near = {name: value for name, value in starting("module.", w).items() if "fc" not in name}
    near["module.fc.weight"] = torch.ones(7, 16)
    torch.save({"discriminator": {"conv.weight": torch.ones(2, 2)}, "gen": near, "optimizer": optimizer()}, "c.pt")
    refused(
        f"inspect c.pt {ARCH}",
        "state-dict-mismatch",
        "the nearest, 'gen', has 1 missing: fc.bias (5,)",
        "1 of another shape: fc.weight is (7, 16), reading_nets:net has (5, 16)",
    )
    torch.save(lightning({**starting("backbone.", w), **CRITERION}), "c.pt")
    refused(f"inspect c.pt {ARCH}", "state-dict-mismatch", "17 missing", "hint: give --prefix backbone\n")
    torch.save({**starting("q.", w), **starting("k.", trained(E)), "queue": torch.ones(3)}, "c.pt")
    refused(
        f"inspect c.pt {ARCH}", "state-dict-mismatch", "41 not in the model: q.stem.0.w", "--prefix q or --prefix k"
    )
    torch.save({"student": starting("backbone.", w), "teacher": starting("backbone.", w)}, "c.pt")
    refused(f"inspect c.pt {ARCH}", "state-dict-mismatch", "--key student --prefix backbone or --key teacher --prefix")


def test_names_below_the_models_own_modules_are_not_left_out(nets: Any) -> None:
    """A deeper network has all names of a shallower one: leaving the rest out would make another function."""
    deeper = nets.net(blocks=3).state_dict()
    for state in (deeper, starting("model.", deeper)):
        torch.save(state, "c.pt")
        refused(
            f"inspect c.pt {ARCH}", "state-dict-mismatch", "6 not in the model: ", "layer1.2.0.weight (16, 16, 3, 3)"
        )
    for name in (
        "layer2.0.weight",
        "attention.weight",
        "bn.running_mean",
        "mean",
        "layer1.extra",
        "model.layer1.2.bias",
    ):
        torch.save({**trained(W), name: torch.ones(3)}, "c.pt")
        refused(f"inspect c.pt {ARCH}", "state-dict-mismatch", f"1 not in the model: {name} (3,)")


def test_a_missing_name_is_refused_whatever_else_is_left_out() -> None:
    state = {**starting("model.", trained(W)), **CRITERION}
    del state["model.layer1.1.1.running_mean"]
    torch.save(lightning(state), "c.pt")
    refused(f"inspect c.pt {ARCH}", "state-dict-mismatch", "1 missing: layer1.1.1.running_mean (16,)")
    state = {**starting("student.", trained(W)), "fc.bias": torch.ones(5)}
    del state["student.fc.bias"]
    torch.save(state, "c.pt")  # what is outside of a prefix that was given does not fill a gap within it
    refused(f"inspect c.pt {ARCH} --prefix student", "state-dict-mismatch", "1 missing: fc.bias (5,)")


def test_key_and_prefix_that_do_not_fit_the_file_are_refused() -> None:
    torch.save({"model": trained(W), "ema": trained(E), "optimizer": optimizer(), "epoch": 3}, "c.pt")
    refused(f"inspect c.pt {ARCH} --key modle", "key-unknown", "no entry 'modle'", "in 'model', 'ema'")
    refused(f"inspect c.pt {ARCH} --key optimizer", "key-unknown", "no weights in its entry 'optimizer'")
    refused(f"inspect c.pt {ARCH} --key model --prefix enc", "prefix-unknown", "--prefix enc", "stem, layer1, fc")
    torch.save(trained(W), "flat.pt")
    refused(f"inspect flat.pt {ARCH} --key model", "key-unused", "a state dict as a whole")
    torch.save({"epoch": 3}, "none.pt")
    refused(f"inspect none.pt {ARCH} --key model", "no-weights")
    torch.save(network(W), "whole.pt")
    refused("inspect whole.pt --key model", "key-unused", "a Sequential as a whole")
    refused("inspect whole.pt --prefix model", "prefix-unused", "holds a whole model")
    ns.save(ns.swap_norms(network(W), "wn"), "wn.safetensors")
    refused("fold wn.safetensors --key model -o f.pt", "key-unused", "written by `normswap convert`")
    refused("migrate wn.safetensors --prefix model --like wn.safetensors -o f.pt", "prefix-unused")


def test_a_loss_beside_a_state_dict_is_not_taken_for_the_model() -> None:
    torch.save({"state_dict": trained(W), "hyper_parameters": {"loss": nn.CrossEntropyLoss()}}, "c.pt")
    refused("inspect c.pt", "arch-missing")
    assert run(f"inspect c.pt {ARCH}").exit_code == 0


# --- nothing of a file runs


class Called:
    """Unpickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Kept(collections.defaultdict):  # type: ignore[type-arg]
    """Unpickles as a defaultdict whose factory is of the file's choice."""

    def __reduce__(self) -> Any:
        return collections.defaultdict, (Called(os.getcwd),), None, None, iter({}.items())


def archive(data: bytes) -> None:
    writer = torch._C.PyTorchFileWriter("c.pt")
    writer.write_record("data.pkl", data, len(data))
    writer.write_record("byteorder", b"little", len(b"little"))
    writer.write_end_of_file()


@pytest.mark.parametrize(
    "beside",
    [
        Kept(),
        collections.defaultdict(os.getcwd),
        collections.defaultdict(list, {"x": Called(os.system, "touch it-ran")}),
        collections.defaultdict(list, {"x": [Called(list, (1, 2))]}),
        Called(collections.defaultdict, Called(eval, "open('it-ran', 'w')")),
        {"deep": [{"er": Called(os.system, "touch it-ran")}]},
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("flags", ["", "--key state_dict", "--trust collections"])
def test_nothing_beside_the_weights_is_called(beside: Any, flags: str) -> None:
    torch.save({"state_dict": trained(W), "x": beside}, "c.pt")
    result = run(f"inspect c.pt {ARCH} {flags}")
    assert result.exit_code == 2
    assert result.stderr.startswith(("error[untrusted-global]", "error[pickle-unsafe]"))
    assert not Path("it-ran").exists()


def test_a_model_at_any_depth_is_checked_as_one_at_the_top() -> None:
    bent, holds = network(W), network(W)
    vars(bent)["forward"] = nn.Identity
    holds.counts = collections.defaultdict(int)
    for content, code in ((bent, "model-damaged"), (holds, "model-defaultdict")):
        for nested in ({"a": {"model": content}}, [[{"a": content}]]):
            torch.save(nested, "c.pt")
            refused("inspect c.pt", code)


def test_arguments_that_hold_a_defaultdict_are_read_where_they_are_trusted() -> None:
    arguments = argparse.Namespace(lr=0.1, milestones=collections.defaultdict(list, {"a": [1]}))
    torch.save({"state_dict": trained(W), "args": arguments}, "c.pt")
    refused(f"inspect c.pt {ARCH}", "untrusted-global", "--trust argparse")
    assert run(f"inspect c.pt {ARCH} --trust argparse").exit_code == 0


def test_a_detector_pickled_with_its_package_needs_trust() -> None:
    """As YOLO's checkpoints are: the model and its average as objects of a package's classes."""
    made = b"cultralytics.nn.tasks\nDetectionModel\n)\x81}b"
    archive(b"\x80\x02}(X\x05\x00\x00\x00model" + made + b"X\x03\x00\x00\x00ema" + made + b"u.")
    refused("inspect c.pt", "untrusted-global", "ultralytics.nn.tasks.DetectionModel (--trust ultralytics)")
    refused(f"inspect c.pt {ARCH} --key ema", "untrusted-global")


def test_a_file_that_holds_itself_is_read() -> None:
    content: dict[str, Any] = {"model": trained(W)}
    content["self"] = [content]
    torch.save(content, "c.pt")
    assert run(f"inspect c.pt {ARCH}").exit_code == 0


# --- folded weights


@pytest.mark.parametrize("recipe", ["wn+mobn", pytest.param("gn+ws", marks=pytest.mark.slow)])
def test_folded_weights_load_into_a_plain_model(recipe: str) -> None:
    torch.save(network(W), "model.pt")
    assert run(f"convert model.pt --to {recipe} -o m.safetensors").exit_code == 0
    result = run("fold m.safetensors -o plain.safetensors")
    assert result.exit_code == 0, result.output
    assert "wrote    plain.safetensors" in result.stdout
    converted = ns.load("m.safetensors").eval()
    state = load_file("plain.safetensors")
    assert not [name for name in state if "parametrizations" in name]
    plain = network(E)
    for convolution, norm in ((plain.stem, "1"), *((block, "1") for block in plain.layer1)):
        convolution[0].bias = nn.Parameter(torch.zeros(16))
        groups = [m for m in ns.fold(converted).modules() if isinstance(m, nn.GroupNorm)]
        setattr(convolution, norm, copy.deepcopy(groups[0]) if groups else nn.Identity())
    plain.eval().load_state_dict(state)
    assert ns.verify(converted, plain, (torch.randn(2, 3, 8, 8),)).ok
    assert run("fold m.safetensors -o plain.onnx").stderr.startswith("error[output-kind]")


def test_folded_weights_that_are_tied_are_written_under_each_name(nets: Any) -> None:
    torch.save(nets.tied(), "tied.pt")
    assert run("fold tied.pt -o plain.safetensors").exit_code == 0
    assert {"a.weight", "b.weight"} <= load_file("plain.safetensors").keys()


# --- laws


@settings(max_examples=60)
@given(st.data())
def test_wrappers_anywhere_are_stripped_and_nothing_else_is(data: st.DataObject) -> None:
    """Each module may be wrapped by any stack of wrappers; the model below is found, with its own values."""
    state = trained(W)
    modules = sorted({name.rpartition(".")[0] for name in state} | {""})
    wraps = {
        module: data.draw(st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=2), label=f"around {module!r}")
        for module in data.draw(st.lists(st.sampled_from(modules), unique=True), label="wrapped")
    }
    found = {}
    for name, value in state.items():
        parts, owners = [], ["", *[name[:i] for i, letter in enumerate(name) if letter == "."]]
        for owner, part in zip(owners, name.split("."), strict=True):
            parts += [*wraps.get(owner, []), part]
        found[".".join(parts)] = value
    around = data.draw(st.sampled_from([{}, CRITERION, {"loss.model.weight": torch.ones(3)}]), label="around it")
    result = match({**found, **around}, state)
    assert result.problems == 0
    assert {name: found[own] for name, own in result.names.items()}.keys() == state.keys()
    assert all(found[own] is state[name] for name, own in result.names.items())
    assert sorted([*result.foreign.values(), *result.outside]) == sorted(around)
    gone = data.draw(st.sampled_from([n for n in found if not n.endswith("tracked")]), label="taken out")
    assert match({name: value for name, value in found.items() if name != gone}, state).missing


def test_the_order_of_preference_is_that_of_the_documentation() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert ", ".join(f"`{name}`" for name in ENTRIES) in " ".join(text.split())
    ranks = [Entry(key, {}).rank for key in (*ENTRIES, "other")]
    assert ranks == sorted(ranks)
