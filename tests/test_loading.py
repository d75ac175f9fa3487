"""Reading models and inputs from files, and refusing what would run code."""

from __future__ import annotations

import argparse
import builtins
import collections
import functools
import importlib.util
import io
import os
import pathlib
import pickle
import subprocess
import sys
import textwrap
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from normswap.errors import InputError
from normswap.loading import explain_dtype, load_inputs, load_model
from normswap.loading.entries import ENTRIES
from normswap.loading.importing import import_quietly
from normswap.loading.scanning import Global, scan_pickle


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    model(torch.randn(8, 3, 8, 8))
    return model


def refusal(path, **options) -> InputError:
    with pytest.raises(InputError) as caught:
        load_model(path, **options)
    error = caught.value
    assert "\n" not in error.message
    assert "Traceback" not in str(error)
    return error


def assert_same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0, equal_nan=True)


def write_archive(path, data: bytes) -> None:
    """Write a torch archive around a pickle made by hand."""
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", data, len(data))
    writer.write_record("byteorder", b"little", len(b"little"))
    writer.write_end_of_file()


def op_global(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def op_text(text: str) -> bytes:
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


@pytest.fixture
def marker(tmp_path):
    """Give a file that code in a checkpoint would create, and check at the end that none did."""
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write a package `tinynets` into a directory of its own, and go there."""
    home = tmp_path / "home"
    (home / "tinynets").mkdir(parents=True)
    (home / "tinynets" / "__init__.py").write_text("")
    (home / "tinynets" / "nets.py").write_text(
        textwrap.dedent("""
        from torch import nn
        def act(x):
            return x.relu()
        def hook(module, args, output):
            return output
        class Net(nn.Module):
            def __init__(self, width=4):
                super().__init__()
                self.conv, self.bn, self.act = nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), act
            def forward(self, x):
                return self.act(self.bn(self.conv(x)))
        def broken():
            raise RuntimeError("no such data set")
        NUMBER = 3
        """)
    )
    monkeypatch.chdir(home)
    yield home
    for name in [m for m in list(sys.modules) if m.partition(".")[0] == "tinynets"]:
        del sys.modules[name]


def in_python(code: str, home) -> None:
    """Run `code` as a script of its own, as a training run would."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=home)


# --- whole models


@pytest.mark.parametrize("training", [True, False])
def test_a_whole_model_comes_back_equal_and_in_its_mode(tmp_path, training):
    model = small_model().train(training)
    torch.save(model, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    assert loaded.training is training
    assert_same(model, loaded)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), loaded.eval()(x))


def test_the_comparison_of_models_notices_one_changed_weight():
    changed = small_model()
    changed[0].weight.data[0, 0, 0, 0] += 1
    with pytest.raises(AssertionError):
        assert_same(small_model(), changed)


def test_a_model_in_a_training_checkpoint_is_found(tmp_path):
    model = small_model()
    torch.save({"epoch": 3, "model": model, "optimizer": {"lr": 0.1}}, tmp_path / "last.pt")
    assert_same(model, load_model(tmp_path / "last.pt"))


def test_loading_leaves_torchs_allow_list_and_random_state_alone(tmp_path):
    torch.save(small_model().state_dict(), tmp_path / "weights.pt")
    torch.save(small_model(), tmp_path / "model.pt")
    allowed, state = torch.serialization.get_safe_globals(), torch.get_rng_state()
    load_model(tmp_path / "model.pt")
    assert set(torch.serialization.get_safe_globals()) == set(allowed)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "model",
    [
        nn.TransformerEncoderLayer(8, 2, 16),
        nn.TransformerEncoderLayer(8, 2, 16, activation="gelu"),
        nn.LSTM(4, 4),
        nn.MultiheadAttention(8, 2),
        nn.DataParallel(nn.BatchNorm1d(3)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_torch_layers_with_a_state_of_their_own_load(tmp_path, model):
    torch.save(model, tmp_path / "model.pt")
    assert_same(model, load_model(tmp_path / "model.pt"))


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "retinanet_resnet50_fpn"])
def test_a_torchvision_model_comes_back_equal(tmp_path, name):
    if not _installed("torchvision"):
        pytest.skip("torchvision is not installed")
    models = import_quietly("torchvision.models")
    options = {"weights_backbone": None} if name.startswith("retina") else {}
    model = models.get_model(name, weights=None, **options).eval()
    torch.save(model, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    assert_same(model, loaded)
    with torch.no_grad():
        if name.startswith("retina"):  # up to the C++ operators, which a CPU-only torch may lack
            x = torch.randn(1, 3, 64, 64)
            first = model.head(list(model.backbone(x).values()))
            second = loaded.head(list(loaded.backbone(x).values()))
            assert all(torch.equal(first[key], second[key]) for key in first)
        else:
            x = torch.randn(1, 3, 224, 224)
            assert torch.equal(model(x), loaded(x))


def test_a_timm_model_comes_back_equal(tmp_path):
    if not _installed("timm"):
        pytest.skip("timm is not installed")
    timm = import_quietly("timm")
    model = timm.create_model("efficientnet_b0").eval()
    torch.save(model, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    assert_same(model, loaded)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# --- trust


def test_a_users_class_is_refused_with_the_option_and_loads_with_it(package):
    in_python("import torch; from tinynets.nets import Net; torch.save(Net().eval(), 'net.pt')", package)
    error = refusal("net.pt")
    assert error.code == "untrusted-global"
    assert "tinynets.nets.Net (trust=['tinynets'])" in error.message
    assert "tinynets.nets.act (trust=['tinynets'])" in error.message
    assert "trust=['tinynets']" in error.hint
    assert "trust=['tinynets']" in error.hint
    assert "tinynets" not in sys.modules  # nothing was imported before the refusal
    loaded = load_model("net.pt", trust=["tinynets"])
    assert type(loaded).__name__ == "Net"
    assert loaded(torch.randn(1, 3, 2, 2)).shape == (1, 4, 2, 2)
    assert refusal("net.pt", trust=["tinynet"]).code == "untrusted-global"  # a prefix of letters is no package


SCRIPT = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
    def forward(self, x):
        return self.fc(x)

if __name__ == "__main__":
    open("trained", "w").close()
    torch.save(Net(), "net.pt")
"""


def test_a_class_of_a_script_loads_without_running_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    subprocess.run([sys.executable, "-W", "ignore", "train.py"], check=True, cwd=tmp_path)
    (tmp_path / "trained").unlink()
    error = refusal("net.pt")
    assert "__main__.Net (trust=['SCRIPT.py'])" in error.message
    assert "the script that saved the model" in error.hint
    loaded = load_model("net.pt", trust=["train.py"])
    assert loaded(torch.ones(1, 2)).shape == (1, 2)
    assert not (tmp_path / "trained").exists()
    (tmp_path / "other.py").write_text("x = 1\n")
    assert refusal("net.pt", trust=["other.py"]).code == "class-missing"


@pytest.mark.parametrize("body", ["raise SystemExit(3)", "1 / 0", "def broken(:"])
def test_a_script_that_fails_is_one_error(tmp_path, monkeypatch, body):
    monkeypatch.chdir(tmp_path)
    write_archive("net.pt", b"\x80\x02" + op_global("__main__", "Net") + b")\x81.")
    (tmp_path / "train.py").write_text(body)
    assert refusal("net.pt", trust=["train.py"]).code == "trust-script"


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        ("os", "trust-unsafe"),
        ("builtins", "trust-unsafe"),
        ("torch", "trust-unsafe"),
        ("torch.fx", "trust-unsafe"),
        ("missing.py", "trust-invalid"),
        ("no package", "trust-invalid"),
        ("", "trust-invalid"),
        ("__main__", "trust-invalid"),
    ],
)
def test_trust_itself_is_checked(tmp_path, entry, code):
    torch.save(small_model(), tmp_path / "model.pt")
    assert refusal(tmp_path / "model.pt", trust=[entry]).code == code


def test_trust_as_one_string_is_refused(tmp_path):
    assert refusal(tmp_path / "model.pt", trust="mypackage").code == "trust-invalid"


def test_a_package_that_is_not_installed_is_named(tmp_path):
    write_archive(tmp_path / "net.pt", b"\x80\x02" + op_global("nowhere_to_be_found.nets", "Net") + b")\x81.")
    assert refusal(tmp_path / "net.pt", trust=["nowhere_to_be_found"]).code == "module-missing"
    write_archive(tmp_path / "old.pt", b"\x80\x02" + op_global("torch.nn.modules.conv", "Conv9d") + b")\x81.")
    assert refusal(tmp_path / "old.pt").code == "class-missing"


def test_a_name_that_only_passes_through_a_trusted_package_is_refused(package, marker):
    (package / "tinynets" / "tools.py").write_text("from os import system\nimport os\n")
    call = op_text(f"touch {marker}") + b"\x85R."
    for name in ("system", "os"):
        write_archive("evil.pt", b"\x80\x02" + op_global("tinynets.tools", name) + call)
        assert refusal("evil.pt", trust=["tinynets"]).code == "untrusted-global"


def test_a_hook_needs_trust(package):
    in_python(
        "import torch; from tinynets import nets; m = torch.nn.Linear(2, 2);"
        "m.register_forward_hook(nets.hook); torch.save(m, 'hooked.pt')",
        package,
    )
    assert refusal("hooked.pt").code == "model-hooks"
    assert "tinynets.nets.hook" in refusal("hooked.pt").message
    assert load_model("hooked.pt", trust=["tinynets"])(torch.ones(1, 2)).shape == (1, 2)


def test_numpy_and_argparse_in_a_checkpoint_are_named_with_their_options(tmp_path):
    content = {
        "model": small_model(),
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(3.5),
        "curve": np.arange(3.0),
        "out": pathlib.PurePosixPath("runs/1"),
    }
    torch.save(content, tmp_path / "last.pt")
    error = refusal(tmp_path / "last.pt")
    assert error.code == "untrusted-global"
    for option in (
        "argparse.Namespace (trust=['argparse'])",
        "numpy.dtype (trust=['numpy'])",
        "(trust=['pathlib'])",
    ):
        assert option in error.message
    loaded = load_model(tmp_path / "last.pt", trust=["argparse", "numpy", "pathlib"])
    assert_same(content["model"], loaded)


def test_trusting_numpy_does_not_admit_its_functions(tmp_path, marker):
    write_archive(
        tmp_path / "evil.pt",
        b"\x80\x02" + op_global("numpy", "save") + op_text(str(marker)) + b"K\x01\x86R.",
    )
    assert refusal(tmp_path / "evil.pt", trust=["numpy"]).code == "untrusted-global"


# --- files that would run code


class Reduced:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_a_call_of_os_system_is_refused_and_not_run(tmp_path, marker):
    torch.save(Reduced(os.system, f"touch {marker}"), tmp_path / "evil.pt")
    error = refusal(tmp_path / "evil.pt")
    assert error.code == "untrusted-global"
    assert "posix.system (never admitted)" in error.message
    assert "trust=" not in error.hint


def test_the_marker_would_show_code_that_ran(tmp_path):
    marker = tmp_path / "it-ran"
    torch.save(Reduced(os.system, f"touch {marker}"), tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("function", [eval, exec, builtins.getattr, __import__], ids=lambda f: f.__name__)
def test_builtins_are_refused_and_no_option_admits_them(tmp_path, marker, function):
    torch.save({"model": small_model(), "x": Reduced(function, f"open({str(marker)!r}, 'w')")}, tmp_path / "evil.pt")
    error = refusal(tmp_path / "evil.pt")
    assert error.code == "untrusted-global"
    assert f"builtins.{function.__name__} (never admitted)" in error.message


@pytest.mark.parametrize(
    "value",
    [
        Reduced(nn.Linear, 2, 3),
        Reduced(nn.Sequential),
        Reduced(torch._tensor._rebuild_from_type_v2, nn.Linear, nn.Linear, (2, 3), {}),
        Reduced(torch._tensor._rebuild_from_type_v2, functools.partial(nn.Linear), nn.Linear, (2, 3), {}),
        Reduced(collections.OrderedDict, [("forward", nn.Linear)]),
        Reduced(functools.partial, Reduced(nn.Linear, 2, 3)),
        Reduced(functools.partial, nn.LayerNorm, nn.Linear(2, 2)),
        {"a": [Reduced(nn.Linear, 2, 3)]},
    ],
)
def test_constructors_never_get_arguments_from_the_file(tmp_path, monkeypatch, value):
    torch.save(value, tmp_path / "evil.pt")

    def run(*args, **kwargs):
        raise AssertionError("a constructor ran")

    for cls in (nn.Linear, nn.Sequential):
        monkeypatch.setattr(cls, "__init__", run)
    assert refusal(tmp_path / "evil.pt").code == "pickle-unsafe"


def test_new_with_arguments_is_refused(tmp_path):
    linear = op_global("torch.nn.modules.linear", "Linear")
    write_archive(tmp_path / "evil.pt", b"\x80\x02" + linear + b"K\x02K\x03\x86\x81.")
    assert refusal(tmp_path / "evil.pt").code == "pickle-unsafe"


@pytest.mark.parametrize(
    "partial",
    [
        functools.partial(os.system, "true"),
        functools.partial(nn.functional.linear, 1),
        functools.partial(nn.functional.relu),
        functools.partial(nn.Linear, nn.ReLU()),
        functools.partial(nn.Linear, torch.ones(1)),
    ],
)
def test_partial_binds_layer_classes_and_constants_alone(tmp_path, partial):
    model = nn.ReLU()
    model.make = partial
    torch.save(model, tmp_path / "model.pt")
    assert refusal(tmp_path / "model.pt").code in ("untrusted-global", "pickle-unsafe")
    model.make = functools.partial(nn.LayerNorm, eps=1e-6)
    torch.save(model, tmp_path / "model.pt")
    assert load_model(tmp_path / "model.pt").make.keywords == {"eps": 1e-6}


def test_the_second_function_of_a_partial_counts(tmp_path):
    """A partial is made with one function and then told another by its state."""
    partial = op_global("functools", "partial") + op_global("torch.nn.modules.linear", "Linear") + b"\x85R"
    state = op_global("torchvision.ops.boxes", "box_iou") + b")}Nt"
    write_archive(tmp_path / "evil.pt", b"\x80\x02" + partial + b"(" + state + b"b.")
    assert refusal(tmp_path / "evil.pt").code == "pickle-unsafe"


@pytest.fixture
def fake_module(monkeypatch, marker):
    """Put a module with the given source where an admitted prefix finds it."""

    def make(source: str) -> str:
        name = "torch.nn.utils.planted"
        module = types.ModuleType(name)
        exec(
            textwrap.dedent(source),
            {"__name__": name, "marker": marker, "nn": nn} | vars(module),
            vars(module),
        )
        monkeypatch.setitem(sys.modules, name, module)
        for value in vars(module).values():
            if isinstance(value, type):
                value.__module__ = name
        return name

    return make


@pytest.mark.parametrize(
    "method", ["def __setstate__(self, state): marker.touch()", "def __new__(cls): marker.touch()"]
)
def test_an_admitted_class_with_pickling_code_of_its_own_is_refused(tmp_path, fake_module, method):
    name = fake_module(f"class Planted(nn.Module):\n    {method}\n")
    write_archive(tmp_path / "evil.pt", b"\x80\x02" + op_global(name, "Planted") + b")\x81}b.")
    error = refusal(tmp_path / "evil.pt")
    assert error.code == "untrusted-global"
    assert "runs code of its own" in error.message


def bare_module(cls: bytes, extra: bytes = b"") -> bytes:
    """Return the pickle of an empty module with `extra` entries in its state."""
    state = b"".join(op_text(k) + b"}" for k in ("_parameters", "_buffers", "_modules"))
    return cls + b")\x81}(" + state + extra + b"ub"


IDENTITY = op_global("torch.nn.modules.linear", "Identity")


def test_a_planted_class_without_such_code_would_be_created(tmp_path, fake_module):
    name = fake_module("class Planted(nn.Module):\n    pass\n")
    write_archive(tmp_path / "odd.pt", b"\x80\x02" + bare_module(op_global(name, "Planted")) + b".")
    assert type(load_model(tmp_path / "odd.pt")).__name__ == "Planted"


@pytest.mark.parametrize("attribute", ["forward", "_compiled_call_impl", "train"])
def test_a_method_replaced_by_a_value_is_refused(tmp_path, attribute):
    data = bare_module(IDENTITY, op_text(attribute) + IDENTITY)
    write_archive(tmp_path / "model.pt", b"\x80\x02" + data + b".")
    assert refusal(tmp_path / "model.pt").code == "model-damaged"


def test_a_hook_table_that_grows_after_the_model_is_made_counts(tmp_path):
    model = bare_module(IDENTITY, op_text("_forward_hooks") + b"}q\x01")
    grown = b"h\x01K\x00" + IDENTITY + b"s"
    data = b"\x80\x02}(" + op_text("model") + model + op_text("x") + grown + b"u."
    write_archive(tmp_path / "model.pt", data)
    assert refusal(tmp_path / "model.pt").code == "model-hooks"
    still = b"\x80\x02}(" + op_text("model") + model + op_text("x") + b"h\x01u."
    write_archive(tmp_path / "model.pt", still)
    assert type(load_model(tmp_path / "model.pt")) is nn.Identity


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.nn", "functional.os.system"),
        ("torch.nn.modules.linear", "nn.Linear"),
        ("torch.nn.modules.linear", "Linear.forward"),
        ("torch.nn.modules.module", "register_module_forward_hook"),
        ("torch.hub", "load"),
        ("torch", "load"),
        ("torchx.nn", "Linear"),
        ("timm.task.distillation", "DistillationTeacher"),
    ],
)
def test_other_names_are_refused(tmp_path, marker, module, name):
    write_archive(tmp_path / "evil.pt", b"\x80\x02" + op_global(module, name) + op_text("x") + b"\x85R.")
    assert refusal(tmp_path / "evil.pt").code in ("untrusted-global", "pickle-unsafe")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.nn", "modules.linear.Linear"),  # a nested name
        ("torch.nn.parallel.data_parallel", "DataParallel"),  # a module class, but of no layer
        ("torch.nn.functional", "linear"),
    ],
)
def test_names_that_were_not_reviewed_as_values_are_refused(tmp_path, module, name):
    extra = op_text("make") + op_global(module, name)
    write_archive(tmp_path / "model.pt", b"\x80\x02" + bare_module(IDENTITY, extra) + b".")
    error = refusal(tmp_path / "model.pt")
    assert error.code == "untrusted-global"
    assert f"{module}.{name} (never admitted)" in error.message
    extra = op_text("make") + op_global("torch.nn.modules.linear", "Linear")
    write_archive(tmp_path / "model.pt", b"\x80\x02" + bare_module(IDENTITY, extra) + b".")
    assert load_model(tmp_path / "model.pt").make is nn.Linear


# --- a module's forward that is another method of its own


CHOOSES = """
class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.forward = self.forward_layer
    def forward_layer(self, x):
        return self.layer(x)
    def forward(self, x):
        raise NotImplementedError
    forward_static = staticmethod(print)
"""


@pytest.fixture
def chooses(fake_module):
    """Plant a network that binds its forward, as timm's FasterNet does, under an admitted prefix."""
    return sys.modules[fake_module(CHOOSES)].Chooses


def test_a_forward_that_was_chosen_when_the_model_was_made_comes_back(tmp_path, chooses):
    part = chooses()
    model = nn.Sequential(part, nn.ReLU(), part)  # one of them twice
    model.append(chooses())
    torch.save(model, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    x = torch.randn(2, 3)
    assert torch.equal(loaded(x), model(x))
    assert loaded[0] is loaded[2]
    for module in (loaded[0], loaded[3]):
        assert module.forward.__self__ is module
        assert module.forward.__func__ is chooses.forward_layer
    with torch.no_grad():
        loaded[3].layer.weight.fill_(5)
    assert not torch.equal(loaded(x), model(x))
    torch.save(loaded, tmp_path / "again.pt")
    assert torch.equal(load_model(tmp_path / "again.pt")(x), loaded(x))


def bound(owner, name):
    return Reduced(builtins.getattr, owner, name)


@pytest.mark.parametrize(
    ("place", "name", "code"),
    [
        ("forward", "load_state_dict", "untrusted-global"),  # no forward by its name
        ("forward", "__class__", "untrusted-global"),
        ("forward", "__reduce_ex__", "untrusted-global"),
        ("forward", "forward", "untrusted-global"),
        ("forward", "forward_layer.__globals__", "untrusted-global"),
        ("forward", "forward_gone", "model-damaged"),
        ("forward", "forward_static", "model-damaged"),
        ("train", "forward_layer", "model-damaged"),
        ("act", "forward_layer", "model-damaged"),
    ],
)
def test_a_bound_method_that_is_no_forward_in_forwards_place_is_refused(tmp_path, chooses, place, name, code):
    model = chooses()
    del model.forward
    vars(model)[place] = bound(model, name)
    torch.save(model, tmp_path / "evil.pt")
    assert refusal(tmp_path / "evil.pt").code == code


def test_a_bound_method_of_anything_else_is_refused(tmp_path, chooses, marker):
    model, other = chooses(), chooses()
    del model.forward
    for owner in (other, [model], "text", 3, os, Reduced(os.system, f"touch {marker}")):
        if owner is os:
            owner = Reduced(__import__, "os")
        vars(model)["forward"] = bound(owner, "forward_layer")
        torch.save(model, tmp_path / "evil.pt")
        assert refusal(tmp_path / "evil.pt").code in ("untrusted-global", "model-damaged")
    assert not marker.exists()


def test_a_bound_method_elsewhere_in_the_file_does_nothing(tmp_path, chooses):
    model = chooses()
    model.notes = [bound(model, "forward_layer")]  # no attribute of a module: it cannot be called
    torch.save(model, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    assert not callable(loaded.notes[0])
    del model.notes
    torch.save({"model": model, "x": {"y": bound(model, "forward_layer")}}, tmp_path / "model.pt")
    assert not [m for m in load_model(tmp_path / "model.pt").modules() if "x" in vars(m)]
    for hostile in (
        {"model": model, "x": Reduced(functools.partial, bound(model, "forward_layer"))},
        {"model": model, "x": bound(model, "forward_layer"), "y": bound(model, "state_dict")},
        {"model": model, "x": Reduced(torch._tensor._rebuild_from_type_v2, bound(model, "forward_layer"), 1, (), {})},
    ):
        torch.save(hostile, tmp_path / "evil.pt")
        assert refusal(tmp_path / "evil.pt").code in ("untrusted-global", "pickle-unsafe")
    hooked = chooses()
    hooked._forward_hooks[0] = bound(hooked, "forward_layer")
    torch.save(hooked, tmp_path / "evil.pt")
    assert refusal(tmp_path / "evil.pt").code == "model-hooks"


def test_getattr_itself_never_comes_out_of_a_file(tmp_path, chooses):
    model = chooses()
    model.reach = builtins.getattr
    torch.save(model, tmp_path / "evil.pt")
    error = refusal(tmp_path / "evil.pt")
    assert error.code == "untrusted-global"
    assert "builtins.getattr (never admitted)" in error.message


def test_nested_names_of_protocol_4_are_refused(tmp_path, marker):
    name = b"\x8c\x08torch.nn\x8c\x14functional.os.system\x93"
    write_archive(tmp_path / "evil.pt", b"\x80\x04" + name + op_text(f"touch {marker}") + b"\x85R.")
    assert refusal(tmp_path / "evil.pt").code == "pickle-protocol"
    write_archive(tmp_path / "evil2.pt", b"\x80\x02" + name + op_text(f"touch {marker}") + b"\x85R.")
    assert refusal(tmp_path / "evil2.pt").code == "pickle-unsafe"


@pytest.mark.parametrize("data", [b"(S'x'\nios\nsystem\n.", b"(cos\nsystem\nS'x'\no.", b"\x80\x02\x82\x01."])
def test_old_opcodes_and_extension_codes_are_refused(tmp_path, data):
    write_archive(tmp_path / "evil.pt", data)
    assert refusal(tmp_path / "evil.pt").code in ("pickle-unsafe", "untrusted-global", "file-damaged")


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80\x02", b"\x80\x02.", b"\x80\x02R.", b"\x80\x02h\x07.", b"\x80\x02t.", b"\x80\x02}K\x01u."],
)
def test_a_damaged_pickle_is_one_error(tmp_path, data):
    write_archive(tmp_path / "bad.pt", data)
    assert refusal(tmp_path / "bad.pt").code in ("file-damaged", "pickle-unsafe")


def test_random_damage_is_never_a_traceback(tmp_path):
    torch.save(small_model(), tmp_path / "model.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    data = torch._C.PyTorchFileReader(str(tmp_path / "model.pt")).get_record("data.pkl")
    random = np.random.default_rng(0)
    opcodes = b"()]}tbRu.sa\x81\x85q\x00h\x00cX\x80Q0\\"
    outcomes = collections.Counter()
    for round in range(200):
        if round % 2:  # the archive as such; its checksum of the pickle is wrong now
            damaged = bytearray(whole)
            damaged[random.integers(len(whole))] = random.integers(256)
            (tmp_path / "bad.pt").write_bytes(damaged)
        else:
            damaged = bytearray(data)
            damaged[random.integers(len(data))] = random.choice(list(opcodes))
            write_archive(tmp_path / "bad.pt", bytes(damaged))
        try:
            load_model(tmp_path / "bad.pt")
            outcomes["loaded"] += 1
        except InputError as error:
            outcomes[error.code] += 1
    assert outcomes["pickle-unsafe"]
    assert outcomes["file-damaged"]


@pytest.mark.parametrize(
    "entry",
    [
        b"K\x01" + IDENTITY,  # an attribute whose name is a number
        op_text("_parameters") + b"}K\x01Ns",
        op_text("_parameters") + b"]",
        op_text("_modules") + b"}" + op_text("a") + b"K\x01s",
        op_text("_buffers") + b"}" + op_text("a") + b"K\x01s",
        op_text("_forward_hooks") + b"]",
    ],
)
def test_a_bent_module_is_one_error(tmp_path, entry):
    write_archive(tmp_path / "bent.pt", b"\x80\x02" + bare_module(IDENTITY, entry) + b".")
    assert refusal(tmp_path / "bent.pt").code == "model-damaged"


def test_the_scan_reads_a_real_model_as_the_unpickler_does(tmp_path):
    torch.save(small_model(), tmp_path / "model.pt")
    data = torch._C.PyTorchFileReader(str(tmp_path / "model.pt")).get_record("data.pkl")
    scan = scan_pickle(data)
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "model.pt")
    assert set(unsafe) < {found.path for found in scan.globals}
    assert Global("torch.nn.modules.batchnorm", "BatchNorm2d") in scan.globals
    assert all(call.args == () for call in scan.calls if call.opcode == "NEWOBJ")


def test_a_module_that_holds_itself_is_refused(tmp_path):
    model = nn.Sequential(nn.ReLU())
    model[0]._modules["up"] = model
    torch.save(model, tmp_path / "loop.pt")
    assert refusal(tmp_path / "loop.pt").code == "model-damaged"


# --- kinds of files that are recognised


def test_other_torch_formats_are_named(tmp_path, recwarn):
    model = small_model().eval()
    torch.jit.trace(model, torch.randn(1, 3, 8, 8)).save(tmp_path / "script.pt")
    torch.save(model, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(torch.compile(model, backend="eager"), tmp_path / "compiled.pt")
    torch.save(torch.fx.symbolic_trace(model), tmp_path / "graph.pt")
    torch.save(nn.utils.weight_norm(nn.Linear(2, 2)), tmp_path / "wn.pt")
    torch.save(nn.utils.spectral_norm(nn.Linear(2, 2)), tmp_path / "sn.pt")
    torch.save(model, tmp_path / "four.pt", pickle_protocol=4)
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps({"a": 1}))
    recwarn.clear()  # torch calls some of these deprecated
    codes = {path.name: refusal(path).code for path in sorted(tmp_path.iterdir())}
    assert codes == {
        "script.pt": "torchscript",
        "legacy.pt": "file-legacy",
        "compiled.pt": "compiled-model",
        "graph.pt": "graph-module",
        "wn.pt": "weight-norm-hook",
        "sn.pt": "spectral-norm-hook",
        "four.pt": "pickle-protocol",
        "bare.pkl": "file-pickle",
    }
    assert all(refusal(path).hint for path in tmp_path.iterdir())
    assert not recwarn


def test_files_of_other_kinds_are_named(tmp_path):
    whole = io.BytesIO()
    torch.save(small_model(), whole)
    save_file(small_model().state_dict(), tmp_path / "whole.safetensors")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    contents = {
        "empty.pt": (b"", "file-empty"),
        "cut.pt": (whole.getvalue()[:-300], "file-truncated"),
        "stub.pt": (whole.getvalue()[:30], "file-truncated"),
        "text.pt": (b"<html>404 Not Found</html>", "file-text"),
        "umlaut.pt": ("ä".encode() * 300, "file-text"),
        "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "file-lfs-pointer"),
        "noise.pt": (bytes(range(255, 0, -1)), "file-unknown"),
        "keras.h5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "file-hdf5"),
        "cut.safetensors": ((tmp_path / "whole.safetensors").read_bytes()[:-50], "file-truncated"),
    }
    for name, (data, code) in contents.items():
        (tmp_path / name).write_bytes(data)
        assert (name, refusal(tmp_path / name).code) == (name, code)
    assert refusal(tmp_path / "zip.pt").code == "file-unknown"
    np.savez(tmp_path / "arrays.npz", x=np.ones(3))
    assert refusal(tmp_path / "arrays.npz").code == "file-kind"


def test_an_onnx_file_is_named(tmp_path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "g", [], [])
    for name, producer in (("a.onnx", "pytorch"), ("b.onnx", "")):
        (tmp_path / name).write_bytes(onnx.helper.make_model(graph, producer_name=producer).SerializeToString())
        assert refusal(tmp_path / name).code == "file-onnx"


def test_paths_that_cannot_be_opened_are_named(tmp_path, monkeypatch):
    assert refusal(tmp_path).code == "file-is-directory"
    assert refusal(tmp_path / "none.pt").code == "file-missing"
    assert refusal("\0").code == "file-unreadable"
    closed = tmp_path / "closed.pt"
    closed.write_bytes(b"x")

    def deny(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "open", deny)  # chmod does not stop root
    assert refusal(closed).code == "file-permission"


def test_a_damaged_tensor_is_one_error(tmp_path):
    torch.save(small_model(), tmp_path / "model.pt")
    reader = torch._C.PyTorchFileReader(str(tmp_path / "model.pt"))
    write_archive(tmp_path / "hollow.pt", reader.get_record("data.pkl"))  # the pickle without its tensors
    assert refusal(tmp_path / "hollow.pt").code == "file-damaged"


# --- state dicts


@pytest.fixture
def weights(package):
    """Save a state dict of `tinynets.nets:Net` in the package's directory."""
    sys.path.insert(0, str(package))
    try:
        from tinynets.nets import Net
    finally:
        sys.path.remove(str(package))
    torch.manual_seed(1)
    model = Net().train()
    model(torch.randn(4, 3, 2, 2))
    return model.eval()


ARCH = "tinynets.nets:Net"


def test_a_state_dict_with_its_architecture_loads_in_eval_mode(weights):
    torch.save(weights.state_dict(), "w.pt")
    save_file(weights.state_dict(), "w.safetensors")
    state = torch.get_rng_state()
    for name in ("w.pt", "w.safetensors"):
        loaded = load_model(name, arch=ARCH)
        assert not loaded.training
        assert_same(weights, loaded)
        error = refusal(name)
        assert error.code == "arch-missing"
        assert "arch=" in error.hint
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("key", ENTRIES)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
def test_wrapped_and_prefixed_state_dicts_load(weights, key, prefix):
    state = {prefix + name: tensor for name, tensor in weights.state_dict().items()}
    torch.save({"epoch": 1, key: state}, "w.pt")
    assert_same(weights, load_model("w.pt", arch=ARCH))


def test_the_first_of_several_state_dicts_is_taken_and_named(weights, caplog):
    other = {name: torch.zeros_like(tensor) for name, tensor in weights.state_dict().items()}
    torch.save({"ema": other, "state_dict": weights.state_dict()}, "w.pt")
    assert_same(weights, load_model("w.pt", arch=ARCH))
    assert "the weights are taken from 'state_dict' (there are also 'ema')" in caplog.text


def test_an_averaged_models_state_dict_loads(weights):
    torch.save(torch.optim.swa_utils.AveragedModel(weights).state_dict(), "w.pt")
    assert_same(weights, load_model("w.pt", arch=ARCH))


def test_a_state_dict_that_does_not_fit_is_one_error_with_names_and_shapes(weights):
    state = weights.state_dict()
    state["extra"] = torch.ones(7)
    del state["bn.bias"]
    state["conv.weight"] = torch.ones(2, 3, 1, 1)
    torch.save(state, "w.pt")
    error = refusal("w.pt", arch=ARCH)
    assert error.code == "state-dict-mismatch"
    assert "1 missing: bn.bias (4,)" in error.message
    assert "1 not in the model: extra (7,)" in error.message
    assert "1 of another shape: conv.weight is (2, 3, 1, 1), tinynets.nets:Net has (4, 3, 1, 1)" in error.message


def test_long_lists_of_names_are_cut_with_a_count(weights):
    torch.save({f"x{index}": torch.ones(index + 1) for index in range(8)}, "w.pt")
    message = refusal("w.pt", arch=ARCH).message
    assert "8 not in the model: x0 (1,), x1 (2,), x2 (3,), x3 (4,), x4 (5,) and 3 more" in message
    assert "6 missing" in message


def test_a_state_dict_without_batch_counters_loads(weights):
    state = {n: t for n, t in weights.state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(state, "w.safetensors")
    assert torch.equal(load_model("w.safetensors", arch=ARCH).bn.running_var, weights.bn.running_var)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["bn.weight", "bn.running_var"])
def test_weights_that_are_not_finite_are_refused_by_name(weights, value, name):
    weights.state_dict()[name][1] = value
    torch.save(weights.state_dict(), "w.pt")
    error = refusal("w.pt", arch=ARCH)
    assert error.code == "weights-not-finite"
    assert f"'{name}'" in error.message
    assert "1 of 4 values" in error.message
    torch.save(weights, "whole.pt")
    assert refusal("whole.pt", trust=["tinynets"]).code == "weights-not-finite"


def test_an_attention_mask_may_hold_infinity(tmp_path):
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), float("-inf")))
    torch.save(model, tmp_path / "model.pt")
    assert_same(model, load_model(tmp_path / "model.pt"))


@pytest.mark.parametrize(
    ("arch", "code"),
    [
        ("resnet50", "arch-invalid"),
        (":", "arch-invalid"),
        ("nowhere_at_all:Net", "module-missing"),
        ("tinynets.nets:Missing", "arch-unknown"),
        ("tinynets.nets:NUMBER", "arch-unknown"),
        ("tinynets.nets:broken", "arch-failed"),
        ("builtins:dict", "arch-failed"),
    ],
)
def test_an_architecture_that_cannot_be_built_is_one_error(weights, arch, code):
    torch.save(weights.state_dict(), "w.pt")
    error = refusal("w.pt", arch=arch)
    assert error.code == code
    assert error.hint


def test_arguments_that_do_not_fit_the_architecture_are_one_error(weights):
    torch.save(weights.state_dict(), "w.pt")
    error = refusal("w.pt", arch=ARCH, arch_kwargs={"depth": 3})
    assert error.code == "arch-failed"
    assert "depth=3" in error.message


def test_an_architecture_beside_a_whole_model_is_refused(tmp_path):
    torch.save(small_model(), tmp_path / "model.pt")
    assert refusal(tmp_path / "model.pt", arch=ARCH).code == "arch-unused"


@pytest.mark.parametrize(
    "content", [{}, {"epoch": 3}, [1, 2], 5, {"model": {"lr": 1}}, torch.ones(3), {1: torch.ones(1)}]
)
def test_a_checkpoint_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "nothing.pt")
    assert refusal(tmp_path / "nothing.pt", arch=ARCH).code == "no-weights"


def test_the_named_zoos_build_their_architectures(tmp_path):
    if not (_installed("torchvision") and _installed("timm")):
        pytest.skip("torchvision and timm are not installed")
    for arch in ("torchvision:mobilenet_v3_small", "timm:resnet10t"):
        source, name = arch.split(":")
        package = import_quietly("torchvision.models" if source == "torchvision" else "timm")
        make = package.get_model if source == "torchvision" else package.create_model
        model = make(name, num_classes=7)
        save_file(model.state_dict(), tmp_path / "w.safetensors")
        assert_same(model, load_model(tmp_path / "w.safetensors", arch=arch, arch_kwargs={"num_classes": 7}))
        error = refusal(tmp_path / "w.safetensors", arch=arch)
        assert error.code == "state-dict-mismatch"
        assert "2 of another shape" in error.message
        near = refusal(tmp_path / "w.safetensors", arch=f"{source}:resnet5O")
        assert near.code == "arch-unknown"
        assert "resnet50" in near.hint
    assert refusal(tmp_path / "w.safetensors", arch="timm:hf-hub:someone/net").code == "arch-unknown"


def test_torchvision_is_importable_without_its_operators(tmp_path):
    if not _installed("torchvision"):
        pytest.skip("torchvision is not installed")
    code = "from normswap.loading.importing import import_quietly as i; i('torchvision.models').resnet18"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=dict(os.environ, PYTHONPATH=_root()))


def _root() -> str:
    return os.pathsep.join([str(pathlib.Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])


# --- inputs


def test_inputs_come_back_as_they_were_saved(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(2, 3)).astype("float32"), np.arange(6, dtype="uint8")
    np.save(tmp_path / "one.npy", x)
    np.savez(tmp_path / "plain.npz", x, y)
    np.savez_compressed(tmp_path / "named.npz", images=x, sizes=y)
    np.save(tmp_path / "big-endian.npy", x.astype(">f4"))
    torch.save(torch.from_numpy(x), tmp_path / "one.pt")
    torch.save([torch.from_numpy(x), torch.from_numpy(y)], tmp_path / "list.pt")
    torch.save({"images": torch.from_numpy(x), "sizes": torch.from_numpy(y)}, tmp_path / "dict.pt")
    save_file({"images": torch.from_numpy(x), "sizes": torch.from_numpy(y)}, tmp_path / "dict.safetensors")
    for name in ("one.npy", "big-endian.npy", "one.pt"):
        (found,) = load_inputs(tmp_path / name)
        assert np.array_equal(found.numpy(), x)
    for name in ("plain.npz", "list.pt"):
        found = load_inputs(tmp_path / name)
        assert isinstance(found, tuple)
        assert np.array_equal(found[0].numpy(), x)
        assert found[1].dtype == torch.uint8
    for name in ("named.npz", "dict.pt", "dict.safetensors"):
        found = load_inputs(tmp_path / name)
        assert isinstance(found, dict)
        assert np.array_equal(found["images"].numpy(), x)
        assert np.array_equal(found["sizes"].numpy(), y)


def test_a_list_of_images_for_a_detector_stays_a_list(tmp_path):
    torch.save(([torch.ones(3, 4, 5), torch.ones(3, 6, 7)],), tmp_path / "images.pt")
    (images,) = load_inputs(tmp_path / "images.pt")
    assert [tuple(image.shape) for image in images] == [(3, 4, 5), (3, 6, 7)]


@pytest.mark.parametrize(
    "array",
    [
        np.array([1.0, np.nan]),
        np.array([np.inf]),
        np.array([1, "a"], dtype=object),
        np.array(["text"]),
        np.zeros((0, 3)),
        np.zeros(2, dtype=[("a", "f4")]),
    ],
)
def test_arrays_that_are_no_inputs_are_refused(tmp_path, array):
    np.save(tmp_path / "bad.npy", array)
    np.savez(tmp_path / "bad.npz", good=np.ones(1), x=array)
    for name in ("bad.npy", "bad.npz"):
        with pytest.raises(InputError) as caught:
            load_inputs(tmp_path / name)
        assert caught.value.code == "inputs-invalid"


@pytest.mark.parametrize(
    "content",
    [{}, [], 3, {"a": 1}, {"a": torch.ones(2), "b": "x"}, torch.tensor([float("nan")]), torch.empty(0, 3)],
)
def test_tensor_files_that_are_no_inputs_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(InputError) as caught:
        load_inputs(tmp_path / "bad.pt")
    assert caught.value.code == "inputs-invalid"


def test_input_files_that_cannot_be_read_are_refused(tmp_path, marker):
    np.savez(tmp_path / "whole.npz", x=np.ones(100))
    np.savez(tmp_path / "none.npz")
    np.save(tmp_path / "whole.npy", np.ones(100))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-40])
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-40])
    torch.save(Reduced(os.system, f"touch {marker}"), tmp_path / "evil.pt")
    torch.save({"x": np.ones(3)}, tmp_path / "numpy.pt")
    codes = {
        "none.npz": "inputs-invalid",
        "cut.npz": "file-truncated",
        "cut.npy": "file-damaged",
        "evil.pt": "untrusted-global",
        "numpy.pt": "untrusted-global",
        "missing.npz": "file-missing",
    }
    for name, code in codes.items():
        with pytest.raises(InputError) as caught:
            load_inputs(tmp_path / name)
        assert (name, caught.value.code) == (name, code)


def test_a_dtype_that_does_not_fit_is_explained():
    model = small_model()
    assert explain_dtype((torch.zeros(1, 3, 8, 8),), model) == ""
    assert explain_dtype({"ids": torch.zeros(3, dtype=torch.int64)}, model) == ""
    assert "images / 255" in explain_dtype((torch.zeros(1, dtype=torch.uint8),), model)
    assert "torch.float64" in explain_dtype({"x": torch.zeros(1, dtype=torch.float64)}, model)
