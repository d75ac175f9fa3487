"""Forwards that ask for sizes, classes and texts of what they compute, and that write to it: no conversion is wrong."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import distance
from torch import Tensor, nn
from zoo import randomize_

import normswap as ns
from normswap.errors import ExportError, NothingToConvertError, VerificationError
from normswap.graph import capture_symbolic
from normswap.graph.perturbation import confirm_feeds
from normswap.runs.other_sizes import other_sizes
from normswap.runs.sizes import Condition, breaking

EXACT = 1e-12  # double precision and a network of three layers; a lost branch is a good part of the output
SCALES = {1: 3.0, 2: 0.5, 14: -1.0}


class Net(nn.Module):
    """A layer, something between, a norm, and a layer that reads it."""

    def __init__(self, between: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.reader = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        h = self.between(self, x)
        return self.reader(h)


def net(between: Callable[[Net, Tensor], Tensor]) -> Net:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return randomize_(Net(between), 0).double()


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


EXAMPLE = image(3, 4, 7, 7)
OTHERS = [image(1, 4, 7, 7), image(2, 4, 7, 7), image(4, 4, 14, 14), image(3, 4, 40, 40), image(3, 4, 7, 9)]


def furthest(found: nn.Module, expected: nn.Module) -> float:
    """The largest difference at any size."""
    pairs = [(run(found, x), run(expected, x)) for x in (EXAMPLE, *OTHERS)]
    return max(distance(a, b) for a, b in pairs)


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model)(x.clone())


# ------------------------------------------------------------------------------------ another branch at another size


def _at_size(test: Callable[[Tensor], bool]) -> Callable[[Net, Tensor], Tensor]:
    """The layer is used once more where ``test`` holds, which it does not at the example."""

    def between(self: Net, x: Tensor) -> Tensor:
        h = self.conv(x)
        y = self.bn(h)
        return y + h if test(h) else y

    return between


BRANCHES: dict[str, Callable[[Tensor], bool]] = {
    "a larger map": lambda h: h.shape[-1] > 32,
    "a map of twice the size": lambda h: h.shape[-1] == 14,
    "one sample": lambda h: h.size(0) == 1,
    "len": lambda h: len(h) == 2,
    "a map that is not square": lambda h: h.shape[2] != h.shape[3],
    "many values": lambda h: h.numel() > 10_000,
    "one of several": lambda h: h.shape[0] in (1, 2),
    "every size": lambda h: any(size > 32 for size in h.shape),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_layer_that_another_size_uses_otherwise_keeps_its_weight(name: str) -> None:
    model = net(_at_size(BRANCHES[name]))
    result = ns.convert(model, "none", example_inputs=EXAMPLE)
    (step,) = result.plan.steps
    assert step.site.layer is None
    assert furthest(result.model, model) < EXACT
    assert furthest(ns.fold(model, example_inputs=EXAMPLE), model) < EXACT


def test_without_other_sizes_a_branch_would_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the example's size alone shows nothing."""
    monkeypatch.setattr("normswap.graph.perturbation.other_sizes", lambda *_: ())
    for name in BRANCHES:
        model = net(_at_size(BRANCHES[name]))
        result = ns.convert(model, "none", example_inputs=EXAMPLE)
        assert result.plan.steps[0].site.layer == "conv", name
        assert furthest(result.model, model) > 1e-2, name


def test_a_layer_that_every_size_uses_alike_takes_its_norm_up() -> None:
    def between(self: Net, x: Tensor) -> Tensor:
        h = self.conv(x if x.shape[-1] < 10 else x[..., :10])
        return self.bn(h) if h.shape[0] > 2 else self.bn(h) * 2

    model = net(between)
    result = ns.convert(model, "none", example_inputs=EXAMPLE)
    assert [step.site.layer for step in result.plan.steps] == ["conv"]
    assert furthest(result.model, model) < EXACT
    assert confirm_feeds(model, [("conv", "bn")], (EXAMPLE,)) == {("conv", "bn"): frozenset({False, True})}


def test_the_sizes_that_are_tried_break_each_condition_and_fit_nested_inputs() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, more: dict[str, Any]) -> Tensor:
            if x.shape[-1] > 100 or more["mask"].shape[1] >= 5:
                return x
            return x * 2

    inputs = (image(2, 3, 8), {"mask": torch.ones(2, 4, dtype=torch.bool), "scale": 2.0})
    shapes = [(tuple(x.shape), tuple(more["mask"].shape)) for x, more in other_sizes(Two(), inputs)]
    assert {x[0] for x, _ in shapes} == {1, 2, 3}
    assert all(x[0] == mask[0] for x, mask in shapes)
    assert any(x[2] > 100 for x, _ in shapes)
    assert any(mask[1] >= 5 for _, mask in shapes)
    assert list(other_sizes(nn.ReLU(), (2.0,))) == []


# ----------------------------------------------------------------------------------------- what no trace may answer


def _scaled(self: Net, h: Tensor, otherwise: bool) -> Tensor:
    return h * 2 if otherwise else h


def _looked_up(self: Net, x: Tensor) -> Tensor:
    h = self.conv(x)
    return self.bn(_scaled(self, h, h.shape[0] in {1, 2}))


def _by_key(self: Net, x: Tensor) -> Tensor:
    h = self.conv(x)
    return self.bn(h * SCALES.get(h.shape[-1], 1.0))


def _by_text(self: Net, x: Tensor) -> Tensor:
    h = self.conv(x)
    return self.bn(_scaled(self, h, f"{h.shape[0]}" == "1"))


def _by_str(self: Net, x: Tensor) -> Tensor:
    h = self.conv(x)
    return self.bn(_scaled(self, h, str(h.shape[0]) == "1"))


def _by_name(self: Net, x: Tensor) -> Tensor:
    h = self.conv(x)
    return self.bn(getattr(self, f"conv{h.shape[0]}", self.reader)(h) + h)


def _by_class(self: Net, x: Tensor) -> Tensor:
    h = self.conv(x)
    return self.bn(_scaled(self, h, isinstance(h, Tensor)))


def _by_is_tensor(self: Net, x: Tensor) -> Tensor:
    h = self.conv(x)
    return self.bn(_scaled(self, h, torch.is_tensor(h) and isinstance(h.shape, tuple)))


def _by_class_of_a_size(self: Net, x: Tensor) -> Tensor:
    h = self.conv(x)
    return self.bn(_scaled(self, h, isinstance(h.shape[0], int) and isinstance(h.size(1) // 2, int)))


def _by_name_of_the_class(self: Net, x: Tensor) -> Tensor:
    h = self.conv(x)
    return self.bn(_scaled(self, h, h.__class__.__name__ == "Tensor"))


def _by_error_of_len(self: Net, x: Tensor) -> Tensor:
    h = self.conv(x)
    try:
        n = len(h)
    except Exception:
        n = 1
    return self.bn(h * n)


def _by_error_of_int(self: Net, x: Tensor) -> Tensor:
    h = self.conv(x)
    try:
        n = int(h.shape[0])
    except Exception:
        n = 1
    return self.bn(h * n)


def _by_error_of_a_branch(self: Net, x: Tensor) -> Tensor:
    h = self.conv(x)
    try:
        n = 2 if h.shape[0] > 1 else 3
    except Exception:
        n = 1
    return self.bn(h * n)


QUESTIONS = (
    *(_looked_up, _by_key, _by_text, _by_str, _by_name, _by_class, _by_is_tensor, _by_class_of_a_size),
    *(_by_name_of_the_class, _by_error_of_len, _by_error_of_int, _by_error_of_a_branch),
)


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "no inputs"])
@pytest.mark.parametrize("between", QUESTIONS)
def test_what_only_a_run_can_answer_is_not_answered_by_a_trace(between: Any, given: bool) -> None:
    model = net(between)
    options: dict[str, Any] = {"example_inputs": EXAMPLE} if given else {"check": False}
    result = ns.convert(model, "none", **options)
    assert furthest(result.model, model) < EXACT
    wrong = copy.deepcopy(model)
    wrong.between = lambda self, x: self.bn(self.conv(x))
    assert furthest(wrong, model) > 1e-2  # negative control: what the wrong answers would give


def _asserted(self: Net, x: Tensor) -> Tensor:
    h = self.conv(x)
    torch._assert(h.shape[1] == 4, f"4 channels are wanted, not {h.shape[1]} of {h.shape}")
    return self.bn(h)


def _by_module(self: Net, x: Tensor) -> Tensor:
    h = self.conv(x)
    return self.bn(h[0] if isinstance(h, (list, tuple)) else h)


@pytest.mark.parametrize("between", [_asserted, _by_module])
def test_what_a_trace_does_know_does_not_end_it(between: Any) -> None:
    model = net(between)
    assert not capture_symbolic(model).opaque
    (step,) = ns.plan(model, "none").steps
    assert step.site.layer == "conv"


# ------------------------------------------------------------------------------------------ forwards that are rewritten


def _normalized(self: Net, h: Tensor) -> Tensor:
    n = self.bn
    return F.batch_norm(h, n.running_mean, n.running_var, n.weight, n.bias, self.training)


class Functional(Net):
    """The norm is called in the forward, which a conversion would have to rewrite."""

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.between(self, x))


def _without_gradient(self: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = self.conv(x)
    return _normalized(self, h)


def _in_lower_precision(self: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        h = self.conv(x)
    return _normalized(self, h.to(x.dtype))


def _by_chance(self: Net, x: Tensor) -> Tensor:
    return _normalized(self, self.conv(x) * (1 + random.random()))


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (_without_gradient, "works in a context"),
        (_in_lower_precision, "works in a context"),
        (_by_chance, "computes with a random number"),
        (lambda self, x: _normalized(self, _scaled(self, x, x.shape[0] in {1})), "a trace does not know"),
    ],
)
def test_a_forward_that_no_graph_can_stand_for_is_not_rewritten(between: Any, words: str) -> None:
    with pytest.raises(NothingToConvertError, match=words):
        ns.convert(net(between), "mobn", example_inputs=EXAMPLE)


@pytest.mark.parametrize("name", ["data", "data in place"])
def test_a_rewritten_forward_writes_the_data_of_a_value(name: str) -> None:
    def between(self: Net, x: Tensor) -> Tensor:
        h = self.conv(x)
        if name == "data":
            h.data = h.data * 2
        else:
            h.data *= 2
        return _normalized(self, h)

    model = net(between)
    result = ns.convert(model, "mobn", example_inputs=EXAMPLE)
    assert furthest(result.model, model) < EXACT
    model.between = lambda self, x: _normalized(self, self.conv(x))
    assert furthest(result.model, model) > 1e-2  # negative control


# ----------------------------------------------------------------- a norm that is gone, and whose input is written to


def _written(write: Callable[[Tensor], Any]) -> Callable[[Net, Tensor], Tensor]:
    def between(self: Net, x: Tensor) -> Tensor:
        h = self.conv(x).tanh()
        y = self.bn(h)
        write(h)
        return y

    return between


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda h: h.mul_(2),
    "an item": lambda h: h.__setitem__(0, 0.5),
    "a view": lambda h: h.flatten(1).add_(1),
    "a function": lambda h: F.relu(h, inplace=True),
    "out=": lambda h: torch.add(h, 1, out=h),
    "a list": lambda h: torch._foreach_mul_([h], 2.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_norm_whose_input_is_written_to_before_its_reader_is_not_taken_up_there(name: str) -> None:
    model = net(_written(WRITES[name]))
    result = ns.convert(model, "none", check=False)
    assert [step.reader for step in result.plan.steps] == [None]
    assert "is written to the norm's input" in str(result.plan)
    assert furthest(result.model, model) < EXACT
    assert furthest(ns.fold(model), model) < EXACT


def test_what_writes_nothing_between_a_norm_and_its_reader_leaves_it_the_norm() -> None:
    def between(self: Net, x: Tensor) -> Tensor:
        h = self.conv(x).tanh()
        y = self.bn(h)
        channels = h.shape[1]
        return y.contiguous() if channels is not None else h

    model = net(between)
    result = ns.convert(model, "none")
    assert [step.reader for step in result.plan.steps] == ["reader"]
    assert furthest(result.model, model) < EXACT


# ----------------------------------------------------------------------------------------------------------- exporting


def test_one_sample_that_hides_a_condition_does_not_prove_it(tmp_path: Path) -> None:
    class Loop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(min(x.shape[0], 3)):
                x = x * 2
            x = x * 1
            x[0] = 0.5  # of one sample nothing is left
            return x

    with pytest.raises(VerificationError, match="batch 2"):
        ns.export_onnx(Loop().eval(), tmp_path / "loop.onnx", example_inputs=torch.ones(3, 4))
    assert not any(tmp_path.iterdir())


def test_a_size_of_one_alone_breaks_a_condition_if_nothing_else_does() -> None:
    conditions = [Condition("batch ≥ 2", lambda sizes: sizes["batch"] >= 2)]
    assert not list(
        breaking(lambda _: conditions, {"batch": 2}, [{"batch": 1}], 8, lambda _: True)
    )  # it is compared already
    assert [s for s, _ in breaking(lambda _: conditions, {"batch": 2}, [], 8, lambda _: True)] == [{"batch": 1}]
    conditions = [Condition("batch ≥ 3", lambda sizes: sizes["batch"] >= 3)]
    assert [s for s, _ in breaking(lambda _: conditions, {"batch": 3}, [{"batch": 1}], 8, lambda _: True)] == [
        {"batch": 2}
    ]


@pytest.mark.parametrize(
    ("test", "sizes"),
    [
        (lambda x: x.shape[2] > 20 and x.shape[3] > 20, "height 21, width 21"),
        (lambda x: x.shape[0] == 1 and x.shape[2] == 9, "batch 1, height 9"),
    ],
)
def test_a_branch_behind_a_branch_on_a_size_keeps_a_file_from_being_written(
    test: Callable[[Tensor], bool], sizes: str, tmp_path: Path
) -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if test(x) else x * 3

    x = torch.ones(2, 3, 6, 6)
    with pytest.raises(VerificationError, match=sizes):
        ns.export_onnx(Nested().eval(), tmp_path / "n.onnx", example_inputs=x, dynamic_spatial=True)
    assert not any(tmp_path.iterdir())


class Counts(nn.Module):
    """What it has been called so often counts."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls, self.seen = kind, 0, list[int]()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x.shape))
        self.count += 1
        factors = {"attribute": self.calls, "list": len(self.seen), "buffer": self.count, "nothing": 2}
        return x * factors[self.kind] + torch.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("kind", ["attribute", "list", "buffer", "nothing"])
def test_a_model_that_keeps_state_from_call_to_call_is_not_exported(kind: str, tmp_path: Path) -> None:
    model = Counts(kind).eval()
    if kind == "nothing":  # what is written and not read is no matter
        ns.export_onnx(model, tmp_path / "c.onnx", example_inputs=torch.ones(2, 3))
    else:
        with pytest.raises(ExportError, match="keeps state from call to call"):
            ns.export_onnx(model, tmp_path / "c.onnx", example_inputs=torch.ones(2, 3))
        assert not any(tmp_path.iterdir())
    assert model.calls == int(model.count) == len(model.seen) == 0
