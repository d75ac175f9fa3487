"""One vocabulary: which module or call is a layer, a norm or neither, however the user wrote it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.export._unlift import GuardsFn

from normswap.nn.kinds import class_of, is_layer
from normswap.norms import norm_of

__all__ = [
    "LAYER_CALLS",
    "STATISTICS_CALLS",
    "is_functional_norm",
    "is_leaf",
    "norm_argument",
    "passes_through",
    "rank_of",
]

aten = torch.ops.aten
LAYER_CALLS: frozenset[Any] = frozenset(
    {
        F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear,
        aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default,
        aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding, aten.linear.default,
        aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
    }
)  # fmt: skip
"""The functions that apply a convolution or a linear layer to a weight that they are given."""
STATISTICS_CALLS: frozenset[Any] = frozenset(
    {
        aten.native_batch_norm.default,
        aten._native_batch_norm_legit.default,
        aten._native_batch_norm_legit_functional.default,
        aten._native_batch_norm_legit_no_training.default,
    }
)
"""The functions that return the statistics of a batch norm, too."""
_BATCH_NORM_CALLS = STATISTICS_CALLS | {F.batch_norm, torch.batch_norm, aten.batch_norm.default}
_BATCH_NORM_PARAMETERS = (
    "input",
    "running_mean",
    "running_var",
    "weight",
    "bias",
    "training",
    "momentum",
    "eps",
)
# torch.batch_norm takes its tensors in another order than F.batch_norm.
_ATEN_PARAMETERS = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")


def is_leaf(module: nn.Module) -> bool:
    """Tell whether a call of ``module`` is one step of the dataflow: a layer, a norm or another module of torch.nn.

    So is a program's check of its inputs' sizes.
    """
    if is_layer(module) or norm_of(module) is not None or isinstance(module, GuardsFn):
        return True
    cls = class_of(module)
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    ours = cls.__module__.startswith("normswap.nn.")
    torchs = cls.__module__.startswith(("torch.nn.", "torch.ao.nn.")) and cls is not nn.Module
    return ours or (torchs and not isinstance(module, containers))


def is_functional_norm(node: fx.Node) -> bool:
    """Tell whether ``node`` is a call of ``batch_norm``."""
    return node.op == "call_function" and node.target in _BATCH_NORM_CALLS


def norm_argument(node: fx.Node, name: str) -> Any:
    """Return the argument ``name`` of a ``batch_norm`` call, None where it was not given."""
    if name in node.kwargs:
        return node.kwargs[name]
    order = _BATCH_NORM_PARAMETERS if node.target is F.batch_norm else _ATEN_PARAMETERS
    place = order.index(name)
    if place < len(node.args):
        return node.args[place]
    return {"training": False, "momentum": 0.1, "eps": 1e-5}.get(name)


def passes_through(node: fx.Node, module: nn.Module | None) -> bool:
    """Tell whether ``node``'s output is its first argument, value for value and axis for axis."""
    if node.op == "call_module":
        return type(module) is nn.Identity
    return node.op == "call_method" and node.target == "contiguous"


# Note [Ranks]
# A BatchNorm1d takes (N, C) and (N, C, L), a Linear (…, C): whether a Linear's channels are the norm's hangs on the
# rank of the value between them. The graph often tells it (a flatten, a convolution upstream); where it does not and
# no example input was given, the rank is unknown and nothing is absorbed.

_ELEMENTWISE: frozenset[Any] = frozenset(
    {
        torch.relu, torch.sigmoid, torch.tanh, F.relu, F.relu6, F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.elu,
        F.selu, F.leaky_relu, F.softplus, F.mish, F.dropout, F.dropout2d, F.dropout3d, F.softmax, F.log_softmax,
        F.batch_norm, "relu", "relu_", "sigmoid", "tanh", "contiguous", "clone", "float", "to", "clamp",
    }
)  # fmt: skip
_ELEMENTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.ELU, nn.SELU, nn.LeakyReLU, nn.PReLU,
    nn.Softplus, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softmax, nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.Identity,
    nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.BatchNorm1d, nn.SyncBatchNorm,
)  # fmt: skip
_RANKED_MODULES: tuple[tuple[tuple[type[nn.Module], ...], int], ...] = (
    ((nn.Conv1d, nn.ConvTranspose1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d), 3),
    (
        (
            nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d,
            nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample,
        ),
        4,
    ),
    ((nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d), 5),
)  # fmt: skip


def rank_of(node: fx.Node, module_of: Callable[[fx.Node], nn.Module | None]) -> int | None:
    """Return the number of axes of ``node``'s value where the graph shows it, else None (Note [Ranks]).

    ``module_of`` gives the module that a ``call_module`` node calls.
    """
    for _ in range(1000):  # walk towards the inputs; a bound only against a malformed graph
        module = module_of(node) if node.op == "call_module" else None
        if module is not None:
            for classes, rank in _RANKED_MODULES:
                if isinstance(module, classes):
                    return rank
            if isinstance(module, nn.Flatten):
                return 2 if (module.start_dim, module.end_dim) == (1, -1) else None
            if not isinstance(module, _ELEMENTWISE_MODULES):
                return None
        elif node.target in (torch.flatten, "flatten"):
            start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
            end = node.args[2] if len(node.args) > 2 else node.kwargs.get("end_dim", -1)
            return 2 if (start, end) == (1, -1) else None
        elif node.target in ("view", "reshape", torch.reshape):
            sizes = node.args[1:]
            if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
                return len(sizes[0])
            return len(sizes) if len(sizes) > 1 else None
        elif node.target not in _ELEMENTWISE or node.op not in ("call_function", "call_method"):
            return None
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    return None
