"""The table of operations: each row's claims are checked by running it, and all that reads the table follows a row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import normswap as ns
from normswap.graph import capture
from normswap.graph.after_norm import after_norm
from normswap.graph.channels import FIXED, find_channels
from normswap.graph.dataflow import Dataflow
from normswap.graph.ops import LAYER_CALLS, STATISTICS_CALLS, is_leaf
from normswap.graph.ranks import rank_of
from normswap.operations import table
from normswap.operations.activations import ACTIVATIONS
from normswap.operations.operation import Operation
from normswap.operations.structure import STRUCTURE
from normswap.operations.table import TABLE, Table, called_by, named, of_module, written_by

pytestmark = pytest.mark.filterwarnings("ignore:nn.functional")  # F.tanh and F.sigmoid are deprecated

Call = Callable[[Tensor], Tensor]
ELEMENTWISE = [row for row in TABLE.rows if row.elementwise]
# What a call must, or should, be given beside its input.
GIVEN: dict[str, dict[str, Any]] = {
    "prelu": {"weight": torch.tensor([0.3], dtype=torch.float64)},
    "threshold": {"threshold": 0.5, "value": 2.0},
    "clamp": {"min": -0.5, "max": 0.7},
}
MODULE_ARGUMENTS: dict[type[nn.Module], tuple[Any, ...]] = {nn.Threshold: (0.5, 2.0)}
MODES = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")


def values(*shape: int) -> Tensor:
    """Return values on both sides of zero and of all bounds, in double precision."""
    return 3 * torch.randn(*(shape or (4, 5, 6)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def calls(row: Operation, training: bool = False) -> Iterator[tuple[str, Call]]:
    """Yield all ways to compute ``row``."""
    given = dict(GIVEN.get(row.name, {}))
    if row.name in MODES:
        given["training"] = training
    for function in row.functions:
        # Positional where it can be: some functions give their tensor another name.
        yield f"{function.__name__}", lambda z, f=function: f(z.clone(), **given)
    for method in row.methods:
        yield f".{method}", lambda z, m=method: getattr(z.clone(), m)(*given.values())
    for cls in row.modules:
        module = cls(*MODULE_ARGUMENTS.get(cls, ())).double().train(training)
        if isinstance(module, nn.PReLU):
            nn.init.constant_(module.weight, 0.3)
        yield cls.__name__, lambda z, m=module: m(z).detach()


ALL_CALLS = [pytest.param(row, f, id=f"{row.name}-{way}") for row in ELEMENTWISE for way, f in calls(row)]


SHAPES = ((4, 30), (4, 5, 6), (4, 5, 2, 3), (4, 5, 1, 2, 3))


def shapes_of(row: Operation) -> tuple[tuple[int, ...], ...]:
    """Return the shapes that ``row`` takes: a dropout of channels wants to know which axes are space."""
    return (SHAPES[int(row.name[7])],) if row.name[7:] in ("1d", "2d", "3d") else SHAPES


def is_close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-12 if a.dtype == torch.float64 else 1e-6
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def is_elementwise(f: Call, shapes: tuple[tuple[int, ...], ...] = SHAPES[:3]) -> bool:
    """Tell whether moving the values to other places moves the results with them, however many axes there are."""
    z = values()
    order = torch.randperm(z.numel(), generator=torch.Generator().manual_seed(1))
    for shape in shapes:
        here, there = f(z.view(shape)), f(z.flatten()[order].view(shape))
        if here.shape != torch.Size(shape) or not is_close(here.flatten()[order], there.flatten()):
            return False
    return True


def is_homogeneous(f: Call, shape: tuple[int, ...] = SHAPES[1]) -> bool:
    """Tell whether a positive factor goes through, where chance falls alike."""

    def seeded(z: Tensor) -> Tensor:
        torch.manual_seed(0)
        return f(z)

    z = values(*shape)
    return all(is_close(seeded(s * z), s * seeded(z)) for s in (0.2, 1.7, 9.0))


def maps_below(f: Call, floor: float, shape: tuple[int, ...] = SHAPES[1]) -> bool:
    """Tell whether all values below ``floor`` become ``floor``, and others do not all."""
    z = values(*shape)
    y = f(z)
    return bool((y[z < floor] == floor).all()) and not bool((y == floor).all())


@pytest.mark.parametrize(("row", "f"), ALL_CALLS)
def test_what_a_row_calls_elementwise_is_so_and_homogeneous_only_where_it_says_so(row: Operation, f: Call) -> None:
    assert is_elementwise(f, shapes_of(row))
    if row.name not in MODES:  # in eval mode a dropout is the identity
        assert is_homogeneous(f) == row.homogeneous


@pytest.mark.parametrize("row", [named(name) for name in MODES], ids=lambda row: row.name)
def test_a_dropout_is_homogeneous_in_train_mode_where_its_row_says_so(row: Operation) -> None:
    (shape, *_) = shapes_of(row)[-1:]
    for _, f in calls(row, training=True):
        assert not is_close(f(values(*shape)), values(*shape))
        assert is_homogeneous(f, shape) == row.homogeneous


@pytest.mark.parametrize(("row", "f"), ALL_CALLS)
def test_a_row_rectifies_where_it_says_so(row: Operation, f: Call) -> None:
    if isinstance(row.floor, str):
        floor = {"hardtanh": -1.0, "clamp": -0.5}[row.name]
        assert maps_below(f, floor)
        assert not maps_below(f, floor + 0.1)
    else:
        assert maps_below(f, 0.0, shapes_of(row)[-1]) == (row.floor == 0)


@pytest.mark.parametrize("row", ELEMENTWISE, ids=lambda row: row.name)
def test_all_ways_to_write_an_operation_compute_the_same(row: Operation) -> None:
    results = [f(values(*shapes_of(row)[-1])) for _, f in calls(row)]
    assert results
    assert all(is_close(result, results[0]) for result in results)


def test_false_claims_are_seen() -> None:
    assert not is_elementwise(lambda z: F.softmax(z, -1))
    assert not is_elementwise(lambda z: z.flatten(1))
    assert not is_homogeneous(F.silu)
    assert not is_homogeneous(lambda z: z + 1e-3)
    assert is_homogeneous(lambda z: 2 * z)
    assert not maps_below(F.silu, 0.0)
    assert not maps_below(torch.zeros_like, 0.0)
    assert not torch.equal(F.gelu(values()), F.gelu(values(), approximate="tanh"))


# torch's modules of which an elementwise one may come: each must have its row, and no other may.
CANDIDATES = sorted({*nn.modules.activation.__all__, *nn.modules.dropout.__all__, "Identity"})
BUILT = {"Threshold": lambda: nn.Threshold(0.5, 2.0), "MultiheadAttention": None}


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_every_elementwise_module_of_torch_is_in_the_table_and_no_other(name: str) -> None:
    build = BUILT.get(name, getattr(nn, name))
    module = None if build is None else build().double().eval()
    try:
        shapes = SHAPES[int(name[7]) :][:1] if name in ("Dropout1d", "Dropout2d", "Dropout3d") else SHAPES[:3]
        elementwise = module is not None and is_elementwise(lambda z: module(z).detach(), shapes)
    except ValueError:  # Softmax2d takes no matrix
        elementwise = False
    row = TABLE.by_module.get(getattr(nn, name))
    assert elementwise == (row is not None and row.elementwise)


def test_modules_of_both_kinds_were_looked_at() -> None:
    assert {"SELU", "Softplus", "CELU", "Hardtanh", "LogSigmoid", "Dropout1d", "GLU", "Softmax"} <= set(CANDIDATES)
    assert of_module(nn.GLU()) is None
    assert named("softmax").keeps_axes
    assert not named("softmax").elementwise


# ----------------------------------------------------------------------------------------------------------- axes


def sequential_rank(*modules: nn.Module) -> int | None:
    """Return the rank that the graph tells behind the last of ``modules``."""
    model = nn.Sequential(*modules)
    graph = fx.symbolic_trace(model).graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    return rank_of(
        output.args[0], lambda node: model.get_submodule(str(node.target)) if node.op == "call_module" else None
    )


@pytest.mark.parametrize("cls", sorted({c for row in ELEMENTWISE for c in row.modules}, key=lambda c: c.__name__))
def test_an_elementwise_module_keeps_the_rank(cls: type[nn.Module]) -> None:
    module = cls(*MODULE_ARGUMENTS.get(cls, ()))
    assert sequential_rank(nn.Flatten(), module) == 2
    assert sequential_rank(nn.Conv2d(3, 3, 1), module) == 4
    assert sequential_rank(module) is None


def test_what_changes_or_hides_the_rank_does_not_keep_it() -> None:
    assert sequential_rank(nn.Flatten(), nn.Unflatten(1, (3, 4))) is None
    assert sequential_rank(nn.Flatten(2)) is None
    assert sequential_rank(nn.Conv1d(3, 3, 1), nn.GLU(1)) is None


SPACES = {
    "max_pool": (2,), "adaptive_max_pool": (2,), "avg_pool": (2,), "adaptive_avg_pool": (2,),
    "pad": (1,), "conv": (3, 3, 1), "conv_transpose": (3, 3, 1), "batch_norm": (3,),
}  # fmt: skip
FIXED_RANK = [(row, cls) for row in TABLE.rows if isinstance(row.axes, int) for cls in row.modules]


@pytest.mark.parametrize(("row", "cls"), FIXED_RANK, ids=lambda v: getattr(v, "__name__", ""))
def test_a_number_of_axes_is_what_the_module_gives(row: Operation, cls: type[nn.Module]) -> None:
    arguments = SPACES[row.name[:-2]]
    module = cls(*arguments, 0) if cls.__name__.startswith("ConstantPad") else cls(*arguments)
    assert module(torch.randn(2, 3, *(4,) * (int(row.axes) - 2))).ndim == row.axes  # type: ignore[arg-type]


KEEPERS = [
    *(pytest.param(F.softmax, {"dim": 1}, id="softmax"), pytest.param(F.log_softmax, {"dim": 1}, id="log_softmax")),
    pytest.param(F.pad, {"pad": (1, 1)}, id="pad"),
    pytest.param(F.linear, {"weight": torch.ones(2, 6)}, id="linear"),
    pytest.param(F.layer_norm, {"normalized_shape": (6,)}, id="layer_norm"),
]


@pytest.mark.parametrize(("function", "options"), KEEPERS)
def test_other_functions_that_keep_the_axes_do(function: Any, options: dict[str, Any]) -> None:
    assert TABLE.by_function[function].keeps_axes
    for shape in ((5, 6), (4, 5, 6), (2, 4, 5, 6)):
        assert function(torch.randn(shape), **options).ndim == len(shape)


# ------------------------------------------------------------------------------------------- behind a BatchNorm


def norm_then(activation: Callable[[Tensor], Tensor], base: type[Any] = nn.BatchNorm2d) -> nn.Module:
    """Return a BatchNorm whose class activates in the same forward."""

    class NormThen(base):
        def forward(self, x: Tensor) -> Tensor:
            return activation(super().forward(x))

    norm = NormThen(4)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            assert tensor is not None
            tensor.copy_(torch.randn(4))
    return norm.eval()


SETTINGS: dict[str, dict[str, Any]] = {
    "leaky_relu": {"negative_slope": 0.3}, "elu": {"alpha": 0.7}, "celu": {"alpha": 0.7}, "softplus": {"beta": 2.0},
    "hardtanh": {"min_val": -0.3, "max_val": 0.9}, "gelu": {"approximate": "tanh"}, "hardshrink": {"lambd": 0.7},
    "softshrink": {"lambd": 0.7}, "threshold": {"threshold": 0.2, "value": -1.0}, "clamp": {"min": -0.2, "max": 0.8},
    "rrelu": {"lower": 0.3, "upper": 0.5},
}  # fmt: skip
REBUILT = [
    pytest.param(row, options, id=f"{row.name}-{sorted(options)}")
    for row in ELEMENTWISE
    if row.rebuild is not None
    for options in dict.fromkeys((tuple({}.items()), tuple(SETTINGS.get(row.name, {}).items())))
    if options or row.name not in GIVEN
]


@pytest.mark.parametrize(("row", "options"), REBUILT)
def test_an_activation_behind_a_norm_is_rebuilt_with_its_settings(row: Operation, options: Any) -> None:
    given = dict(options) | ({"training": False} if row.name in MODES else {})
    bases = {"dropout1d": nn.BatchNorm1d, "dropout3d": nn.BatchNorm3d}
    after = after_norm(norm_then(lambda y: row.functions[0](y, **given), bases.get(row.name, nn.BatchNorm2d)))
    assert isinstance(after, tuple), after
    (module,) = after
    z = values(*shapes_of(row)[-1]).float()
    torch.testing.assert_close(module.eval()(z), row.functions[0](z.clone(), **given))
    if options:
        assert not torch.allclose(module.eval()(z), row.functions[0](z.clone(), **SETTINGS_AWAY[row.name]))


SETTINGS_AWAY: dict[str, dict[str, Any]] = {  # others, which the rebuilt module must not have
    name: {key: "none" if isinstance(value, str) else value + 0.05 for key, value in options.items()}
    for name, options in SETTINGS.items()
}


@pytest.mark.parametrize(
    "activation",
    [
        F.selu, F.softplus, F.celu, F.hardtanh, F.logsigmoid, F.softsign, F.tanhshrink, torch.selu,
        lambda y: y.clamp(min=0), lambda y: torch.clamp(y, 0, 6), lambda y: F.threshold(y, 0.1, 0.0),
    ],
)  # fmt: skip
def test_an_activation_in_a_norms_class_does_not_keep_it_from_conversion(activation: Call) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm_then(activation)).eval()
    x = torch.randn(2, 3, 5, 5)
    before = model(x)
    (step,) = ns.plan(model, "wn+mobn").steps
    assert step.site.layer == "0"
    torch.testing.assert_close(ns.swap_norms(model, "wn+mobn")(x), before)


@pytest.mark.parametrize(
    "activation", [lambda y: F.softmax(y, 1), lambda y: F.selu(y) + y, torch.atan, lambda y: torch.clamp(y, 1, 0)]
)
def test_what_is_no_known_activation_keeps_a_norm_from_conversion(activation: Call) -> None:
    assert isinstance(after_norm(norm_then(activation)), str)


def test_a_norm_that_does_not_run_on_noise_stays() -> None:
    norm = norm_then(F.dropout1d)  # which takes no images
    assert "cannot be run on noise" in str(after_norm(norm))


def test_a_prelu_that_a_norms_class_holds_stays() -> None:
    class NormPReLU(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.act = nn.PReLU(channels)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    norm = NormPReLU(4)
    assert after_norm(norm) == (norm.act,)


# ------------------------------------------------------------------------------- an operation is added in one place


class Atan(nn.Module):
    """An activation of a third party: torch.nn has no such module."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.atan(x) if bool((x > -1e9).all()) else x  # no trace gets through


class Network(nn.Module):
    """Values that are multiplied with what an activation made: free of scale if that is known to be elementwise."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), act
        self.gate, self.last, self.end = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.end(self.last(x * self.act(self.gate(x))))


def free_channels(model: nn.Module) -> int:
    channels = find_channels(Dataflow(capture(model)), {"norm": (), "end": ()}, ["conv", "last"])
    return int((channels.outputs["norm"] != FIXED).sum())


@pytest.mark.parametrize("act", [torch.atan, lambda x: x.atan(), Atan()], ids=["function", "method", "module"])
def test_one_row_is_all_that_a_new_activation_needs(act: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def rank() -> int | None:
        return sequential_rank(nn.Flatten(), Wrapped(act)) if not isinstance(act, nn.Module) else rank_behind(act)

    def rank_behind(module: nn.Module) -> int | None:
        graph = fx.Graph()
        x = graph.call_function(torch.reshape, (graph.placeholder("x"), (2, 3)))
        return rank_of(graph.call_module("act", (x,)), lambda node: module if node.op == "call_module" else None)

    assert rank() is None
    assert free_channels(Network(act)) == 0
    if not isinstance(act, nn.Module):
        assert isinstance(after_norm(norm_then(act)), str)

    row = Operation("atan", (torch.atan,), ("atan",), (Atan,), elementwise=True, rebuild=Atan)
    monkeypatch.setattr(table, "TABLE", Table((*TABLE.rows, row)))
    assert rank() == 2
    assert free_channels(Network(act)) == 4
    if isinstance(act, nn.Module):
        assert is_leaf(act)
    else:
        (module,) = after_norm(norm_then(act))
        assert isinstance(module, Atan)


class Wrapped(nn.Module):
    def __init__(self, act: Call) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def test_no_two_rows_may_claim_the_same() -> None:
    for again in (
        Operation("relu"),
        Operation("x", functions=(F.relu,)),
        Operation("x", methods=("relu",)),
        Operation("x", modules=(nn.ReLU,)),
    ):
        with pytest.raises(ValueError, match="belongs to two operations, 'relu' and"):
            Table((*ACTIVATIONS, *STRUCTURE, again))


# ------------------------------------------------------------------------------------------------ derived tables


def test_what_is_read_without_values_is_the_same_for_other_values() -> None:
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    rows = [row for row in TABLE.rows if row.value_free and row.name != "__hash__"]  # that is a tensor's identity
    assert len(rows) > 30
    for row in rows:
        for name in row.attributes:
            assert getattr(a, name) == getattr(b, name)
        for name in row.methods:
            if name != "get_device":  # -1 on both
                assert getattr(a, name)() == getattr(b, name)()
    assert a.sum() != b.sum()
    assert {"sum", "item", "data_ptr", "tolist"}.isdisjoint(table.value_free_names())


def test_calls_are_those_that_a_run_shows() -> None:
    seen: list[Any] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Watch():
        x + x, x.add(x), torch.add(x, x), x.add_(x)
        x += x
        additions = seen.copy()
        seen.clear()
        F.relu(x), x.relu(), torch.relu(x), F.relu_(x), F.relu6(x)
        relus = [f for f in seen if f is not torch.relu_]
    assert set(additions) <= called_by(named("add"))
    assert set(relus) <= called_by(named("relu")) | called_by(named("relu6"))
    assert Tensor.mul not in called_by(named("add"))


@pytest.mark.parametrize("name", ["add", "subtract", "multiply", "multiply in place", "divide", "relu", "clamp"])
def test_a_method_that_writes_to_its_tensor_is_known_by_its_name(name: str) -> None:
    row = named(name)
    for method in row.methods:
        x = torch.tensor([-3.0, 5.0])
        getattr(x, method)(*(() if name == "relu" else (2.0,)))
        assert (getattr(Tensor, method) in written_by(row)) == (x.tolist() != [-3.0, 5.0]), method


def test_layers_and_norms_of_programs_are_those_of_their_rows() -> None:
    aten = torch.ops.aten
    assert {F.conv2d, F.linear, aten.conv2d.default, aten.convolution.default, aten.linear.default} <= LAYER_CALLS
    assert {F.relu, F.batch_norm, aten.dropout.default}.isdisjoint(LAYER_CALLS)
    assert aten.native_batch_norm.default in STATISTICS_CALLS
    assert aten.batch_norm.default not in STATISTICS_CALLS
    pairs = itertools.product((F.conv1d, F.conv2d, F.conv3d), ("default", "padding"))
    assert {getattr(getattr(aten, f.__name__), overload) for f, overload in pairs} <= LAYER_CALLS
