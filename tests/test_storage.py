"""Storing converted models, making them again, and what a folded model needs: PyTorch and nothing else."""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import pickletools
import random
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import BY_NAME, changed, fingerprint, norms_of, structure
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn
from zoo import ZOO, leaves, randomize_
from zoo_packages import import_timm, import_torchvision

import normswap as ns
from normswap.errors import InputError, NormswapError, NothingToConvertError, PlanError
from normswap.recipes.gn import GroupNormalization
from normswap.runs.guard import set_mode
from normswap.storage import store as storage
from normswap.storage import writing
from normswap.storage.origin import origin_of, skeleton_of, slots
from normswap.storage.store import is_stored, load, save

TESTS = Path(__file__).resolve().parent
RECIPES = ("gn+ws", "wn+mobn", "ln", "gn+aws", "ws", "none")


# --------------------------------------------------------------------------------------------------- comparators


def same(found: Any, expected: Any) -> bool:
    """Whether two outputs are equal bit for bit, in values, dtypes, shapes and number; an error equals its own text."""
    if isinstance(found, str) or isinstance(expected, str):
        return found == expected
    pairs = list(zip(leaves(found), leaves(expected), strict=True))
    return bool(pairs) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b)) for a, b in pairs
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def held(model: nn.Module) -> dict[str, Any]:
    """Everything that a stored model must bring back: tensors by place, layouts, ties, gradients, modes, structure."""
    first: dict[int, str] = {}
    tensors = {}
    for slot in slots(model):
        t = slot.tensor
        tie = first.setdefault(id(t), slot.name)
        tensors[slot.name] = (slot.kind, type(t), t.requires_grad, t.stride(), tuple(bits(t).tolist()), tie)
    modes = [(name, module.training) for name, module in model.named_modules()]
    return {"tensors": tensors, "modes": modes, "structure": structure(model)}


def outputs(entry: str, model: nn.Module) -> list[Any]:
    """What a zoo model computes in evaluation and in training (or what it raises there); the model is not changed."""
    found: list[Any] = []
    for training in (False, True):
        one = copy.deepcopy(model)
        set_mode(one, training)
        torch.manual_seed(3)
        try:
            with torch.no_grad():
                found.append([t.clone() for t in leaves(BY_NAME[entry].run(one))])
        except Exception as failure:
            found.append(f"{type(failure).__name__}: {failure}")
    return found


def refusal(call: Any, *args: Any, **options: Any) -> NormswapError:
    """The one error that a wrong call gives, whose message is one line and whose hint says what to do."""
    with pytest.raises(NormswapError) as caught:
        call(*args, **options)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value


def python(code: str, *args: object, folder: Path = TESTS, **variables: str) -> str:
    """Run ``code`` in a process of its own, from ``folder``, and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), **variables}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, args)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_comparators_see_one_bit() -> None:
    model = small()
    other = copy.deepcopy(model)
    assert same(model[0].weight, other[0].weight)
    assert held(model) == held(other)
    with torch.no_grad():
        bits(other[0].weight)[0] ^= 1
    assert not same(model[0].weight, other[0].weight)
    assert held(model) != held(other)
    assert not same([], [])
    assert not same("ValueError: x", torch.zeros(1))


# ------------------------------------------------------------------------------------------- small models to store


def small(seed: int = 0) -> nn.Sequential:
    """conv → bn → relu → conv → bn → linear, in eval mode, with statistics that no shortcut survives."""
    torch.manual_seed(seed)
    body = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.25), nn.Linear(8, 5))
    return randomize_(model, seed)


X = torch.linspace(-2, 2, 2 * 3 * 9 * 9).reshape(2, 3, 9, 9)


def converted(to: Any = "gn+ws", **options: Any) -> nn.Module:
    return ns.swap_norms(small(), to, **options)


def there_and_back(stored: nn.Module, folder: Path, **options: Any) -> nn.Module:
    save(stored, folder / "model.safetensors")
    return load(folder / "model.safetensors", **options)


class Awkward(nn.Module):
    """Tensors in every kind of place: non-persistent buffers, plain attributes, lists, and a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.register_buffer("scale", torch.rand(6, 1, 1), persistent=False)
        self.shift = torch.rand(6, 1, 1)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.factors = [self.a.bias, self.b.bias]
        self.empty = torch.zeros(0, 3)
        self.calls, self.name, self.sizes = 0, "awkward", (1, (2.5, None))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.bn(self.conv(x)) * self.scale + self.shift
        y = self.b(self.a(y.mean((2, 3))))
        return y * self.factors[0] + self.factors[1]


# --------------------------------------------------------------------------------------------- the law, over the zoo

# Every third recipe on an entry, and on the next entry those beside them.
CASES = [(entry.name, recipe) for number, entry in enumerate(ZOO) for recipe in RECIPES[number % 3 :: 3]]


@dataclass(frozen=True)
class Elsewhere:
    """What another process made of the stored models."""

    here: dict[tuple[str, str], list[Any]]
    there: dict[tuple[str, str], list[Any]]


LOAD_THE_ZOO = """
    import sys
    from pathlib import Path
    import torch
    from test_storage import BY_NAME, load, outputs
    torch.set_num_threads(1)
    found = {}
    for path in Path(sys.argv[1]).glob("*.safetensors"):
        entry, recipe = path.stem.split("@")
        found[entry, recipe] = outputs(entry, load(path, model=BY_NAME[entry].model(seed=5)))
    torch.save(found, Path(sys.argv[1], "found.pt"))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Elsewhere:
    """The zoo's models, stored here, made again in another process from models with other values.

    Of a run of some tests those alone that they ask for.
    """
    folder = tmp_path_factory.mktemp("zoo")
    wanted = {
        (item.callspec.params["entry"], item.callspec.params["recipe"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and "elsewhere" in item.fixturenames
    }
    here = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are so small that a second thread only waits
    for entry, recipe in sorted(wanted):
        try:
            model = ns.swap_norms(BY_NAME[entry].model(), recipe, check=False)
        except NothingToConvertError:
            continue
        before = fingerprint(model)
        save(model, folder / f"{entry}@{recipe}.safetensors")
        assert changed(before, fingerprint(model)) == set(), (entry, recipe)
        here[entry, recipe] = outputs(entry, model)
    python(LOAD_THE_ZOO, folder)
    torch.set_num_threads(threads)
    return Elsewhere(here, torch.load(folder / "found.pt", weights_only=True))


@pytest.mark.parametrize(("entry", "recipe"), CASES)
def test_a_load_in_another_process_gives_the_same_outputs_bit_for_bit(
    elsewhere: Elsewhere, entry: str, recipe: str
) -> None:
    if (entry, recipe) not in elsewhere.here:
        pytest.skip("no norm of it can be converted by this recipe")
    found, expected = elsewhere.there[entry, recipe], elsewhere.here[entry, recipe]
    assert not isinstance(expected[0], str), expected[0]
    assert [same(f, e) for f, e in zip(found, expected, strict=True)] == [True, True]


@pytest.mark.parametrize("entry", BY_NAME)
@pytest.mark.parametrize("recipe", ["gn+ws", "wn+mobn"])
def test_a_loaded_model_holds_what_the_stored_one_held(entry: str, recipe: str, tmp_path: Path) -> None:
    try:
        model = ns.swap_norms(BY_NAME[entry].model(), recipe, check=False)
    except NothingToConvertError:
        pytest.skip("no norm of it can be converted by this recipe")
    loaded = there_and_back(model, tmp_path, model=BY_NAME[entry].model(seed=5))
    assert held(loaded) == held(model)


LOAD_PRETRAINED = """
    import sys
    from pathlib import Path
    import torch
    torch.set_num_threads(int(sys.argv[2]))
    from normswap.storage.store import load
    folder = Path(sys.argv[1])
    x = torch.load(folder / "x.pt")
    with torch.no_grad():
        torch.save({p.stem: load(p)(x) for p in folder.glob("*.safetensors")}, folder / "found.pt")
"""


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_torchvision_and_timm_models_load_in_another_process_from_the_file_alone(name: str, tmp_path: Path) -> None:
    if name == "resnet18":
        original = import_torchvision().models.resnet18(weights=None)
    else:
        original = import_timm().create_model(name, pretrained=False)
    randomize_(original, 1)
    x = torch.randn(2, 3, 64, 64)
    torch.save(x, tmp_path / "x.pt")
    expected = {}
    with torch.no_grad():
        for recipe in ("gn+ws", "wn+mobn"):
            model = ns.swap_norms(original, recipe, example_inputs=x, check=False)
            save(model, tmp_path / f"{recipe}.safetensors")
            expected[recipe] = model(x)
        unconverted = original(x)
    python(LOAD_PRETRAINED, tmp_path, torch.get_num_threads())
    found = torch.load(tmp_path / "found.pt")
    assert {recipe: same(found[recipe], expected[recipe]) for recipe in expected} == dict.fromkeys(expected, True)
    assert not any(same(unconverted, output) for output in expected.values()), "it could not have failed"


def test_the_skeleton_of_a_resnet18_is_small(tmp_path: Path) -> None:
    model = ns.swap_norms(import_torchvision().models.resnet18(weights=None).eval(), "wn+mobn", check=False)
    save(model, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len(file.metadata()["normswap_skeleton"]) < 30_000
    values = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert (tmp_path / "model.safetensors").stat().st_size < values + 120_000


# ----------------------------------------------------------------------------------- what training may have changed


@pytest.mark.parametrize("given", [False, True], ids=["from_the_file", "into_a_fresh_model"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_flags_layouts_and_dtype_come_back(recipe: str, given: bool, tmp_path: Path) -> None:
    model = converted(recipe)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    model[0].eval()
    model[3].requires_grad_(False)
    model[7].p = 0.5
    model.to(memory_format=torch.channels_last)
    loaded = there_and_back(model, tmp_path, model=small(seed=7) if given else None)
    assert held(loaded) == held(model)
    assert loaded[7].p == 0.5
    assert any(not t.is_contiguous() for t in loaded.state_dict().values())
    double = there_and_back(model.double().eval(), tmp_path, model=small(seed=7) if given else None)
    with torch.no_grad():
        assert same(double(X.double()), model(X.double()))


@pytest.mark.parametrize("given", [False, True], ids=["trusted", "into_a_fresh_model"])
def test_tensors_come_back_wherever_the_model_holds_them(given: bool, tmp_path: Path) -> None:
    model = ns.swap_norms(Awkward().eval(), "gn+ws", example_inputs=X)
    with torch.no_grad():
        model(X)
        model.shift += 1
    calls = model.calls
    model.sizes = (3, (None, "x"))
    options = {"model": Awkward()} if given else {"trust": ["test_storage"]}
    loaded = there_and_back(model, tmp_path, **options)
    assert held(loaded) == held(model)
    assert loaded.b.weight is loaded.a.weight
    assert loaded.factors[0] is loaded.a.bias
    assert (loaded.calls, loaded.name, loaded.sizes) == (calls, "awkward", (3, (None, "x")))
    with torch.no_grad():
        assert same(loaded(X), model(X))


def test_ties_made_and_cut_after_the_conversion_come_back(tmp_path: Path) -> None:
    model = ns.swap_norms(Awkward().eval(), "ln", example_inputs=X)
    model.b.weight = nn.Parameter(model.a.weight.detach() + 1)
    model.b.bias = model.a.bias
    loaded = there_and_back(model, tmp_path, model=Awkward())
    assert held(loaded) == held(model)
    assert loaded.b.weight is not loaded.a.weight
    assert loaded.b.bias is loaded.a.bias


def test_parameters_that_share_memory_are_stored_once_and_share_it_again(tmp_path: Path) -> None:
    model = ns.swap_norms(Awkward().eval(), "ln", example_inputs=X)
    model.b.weight = nn.Parameter(model.a.weight.data)
    loaded = there_and_back(model, tmp_path, model=Awkward())
    assert "b.weight" not in load_file(tmp_path / "model.safetensors")
    assert loaded.b.weight is not loaded.a.weight
    assert loaded.b.weight.data_ptr() == loaded.a.weight.data_ptr()


def test_loaded_tensors_have_memory_of_their_own(tmp_path: Path) -> None:
    loaded = there_and_back(converted(), tmp_path)
    for tensor in loaded.state_dict(keep_vars=True).values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_a_loaded_model_can_be_trained_and_stored_again(tmp_path: Path) -> None:
    loaded = there_and_back(converted(), tmp_path)
    with torch.no_grad():
        loaded[8].bias += 1
    again = there_and_back(loaded, tmp_path)
    assert held(again) == held(loaded)
    assert held(again) != held(converted())


def test_a_copy_can_be_stored_as_well_as_the_model(tmp_path: Path) -> None:
    model = converted()
    assert held(there_and_back(copy.deepcopy(model), tmp_path)) == held(model)


def test_a_model_converted_twice_comes_back(tmp_path: Path) -> None:
    model = ns.swap_norms(converted("gn+ws", include=["1"]), "wn+mobn", include=["4"])
    assert {type(model[i]).__name__ for i in (1, 4)} == {"GroupNorm", "MeanOnlyBatchNorm2d"}
    loaded = there_and_back(model, tmp_path)
    assert held(loaded) == held(model)
    assert held(there_and_back(loaded, tmp_path, model=small(seed=3))) == held(model)


def test_options_of_the_recipe_come_back(tmp_path: Path) -> None:
    loaded = there_and_back(converted("gn+ws", num_groups=4, eps=1e-3), tmp_path)
    assert (loaded[1].num_groups, loaded[1].eps) == (4, 1e-3)


def test_a_model_converted_in_place_comes_back(tmp_path: Path) -> None:
    model = small()
    assert ns.swap_norms(model, "gn+ws", inplace=True) is model
    assert held(there_and_back(model, tmp_path)) == held(model)


class Locked(nn.Sequential):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("locked")


def test_a_model_that_cannot_be_copied_is_converted_in_place_and_not_stored_as_another(tmp_path: Path) -> None:
    model = Locked(*small())
    ns.swap_norms(model, "gn+ws", inplace=True)
    save(model, tmp_path / "model.safetensors")
    assert refusal(load, tmp_path / "model.safetensors").code == "storage-no-skeleton"
    assert refusal(load, tmp_path / "model.safetensors", model=Locked(*small())).code == "not-copyable"
    loaded = load(tmp_path / "model.safetensors", model=small(seed=2))
    with torch.no_grad():
        assert same(loaded(X), model(X))


def test_the_fresh_model_stays_as_it_is_and_may_be_on_the_meta_device(tmp_path: Path) -> None:
    model, fresh = converted(), small(seed=4)
    before = fingerprint(fresh)
    loaded = there_and_back(model, tmp_path, model=fresh)
    assert changed(before, fingerprint(fresh)) == set()
    assert held(loaded) == held(model)
    with torch.device("meta"):
        bare = nn.Sequential(*[copy.deepcopy(m) for m in small()]).to("meta")
    assert held(load(tmp_path / "model.safetensors", model=bare)) == held(model)


def test_load_leaves_the_random_generators_alone(tmp_path: Path) -> None:
    save(converted(), tmp_path / "model.safetensors")
    state = torch.get_rng_state()
    load(tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------- the note in the model


def test_the_note_is_no_part_of_the_models_state() -> None:
    model = converted()
    assert origin_of(model) is not None
    assert origin_of(small()) is None
    assert [type(m) for m in model.modules()].count(nn.BatchNorm2d) == 0
    assert len(list(model.state_dict())) == len(list(slots(model)))


def test_a_skeleton_copies_no_data_and_keeps_shapes_strides_and_ties() -> None:
    model = Awkward().to(memory_format=torch.channels_last)
    before = fingerprint(model)
    skeleton = skeleton_of(model)
    assert skeleton is not None
    assert changed(before, fingerprint(model)) == set()
    for old, new in zip(slots(model), slots(skeleton), strict=True):
        assert new.tensor.is_meta == (new.kind != "attribute")
        assert (old.name, old.tensor.shape, old.tensor.stride()) == (new.name, new.tensor.shape, new.tensor.stride())
        assert (old.tensor.dtype, old.tensor.requires_grad) == (new.tensor.dtype, new.tensor.requires_grad)
    assert skeleton.b.weight is skeleton.a.weight
    assert skeleton.factors[1] is skeleton.b.bias


def test_a_model_of_torchs_own_layers_is_pickled_without_a_trace_of_this_package() -> None:
    buffer = io.BytesIO()
    torch.save(converted("gn"), buffer)
    pickled = zipfile.ZipFile(buffer).read("archive/data.pkl")
    texts = [str(arg) for _, arg, _ in pickletools.genops(pickled) if arg is not None]
    assert any("GroupNorm" in text for text in texts)
    assert not any(text.startswith("normswap") for text in texts)
    assert origin_of(converted("gn")) is not None


# --------------------------------------------------------------------------------- classes, trust, custom recipes


def test_a_class_of_the_users_needs_trust_or_a_fresh_model(tmp_path: Path) -> None:
    model = ns.swap_norms(BY_NAME["residual_block"].model(), "gn+ws")
    save(model, tmp_path / "model.safetensors")
    error = refusal(load, tmp_path / "model.safetensors")
    assert error.code == "untrusted-global"
    assert "zoo.BasicBlock" in error.message
    assert "model=" in error.hint
    assert "trust=['zoo']" in error.hint
    loaded = load(tmp_path / "model.safetensors", trust=["zoo"])
    assert held(loaded) == held(model)


def test_hooks_at_the_conversion_need_trust_and_later_ones_are_named(tmp_path: Path) -> None:
    model = ns.swap_norms(BY_NAME["hooked_layer"].model(), "gn+ws")
    save(model, tmp_path / "model.safetensors")
    assert refusal(load, tmp_path / "model.safetensors").code == "model-hooks"
    loaded = load(tmp_path / "model.safetensors", trust=["zoo"])
    assert same(outputs("hooked_layer", loaded), outputs("hooked_layer", model))
    model[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="'0' has forward hooks that were registered after the conversion"):
        save(model, tmp_path / "model.safetensors")


def test_a_local_class_is_stored_without_its_structure(tmp_path: Path) -> None:
    class Local(nn.Sequential):
        pass

    model = ns.swap_norms(Local(*small()), "gn+ws")
    save(model, tmp_path / "model.safetensors")
    error = refusal(load, tmp_path / "model.safetensors")
    assert error.code == "storage-no-skeleton"
    assert "architecture: model=" in error.hint
    assert held(load(tmp_path / "model.safetensors", model=Local(*small(seed=2)))) == held(model)


def test_a_graph_module_needs_a_fresh_model(tmp_path: Path) -> None:
    graph = torch.fx.symbolic_trace(small())
    model = ns.swap_norms(graph, "gn+ws")
    assert origin_of(copy.deepcopy(model)) is not None
    save(copy.deepcopy(model), tmp_path / "model.safetensors")
    error = refusal(load, tmp_path / "model.safetensors")
    assert error.code == "graph-module"
    assert "architecture: model=" in error.hint
    loaded = load(tmp_path / "model.safetensors", model=torch.fx.symbolic_trace(small(seed=2)))
    with torch.no_grad():
        assert same(loaded(X), model(X))


TRAIN = """
    import sys
    import torch
    from torch import nn
    import normswap as ns
    from normswap.storage.store import save

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.bn(self.conv(x)).relu()

    if __name__ == "__main__":
        torch.manual_seed(0)
        model = ns.swap_norms(Net().eval(), "wn+mobn")
        save(model, "model.safetensors")
        print(float(model(torch.ones(1, 3, 4, 4)).detach().sum()))
"""


def test_a_class_of_a_script_is_found_in_the_script_that_is_trusted(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(TRAIN))
    printed = python("import runpy; runpy.run_path('train.py', run_name='__main__')", folder=tmp_path)
    assert refusal(load, tmp_path / "model.safetensors").code == "untrusted-global"
    loaded = load(tmp_path / "model.safetensors", trust=[str(tmp_path / "train.py")])
    assert type(loaded).__name__ == "Net"
    with torch.no_grad():
        assert float(loaded(torch.ones(1, 3, 4, 4)).sum()) == pytest.approx(float(printed), rel=1e-6)


IN_PYTHON = """
    import sys, torch, normswap as ns
    from normswap.loading import load_model
    model = ns.swap_norms(load_model("plain.pt", trust=["train.py"]), "gn+ws")
    print(type(model).__module__, hasattr(sys.modules["__main__"], "Net"))
    ns.save(model, "again.safetensors")
    print(hasattr(sys.modules["__main__"], "Net"))
    ns.load("again.safetensors", trust=["train.py"])
    try:
        ns.load("again.safetensors")
    except ns.NormswapError as error:
        print(error.message, error.hint, sep="\\n")
"""


def test_a_class_of_a_script_is_stored_from_python_as_one_of_main(tmp_path: Path) -> None:
    source = textwrap.dedent(TRAIN) + '    torch.save(Net().eval(), "plain.pt")\n'
    (tmp_path / "train.py").write_text(source)
    python("import runpy; runpy.run_path('train.py', run_name='__main__')", folder=tmp_path)
    where, after, needs, hint = python(IN_PYTHON, folder=tmp_path).splitlines()
    assert (where, after) == ("__main__ False", "False")
    assert needs.endswith("not admitted: __main__.Net (trust=['SCRIPT.py'])")
    assert hint == (
        "where you trust the file: trust=['SCRIPT.py'] (SCRIPT.py is the script that saved the model); "
        "or give a fresh model of the same architecture: model="
    )


def test_a_script_that_runs_is_not_run_again_for_its_own_classes(tmp_path: Path) -> None:
    source = textwrap.dedent(TRAIN) + "    loaded = ns.load('model.safetensors', trust=[__file__])\n"
    source += "    print(type(loaded) is Net)\n"
    (tmp_path / "train.py").write_text("print('once')\n" + source)
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    printed = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    assert [line for line in printed.stdout.splitlines() if not line[-1].isdigit()] == ["once", "True"]


@dataclass(frozen=True)
class MyRecipe(GroupNormalization):
    name = "mine"


def test_a_recipe_of_the_users_must_be_given(tmp_path: Path) -> None:
    model = converted(MyRecipe(num_groups=2))
    save(model, tmp_path / "model.safetensors")
    error = refusal(load, tmp_path / "model.safetensors")
    assert error.code == "storage-recipe"
    assert "test_storage.MyRecipe" in error.message
    assert "recipe=" in error.hint
    assert refusal(load, tmp_path / "model.safetensors", recipe=GroupNormalization()).code == "storage-recipe"
    assert held(load(tmp_path / "model.safetensors", recipe=MyRecipe(num_groups=2))) == held(model)


# ------------------------------------------------------------------------------------------------------ refusals


def test_what_was_not_converted_is_refused(tmp_path: Path) -> None:
    error = refusal(save, small(), tmp_path / "model.safetensors")
    assert (error.code, error.hint) == ("not-converted", "torch.save stores it")
    error = refusal(save, nn.Sequential(converted()), tmp_path / "model.safetensors")
    assert "submodule '0'" in error.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", ["gn+ws", "wn+mobn", "gn+aws"])
def test_a_folded_model_is_refused(recipe: str, tmp_path: Path) -> None:
    error = refusal(save, ns.fold(converted(recipe)), tmp_path / "model.safetensors")
    assert error.code in ("storage-folded", "not-converted")
    assert "torch.save" in error.hint
    assert list(tmp_path.iterdir()) == []


def replace_head(model: nn.Module) -> None:
    model[8] = nn.Linear(8, 3)


def replace_activation(model: nn.Module) -> None:
    model[2] = nn.GELU()


def append(model: nn.Module) -> None:
    model.append(nn.ReLU())


def share(model: nn.Module) -> None:
    model[4] = model[1]


def add_buffer(model: nn.Module) -> None:
    model[0].register_buffer("extra", torch.zeros(1))


@pytest.mark.parametrize("change", [replace_head, replace_activation, append, share, add_buffer])
def test_a_model_whose_structure_was_changed_is_refused(change: Any, tmp_path: Path) -> None:
    model = converted("gn")
    save(model, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    change(model)
    error = refusal(save, model, tmp_path / "model.safetensors")
    assert error.code == "storage-changed"
    assert "before converting" in error.hint
    assert "fold(model)" in error.hint
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_values_on_the_meta_device_are_refused(tmp_path: Path) -> None:
    error = refusal(save, ns.swap_norms(small().to("meta"), "gn"), tmp_path / "model.safetensors")
    assert error.code == "storage-tensor"
    assert list(tmp_path.iterdir()) == []


def test_a_fresh_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(converted(), path)
    wider = small()
    wider[8] = nn.Linear(8, 6)
    error = refusal(load, path, model=wider)
    assert error.code == "storage-model"
    assert "'8.weight' is (6, 8) in the model and (5, 8) in the file" in error.message
    assert isinstance(refusal(load, path, model=nn.Sequential(nn.Linear(3, 3))), PlanError)
    assert refusal(load, path, model=converted()).code == "storage-model"


# ------------------------------------------------------------------------------------------------ damaged files


def test_a_file_of_another_kind_is_told_apart(tmp_path: Path) -> None:
    ours = tmp_path / "model.safetensors"
    save(converted(), ours)
    assert is_stored(ours)
    foreign = tmp_path / "foreign.safetensors"
    save_file(small().state_dict(), foreign)
    torch.save(small(), tmp_path / "model.pt")
    (tmp_path / "empty.safetensors").touch()
    for path, code in (
        (foreign, "storage-foreign"),
        (tmp_path / "model.pt", "file-kind"),
        (tmp_path / "empty.safetensors", "file-empty"),
        (tmp_path / "absent.safetensors", "file-missing"),
        (tmp_path, "file-is-directory"),
    ):
        with pytest.raises(InputError) as caught:
            load(path)
        assert caught.value.code == code
        assert not is_stored(path)


def rewritten(path: Path, **changes: str | None) -> None:
    """Change entries of the file's metadata; None takes one out."""
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), **{f"normswap_{k}": v for k, v in changes.items()}}
    save_file(load_file(path), path, {k: v for k, v in metadata.items() if v is not None})


class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), F.relu
        self.config, self.dims, self.lstm = {"k": 1.0, "of": [1, (2,)]}, [2, 3], nn.LSTM(4, 2)
        self.scale = lambda y: 1.5 * y
        self.generator, self.lock = torch.Generator(), SimpleNamespace(inner={"f": F.gelu})

    def forward(self, x: Tensor) -> Any:
        y = self.scale(self.act(self.b(self.c(x)))).mean(self.dims) * self.config["k"]
        return self.lstm(y)[0]


def doubled(model: nn.Module) -> Callable[[Tensor], Any]:
    return lambda x: 2 * type(model).forward(model, x)


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "nothing": (lambda m: None, ""),
    "a number in a dict": (lambda m: m.config.update(k=3.0), ""),
    "another dict": (lambda m: setattr(m, "config", {"k": 2.0}), ""),
    "a list": (lambda m: setattr(m, "dims", [3, 2]), ""),
    "padding": (lambda m: setattr(m.c, "_reversed_padding_repeated_twice", [1, 1, 1, 1]), ""),
    "a function": (lambda m: setattr(m, "act", torch.tanh), "'act'"),
    "another function": (lambda m: setattr(m, "act", F.gelu), "'act'"),
    "a lambda": (lambda m: setattr(m, "scale", lambda y: y), "'scale'"),
    "a function in an object": (lambda m: m.lock.inner.update(f=F.relu), "'lock'"),
    "the forward": (lambda m: setattr(m, "forward", doubled(m)), "'forward'"),
    "a function of a submodule": (lambda m: setattr(m.c, "helper", F.relu), "'c.helper'"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_after_the_conversion_is_stored_or_told_of(change: str, tmp_path: Path) -> None:
    make, told = CHANGES[change]
    x = torch.randn(2, 3, 8, 8)
    model = ns.swap_norms(Configured().eval(), "wn+mobn", example_inputs=x)
    before = model(x)
    make(model)
    with pytest.warns(UserWarning, match=f"{told}: changed after the conversion") if told else nullcontext():
        save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", model=Configured())
    expected = before if told else model(x)
    if change != "padding":  # which torch reads in other modes of padding alone
        torch.testing.assert_close(again(x), expected, rtol=0, atol=0)
    assert again.config == model.config
    assert again.dims == model.dims
    assert again.c._reversed_padding_repeated_twice == model.c._reversed_padding_repeated_twice


def test_a_tensor_that_is_part_of_another_is_stored_as_one_of_its_own(tmp_path: Path) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.register_buffer("table", torch.randn(6, 4))
            self.register_buffer("first", self.table[:2])
            self.register_buffer("column", self.table[:, 1])
            self.register_buffer("empty", self.table[:0])

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.c(x)).mean((2, 3)) * self.first.sum(0) + self.column.sum()

    x = torch.randn(2, 3, 8, 8)
    model = ns.swap_norms(Parts().eval(), "wn", example_inputs=x)
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", model=Parts())
    assert torch.equal(again(x), model(x))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_recipe_by_name_is_refused(tmp_path: Path) -> None:
    save(converted(), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="is no recipe"):
        load(tmp_path / "model.safetensors", recipe="wn")  # type: ignore[arg-type]


LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    f"{kind.__name__}{form}": functools.partial(kind, **options)
    for form, options in (("", {}), (", groups", {"groups": 2}))
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for options in ({"kernel_size": 3, **options},)
} | {"Linear": nn.Linear}


@pytest.mark.parametrize("to", ns.all_recipes())
@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_under_each_recipe_is_read_back(layer: str, to: str, tmp_path: Path) -> None:
    """torch's weight normalization of a transposed convolution has a g whose strides are those of no order of axes."""

    def made(values: int = 0) -> nn.Module:
        torch.manual_seed(values)
        norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank]
        return nn.Sequential(LAYERS[layer](2, 4), norm(4), nn.ReLU()).eval()

    rank = 0 if layer == "Linear" else int(layer.split(",")[0][-2])
    x = torch.randn(5, 2, *(4,) * rank)
    try:
        model = ns.swap_norms(made(), to, example_inputs=x)
    except NothingToConvertError:
        pytest.skip("the recipe refuses it, with the reason")
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", model=made(1))
    assert torch.equal(again(x), model(x))
    strides = {name: value.stride() for name, value in model.state_dict().items()}
    assert {name: value.stride() for name, value in again.state_dict().items()} == strides


def test_a_file_of_a_later_format_is_refused(tmp_path: Path) -> None:
    save(converted(), tmp_path / "model.safetensors")
    rewritten(tmp_path / "model.safetensors", format="99", version="9.9")
    error = refusal(load, tmp_path / "model.safetensors")
    assert error.code == "storage-format"
    assert "9.9" in error.hint


CONTENTS = {"ties", "shared", "strides", "loose", "trainable", "training", "attributes"}


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("plans", None),
        ("plans", "[{}]"),
        ("plans", "3"),
        ("contents", None),
        ("contents", "[]"),
        ("contents", "{}"),
        ("skeleton", "no base64"),
        ("skeleton", "AAAA"),
        *[("contents", json.dumps({**{key: {} for key in CONTENTS}, **change})) for change in (
            {"loose": [], "trainable": ["nowhere"], "training": []},
            {"loose": [], "trainable": [], "training": [], "strides": {"8.weight": [10**12, 1]}},
            {"loose": [], "trainable": [], "training": [], "strides": {"8.weight": "x"}},
            {"loose": [], "trainable": [], "training": [], "strides": {"8.weight": [-1, 1]}},
            {"loose": [], "trainable": [], "training": [], "strides": {"8.weight": []}},
            {"loose": [], "trainable": [], "training": [], "ties": {"8.bias": "8.nothing"}},
            {"loose": [], "trainable": [], "training": [], "attributes": {"2": {"forward": 1}}},
            {"loose": [], "trainable": [], "training": [], "attributes": {"2": {"_modules": None}}},
            {"loose": [], "trainable": [], "training": [], "attributes": {"2": {"inplace": [1]}}},
            {"loose": [], "trainable": [], "training": [], "attributes": {"2": 3}},
        )],
    ],
)  # fmt: skip
def test_a_file_whose_entries_contradict_each_other_is_one_clear_error(
    entry: str, value: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save(converted(), path)
    rewritten(path, **{entry: value})
    assert refusal(load, path).code == "file-damaged"


def test_the_same_entries_undamaged_load(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(converted(), path)
    plain = {**{key: {} for key in CONTENTS}, "loose": [], "trainable": [], "training": []}
    rewritten(path, contents=json.dumps({**plain, "attributes": {"2": {"inplace": True}}}))
    assert load(path)[2].inplace is True


def test_a_file_cut_short_anywhere_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(converted(), path)
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            load(path)
        is_stored(path)  # reads the header alone, and never raises


def test_a_file_with_wrong_bytes_gives_no_traceback(tmp_path: Path) -> None:
    """One byte of the header at a time: either the error is one of ours, or nothing was lost."""
    path = tmp_path / "model.safetensors"
    save(converted(), path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[generator.randrange(header)] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            load(path)
        except NormswapError:
            refused += 1
        is_stored(path)
    assert refused > 100


def test_a_plan_that_its_model_does_not_allow_is_a_damaged_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    save(ns.swap_norms(model, "gn", num_groups=4), path := tmp_path / "model.safetensors")
    whole = path.read_bytes()
    damaged = whole.replace(b'\\"num_groups\\": 4', b'\\"num_groups\\": 3')
    assert damaged != whole
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="is damaged: ValueError: num_channels") as caught:
        load(path)
    assert caught.value.code == "file-damaged"


# ---------------------------------------------------------------------------------------- all of a file or nothing


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), InputError),
        (SafetensorError("I/O error: No space left on device"), InputError),
    ],
    ids=["interrupt", "full_disk", "full_disk_in_safetensors"],
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_the_folder_as_it_was(
    failure: BaseException, raised: type[BaseException], existing: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    path = tmp_path / "model.safetensors"
    if existing:
        path.write_bytes(b"precious")

    def half(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half a file")
        raise failure

    monkeypatch.setattr(storage, "save_file", half)
    with pytest.raises(raised) as caught:
        save(converted(), path)
    if raised is InputError:
        assert caught.value.code == "output-path"
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([b"precious"] if existing else [])


def test_a_failed_replacement_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"precious")

    def fail(*_: Any) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(writing.os, "replace", fail)
    assert refusal(save, converted(), path).code == "output-path"
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"precious"]


WITHOUT_SPACE = """
    import resource, signal, sys
    from pathlib import Path
    from test_storage import converted, save
    from normswap.errors import InputError
    model = converted()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    try:
        save(model, sys.argv[1])
    except InputError as error:
        print(error.code)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the size of files by Linux's rlimit")
def test_a_file_that_cannot_be_written_whole_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"precious")
    assert python(WITHOUT_SPACE, path).split() == ["output-path"]
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"precious"]


def test_a_path_that_cannot_be_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "no" / "x", tmp_path / "file" / "x", tmp_path / ("x" * 400), "/dev/null", "a\0b"):
        assert refusal(save, converted("gn"), path).code == "output-path"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to this user")
def test_a_folder_without_write_access_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert refusal(save, converted("gn"), tmp_path / "model.safetensors").code == "output-path"
    finally:
        tmp_path.chmod(0o700)


def test_a_link_stays_a_link_and_permissions_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    save(converted("gn"), link)
    assert link.is_symlink()
    assert is_stored(real)
    assert real.stat().st_mode & 0o777 == 0o640
    (tmp_path / "new").touch()
    save(converted("gn"), tmp_path / "new.safetensors")
    assert (tmp_path / "new.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


# ------------------------------------------------------------------------------- a folded model needs PyTorch alone

RUN_WITHOUT = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "normswap":
                raise ImportError("normswap is not installed here")

    sys.meta_path.insert(0, Blocker())
    try:
        import normswap
    except ImportError:
        print("blocked")
    if sys.argv[3] == "torchvision":
        from zoo_packages import import_torchvision
        import_torchvision()
    elif sys.argv[3]:
        sys.path.insert(0, sys.argv[3])
    import torch
    torch.set_num_threads(int(sys.argv[4]))
    model = torch.load(sys.argv[1], weights_only=False)
    with torch.no_grad():
        torch.save(model(torch.load(sys.argv[2])), sys.argv[2] + ".out")
    print(any(name.partition(".")[0] == "normswap" for name in sys.modules))
"""

LOCAL_NET = """
    import torch
    from torch import nn

    class LocalNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, groups=2), nn.BatchNorm2d(16)
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            x = torch.relu(self.bn1(self.conv1(x)))
            return self.head(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))
"""


@pytest.mark.parametrize("which", ["resnet18", "local"])
@pytest.mark.parametrize("recipe", ["gn+ws", "wn+mobn"])
def test_a_folded_model_loads_and_runs_where_this_package_is_not_installed(
    recipe: str, which: str, tmp_path: Path, monkeypatch: Any
) -> None:
    if which == "resnet18":
        original, where = import_torchvision().models.resnet18(weights=None), "torchvision"
    else:
        (tmp_path / "local_net.py").write_text(textwrap.dedent(LOCAL_NET))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "local_net", raising=False)
        original, where = __import__("local_net").LocalNet(), str(tmp_path)
    randomize_(original, 2)
    model = ns.swap_norms(original, recipe)
    folded = ns.fold(model)
    layers = {type(m) for m in folded.modules() if isinstance(m, nn.Conv2d)}
    norms = {type(m) for m in folded.modules() if isinstance(m, nn.GroupNorm)}
    assert layers == {nn.Conv2d}
    assert norms == ({nn.GroupNorm} if recipe == "gn+ws" else set())
    assert norms_of(folded) == {}
    x = torch.randn(2, 3, 64, 64)
    torch.save(folded, tmp_path / "folded.pt")
    torch.save(x, tmp_path / "x.pt")
    printed = python(RUN_WITHOUT, tmp_path / "folded.pt", tmp_path / "x.pt", where, torch.get_num_threads())
    assert printed.split() == ["blocked", "False"]
    with torch.no_grad():
        expected, unfolded = folded(x), model(x)
    assert same(torch.load(tmp_path / "x.pt.out"), expected)
    # Folding rounds each weight once more: a float32's last digits, through 20 layers.
    torch.testing.assert_close(expected, unfolded, rtol=1e-4, atol=1e-4 * float(unfolded.abs().max()))


def test_the_blocked_process_would_notice_a_model_that_needs_this_package(tmp_path: Path) -> None:
    model = nn.Sequential(ns.swap_norms(small(), "mobn")[1])
    torch.save(model, tmp_path / "model.pt")
    torch.save(torch.zeros(1, 8, 2, 2), tmp_path / "x.pt")
    with pytest.raises(AssertionError, match="normswap is not installed here"):
        python(RUN_WITHOUT, tmp_path / "model.pt", tmp_path / "x.pt", "", 1)
