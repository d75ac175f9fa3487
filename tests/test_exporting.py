"""The ONNX file: what is in it, that it computes what the model does, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from normswap.checks.comparison import verify
from normswap.demo.network import DigitsResNet
from normswap.deploy.onnx import export, lowering, trials, weights
from normswap.deploy.onnx.export import export_onnx
from normswap.deploy.onnx.inputs import resized
from normswap.deploy.onnx.weights import weight_arithmetic
from normswap.errors import ExportError, InputError, VerificationError
from normswap.nn import ChannelLayerNorm, MeanOnlyBatchNorm

GROUP_NORM = ["Reshape", "InstanceNormalization", "Shape", "Reshape", "BatchNormalization"]
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def randomized(model: nn.Module) -> nn.Module:
    """Return the model in eval mode, its norms' γ of both signs and with zeros, its β not zero."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            with torch.no_grad():
                module.weight[::3] = 0.0
    return model.eval()


def network(groups: int = 2, channels: int = 4) -> nn.Module:
    return randomized(nn.Sequential(nn.Conv2d(3, channels, 3), nn.GroupNorm(groups, channels), nn.ReLU()))


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


class TwoInputs(nn.Module):
    """Two inputs, one option, outputs in a dict; the file's names should be these."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, image: Tensor, vector: Tensor, gain: float = 1.0, mask: Tensor | None = None) -> dict[str, Any]:
        mixed = self.norm(self.image(image)) * self.vector(vector)[:, :, None, None] * gain
        return {"mixed": mixed, "pooled": (mixed.mean((2, 3)), None), "vector": vector, "shape": vector + 1}


class PerPosition(nn.Module):
    """LayerNorm over the channels of each position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 200)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x).permute(0, 2, 3, 1)))


class StandardizedConv(nn.Conv2d):
    """A user's own weight standardization, which has no parametrization to fold."""

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)


@pytest.mark.parametrize("opset", [18, 20])
@pytest.mark.parametrize("spatial", [0, 1, 2, 3])
def test_group_norm_below_opset_21_has_one_batch_normalization_for_its_affine(
    tmp_path: Path, opset: int, spatial: int
) -> None:
    layer = CONV[spatial](3, 8, 3) if spatial else nn.Linear(3, 8)
    model = randomized(nn.Sequential(layer, nn.GroupNorm(2, 8), nn.ReLU()))
    x = torch.randn(2, 3, *(6,) * spatial)
    artifact = export_onnx(model, tmp_path / "m.onnx", example_inputs=x, opset=opset)
    assert artifact.opset == opset
    assert sorted(operators(artifact.path)) == sorted([*GROUP_NORM, "Conv" if spatial else "Gemm", "Relu"])
    # BatchNormalization adds no rounding of its own beyond that of γ·x + β: a few float32 roundings in all.
    assert artifact.verification is not None
    assert artifact.verification.max_rel < 2e-6


def test_from_opset_21_on_group_norm_is_one_operator(tmp_path: Path) -> None:
    artifact = export_onnx(network(), tmp_path / "m.onnx", example_inputs=torch.randn(2, 3, 6, 6), opset=21)
    assert operators(artifact.path) == ["Conv", "GroupNormalization", "Relu"]
    assert artifact.opset == 21


@pytest.mark.parametrize(("groups", "channels"), [(1, 8), (8, 8), (2, 8), (1, 1), (3, 3)])
def test_every_grouping_is_lowered(tmp_path: Path, groups: int, channels: int) -> None:
    model = network(groups, channels)
    artifact = export_onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 3, 6, 6))
    assert artifact.ops["BatchNormalization"] == 1
    assert not {"Mul", "Add"} & set(artifact.ops)
    graph = onnx.load(artifact.path).graph
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used


@pytest.mark.parametrize("last", [True, False])
def test_group_norm_without_an_affine_needs_no_operator_for_it(tmp_path: Path, last: bool) -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4, affine=False), *([] if last else [nn.ReLU()])]
    model = nn.Sequential(*layers).eval()
    artifact = export_onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 3, 6, 6))
    # The graph's own output keeps its name by keeping its operator.
    assert sorted(operators(artifact.path)) == sorted(["Conv", *(GROUP_NORM if last else [*GROUP_NORM[:4], "Relu"])])


def normalized(x: Tensor) -> Tensor:
    """Return ``x``, (N, 4, 4, 4), normalized: in the file an InstanceNormalization and a Reshape, no more."""
    return nn.functional.instance_norm(x.flatten(2)).view(-1, 4, 4, 4)


class SharedProduct(nn.Module):
    """The map between γ and β is read a second time: Mul and Add must stay apart."""

    def __init__(self, returned: bool) -> None:
        super().__init__()
        self.returned = returned

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        product = normalized(x) * torch.arange(4.0).view(4, 1, 1)
        return product + torch.ones(4, 1, 1), product if self.returned else product.relu()


class LastAxisAffine(nn.Module):
    """Mul and Add after the normalization along the last axis, which is as long as the channel axis."""

    def forward(self, x: Tensor) -> Tensor:
        return normalized(x) * torch.tensor([1.0, -2.0, 0.0, 3.0]) + torch.arange(4.0)


@pytest.mark.parametrize(
    "model",
    [SharedProduct(False), SharedProduct(True), LastAxisAffine()],
    ids=["read", "returned", "last axis"],
)
def test_other_arithmetic_after_a_normalization_is_not_lowered(tmp_path: Path, model: nn.Module) -> None:
    artifact = export_onnx(model.eval(), tmp_path / "m.onnx", example_inputs=torch.randn(2, 4, 4, 4))
    assert artifact.ops["Mul"] == artifact.ops["Add"] == 1


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (PerPosition(), (2, 3, 6, 6)),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.GroupNorm(4, 4), nn.Conv2d(4, 8, 1)), (2, 4, 6, 6)),
        (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.GroupNorm(3, 6)), (2, 4, 5, 5)),
        (nn.Sequential(nn.ConvTranspose1d(4, 6, 3), ChannelLayerNorm(6), nn.ReLU()), (2, 4, 5)),
        (DigitsResNet(), (1, 1, 8, 8)),
    ],
    ids=["LayerNorm", "depthwise", "ConvTranspose2d", "ChannelLayerNorm", "demo network"],
)
def test_the_file_computes_what_the_model_does(tmp_path: Path, model: nn.Module, shape: tuple[int, ...]) -> None:
    model = randomized(model)
    artifact = export_onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(*shape))
    assert weight_arithmetic(onnx.load(artifact.path)) == []
    batch = max(shape[0], 2) + 1
    assert artifact.verification is not None
    assert [row.name for row in artifact.verification.rows] == ["output", f"output (batch {batch})"]
    assert [row.shape[0] for row in artifact.verification.rows] == [shape[0], batch]
    x = torch.randn(5, *shape[1:])
    assert verify(model, artifact.path, x).ok
    with torch.no_grad():  # the comparison above can fail
        list(model.parameters())[-1][-1] += 0.1
    assert not verify(model, artifact.path, x).ok


@pytest.mark.parametrize("keywords", [True, False])
def test_inputs_and_outputs_have_the_names_that_the_model_gives_them(tmp_path: Path, keywords: bool) -> None:
    model = randomized(TwoInputs())
    image, vector = torch.randn(2, 3, 6, 6), torch.randn(2, 5)
    inputs = {"vector": vector, "image": image, "gain": 2.0, "mask": None} if keywords else (image, vector)
    artifact = export_onnx(model, tmp_path / "m.onnx", example_inputs=inputs)
    assert [str(spec) for spec in artifact.inputs] == [
        "image: float32 [batch, 3, 6, 6]",
        "vector: float32 [batch, 5]",
    ]
    # A name can be given once: the output that is an input gets another.
    assert [spec.name for spec in artifact.outputs] == ["mixed", "pooled_0", "vector_out", "shape"]
    assert verify(model, artifact.path, inputs).ok


def test_inputs_in_a_list_and_inputs_that_are_not_used_are_kept(tmp_path: Path) -> None:
    class Listed(nn.Module):
        def forward(self, maps: list[Tensor], extra: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return maps[0] + maps[1], maps[1] * 2

    x = torch.randn(2, 3)
    artifact = export_onnx(Listed().eval(), tmp_path / "m.onnx", example_inputs=([x, x + 1], {"k": x}))
    assert [spec.name for spec in artifact.inputs] == ["maps_0", "maps_1", "extra_k"]
    assert [spec.name for spec in artifact.outputs] == ["output_0", "output_1"]


def test_the_batch_is_fixed_on_request(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 6, 6)
    artifact = export_onnx(network(), tmp_path / "m.onnx", example_inputs=x, dynamic_batch=False)
    assert artifact.inputs[0].shape == (2, 3, 6, 6)
    assert artifact.verification is not None
    assert len(artifact.verification.rows) == 1


def test_the_spatial_axes_are_dynamic_on_request(tmp_path: Path) -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.MaxPool2d(2)))
    x = torch.randn(1, 3, 16, 16)
    artifact = export_onnx(model, tmp_path / "m.onnx", example_inputs=x, dynamic_spatial=True)
    assert artifact.inputs[0].shape == ("batch", 3, "height", "width")
    assert artifact.ops["BatchNormalization"] == 1
    assert artifact.verification is not None
    assert [row.name for row in artifact.verification.rows] == [
        "output",
        "output (batch 3)",
        "output (larger)",
    ]
    assert verify(model, artifact.path, torch.randn(3, 3, 21, 18)).ok


class FixedBatch(nn.Module):
    """Adds one row per sample: a batch size that is built in."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rows


def test_a_batch_size_that_is_built_in_is_refused_with_a_hint(tmp_path: Path) -> None:
    model, path = FixedBatch().eval(), tmp_path / "m.onnx"
    with pytest.raises(ExportError) as error:
        export_onnx(model, path, example_inputs=torch.randn(4, 3))
    assert "dynamic_batch=False" in error.value.hint
    assert not any(tmp_path.iterdir())
    assert export_onnx(model, path, example_inputs=torch.randn(4, 3), dynamic_batch=False).path.exists()


class Branching(nn.Module):
    """Doubles its output where a condition on the input's shape holds."""

    def __init__(self, condition: Callable[[torch.Size], bool]) -> None:
        super().__init__()
        self.conv, self.condition = nn.Conv2d(3, 4, 3), condition

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.conv(x).mean((2, 3))
        return pooled * 2 if self.condition(x.shape) else pooled


@pytest.mark.parametrize(
    ("condition", "spatial", "where"),
    [
        (lambda shape: shape[0] == 1, False, "batch 1"),
        (lambda shape: shape[0] >= 4, False, "batch ≤ 3"),
        (lambda shape: shape[0] == 9, False, "batch 9"),
        (lambda shape: shape.numel() > 5000, False, "batch <= 625"),
        (lambda shape: shape[2] == shape[3], True, "height = width"),
        (lambda shape: shape[3] >= 30, True, "width ≤ 29"),
    ],
    ids=["one", "bound", "excepted", "product", "square", "map"],
)
def test_a_file_that_would_be_wrong_beyond_a_branch_on_a_size_is_refused(
    tmp_path: Path, condition: Callable[[torch.Size], bool], spatial: bool, where: str
) -> None:
    model, x = Branching(condition).eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(VerificationError, match="unlike the example's") as error:
        export_onnx(model, tmp_path / "m.onnx", example_inputs=x, dynamic_spatial=spatial)
    assert where in error.value.message
    assert ("dynamic_spatial=False" if spatial else "dynamic_batch=False") in error.value.hint
    assert not any(tmp_path.iterdir())
    static = export_onnx(model, tmp_path / "m.onnx", example_inputs=x, dynamic_batch=False)
    assert verify(model, static.path, x).ok


@pytest.mark.parametrize(
    "model",
    [
        Branching(lambda shape: len(shape) == 4),  # a branch on no size
        Branching(lambda shape: shape[0] < 0),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.LayerNorm(36)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ],
    ids=["rank", "never", "fixed-map", "pooled"],
)
def test_a_model_that_runs_alike_at_all_sizes_is_exported(tmp_path: Path, model: nn.Module) -> None:
    model = model.eval()
    artifact = export_onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 3, 8, 8))
    assert artifact.inputs[0].shape == ("batch", 3, 8, 8)
    for batch in (1, 4, 40):
        assert verify(model, artifact.path, torch.randn(batch, 3, 8, 8)).ok


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x).mean(1) * 2


def test_sizes_on_which_the_model_itself_does_not_run_need_not_be_exported(tmp_path: Path) -> None:
    artifact = export_onnx(
        Square().eval(), tmp_path / "m.onnx", example_inputs=torch.randn(2, 3, 8, 8), dynamic_spatial=True
    )
    assert artifact.inputs[0].shape[2] == artifact.inputs[0].shape[3]
    with pytest.raises(InputError):  # the negative control: there is nothing to compare the file with
        verify(Square().eval(), artifact.path, torch.randn(2, 3, 8, 12))


def test_inputs_without_a_common_batch_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="image 2, vector 1") as error:
        export_onnx(
            TwoInputs().eval(),
            tmp_path / "m.onnx",
            example_inputs=(torch.randn(2, 3, 6, 6), torch.randn(1, 5)),
        )
    assert error.value.hint == "pass dynamic_batch=False"


def train_mode() -> nn.Module:
    model = network()
    model[1].train()
    return model


def legacy_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(model := network()[0])
    return nn.Sequential(model).eval()


UNREADY: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "train mode": (train_mode, "export-train-mode", "call model.eval() before export_onnx()"),
    "parametrization": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3))).eval(),
        "export-unfolded",
        "fold it first: normswap.fold(model)",
    ),
    "weight_norm hook": (legacy_weight_norm, "export-unfolded", "fold it first: normswap.fold(model)"),
    "module of normswap": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), MeanOnlyBatchNorm(4)).eval(),
        "export-unfolded",
        "fold it first: normswap.fold(model), with example_inputs=",
    ),
}


@pytest.mark.parametrize("name", UNREADY)
def test_a_model_that_is_not_ready_is_refused_before_anything_happens(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, code, hint = UNREADY[name]
    model = make()
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: pytest.fail("exported"))
    with pytest.raises(ExportError) as error:
        export_onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 3, 6, 6))
    assert (error.value.code, error.value.hint) == (code, hint)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "kind", "code"),
    [
        ({"opset": 17}, ExportError, "export-opset"),
        ({"opset": 999}, ExportError, "export-opset"),
        ({"path": "m.pt"}, ExportError, "export-path"),
        ({"path": "absent/m.onnx"}, InputError, "output-path"),
        ({"example_inputs": ()}, InputError, "export-inputs"),
        ({"example_inputs": {"nope": torch.zeros(1)}}, InputError, "export-inputs"),
        ({"example_inputs": 3.0}, InputError, "export-inputs"),
        ({"example_inputs": torch.zeros(2, 5, 6, 6)}, InputError, "export-forward"),
        ({"model": "resnet"}, InputError, "export-model"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(tmp_path: Path, change: dict[str, Any], kind: type[Exception], code: str) -> None:
    arguments = {"model": network(), "path": "m.onnx", "example_inputs": torch.zeros(2, 3, 6, 6)} | change
    arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(kind) as error:
        export_onnx(**arguments)
    assert error.value.code == code  # type: ignore[attr-defined]
    assert not any(tmp_path.iterdir())


def test_a_model_that_torch_cannot_export_is_an_error_of_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class DataDependent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(ExportError, match="torch cannot export DataDependent: Could not guard") as error:
        export_onnx(DataDependent().eval(), tmp_path / "m.onnx", example_inputs=torch.ones(2, 3))
    assert error.value.code == "export-failed"
    assert "\n" not in error.value.message
    assert error.value.__cause__ is not None
    assert capfd.readouterr() == ("", "")
    assert not any(tmp_path.iterdir())


def test_an_export_is_silent_and_leaves_logging_and_the_model_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, x = network(), torch.randn(1, 3, 6, 6)
    before, level, state = (
        copy.deepcopy(model.state_dict()),
        logging.root.manager.disable,
        torch.get_rng_state(),
    )
    export_onnx(model, tmp_path / "m.onnx", example_inputs=x, opset=20)
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == level
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_the_file_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    path = export_onnx(network(), tmp_path / "m.onnx", example_inputs=torch.randn(2, 3, 6, 6)).path
    assert os.path.dirname(torch.__file__).encode() not in path.read_bytes()
    assert str(Path(__file__).parent).encode() not in path.read_bytes()


def test_a_failed_verification_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"the old file")
    merge = lowering._merge_affine

    def wrong(model: Any, x: Any, multiply: Any, add: Any) -> None:
        merge(model, x, multiply, add)
        value = next(v for name, v in model.graph.initializers.items() if name.endswith("/scale"))
        value.const_value = exporting_tensor(value.const_value.numpy() * 1.001)

    def exporting_tensor(array: Any) -> Any:
        import onnx_ir

        return onnx_ir.tensor(array)

    monkeypatch.setattr(lowering, "_merge_affine", wrong)
    with pytest.raises(VerificationError, match="'output' differs by") as error:
        export_onnx(network(), path, example_inputs=torch.randn(2, 3, 6, 6))
    assert error.value.code == "export-mismatch"
    assert path.read_bytes() == b"the old file"
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    monkeypatch.undo()
    assert export_onnx(network(), path, example_inputs=torch.randn(2, 3, 6, 6)).path == path
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    onnx.checker.check_model(path)


def test_a_file_that_would_be_too_large_gets_its_weights_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SINGLE_FILE_LIMIT", 0)
    model, x = network(), torch.randn(2, 3, 6, 6)
    artifact = export_onnx(model, tmp_path / "m.onnx", example_inputs=x)
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    assert verify(model, artifact.path, x).ok


def unlike_each_other(samples: Tensor) -> bool:
    return len(torch.unique(samples, dim=0)) == len(samples)


def test_repeated_samples_are_made_different_from_each_other() -> None:
    given = {"x": torch.arange(12.0).reshape(2, 2, 3), "named": [torch.arange(6.0).reshape(2, 3)], "flag": 7}
    for batch in (1, 2, 3, 5):
        found = resized(given, batch)
        assert found["x"].shape == (batch, 2, 3)
        assert torch.equal(found["x"][:2], given["x"][:batch])  # type: ignore[index]
        assert unlike_each_other(found["x"])
        assert unlike_each_other(found["named"][0])
        assert found["flag"] == 7
    assert not unlike_each_other(given["x"][[0, 1, 0]])  # type: ignore[index]  # the negative control


def test_no_two_samples_of_an_exports_trials_are_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that mixes a batch's samples up is found only by samples that differ."""
    tried: list[Tensor] = []

    def seen(a: Any, b: Any, inputs: Any, **options: Any) -> Any:
        tried.append(inputs["x"])
        return verify(a, b, inputs, **options)

    class Named(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    monkeypatch.setattr(trials, "verify", seen)
    export_onnx(Named().eval(), tmp_path / "m.onnx", example_inputs=torch.randn(1, 3, 6, 6))
    assert [len(x) for x in tried] == [1, 3, 5]
    assert all(map(unlike_each_other, tried))


def test_a_model_that_returns_zeros_alone_is_not_verified_by_them(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(2, 3, 6, 6)
    nn.init.constant_(model[0].bias, -99.0)
    with pytest.raises(VerificationError, match="zero or infinite: nothing was compared") as error:
        export_onnx(model, tmp_path / "m.onnx", example_inputs=x)
    assert "verify_outputs=False" in error.value.hint
    assert export_onnx(model, tmp_path / "m.onnx", example_inputs=x, verify_outputs=False).path.exists()
    proven = export_onnx(model, tmp_path / "m.onnx", example_inputs=100 * x).verification  # the negative control
    assert proven is not None
    assert proven.ok


class Ends(nn.Module):
    """A layer and what a model may do with its output."""

    def __init__(self, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, 4, 3), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.conv(x))


@dataclasses.dataclass
class Pair:
    one: Tensor
    two: Tensor


@pytest.mark.parametrize(
    ("end", "hint"),
    [
        (nn.functional.dropout, "training=self.training"),
        (lambda x: x + torch.randn_like(x), "random numbers in eval mode"),
        (lambda x: torch.where(x > 1e9, x, math.nan), "own output holds NaN"),
        (lambda x: Pair(x, x + 1), "in a tuple or a dict instead of Pair"),
    ],
    ids=["dropout", "noise", "nan", "dataclass"],
)
def test_what_the_model_itself_does_wrong_is_named(tmp_path: Path, end: Callable[[Tensor], Any], hint: str) -> None:
    with pytest.raises((ExportError, VerificationError)) as error:
        export_onnx(Ends(end).eval(), tmp_path / "m.onnx", example_inputs=torch.randn(2, 3, 6, 6))
    assert hint in error.value.hint
    assert "dynamic_batch" not in error.value.hint
    plain = Ends(lambda x: {"one": x, "two": x + 1}).eval()  # the negative control
    assert export_onnx(plain, tmp_path / "m.onnx", example_inputs=torch.randn(2, 3, 6, 6)).path.exists()


@pytest.mark.parametrize("size", [0, 1])
def test_an_example_of_size_0_is_refused(tmp_path: Path, size: int) -> None:
    for shape, options in (
        ((size, 3, 6, 6), {}),
        ((2, size, 6), {"dynamic_time": True}),
        ((2, 3, size), {"dynamic_spatial": True}),
    ):
        run = functools.partial(
            export_onnx,
            nn.Softplus().eval(),
            tmp_path / "m.onnx",
            example_inputs=torch.randn(shape),
            **options,  # type: ignore[arg-type]
        )
        if size:  # the negative control
            assert run().path.exists()
            continue
        with pytest.raises(InputError, match="size 0") as error:
            run()
        assert error.value.code == "export-inputs"


def test_verification_can_be_left_out(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 6, 6)
    artifact = export_onnx(network(), tmp_path / "m.onnx", example_inputs=x, verify_outputs=False)
    assert artifact.verification is None
    assert verify(network(), artifact.path, x).rows


def test_weights_that_a_user_computes_are_folded_into_constants(tmp_path: Path) -> None:
    # 36,864 values: more than torch.onnx folds by itself.
    model = nn.Sequential(StandardizedConv(64, 64, 3), nn.GroupNorm(4, 64), nn.ReLU())
    artifact = export_onnx(randomized(model), tmp_path / "m.onnx", example_inputs=torch.randn(2, 64, 6, 6))
    assert sorted(operators(artifact.path)) == sorted(["Conv", *GROUP_NORM, "Relu"])


def test_weight_arithmetic_that_is_left_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_fold_constants", lambda model: None)
    with pytest.raises(ExportError, match="1 weights are computed in the graph; the first: Conv") as error:
        export_onnx(
            StandardizedConv(64, 64, 3).eval(),
            tmp_path / "m.onnx",
            example_inputs=torch.randn(2, 64, 6, 6),
        )
    assert error.value.code == "export-weight-arithmetic"
    assert not any(tmp_path.iterdir())


def conv_graph(*nodes: onnx.NodeProto, weight: str) -> onnx.ModelProto:
    """Return a model of one convolution whose weight is ``weight``; ``nodes`` may compute it from v and g."""
    values = {
        "v": np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32),
        "g": np.ones((4, 1, 1, 1), np.float32),
        "axes": np.array([1, 2, 3], np.int64),
    }
    graph = helper.make_graph(
        [*nodes, helper.make_node("Conv", ["x", weight], ["y"], name="conv")],
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 6, 6])],
        [numpy_helper.from_array(array, name) for name, array in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_weight_arithmetic_finds_an_unfolded_weight_norm() -> None:
    weight_norm = [  # w = g v / ‖v‖
        helper.make_node("ReduceL2", ["v", "axes"], ["norm"]),
        helper.make_node("Div", ["v", "norm"], ["direction"]),
        helper.make_node("Mul", ["g", "direction"], ["w"]),
    ]
    unfolded = conv_graph(*weight_norm, weight="w")
    onnx.checker.check_model(unfolded, full_check=True)
    assert weight_arithmetic(unfolded) == ["Conv 'conv' has a weight computed by Mul"]
    assert weight_arithmetic(conv_graph(weight="v")) == []


def test_a_weight_that_depends_on_the_input_is_no_weight_arithmetic() -> None:
    dynamic = [
        helper.make_node("ReduceMean", ["x"], ["mean"]),
        helper.make_node("Mul", ["v", "mean"], ["w"]),
    ]
    assert weight_arithmetic(conv_graph(*dynamic, weight="w")) == []


def test_the_artifact_prints_what_was_written(tmp_path: Path) -> None:
    artifact = export_onnx(network(), tmp_path / "m.onnx", example_inputs=torch.randn(1, 3, 6, 6))
    lines = str(artifact).splitlines()
    assert lines[:4] == [
        f"{tmp_path / 'm.onnx'} (opset 18)",
        "  in   input: float32 [batch, 3, 6, 6]",
        "  out  output: float32 [batch, 4, 4, 4]",
        "  ops  Reshape 2, Conv 1, InstanceNormalization 1, Shape 1, BatchNormalization 1, Relu 1",
    ]
    assert lines[4].split()[:3] == ["InstanceNormalization", "with", "BatchNormalization"]
    assert lines[6].startswith("Sequential and m.onnx agree")
    assert artifact.verification is not None
    assert json.loads(artifact.verification.to_json())["ok"] is True
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    assert "GroupNorm" not in str(export_onnx(plain, tmp_path / "p.onnx", example_inputs=torch.randn(1, 3, 6, 6)))
