"""Plan every network with a BatchNorm of timm, torchvision, transformers, smp or ultralytics, and check many of them.

    python benchmarks/zoo_coverage.py                                  # plan every network of every package
    python benchmarks/zoo_coverage.py --package timm --check --sample 200 --results timm.jsonl
    python benchmarks/zoo_coverage.py --name 'timm/repvgg*' --check

Plans are made on the meta device, without weights and without inputs. ``--check`` makes those of at most 30 million
parameters for real (``--sample N``: N of each package, round robin over its families, the smallest first), with random
weights, γ of both signs and statistics of noise, and tests that

- ``wn+mobn``, an exact recipe, keeps the output to 1e-3 of its size in float32. Where a random network amplifies its
  own rounding beyond that, it is compared in float64, to 1e-6;
- the folded model does, too;
- every site with a layer is one that ``torch.export``'s graph shows to be a pair, where the network can be exported.

With ``--results FILE`` each network is one line of that file, and a run takes up what an earlier one left; the file
speaks for the code that wrote it. The exit code is 1 if a plan failed or misses a norm, or a check failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from networks import LEFT_OUT, PACKAGES, TESTS, Inputs, Network, missing
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

import normswap as ns
from normswap.errors import VerificationError
from normswap.loading.importing import first_line
from normswap.records import Plan, text_table

sys.path.append(str(TESTS))
import oracle_export

LARGEST = 30_000_000
ALLOWED = {torch.float32: 1e-3, torch.float64: 1e-6}
PLAN_SECONDS, CHECK_SECONDS = 120, 600


@dataclass(frozen=True)
class Planned:
    """What the plan of one network is.

    Args:
        name: The network's full name.
        family: Its family.
        parameters: How many it has.
        norms: How many BatchNorms it has, frozen ones among them, counted by class and buffers.
        missing: Those that do not stand in the plan exactly once.
        sites: How many sites there are by kind and by what becomes of the layer.
        alone: How many norms convert without their layer, by reason.
        left: The norms that stay: name, code, reason.
        seconds: How long the plan took.
        error: Why there is no plan.
    """

    name: str
    family: str
    parameters: int = 0
    norms: int = 0
    missing: list[str] = field(default_factory=list)
    sites: dict[str, int] = field(default_factory=dict)
    alone: dict[str, int] = field(default_factory=dict)
    left: list[list[str]] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error and not self.missing


@dataclass(frozen=True)
class Checked:
    """What the checks of one network gave.

    Args:
        name: The network's full name.
        side: The side of its input.
        exact: By how much ``wn+mobn`` moved the output, relative to its size.
        fold: By how much the folded model is off the original.
        dtype: In which precision both hold.
        with_layer: How many sites have a layer, with the inputs given.
        norms: How many norms convert.
        confirmed: How many of those with a layer torch.export's graph shows.
        contradicted: What it contradicts.
        pairs_left: The pairs that it shows and that no site has: norm, layer, reason.
        not_exported: Why there is no graph.
        seconds: How long it all took.
        error: What failed.
    """

    name: str
    side: int = 0
    exact: float = 0.0
    fold: float = 0.0
    dtype: str = "float32"
    with_layer: int = 0
    norms: int = 0
    confirmed: int = 0
    contradicted: list[str] = field(default_factory=list)
    pairs_left: list[list[str]] = field(default_factory=list)
    not_exported: str = ""
    seconds: float = 0.0
    error: str = ""

    @property
    def ok(self) -> bool:
        unexplained = [norm for norm, _, reason in self.pairs_left if not reason]
        return not self.error and not self.contradicted and not unexplained


# ------------------------------------------------------------------------------------------------------ plans


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorms of a model; a frozen one has the class's name and its statistics as buffers."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        or ("BatchNorm" in type(module).__name__ and isinstance(module._buffers.get("running_mean"), Tensor))
    }


def plan_of(network: Network, recipe: str = "gn+ws") -> Planned | None:
    """Plan ``network`` on the meta device; None where it has no BatchNorm."""
    try:
        with torch.device("meta"):
            model = network.make()
    except Exception:  # some networks compute with values while they are made
        model = network.make()
    norms = batch_norms(model)
    if not norms:
        return None
    parameters = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    plan = ns.plan(model, recipe)
    seconds = time.perf_counter() - start
    stands = Counter(step.site.norm for step in plan.steps) + Counter(s.name for s in plan.skips if s.what == "norm")
    sites = Counter(f"{s.site.kind}, {'with its layer' if s.site.layer else 'alone'}" for s in plan.steps)
    alone = Counter(general(s.site.reason or "", model) for s in plan.steps if s.site.layer is None)
    return Planned(
        network.full_name,
        network.family,
        parameters,
        len(norms),
        [name for name in norms if stands[name] != 1],
        dict(sites),
        dict(alone),
        [[s.name, s.code, s.reason] for s in plan.skips if s.what == "norm" and s.code != "not-batch-norm"],
        seconds,
    )


def general(reason: str, model: nn.Module) -> str:
    """Return a reason with the class in place of each module's name."""
    modules = dict(model.named_modules())
    words = []
    for word in reason.split(" "):
        bare = word.strip(",:()")
        named = bare and bare in modules and words[-1:] != ["the"]  # "the model" is the whole of it
        words.append(word.replace(bare, f"a {type(modules[bare]).__name__}") if named else word)
    return " ".join(words)


# ----------------------------------------------------------------------------------------------------- checks


@torch.no_grad()
def randomize(model: nn.Module, inputs: Inputs) -> None:
    """Give every BatchNorm γ of both signs, and statistics that nearly are those of the network on ``inputs``."""
    norms = [norm for norm in batch_norms(model).values() if getattr(norm, "running_mean", None) is not None]
    for norm in norms:
        if norm.weight is not None:
            norm.weight.uniform_(0.5, 1.5).mul_(torch.randint(0, 2, norm.weight.shape) * 2 - 1)
            norm.bias.normal_(std=0.2)
    live = [norm for norm in norms if isinstance(norm, _BatchNorm)]
    momenta = [norm.momentum for norm in live]
    for norm in live:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the plain average: one batch's statistics as they are
    call(model, inputs)
    for norm, momentum in zip(live, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    for norm in norms:
        for statistic in (norm.running_mean, norm.running_var):
            statistic.mul_(2 ** torch.empty_like(statistic).uniform_(-0.3, 0.3))


@torch.no_grad()
def call(model: nn.Module, inputs: Inputs, inside: Sequence[str] = ()) -> list[Tensor]:
    """Return all numbers that the model gives, and those that the submodules ``inside`` give, in the order of calls."""
    outputs: list[Any] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *args: outputs.append(args[2])) for name in inside
    ]
    try:
        outputs.append(model(**inputs) if isinstance(inputs, dict) else model(*inputs))
    finally:
        for handle in handles:
            handle.remove()
    return [t for t in pytree.tree_leaves(_plain(outputs)) if isinstance(t, Tensor) and t.is_floating_point()]


def _plain(value: Any) -> Any:
    """Return the tensors of an output, transformers' ModelOutput among them."""
    if isinstance(value, dict):
        return [_plain(item) for item in value.values()]
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, relative to its tensor's largest value; infinite for NaN, other shapes or no value."""
    if [t.shape for t in found] != [t.shape for t in expected] or not any(t.numel() for t in expected):
        return float("inf")
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if b.numel():
            value = float((a.double() - b.double()).abs().amax() / b.double().abs().amax().clamp(min=1e-300))
            worst = max(worst, value) if value == value else float("inf")
    return worst


def real(network: Network) -> tuple[nn.Module, int]:
    """Return the network with random weights and statistics in eval mode, and the smallest side that it takes."""
    torch.manual_seed(0)
    model, reason = network.make().eval(), Exception("no side to try")
    for side in network.sides:
        try:
            randomize(model, network.inputs(4, side))
        except Exception as cause:
            reason = cause
            continue
        return model, side
    raise reason


def check(network: Network) -> Checked:
    """Convert and fold the network, and hold its plan against torch.export's graph."""
    start = time.perf_counter()
    model, side = real(network)
    inputs = network.inputs(2, side)
    if not all(bool(t.isfinite().all()) for t in call(model, inputs)):
        raise ValueError("the network's own output is not finite")
    dtype = torch.float32
    try:
        exact, fold, plan = moved(model, inputs, network.inside)
    except VerificationError:  # the package's own check, on a network that is chaotic in float32
        exact = fold = float("inf")
    if not max(exact, fold) <= ALLOWED[dtype]:
        try:
            model, inputs, dtype = model.double(), doubled(inputs), torch.float64
            exact, fold, plan = moved(model, inputs, network.inside)
        except RuntimeError as cause:  # a forward that casts
            raise ValueError(f"moved by {max(exact, fold):.1e}, and there is no float64: {first_line(cause)}") from None
    error = ""
    if not max(exact, fold) <= ALLOWED[dtype]:
        error = f"wrong output: wn+mobn {exact:.1e}, folded {fold:.1e} in {dtype}"
    positional = () if isinstance(inputs, dict) else inputs
    keywords = inputs if isinstance(inputs, dict) else {}
    exported = oracle_export.export(model, positional, keywords, modes=(False,))
    seen = oracle_export.compare(plan, exported) if exported.graphs else None
    return Checked(
        network.full_name,
        side,
        exact,
        fold,
        str(dtype).removeprefix("torch."),
        sum(step.site.layer is not None for step in plan.steps),
        len(plan.steps),
        seen.right if seen else 0,
        list(seen.wrong) if seen else [],
        [[norm, layer, general(why, model)] for norm, layer, why in seen.missed] if seen else [],
        exported.failed.get(False, ""),
        time.perf_counter() - start,
        error,
    )


def doubled(inputs: Inputs) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)


def moved(model: nn.Module, inputs: Inputs, inside: Sequence[str] = ()) -> tuple[float, float, Plan]:
    """Return how far ``wn+mobn`` and the folded model are from the original, and the plan."""
    expected = call(model, inputs, inside)
    result = ns.convert(model, "wn+mobn", example_inputs=inputs, check=False)
    exact = distance(call(result.model.eval(), inputs, inside), expected)
    folded = ns.fold(result.model, example_inputs=inputs)
    return exact, distance(call(folded, inputs, inside), expected), result.plan


# ------------------------------------------------------------------------------------------------ running them


class TooLongError(BaseException):
    """A network took longer than it may; no ``except Exception`` on the way stops it."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def interrupt(*_: Any) -> None:
        raise TooLongError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Results:
    """The rows so far, and the file that keeps them."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.rows[row["what"], row["name"]] = row["row"]

    def get(self, what: str, name: str, make: Any) -> dict[str, Any]:
        """Return the row of that name, made now where there is none."""
        if (what, name) not in self.rows:
            row = make()
            self.rows[what, name] = {} if row is None else asdict(row)
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"what": what, "name": name, "row": self.rows[what, name]}) + "\n")
            gc.collect()
        return self.rows[what, name]


def planned(network: Network) -> Planned | None:
    try:
        with at_most(PLAN_SECONDS), quietly():
            return plan_of(network)
    except (Exception, TooLongError) as cause:
        return Planned(network.full_name, network.family, error=f"{type(cause).__name__}: {first_line(cause)}")


def checked(network: Network) -> Checked:
    try:
        with at_most(CHECK_SECONDS), quietly():
            return check(network)
    except (Exception, TooLongError) as cause:
        return Checked(network.full_name, error=f"{type(cause).__name__}: {first_line(cause)}")


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the packages and torch's exporter say of their own future
        yield


def sample(rows: Sequence[Planned], count: int | None) -> list[str]:
    """Return the names of ``count`` networks that are small enough: of each family in turn the smallest left."""
    families: dict[str, list[Planned]] = {}
    for row in sorted(rows, key=lambda row: (row.parameters, row.name)):
        if row.parameters <= LARGEST:
            families.setdefault(row.family, []).append(row)
    names: list[str] = []
    while any(families.values()):
        names += [family.pop(0).name for family in families.values() if family]
    return names if count is None else names[:count]


# ---------------------------------------------------------------------------------------------------- reports


def plan_report(package: str, rows: Sequence[Planned], plain: int) -> str:
    good = [row for row in rows if not row.error]
    sites: Counter[str] = Counter()
    alone: Counter[str] = Counter()
    left: dict[tuple[str, str], list[str]] = {}
    for row in good:
        sites.update(row.sites)
        alone.update(row.alone)
        for name, code, reason in row.left:
            left.setdefault((code, reason), []).append(f"{row.name}:{name}")
    norms, stay = sum(row.norms for row in good), sum(map(len, left.values()))
    lines = [
        f"{package}: {len(good)} of {len(rows)} networks with BatchNorm planned ({plain} have none)",
        f"  norms     {norms:,}, of which in the plan exactly once: {norms - sum(len(row.missing) for row in good):,}",
        *(f"  sites     {count:,} {kind}" for kind, count in sites.most_common()),
        f"  left      {stay} norms, in {sum(bool(row.left) for row in good)} networks; "
        f"the other {sum(not row.left for row in good)} plans leave no BatchNorm",
        f"  seconds   {sum(row.seconds for row in good):.0f} in all, "
        f"{max((row.seconds for row in good), default=0):.1f} at most",
        *(f"  FAILED    {row.name}: {row.error}" for row in rows if row.error),
        *(f"  MISSING   {row.name}: {', '.join(row.missing)}" for row in good if row.missing),
    ]
    if left:
        cells = [(str(len(of)), code, why, of[0]) for (code, why), of in sorted(left.items(), key=lambda x: -len(x[1]))]
        lines += ["", text_table(("left", "code", "reason", "first"), cells)]
    if alone:
        lines += ["", text_table(("alone", "reason"), [(str(n), why) for why, n in alone.most_common(15)])]
    return "\n".join(lines)


def check_report(package: str, rows: Sequence[Checked]) -> str:
    done = [row for row in rows if not row.error]
    exported = [row for row in rows if row.confirmed or row.pairs_left or (not row.not_exported and not row.error)]
    narrow, wide = ([row for row in done if row.dtype == dtype] for dtype in ("float32", "float64"))
    chaotic = max((max(row.exact, row.fold) for row in wide), default=0.0)
    pairs: dict[str, list[str]] = {}
    for row in rows:
        for norm, _, reason in row.pairs_left:
            pairs.setdefault(reason or "NO REASON", []).append(f"{row.name}:{norm}")
    lines = [
        f"{package}: {len(done)} of {len(rows)} networks checked and right",
        f"  norms     {sum(row.norms for row in done):,}, {sum(row.with_layer for row in done):,} with their layer",
        f"  wn+mobn   moved the output by at most {max((row.exact for row in narrow), default=0.0):.0e}, "
        f"folded {max((row.fold for row in narrow), default=0.0):.0e} of its size in float32; "
        f"{len(wide)} chaotic networks in float64: {chaotic:.0e}",
        f"  oracle    {len(exported)} networks exported: {sum(r.confirmed for r in rows):,} sites confirmed, "
        f"{sum(len(r.contradicted) for r in rows)} contradicted, {sum(map(len, pairs.values()))} pairs left alone",
        f"  seconds   {sum(row.seconds for row in rows):.0f}",
        *(f"  FAILED    {row.name}: {row.error}" for row in rows if row.error),
        *(f"  WRONG     {row.name}: {text}" for row in rows for text in row.contradicted),
    ]
    if pairs:
        cells = [(str(len(of)), why, of[0]) for why, of in sorted(pairs.items(), key=lambda x: -len(x[1]))]
        lines += ["", text_table(("pairs", "left alone, because", "first"), cells)]
    reasons = Counter(row.not_exported for row in rows if row.not_exported)
    if reasons:
        lines += ["", text_table(("not exported", "why"), [(str(n), why) for why, n in reasons.most_common()])]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--package", action="append", choices=PACKAGES, help="only this package; may be repeated")
    parser.add_argument("--name", action="append", metavar="PATTERN", help="only networks such as 'timm/resnet*'")
    parser.add_argument("--check", action="store_true", help="convert, fold and export those that are small enough")
    parser.add_argument("--sample", type=int, metavar="N", help="check N networks of each package, of every family")
    parser.add_argument("--results", type=Path, metavar="FILE", help="keep each network's row here, and go on from it")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results, ok = Results(options.results), True
    for package in options.package or PACKAGES:
        module, networks = PACKAGES[package]
        if hint := missing(module):
            print(f"{package}: left out, it is not installed: {hint}\n")
            continue
        if package in LEFT_OUT:
            print(f"{package}: left out, {LEFT_OUT[package][1]}")
        chosen = {
            network.full_name: network
            for network in networks()
            if not options.name or any(fnmatchcase(network.full_name, pattern) for pattern in options.name)
        }
        rows: list[Planned] = []
        for i, (name, network) in enumerate(chosen.items()):
            if row := results.get("plan", name, lambda network=network: planned(network)):
                rows.append(Planned(**row))
            _progress(f"{i + 1} of {len(chosen)} planned")
        print(plan_report(package, rows, len(chosen) - len(rows)), end="\n\n", flush=True)
        ok &= all(row.ok for row in rows)
        if not options.check:
            continue
        names = sample([row for row in rows if not row.error], options.sample)
        checks = []
        for i, name in enumerate(names):
            row = results.get("check", name, lambda network=chosen[name]: checked(network))
            checks.append(Checked(**row))
            _progress(f"{i + 1} of {len(names)} checked, {name}")
        print(check_report(package, checks), end="\n\n", flush=True)
        ok &= all(row.ok for row in checks)
    return 0 if ok else 1


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:70s}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
