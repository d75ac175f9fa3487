"""A norm in front of a layer goes into that layer, exactly where it may; all else is refused and stays right."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import conversion_checks
import pytest
import torch
from conversion_checks import BrokenPromiseError, check
from laws import BY_NAME, changed, distance, doubled, fingerprint
from random_networks import Network
from test_zoo import Affine, fresh, observe, original
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from zoo import ZOO, Entry, randomize_

import normswap as ns
from normswap.graph import reading
from normswap.nn import ChannelAffine, RankCheck, readers
from normswap.norms import norm_of

Recurrent = (nn.LSTM, nn.GRU, nn.RNN)


class Net(nn.Module):
    """A norm, a movement of axes, a layer that reads it."""

    def __init__(self, norm: nn.Module, layer: nn.Module, move: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.bn, self.reader, self.move = norm, layer, move

    def forward(self, x: Tensor) -> Any:
        y = self.reader(self.move(self.bn(x)))
        return y[0] if isinstance(y, tuple) else y


def image(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def moved(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def conv(rank: int, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    kinds = {3: (nn.BatchNorm1d, nn.Conv1d), 4: (nn.BatchNorm2d, nn.Conv2d), 5: (nn.BatchNorm3d, nn.Conv3d)}
    norm, layer = kinds[rank]
    return lambda: Net(norm(6), layer(6, *args, **options))


def recurrent(kind: Any, move: Callable[[Tensor], Tensor] = moved, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Net(nn.BatchNorm1d(6), kind(6, 4, **options), move)


def linear(move: Callable[[Tensor], Tensor], norm: Any = nn.BatchNorm1d, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Net(norm(6), nn.Linear(6, 5, **options), move)


# As many positions as channels, so that whoever mixes them up is wrong, and does not crash.
SEQUENCE, MAP, VOLUME = image(3, 6, 6), image(3, 6, 6, 6), image(2, 6, 6, 6, 6)

FUSED: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "Linear": (linear(lambda x: x), image(4, 6)),
    "Linear, no bias": (linear(lambda x: x, bias=False), image(4, 6)),
    "Linear behind transpose": (linear(moved), SEQUENCE),
    "Linear behind transpose(-1, -2)": (linear(lambda x: x.transpose(-1, -2)), SEQUENCE),
    "Linear behind swapaxes": (linear(lambda x: torch.swapaxes(x, 2, 1)), SEQUENCE),
    "Linear behind movedim": (linear(lambda x: x.movedim(1, -1)), SEQUENCE),
    "Linear behind permute": (linear(lambda x: x.permute(0, 2, 3, 1), nn.BatchNorm2d), MAP),
    "Linear behind permute to columns first": (linear(lambda x: x.permute(3, 0, 2, 1), nn.BatchNorm2d), MAP),
    "Linear behind moveaxis in 3D": (linear(lambda x: torch.moveaxis(x, 1, 4), nn.BatchNorm3d), VOLUME),
    "Linear behind three movements": (
        linear(lambda x: x.permute(0, 3, 1, 2).transpose(2, 3).contiguous().movedim(3, -1), nn.BatchNorm2d), MAP,
    ),
    "Linear behind SyncBatchNorm": (lambda: Net(nn.SyncBatchNorm(6), nn.Linear(6, 5), moved), SEQUENCE),
    "Linear behind no affine": (lambda: Net(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 5), moved), SEQUENCE),
    "Conv1d": (conv(3, 5, 3), SEQUENCE),
    "Conv2d": (conv(4, 5, 3), MAP),
    "Conv3d": (conv(5, 5, 3), VOLUME),
    "Conv2d, no bias": (conv(4, 5, 3, bias=False), MAP),
    "Conv2d, grouped": (conv(4, 4, 3, groups=2), MAP),
    "Conv2d, depthwise": (conv(4, 12, 3, groups=6, bias=False), MAP),
    "Conv2d, stride and dilation": (conv(4, 5, (3, 2), stride=(2, 1), dilation=(1, 2)), MAP),
    "Conv2d, 1×1 same": (conv(4, 5, 1, padding="same"), MAP),
    "Conv2d, valid": (conv(4, 5, 3, padding="valid"), MAP),
    **{f"Conv{x.ndim - 2}d, {mode}": (conv(x.ndim, 5, 3, padding=1, padding_mode=mode), x)
       for x in (SEQUENCE, MAP, VOLUME) for mode in ("reflect", "replicate", "circular")},
    "Conv2d, same by reflection": (conv(4, 5, 3, padding="same", padding_mode="reflect"), MAP),
    "LSTM": (recurrent(nn.LSTM, lambda x: x.permute(2, 0, 1)), SEQUENCE),
    "LSTM, batch first": (recurrent(nn.LSTM, batch_first=True), SEQUENCE),
    "LSTM, bidirectional": (recurrent(nn.LSTM, batch_first=True, bidirectional=True), SEQUENCE),
    "LSTM, layers and projection": (
        recurrent(nn.LSTM, batch_first=True, num_layers=2, proj_size=3, bidirectional=True), SEQUENCE,
    ),
    "GRU": (recurrent(nn.GRU, batch_first=True, bidirectional=True), SEQUENCE),
    "GRU, layers": (recurrent(nn.GRU, lambda x: x.permute(2, 0, 1), num_layers=3), SEQUENCE),
    "RNN": (recurrent(nn.RNN, batch_first=True), SEQUENCE),
    "RNN, relu": (recurrent(nn.RNN, batch_first=True, nonlinearity="relu", bidirectional=True), SEQUENCE),
}  # fmt: skip


def built(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = make()
    return randomize_(model, 7).double().requires_grad_(True)


def output(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return model(x)


@pytest.mark.parametrize("recipe", ["none", "wn", "fold"])
@pytest.mark.parametrize("name", FUSED)
def test_a_norm_goes_into_the_layer_that_reads_it_and_nothing_changes(name: str, recipe: str) -> None:
    make, x = FUSED[name]
    model = built(make)
    before = fingerprint(model)
    if recipe == "fold":
        folding = ns.fold_with_report(model, example_inputs=x)
        found = folding.model
        assert [row.name for row in folding.rows if row.result == "part of reader"] == ["bn"]
    else:
        result = ns.convert(model, recipe, example_inputs=x)
        (step,), found = result.plan.steps, result.model
        assert step.reader == "reader"
        assert step.taken_up_by == "reader"
        assert any("reader" in note for note in step.notes)
        assert result.init.rows[0].method == "exact"
    left = found.get_submodule("bn")  # an identity, or a check of how many axes its input has
    assert norm_of(left) is None
    assert not left.state_dict()
    assert not changed(before, fingerprint(model))
    for inputs in (x, x.flip(0) * 2 + 1):
        assert distance(output(found, inputs), output(model, inputs)) < 1e-12
    with conversion_checks.held(model, found):
        assert distance(output(found, x), output(model, x)) < 1e-12


def test_a_fused_model_that_is_off_by_a_little_is_seen() -> None:
    for name in ("Linear behind transpose", "Conv2d, circular", "LSTM, bidirectional"):
        make, x = FUSED[name]
        model = built(make)
        found = ns.convert(model, "none", example_inputs=x).model
        for parameter in found.parameters():
            with torch.no_grad():
                parameter.flatten()[0].add_(1e-9)
            assert distance(output(found, x), output(model, x)) > 1e-12
            with torch.no_grad():
                parameter.flatten()[0].sub_(1e-9)


@pytest.mark.parametrize("name", FUSED)
def test_other_recipes_leave_the_layer_behind_alone(name: str) -> None:
    make, x = FUSED[name]
    model = built(make)
    reader = {n: t.clone() for n, t in model.get_submodule("reader").state_dict().items()}
    for recipe in ("mobn", "wn+mobn", "gn"):
        result = ns.convert(model, recipe, example_inputs=x, check=False)
        assert [step.reader for step in result.plan.steps] == [None]
        after = result.model.get_submodule("reader").state_dict()
        assert all(torch.equal(t, after[n]) for n, t in reader.items())


# ---------------------------------------------------------------------------------------------------- what is refused


class Twice(Net):
    """The norm's output goes to a second place."""

    def forward(self, x: Tensor) -> Any:
        y = self.bn(x)
        return self.reader(y) + y.mean()


class ReaderTwice(Net):
    """The layer reads something else, too."""

    def forward(self, x: Tensor) -> Any:
        return self.reader(self.bn(x)) + self.reader(x)


class NormTwice(Net):
    def forward(self, x: Tensor) -> Any:
        return self.reader(self.bn(x)) + self.bn(x).mean()


class BothTwice(Net):
    """Each call of the norm goes into one of the layer: nothing else is read, and it may go."""

    def forward(self, x: Tensor) -> Any:
        return self.reader(self.bn(x)) + self.reader(self.bn(x.flip(0)))


class Kept(Net):
    def forward(self, x: Tensor) -> Any:
        self.kept = self.bn(x)
        return self.reader(self.kept) * 1.0


class InTraining(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(x)
        if self.training:
            y = y * 2
        return self.reader(y)


class OtherInTraining(Net):
    def forward(self, x: Tensor) -> Any:
        return self.reader(x if self.training else self.bn(x))


class ReturnsBoth(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(x)
        return self.reader(y), y


class Stateful(Net):
    """The norm's values are an LSTM's first state as well."""

    def forward(self, x: Tensor) -> Any:
        y = self.bn(x).transpose(1, 2)
        return self.reader(y, y[:, 0, :4].unsqueeze(0).contiguous())[0]


class AsState(nn.Module):
    """The norm's values are the first state, and not what is read step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.reader = nn.BatchNorm1d(6), nn.GRU(6, 6)

    def forward(self, x: Tensor) -> Any:
        return self.reader(x.movedim(2, 0), self.bn(x).movedim(2, 0)[:1])[0]


class WeightRead(Net):
    def forward(self, x: Tensor) -> Any:
        return self.reader(self.bn(x)) + self.reader.weight.mean()


class InPlace(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(x)
        y[:, 0] = 1.0
        return self.reader(y)


class Between(Net):
    def forward(self, x: Tensor) -> Any:
        return self.reader(torch.relu(self.bn(x)))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.reader = nn.BatchNorm1d(6), nn.LSTM(6, 4, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(self.bn(x).transpose(1, 2), [6, 5, 2], batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.reader(packed)[0], batch_first=True)[0]


class SubclassedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.abs())


class SubclassedLSTM(nn.LSTM):
    def forward(self, x: Tensor, state: Any = None) -> Any:
        return super().forward(x.abs(), state)


class NormRelu2d(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


def tied() -> nn.Module:
    model = Net(nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1))
    return nn.Sequential(model, same_weight(model.reader))


def same_weight(layer: nn.Module) -> nn.Module:
    other = nn.Conv2d(6, 6, 1)
    other.weight = layer.weight  # type: ignore[assignment]
    return other


def hooked(what: str, before: bool = False) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Net(nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1))
        module = model.get_submodule(what)
        if before:
            module.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        else:
            module.register_forward_hook(lambda module, args, output: 2 * output)
        return model

    return make


def named_norm(cls: type[nn.Module], reader: Callable[[], nn.Module] = lambda: nn.Conv2d(6, 5, 3)) -> Any:
    return lambda: cls(nn.BatchNorm2d(6), reader())


# Each with the words of the reason where it is the layer's that the norm could have gone into.
REFUSED: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "zero padding": (conv(4, 5, 3, padding=1), MAP, "zero padding stands for values behind the norm"),
    "padding on one side": (conv(4, 5, 3, padding=(0, 1)), MAP, "zero padding"),
    "same padding": (conv(4, 5, 3, padding="same"), MAP, "zero padding"),
    "same padding in one direction": (conv(4, 5, (1, 3), padding="same"), MAP, "zero padding"),
    "transposed": (lambda: Net(nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 5, 3)), MAP, "border of a transposed"),
    "transposed and grouped": (
        lambda: Net(nn.BatchNorm1d(6), nn.ConvTranspose1d(6, 4, 3, groups=2)), SEQUENCE, "border of a transposed",
    ),
    "recurrent without bias": (recurrent(nn.GRU, batch_first=True, bias=False), SEQUENCE, "no bias"),
    "tied": (tied, MAP, "tied to"),
    "parametrized": (
        lambda: Net(nn.BatchNorm2d(6), nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 5, 1))), MAP,
        "already parametrized",
    ),
    "parametrized LSTM": (
        lambda: Net(
            nn.BatchNorm1d(6),
            nn.utils.parametrizations.weight_norm(nn.LSTM(6, 4, batch_first=True), "weight_ih_l0"),
            moved,
        ), SEQUENCE, "already parametrized",
    ),
    "weight read": (named_norm(WeightRead), MAP, "outside of its call"),
    "a layer's subclass": (lambda: Net(nn.BatchNorm2d(6), SubclassedConv(6, 5, 1)), MAP, "not torch's own"),
    "an LSTM's subclass": (lambda: Net(nn.BatchNorm1d(6), SubclassedLSTM(6, 4), moved), SEQUENCE, ""),
    "positions, not channels": (linear(lambda x: x), SEQUENCE, "not the norm's"),
    "rows, not channels": (linear(lambda x: x.transpose(1, 2), nn.BatchNorm2d), MAP, "not the norm's"),
    "a convolution over what were columns": (
        lambda: Net(nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1), lambda x: x.transpose(1, 3)), MAP, "not the norm's",
    ),
    "a batch that takes the channels' place": (
        lambda: Net(nn.BatchNorm1d(6), nn.Conv1d(6, 5, 1), lambda x: x.transpose(0, 1)), image(6, 6, 6),
        "not the norm's",
    ),
    "used twice": (named_norm(Twice), MAP, ""),
    "reader used elsewhere": (named_norm(ReaderTwice), MAP, ""),
    "norm used elsewhere": (named_norm(NormTwice), MAP, ""),
    "returned, too": (named_norm(ReturnsBoth), MAP, ""),
    "changed in place": (named_norm(InPlace), MAP, ""),
    "an activation between": (named_norm(Between), MAP, ""),
    "in training alone": (named_norm(InTraining), MAP, ""),
    "not in training": (named_norm(OtherInTraining), MAP, ""),
    "a hook on the norm": (hooked("bn"), MAP, ""),
    "a hook before the layer": (hooked("reader", before=True), MAP, ""),
    "a hook behind the layer": (hooked("reader"), MAP, "a forward hook sees its input"),
    "the first state, too": (lambda: Stateful(nn.BatchNorm1d(6), nn.GRU(6, 4, batch_first=True)), SEQUENCE, ""),
    "the first state": (AsState, image(3, 6, 6), ""),
    "a packed sequence": (Packed, SEQUENCE, ""),
    "a norm and its activation": (lambda: Net(NormRelu2d(6), nn.Conv2d(6, 5, 1)), MAP, ""),
    "attention": (
        lambda: Net(nn.BatchNorm1d(6), nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), moved), SEQUENCE, "",
    ),
}  # fmt: skip


# A folded model is for evaluation, and its weights are plain.
RIGHT_WHEN_FOLDED = {"in training alone", "not in training", "parametrized", "parametrized LSTM"}


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "no inputs"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_layer_may_not_take_up_stays_and_is_right(name: str, given: bool) -> None:
    make, x, words = REFUSED[name]
    model = built(make)
    prefix = "0." if name == "tied" else ""
    for recipe in ("none", "wn"):
        before = fingerprint(model)
        result = ns.convert(model, recipe, example_inputs=x if given else None, check=False)
        assert not changed(before, fingerprint(model))  # now: a run alone changes what an LSTM keeps of its weights
        (step,) = (step for step in result.plan.steps if step.site.norm == f"{prefix}bn")
        assert step.reader is None
        told = " ".join((*step.site.remarks, *step.notes, step.site.unread or ""))
        assert told, "no reason"
        if words and given:  # without, the number of axes may not be known
            assert words in told
            assert words in str(result.plan)
        same_in_both_modes(result.model, model, x)
    before = fingerprint(model)
    folding = ns.fold_with_report(model, example_inputs=x if given else None)
    assert not changed(before, fingerprint(model))
    if name not in RIGHT_WHEN_FOLDED:
        assert not any("reader" in row.result for row in folding.rows)
    same_in_both_modes(folding.model, model, x, train=False)


def same_in_both_modes(found: nn.Module, model: nn.Module, x: Tensor, train: bool = True) -> None:
    assert distance(output(found, x), output(model, x)) < 1e-12
    if train:
        with conversion_checks.held(model, found):
            assert distance(output(found, x), output(model, x)) < 1e-12


def test_a_pair_that_is_called_twice_is_one_and_goes_together() -> None:
    model = built(named_norm(BothTwice))
    result = ns.convert(model, "none", example_inputs=MAP)
    assert result.plan.steps[0].reader == "reader"
    same_in_both_modes(result.model, model, MAP)


def test_what_is_kept_in_an_attribute_is_seen_by_whoever_looks_there() -> None:
    """As a layer's output kept in an attribute may be: what the model gives stays as it is."""
    model = built(named_norm(Kept))
    for found in (ns.convert(model, "none", example_inputs=MAP).model, ns.fold(model, example_inputs=MAP)):
        same_in_both_modes(found, model, MAP, train=False)


@pytest.mark.parametrize("name", ["zero padding", "padding on one side", "same padding"])
def test_without_the_refusal_the_output_would_be_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of what is refused: the comparison sees a border that was treated like the inside."""
    monkeypatch.setattr(reading, "why_no_affine", lambda module: None)
    make, x, _ = REFUSED[name]
    model = built(make)
    result = ns.convert(model, "none", example_inputs=x, check=False)
    assert result.plan.steps[0].reader == "reader"
    assert distance(output(result.model, x), output(model, x)) > 1e-6


@pytest.mark.parametrize("name", ["Linear behind transpose", "LSTM, batch first"])
def test_without_a_look_at_the_axis_the_output_would_be_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unfit = reading._unfit

    def careless(flow: Any, fqn: str, channels: int, rank: int | None, axis: int) -> str | None:
        return unfit(flow, fqn, channels, rank, (rank or 0) - 1)

    monkeypatch.setattr(reading, "_unfit", careless)
    model = built(linear(lambda x: x))
    result = ns.convert(model, "none", example_inputs=SEQUENCE, check=False)
    assert result.plan.steps[0].reader == "reader"
    assert distance(output(result.model, SEQUENCE), output(model, SEQUENCE)) > 1e-6


# --------------------------------------------------------------------------------------------------- what the zoo says


def fold_forward_(layer: nn.Module, to: Affine) -> None:
    """W ← W·diag(a) and b ← b + W·shift on the side of the input, in place, by torch's documentation of the weights."""
    if isinstance(layer, Recurrent):
        for end in ("", "_reverse") if layer.bidirectional else ("",):
            weight, bias = (getattr(layer, f"{what}_ih_l0{end}").data for what in ("weight", "bias"))
            bias.add_(weight @ to.shift)
            weight.mul_(to.scale)
        return
    weight, groups = layer.weight.data, getattr(layer, "groups", 1)
    assert isinstance(weight, Tensor)
    rows = weight.view(groups, -1, weight.shape[1], weight[0, 0].numel()).sum(-1)  # (groups, out/groups, in/groups)
    shift = rows @ to.shift.view(groups, -1, 1)
    layer.bias = nn.Parameter(shift.flatten() + (0 if layer.bias is None else layer.bias.data))
    factor = to.scale.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).flatten(0, 1)
    weight.mul_(factor.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2)))


def readers_of(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (_ConvNd, nn.Linear, *Recurrent)
    found = {fqn: m for fqn, m in model.named_modules() if isinstance(m, kinds) and not isinstance(m, _ConvTransposeNd)}
    return {fqn: m for fqn, m in found.items() if not nn.utils.parametrize.is_parametrized(m)}


def width(layer: nn.Module) -> int:
    return int(
        layer.input_size if isinstance(layer, Recurrent) else layer.weight.shape[1] * getattr(layer, "groups", 1)
    )


def forward_folds(entry: Entry) -> dict[str, float]:
    """The smallest error that folding each norm into a layer behind it makes, in the worse of both modes."""
    found: dict[str, float] = {}
    runs = [original(entry.name, train=train) for train in (False, True)]
    for norm in sorted(set().union(*(run.affines for run in runs))):
        to = next(run.affines[norm] for run in runs if norm in run.affines)
        errors = [float("inf")]
        for name, layer in readers_of(fresh(entry)).items():
            if width(layer) == to.scale.numel() and not any(norm in run.on_batch_statistics for run in runs):
                errors.append(max(_forward_error(entry, norm, name, to, train) for train in (False, True)))
        found[norm] = min(errors)
    return found


def _forward_error(entry: Entry, norm: str, layer: str, to: Affine, train: bool) -> float:
    model = fresh(entry)
    fold_forward_(readers_of(model)[layer], to)
    try:
        after = observe(entry, model, without=norm, train=train).outputs
    except RuntimeError:  # the layer does not run on this, with or without the norm
        return float("inf")
    before = original(entry.name, train).outputs
    if [t.shape for t in after] != [t.shape for t in before]:
        return float("inf")
    scale = max(float(t.abs().max()) for t in before)
    return max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)) / scale


@pytest.mark.parametrize("entry", ZOO, ids=str)
def test_a_norm_folds_into_a_layer_behind_it_exactly_where_the_zoo_says(entry: Entry) -> None:
    errors = forward_folds(entry)
    assert not {norm: error for norm, error in errors.items() if 1e-12 < error < 1e-3}, "neither right nor wrong"
    assert {norm for norm, error in errors.items() if error <= 1e-12} == entry.readable


def test_the_zoo_has_norms_that_a_layer_may_read_and_others_and_a_lie_is_found() -> None:
    readable = [entry for entry in ZOO if entry.readable]
    assert len(readable) > 2
    for entry, claim in ((readable[0], frozenset()), (BY_NAME["norm_first"], frozenset({"0"}))):
        with pytest.raises(AssertionError):
            test_a_norm_folds_into_a_layer_behind_it_exactly_where_the_zoo_says(_claiming(entry, claim))


def _claiming(entry: Entry, readable: frozenset[str]) -> Entry:
    return type(entry)(**{**vars(entry), "readable": readable})


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "no inputs"])
@pytest.mark.parametrize("entry", ZOO, ids=str)
def test_a_reader_is_taken_only_where_the_zoo_says_that_it_may_be(entry: Entry, given: bool) -> None:
    model = entry.model().double()
    inputs = doubled(entry.inputs)() if given and not entry.kwargs() else None
    plan = ns.plan(model, "none", example_inputs=inputs)
    taken = {step.site.norm for step in plan.steps if step.reader is not None}
    assert taken <= entry.readable
    if given:
        left = {step.site.norm for step in plan.steps if step.site.layer is None} & entry.readable
        assert taken == left


# ------------------------------------------------------------------------------------------------- random compositions

SIDE = 4  # of every axis: nothing crashes that mixes them up


class Square(Network):
    """A network of which as many samples are taken as there is of all else, so that they may be mixed up, too."""

    def inputs(self, batch: int = SIDE, seed: int = 1) -> tuple[Tensor, ...]:
        return super().inputs(SIDE, seed)


class Writer:
    """Writes one small network of norms, movements of axes and layers that read, from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.rank = self.random.choice([2, 3, 3, 3, 4, 4, 4])
        self.shape = (SIDE,) * (self.rank - 1)
        self.init: list[str] = []
        self.body: list[str] = []
        self.norms = 0
        self.layers: list[str] = []
        self.features: set[str] = set()

    def module(self, code: str) -> str:
        name = f"m{len(self.init)}"
        self.init.append(f"self.{name} = {code}")
        return f"self.{name}"

    def network(self) -> Network:
        value = "x"
        for _ in range(self.random.choice([1, 1, 2, 3])):
            value = self.random.choice([self.read, self.read, self.read, self.fed, self.fed, self.alone])(value)
        forward = "\n        ".join([*self.body, f"return {value}"])
        init = "\n        ".join(["super().__init__()", *self.init])
        source = (
            "import torch\nfrom torch import nn\n\n\n"
            "def double(module, args, output):\n    return 2 * output\n\n\n"
            "def first(output):\n    return output[0] if isinstance(output, tuple) else output\n\n\n"
            f"class Net(nn.Module):\n    def __init__(self):\n        {init}\n\n"
            f"    def forward(self, x):\n        {forward}\n\n\n"
            "def adjust(model):\n    pass\n"
        )
        return Square(source, self.shape, self.norms, frozenset(self.features))

    def put(self, code: str) -> str:
        name = f"v{len(self.body)}"
        self.body.append(f"{name} = {code}")
        return name

    def rarely(self, one_in: int) -> bool:
        return self.random.randrange(one_in) == 0

    def norm(self, value: str) -> str:
        self.norms += 1
        kind = f"nn.BatchNorm{max(self.rank - 2, 1)}d({SIDE})"
        if self.rank < 5 and self.rarely(8):
            kind = f"nn.SyncBatchNorm({SIDE})"
        if self.rarely(8):
            kind = kind.replace(")", ", affine=False)")
        name = self.module(kind)
        if self.rarely(30):
            self.features.add("hook")
            self.init.append(f"{name}.register_forward_hook(double)")
        return self.put(f"{name}({value})")

    def aimed(self, value: str, source: int, destination: int) -> str:
        """One axis moved to where it is wanted, or such movements as there are."""
        if self.rank < 3 or self.rarely(2):
            return self.moves(value)
        self.features.add("moved")
        order = list(range(self.rank))
        order.insert(destination % self.rank, order.pop(source))
        code = [f"{value}.movedim({source}, {destination})", f"{value}.permute({tuple(order)})"]
        return self.put(self.random.choice([*code, f"{value}.transpose({source}, {destination})"]))

    def moves(self, value: str) -> str:
        """No, one or several movements of axes, in all the ways to write them, that now and then move the batch."""
        for _ in range(self.random.choice([0, 1, 1, 1, 2, 3])):
            value = self.put(self.move(value))
        return value

    def move(self, value: str) -> str:
        axes = list(range(self.rank))
        fixed = 0 if self.rarely(6) else 1
        order = axes[:fixed] + self.random.sample(axes[fixed:], self.rank - fixed)
        a, b = (self.random.choice(axes[fixed:]) for _ in range(2))
        if self.random.random() < 0.7:  # those that matter most
            a, b = self.random.choice([(1, self.rank - 1), (self.rank - 1, 1), (1, -1), (-1, 1)])
            order = (
                self.random.choice([[0, *range(2, self.rank), 1], [0, self.rank - 1, *range(1, self.rank - 1)]])
                if self.rank > 2
                else order
            )
        given = tuple(axis - self.rank * self.rarely(3) for axis in order)
        self.features.add("moved")
        return self.random.choice(
            [
                f"{value}.transpose({a}, {b})",
                f"torch.transpose({value}, {a}, {b})",
                f"{value}.transpose(dim0={a}, dim1={b})",
                f"{value}.swapaxes({a}, {b})",
                f"torch.swapdims({value}, {a}, {b})",
                f"{value}.movedim({a}, {b})",
                f"torch.movedim({value}, ({a},), ({b},))",
                f"torch.moveaxis({value}, {a}, {b})",
                f"{value}.permute({given})",
                f"{value}.permute(*{given})",
                f"torch.permute({value}, {given})",
                f"{value}.permute(dims={given})",
                f"torch.permute(input={value}, dims={list(given)})",
                self.random.choice(
                    [
                        f"{value}.mT",
                        f"{value}.contiguous()",
                        f"{value}.flip(1)",
                        f"{value}.reshape({value}.shape)",
                        f"{value}.flatten({self.rank - 2}).view({value}.shape)",
                    ]
                ),
            ]
        )  # fmt: skip

    def reader(self) -> str:
        """A layer that keeps all sizes: a new one, or now and then one that was called already."""
        if self.layers and self.rarely(8):
            self.features.add("layer called again")
            return self.random.choice(self.layers)
        bias = self.random.choice(["", "", ", bias=False"])
        choices = [f"nn.Linear({SIDE}, {SIDE}{bias})"] * 3
        if self.rank in (3, 4, 5):
            n, groups = self.rank - 2, self.random.choice([1, 1, 2, SIDE])
            padded = ", padding=1, padding_mode='{}'".format(
                self.random.choice(["zeros", "reflect", "replicate", "circular"])
            )
            choices += [
                f"nn.Conv{n}d({SIDE}, {SIDE}, 1, groups={groups}{bias})",
                f"nn.Conv{n}d({SIDE}, {SIDE}, 3{padded}, groups={groups}{bias})",
                f"nn.ConvTranspose{n}d({SIDE}, {SIDE}, 1{bias})",
            ]
        if self.rank == 3:
            for kind in ("LSTM", "GRU", "RNN"):
                first = self.random.choice([", batch_first=True", ""])
                choices.append(f"nn.{kind}({SIDE}, {SIDE}{first}{bias})")
                choices.append(f"nn.{kind}({SIDE}, {SIDE // 2}{first}, num_layers=2, bidirectional=True)")
        name = self.module(self.random.choice(choices))
        self.layers.append(name)
        if self.rarely(30):
            self.features.add("hook")
            self.init.append(f"{name}.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))")
        return name

    def layer(self, value: str) -> str:
        return self.put(f"first({self.reader()}({value}))")

    def between(self, value: str) -> str:
        """What forks the value, changes it or looks at it, mostly nothing."""
        kind = self.random.choice([""] * 20 + ["fork", "relu", "train", "in place", "returned"])
        if not kind:
            return value
        self.features.add(kind)
        if kind == "fork":
            self.put(f"{value}.sum()")
            return self.put(f"{value} + 0 * v{len(self.body) - 1}")
        if kind == "relu":
            return self.put(f"{value}.relu()")
        if kind == "train":
            self.features.add("use in training")
            return self.put(f"{value} * 2 if self.training else {value}")
        if kind == "in place":
            return self.put(f"{value}.mul_(2)" if value != "x" else f"{value} * 2")
        return value if self.rarely(2) else self.put(f"{value} + {value}")

    def read(self, value: str) -> str:
        """A norm that a layer reads."""
        y = self.norm(value)
        return self.layer(self.between(y if self.rarely(3) else self.aimed(y, 1, -1)))

    def fed(self, value: str) -> str:
        """A norm that a layer feeds; an activation behind it, so that it is not read, too."""
        y = self.norm(self.between(self.aimed(self.layer(value), -1, 1)))
        return self.put(f"{y}.relu()") if self.random.random() < 0.7 else y

    def alone(self, value: str) -> str:
        return self.moves(self.put(f"{self.moves(value)}.tanh()"))


def compositions(count: int, start: int = 0) -> Iterator[Network]:
    seen: set[str] = set()
    seed = start
    while len(seen) < count:
        network = Writer(seed).network()
        seed += 1
        if network.norms and network.source not in seen:
            seen.add(network.source)
            yield network


def recipes_for(number: int) -> tuple[str, ...]:
    return ("none", ("wn", "mobn", "wn+mobn")[number % 3], ("gn", "ln", "gn+aws", "gn+ws", "ws")[number % 5])


def quick(network: Network) -> ns.Plan:
    """Check one exact recipe and a fold, with inputs, in both modes; return the plan."""
    model = network.model()
    result = ns.convert(model, "none", example_inputs=network.inputs(), check=False)
    conversion_checks.same(network, result.model, model, "none")
    with conversion_checks.held(model, result.model):
        conversion_checks.same(network, result.model, model, "none in train mode with the statistics held")
    conversion_checks.folded_is_same(network, model, "the folded original")
    return result.plan


TRIED = 120


def test_compositions_of_norms_movements_and_layers_keep_their_function_and_have_what_they_are_for() -> None:
    kinds: Counter[str] = Counter()
    for network in compositions(TRIED):
        kinds.update(network.features)
        for step in quick(network).steps:
            kinds["read"] += step.reader is not None
            kinds["moved to channels"] += step.site.layer is not None and step.site.axis == -1
            kinds["unread"] += step.site.unread is not None
            kinds["alone"] += step.taken_up_by is None
    assert kinds["read"] > 20, kinds
    assert kinds["moved to channels"] > 4, kinds
    assert kinds["unread"] > 10, kinds
    assert kinds["alone"] > 10, kinds
    assert len(kinds) > 9, kinds


def test_some_compositions_keep_every_promise_by_all_kinds_of_recipes() -> None:
    """At its expected statistics, planned without inputs, folded, and held against torch.export's graph, too."""
    for number, network in enumerate(compositions(15, start=10_000)):
        check(network, recipes_for(number))


def _try_all(found: Iterator[Network]) -> None:
    for network in found:
        quick(network)


@pytest.mark.parametrize("what", ["axis", "padding", "order"])
def test_a_wrong_answer_is_found_among_the_compositions(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: an axis that is not looked at, a border that is not, axes that seem never to move."""
    if what == "axis":
        monkeypatch.setattr(reading, "reads_last_axis", lambda module: isinstance(module, _ConvNd))
    elif what == "padding":
        monkeypatch.setattr(readers, "_pads", lambda conv: False)
    else:
        order_of = reading.order_of

        def unmoved(node: Any, module: Any, rank: int | None) -> Any:
            return order_of(node, module, rank) and tuple(range(rank or 0))

        monkeypatch.setattr(reading, "order_of", unmoved)
    with pytest.raises(BrokenPromiseError, match="wrong output"):
        _try_all(compositions(2 * TRIED))


# --------------------------------------------------------------------------------------------- without example inputs

SHOWN = {
    "a Linear reads it": linear(moved),
    "an activation between": linear(lambda x: torch.relu(x).transpose(1, 2)),
    "an activation module before": lambda: nn.Sequential(Axes(1, 2), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 5)),
    "permute": linear(lambda x: x.permute(0, 2, 1)),
    "movedim": linear(lambda x: x.movedim(2, 1)),
}
OPEN = {
    "no movement": linear(lambda x: x),
    "a movement that two axes allow": linear(lambda x: x.transpose(-1, -2).transpose(0, 1).contiguous()),
    "an addition of what may have more axes": linear(lambda x: (x + torch.zeros(1, 1, 1)).transpose(1, 2)),
}


class Axes(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(self.a, self.b)


@pytest.mark.parametrize("name", SHOWN)
def test_moved_axes_show_the_rank_without_example_inputs(name: str) -> None:
    (step,) = ns.plan(built(SHOWN[name]), "none").steps
    assert step.site.rank == 3
    assert not step.site.rank_by_example


@pytest.mark.parametrize("name", OPEN)
def test_what_two_axes_allow_shows_no_rank(name: str) -> None:
    (step,) = ns.plan(built(OPEN[name]), "none").steps
    assert step.site.rank is None


@pytest.mark.parametrize("recipe", ["none", "wn"])
@pytest.mark.parametrize("name", ["a Linear reads it", "permute", "movedim"])
def test_a_linear_layer_behind_moved_axes_takes_the_norm_up_without_example_inputs(name: str, recipe: str) -> None:
    model = built(SHOWN[name]).eval()
    result = ns.convert(model, recipe)
    assert result.plan.steps[0].notes == ("goes into reader, which reads it",)
    assert not any(isinstance(module, (ChannelAffine, RankCheck)) for module in result.model.modules())
    with torch.no_grad():
        assert torch.allclose(result.model(SEQUENCE), model(SEQUENCE), atol=1e-10)
        result.model.reader.bias.data[0] += 1
        assert not torch.allclose(result.model(SEQUENCE), model(SEQUENCE), atol=1e-2)  # negative control
    with pytest.raises((IndexError, RuntimeError)):  # what shows the rank is what raises
        result.model(image(4, 6))


class Branches(nn.Module):
    """Moves axes where there are three, and has a branch that no trace knows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.fc(x))
        return y.transpose(1, 2) if y.dim() == 3 else y


@pytest.mark.parametrize("recipe", ["wn+mobn", "none", "gn"])
def test_a_movement_that_one_run_shows_is_no_proof_of_a_rank(recipe: str) -> None:
    model, vectors = built(Branches).eval(), image(6, 6)
    options = {"group_size": 2} if recipe == "gn" else {}
    converted = ns.swap_norms(model, recipe, example_inputs=SEQUENCE, **options)
    assert ns.plan(model, recipe, example_inputs=SEQUENCE, **options).steps[0].site.rank_by_example
    folded = ns.fold(converted.eval())
    with torch.no_grad():
        for found, x in ((converted, vectors), (folded, vectors)):
            try:
                given = found(x)
            except (ValueError, RuntimeError, IndexError):
                continue
            assert recipe == "gn" or torch.allclose(given, model(x), atol=1e-10)
