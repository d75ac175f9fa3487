"""The comparator: what it calls equal, what it must not call equal, and what it refuses to compare."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import normswap as ns
from normswap.checks.comparison import TOLERANCES, verify
from normswap.checks.self_check import eval_output, keeps_output
from normswap.checks.verification import Verification
from normswap.deploy.onnx.export import export_onnx
from normswap.errors import InputError, VerificationError
from normswap.runs.arguments import named_leaves

FLOATS = sorted(TOLERANCES, key=str)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()).eval()


def constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def compared(a: Any, b: Any, **options: float) -> Verification:
    """Compare two given outputs."""
    return verify(constant(a), constant(b), torch.zeros(1), **options)


@pytest.fixture
def add_file(tmp_path: Path) -> Path:
    """An ONNX file with inputs x and y, (N, 3), and the output sum = x + 2 y."""
    spec = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3]) for n in ("x", "y", "sum")]
    nodes = [helper.make_node("Add", ["y", "y"], ["twice"]), helper.make_node("Add", ["x", "twice"], ["sum"])]
    graph = helper.make_graph(nodes, "add", spec[:2], spec[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "add.onnx")
    return tmp_path / "add.onnx"


def test_a_model_equals_its_copy() -> None:
    model = network()
    found = verify(model, copy.deepcopy(model), torch.randn(2, 3, 8, 8))
    assert found.ok
    assert (found.max_abs, found.max_rel, found.tolerance) == (0.0, 0.0, TOLERANCES[torch.float32])
    assert [(row.name, row.shape, row.dtype) for row in found.rows] == [("output", (2, 4, 6, 6), "float32")]
    found.raise_if_failed()


def test_one_broken_weight_is_found() -> None:
    model = network()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[0].weight[0, 0, 0, 0] += 1e-3
    found = verify(model, broken, torch.randn(2, 3, 8, 8))
    assert not found.ok
    assert found.max_rel > found.tolerance
    with pytest.raises(VerificationError, match="Sequential and Sequential do not compute the same") as error:
        found.raise_if_failed()
    assert error.value.code == "verification-failed"
    assert error.value.exit_code == 1
    assert "'output' differs by" in error.value.message


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_tolerance_belongs_to_the_dtype_and_scales_with_the_output(dtype: torch.dtype, scale: float) -> None:
    a = torch.tensor([scale, 0.0, -scale / 2], dtype=dtype)
    limit = TOLERANCES[dtype] * float(a.double().abs().max())
    # The middle value, a zero, may differ by as much as any other: the scale is that of the whole output.
    for factor, ok in ((0.9, True), (1.1, False)):
        b = a.clone()
        b[1] = factor * limit
        assert compared(a, b).ok is ok


def test_of_two_dtypes_the_coarser_one_sets_the_tolerance() -> None:
    a = torch.tensor([1.0, 0.3])
    found = compared(a, a.half())
    assert found.ok
    assert found.tolerance == TOLERANCES[torch.float16]
    assert found.rows[0].dtype == "float32/float16"


def test_given_tolerances_replace_the_table() -> None:
    a, b = torch.tensor([10.0]), torch.tensor([10.5])
    assert not compared(a, b).ok
    assert compared(a, b, rtol=0.051).ok
    assert not compared(a, b, rtol=0.049).ok
    assert compared(a, b, rtol=0.0, atol=0.5).ok
    assert not compared(a, b, rtol=0.0, atol=0.49).ok
    assert compared(a, a, rtol=0.0).ok
    assert not compared(a, b, rtol=0.0).ok


def test_an_output_of_zeros_equals_only_zeros() -> None:
    assert compared(torch.zeros(3), torch.zeros(3)).rows[0].ok
    found = compared(torch.zeros(3), torch.full((3,), 1e-6))
    assert not found.ok
    assert found.max_rel == math.inf


def test_nan_is_never_equal_not_even_in_the_same_place() -> None:
    a = torch.tensor([1.0, math.nan])
    for x, y in ((a, a), (a, torch.ones(2)), (torch.ones(2), a)):
        found = compared(x, y)
        assert not found.ok
        assert "NaN" in found.rows[0].reason
        assert found.max_abs == math.inf
    assert not compared(a, a, rtol=1e9, atol=1e9).ok


def test_infinities_must_agree_in_place_and_sign() -> None:
    mask = torch.tensor([2.0, -math.inf, math.inf])
    assert compared(mask, mask.clone()).ok
    assert compared(mask, mask.clone()).rows[0].scale == 2.0
    for other in (mask.neg(), mask.flip(0), mask.nan_to_num()):
        assert not compared(mask, other).ok
        assert not compared(other, mask).ok
    assert not compared(mask, mask + torch.tensor([1.0, 0.0, 0.0])).ok


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.tensor([1, 2, 2**40]), torch.tensor([1, 2, 2**40 + 1])),
        (torch.tensor([2**62]), torch.tensor([2**62 + 1])),  # the same number as float64
        (torch.tensor([True, False]), torch.tensor([True, True])),
        (3, 4),
    ],
)
def test_outputs_that_are_no_floats_are_compared_exactly(a: Any, b: Any) -> None:
    assert compared(a, copy.deepcopy(a)).ok
    assert str(compared(a, a)).count("exact") == 1
    found = compared(a, b)
    assert not found.ok
    assert "must be identical" in found.rows[0].reason


def test_integers_are_not_floats_of_the_same_value() -> None:
    assert not compared(torch.tensor([1]), torch.tensor([1.0])).ok
    assert not compared(torch.tensor([1]), torch.tensor([1], dtype=torch.int32)).ok


def test_outputs_without_a_value_prove_nothing() -> None:
    nothing = compared(torch.zeros(0, 4), torch.zeros(0, 4))
    assert not nothing.ok
    assert nothing.reason == "all outputs are empty: nothing was compared"
    assert not compared(torch.zeros(0, 4), torch.zeros(1, 4)).ok
    assert compared((torch.zeros(0, 4), torch.ones(1)), (torch.zeros(0, 4), torch.ones(1))).ok


@pytest.mark.parametrize("value", [0.0, math.inf, -math.inf])
def test_outputs_of_zeros_or_infinities_alone_prove_nothing(value: float) -> None:
    """Two networks that overflow everywhere, or whose last activation is never reached, may be any two."""
    same = torch.full((2, 3), value)
    found = compared(same, same.clone())
    assert not found.ok
    assert found.proves_nothing
    assert found.reason == "all outputs are zero or infinite: nothing was compared"
    assert "prove nothing" in str(found)
    # The negative controls: one value anywhere is one that was compared, and the number of a class may be 0.
    assert compared((same, torch.ones(1)), (same, torch.ones(1))).ok
    assert not compared((same, torch.ones(1)), (same, torch.zeros(1))).proves_nothing
    assert compared(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)).ok


@pytest.mark.parametrize("zero", [True, False])
def test_a_network_of_zeros_is_not_blamed_and_not_proven(zero: bool) -> None:
    model, x = nn.Sequential(network(), nn.Flatten(), nn.Linear(144, 2)).eval(), torch.randn(2, 3, 8, 8)
    if zero:
        nn.init.zeros_(model[2].weight)
        nn.init.zeros_(model[2].bias)
    found = keeps_output(eval_output(model, (x,)), model, (x,))
    assert (found is None) is zero
    other = keeps_output(torch.ones(2, 2), model, (x,))  # the negative control
    assert other is not None
    assert not other.ok


def test_complex_and_python_outputs_are_compared() -> None:
    z = torch.tensor([1 + 2j])
    assert compared(z, z.clone()).ok
    assert not compared(z, z.conj().resolve_conj()).ok
    assert compared(1.5, 1.5).ok
    assert not compared(1.5, 1.6).ok
    assert not compared("a", "a").ok  # nothing is known of what cannot be measured


@dataclasses.dataclass
class Detection:
    boxes: Tensor
    scores: list[Tensor]
    loss: Tensor | None = None


def test_outputs_are_named_by_their_place_and_none_is_passed_over() -> None:
    x = torch.ones(1)
    assert [name for name, _ in named_leaves(x)] == ["output"]
    assert [name for name, _ in named_leaves((x, None, [x, {"k": x}]))] == [
        "output_0",
        "output_2_0",
        "output_2_1_k",
    ]
    assert [name for name, _ in named_leaves({"a": x, "b": Detection(x, [x, x])})] == [
        "a",
        "b_boxes",
        "b_scores_0",
        "b_scores_1",
    ]
    assert [name for name, _ in named_leaves(Detection(x, [x], x))] == ["boxes", "scores_0", "loss"]


def test_each_output_is_judged_by_its_own_magnitude() -> None:
    large, small = torch.full((2,), 1e6), torch.full((2,), 1e-3)
    found = compared({"large": large, "small": small}, {"large": large, "small": small * 1.01})
    assert [(row.name, row.ok) for row in found.rows] == [("large", True), ("small", False)]
    assert not found.ok


def test_outputs_of_the_same_names_are_paired_by_name() -> None:
    a, b = torch.tensor([1.0]), torch.tensor([2.0])
    assert compared({"a": a, "b": b}, {"b": b, "a": a}).ok
    assert not compared({"a": a, "b": b}, {"b": a, "a": b}).ok


@pytest.mark.parametrize("other", [(torch.ones(2),), {"a": torch.ones(2), "c": torch.ones(2)}, torch.ones(2), None])
def test_another_structure_is_a_failed_verification(other: Any) -> None:
    found = compared({"a": torch.ones(2), "b": torch.ones(2)}, other)
    assert not found.ok
    assert "a returns 2 outputs (a, b)" in found.reason
    assert found.max_rel == math.inf


def test_another_shape_is_a_failed_verification() -> None:
    found = compared(torch.ones(2, 1), torch.ones(2))  # would broadcast
    assert not found.ok
    assert found.rows[0].reason == "has shape [2, 1] in a, [2] in b"


def test_a_comparison_of_nothing_has_failed() -> None:
    assert not compared(None, {}).ok


def test_a_module_in_train_mode_is_refused() -> None:
    model = network()
    model[2].train()
    for a, b in ((model, network()), (network(), model)):
        with pytest.raises(InputError, match="is in train mode \\('2' and 0 more modules") as error:
            verify(a, b, torch.randn(1, 3, 8, 8))
        assert error.value.code == "verify-train-mode"
        assert error.value.hint == "call model.eval() before verify()"
    assert model[2].training


def test_verify_leaves_modules_inputs_and_random_state_untouched() -> None:
    class Restless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x.mul_(2), training=True)

    model, x = nn.Sequential(nn.Linear(3, 3), Restless()).eval(), torch.ones(4, 3, requires_grad=True)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    # Both runs draw the same random numbers, and neither sees what the other did to its inputs.
    assert verify(model, model, x).ok
    assert verify(Restless().eval(), Restless().eval(), x).ok
    assert torch.equal(x, torch.ones(4, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())


def test_inputs_may_be_arrays_sequences_or_keywords() -> None:
    def reference(x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return x - y * scale

    x, y = torch.randn(2, 3), torch.randn(2, 3)
    for inputs in ((x, y), [x.numpy(), y.numpy()], {"y": y, "x": x, "scale": 1.0}):
        assert verify(reference, lambda x, y, scale=1.0: x - y, inputs).ok
        assert not verify(reference, lambda x, y, scale=1.0: y - x, inputs).ok
    assert verify(torch.sin, lambda x: np.sin(x.numpy()), torch.ones(3)).rows[0].name == "output"


def test_a_forward_that_fails_is_an_input_error_without_a_traceback() -> None:
    with pytest.raises(InputError, match="Sequential failed on the given inputs: RuntimeError") as error:
        verify(network(), network(), torch.randn(2, 5, 8, 8))
    assert error.value.code == "verify-forward"
    with pytest.raises(InputError, match="a int, which cannot be run"):
        verify(3, network(), torch.zeros(1))  # type: ignore[arg-type]


def test_an_onnx_file_is_run_with_inputs_by_position_or_by_name(add_file: Path) -> None:
    def model(x: Tensor, y: Tensor) -> Tensor:
        return x + 2 * y

    x, y = torch.randn(4, 3), torch.randn(4, 3)
    assert verify(model, add_file, (x, y)).ok
    assert verify(model, str(add_file), {"y": y, "x": x}).ok
    assert verify(add_file, add_file, (x, y)).ok
    assert not verify(lambda x, y: y + 2 * x, add_file, (x, y)).ok
    found = verify(add_file, model, (x.numpy(), y.numpy()))
    assert (found.a, found.b, found.rows[0].name) == ("add.onnx", "model", "sum")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(4, 3), "add.onnx: got 1 input tensors"),
        ((torch.randn(4, 3), torch.randn(4, 2)), "got float32 [4, 2] for 'y'"),
        ((torch.randn(3), torch.randn(4, 3)), "got float32 [3] for 'x'"),
        ((torch.randn(4, 3), torch.zeros(4, 3, dtype=torch.long)), "got int64 [4, 3] for 'y'"),
        ({"x": torch.randn(4, 3), "z": torch.randn(4, 3)}, "got the inputs x, z"),
    ],
)
def test_inputs_that_do_not_fit_an_onnx_file_are_refused_with_what_it_takes(
    add_file: Path, inputs: Any, message: str
) -> None:
    with pytest.raises(InputError) as error:
        verify(add_file, add_file, inputs)
    assert message in error.value.message
    assert error.value.code == "onnx-inputs"
    assert error.value.hint == "the file takes x: float32 [N, 3], y: float32 [N, 3]"


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.to(torch.float8_e4m3fn),
        lambda x: x.to(torch.float8_e5m2),
        lambda x: x.to(torch.complex64).conj(),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: x.to_mkldnn(),
    ],
    ids=["e4m3", "e5m2", "conjugated", "quantized", "sparse", "csr", "mkldnn"],
)
@pytest.mark.filterwarnings("ignore")  # torch calls some of these forms a prototype
def test_outputs_in_other_forms_are_compared(form: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3)
    assert verify(form, form, x).ok
    assert not verify(form, lambda x: form(1.5 * x), x).ok  # the negative control


@pytest.mark.parametrize(
    ("form", "reason"),
    [(lambda x: x.to("meta"), "meta device"), (lambda x: torch.nested.nested_tensor(list(x)), "nested")],
)
@pytest.mark.filterwarnings("ignore")
def test_outputs_without_a_form_to_compare_are_named(form: Callable[[Tensor], Tensor], reason: str) -> None:
    found = verify(form, form, torch.randn(2, 3))
    assert not found.ok
    assert reason in found.failure
    assert verify(lambda x: x, lambda x: x, torch.randn(2, 3)).ok  # the negative control


@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_an_infinite_tolerance_is_refused(name: str) -> None:
    for value in (math.inf, math.nan, -1.0):
        with pytest.raises(InputError, match="finite number") as error:
            compared(torch.ones(1), torch.zeros(1), **{name: value})
        assert error.value.code == "option-type"
    assert compared(torch.ones(1), torch.zeros(1), **{name: 1e9}).ok  # the negative control


@pytest.mark.parametrize("nan", [True, False])
def test_an_original_whose_own_output_holds_nan_is_blamed_itself(nan: bool) -> None:
    class Ends(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(super().forward(x) > 1e9, 1.0, math.nan) if nan else super().forward(x)

    model, x = Ends(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(2, 3, 6, 6)
    for run in (lambda: ns.convert(model, to="wn", example_inputs=(x,)), lambda: ns.fold(model, example_inputs=(x,))):
        if not nan:  # the negative control
            run()
            continue
        with pytest.raises(InputError, match="original's own output holds NaN") as error:
            run()
        assert error.value.code == "output-nan"


class Mapped(nn.Module):
    """One input that is a dict, whose tensors have different weights."""

    def forward(self, d: dict[str, Any], x: Tensor) -> Tensor:
        return d["a"] - 2 * d["b"][0] + 3 * d["b"][1] + 5 * x


def test_the_tensors_of_a_dict_go_to_the_inputs_of_their_names(tmp_path: Path) -> None:
    a, b, c, x = torch.randn(4, 2, 3)
    export_onnx(Mapped().eval(), tmp_path / "m.onnx", example_inputs=({"b": [b, c], "a": a}, x))
    for inputs in (({"b": [b, c], "a": a}, x), ({"a": a, "b": [b, c]}, x), {"x": x, "d": {"a": a, "b": [b, c]}}):
        assert verify(Mapped().eval(), tmp_path / "m.onnx", inputs).ok
    swapped = verify(  # the negative control
        lambda d, x: Mapped()({"a": d["b"][0], "b": [d["a"], d["b"][1]]}, x),
        tmp_path / "m.onnx",
        ({"a": a, "b": [b, c]}, x),
    )
    assert not swapped.ok


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no protobuf")
    (tmp_path / "weights.pt").write_bytes(b"")
    cases = {
        tmp_path / "absent.onnx": "onnx-missing",
        tmp_path / "weights.pt": "onnx-missing",
        broken: "onnx-load",
    }
    for path, code in cases.items():
        with pytest.raises(InputError) as error:
            verify(network(), path, torch.randn(1, 3, 8, 8))
        assert error.value.code == code
        assert str(path) in error.value.message


def test_the_record_prints_as_a_table() -> None:
    found = compared((torch.ones(2, 3), torch.tensor([1, 2])), (torch.ones(2, 3), torch.tensor([1, 3])))
    assert str(found).splitlines() == [
        "<lambda> and <lambda> DIFFER: 5.0e-01 of the output's magnitude (allowed 2e-05)",
        "",
        "output    shape  dtype    max |a−b|  max |a|  relative  allowed  result",
        "────────  ─────  ───────  ─────────  ───────  ────────  ───────  "
        "─────────────────────────────────────────────────",
        "output_0  2×3    float32  0.0e+00    1.0e+00  0.0e+00   2e-05    ok",
        "output_1  2      int64    1.0e+00    2.0e+00  5.0e-01   exact    "
        "differs in 1 of 2 values, which must be identical",
    ]


def test_the_record_turns_to_valid_json() -> None:
    record = json.loads(compared(torch.ones(2), torch.full((2,), math.nan)).to_json())
    assert record["ok"] is False
    assert record["max_abs"] is None
    assert record["rows"][0]["name"] == "output"
    assert record["rows"][0]["shape"] == [2]
    assert json.loads(compared(torch.ones(2), torch.ones(2)).to_json())["ok"] is True


def test_importing_the_comparator_does_not_load_onnxruntime() -> None:
    code = "import sys, normswap.checks.comparison; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Chaotic(nn.Module):
    """Doubles every error twenty times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)).sigmoid()
        for _ in range(20):
            y = 4 * y * (1 - y)
        return y


def test_a_network_that_is_chaotic_in_double_precision_is_allowed_its_rounding_and_no_error() -> None:
    torch.manual_seed(0)
    model = Chaotic().eval().double()
    inputs = (torch.randn(2, 3, 8, 8, dtype=torch.float64),)
    expected = eval_output(model, inputs)
    found: list[Verification] = []
    for change in (4e-15, 4e-13):  # both far below what a wrong constant is off
        moved = copy.deepcopy(model)
        with torch.no_grad():
            moved.conv.weight *= 1 + change
        check = keeps_output(expected, moved, inputs)
        assert check is not None
        found.append(check)
    assert [check.ok for check in found] == [True, False]
    assert found[0].max_rel > 1e-9, "or the test tests nothing"
