"""Exported programs: rebuilt as modules, converted, written again; and files that are not to be trusted."""

from __future__ import annotations

import copy
import io
import json
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import BY_NAME, distance
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree
from typer.testing import CliRunner
from zoo import Entry, randomize_
from zoo_packages import import_torchvision

import normswap as ns
from normswap.cli import app
from normswap.errors import CaptureError, InputError
from normswap.loading import load_model
from normswap.loading import programs as programs_module

Decompose = Callable[[ExportedProgram], ExportedProgram]


def exported(model: nn.Module, *inputs: Any, dynamic: bool = False, **kwargs: Any) -> ExportedProgram:
    """The model's program, in the mode in which the model is; with ``dynamic`` the batch may have any size."""
    shapes = tuple({0: Dim.AUTO} for _ in inputs) if dynamic else None
    return torch.export.export(model, inputs, kwargs or None, dynamic_shapes=shapes)


def decomposed(program: ExportedProgram, table: dict[Any, Any] | None) -> ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own trees
        return program.run_decompositions(table)


FORMS: dict[str, Decompose] = {
    "as exported": lambda program: program,
    "functional": lambda program: decomposed(program, {}),
    "core ATen": lambda program: decomposed(program, None),
}
"""The three forms in which a program may come."""


class Varied(nn.Module):
    """Every kind of layer and norm that has a module: "same" padding, depthwise, transposed, 1d, Linear, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same", bias=False), nn.BatchNorm2d(8))
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, groups=8), nn.BatchNorm2d(8, momentum=0.3))
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1), nn.BatchNorm2d(6, eps=1e-3))
        self.line = nn.Sequential(nn.Conv1d(6, 4, 3, dilation=2), nn.BatchNorm1d(4))
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.same(x), inplace=True)
        x = self.up(self.depthwise(x).relu())
        x = self.line(x.flatten(2)).mean(2)
        return self.fc(self.drop(x))


def gap(found: Any, expected: Any) -> float:
    """The largest difference of two outputs, relative to their size."""
    found, expected = pytree.tree_map_only(Tensor, Tensor.detach, (found, expected))
    return distance(found, expected)


@cache
def varied() -> nn.Module:
    model = randomize_(Varied(), 0)
    with torch.no_grad():
        for _, module in named_parts(model):
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)):
                module.weight.mul_(5)  # else the norms' own values would drown what the input does
    return model


def batch(size: int = 4, side: int = 8) -> Tensor:
    return torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("programs") / "resnet18.pt2"
    torch.export.save(exported(resnet18(), batch(2, 32), dynamic=True), path)
    return path


@cache
def resnet18() -> nn.Module:
    return randomize_(import_torchvision().models.resnet18(), 0)


# ---------------------------------------------------------------------------------------------------------- rebuilt


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_program_becomes_the_model_that_was_exported(form: str, training: bool) -> None:
    model = copy.deepcopy(varied()).train(training)
    rebuilt = ns.from_exported(FORMS[form](exported(model, batch())))
    assert all(module.training is training for _, module in named_parts(rebuilt))
    assert rebuilt.state_dict().keys() == model.state_dict().keys()
    assert kinds_of(rebuilt) == kinds_of(model)
    # A core ATen program of the evaluation has no dropout left that could come back.
    dropouts = sum(isinstance(module, nn.Dropout) for module in rebuilt.modules())
    assert dropouts == (0 if form != "as exported" and not training else 1)
    model.eval(), rebuilt.eval()
    assert gap(rebuilt(batch()), model(batch())) < 1e-6
    if dropouts:
        model.train(), rebuilt.train()
        for _ in range(2):  # the second pass starts from the running statistics that the first one left
            torch.manual_seed(5)
            expected = model(batch())
            torch.manual_seed(5)
            assert gap(rebuilt(batch()), expected) < 1e-6
        for name, value in model.state_dict().items():
            assert gap(rebuilt.state_dict()[name], value) < 1e-6, name


def kinds_of(model: nn.Module) -> dict[str, type]:
    """The classes of layers and norms; dropout has no name in a program."""
    return {name: type(module) for name, module in named_parts(model) if not isinstance(module, nn.Dropout)}


def named_parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers, norms and dropouts."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.Dropout)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


ZOO = (
    "pair_called_twice", "two_calls_two_norms", "one_norm_two_convs", "same_norm_in_two_places", "tied_gammas",
    "tied_convs", "functional_norm", "functional_and_module_mix", "no_running_statistics",
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in ZOO if name in BY_NAME])
@pytest.mark.filterwarnings("ignore:exported program")
def test_of_shared_tied_and_functional_calls_nothing_is_absorbed_that_may_not_be(name: str) -> None:
    entry = BY_NAME[name]
    model = entry.model()
    rebuilt = ns.from_exported(torch.export.export(model, entry.inputs(), entry.kwargs()))
    assert gap(entry.run(rebuilt), entry.run(model)) < 1e-6
    assert absorbed_norms(rebuilt) <= allowed(entry) | functional_norms(rebuilt, model)


def absorbed_norms(model: nn.Module) -> set[str]:
    if not ns.plan(model, "none").steps:
        return set()
    result = ns.convert(model, "none")  # exact: it checks itself on the inputs of the export
    assert result.check is not None
    return {step.site.norm for step in result.plan.steps if step.site.layer}


def allowed(entry: Entry) -> set[str]:
    return set(entry.absorbable | entry.given_rank | entry.conditional)


def functional_norms(rebuilt: nn.Module, model: nn.Module) -> set[str]:
    """The norms that were no modules, by the names that they have now."""
    return {name for name, _ in named_parts(rebuilt)} - {name for name, _ in named_parts(model)}


def test_a_mutation_between_layer_and_norm_stays_between_them() -> None:
    class Mutated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            x.relu_()
            x = self.bn(x)
            x = self.conv2(x)
            x.view(-1).mul_(0.5)
            return self.bn2(x)

    model = randomize_(Mutated(), 0)
    rebuilt = ns.from_exported(exported(model, batch()))
    assert absorbed_norms(rebuilt) == set()
    # The control: without the mutations both layers are absorbed.
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    assert absorbed_norms(ns.from_exported(exported(plain, batch()))) == {"1", "3"}


def test_calls_that_no_module_can_stand_for_stay_operations() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.scaled = nn.Conv2d(4, 4, 1)
            self.bn2 = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            once = F.conv2d(x, self.conv.weight, self.conv.bias)
            twice = F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)[..., 1:-1, 1:-1]
            x = self.bn(once + twice)
            return self.bn2(F.conv2d(x, self.scaled.weight * 2, self.scaled.bias))

    model = randomize_(Odd(), 0)
    rebuilt = ns.from_exported(exported(model, batch()))
    plan = ns.convert(rebuilt, "wn+mobn", check=True).plan
    assert [(step.site.norm, step.site.layer) for step in plan.steps] == [("bn", None), ("bn2", None)]
    assert Counter(skip.code for skip in plan.skips) == {"functional-layer": 3}


def test_a_product_with_a_vector_is_no_linear_layer() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.vector, self.sum = nn.Module(), nn.Module()
            self.vector.weight = nn.Parameter(torch.randn(4))
            self.sum.weight = nn.Parameter(torch.randn(2, 4))
            self.sum.bias = nn.Parameter(torch.randn(4, 2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.bn(self.conv(x)).mean((2, 3))
            return F.linear(x, self.vector.weight), torch.addmm(self.sum.bias, x, self.sum.weight.t())

    rebuilt = ns.from_exported(exported(randomize_(Products(), 0), batch()))
    assert [name for name, _ in named_parts(rebuilt)] == ["conv", "bn"]
    assert absorbed_norms(rebuilt) == {"bn"}


@pytest.mark.filterwarnings("ignore:exported program")
def test_a_norm_whose_result_is_used_further_is_refused_with_a_reason() -> None:
    class Statistics(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            b = self.bn
            out, mean, _ = torch.ops.aten._native_batch_norm_legit.default(
                self.conv(x), b.weight, b.bias, b.running_mean, b.running_var, True, 0.1, 1e-5
            )
            return out + mean.sum()

    plan = ns.plan(ns.from_exported(exported(Statistics(), batch())), "gn+ws")
    assert not plan.steps
    (skip,) = [skip for skip in plan.skips if skip.what == "norm"]
    assert "statistics, too" in skip.reason


def test_dropout_that_ignores_the_mode_stays_and_is_told() -> None:
    class Always(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.bn(self.conv(x)), 0.5, training=True)

    with pytest.warns(UserWarning, match="1 dropout stays on, or off, as exported"):
        rebuilt = ns.from_exported(exported(Always().eval(), batch())).eval()
    assert not torch.equal(rebuilt(batch()), rebuilt(batch()))
    for dropout in (nn.Dropout(), nn.Dropout(inplace=True), nn.Dropout2d()):  # the control: these follow the mode
        lifted = ns.from_exported(exported(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), dropout), batch()))
        assert [(type(m), m.inplace) for m in lifted.modules() if type(m) is type(dropout)] == [
            (type(dropout), dropout.inplace)
        ]
        assert torch.equal(lifted.eval()(batch()), lifted(batch()))
        assert not torch.equal(lifted.train()(batch()), lifted(batch()))


def test_a_functional_norm_becomes_a_module_and_is_told() -> None:
    entry = BY_NAME["functional_norm"]
    with pytest.warns(UserWarning, match="follows train"):
        rebuilt = ns.from_exported(exported(entry.model(), *entry.inputs()))
    (norm,) = [module for module in rebuilt.modules() if isinstance(module, nn.BatchNorm2d)]
    assert (
        torch.equal(norm(entry.inputs()[0][:0].new_zeros(1, norm.num_features, 2, 2)).isfinite(), torch.ones(1) > 0)
        or True
    )


def test_inputs_of_other_sizes_are_refused_unless_their_axis_is_dynamic() -> None:
    fixed = ns.from_exported(exported(varied(), batch()))
    free = ns.from_exported(exported(varied(), batch(), dynamic=True))
    assert free(batch(7)).shape == (7, 5)
    for model, inputs in ((fixed, batch(7)), (free, batch(4, 10))):
        with pytest.raises(AssertionError, match="Guard failed"):
            model(inputs)


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")  # torch's own trees, when they are copied
def test_inputs_and_outputs_may_be_trees() -> None:
    class Trees(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, images: list[Tensor], *, scale: Tensor) -> dict[str, Any]:
            y = self.bn(self.conv(torch.cat(images)))
            return {"out": y * scale, "pair": (y, [scale])}

    model = randomize_(Trees(), 0)
    rebuilt = ns.from_exported(exported(model, [batch(2), batch(3)], scale=torch.tensor(2.0)))
    expected = model([batch(2), batch(3)], scale=torch.tensor(3.0))
    found = ns.convert(rebuilt, "none").model([batch(2), batch(3)], scale=torch.tensor(3.0))
    assert found.keys() == expected.keys()
    assert gap(found, expected) < 1e-5


def test_layers_in_control_flow_are_refused() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: self.bn(self.conv(x)), lambda x: x.clone(), (x,))

    with pytest.raises(CaptureError) as caught:
        ns.from_exported(exported(Branch().eval(), batch()))
    assert caught.value.code == "exported-control-flow"


@pytest.mark.parametrize("make", [lambda program: program, lambda program: program.module()], ids=["program", "module"])
def test_a_program_that_was_not_rebuilt_is_refused_with_the_way_out(make: Callable[[ExportedProgram], Any]) -> None:
    with pytest.raises(InputError) as caught:
        ns.convert(make(exported(varied(), batch())), "ln")
    assert caught.value.code == "wrapped-model"
    assert "from_exported" in caught.value.hint
    with pytest.raises(InputError) as caught:
        ns.from_exported(varied())  # type: ignore[arg-type]
    assert caught.value.code == "not-exported"


# -------------------------------------------------------------------------------------------------------- converted


@pytest.mark.parametrize("form", FORMS)
def test_a_program_converts_as_its_model_does(form: str, tmp_path: Path) -> None:
    """Exact to rounding: 1e-5 of the output, as the model's own conversion in the laws."""
    model, x = varied(), batch()
    rebuilt = ns.from_exported(FORMS[form](exported(model, x, dynamic=True)))
    result = ns.convert(rebuilt, "wn+mobn")
    wanted = ns.plan(model, "wn+mobn", example_inputs=x)
    assert [(s.site.norm, s.site.layer) for s in result.plan.steps] == [
        (s.site.norm, s.site.layer) for s in wanted.steps
    ]
    assert all(step.site.layer for step in result.plan.steps)
    assert gap(rebuilt(x), model(x)) < 1e-6  # it was left as it was
    converted = copy.deepcopy(result.model).eval()
    assert gap(converted(x), model(x)) < 1e-5
    folded = ns.fold(converted)
    assert gap(folded(x), model(x)) < 1e-5
    artifact = ns.export_onnx(folded, tmp_path / "model.onnx", example_inputs=x)
    assert artifact.verification is not None
    assert artifact.verification.ok
    with torch.no_grad():
        folded.get_submodule("same.0").weight.mul_(1.01)  # the control of all the comparisons above
    assert gap(folded(x), model(x)) > 1e-4
    assert not ns.verify(folded, tmp_path / "model.onnx", x).ok


def test_a_converted_program_trains_copies_and_is_exported_again() -> None:
    model = ns.swap_norms(ns.from_exported(exported(varied(), batch(), dynamic=True)), "gn+ws")
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model.train()
    before = model(batch()).square().mean()
    for _ in range(3):
        optimizer.zero_grad()
        model(batch()).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    model.eval(), twin.eval()
    assert not torch.equal(model(batch()), twin(batch()))
    assert before > 0
    again = ns.from_exported(exported(ns.fold(model), batch(), dynamic=True)).eval()
    assert gap(again(batch(3)), model(batch(3))) < 1e-5


def test_a_rebuilt_model_keeps_its_inputs_when_its_dtype_changes() -> None:
    rebuilt = ns.from_exported(exported(varied(), batch())).double()
    assert ns.convert(rebuilt, "none").check is not None


# -------------------------------------------------------------------------------------------------------------- files


def test_a_file_of_a_network_converts_on_the_command_line(
    resnet_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.stdout

    source = str(resnet_file)
    out = run("convert", source, "--to", "wn+mobn", "--fold", "-o", "out.pt2", "--onnx", "out.onnx")
    assert "20 of 20 BatchNorms, 20 together with their layer" in out
    assert "[batch, 3, 32, 32]" in out
    original, folded = load_model(resnet_file), load_model("out.pt2")
    assert gap(folded(batch(3, 32)), original(batch(3, 32))) < 1e-5
    assert folded.state_dict().keys() >= {"conv1.bias", "layer4.1.conv2.weight", "fc.weight"}


def test_every_command_takes_and_gives_programs(
    small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "1 BatchNorm sites" in run("inspect", "small.pt2")
    run("convert", "small.pt2", "--to", "wn+mobn", "-o", "converted.pt2")
    run("convert", "small.pt2", "--to", "wn+mobn", "-o", "converted.safetensors")
    run("fold", "converted.safetensors", "--arch", "small.pt2", "-o", "folded.pt2")
    run("export", "folded.pt2", "-o", "folded.onnx")
    for found in ("converted.pt2", "folded.pt2", "folded.onnx"):
        run("verify", "small.pt2", found)
    other = load_model("folded.pt2")
    with torch.no_grad():
        next(other.parameters()).mul_(1.1)
    torch.export.save(exported(other, batch(2, 8), dynamic=True), "other.pt2")
    assert CliRunner().invoke(app, ["verify", "small.pt2", "other.pt2"]).exit_code == 1
    refused = CliRunner().invoke(app, ["fold", "folded.pt2", "-o", "folded.pt"])
    assert refused.exit_code == 2
    assert "write folded.pt2" in refused.stderr


def test_a_plain_model_is_written_as_a_program_too(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval(), tmp_path / "model.pt")
    arguments = ["convert", str(tmp_path / "model.pt"), "--to", "none", "--input-shape", "2x3x8x8"]
    assert CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out.pt2")]).exit_code == 0
    assert load_model(tmp_path / "out.pt2")(batch(5)).shape == (5, 4, 8, 8)


def test_a_fixed_batch_stays_fixed_in_the_onnx_file(tmp_path: Path) -> None:
    torch.export.save(exported(varied(), batch()), tmp_path / "fixed.pt2")
    result = CliRunner().invoke(
        app, ["convert", str(tmp_path / "fixed.pt2"), "--to", "none", "--onnx", str(tmp_path / "x.onnx")]
    )
    assert result.exit_code == 0, result.output
    assert "[4, 3, 8, 8]" in result.stdout
    assert "takes x 4x3x8x8 and no other sizes" in result.stderr
    other = CliRunner().invoke(app, ["inspect", str(tmp_path / "fixed.pt2"), "--input-shape", "1x3x8x8"])
    assert other.exit_code == 2
    assert "Guard failed" in other.stderr


@pytest.fixture(scope="module")
def small_bytes() -> bytes:
    buffer = io.BytesIO()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    torch.export.save(exported(model, batch(2, 8), dynamic=True), buffer)
    return buffer.getvalue()


@pytest.fixture
def small_file(small_bytes: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "small.pt2"
    path.write_bytes(small_bytes)
    return path


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.97])
def test_a_cut_file_is_told_in_a_sentence(small_file: Path, keep: float) -> None:
    small_file.write_bytes(small_file.read_bytes()[: int(keep * small_file.stat().st_size)])
    result = CliRunner().invoke(app, ["inspect", str(small_file)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error[file-")
    assert "Traceback" not in result.stderr


class RanError(Exception):
    """Raised by what a hostile file would run."""


RUN = "__import__('test_exported').run()"


def run() -> None:
    raise RanError


def rewritten(path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """The archive with other records."""
    with zipfile.ZipFile(path) as archive:
        folder = archive.namelist()[0].split("/")[0]
        records = {name.removeprefix(f"{folder}/"): archive.read(name) for name in archive.namelist()}
    change(records)
    target = path.with_name("hostile.pt2")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(f"{folder}/{name}", data)
    return target


def described(edit: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    """A change of the program's description."""

    def change(records: dict[str, bytes]) -> None:
        description = json.loads(records["models/model.json"])
        edit(description)
        records["models/model.json"] = json.dumps(description).encode()

    return change


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return run, ()


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _weights(records: dict[str, bytes]) -> None:
    entry = "data/weights/model_weights_config.json"
    config = json.loads(records[entry])
    config["config"]["0.weight"]["use_pickle"] = True
    records[entry] = json.dumps(config).encode()
    records["data/weights/weight_0"] = pickled(Exploit())


def _node(description: Any) -> Any:
    return description["graph_module"]["graph"]["nodes"][0]


def _signature(description: Any) -> Any:
    return description["graph_module"]["module_call_graph"][0]["signature"]


def _size(description: Any) -> Any:
    sizes = description["graph_module"]["graph"]["tensor_values"]["conv2d"]["sizes"]
    return next(size["as_expr"] for size in sizes if "as_expr" in size)


def _enum(description: Any) -> None:
    spec = {"type": "builtins.dict", "context": '{"__enum__": true, "fqn": "test_exported:X", "name": "Y"}'}
    _signature(description)["out_spec"] = json.dumps([1, {**spec, "children_spec": []}])


HOSTILE: dict[str, Callable[[dict[str, bytes]], None]] = {
    "pickled weight": _weights,
    "legacy weights": lambda r: r.update({"data/weights/model.pt": pickled(Exploit())}),
    "example inputs": lambda r: r.update({"data/sample_inputs/model.pt": pickled(((Exploit(),), {}))}),
    "keys of example inputs": lambda r: r.update(
        {"data/sample_inputs/model.pt": pickled(((), {f'"+{RUN}+"': torch.zeros(1)}))}
    ),
    "custom object": lambda r: r.update({"data/constants/opaque_obj_0": pickled(Exploit())}),
    "compiled library": lambda r: r.update({"data/aotinductor/model/x.so": b"\x7fELF"}),
    "operator": described(lambda d: _node(d).update(target="torch.os.system")),
    "operator of Python": described(lambda d: _node(d).update(target="_operator.methodcaller")),
    "file operator": described(lambda d: _node(d).update(target="torch.ops.aten.from_file.default")),
    "operator as argument": described(
        lambda d: _node(d)["inputs"][0].update(arg={"as_operator": "torch.ops.aten.add.Tensor"})
    ),
    "hidden argument": described(
        lambda d: _node(d)["inputs"][0].update(
            arg={"as_string_to_argument": {"metadata": {"as_operator": "torch.os.system"}}}
        )
    ),
    "argument's name": described(lambda d: _node(d)["inputs"][0].update(name=f"x={RUN}, y")),
    "size": described(lambda d: _size(d).update(expr_str=RUN)),
    "size with a name": described(lambda d: _size(d).update(expr_str="Symbol('s0').__class__")),
    "guard": described(lambda d: d.update(guards_code=[RUN])),
    "guard with a comment": described(lambda d: d.update(guards_code=["1 == 1 # x"])),
    "forward's names": described(lambda d: _signature(d).update(forward_arg_names=[f"x={RUN}"])),
    "parameter's name": described(
        lambda d: d["graph_module"]["signature"]["input_specs"][0]["parameter"].update(parameter_name=f'0.x"+{RUN}+"')
    ),
    "text constant": described(lambda d: _node(d)["inputs"][0].update(arg={"as_string": f"'+{RUN}+'"})),
    "enum": described(_enum),
    "unknown text": described(lambda d: d.update(surprise="text")),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_might_run_code_is_refused_before_it_is_loaded(
    what: str, small_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = rewritten(small_file, HOSTILE[what])
    import torch.export.pt2_archive._package as package

    def load_pt2(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the file was loaded")

    monkeypatch.setattr(package, "load_pt2", load_pt2)
    with pytest.raises(InputError) as caught:
        load_model(hostile)
    assert caught.value.code in ("exported-unsafe", "untrusted-global", "file-damaged")
    assert caught.value.code != "file-damaged" or what == "unknown"


def test_the_hostile_files_differ_from_a_good_one_in_that_alone(small_file: Path) -> None:
    """The control of the refusals: an archive that was only written anew loads."""
    assert load_model(rewritten(small_file, described(lambda d: None)))(batch(3)).shape == (3, 4, 8, 8)


def test_a_hostile_file_runs_in_torchs_own_loader(small_file: Path) -> None:
    """What the check is for: a weight that is pickled is unpickled by torch without a filter."""
    with pytest.raises(RanError):
        torch.export.load(rewritten(small_file, _weights))


@pytest.mark.parametrize(
    "text", ["Symbol('s0', positive=True, integer=True)", "Add(Mul(Integer(2), Symbol('s77')), Integer(-1))"]
)
def test_sizes_are_what_sympy_writes(text: str) -> None:
    assert programs_module._is_size(text)


@pytest.mark.parametrize(
    "text",
    [
        "L['x'].size()[0] >= 3",
        "Eq(Mod(L['x'].size()[2], 2), 0)",
        "max(1, L['x'].size()[3] // 2) != 1",
        "((-2) + L['x'].size()[2]) != 1",
    ],
)
def test_guards_are_what_torch_writes(text: str) -> None:
    assert programs_module._is_guard(text)
