"""Two networks side by side: what a site is fitted to is what plain runs give there, and nothing is left behind."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.errors import InitializationError, InputError
from normswap.runs.paired_sites import PairedSite, SiteBatch
from normswap.runs.pausing import THREAD
from normswap.runs.side_by_side import run_side_by_side
from normswap.runs.uses import find_uses

C = 4


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == THREAD]


def conv() -> nn.Conv2d:
    return nn.Conv2d(C, C, 3, padding=1)


class Chain(nn.Module):
    """Two conv-norm pairs, all a parent for the variations below."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = conv(), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Any:
        return self.join(F.relu(self.bn1(self.conv1(x))))

    def join(self, r: Tensor) -> Any:
        return self.bn2(self.conv2(r)).relu()


def networks(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model with statistics that are not 0 and 1, and a copy with GroupNorms."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    converted = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            setattr(converted.get_submodule(parent), child, nn.GroupNorm(2, C))
    return model.eval(), converted.eval()


def sites_of(original: nn.Module, converted: nn.Module, pairs: dict[str, str]) -> list[PairedSite]:
    return [
        PairedSite(norm, converted.get_submodule(layer), converted.get_submodule(norm), original.get_submodule(norm))
        for layer, norm in pairs.items()
    ]


PAIRS = {"conv1": "bn1", "conv2": "bn2"}


def images(n: int = 3, *, batches: int = 2) -> list[tuple[Tensor, ...]]:
    return [(torch.randn(n, C, 5, 5),) for _ in range(batches)]


def change(site: PairedSite) -> None:
    """Stands for a fit: other values, the same ones at each run."""
    with torch.no_grad():
        for parameter in (*site.source.parameters(), *site.norm.parameters()):
            parameter.mul_(0.9).add_(0.05)


class Log:
    """A fit that records what it is given, and changes the parameters if asked to."""

    def __init__(self, *, changing: bool = False) -> None:
        self.found: dict[str, list[SiteBatch]] = {}
        self.changing = changing

    def __call__(self, site: PairedSite, batches: Sequence[SiteBatch]) -> None:
        assert site.name not in self.found, "fitted twice"
        self.found[site.name] = [
            SiteBatch(
                v.x.clone(),
                v.reference.clone(),
                v.shortcut and (v.shortcut[0].clone(), v.shortcut[1].clone()),
                v.into_relu,
            )
            for v in batches
        ]
        if self.changing:
            change(site)


def run(model: nn.Module, *, changing: bool = True, pairs: dict[str, str] = PAIRS, batches: Any = None) -> Any:
    original, converted = networks(model)
    batches = images() if batches is None else batches
    log = Log(changing=changing)
    run_side_by_side(original, converted, sites_of(original, converted, pairs), batches, log)
    return original, converted, batches, log


def plain_input(model: nn.Module, name: str, batch: tuple[Tensor, ...]) -> Tensor:
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, args: found.append(args[0].clone()))
    with torch.no_grad():
        model(*(value.clone() for value in batch))
    handle.remove()
    return found[0]


# -------------------------------------------------------------------------------------------- what the fits see


@pytest.mark.parametrize("changing", [False, True])
def test_each_site_is_fitted_once_in_order_to_what_plain_runs_give(changing: bool) -> None:
    """Also while fits change the network: a site's input is that of the network as it is in the end."""
    original, converted, batches, log = run(Chain(), changing=changing)
    assert list(log.found) == ["bn1", "bn2"]
    for layer, norm in PAIRS.items():
        for batch, found in zip(batches, log.found[norm], strict=True):
            assert torch.equal(found.x, plain_input(converted, layer, batch))
            assert torch.equal(found.reference, plain_input(original, norm, batch))
            assert found.shortcut is None
    other = plain_input(converted, "conv2", batches[1])
    assert not torch.equal(log.found["bn2"][0].x, other), "batches are told apart"
    change(sites_of(original, converted, PAIRS)[0])
    assert not torch.equal(log.found["bn2"][0].x, plain_input(converted, "conv2", batches[0]))


def test_sites_may_be_given_in_another_order_than_they_run_in() -> None:
    """Control flow may run them so; the original runs past a site and what it had there is kept."""
    original, converted, batches, log = run(Chain(), pairs=dict(reversed(PAIRS.items())))
    assert torch.equal(log.found["bn1"][0].reference, plain_input(original, "bn1", batches[0]))
    assert torch.equal(log.found["bn2"][1].x, plain_input(converted, "conv2", batches[1]))


def test_a_layer_alone_is_fitted_to_the_originals_output() -> None:
    original, converted = networks(nn.Sequential(conv(), nn.ReLU()))
    batches, log = images(), Log()
    site = PairedSite("0", converted.get_submodule("0"), None, original.get_submodule("0"), alone=True)
    run_side_by_side(original, converted, [site], batches, log)
    with torch.no_grad():
        assert torch.equal(log.found["0"][1].reference, original[0](*batches[1]))
    assert torch.equal(log.found["0"][1].x, batches[1][0])


def test_functional_norms_are_known_by_their_running_means() -> None:
    class Functional(Chain):
        def join(self, r: Tensor) -> Tensor:
            bn = self.bn2
            return F.batch_norm(self.conv2(r), running_mean=bn.running_mean, running_var=bn.running_var)

    class Replaced(Chain):
        pass

    original, _ = networks(Functional())
    _, converted = networks(Replaced())
    site = PairedSite("bn2", converted.conv2, converted.bn2, None, original.bn2.running_mean)
    log, batches = Log(), images()
    run_side_by_side(original, converted, [site], batches, log)
    with torch.no_grad():
        wanted = original.conv2(F.relu(original.bn1(original.conv1(*batches[0]))))
    assert torch.equal(log.found["bn2"][0].reference, wanted)


# ---------------------------------------------------------------------------------------------------- additions


def added_by(join: Callable[[Tensor, Tensor, nn.Module], Any]) -> type[Chain]:
    class Joined(Chain):
        def join(self, r: Tensor) -> Any:
            return join(self.bn2(self.conv2(r)), r, self)

    return Joined


ADDED = {
    "y + r": lambda y, r, m: (y + r).relu(),
    "r + y": lambda y, r, m: (r + y).relu(),
    "y += r": lambda y, r, m: y.__iadd__(r).relu(),
    "r += y": lambda y, r, m: r.__iadd__(y).relu(),
    "torch.add": lambda y, r, m: torch.add(r, y).relu(),
    "torch.add by keyword": lambda y, r, m: torch.add(r, other=y).relu(),
    "y += r, returned": lambda y, r, m: y.__iadd__(r),
    "y.add_": lambda y, r, m: y.add_(r).relu(),
    "alpha=1": lambda y, r, m: torch.add(y, r, alpha=1),
    "after an identity": lambda y, r, m: nn.Identity()(y) + r,
    "its shape is read": lambda y, r, m: y + r.view(y.shape),
}
NOT_ADDED = {
    "alpha": lambda y, r, m: torch.add(y, r, alpha=2),
    "alpha by position": lambda y, r, m: torch.add(y, r * 1, alpha=-1).relu(),
    "to itself": lambda y, r, m: y + y,
    "a number": lambda y, r, m: y + 1,
    "one channel": lambda y, r, m: y + r[:, :1],
    "used again": lambda y, r, m: (y + r) * y,
    "returned too": lambda y, r, m: (y + r, {"y": [y]}),
    "activated": lambda y, r, m: y.relu() + r,
    "in-place, used before": lambda y, r, m: y.exp() * y.__iadd__(r),
    "in-place activated": lambda y, r, m: y.relu_() + r,
    "twice": lambda y, r, m: (y + r) + y,
    "subtracted": lambda y, r, m: r - y,
}


@pytest.mark.parametrize("how", ADDED)
def test_an_output_that_only_goes_into_an_addition_is_fitted_there(how: str) -> None:
    original, converted, batches, log = run(added_by(ADDED[how])())
    assert [found.shortcut is not None for found in log.found["bn2"]] == [True, True]
    assert all(found.shortcut is None for found in log.found["bn1"])
    for batch, found in zip(batches, log.found["bn2"], strict=True):
        for network, addend in zip((original, converted), found.shortcut, strict=True):
            assert torch.equal(addend, plain_input(network, "conv2", batch)), "r, before it was changed in place"
        assert torch.equal(found.x, plain_input(converted, "conv2", batch))
        assert torch.equal(found.reference, plain_input(original, "bn2", batch))


@pytest.mark.parametrize("how", NOT_ADDED)
def test_any_other_use_is_no_such_addition(how: str) -> None:
    _, converted, batches, log = run(added_by(NOT_ADDED[how])())
    assert all(found.shortcut is None for found in log.found["bn2"])
    assert torch.equal(log.found["bn2"][1].x, plain_input(converted, "conv2", batches[1]))


INTO_RELU = {
    "F.relu": lambda y, r, m: F.relu(y),
    "in place": lambda y, r, m: F.relu(y, inplace=True) * 2 + r,
    "y.relu_()": lambda y, r, m: y.relu_() * y,
    "a module": lambda y, r, m: nn.ReLU(inplace=True)(y) - 1,
    "ReLU6": lambda y, r, m: nn.ReLU6()(y),
    "ReLU6, in place": lambda y, r, m: nn.ReLU6(inplace=True)(y) * r,
    "clamp": lambda y, r, m: y.clamp(min=0),
    "twice": lambda y, r, m: F.relu(y) + torch.relu(y) * 2,
    "the sum": lambda y, r, m: F.relu(y + r),
    "the sum, in place": lambda y, r, m: nn.ReLU(inplace=True)(y.__iadd__(r)) * 3,
    "the sum of r += y": lambda y, r, m: r.__iadd__(y).relu(),
}
NOT_INTO_RELU = {
    "nothing": lambda y, r, m: y,
    "a leak": lambda y, r, m: F.leaky_relu(y),
    "Hardtanh": lambda y, r, m: F.hardtanh(y),
    "clamp above": lambda y, r, m: y.clamp(max=0),
    "GELU": lambda y, r, m: F.gelu(y),
    "used again": lambda y, r, m: F.relu(y) + y.abs(),
    "returned too": lambda y, r, m: (F.relu(y), y),
    "after a scale": lambda y, r, m: F.relu(y * 2),
    "one addend of a sum without a ReLU": lambda y, r, m: y + r,
    "the sum is returned too": lambda y, r, m: (F.relu(z := y + r), z),
    "the sum is used before": lambda y, r, m: (z := y + r).exp() + F.relu(z),
}


@pytest.mark.parametrize("how", [*INTO_RELU, *NOT_INTO_RELU])
def test_an_output_has_a_threshold_only_where_all_of_it_goes_into_a_relu(how: str) -> None:
    join = INTO_RELU.get(how) or NOT_INTO_RELU[how]
    _, converted, batches, log = run(added_by(join)())
    into_relu = how in INTO_RELU
    for batch, found in zip(batches, log.found["bn2"], strict=True):
        if not into_relu:
            assert found.threshold is None
        elif "sum" in how:
            assert torch.equal(found.threshold, -plain_input(converted, "conv2", batch)), "what r lifts above zero"
        else:
            assert torch.equal(found.threshold, torch.zeros_like(found.reference))


def test_of_two_norms_that_are_added_the_first_one_is_found() -> None:
    class Both(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn1(self.conv1(x)) + self.bn2(self.conv2(x))

    original, converted, batches, log = run(Both())
    uses = find_uses(original, {n: original.get_submodule(n) for n in ("bn1", "bn2")}, batches[0])
    assert uses.into_addition == {"bn1"}
    assert list(log.found) == ["bn2", "bn1"]
    with torch.no_grad():
        shortcut = converted.bn2(converted.conv2(*batches[0]))
    assert torch.equal(log.found["bn1"][0].shortcut[1], shortcut), "the other one is fitted before"


def test_a_batch_norm_with_an_activation_is_not_fitted_at_the_addition() -> None:
    class NormRelu(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    model = added_by(ADDED["y + r"])()
    model.bn2 = NormRelu(C)
    original, converted = networks(model)
    converted.bn2 = nn.Sequential(nn.GroupNorm(2, C), nn.ReLU())
    site = PairedSite("bn2", converted.conv2, converted.bn2[0], original.bn2)
    log = Log()
    run_side_by_side(original, converted, [site], images(), log)
    assert [found.shortcut for found in log.found["bn2"]] == [None, None]


# ------------------------------------------------------------------------------------------------- awkward models


class Shared(Chain):
    """One pair, called on five levels, as a detector's head is."""

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = [x[..., i:, i:] for i in range(5)]
        return [self.bn1(self.conv1(level)).relu() for level in levels]


def test_a_layer_that_is_called_five_times_is_fitted_at_its_first_call() -> None:
    original, _, batches, log = run(Shared(), pairs={"conv1": "bn1"})
    assert torch.equal(log.found["bn1"][0].x, batches[0][0])
    assert torch.equal(log.found["bn1"][1].reference, plain_input(original, "bn1", batches[1]))


class Branches(Chain):
    """Batches of three skip the second pair."""

    def join(self, r: Tensor) -> Tensor:
        return r if len(r) == 3 else super().join(r)


def test_batches_may_take_different_ways() -> None:
    _, converted, batches, log = run(Branches(), batches=[*images(3), *images(2), *images(3, batches=1)])
    assert [len(found.x) for found in log.found["bn1"]] == [3, 3, 2, 2, 3]
    assert [len(found.x) for found in log.found["bn2"]] == [2, 2]
    assert torch.equal(log.found["bn2"][0].x, plain_input(converted, "conv2", batches[2]))


def test_a_site_that_no_batch_reaches_is_not_fitted() -> None:
    *_, log = run(Branches())
    assert list(log.found) == ["bn1"]


def test_a_source_whose_input_is_changed_before_its_output_is_there_is_not_fitted() -> None:
    class Changes(Chain):
        def join(self, r: Tensor) -> Tensor:
            y = self.conv2(r)
            r.zero_()
            return self.bn2(y).relu()

    *_, log = run(Changes())
    assert list(log.found) == ["bn1"]


def test_an_input_that_is_changed_afterwards_is_taken_as_it_was() -> None:
    class Changes(Chain):
        def join(self, r: Tensor) -> Tensor:
            y = self.bn2(self.conv2(r)).relu()
            return y + r.zero_()

    _, converted, batches, log = run(Changes())
    assert torch.equal(log.found["bn2"][0].x, plain_input(converted, "conv2", batches[0]))
    assert float(log.found["bn2"][0].x.abs().amax()) > 0


def test_a_forward_may_change_the_models_own_input() -> None:
    class Normalizes(Chain):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.sub_(0.5).div_(2))

    batches = images()
    before = [x.clone() for (x,) in batches]
    _, _, _, log = run(Normalizes(), batches=batches)
    for (x,), value, found in zip(batches, before, log.found["bn1"], strict=True):
        assert torch.equal(x, value), "the user's data stays"
        assert torch.allclose(found.x, (value - 0.5) / 2), "and is normalized once"


def test_a_layer_that_is_called_with_more_than_its_input_keeps_its_output() -> None:
    class Up(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.ConvTranspose2d(C, C, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Any:
            return self.join(F.relu(self.bn1(self.conv1(x, output_size=(10, 10)))))

    *_, log = run(Up())
    assert list(log.found) == ["bn2"]
    assert log.found["bn2"][0].x.shape == (3, C, 10, 10)


def test_inputs_given_by_keyword_are_inputs() -> None:
    class Keywords(Chain):
        def forward(self, x: Tensor) -> Any:
            r = F.relu(self.bn1(input=self.conv1(input=x)))
            return self.bn2(input=self.conv2(input=r)) + r

    *_, batches, log = run(Keywords())
    assert torch.equal(log.found["bn1"][0].x, batches[0][0])
    assert log.found["bn2"][0].shortcut is not None


def test_data_made_in_inference_mode_is_taken() -> None:
    with torch.inference_mode():
        batches = images()
    *_, log = run(Chain(), batches=batches)
    assert list(log.found) == ["bn1", "bn2"]


class Stateful(Chain):
    """Hands a value from one end to the other by an attribute."""

    def forward(self, x: Tensor) -> Any:
        self.kept = x
        return super().forward(x) + self.kept


def test_a_model_that_keeps_state_between_its_layers_is_refused_and_taken_with_one_batch() -> None:
    with pytest.raises(InitializationError, match="keeps state") as caught:
        run(Stateful())
    assert caught.value.code == "calibration-state"
    *_, log = run(Stateful(), batches=images(batches=1))
    assert list(log.found) == ["bn1", "bn2"]


def test_a_model_that_draws_random_numbers_is_refused() -> None:
    class Random(Chain):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x + torch.randn_like(x))

    with pytest.raises(InitializationError, match="is random"):
        run(Random())


@pytest.mark.parametrize(
    "extra", [lambda y: (y, y.new_zeros(0, 4)), lambda y: (y, y / 0 * 0), lambda y: [None, {"y": y}]]
)
def test_empty_nan_and_nested_outputs_are_compared(extra: Callable[[Tensor], Any]) -> None:
    class Outputs(Chain):
        def forward(self, x: Tensor) -> Any:
            return extra(super().forward(x))

    *_, log = run(Outputs())
    assert list(log.found) == ["bn1", "bn2"]


# ---------------------------------------------------------------------------------------- what is left behind


def fingerprint(model: nn.Module) -> list[Any]:
    """All that a model is, as plain values: tensors, flags, hooks, attributes."""
    found: list[Any] = [(name, value.tolist()) for name, value in model.state_dict().items()]
    for name, module in model.named_modules():
        hooks = [len(table) for key, table in sorted(module.__dict__.items()) if "hooks" in key and table is not None]
        found.append((name, module.training, hooks, sorted(module.__dict__)))
    return found


class Counts(Chain):
    """Writes a buffer and attributes in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.calls, self.cache = 0, {}

    def forward(self, x: Tensor) -> Any:
        self.count += 1
        self.calls += 1
        self.cache[self.calls] = x
        return super().forward(x)


def test_nothing_but_what_the_fits_change_is_changed() -> None:
    original, converted = networks(Counts())
    original.train()
    converted.bn1.train()
    before, modes = fingerprint(original), [m.training for m in converted.modules()]
    values = copy.deepcopy(converted.state_dict())
    random = torch.get_rng_state()
    batches = images()
    torch.set_rng_state(random)
    run_side_by_side(original, converted, sites_of(original, converted, PAIRS), batches, Log())
    assert fingerprint(original) == before
    assert [m.training for m in converted.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, values[name]) for name, value in converted.state_dict().items())
    for model in (original, converted):
        assert model.calls == 0
        assert model.cache == {}
    original.count += 1
    assert fingerprint(original) != before, "the fingerprint sees a changed buffer"


def outside(batch: int) -> Callable[..., None]:
    calls = iter(range(10**6))

    def hook(*_: Any) -> None:
        if next(calls) == batch:
            raise KeyboardInterrupt

    return hook


@pytest.mark.parametrize("network", [0, 1])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_an_interrupt_in_a_hook_leaves_nothing_behind(network: int, when: int) -> None:
    both = networks(Chain())
    both[0].train()
    handle = both[network].bn2.register_forward_hook(outside(when))
    before = [fingerprint(model) for model in both]
    random, batches = None, images()
    random = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        run_side_by_side(*both, sites_of(*both, PAIRS), batches, Log())
    assert [fingerprint(model) for model in both] == before
    assert torch.equal(torch.get_rng_state(), random)
    handle.remove()
    log = Log()
    run_side_by_side(*both, sites_of(*both, PAIRS), batches, log)
    assert list(log.found) == ["bn1", "bn2"], "the same networks run well afterwards"


@pytest.mark.parametrize("error", [ValueError("a bad fit"), KeyboardInterrupt()])
def test_an_error_in_a_fit_leaves_nothing_behind(error: BaseException) -> None:
    original, converted = networks(Chain())
    before = fingerprint(original), fingerprint(converted)

    def fit_site(site: PairedSite, batches: Sequence[SiteBatch]) -> None:
        if site.name == "bn2":
            raise error

    with pytest.raises(type(error)):
        run_side_by_side(original, converted, sites_of(original, converted, PAIRS), images(), fit_site)
    assert (fingerprint(original), fingerprint(converted)) == before


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_batch_that_does_not_run_is_an_input_error(bad: int) -> None:
    """Whether it is the first, at which the uses are found, or comes later, among the paused runs."""
    original, converted = networks(Chain())
    before = fingerprint(original)
    batches = images(batches=3)
    batches[bad] = (torch.randn(3, C + 1, 5, 5),)
    with pytest.raises(InputError, match="does not run") as caught:
        run_side_by_side(original, converted, sites_of(original, converted, PAIRS), batches, Log())
    assert caught.value.code == "inputs-do-not-run"
    assert fingerprint(original) == before


def test_the_threads_go_by_their_name() -> None:
    names: list[str] = []
    original, converted = networks(Chain())
    original.bn1.register_forward_hook(lambda *_: names.append(threading.current_thread().name))
    run_side_by_side(original, converted, sites_of(original, converted, PAIRS), images(), Log())
    assert THREAD in names, "so the check that none is left can fail"


def test_activations_are_let_go() -> None:
    """While a site is fitted, no earlier site's inputs are held any more, and after the run nothing is."""
    original, converted = networks(Chain())
    refs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def fit_site(site: PairedSite, batches: Sequence[SiteBatch]) -> None:
        gc.collect()
        alive.append(sum(ref() is not None for ref in refs))
        for found in batches:
            refs.extend((weakref.ref(found.x), weakref.ref(found.reference)))

    class Longer(nn.Sequential):
        pass

    original, converted = networks(Longer(*(nn.Sequential(conv(), nn.BatchNorm2d(C), nn.ReLU()) for _ in range(4))))
    pairs = {f"{i}.0": f"{i}.1" for i in range(4)}
    run_side_by_side(original, converted, sites_of(original, converted, pairs), images(), fit_site)
    gc.collect()
    assert len(refs) == 16
    assert [ref() is not None for ref in refs] == [False] * 16
    assert max(alive) <= 4, "at most those of the site before are still in a caller's frame"


def test_many_small_batches_are_no_problem() -> None:
    *_, log = run(Chain(), batches=images(1, batches=60))
    assert len(log.found["bn2"]) == 60


def test_the_default_device_of_the_caller_holds() -> None:
    class Makes(Chain):
        def forward(self, x: Tensor) -> Any:
            made.append(torch.zeros(1).device.type)
            return super().forward(x)

    made: list[str] = []
    batches = images()
    original, converted = networks(Makes())
    torch.set_default_device("meta")
    try:
        run_side_by_side(original, converted, sites_of(original, converted, PAIRS), batches, Log())
    finally:
        torch.set_default_device(None)
    assert set(made) == {"meta"}
