"""No verb changes the model that it is given, whatever the model's forward writes.

A forward may write its parameters (a momentum encoder, a norm that sets itself on its first call), whatever hangs on
the model, random generators and torch's settings. Each way of writing goes through each verb, with forwards that end
well and such that fail after the write.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention
import torch.nn.functional as F
from laws import changed, fingerprint, reads_only, seeds_for_later
from torch import Tensor, nn
from zoo import randomize_

import normswap as ns
from normswap.errors import NothingToConvertError
from normswap.graph import capture_recorded, capture_symbolic
from normswap.runs.cycles import new_cycles
from normswap.runs.guard import set_mode, untouched
from normswap.runs.snapshot import Snapshot
from normswap.runs.writes import Watched, kept


class Counter:
    """An object of the model's own that is no module."""

    def __init__(self) -> None:
        self.count, self.seen = 0, {"x": [0]}


class Slotted:
    """The same without a dict."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Writer(nn.Module):
    """A convolution and its norm, and beside them whatever a forward may write to."""

    calls = 0
    of_class: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, write: str, failure: BaseException | None = None) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.key = nn.Conv2d(3, 4, 3).requires_grad_(False)
        self.loc = nn.Parameter(torch.zeros(4))
        self.register_buffer("steps", torch.zeros(3))
        self.flag, self.text, self.nothing = False, "", None
        self.nested: dict[str, Any] = {"a": [{1}, deque([1]), {"b": (torch.zeros(2),)}]}
        self.hidden = [nn.BatchNorm1d(2), {"inner": nn.Linear(2, 2)}]
        self.counter, self.slotted, self.space = Counter(), Slotted(), SimpleNamespace(n=0, more=[])
        self.array, self.bytes = np.zeros(3), bytearray(2)
        self.generators = (torch.Generator(), random.Random(0), np.random.default_rng(0), np.random.RandomState(0))
        self.conv.weight.grad = torch.ones_like(self.conv.weight)
        self.shadow = {"loc": self.loc.detach().clone()}
        self.optimizer = torch.optim.SGD([self.loc], lr=0.1, momentum=0.9)
        self.write, self.failure = write, failure

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        WRITES[self.write](self)
        if self.failure is not None:
            raise self.failure
        return self.act(self.bn(y))


def _loc(m: Writer) -> nn.Parameter:
    """The parameter itself: to a symbolic trace, an attribute gives a proxy."""
    parameter = m._parameters["loc"]
    assert parameter is not None
    return parameter


def _steps(m: Writer) -> Tensor:
    buffer = m._buffers["steps"]
    assert buffer is not None
    return buffer


@torch.no_grad()
def _momentum(m: Writer) -> None:
    for a, b in zip(m.conv.parameters(), m.key.parameters(), strict=True):
        b.mul_(0.9).add_(a, alpha=0.1)


@torch.no_grad()
def _set_once(m: Writer) -> None:
    if not m.flag:
        _loc(m).copy_(torch.ones(4))
        m.flag = True


@torch.enable_grad()
def _step(m: Writer) -> None:
    _loc(m).grad = torch.ones(4)
    m.optimizer.step()


def _statistics(m: Writer) -> None:
    F.batch_norm(torch.randn(5, 4), _loc(m).detach(), torch.ones(4), training=True)


def _add_one(x: Tensor) -> Tensor:
    return x.add_(1)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says that it will do without scripts one day
    _add_one_scripted = torch.jit.script(_add_one)


def _no_gradient(write: Callable[[Writer], Any]) -> Callable[[Writer], Any]:
    return torch.no_grad()(write)


TENSORS: dict[str, Callable[[Writer], Any]] = {
    "momentum encoder": _momentum,
    "set on the first call": _set_once,
    "its own optimizer": _step,
    "as running statistics": _statistics,
    "in place": _no_gradient(lambda m: _loc(m).mul_(0.5).add_(1)),
    "data in place": lambda m: _loc(m).data.add_(1),
    "data of a part": lambda m: _loc(m).data[1:].fill_(3),
    "data exchanged": lambda m: setattr(_loc(m), "data", torch.ones(4)),
    "data of another shape": lambda m: setattr(_loc(m), "data", torch.ones(2, 3)),
    "detached": lambda m: _loc(m).detach().copy_(torch.ones(4)),
    "an out argument": _no_gradient(lambda m: torch.add(_loc(m).detach(), 1, out=_loc(m).data)),
    "all at once": _no_gradient(lambda m: torch._foreach_add_([_loc(m), m.key._parameters["bias"]], 1.0)),
    "a script": lambda m: _add_one_scripted(_loc(m).data),
    "another storage": _no_gradient(lambda m: _loc(m).set_(torch.ones(4))),
    "resized": lambda m: _steps(m).resize_(40),
    "another dtype": lambda m: m.key.double(),
    "registered anew": lambda m: m.register_parameter("loc", nn.Parameter(torch.ones(4))),
    "removed": lambda m: m._parameters.pop("loc", None),
    "a new parameter": lambda m: m.register_parameter("more", nn.Parameter(torch.ones(1))),
    "buffer in place": lambda m: _steps(m).add_(1),
    "buffer exchanged": lambda m: setattr(m, "steps", torch.ones(3)),
    "an attribute's tensor": lambda m: m.shadow["loc"].mul_(0.5).add_(1),
    "a nested tensor": lambda m: m.nested["a"][2]["b"][0].add_(1),
    "a hidden module's weight": lambda m: m.hidden[1]["inner"].weight.data.add_(1),
    "a hidden module's buffer": lambda m: m.hidden[0].running_mean.add_(1),
    "gradient": lambda m: setattr(_loc(m), "grad", torch.ones(4)),
    "gradient in place": lambda m: [p.grad.add_(1) for p in m.conv.parameters() if p.grad is not None],
    "gradient dropped": lambda m: m.conv.zero_grad(),
    "requires_grad": lambda m: _loc(m).requires_grad_(False),
    "a tensor's hook": lambda m: _loc(m).requires_grad_().register_hook(lambda g: g),
    "a tensor's attribute": lambda m: setattr(_loc(m), "tag", 1),
}

OBJECTS: dict[str, Callable[[Writer], Any]] = {
    "an attribute": lambda m: setattr(m, "text", m.text + "x"),
    "a new attribute": lambda m: setattr(m, "late", 1),
    "a set in a list in a dict": lambda m: m.nested["a"][0].add(2),
    "a deque": lambda m: m.nested["a"][1].append(2),
    "a nested dict": lambda m: m.nested["a"][2].update(c=1),
    "a counter": lambda m: setattr(m.counter, "count", m.counter.count + 1),
    "a counter's list": lambda m: m.counter.seen["x"].append(1),
    "a counter with slots": lambda m: setattr(m.slotted, "count", m.slotted.count + 1),
    "a namespace": lambda m: (setattr(m.space, "n", m.space.n + 1), m.space.more.append(1)),
    "an array": lambda m: m.array.__iadd__(1),
    "bytes": lambda m: m.bytes.append(1),
    "the class": lambda m: setattr(type(m), "calls", type(m).calls + 1),
    "a dict of the class": lambda m: type(m).of_class.update(x=len(type(m).of_class)),
    "a new attribute of the class": lambda m: setattr(type(m), "late_of_class", 1),
    "a module's mode": lambda m: m.key.train(not m.key.training),
    "a module exchanged": lambda m: setattr(m, "key", nn.Conv2d(3, 4, 3)),
    "a module's class": lambda m: setattr(m.key, "__class__", type("Other", (nn.Conv2d,), {})),
    "a hook": lambda m: m.act.register_forward_hook(lambda *_: None),
    "own generators": lambda m: (
        torch.rand(1, generator=m.generators[0]),
        m.generators[1].random(),
        m.generators[2].random(),
        m.generators[3].rand(),
    ),
}

SETTINGS: dict[str, Callable[[Writer], Any]] = {
    "torch's generator": lambda m: torch.rand(1),
    "Python's generator": lambda m: random.random(),
    "NumPy's generator": lambda m: np.random.rand(),
    "seeds": lambda m: torch.manual_seed(5),
    "grad mode": lambda m: torch.set_grad_enabled(False),
    "default dtype": lambda m: torch.set_default_dtype(torch.float64),
    "deterministic": lambda m: torch.use_deterministic_algorithms(True, warn_only=True),
    "precision": lambda m: torch.set_float32_matmul_precision("medium"),
    "cudnn": lambda m: setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark),
    "anomalies": lambda m: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "threads": lambda m: torch.set_num_threads(2),
}

WRITES = {"nothing": lambda m: None, **TENSORS, **OBJECTS, **SETTINGS}
X = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
DATA = [X, X + 0.5]
VERBS: dict[str, Callable[[Writer], Any]] = {
    "symbolic": lambda m: capture_symbolic(m),
    "recorded": lambda m: capture_recorded(m, (X,)),
    "plan": lambda m: ns.plan(m, "gn+ws"),
    "plan on inputs": lambda m: ns.plan(m, "wn", example_inputs=X),
    "convert": lambda m: ns.convert(m, "wn+mobn", example_inputs=X),
    "convert without inputs": lambda m: ns.convert(m, "gn+ws"),
    "swap": lambda m: ns.swap_norms(m, "gn", calibration=DATA),
    "tune": lambda m: ns.convert(m, "gn", calibration=DATA, init="tune", tune_steps=1),
    "rank": lambda m: ns.rank_sites(m, "gn", calibration=DATA),
    "choose": lambda m: ns.choose_recipes(m, calibration=DATA, recipes=["gn"]),
    "fold": lambda m: ns.fold(m),
    "fold on inputs": lambda m: ns.fold_with_report(m, example_inputs=X),
    "verify": lambda m: ns.verify(m, copy.deepcopy(m), X),
}


def held(model: nn.Module, verb: Callable[[], Any]) -> set[str]:
    """What ``verb`` has changed of the model; that it refuses is no matter."""
    before = fingerprint(model)
    with contextlib.suppress(ns.NormswapError, KeyboardInterrupt):
        verb()
    return changed(before, fingerprint(model))


@pytest.fixture(autouse=True)
def _settings() -> Any:
    """Whatever a control leaves behind is put right for the next test."""
    with untouched(nn.Identity()):
        yield
    Writer.calls, Writer.of_class = 0, {}
    if "late_of_class" in vars(Writer):
        del Writer.late_of_class  # type: ignore[attr-defined]


FEW = ("symbolic", "plan on inputs", "swap", "verify")


@pytest.mark.parametrize("write", WRITES)
def test_no_verb_changes_what_a_forward_writes(write: str) -> None:
    for name in VERBS if write in TENSORS else FEW:
        assert not touched_by(name, Writer(write)), name


@pytest.mark.parametrize("write", WRITES)
def test_no_verb_changes_what_a_forward_writes_before_it_fails(write: str) -> None:
    for name in FEW:
        for failure in (RuntimeError("after the write"), KeyboardInterrupt()):
            assert not touched_by(name, Writer(write, failure)), (name, failure)


def touched_by(name: str, model: Writer) -> set[str]:
    """What a verb changes of ``model``, which is in the mode that the verb takes."""
    model.train(name not in ("fold", "fold on inputs", "verify"))
    return held(model, lambda: VERBS[name](model))


@pytest.mark.parametrize("write", WRITES)
def test_the_fingerprint_sees_each_write(write: str) -> None:
    """The negative control of the test above."""
    model = Writer(write).eval()
    before = fingerprint(model)
    model(X)
    assert bool(changed(before, fingerprint(model))) == (write != "nothing")


@pytest.mark.parametrize("write", ["nothing", "momentum encoder", "set on the first call", "a counter", "seeds"])
def test_an_export_and_its_refusal_change_nothing(write: str, tmp_path: Path) -> None:
    model = Writer(write).eval()
    assert not held(model, lambda: ns.export_onnx(model, tmp_path / "x.onnx", example_inputs=X))
    assert not held(model, lambda: ns.export_onnx(model, tmp_path / "x.onnx", example_inputs=X[:, :1]))
    assert not held(model, lambda: ns.export_onnx(model.train(), tmp_path / "x.onnx", example_inputs=X)) - {
        key for key in fingerprint(model) if key.startswith("module") or key.endswith("training")
    }


@pytest.mark.parametrize("write", TENSORS)
def test_saving_changes_nothing(write: str, tmp_path: Path) -> None:
    converted = ns.convert(Writer(write), "gn+ws").model
    assert not held(converted, lambda: ns.save(converted, tmp_path / "x.safetensors"))


@pytest.mark.parametrize("write", ["removed", "momentum encoder", "set on the first call", "a counter", "nothing"])
@pytest.mark.parametrize("refusal", ["wrong inputs", "a NaN", "a wrong recipe", "nothing to convert"])
def test_a_refused_model_stays_as_it_was(write: str, refusal: str) -> None:
    model, x = Writer(write), X
    if refusal == "wrong inputs":
        x = X[:, :2]
    elif refusal == "a NaN":
        model.key.weight.data[0] = float("nan")
    elif refusal == "nothing to convert":
        model.bn = nn.Identity()  # type: ignore[assignment]
    recipe = "no recipe" if refusal == "a wrong recipe" else "gn"
    before = fingerprint(model)
    with pytest.raises(ns.NormswapError):
        ns.convert(model, recipe, example_inputs=x)
    assert not changed(before, fingerprint(model))


@pytest.mark.parametrize("write", WRITES)
def test_initialize_changes_layers_and_norms_and_nothing_else(write: str) -> None:
    model = Writer(write).train()
    model.bn.running_mean.fill_(1)
    before = fingerprint(model)
    report = ns.initialize(model, X)
    its_own = {f"tensor {name}" for name in ("conv.weight", "conv.bias", "bn.running_mean", "bn.running_var")}
    assert changed(before, fingerprint(model)) == its_own
    assert [row.name for row in report.rows if row.method != "not initialized"] == ["conv"]


@pytest.mark.parametrize("failure", [RuntimeError("after the write"), KeyboardInterrupt()])
@pytest.mark.parametrize("write", WRITES)
def test_an_initialization_that_fails_changes_nothing(write: str, failure: BaseException) -> None:
    model = Writer(write, failure).train()
    assert not held(model, lambda: ns.initialize(model, X, fresh=True))


@pytest.mark.parametrize("init", ["match", "tune"])
def test_a_calibration_does_not_move_what_the_converted_model_writes(init: str) -> None:
    """The converted model's forward writes, too: what it has written while it was fitted is not in the result."""
    model = Writer("in place")
    converted = ns.convert(model, "gn", calibration=DATA, init=init, tune_steps=2).model
    assert torch.equal(converted.loc, model.loc)
    assert not torch.equal(converted.conv.weight, model.conv.weight), "what is fitted stays"


def test_a_model_that_writes_nothing_is_not_copied() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    x = torch.randn(2, 64)
    before = Snapshot(model)
    with Watched(before.values), torch.no_grad():
        model(x)
    assert before.values.copied == 0
    with Watched(before.values), torch.no_grad():
        model[0].weight.mul_(2)
    assert before.values.copied == 64 * 64 * 4, "the control: one weight is written and that alone is copied"
    before.restore()


def test_a_container_that_was_empty_is_empty_again_and_what_is_written_to_one_is_noticed() -> None:
    model = nn.Identity()
    model.listed, model.table, model.ordered, model.named = [], {}, OrderedDict(), set()
    with untouched(model) as nothing:
        pass
    assert not nothing.changed
    for write in (
        lambda: model.listed.append(1),
        lambda: model.table.update(a=1),
        lambda: model.ordered.update(a=1),
        lambda: model.named.add(1),
        lambda: model._forward_hooks.update({0: print}),
    ):
        with untouched(model) as written:
            write()
        assert written.changed
        assert not any((model.listed, model.table, model.ordered, model.named, model._forward_hooks))


def test_what_is_kept_is_not_put_back() -> None:
    layer = nn.Linear(2, 2)
    value = layer.weight.detach().clone()
    with untouched(layer), torch.no_grad():
        layer.weight.add_(1)  # a forward's
        with kept():
            layer.weight.copy_(value * 3)
            layer.bias.fill_(5)
        layer.weight.add_(1)  # a forward's
        layer.bias.add_(1)
    assert torch.equal(layer.weight, value * 3)
    assert torch.equal(layer.bias, torch.full((2,), 5.0))


def test_ties_of_storage_and_an_open_graph_survive() -> None:
    """The values are put back in place: views, tied tensors and what autograd has saved stay what they were."""
    layer = nn.Linear(3, 3)
    part = layer.weight.detach()[1]
    y = layer(torch.randn(2, 3, requires_grad=True)).square().sum()
    with untouched(layer):
        layer.weight.data.add_(1)
        layer.weight.data = torch.zeros(3, 3)
    assert part.data_ptr() == layer.weight[1].data_ptr()
    y.backward()
    assert layer.weight.grad is not None


def test_a_run_in_another_thread_is_watched_where_the_package_starts_it() -> None:
    """Side-by-side runs are in threads of their own."""
    model = Writer("data in place")
    rows = ns.rank_sites(model, "gn", calibration=DATA)
    assert len(rows) == 1
    assert torch.equal(model.loc, torch.zeros(4))


def test_the_fixture_sees_a_verb_that_changes_its_model() -> None:
    """The negative control of the fixture that watches every verb in every test."""
    model = Writer("nothing")
    assert reads_only(lambda m: 3)(model) == 3
    with pytest.raises(AssertionError, match="tensor loc"):
        reads_only(lambda m: m.loc.data.add_(1))(model)
    with pytest.raises(AssertionError, match="attribute"):
        reads_only(_fails)(model=model)
    assert ns.plan.__wrapped__  # type: ignore[attr-defined]


def _fails(model: Writer) -> None:
    model.text = "changed"
    raise RuntimeError


class MomentumContrast(nn.Module):
    """A query encoder and a key encoder that follows it, as in MoCo (He et al. 2020), and a queue of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8))
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        for p in self.key.parameters():
            p.data.add_(0.3)
        self.register_buffer("queue", torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)
        with torch.no_grad():
            for a, b in zip(self.query.parameters(), self.key.parameters(), strict=True):
                b.mul_(0.9).add_(a, alpha=0.1)
            self.queue = torch.cat([self.queue[:, 1:], self.key(x)[:1].T], 1)
        return torch.cat([q, q @ self.queue], 1)


class ActNorm(nn.Module):
    """``(x − loc)·scale`` per channel, set on the first call (Kingma & Dhariwal 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.zeros(1, 4, 1, 1)), nn.Parameter(torch.ones(1, 4, 1, 1))
        self.initialized = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialized:
            self.loc.data.copy_(x.detach().mean((0, 2, 3), keepdim=True))
            self.scale.data.copy_(1 / x.detach().std((0, 2, 3), keepdim=True))
            self.initialized = True
        return (x - self.loc) * self.scale


@pytest.mark.parametrize("to", ["gn+ws", "gn", "mobn"])
def test_a_norm_that_sets_itself_on_its_first_call_is_still_unset_in_the_result(to: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), ActNorm()).eval()
    ns.plan(model, to)
    converted = ns.convert(model, to, example_inputs=X).model.eval()
    folded = ns.fold(converted, example_inputs=X)
    for one in (model, converted, folded):
        assert not one[2].initialized
        assert torch.equal(one[2].loc, torch.zeros(1, 4, 1, 1))
    if to == "mobn":  # exact: both set themselves to the same, and still differ from what is set already
        assert ns.verify(model, converted, X).ok
        converted[2](X[:, :1].expand(2, 4, 4, 4) * 3)
        assert not ns.verify(model, converted, X).ok


@pytest.mark.parametrize("given", [{}, {"example_inputs": X}, {"calibration": DATA}], ids=["bare", "inputs", "data"])
def test_a_momentum_encoder_is_refused_with_the_reason_and_not_moved(given: dict[str, Any]) -> None:
    """Its forward reads the parameters of its norms; the tracer runs that on real tensors."""
    model = MomentumContrast().eval()
    before = fingerprint(model)
    plan = ns.plan(model, "gn", **given)
    assert {skip.name: skip.code for skip in plan.skips if skip.what == "norm"} == {
        "query.1": "read-elsewhere",
        "key.1": "read-elsewhere",
    }
    with pytest.raises(ns.NormswapError, match="no norm of the MomentumContrast"):
        ns.convert(model, "gn", **given)
    assert not changed(before, fingerprint(model))
    model(X)
    assert "tensor key.1.weight" in changed(before, fingerprint(model)), "the control: a call moves it"


def test_lazy_layers_and_sparse_tensors_are_put_back() -> None:
    lazy = nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3))
    with untouched(lazy):
        lazy(torch.randn(2, 5))
        assert type(lazy[0]) is nn.Linear
    assert type(lazy[0]) is nn.LazyLinear
    assert type(lazy[0].weight) is nn.UninitializedParameter
    table = nn.Embedding(4, 3, sparse=True)
    table.weight.grad = torch.eye(4, 3).to_sparse()
    with untouched(table):
        table.weight.grad.mul_(3)
    assert torch.equal(table.weight.grad.to_dense(), torch.eye(4, 3))


@pytest.mark.filterwarnings("ignore")
def test_what_compiles_itself_runs_within() -> None:
    """Attention with a score function does, and so may a submodule."""
    q = torch.randn(1, 1, 4, 8)
    layer = nn.Linear(8, 8)
    layer.compile(backend="eager")
    with torch.no_grad(), untouched(layer):
        assert torch.nn.attention.flex_attention.flex_attention(q, q, q).shape == q.shape
        assert layer(q).shape == q.shape


# -------------------------------------------------------------------------------------------- one encoder, and its copy


def encoder() -> nn.Sequential:
    return nn.Sequential(
        *(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        ),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


class Contrast(nn.Module):
    """MoCo: each forward moves the one encoder towards the other, parameter by parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = encoder(), encoder()
        self.k.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for a, b in zip(self.q.parameters(), self.k.parameters(), strict=True):
                b.mul_(0.5).add_(a, alpha=0.5)
            k = self.k(x)
        return self.q(x) @ k.T


@pytest.mark.parametrize("recipe", ns.all_recipes())
def test_a_momentum_encoder_is_converted_as_the_copy_of_the_other_one(recipe: str) -> None:
    torch.manual_seed(0)
    model, x = randomize_(Contrast(), 0), torch.randn(6, 3, 9, 9)
    options = {"group_size": 4} if recipe.startswith("gn") else {}
    with pytest.raises(NothingToConvertError, match="reads its parameters"):
        ns.convert(model, recipe, example_inputs=x, **options)
    model.q = ns.swap_norms(model.q, recipe, example_inputs=x, **options)
    model.k = copy.deepcopy(model.q).requires_grad_(False)
    model.train()
    optimizer = torch.optim.SGD(model.q.parameters(), lr=1e-2)
    for _ in range(3):
        expected = [0.5 * b + 0.5 * a for a, b in zip(model.q.parameters(), model.k.parameters(), strict=True)]
        loss = model(x).square().mean()
        assert all(torch.allclose(b, e) for b, e in zip(model.k.parameters(), expected, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert bool(loss.isfinite())
    moved = [not torch.equal(a, b) for a, b in zip(model.q.parameters(), model.k.parameters(), strict=True)]
    assert any(moved)


def test_encoders_swapped_apart_would_mix_what_does_not_belong_together() -> None:
    """Why both are not simply converted alike: the mixture of two exact swaps is none of the mixture."""
    torch.manual_seed(0)
    model, x = randomize_(Contrast(), 0).double(), torch.randn(6, 3, 9, 9, dtype=torch.float64)
    apart = copy.deepcopy(model)
    apart.q, apart.k = (ns.swap_norms(one, "none", example_inputs=x) for one in (model.q, model.k))
    with torch.no_grad():
        assert torch.allclose(apart.q(x), model.q(x))
        assert torch.allclose(apart.k(x), model.k(x))
        found, expected = apart(x), model(x)
    assert float((found - expected).abs().max() / expected.abs().max()) > 1e-2


def test_a_plan_leaves_no_seed_for_a_device_that_is_not_in_use_yet() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x if bool(x.sum() > -1e9) else -x))

    model = Branching().eval()
    before = seeds_for_later()
    plan = ns.plan(model, "gn", example_inputs=(torch.randn(2, 3, 8, 8),))
    assert [step.site.proof for step in plan.steps] == ["checked"]
    assert seeds_for_later() == before
    torch.manual_seed(0)
    assert torch.cuda.is_initialized() or seeds_for_later() != before


def test_only_the_cycles_of_a_run_are_collected() -> None:
    class Node:
        def __init__(self) -> None:
            self.me = self

    def dropped(then: Callable[[], object] = lambda: None) -> weakref.ref[Node]:
        """A cycle that nobody holds any more, after something was done while it was held."""
        node = Node()
        then()
        return weakref.ref(node)

    old = dropped(gc.collect)  # an older generation has it
    with new_cycles() as collect:
        new = dropped()
        collect()
        assert new() is None
        with new_cycles() as collect_within:  # as a run within a run
            within = dropped()
            collect_within()
            assert within() is None
    assert old() is not None
    with new_cycles() as collect:
        new = dropped(gc.collect)  # as a forward may do
        collect()
        assert new() is None
    assert old() is None
    assert gc.isenabled()


def test_the_collector_stays_off_where_it_was_off() -> None:
    gc.disable()
    try:
        with new_cycles():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    with new_cycles():
        assert not gc.isenabled()
    assert gc.isenabled()


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.dropout = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.bn(self.conv(x)))


def test_a_scripted_part_runs_in_the_mode_it_is_put_into_and_is_put_back() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and yet in use
        model = nn.Sequential(nn.Conv2d(3, 3, 1), torch.jit.script(Scripted())).train()
    x = torch.randn(4, 3, 5, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with untouched(model):
        set_mode(model, False)
        assert torch.equal(model(x), model(x))
        set_mode(model, True)
        assert not torch.equal(model(x), model(x))
        set_mode(model, False)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(x)
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # negative control
