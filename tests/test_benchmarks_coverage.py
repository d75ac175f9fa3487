"""The benchmarks that cover many networks: what their checks must see, on tiny ones."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conversion_checks import BrokenPromiseError, Findings
from torch import nn
from zoo import ZOO

import normswap as ns

pytestmark = pytest.mark.filterwarnings("ignore")  # what opacus and torch.fx's fuse say when they are imported

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
BY_NAME = {entry.name: entry for entry in ZOO}


@pytest.fixture(scope="module")
def loaded() -> Iterator[dict[str, ModuleType]]:
    """The benchmarks as modules: they import one another by name, as scripts do."""
    sys.path.append(str(BENCHMARKS))
    found = {name: importlib.import_module(name) for name in ("networks", "zoo_coverage", "peers")}
    spec = importlib.util.spec_from_file_location("benchmarks_random", BENCHMARKS / "random_networks.py")
    assert spec is not None
    assert spec.loader is not None
    random = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks_random"] = random  # dataclasses look their module up
    spec.loader.exec_module(random)
    yield {**found, "random": random}
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def coverage(loaded: dict[str, ModuleType]) -> Any:
    return loaded["zoo_coverage"]


@pytest.fixture
def peers(loaded: dict[str, ModuleType]) -> Any:
    return loaded["peers"]


def tiny() -> nn.Module:
    pairs = ((nn.Conv2d(i, o, 3), nn.BatchNorm2d(o), nn.ReLU()) for i, o in ((3, 8), (8, 16)))
    return nn.Sequential(*(layer for pair in pairs for layer in pair))


@pytest.fixture
def network(loaded: dict[str, ModuleType]) -> Any:
    networks: Any = loaded["networks"]
    return networks.Network("tests", "tiny", "tiny", tiny, networks.image, (3, 8))


# --------------------------------------------------------------------------------------------------- coverage


def test_a_network_is_planned_on_the_meta_device_and_checked_at_the_smallest_side_it_takes(
    coverage: Any, network: Any
) -> None:
    row = coverage.plan_of(network)
    assert (row.norms, row.missing, row.left, row.ok) == (2, [], [], True)
    assert row.sites == {"module, with its layer": 2}
    found = coverage.checked(network)
    assert found.ok, found
    assert (found.side, found.norms, found.with_layer, found.confirmed) == (8, 2, 2, 2)
    assert 0 < found.exact < 1e-5
    assert 0 < found.fold < 1e-5


def test_a_network_without_a_norm_has_no_row(coverage: Any, network: Any) -> None:
    assert coverage.plan_of(dataclasses.replace(network, make=lambda: nn.Conv2d(3, 4, 3))) is None


def test_a_plan_that_misses_a_norm_fails(coverage: Any, network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ns.plan

    def forgets(*args: Any, **kwargs: Any) -> Any:
        found = plan(*args, **kwargs)
        return dataclasses.replace(found, steps=found.steps[1:])

    monkeypatch.setattr(ns, "plan", forgets)
    row = coverage.plan_of(network)
    assert row.missing == ["1"]
    assert not row.ok


@pytest.mark.parametrize("verb", ["convert", "fold"])
def test_a_wrong_weight_and_a_wrong_pair_fail_the_check(
    coverage: Any, network: Any, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = getattr(ns, verb)

    def broken(*args: Any, **kwargs: Any) -> Any:
        result = made(*args, **kwargs)
        with torch.no_grad():
            next(p for p in (result if verb == "fold" else result.model).parameters()).mul_(1.1)
        return result

    monkeypatch.setattr(ns, verb, broken)
    assert "wrong output" in coverage.checked(network).error


class FindsNothing(nn.Module):
    """A detector whose output holds no value."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone(x).flatten()[:0]


def test_a_network_that_gives_no_value_is_compared_inside_or_not_at_all(coverage: Any, network: Any) -> None:
    empty = dataclasses.replace(network, make=FindsNothing)
    assert "wrong output" in coverage.checked(empty).error
    found = coverage.checked(dataclasses.replace(empty, inside=("backbone",)))
    assert found.ok, found
    assert 0 < found.exact < 1e-5


def test_rows_are_kept_and_taken_up_again(coverage: Any, network: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = coverage.Results(file).get("plan", "tests/tiny", lambda: coverage.plan_of(network))
    again = coverage.Results(file).get("plan", "tests/tiny", lambda: pytest.fail("it is known"))
    assert row == again
    assert coverage.Planned(**again).norms == 2


def test_a_sample_takes_each_family_in_turn_and_leaves_the_large_out(coverage: Any) -> None:
    rows = [coverage.Planned(f"{f}{n}", f, n) for f, n in (("a", 2), ("a", 1), ("b", 5), ("c", 10**9))]
    assert coverage.sample(rows, None) == ["a1", "b5", "a2"]
    assert coverage.sample(rows, 2) == ["a1", "b5"]


def test_the_reports_say_what_failed(coverage: Any) -> None:
    planned = coverage.Planned("p/x", "x", 1, 2, ["bn"], {}, {}, [["bn2", "code", "why"]])
    text = coverage.plan_report("p", [planned], 0)
    assert "MISSING   p/x: bn" in text
    assert "code  why" in text
    wrong = coverage.Checked("p/x", contradicted=["bn: no"], pairs_left=[["bn", "conv", ""]])
    assert "WRONG     p/x: bn: no" in coverage.check_report("p", [wrong])
    assert not wrong.ok
    assert not dataclasses.replace(wrong, contradicted=[]).ok, "a pair left alone without a reason"


# ------------------------------------------------------------------------------------------------------ peers


def case(peers: Any, name: str) -> Any:
    entry = BY_NAME[name]
    return peers.Case(name, entry.model(), entry.inputs(), entry.norms)


def test_a_wrong_fold_and_a_crash_are_told_from_a_right_one(peers: Any) -> None:
    ours, fuse = peers.FOLDS.values()
    for name, right in (("conv_bn_relu_chain", 1), ("pair_called_twice", 0), ("untraceable_root", 0)):
        assert peers.count_fold(case(peers, name), ours).right == 1
        assert peers.count_fold(case(peers, name), fuse).right == right
    assert peers.count_fold(case(peers, "pair_called_twice"), fuse).wrong
    assert peers.count_fold(case(peers, "untraceable_root"), fuse).crashes
    assert peers.count_fold(case(peers, "conv_bn_relu_chain"), fuse).folded == 2
    assert peers.count_fold(case(peers, "conv_bn_relu_chain"), lambda model, x: model).folded == 0


def test_what_a_swap_keeps_is_counted(peers: Any) -> None:
    ours, opacus, walk = (peers.count_swap(case(peers, "large_eps"), swap) for swap in peers.SWAPS.values())
    assert [swap.converted for swap in (ours, opacus, walk)] == [1, 1, 1]
    assert (ours.gamma, ours.beta, ours.eps) == (1, 1, 1)
    assert (opacus.gamma, opacus.beta, opacus.eps) == (0, 0, 0)
    assert (walk.gamma, walk.beta, walk.eps) == (1, 1, 1)
    ours, opacus, walk = (peers.count_swap(case(peers, "norm_relu_subclass"), s) for s in peers.SWAPS.values())
    assert [swap.converted for swap in (ours, opacus, walk)] == [1, 0, 1]


def test_another_gamma_beta_or_activation_is_not_kept(peers: Any) -> None:
    old, new = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
    with torch.no_grad():
        old.weight.copy_(torch.tensor([1.0, -2.0, 0.0, 3.0]))
        new.weight.copy_(torch.tensor([0.5, -1.0, 0.0, 6.0]))
    assert peers.keeps_gamma(new, old), "one factor per group"
    assert peers.keeps_beta(new, old)
    for wrong in ([0.5, 1.0, 0.0, 6.0], [0.5, -2.0, 0.0, 6.0], [0.5, -1.0, 0.1, 6.0], [-0.5, 1.0, 0.0, 6.0]):
        new.weight.data = torch.tensor(wrong)
        assert not peers.keeps_gamma(new, old)
    new.bias.data[0] = 0.1
    assert not peers.keeps_beta(new, old)


# -------------------------------------------------------------------------------------------- random networks


def test_a_broken_promise_makes_the_exit_code_1_and_is_printed_as_code(
    loaded: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    random: Any = loaded["random"]

    def breaks(network: Any, oracle: bool = True) -> Any:
        if "nn.Tanh" in network.source:
            raise BrokenPromiseError("wrong output", "a Tanh")
        return Findings(network.norms, *(Counter() for _ in range(3)), 0, Counter(), False)

    threads = ["--threads", str(torch.get_num_threads())]
    file = tmp_path / "rows.jsonl"
    monkeypatch.setattr(random, "CHUNK", 10)
    arguments = ["--count", "20", "--shrink", "--results", str(file), *threads]
    monkeypatch.setattr(random.conversion_checks, "check", breaks)
    assert random.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "# wrong output: a Tanh" in printed
    smallest = printed.split("# wrong output: a Tanh")[1]
    assert smallest.count("nn.Tanh()") == 1
    rows = [random.json.loads(line)["count"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2
    drawn = [len(source) for row in rows for *_, source in row["broken"]]
    assert len(smallest) < sum(drawn) / len(drawn)
    assert "class Block" not in smallest, "it was shrunk to a step or two"


def test_refusals_of_two_percent_make_the_exit_code_1(loaded: dict[str, ModuleType], tmp_path: Path) -> None:
    random: Any = loaded["random"]
    file = tmp_path / "rows.jsonl"
    for refused, code in ((1, 0), (2, 1)):
        row = {"networks": 50, "norms": 100, "refusals": {"why": refused}, "broken": []}
        file.write_text(random.json.dumps({"chunk": "0:50", "count": row}) + "\n", encoding="utf-8")
        arguments = ["--count", "50", "--results", str(file), "--threads", str(torch.get_num_threads())]
        assert random.main(arguments) == code


def test_the_constructs_by_hand_are_what_their_forwards_do(peers: Any) -> None:
    for kind in peers.CONSTRUCTS:
        first, again = peers.built(kind), peers.built(kind)
        for _, which in peers.ways(kind, train=False):
            given = {} if which is None else {"which": which}
            with torch.no_grad():
                found, expected = first(first.sample(), **given), again.by_hand(first.sample(), which)
            assert peers.difference(found, expected) < 1e-12


def test_a_construct_that_a_swap_makes_wrong_is_told_from_a_right_one(peers: Any) -> None:
    ours, _, walk = peers.SWAPS.values()
    by_name = {kind.__name__: kind for kind in peers.CONSTRUCTS}
    assert peers.outcome_of_swap(by_name["OverLastAxis"], ours) == "right"
    assert peers.outcome_of_swap(by_name["OverLastAxis"], walk).startswith("**wrong, by ")
    assert peers.outcome_of_swap(by_name["BranchesOnClass"], ours).startswith("refused: “no norm")
    assert peers.outcome_of_swap(by_name["BranchesOnClass"], walk).startswith("**wrong, by ")
    fold, fuse = peers.FOLDS.values()
    assert peers.outcome_of_fold(by_name["LegacyHook"], fold) == "right"
    assert peers.outcome_of_fold(by_name["LegacyHook"], fuse).startswith("refused: “cannot assign")
