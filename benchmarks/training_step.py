"""What a norm and its weights cost in training: forward and backward of ResNet-50, and the memory held in between.

    python benchmarks/training_step.py                                  # CPU time of one thread, about ten minutes
    python benchmarks/training_step.py gn+ws wn+mobn --formats contiguous
    python benchmarks/training_step.py gn+ws --weights                  # and the time of its weights alone
    python benchmarks/training_step.py --compile gn+ws
    python benchmarks/training_step.py --device cuda --autocast bf16 --batch 64 --side 224 --rounds 50

Every network is torchvision's ResNet-50 with the same weights. In each round each one makes one step, in turn, and its
time is divided by BatchNorm's in the same round, so that a machine's load falls on all alike: the table has the median
of these ratios and their quartiles. "fastest" is the ratio of both networks' fastest steps, on which other work on the
machine has the least influence. The time is CPU time on one thread of a CPU, else the clock's.

"held" is what autograd keeps from the forward to the backward: the storages of all saved tensors, each counted once,
but for the model's own parameters and buffers.

Beside the recipes run "no norm" (what is left to gain), and what one writes by hand or takes from elsewhere: weight
standardization as published, in the convolution's forward, with torch's GroupNorm; timm's StdConv2d and ScaledStdConv2d
with its GroupNormAct; torch's weight_norm with a mean-only BatchNorm of two lines.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import normswap as ns
from normswap.loading.importing import import_quietly
from normswap.records import text_table

REFERENCE = "BatchNorm"
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def resnet50() -> nn.Module:
    model: nn.Module = import_quietly("torchvision.models").resnet50(weights=None)
    return model


class NaiveStd(nn.Conv2d):
    """Weight standardization as its authors published it."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        std = w.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5
        return self._conv_forward(x, w / std, self.bias)


class NaiveMeanOnly(nn.Module):
    """Mean-only batch normalization in two lines, without running statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((0, 2, 3), keepdim=True) + self.bias


def replaced(
    conv: Callable[[nn.Conv2d], nn.Module] | None, norm: Callable[[nn.BatchNorm2d], nn.Module]
) -> Callable[[nn.Module], nn.Module]:
    """Return what puts other layers and norms into a network, by their classes."""

    def work(model: nn.Module) -> nn.Module:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Conv2d) and conv is not None:
                    setattr(parent, name, conv(child))
                elif isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, norm(child))
        return model

    return work


def of_class(made: type[nn.Conv2d]) -> Callable[[nn.Conv2d], nn.Module]:
    """Return what makes a layer of another class of a convolution, with its values."""

    def work(old: nn.Conv2d) -> nn.Module:
        sizes = {"stride": old.stride[0], "padding": old.padding[0], "groups": old.groups, "bias": False}
        new = made(old.in_channels, old.out_channels, old.kernel_size, **sizes)  # type: ignore[arg-type]
        new.load_state_dict(old.state_dict(), strict=False)
        return new

    return work


def groups(norm: nn.BatchNorm2d) -> nn.Module:
    return nn.GroupNorm(32, norm.num_features)


def timm_groups(norm: nn.BatchNorm2d) -> nn.Module:
    return import_quietly("timm.layers").GroupNormAct(norm.num_features, 32, apply_act=False)  # type: ignore[no-any-return]


def timm_conv(name: str) -> Callable[[nn.Module], nn.Module]:
    return lambda model: replaced(of_class(getattr(import_quietly("timm.layers"), name)), timm_groups)(model)


def recipe(name: str) -> Callable[[nn.Module], nn.Module]:
    return lambda model: ns.swap_norms(model, name, init="fresh", inplace=True)


NETWORKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    REFERENCE: lambda model: model,
    "no norm": replaced(None, lambda norm: nn.Identity()),
    **{name: recipe(name) for name in ("gn", "gn+ws", "gn+aws", "wn+mobn", "ln")},
    "naive WS + GroupNorm": replaced(of_class(NaiveStd), groups),
    "timm StdConv2d + GroupNormAct": timm_conv("StdConv2d"),
    "timm ScaledStdConv2d + GroupNormAct": timm_conv("ScaledStdConv2d"),
    "torch weight_norm + naive mean-only": replaced(
        nn.utils.parametrizations.weight_norm, lambda norm: NaiveMeanOnly(norm.num_features)
    ),
}


@dataclass(frozen=True)
class Step:
    """One network's training step, ready to be run."""

    name: str
    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    batch: Tensor
    autocast: torch.dtype | None

    def loss(self) -> Tensor:
        device = self.batch.device.type
        with torch.autocast(device, self.autocast) if self.autocast else contextlib.nullcontext():
            return self.forward(self.batch).float().square().mean()

    def seconds(self) -> float:
        """Return what forward and backward take."""
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        gc.disable()  # or one network pays for another's garbage
        start = self._now()
        self.loss().backward()
        taken = self._now() - start
        gc.enable()
        return taken

    def _now(self) -> float:
        if self.batch.device.type == "cuda":
            torch.cuda.synchronize()
        one_thread = self.batch.device.type == "cpu" and torch.get_num_threads() == 1
        return time.process_time() if one_thread else time.perf_counter()


def held(model: nn.Module, forward: Callable[[], object]) -> int:
    """Return the bytes that autograd keeps after ``forward``, but for the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # which holds it, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


def weights_alone(model: nn.Module, rounds: int) -> tuple[float, float]:
    """Return the seconds that a model's computed weights take, forward and backward, and a copy of as many values."""
    forms = [m for m in model.modules() if isinstance(m, nn.utils.parametrize.ParametrizationList)]
    taken: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        model.zero_grad(set_to_none=True)
        start = time.process_time()
        found = [form() for form in forms]
        between = time.process_time()
        copies = [weight.detach().clone() for weight in found]
        copied = time.process_time()
        torch.autograd.backward(found, copies)
        taken[0].append(time.process_time() - copied + between - start)
        taken[1].append(copied - between)
        del found, copies
    return statistics.median(taken[0][1:]), statistics.median(taken[1][1:])


def steps(options: argparse.Namespace, layout: str) -> list[Step]:
    torch.manual_seed(options.seed)
    original = resnet50()
    batch = torch.randn(options.batch, 3, options.side, options.side, device=options.device)
    batch = batch.contiguous(memory_format=FORMATS[layout])
    found = []
    for name in options.networks:
        model = NETWORKS[name](copy.deepcopy(original)).train()
        model = model.to(options.device, memory_format=FORMATS[layout])
        forward = torch.compile(model) if options.compile else model
        found.append(Step(name, model, forward, batch, {"bf16": torch.bfloat16, "none": None}[options.autocast]))
    return found


def table(options: argparse.Namespace, layout: str) -> str:
    """Measure all networks in one memory format."""
    runs = steps(options, layout)
    kept = []
    for step in runs:
        step.seconds()  # compiles, and fills the allocator's pool
        kept.append(held(step.model, step.loss))
    times = [[step.seconds() for step in runs] for _ in range(options.rounds)]
    rows = []
    for i, step in enumerate(runs):
        ratios = [one[i] / one[0] for one in times]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        seconds = statistics.median(one[i] for one in times)
        fastest = min(one[i] for one in times) / min(one[0] for one in times)
        cells = (f"{seconds * 1e3:.0f} ms", f"{middle:.2f}", f"{low:.2f}-{high:.2f}", f"{fastest:.2f}")
        rows.append((step.name, *cells, f"{kept[i] / 1e6:.0f} MB", f"{kept[i] / kept[0]:.2f}"))
    if options.weights and options.device == "cpu":
        for step in runs:
            if any(isinstance(m, nn.utils.parametrize.ParametrizationList) for m in step.model.modules()):
                alone, copied = (1e3 * seconds for seconds in weights_alone(step.model, options.rounds))
                print(f"{layout}, {step.name}: weights {alone:.0f} ms, a copy of them {copied:.0f} ms")
    return text_table((layout, "time", "ratio", "quartiles", "fastest", "held", "ratio"), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"only {', '.join(NETWORKS)}")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=112)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", choices=("none", "bf16"), default="none")
    parser.add_argument("--compile", action="store_true", help="each model by torch.compile")
    parser.add_argument("--weights", action="store_true", help="also the time of the computed weights alone (CPU)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if unknown := set(options.networks) - set(NETWORKS):
        parser.error(f"there is no network {sorted(unknown)[0]!r}; choose from {', '.join(NETWORKS)}")
    named = [name for name in options.networks if name != REFERENCE]
    options.networks = [REFERENCE, *named] if named else list(NETWORKS)
    torch.set_num_threads(options.threads)
    for layout in options.formats:
        print(table(options, layout), end="\n\n")
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads"
    print(f"ResNet-50, forward and backward, {options.batch}×3×{options.side}×{options.side}; ratios to {REFERENCE}")
    how = f"autocast {options.autocast}, {'compiled' if options.compile else 'not compiled'}, {options.rounds} rounds"
    print(f"{how}, seed {options.seed}, {where}, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
