"""normswap beside its peers: what a swap keeps of a BatchNorm, and what a fold gets wrong.

    python benchmarks/peers.py                    # the awkward models of tests/zoo.py and 100 timm models
    python benchmarks/peers.py --timm 20 --results peers.jsonl
    python benchmarks/peers.py --constructs       # forwards that do more with their norms than call them

Swaps, BatchNorm to GroupNorm: normswap ``convert(to="gn")``, Opacus ``ModuleValidator.fix``, and the isinstance walk
that is written again and again (below, in a version that copies γ, β and eps). Folds, of a model in eval mode: normswap
``convert(to="none")`` and ``fold``, and ``torch.fx.experimental.optimization.fuse``. Every tool gets the model and,
where it takes them, example inputs; γ has both signs, the statistics are random (zoo) or those of noise (timm).

Counted per norm, for those that a tool replaced: γ, kept up to one positive factor per group; β; eps, kept in the new
norm or in the statistics that the layer has taken up; the activation inside the norm's class (timm's BatchNormAct2d).
Counted per model: a *crash* is an exception, of the tool or of the model that it returns; an output is *wrong* if it
moved by more than 1e-3 of its size in float32 (1e-6 in float64 where a random network is chaotic in float32);
*refused* is a model that normswap gives back with a reason, of its self-check for one.

``--constructs`` prints one table, of the networks in ``constructs.py``. There a swap is right where the network
computes what its forward does, written by hand with the new norms called as the old ones were; a fold where the output
is that of the original, in every way in which the network may be called: again, with another argument, in train mode
where it holds its norms. The figure is the largest difference, relative to the largest value.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import logging
import math
import statistics
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from constructs import CONSTRUCTS, Construct
from networks import TESTS, Inputs, Network, timm_networks
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from zoo_coverage import ALLOWED, batch_norms, call, distance, doubled, real

import normswap as ns
from normswap.loading.importing import first_line

LARGEST = 15_000_000


@dataclass(frozen=True)
class Case:
    """A model in eval mode, what it takes, and how many norms it has, functional ones among them."""

    name: str
    model: nn.Module
    inputs: Inputs
    norms: int


# ------------------------------------------------------------------------------------------------------ swaps


def swap_normswap(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, int]:
    result = ns.convert(model, "gn", example_inputs=inputs, spread=0)  # else signs and offsets hide γ and β
    return result.model, len(result.plan.steps)


def swap_opacus(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, int]:
    from opacus.validators import ModuleValidator

    fixed = ModuleValidator.fix(model).to(next(model.parameters()).dtype)  # it makes float32
    return fixed, len(batch_norms(model)) - len(batch_norms(fixed))


def swap_walk(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, int]:
    found = copy.deepcopy(model)
    for parent in list(found.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                norm = nn.GroupNorm(math.gcd(32, child.num_features), child.num_features, child.eps, child.affine)
                if child.affine:
                    norm.load_state_dict({"weight": child.weight, "bias": child.bias})
                setattr(parent, name, norm.to(next(model.parameters()).dtype))
    return found, len(batch_norms(model)) - len(batch_norms(found))


# ------------------------------------------------------------------------------------------------------ folds


def fold_normswap(model: nn.Module, inputs: Inputs) -> nn.Module:
    try:
        model = ns.convert(model, "none", example_inputs=inputs).model
    except ns.NormswapError as refusal:
        if refusal.code != "nothing-to-convert":
            raise
    return ns.fold(model, example_inputs=inputs)


def fold_fuse(model: nn.Module, inputs: Inputs) -> nn.Module:
    return fuse(model)


SWAPS: dict[str, Callable[[nn.Module, Inputs], tuple[nn.Module, int]]] = {
    "normswap `gn`": swap_normswap,
    "Opacus `fix`": swap_opacus,
    "isinstance walk": swap_walk,
}
FOLDS: dict[str, Callable[[nn.Module, Inputs], nn.Module]] = {
    "normswap `none` + `fold`": fold_normswap,
    "torch.fx `fuse`": fold_fuse,
}


@dataclass
class Swap:
    """What a tool made of one model's norms, or of many models'.

    Args:
        norms: How many there are.
        converted: How many it replaced.
        modules: How many of those are modules.
        gamma: Of how many of the modules γ is kept.
        beta: Of how many β is.
        eps: Of how many eps is.
        activations: How many of the modules have an activation inside.
        activations_kept: How many of those are kept.
        moved: By how much the output moved, per model.
        crashes: The exceptions, by model.
    """

    norms: int = 0
    converted: int = 0
    modules: int = 0
    gamma: int = 0
    beta: int = 0
    eps: int = 0
    activations: int = 0
    activations_kept: int = 0
    moved: list[float] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)


@dataclass
class Fold:
    """What a tool's fold gave: models by outcome, and norms that are gone.

    Args:
        norms: How many there are.
        folded: How many are gone, in the models whose output is right.
        right: In how many models the output is right.
        wrong: The models whose output is wrong, and by how much.
        refused: The models that it refuses, and why.
        crashes: The exceptions, by model.
    """

    norms: int = 0
    folded: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)


def count_swap(case: Case, swap: Callable[..., tuple[nn.Module, int]]) -> Swap:
    found = Swap(norms=case.norms)
    try:
        model, converted = swap(copy.deepcopy(case.model), case.inputs)
        expected = call(copy.deepcopy(case.model), case.inputs)
        moved = distance(call(model.eval(), case.inputs), expected)
    except ns.NormswapError as refusal:
        if refusal.code == "nothing-to-convert":  # a refusal with its reason; the model stays as it is
            return found
        found.crashes.append(f"{case.name}: {first_line(refusal)}")
        return found
    except Exception as cause:
        found.crashes.append(f"{case.name}: {type(cause).__name__}: {first_line(cause)}")
        return found
    found.converted = converted
    if converted:
        found.moved.append(moved)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, old in batch_norms(case.model).items():
        new = modules[name]
        norm = next((m for m in new.modules() if isinstance(m, nn.GroupNorm)), None)
        if norm is None:
            continue
        found.modules += 1
        found.gamma += keeps_gamma(norm, old)
        found.beta += keeps_beta(norm, old)
        found.eps += norm.eps == old.eps or absorbed(case.model, model, name, old)
        for activation in activations(old):
            found.activations += 1
            found.activations_kept += any(type(m) is type(activation) for m in new.modules())
    return found


def keeps_gamma(norm: nn.GroupNorm, old: nn.Module) -> bool:
    gamma = getattr(old, "weight", None)
    if norm.weight is None:
        return gamma is None
    new = norm.weight.detach().double()
    gamma = torch.ones_like(new) if gamma is None else gamma.detach().double()
    small = gamma.abs() < 1e-6
    ratio = torch.where(small, torch.nan, new / gamma).view(norm.num_groups, -1)
    low, high = (torch.nan_to_num(ratio, nan=fill).aminmax(dim=1) for fill in (math.inf, -math.inf))
    dead = ~torch.isfinite(high.max)  # nothing but zeros: any factor
    return bool(((low.min > 0) & (high.max - low.min <= 1e-2 * high.max) | dead).all()) and bool(
        (new[small].abs() < 1e-5).all()
    )


def keeps_beta(norm: nn.GroupNorm, old: nn.Module) -> bool:
    beta = getattr(old, "bias", None)
    if norm.bias is None:
        return beta is None
    return torch.allclose(norm.bias.double(), torch.zeros_like(norm.bias.double()) if beta is None else beta.double())


def absorbed(before: nn.Module, after: nn.Module, name: str, old: nn.Module) -> bool:
    """Tell whether some weight was divided by sqrt(var + eps) with the old norm's eps."""
    if getattr(old, "running_var", None) is None:
        return False
    scale = (old.running_var.double() + old.eps).rsqrt()
    new = after.get_submodule(name)
    if (affine := dict(new.named_children()).get("affine")) is not None:
        return torch.allclose(affine.weight.double(), scale, rtol=1e-3)
    layer = next((s.site.layer for s in ns.plan(before, "gn").steps if s.site.norm == name), None)
    return layer is not None and _divided(before.get_submodule(layer), after.get_submodule(layer), scale)


def _divided(before: nn.Module, after: nn.Module, scale: Tensor) -> bool:
    one, two = before.weight.double(), after.weight.double()
    if isinstance(before, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        one = one.view(before.groups, -1, *one.shape[1:]).transpose(1, 2)
        two = two.view(before.groups, -1, *two.shape[1:]).transpose(1, 2)
        one, two = one.flatten(0, 1).flatten(1), two.flatten(0, 1).flatten(1)
    return torch.allclose(one.flatten(1) * scale.view(-1, 1), two.flatten(1), rtol=1e-3, atol=1e-6)


def activations(norm: nn.Module) -> list[nn.Module]:
    return [m for m in norm.children() if not isinstance(m, (nn.Identity, nn.Dropout, nn.Dropout2d))]


def count_fold(case: Case, fold: Callable[[nn.Module, Inputs], nn.Module]) -> Fold:
    found = Fold(norms=case.norms)
    try:
        for dtype, inputs in ((None, case.inputs), (torch.float64, doubled(case.inputs))):
            model = copy.deepcopy(case.model) if dtype is None else copy.deepcopy(case.model).to(dtype)
            expected = call(model, inputs)
            folded = fold(copy.deepcopy(model), inputs)
            moved = distance(call(folded, inputs), expected)
            if moved <= ALLOWED[expected[0].dtype]:
                found.right = 1
                found.folded = case.norms - norm_calls(folded, inputs)
                return found
        found.wrong.append(f"{case.name}: {moved:.0e}")
    except ns.NormswapError as refusal:
        found.refused.append(f"{case.name}: {first_line(refusal)}")
    except Exception as cause:
        found.crashes.append(f"{case.name}: {type(cause).__name__}: {first_line(cause)}")
    return found


def norm_calls(model: nn.Module, inputs: Inputs) -> int:
    """Return how many norms a run of the model still computes with."""
    seen: set[int] = set()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is nn.functional.batch_norm:
                given = args[1] if len(args) > 1 else (kwargs or {}).get("running_mean")
                seen.add(id(given))
            return func(*args, **(kwargs or {}))

    with Watch():
        call(model, inputs)
    frozen = [m for m in batch_norms(model).values() if not isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return len(seen) + len(frozen)


# ------------------------------------------------------------------------------------------------- the models


def awkward() -> Iterator[Case]:
    """The models of tests/zoo.py that take float32 or float64."""
    for entry in tests_zoo().ZOO:
        model = entry.model()
        if not entry.kwargs() and all(p.dtype in ALLOWED for p in model.parameters()):
            yield Case(entry.name, model, entry.inputs(), entry.norms)


@cache
def tests_zoo() -> Any:
    """Return ``tests/zoo.py`` as a module."""
    spec = importlib.util.spec_from_file_location("awkward_zoo", TESTS / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    zoo = importlib.util.module_from_spec(spec)
    sys.modules["awkward_zoo"] = zoo
    spec.loader.exec_module(zoo)
    return zoo


def timm_cases(count: int, skip: Callable[[str], bool]) -> Iterator[tuple[str, Case | None]]:
    """Of each family in turn the next model with a BatchNorm, by name; None for one whose result is known."""
    families: dict[str, list[Network]] = {}
    for network in timm_networks():
        families.setdefault(network.family, []).append(network)
    waiting = deque(families.values())
    while count and waiting:
        family = waiting.popleft()
        while family:
            network = family.pop(0)
            if skip(network.full_name):
                yield network.full_name, None
            elif _fits(network):
                model, side = real(network)
                norms = len(batch_norms(model))
                yield network.full_name, Case(network.full_name, model, network.inputs(2, side), norms)
            else:
                continue
            count -= 1
            waiting.append(family)
            break


def _fits(network: Network) -> bool:
    with torch.device("meta"):
        model = network.make()
    return bool(batch_norms(model)) and sum(p.numel() for p in model.parameters()) <= LARGEST


# ------------------------------------------------------------------------------------------------ constructs


def outcome_of_swap(kind: type[Construct], swap: Callable[..., tuple[nn.Module, int]]) -> str:
    """Return ``right``, ``wrong`` with the figure, or ``refused`` with the message's first words."""
    model = built(kind)
    try:
        found, converted = swap(copy.deepcopy(model), (model.sample(),))
        if not converted:
            return "left as it is"
        by_hand, called = copy.deepcopy(found), copy.deepcopy(found)
        if not isinstance(found, Construct):
            return "another class"
        worst = 0.0
        for mode, which in ways(kind, train=False):
            given = {} if which is None else {"which": which}
            called.train(mode)
            by_hand.train(mode)
            with torch.no_grad():
                worst = max(worst, difference(called(model.sample(), **given), by_hand.by_hand(model.sample(), which)))
    except Exception as cause:
        return refused(cause)
    return outcome(worst)


def outcome_of_fold(kind: type[Construct], fold: Callable[[nn.Module, Inputs], nn.Module]) -> str:
    model = built(kind)
    try:
        found, expected = fold(copy.deepcopy(model), (model.sample(),)), copy.deepcopy(model)
        worst = 0.0
        for mode, which in ways(kind, train=kind.train is not nn.Module.train):
            given = {} if which is None else {"which": which}
            with torch.no_grad():
                one, two = found.train(mode)(model.sample(), **given), expected.train(mode)(model.sample(), **given)
                worst = max(worst, difference(one, two))
    except Exception as cause:
        return refused(cause)
    return outcome(worst)


def built(kind: type[Construct]) -> Construct:
    """Return a network in float64 with statistics, γ and β that no shortcut survives."""
    zoo = tests_zoo()
    torch.manual_seed(0)
    model: Construct = kind().double()
    zoo.randomize_(model, 0)
    with torch.no_grad():
        model.eval()(model.sample())  # the old weight_norm computes its weight in a call
    return model


def ways(kind: type[Construct], *, train: bool) -> Iterator[tuple[bool, int | None]]:
    """Yield the ways in which a network is called: the mode, and the argument."""
    yield False, None
    yield False, None  # again: what a forward has written counts
    if kind.domain is not None:
        yield False, kind.domain
    if train:
        yield True, None


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max()) if found.shape == expected.shape else math.inf


def outcome(worst: float) -> str:
    return "right" if worst <= ALLOWED[torch.float64] else f"**wrong, by {worst:.2f}**"


def refused(cause: Exception) -> str:
    words = f"{cause.message}: {cause.hint}" if isinstance(cause, ns.NormswapError) else first_line(cause)
    return f"refused: “{' '.join(words.split())[:90].rstrip()}…”"


def constructs_table() -> str:
    tools = [*SWAPS, *FOLDS]
    lines = [f"| | {' | '.join(tools)} |", f"|---|{'---|' * len(tools)}"]
    for kind in CONSTRUCTS:
        cells = [outcome_of_swap(kind, swap) for swap in SWAPS.values()]
        cells += [outcome_of_fold(kind, fold) for fold in FOLDS.values()]
        lines.append(f"| {kind.what} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- reports


def add(total: Any, one: Any) -> None:
    for name, value in (one if isinstance(one, dict) else asdict(one)).items():
        setattr(total, name, getattr(total, name) + value)


def swap_table(of: str, totals: dict[str, Swap]) -> str:
    lines = [
        f"| swap to GroupNorm, {of} | norms converted | γ kept | β kept | eps kept | activations kept | "
        "output moved, median | crashes |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for tool, t in totals.items():
        moved = f"{statistics.median(t.moved):.2f}" if t.moved else "–"
        cells = [f"{n:,} of {m:,}" for n, m in ((t.converted, t.norms), (t.gamma, t.modules), (t.beta, t.modules))]
        cells += [f"{t.eps:,} of {t.modules:,}", f"{t.activations_kept:,} of {t.activations:,}", moved]
        lines.append(f"| {tool} | " + " | ".join(cells) + f" | {len(t.crashes)} |")
    return "\n".join(lines)


def fold_table(of: str, totals: dict[str, Fold], models: int) -> str:
    lines = [
        f"| fold, {of} | outputs right | outputs wrong | refused | crashes | norms gone |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for tool, t in totals.items():
        lost = f"{len(t.wrong)} | {len(t.refused)} | {len(t.crashes)}"
        lines.append(f"| {tool} | {t.right} of {models} | {lost} | {t.folded:,} of {t.norms:,} |")
    return "\n".join(lines)


def details(totals: dict[str, Any]) -> str:
    lines = []
    for tool, t in totals.items():
        lines += [f"  {tool}, wrong: {text}" for text in getattr(t, "wrong", [])]
        lines += [f"  {tool}, refused: {text}" for text in getattr(t, "refused", [])]
        lines += [f"  {tool}, crash: {text}" for text in t.crashes]
    return "\n".join(lines)


def measure(case: Case) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        swaps = {tool: asdict(count_swap(case, swap)) for tool, swap in SWAPS.items()}
        folds = {tool: asdict(count_fold(case, fold)) for tool, fold in FOLDS.items()}
    return {"swaps": swaps, "folds": folds}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--timm", type=int, default=100, metavar="N", help="how many models of timm; default 100")
    parser.add_argument("--details", action="store_true", help="name every wrong output and every crash")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="keep each timm model's row here, and go on from it"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--constructs", action="store_true", help="print the table of constructs alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)  # Opacus tells of each norm that it replaces
    for tool, module, hint in (("Opacus", "opacus", "opacus opt_einsum"), ("timm", "timm", "timm")):
        if importlib.util.find_spec(module) is None:
            print(f"{tool} is not installed: pip install --no-deps {hint}")
            return 2
    if options.constructs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print(constructs_table())
        return 0
    known: dict[str, dict[str, Any]] = {}
    if options.results is not None and options.results.exists():
        rows = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
        known = {row["name"]: row["row"] for row in rows}

    def of_timm() -> Iterator[dict[str, Any]]:
        for name, case in timm_cases(options.timm, known.__contains__):
            if case is not None:
                known[name] = measure(case)
                if options.results is not None:
                    with options.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"name": name, "row": known[name]}) + "\n")
            yield known[name]

    sources = {"awkward models (`tests/zoo.py`)": map(measure, awkward()), "timm models": of_timm()}
    for what, rows in sources.items():
        swaps, folds = {tool: Swap() for tool in SWAPS}, {tool: Fold() for tool in FOLDS}
        models = 0
        for row in rows:
            models += 1
            for tool, one in row["swaps"].items():
                add(swaps[tool], one)
            for tool, one in row["folds"].items():
                add(folds[tool], one)
        title = f"{models} {what}"
        print(f"{swap_table(title, swaps)}\n\n{fold_table(title, folds, models)}\n", flush=True)
        if options.details:
            print(f"swaps:\n{details(swaps)}\nfolds:\n{details(folds)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
