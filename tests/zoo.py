"""A zoo of small awkward BatchNorm models, each with what is true of it written down as plain data.

A law that holds for "every model" is tested on every entry of `ZOO`. The expectations are facts about the
models, not about any converter; ``test_zoo.py`` proves them by counting calls and by really folding norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

Inputs = Callable[[], tuple[Tensor, ...]]


def _leave(model: nn.Module) -> None:
    """The default adjustment: none."""


@dataclass(frozen=True)
class Entry:
    """One model and what is true of it.

    A norm goes by its module's fqn (its first one, where it has aliases); a norm that is only a functional
    call goes by the fqn of its running mean, or of its γ where it has no statistics.

    A norm's layer can be *absorbed* where BN's eval affine may be folded into that one layer's weight and
    bias without changing what the model computes, in eval mode and, with BN's statistics held, in train mode.
    Every norm stands in one of the three sets below, or in none: then it must never be absorbed. A converter
    may prove less than stands here, and never more.

    - ``absorbable``: the dataflow among torch's own layers proves it, without example inputs.
    - ``given_rank``: proven once the rank of the layer's input is known. It is open for `Linear`, for
      `Conv1d` before `BatchNorm1d` (unbatched, positions pass for channels), and for any layer before
      `F.batch_norm` or `SyncBatchNorm`, which check no rank.
    - ``conditional``: true, but the proof needs a look into a user's class or hook, or example inputs.

    A norm is in ``readable`` where its eval affine may be folded into the one layer that *reads* it, likewise
    exactly and in both modes: ``W ← W·diag(a)``, ``b ← b + W·shift`` on the side of that layer's input. It may have a
    layer in front, too; a converter may then choose.

    ``batch_statistics`` are the norms that use the batch's own statistics in eval mode too. ``calls`` are the
    calls of layers and norms in one eval forward, where that is not 1. ``traceable`` says whether symbolic
    tracing gets through the whole model in eval mode with every layer and norm a leaf. ``other_inputs`` take
    another way through the model.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    norms: int
    layers: int
    traceable: bool = True
    absorbable: frozenset[str] = frozenset()
    given_rank: frozenset[str] = frozenset()
    conditional: frozenset[str] = frozenset()
    readable: frozenset[str] = frozenset()
    batch_statistics: frozenset[str] = frozenset()
    calls: Mapping[str, int] = field(default_factory=dict)
    kwargs: Callable[[], dict[str, Any]] = dict
    other_inputs: Inputs | None = None
    adjust: Callable[[nn.Module], None] = _leave
    note: str = ""

    def model(self, seed: int = 0) -> nn.Module:
        """A fresh model in eval mode, the same for the same seed; the global generator is left as it was."""
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            model = self.build()
        randomize_(model, seed)
        self.adjust(model)
        return model

    def run(self, model: nn.Module, inputs: Inputs | None = None) -> Any:
        """What ``model`` returns for this entry's inputs (or for ``inputs``) and keyword arguments."""
        return model(*(inputs or self.inputs)(), **self.kwargs())

    def __str__(self) -> str:
        return self.name


def leaves(output: Any) -> list[Tensor]:
    """The tensors of a model's output, nested in tuples, lists and dicts, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [tensor for item in output for tensor in leaves(item)] if isinstance(output, (tuple, list)) else []


# ------------------------------------------------------------------------------------------ random statistics


def randomize_(model: nn.Module, seed: int) -> nn.Module:
    """Give every BatchNorm statistics, γ and β that no shortcut survives, and return the model in eval mode.

    |μ| in [0.3, 1.5] and |γ| in [0.4, 1.6], half of each negative (so an unsigned scale shows), var in
    [0.3, 3], β ~ N(0, 1). Functional norms are found by their tensors' names: ``*running_mean``,
    ``*running_var``, ``*gamma``, ``*beta``.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(size: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    def signed(size: int, low: float, high: float) -> Tensor:
        signs = 1.0 - 2.0 * (torch.randperm(size, generator=generator) % 2)
        return signs * uniform(size, low, high)

    with torch.no_grad():
        for name, tensor, is_norm in _named_tensors(model):
            size = tensor.numel()
            if name.endswith("running_mean"):
                tensor.copy_(signed(size, 0.3, 1.5))
            elif name.endswith("running_var"):
                tensor.copy_(uniform(size, 0.3, 3.0))
            elif name.endswith("gamma") or (is_norm and name == "weight"):
                tensor.copy_(signed(size, 0.4, 1.6))
            elif name.endswith("beta") or (is_norm and name == "bias"):
                tensor.copy_(torch.randn(size, generator=generator))
            elif name == "num_batches_tracked":
                tensor.fill_(7)
    return model.eval()


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Every tensor with its own name and whether a norm module owns it."""
    for module in model.modules():
        is_norm = isinstance(module, (_BatchNorm, FrozenBatchNorm2d))
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            yield name, tensor, is_norm


# ----------------------------------------------------------------------------------------------------- inputs


def randn(*size: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Inputs:
    """One standard normal tensor, the same at every call."""

    def make() -> tuple[Tensor, ...]:
        return (torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype),)

    return make


def shifted(*size: int, by: float) -> Inputs:
    """`randn` plus a constant, which decides the sign of the input's sum."""
    return lambda: (randn(*size)()[0] + by,)


IMAGE = randn(3, 4, 7, 7)


# ------------------------------------------------------------------------------------------ chains and blocks


def conv3(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def conv_bn(inputs: int = 4, outputs: int = 6, **norm: Any) -> nn.Sequential:
    return nn.Sequential(conv3(inputs, outputs), nn.BatchNorm2d(outputs, **norm))


def chain() -> nn.Module:
    return nn.Sequential(
        conv3(4, 8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        conv3(8, 6),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
    )


def strided_chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2)),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Conv2d(6, 5, 1),
    )


class BasicBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv3(4, 8, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3(8, 8, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.downsample = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)


class PreActivation(nn.Module):
    """Registered as conv1, bn1, conv2, bn2, so that registration order pairs bn2 with the wrong layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(6, 6), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = conv3(6, 6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(out)))


class FanOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = conv3(4, 6), nn.BatchNorm2d(6)
        self.heads = nn.ModuleList(conv_bn(6, width) for width in (4, 5, 6))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = F.relu(self.bn(self.stem(x)))
        return [head(features) for head in self.heads]


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv3(4, 6), conv3(6, 6)])
        self.norms = nn.ModuleDict({"first": nn.BatchNorm2d(6), "second": nn.BatchNorm2d(6)})

    def forward(self, x: Tensor) -> Tensor:
        # The dict is walked backwards, so that position proves nothing.
        for conv, name in zip(self.convs, reversed(list(self.norms)), strict=True):
            x = F.relu(self.norms[name](conv(x)))
        return x


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv_bn(4, 6), conv_bn(3, 6)

    def forward(self, x: Tensor, y: Tensor, *, scale: float = 1.0, mask: Tensor | None = None) -> dict[str, Any]:
        left, right = self.left(x), self.right(y)
        if mask is not None:
            left = left * mask
        return {"sum": left + scale * right, "parts": (left, right)}


# ---------------------------------------------------------------------------------------- sharing and aliases


class OneOutputTwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = conv3(4, 6), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(self.bn1(y)) + torch.tanh(self.bn2(y))


class TwoCallsTwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = conv3(6, 6), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv(F.relu(self.bn1(self.conv(x)))))


class PairCalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(6, 6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(F.relu(self.bn(self.conv(x)))))


class BlockCalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(F.relu(self.block(x)))


class ConvTwiceNormOnce(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(6, 6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(self.conv(x))))


class OneNormTwoConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.bn = conv3(4, 6), conv3(6, 6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv2(F.relu(self.bn(self.conv1(x)))))


def same_norm_in_two_places() -> nn.Module:
    norm = nn.BatchNorm2d(6)
    return nn.Sequential(conv3(4, 6), norm, nn.ReLU(), conv3(6, 6), norm)


class NormOnOneUse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(4, 6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + torch.sigmoid(y)


class ReturnsTheConvToo(NormOnOneUse):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.bn(y), y


class NormOutputTwice(NormOnOneUse):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y * torch.sigmoid(y)


class Tied(nn.Module):
    """Two conv–bn pairs of which the convs' weights (or the norms' γ) are one Parameter."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(6, 6), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = conv3(6, 6), nn.BatchNorm2d(6)
        if weights:
            self.conv2.weight = self.conv1.weight
        else:
            self.bn2.weight = self.bn1.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Aliases(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(6, 6), nn.BatchNorm2d(6)
        self.project, self.layers = self.conv, nn.ModuleList([self.conv, self.bn])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.project(x))


class AliasesCalledByBothNames(Aliases):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.project(F.relu(x))


# -------------------------------------------------------------------------------- what stands between the two


def relu_between() -> nn.Module:
    return nn.Sequential(conv3(4, 6), nn.ReLU(), nn.BatchNorm2d(6), conv3(6, 4))


def dropout_between() -> nn.Module:
    return nn.Sequential(conv3(4, 6), nn.Dropout(0.3), nn.BatchNorm2d(6))


def identity_between() -> nn.Module:
    return nn.Sequential(conv3(4, 6), nn.Identity(), nn.BatchNorm2d(6))


def norm_first() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(4), conv3(4, 4), nn.ReLU())


def norm_after_pool(pool: nn.Module) -> nn.Module:
    return nn.Sequential(conv3(4, 6), pool, nn.BatchNorm2d(6))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.bn = conv3(4, 3), conv3(4, 5), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(torch.cat([self.conv1(x), self.conv2(x)], dim=1)))


class NormAfterAdd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(6, 6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x + self.conv(x))


class ReshapeBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(4, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).flatten(2))


class ChannelsMovedBetween(nn.Module):
    """The width equals the channels, so the norm takes the permuted map without a complaint."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(4, 7), nn.BatchNorm2d(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).permute(0, 3, 2, 1))


class InPlaceBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(4, 6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y.clamp_(min=-0.2)
        return self.bn(y)


class AssignmentBetween(InPlaceBetween):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, 0] = 0.5
        return self.bn(y)


class ChunkBetween(nn.Module):
    """One conv, half of its channels to each of two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = conv3(4, 12), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.conv(x).chunk(2, dim=1)
        return self.bn1(left) * torch.sigmoid(self.bn2(right))


class StashesAnActivation(nn.Module):
    """Its forward writes to the module: tracing leaves a proxy there, a run a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(4, 6), nn.BatchNorm2d(6)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.bn(self.conv(x))
        return F.relu(self.last)


class CheckpointInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return checkpoint(self.block, x, use_reentrant=False)
        return self.block(x)


class RegistrationLies(nn.Module):
    """Registered as conv, bn, up, called as conv, up, bn, with equal channels everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.up = conv3(6, 6), nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 6, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.up(self.conv(x))))


class WeightReadElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(4, 6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + F.conv2d(torch.tanh(x), self.conv.weight, padding=1)


class StatisticsReadElsewhere(WeightReadElsewhere):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn.running_mean.mean()


class WeightPenalty(WeightReadElsewhere):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.bn(self.conv(x)), self.conv.weight.norm()


class BiasReadElsewhere(WeightReadElsewhere):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv.bias.mean()


class ParentReadsTheWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn(4, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.block(x), self.block[0].weight.abs().sum()


class CallsForwardItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(4, 6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv.forward(x)))


# -------------------------------------------------------------------------------------------- kinds of layers


def separable() -> nn.Module:
    return nn.Sequential(
        conv3(6, 6, groups=6, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        nn.Conv2d(6, 8, 1),
        nn.BatchNorm2d(8),
    )


def pair(layer: type[nn.Module], norm: type[nn.Module], inputs: int, outputs: int, **options: Any) -> nn.Module:
    return nn.Sequential(layer(inputs, outputs, 3, **options), norm(outputs), nn.ReLU())


def classifier() -> nn.Module:
    return nn.Sequential(
        *conv_bn(4, 6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 8, bias=False),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 5),
        nn.BatchNorm1d(5),
    )


def linears() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4))


class LinearOnSequence(nn.Module):
    """(N, L, in) → (N, L, out): BatchNorm1d normalises dim 1, which is L and not the layer's outputs."""

    def __init__(self, length: int, outputs: int) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(5, outputs), nn.BatchNorm1d(length)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.fc(x)))


class LinearTransposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(5, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x).transpose(1, 2)).transpose(1, 2)


class LinearPermuted(nn.Module):
    """As tall and as wide as there are channels: a norm over the rows or the columns would run as well."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(5, 6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.fc(x).permute(0, 3, 1, 2)))


class ReadByLinear(nn.Module):
    """As many positions as channels: a linear layer over the positions would run as well."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.fc = nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(x).transpose(1, 2))


class ReadByLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.lstm = nn.BatchNorm1d(6), nn.LSTM(6, 4, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.bn(x).transpose(1, 2))[0])


def read_by_conv() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU())


class SamePadConv2d(nn.Conv2d):
    """Pads as much as the input's size asks for, so that the output has ceil(size / stride) positions."""

    def forward(self, x: Tensor) -> Tensor:
        amounts: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            amounts += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, amounts), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StandardizedConv2d(nn.Conv2d):
    """Not linear in its weight: each filter is standardised before use."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        std = self.weight.std(dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)


def subclassed(layer: type[nn.Conv2d], **options: Any) -> nn.Module:
    return nn.Sequential(layer(4, 6, 3, **options), nn.BatchNorm2d(6), nn.ReLU())


def weight_normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(conv3(4, 6)), nn.BatchNorm2d(6), nn.ReLU())


# --------------------------------------------------------------------------------------------- kinds of norms


class FrozenBatchNorm2d(nn.Module):
    """Detection's frozen norm: four buffers, no parameter, and arithmetic instead of `F.batch_norm`."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        scale = self.weight.reshape(shape) * (self.running_var.reshape(shape) + self.eps).rsqrt()
        return x * scale + (self.bias.reshape(shape) - self.running_mean.reshape(shape) * scale)


class NormDropAct(nn.BatchNorm2d):
    """BatchNorm, dropout and activation in one subclass, whose forward calls `F.batch_norm` itself."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.drop, self.act = nn.Dropout(0.2), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"expected a (N, C, H, W) input, got {x.ndim} dimensions")
        if self.training:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return self.act(self.drop(x))


class NormRelu(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class ReluNorm(nn.BatchNorm2d):
    """Activates before it normalizes, in a forward that branches: nothing shows what it does."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError("expected an image")
        return super().forward(F.relu(x))


def with_norm(norm: nn.Module, **options: Any) -> nn.Module:
    return nn.Sequential(conv3(4, 6, **options), norm, conv3(6, 4))


def frozen_parameters() -> nn.Module:
    model = chain()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return model


class Uncalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(4, 6), nn.BatchNorm2d(6)
        self.old = nn.Sequential(conv3(4, 6), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class AuxiliaryHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.aux = conv_bn(4, 6), conv_bn(6, 5), conv_bn(6, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.relu(self.stem(x))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


class SecondUseInTraining(nn.Module):
    """The eval graph alone shows one consumer; the train graph shows the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(4, 6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.conv(x)
        return (self.bn(y), y.mean((2, 3))) if self.training else self.bn(y)


def count_call(module: nn.Module, args: Any, output: Any) -> None:
    module.count += 1


def double_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def hooked_norm() -> nn.Module:
    model = conv_bn()
    model[1].count = 0
    model[1].register_forward_hook(count_call)
    return model


def hooked_layer() -> nn.Module:
    model = conv_bn()
    model[0].register_forward_hook(double_output)
    return model


# ------------------------------------------------------------------------------------------- functional norms


class Conditional(nn.Module):
    """γ and β of each sample's class, of a size that is read off the layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(4, 6), nn.BatchNorm2d(6, affine=False)
        self.classes = nn.Embedding(5, 12)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = self.conv(x)
        gamma, beta = self.classes(label).to(x.dtype).view(x.size(0), -1, 1, 1).chunk(2, 1)
        return F.relu(gamma * self.bn(x) + beta)


class FunctionalNorm(nn.Module):
    """`F.batch_norm` with tensors of its own; ``statistics=False`` has no running statistics at all."""

    def __init__(self, features: int = 6, statistics: bool = True) -> None:
        super().__init__()
        self.conv = conv3(4, features)
        self.gamma = nn.Parameter(torch.ones(features))
        self.beta = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features) if statistics else None)
        self.register_buffer("running_var", torch.ones(features) if statistics else None)

    def forward(self, x: Tensor) -> Tensor:
        training = self.training or self.running_mean is None
        y = F.batch_norm(
            self.conv(x),
            self.running_mean,
            self.running_var,
            self.gamma,
            self.beta,
            training=training,
            eps=1e-3,
        )
        return F.relu(y)


class FunctionalFrozen(FunctionalNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.running_mean, self.running_var, self.gamma, self.beta, False, 0.1, 1e-3)


class FunctionalNoLayer(FunctionalNorm):
    """The norm before the conv, which it must not be folded into by name or by position."""

    def __init__(self) -> None:
        super().__init__(4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.gamma, self.beta, self.training)
        return self.conv(y)


class FunctionalMix(nn.Module):
    """A module norm, then two functional ones, in one forward; one has no γ and β."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(4, 6), nn.BatchNorm2d(6)
        self.conv2, self.conv3 = conv3(6, 5), conv3(5, 6)
        self.gamma, self.beta = nn.Parameter(torch.ones(5)), nn.Parameter(torch.zeros(5))
        for prefix, features in (("mid", 5), ("out", 6)):
            self.register_buffer(f"{prefix}_running_mean", torch.zeros(features))
            self.register_buffer(f"{prefix}_running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.conv2(x)
        x = F.batch_norm(
            x,
            self.mid_running_mean,
            self.mid_running_var,
            weight=self.gamma,
            bias=self.beta,
            training=self.training,
        )
        x = self.conv3(F.relu(x))
        return F.batch_norm(x, self.out_running_mean, self.out_running_var, training=self.training)


class NormAsHolder(nn.Module):
    """A BatchNorm2d that is never called: its tensors are given to `F.batch_norm` by its owner."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(4, 6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.bn
        return F.batch_norm(
            self.conv(x),
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            self.training,
            0.1,
            norm.eps,
        )


def functional_in_child() -> nn.Module:
    return nn.Sequential(*conv_bn(4, 4), nn.ReLU(), FunctionalNorm(), conv3(6, 4))


def user_graph(training: bool) -> nn.Module:
    """Tracing writes `self.training` into the functional norm's node as a constant."""
    return torch.fx.symbolic_trace(functional_in_child().train(training))


# ------------------------------------------------------------------------------------------- untraceable code


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(6, 6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.conv(x)) if x.sum() > -1e9 else x


class GateAroundBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if x.sum() > -1e9 else x


class ReachesInside(GateAroundBlock):
    """The block's own forward shows one use of its conv; the untraceable owner makes another."""

    def forward(self, x: Tensor) -> Tensor:
        return self.block[0](x) + self.block(x) if x.sum() > -1e9 else x


class HiddenBranch(nn.Module):
    """Which uses the conv has depends on the input: one run cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(4, 6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) if x.sum() > 0 else F.relu(y)


def behind_stem(gate: nn.Module) -> nn.Module:
    return nn.Sequential(*conv_bn(4, 6), nn.ReLU(), gate)


# -------------------------------------------------------------------------------------------- special tensors


@torch.no_grad()
def zero_filters(model: nn.Module) -> None:
    model[0].weight[1].zero_()
    model[0].weight[4].zero_()
    model[0].bias[4].zero_()


@torch.no_grad()
def zero_gammas(model: nn.Module) -> None:
    model[1].weight[::3] = 0.0
    model[1].weight[1] = -1.25


@torch.no_grad()
def dead_channels(model: nn.Module) -> None:
    """What training leaves of a channel whose filter died: constant outputs, the variance 0 or next to it."""
    conv, norm = model[0], model[1]
    conv.weight[0].zero_()
    conv.weight[1] *= 1e-6
    norm.running_mean[:2] = conv.bias[:2]
    norm.running_var[0] = 0.0
    norm.running_var[1] = 1e-12


def bfloat16_norms_in_float32() -> nn.Module:
    model = chain().bfloat16()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return model


# ---------------------------------------------------------------------------------------------------- the zoo


def entry(name: str, build: Callable[[], nn.Module], norms: int, layers: int, **facts: Any) -> Entry:
    """An `Entry` from its name, model, number of norms and of layers, with sets of fqns as one string."""
    for key in ("absorbable", "given_rank", "conditional", "readable", "batch_statistics"):
        facts[key] = frozenset(facts.get(key, "").split())
    return Entry(name, build, facts.pop("inputs", IMAGE), norms, layers, **facts)


WIDE = randn(3, 6, 7, 7)  # as many channels in as out

# fmt: off
CHAINS = (
    entry("conv_bn_relu_chain", chain, 2, 2, absorbable="1 4"),
    entry("strided_dilated_chain", strided_chain, 1, 2, absorbable="1"),
    entry("norm_last", conv_bn, 1, 1, absorbable="1"),
    entry("residual_block", BasicBlock, 3, 3, absorbable="bn1 bn2 downsample.1"),
    entry("preactivation", PreActivation, 2, 2, absorbable="bn2", inputs=WIDE,
          note="bn2 belongs to conv1; registration order says conv2"),
    entry("fan_out", FanOut, 4, 4, absorbable="bn heads.0.1 heads.1.1 heads.2.1"),
    entry("containers", Containers, 2, 2, absorbable="norms.first norms.second"),
    entry("two_inputs_and_keywords", TwoInputs, 2, 2, absorbable="left.1 right.1",
          inputs=lambda: (randn(3, 4, 7, 7)()[0], randn(3, 3, 7, 7, seed=2)()[0]),
          kwargs=lambda: {"scale": 0.5}, note="returns a dict with a tuple in it"),
    entry("norm_beside_groupnorm", lambda: nn.Sequential(conv3(4, 6), nn.GroupNorm(2, 6), *conv_bn(6, 4)),
          1, 2, absorbable="3", note="the GroupNorm is not counted: it is no BatchNorm"),
)

SHARING = (
    entry("one_output_two_norms", OneOutputTwoNorms, 2, 1),
    entry("two_calls_two_norms", TwoCallsTwoNorms, 2, 1, inputs=WIDE, calls={"conv": 2}),
    entry("pair_called_twice", PairCalledTwice, 1, 1, absorbable="bn", inputs=WIDE,
          calls={"conv": 2, "bn": 2}),
    entry("block_called_twice", BlockCalledTwice, 1, 1, absorbable="block.1", inputs=WIDE,
          calls={"block.0": 2, "block.1": 2}),
    entry("conv_twice_norm_once", ConvTwiceNormOnce, 1, 1, inputs=WIDE, calls={"conv": 2}),
    entry("one_norm_two_convs", OneNormTwoConvs, 1, 2, calls={"bn": 2}),
    entry("same_norm_in_two_places", same_norm_in_two_places, 1, 2, calls={"1": 2},
          note="1 and 4 are one module"),
    entry("norm_on_one_of_two_uses", NormOnOneUse, 1, 1),
    entry("conv_output_returned_too", ReturnsTheConvToo, 1, 1),
    entry("norm_output_used_twice", NormOutputTwice, 1, 1, absorbable="bn"),
    entry("tied_weights", lambda: Tied(weights=True), 2, 2, inputs=WIDE),
    entry("tied_gammas", lambda: Tied(weights=False), 2, 2, absorbable="bn1 bn2", inputs=WIDE),
    entry("aliases", Aliases, 1, 1, absorbable="bn", inputs=WIDE, note="conv is also project and layers.0"),
    entry("aliases_called_by_both_names", AliasesCalledByBothNames, 1, 1, inputs=WIDE, calls={"conv": 2}),
    entry("weight_read_as_kernel", WeightReadElsewhere, 1, 1),
    entry("statistics_read_elsewhere", StatisticsReadElsewhere, 1, 1, absorbable="bn",
          note="its affine could be folded, its tensors must stay"),
    entry("weight_read_by_penalty", WeightPenalty, 1, 1),
    entry("bias_read_elsewhere", BiasReadElsewhere, 1, 1),
    entry("weight_read_by_parent", ParentReadsTheWeight, 1, 1),
)

BETWEEN = (
    entry("relu_between", relu_between, 1, 2),
    entry("dropout_between", dropout_between, 1, 1, note="nothing in eval mode, not so in train mode"),
    entry("identity_between", identity_between, 1, 1, conditional="2"),
    entry("norm_first", norm_first, 1, 1),
    entry("norm_after_max_pool", lambda: norm_after_pool(nn.MaxPool2d(2)), 1, 1,
          note="a negative γ flips the max"),
    entry("norm_after_average_pool", lambda: norm_after_pool(nn.AvgPool2d(2)), 1, 1, conditional="2"),
    entry("norm_after_add", NormAfterAdd, 1, 1, inputs=WIDE),
    entry("concat", Concat, 1, 2, note="foldable into the two layers together, into neither alone"),
    entry("reshape_between", ReshapeBetween, 1, 1, conditional="bn"),
    entry("channels_moved_between", ChannelsMovedBetween, 1, 1),
    entry("in_place_between", InPlaceBetween, 1, 1),
    entry("assignment_between", AssignmentBetween, 1, 1, traceable=False),
    entry("chunk_between", ChunkBetween, 2, 1),
    entry("norm_after_norm", lambda: nn.Sequential(*conv_bn(), nn.BatchNorm2d(6)), 2, 1, absorbable="1"),
    entry("stashes_an_activation", StashesAnActivation, 1, 1, absorbable="bn"),
    entry("checkpoint_in_training", CheckpointInTraining, 1, 1, conditional="block.1",
          note="the train graph may not be traceable"),
    entry("registration_order_lies", RegistrationLies, 1, 2, absorbable="bn", inputs=WIDE, note="into up"),
    entry("calls_forward_itself", CallsForwardItself, 1, 1, conditional="bn", calls={"conv": 0},
          note="no __call__, hence no hook and no call_module node for conv"),
)

LAYERS = (
    entry("one_channel", lambda: nn.Sequential(*conv_bn(4, 1), nn.Sigmoid()), 1, 1, absorbable="1"),
    entry("prime_channels", lambda: conv_bn(4, 7), 1, 1, absorbable="1",
          note="no group size but 1 and 7 divides"),
    entry("pooled_to_one_position",
          lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)), 1, 1,
          absorbable="2", note="a group of one channel holds one value, which normalises to 0"),
    entry("depthwise_1x1", lambda: nn.Sequential(nn.Conv2d(6, 6, 1, groups=6), nn.BatchNorm2d(6)), 1, 1,
          absorbable="1", inputs=WIDE, note="fan-in 1"),
    entry("depthwise_separable", separable, 2, 2, absorbable="1 4", inputs=WIDE),
    entry("depthwise_multiplier", lambda: pair(nn.Conv2d, nn.BatchNorm2d, 6, 12, groups=6), 1, 1,
          absorbable="1", inputs=WIDE),
    entry("grouped_conv", lambda: pair(nn.Conv2d, nn.BatchNorm2d, 6, 4, groups=2), 1, 1, absorbable="1",
          inputs=WIDE),
    entry("conv1d", lambda: pair(nn.Conv1d, nn.BatchNorm1d, 4, 6), 1, 1, given_rank="1",
          inputs=randn(3, 4, 9)),
    entry("conv1d_unbatched", lambda: pair(nn.Conv1d, nn.BatchNorm1d, 4, 6), 1, 1, inputs=randn(4, 8),
          note="(4, 8) → (6, 6), of which BatchNorm1d takes dim 1, the positions, for the channels"),
    entry("conv3d", lambda: pair(nn.Conv3d, nn.BatchNorm3d, 4, 6), 1, 1, absorbable="1",
          inputs=randn(2, 4, 6, 6, 6)),
    entry("transposed_conv2d", lambda: pair(nn.ConvTranspose2d, nn.BatchNorm2d, 4, 6, stride=2), 1, 1,
          absorbable="1"),
    entry("transposed_conv1d_grouped", lambda: pair(nn.ConvTranspose1d, nn.BatchNorm1d, 4, 6, groups=2), 1, 1,
          given_rank="1", inputs=randn(3, 4, 9)),
    entry("transposed_conv2d_grouped", lambda: pair(nn.ConvTranspose2d, nn.BatchNorm2d, 6, 6, groups=3), 1, 1,
          absorbable="1", inputs=WIDE),
    entry("transposed_conv2d_depthwise", lambda: pair(nn.ConvTranspose2d, nn.BatchNorm2d, 6, 6, groups=6),
          1, 1, absorbable="1", inputs=WIDE),
    entry("transposed_conv3d_grouped", lambda: pair(nn.ConvTranspose3d, nn.BatchNorm3d, 4, 6, groups=2), 1, 1,
          absorbable="1", inputs=randn(2, 4, 6, 6, 6)),
    entry("linear_after_flatten", classifier, 3, 3, absorbable="1 6 9"),
    entry("linear_of_unknown_rank", linears, 2, 2, given_rank="1 4", inputs=randn(4, 5)),
    entry("linear_on_square_sequence", lambda: LinearOnSequence(6, 6), 1, 1, inputs=randn(3, 6, 5),
          note="L = C: a fuser that does not look at the rank is silently wrong"),
    entry("linear_on_sequence", lambda: LinearOnSequence(7, 6), 1, 1, inputs=randn(3, 7, 5)),
    entry("linear_transposed_to_channels", LinearTransposed, 1, 1, conditional="bn", inputs=randn(3, 7, 5)),
    entry("linear_permuted_to_channels", LinearPermuted, 1, 1, conditional="bn", inputs=randn(3, 6, 6, 5)),
    entry("read_by_unpadded_conv", read_by_conv, 1, 1, readable="0"),
    entry("read_by_linear", ReadByLinear, 1, 1, readable="bn", inputs=randn(3, 6, 6),
          note="L = C: a fuser that does not look where the channels go is silently wrong"),
    entry("read_by_lstm", ReadByLSTM, 1, 1, readable="bn", inputs=randn(3, 6, 5),
          note="the LSTM is not counted: it is no layer that feeds a norm"),
    entry("same_pad_subclass", lambda: subclassed(SamePadConv2d, stride=2), 1, 1, conditional="1"),
    entry("standardized_subclass", lambda: subclassed(StandardizedConv2d), 1, 1,
          note="a scaled weight changes nothing"),
    *(entry(f"padding_{mode}", lambda mode=mode: subclassed(nn.Conv2d, padding=1, padding_mode=mode), 1, 1,
            absorbable="1")
      for mode in ("zeros", "reflect", "replicate", "circular")),
    entry("padding_same", lambda: subclassed(nn.Conv2d, padding="same", padding_mode="reflect"), 1, 1,
          absorbable="1"),
    entry("weight_norm", weight_normed, 1, 1, absorbable="1", note="the layer has a parametrization already"),
)

NORMS = (
    entry("zero_filters", conv_bn, 1, 1, absorbable="1", adjust=zero_filters),
    entry("negative_and_zero_gammas", conv_bn, 1, 1, absorbable="1", adjust=zero_gammas),
    entry("dead_channels", conv_bn, 1, 1, absorbable="1", adjust=dead_channels),
    entry("large_eps", lambda: conv_bn(eps=0.1), 1, 1, absorbable="1"),
    entry("no_affine", lambda: conv_bn(affine=False), 1, 1, absorbable="1"),
    entry("momentum_none", lambda: conv_bn(momentum=None), 1, 1, absorbable="1"),
    entry("no_running_statistics", lambda: conv_bn(track_running_stats=False), 1, 1, batch_statistics="1"),
    entry("sync_batchnorm", lambda: with_norm(nn.SyncBatchNorm(6)), 1, 2, given_rank="1"),
    entry("frozen_parameters", frozen_parameters, 2, 2, absorbable="1 4"),
    entry("frozen_batchnorm", lambda: with_norm(FrozenBatchNorm2d(6), bias=False), 1, 2, conditional="1"),
    entry("norm_drop_act_subclass", lambda: with_norm(NormDropAct(6)), 1, 2, conditional="1"),
    entry("norm_relu_subclass", lambda: with_norm(NormRelu(6)), 1, 2, conditional="1"),
    entry("relu_norm_subclass", lambda: with_norm(ReluNorm(6)), 1, 2,
          note="the ReLU is inside, before the norm"),
    entry("conditional_norm", Conditional, 1, 1, absorbable="bn",
          inputs=lambda: (*IMAGE(), torch.tensor([3, 0, 4])), other_inputs=lambda: (*IMAGE(), torch.tensor([1, 1, 2]))),
    entry("uncalled_norm", Uncalled, 2, 2, absorbable="bn", calls={"old.0": 0, "old.1": 0}),
    entry("auxiliary_head_in_training", AuxiliaryHead, 3, 3, absorbable="stem.1 head.1 aux.1",
          calls={"aux.0": 0, "aux.1": 0}, note="only the train graph has aux"),
    entry("second_use_in_training", SecondUseInTraining, 1, 1,
          note="the eval graph alone would prove it, wrongly"),
    entry("hooked_norm", hooked_norm, 1, 1, conditional="1", note="the hook counts calls in model[1].count"),
    entry("hooked_layer", hooked_layer, 1, 1, note="the hook doubles the layer's output, in no graph"),
)

FUNCTIONAL = (
    entry("functional_norm", FunctionalNorm, 1, 1, given_rank="running_mean"),
    entry("functional_norm_in_child", functional_in_child, 2, 3, absorbable="1 3.running_mean"),
    entry("functional_frozen", FunctionalFrozen, 1, 1, given_rank="running_mean"),
    entry("functional_without_layer", FunctionalNoLayer, 1, 1),
    entry("functional_batch_statistics", lambda: FunctionalNorm(statistics=False), 1, 1,
          batch_statistics="gamma"),
    entry("functional_and_module_mix", FunctionalMix, 3, 3,
          absorbable="bn1 mid_running_mean out_running_mean"),
    entry("norm_as_holder", NormAsHolder, 1, 1, given_rank="bn", note="bn is read and never called"),
    entry("user_graph", lambda: user_graph(False), 2, 3, absorbable="1 3.running_mean",
          note="a GraphModule; training=False is a constant of its functional norm"),
    entry("user_graph_traced_in_training", lambda: user_graph(True), 2, 3, absorbable="1",
          batch_statistics="3.running_mean",
          note="training=True is a constant: eval mode moves the statistics too"),
)

UNTRACEABLE = (
    entry("untraceable_child", lambda: behind_stem(Gate()), 2, 2, traceable=False, absorbable="1",
          conditional="3.bn"),
    entry("untraceable_child_around_block", lambda: behind_stem(GateAroundBlock()), 2, 2, traceable=False,
          absorbable="1", conditional="3.block.1"),
    entry("untraceable_owner_reaches_inside", lambda: behind_stem(ReachesInside()), 2, 2, traceable=False,
          absorbable="1", calls={"3.block.0": 2}),
    entry("untraceable_root", Gate, 1, 1, traceable=False, conditional="bn", inputs=WIDE),
    entry("branch_hides_a_use", HiddenBranch, 1, 1, traceable=False, conditional="bn",
          inputs=shifted(3, 4, 7, 7, by=1.0), other_inputs=shifted(3, 4, 7, 7, by=-1.0),
          note="true on inputs, false on other_inputs"),
)

FORMATS = (
    entry("bfloat16", lambda: chain().bfloat16(), 2, 2, absorbable="1 4",
          inputs=randn(3, 4, 7, 7, dtype=torch.bfloat16)),
    entry("bfloat16_norms_in_float32", bfloat16_norms_in_float32, 2, 2, absorbable="1 4",
          inputs=randn(3, 4, 7, 7, dtype=torch.bfloat16)),
    entry("float64", lambda: BasicBlock().double(), 3, 3, absorbable="bn1 bn2 downsample.1",
          inputs=randn(3, 4, 7, 7, dtype=torch.float64)),
    entry("channels_last", lambda: BasicBlock().to(memory_format=torch.channels_last), 3, 3,
          absorbable="bn1 bn2 downsample.1",
          inputs=lambda: (IMAGE()[0].contiguous(memory_format=torch.channels_last),)),
)
# fmt: on

ZOO: tuple[Entry, ...] = CHAINS + SHARING + BETWEEN + LAYERS + NORMS + FUNCTIONAL + UNTRACEABLE + FORMATS
