"""Convert well-known networks and check everything that a conversion promises, network by network.

    python benchmarks/zoo.py                                  # all networks, all recipes
    python benchmarks/zoo.py resnet18 'timm/*' --markdown     # some of them, as the table of docs/results.md
    python benchmarks/zoo.py --recipe wn+mobn --json zoo.json

The networks have random weights, γ of both signs, and the running statistics of the network on noise, each moved by a
random factor between 0.5 and 2: their function is neither trivial nor chaotic, and no download is needed. Every
difference is the largest over the outputs, relative to the output's magnitude, in float32. The exit code is 1 if
anything failed.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

import normswap as ns
from normswap.loading.importing import first_line, import_quietly
from normswap.nn import MeanOnlyBatchNorm
from normswap.records import text_table

RECIPES = ("wn+mobn", "gn+ws", "ln")
EXACT = 1e-3  # a wrong absorption moves the output by a good part of itself, rounding by 1e-5
ROUNDED = 3e-4  # the same function, rounded in another order; see the column "rounding"
SAME = 1e-6  # the same operators on the same values
_ANY = 1e30


@dataclass(frozen=True)
class Network:
    """A network of the zoo: its library and name, how it is made there, and the side of its square input."""

    name: str
    make: Callable[[], nn.Module]
    side: int = 64

    def matches(self, pattern: str) -> bool:
        return fnmatchcase(self.name, pattern) or fnmatchcase(self.name.partition("/")[2], pattern)

    def build(self, seed: int) -> nn.Module:
        """Return the network in eval mode, with random weights and statistics."""
        torch.manual_seed(seed)
        model = self.make()
        randomize(model, torch.randn(8, 3, self.side, self.side))
        return model.eval()

    def inputs(self) -> Tensor:
        return torch.randn(2, 3, self.side, self.side, generator=torch.Generator().manual_seed(1))


def torchvision(name: str, side: int = 64, **options: Any) -> Network:
    def make() -> nn.Module:
        models = import_quietly("torchvision.models")
        return models.get_model(name, weights=None, **options)

    return Network(f"torchvision/{name}", make, side)


def timm(name: str, side: int = 64) -> Network:
    return Network(f"timm/{name}", lambda: import_quietly("timm").create_model(name, pretrained=False), side)


NETWORKS = (
    torchvision("resnet18"),
    torchvision("resnet50"),
    torchvision("mobilenet_v3_large"),
    torchvision("densenet121"),
    torchvision("efficientnet_b0"),
    torchvision("shufflenet_v2_x1_0"),
    torchvision("googlenet", init_weights=False),
    torchvision("vgg16_bn"),
    torchvision("regnet_y_400mf"),
    torchvision("deeplabv3_resnet50", weights_backbone=None),
    timm("resnet50"),
    timm("efficientnet_b0"),
    timm("resnetv2_50"),
    timm("regnetx_002"),
    timm("mobilenetv3_small_100"),
)


def randomize(model: nn.Module, noise: Tensor) -> None:
    """Give every BatchNorm random γ and β, and statistics that nearly are those of the network on ``noise``."""
    norms = list(batch_norms(model))
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        sign = torch.randint(0, 2, (norm.num_features,)) * 2 - 1
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.weight.data.mul_(sign)
        nn.init.normal_(norm.bias, std=0.2)
        norm.reset_running_stats()
        norm.momentum = None  # the plain average: one batch's statistics as they are
    with torch.no_grad():
        model.train()(noise)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        for statistic in (norm.running_mean, norm.running_var):
            assert statistic is not None
            statistic.mul_(2 ** torch.empty_like(statistic).uniform_(-0.3, 0.3))  # more, and deep ones grow chaotic


def batch_norms(model: nn.Module) -> Iterator[_BatchNorm]:
    return (
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, MeanOnlyBatchNorm)
    )


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


# ------------------------------------------------------------------------------------------------ the checks


@dataclass(frozen=True)
class Case:
    """One conversion: the network, the recipe, both models in eval mode, and the input."""

    network: Network
    recipe: str
    original: nn.Module
    model: nn.Module
    plan: ns.Plan
    x: Tensor


@dataclass(frozen=True)
class Cell:
    """The result of one check; the text of a failed one is the reason."""

    text: str
    ok: bool = True
    value: float | None = None


def compare(a: Any, b: Any, x: Tensor, allowed: float) -> Cell:
    found = ns.verify(a, b, x, rtol=allowed)
    return Cell(f"{found.max_rel:.0e}" if found.ok else found.failure, found.ok, found.max_rel)


def rounding(case: Case) -> Cell:
    """No promise but a scale: the original's own output in float32 against float64."""
    wide = copy.deepcopy(case.original).double()
    return compare(lambda x: wide(x.double()), case.original, case.x, _ANY)


def exact(case: Case) -> Cell:
    """An exact recipe keeps the output."""
    if not ns.all_recipes()[case.recipe].exact:
        return Cell("–")
    return compare(case.original, case.model, case.x, EXACT)


def none_left(case: Case) -> Cell:
    """No BatchNorm is left."""
    count = sum(1 for _ in batch_norms(case.model))
    if not count:
        return Cell("0", value=0)
    reasons = "; ".join(sorted({skip.reason for skip in case.plan.skips if skip.what == "norm"}))
    return Cell(f"{count} BatchNorms are left: {reasons}", ok=False, value=count)


def step(case: Case) -> Cell:
    """A step of SGD at batch size 2 has a finite loss and gradient."""
    return train(case, nullcontext())


def step_bf16(case: Case) -> Cell:
    """So has one under autocast to bfloat16."""
    return train(case, torch.autocast("cpu", torch.bfloat16))


def train(case: Case, precision: Any) -> Cell:
    torch.manual_seed(0)  # dropout
    model = copy.deepcopy(case.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with precision:
        loss = torch.stack([out.float().square().mean() for out in tensors(model(case.x))]).sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            return Cell(f"{name} has no gradient", ok=False)
        if not bool(parameter.grad.isfinite().all()):
            return Cell(f"the gradient of {name} is not finite", ok=False)
    optimizer.step()
    broken = [name for name, value in model.state_dict().items() if not bool(value.isfinite().all())]
    if broken or not bool(loss.isfinite()):
        return Cell(f"{broken[0]} is not finite after the step" if broken else "the loss is not finite", ok=False)
    return Cell(f"{loss.item():.2g}", value=loss.item())


def fold(case: Case) -> Cell:
    """The folded model computes the same, in torch.nn's modules alone."""
    folded = ns.fold(case.model, example_inputs=case.x)
    if left := [name for name, module in folded.named_modules() if type(module).__module__.startswith("normswap")]:
        return Cell(f"{left[0]} is still a {type(folded.get_submodule(left[0])).__name__}", ok=False)
    if left := [name for name, _ in folded.named_parameters() if ".parametrizations." in name]:
        return Cell(f"{left[0]} is still parametrized", ok=False)
    return compare(case.model, folded, case.x, ROUNDED)


def onnx(case: Case) -> Cell:
    """onnxruntime computes what the folded model does, at a batch size that it was not exported with."""
    folded, more = ns.fold(case.model), torch.cat([case.x, case.x.flip(3)[:1]])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        # The exporter's own comparison is stricter than the rounding of some of these networks.
        ns.export_onnx(folded, path, example_inputs=case.x, verify_outputs=False)
        return compare(folded, path, more, ROUNDED)


def deep_copy(case: Case) -> Cell:
    """A copy computes the same."""
    return compare(case.model, copy.deepcopy(case.model), case.x, SAME)


def state_dict(case: Case) -> Cell:
    """The state dict goes into the conversion of a network with other values, which then computes the same."""
    other = case.network.build(seed=2)
    other = ns.convert(other, case.recipe, example_inputs=case.x, init="fresh", inplace=True).model
    other.load_state_dict(case.model.state_dict())
    return compare(case.model, other, case.x, SAME)


def compiled(case: Case) -> Cell:
    """torch.compile gives one graph that computes the same."""
    torch._dynamo.reset()
    try:
        model = torch.compile(case.model, backend="aot_eager", fullgraph=True)
        return compare(case.model, model, case.x, ROUNDED)
    finally:
        torch._dynamo.reset()


CHECKS: dict[str, Callable[[Case], Cell]] = {
    "rounding": rounding,
    "exact": exact,
    "BN left": none_left,
    "step": step,
    "bf16 step": step_bf16,
    "fold": fold,
    "ONNX": onnx,
    "deepcopy": deep_copy,
    "state dict": state_dict,
    "compile": compiled,
}


# ------------------------------------------------------------------------------------------------ running them


@dataclass(frozen=True)
class Row:
    """What was found for one network and recipe.

    Args:
        network: The network's name.
        recipe: The recipe's name.
        norms: How many norms were converted.
        layers: How many of them together with their layer.
        skipped_norms: How many norms stay.
        skipped_layers: How many layers stay as they are (those that no BatchNorm follows).
        cells: The result of each check, by its name.
        seconds: How long the conversion and the checks took.
    """

    network: str
    recipe: str
    norms: int
    layers: int
    skipped_norms: int
    skipped_layers: int
    cells: dict[str, Cell]
    seconds: float

    @property
    def ok(self) -> bool:
        return all(cell.ok for cell in self.cells.values())


def attempt(check: Callable[..., Any], *args: Any) -> Any:
    """Return what ``check`` gives, or the exception's type and message as a failed cell."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch's tracers and exporters say of their own future
            return check(*args)
    except Exception as cause:
        return Cell(f"{type(cause).__name__}: {first_line(cause)}", ok=False)


def run(network: Network, recipe: str, checks: Mapping[str, Callable[[Case], Cell]] = CHECKS) -> Row:
    start, x = time.perf_counter(), network.inputs()
    original = attempt(network.build, 0)
    result = original
    if isinstance(original, nn.Module):
        result = attempt(lambda: ns.convert(original, recipe, example_inputs=x, check=False))
    if isinstance(result, Cell):
        return Row(network.name, recipe, 0, 0, 0, 0, {"convert": result}, time.perf_counter() - start)
    plan, case = result.plan, Case(network, recipe, original, result.model, result.plan, x)
    cells = {name: attempt(check, case) for name, check in checks.items()}
    skipped = [skip.what for skip in plan.skips]
    return Row(
        network.name,
        recipe,
        len(plan.steps),
        sum(s.site.layer is not None for s in plan.steps),
        skipped.count("norm"),
        skipped.count("layer"),
        cells,
        time.perf_counter() - start,
    )


def table(rows: Sequence[Row]) -> str:
    """Return one line per network and recipe."""
    header = ("network", "recipe", "norms", "with layer", "skipped norms, layers", *CHECKS, "seconds")
    lines = []
    for row in rows:
        counts = (f"{row.norms}", f"{row.layers}", f"{row.skipped_norms}, {row.skipped_layers}")
        failed = row.cells.get("convert")
        cells = [row.cells[name] if name in row.cells else Cell("–") for name in CHECKS]
        texts = [
            cell.text if cell.ok else f"FAILED: {cell.text}" for cell in ([failed, *cells[1:]] if failed else cells)
        ]
        lines.append((row.network, row.recipe, *counts, *texts, f"{row.seconds:.0f}"))
    return text_table(header, lines)


def markdown(rows: Sequence[Row]) -> str:
    """Return one line per network: the worst over its recipes."""

    def worst(of: Sequence[Row], name: str) -> str:
        found = [value for row in of if name in row.cells and (value := row.cells[name].value) is not None]
        return f"{max(found):.0e}" if found else "–"

    header = (
        "network",
        "norms",
        "with their layer",
        "float32 rounding",
        "`wn+mobn`",
        "fold",
        "ONNX",
        "checks passed",
        "seconds",
    )
    lines = [header, ("---", *("--:",) * (len(header) - 1))]
    for network in dict.fromkeys(row.network for row in rows):
        of = [row for row in rows if row.network == network]
        cells = [cell for row in of for cell in row.cells.values() if cell.text != "–"]
        norms = {f"{row.norms} of {row.norms + row.skipped_norms}" for row in of}
        layers = {str(row.layers) for row in of}
        passed = f"{sum(cell.ok for cell in cells)} of {len(cells)}"
        seconds = f"{sum(row.seconds for row in of):.0f}"
        differences = (worst(of, name) for name in ("rounding", "exact", "fold", "ONNX"))
        lines.append((network, ", ".join(sorted(norms)), ", ".join(sorted(layers)), *differences, passed, seconds))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a network, or a pattern such as 'timm/*'")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="only this recipe; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every cell to this file, too")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/results.md")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    for name in options.names:
        if not any(network.matches(name) for network in NETWORKS):
            parser.error(f"no network is named {name!r}; there are {', '.join(n.name for n in NETWORKS)}")
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for network in NETWORKS:
        if options.names and not any(network.matches(name) for name in options.names):
            continue
        for recipe in options.recipe or RECIPES:
            rows.append(run(network, recipe))
            gc.collect()
            if options.json:  # after each, so that a run that is stopped has its results
                record = [asdict(row) | {"ok": row.ok} for row in rows]
                options.json.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            failures = [f"{name}: {cell.text}" for name, cell in rows[-1].cells.items() if not cell.ok]
            print(f"{network.name} {recipe}: {'; '.join(failures) or 'ok'}", file=sys.stderr, flush=True)
    print(markdown(rows) if options.markdown else table(rows))
    failed = [row for row in rows if not row.ok]
    cells = sum(cell.text != "–" for row in rows for cell in row.cells.values())
    seconds = sum(row.seconds for row in rows)
    print(f"\n{cells} checks, {sum(not c.ok for r in failed for c in r.cells.values())} failed; {seconds:.0f} s")
    print(f"torch {torch.__version__}, {options.threads} threads; 2 images of noise, seed 0")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
