"""Activations: the rows of the elementwise operations, dropout among them."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normswap.operations import channel_rules as rules
from normswap.operations.operation import KEPT, Operation

__all__ = ["ACTIVATIONS"]

aten = torch.ops.aten


def _activation(module: type[nn.Module], name: str, *functions: Any, settings: str = "", **facts: Any) -> Operation:
    """Return the row of an activation that ``module`` computes and can be rebuilt as."""
    return Operation(
        name,
        functions,
        modules=(module,),
        signature=f"input {settings} inplace",
        elementwise=True,
        rebuild=module,
        settings=tuple(settings.split()),
        **facts,
    )


def _dropout(module: type[nn.Module], name: str, function: Any, *, homogeneous: bool, **facts: Any) -> Operation:
    """Return the row of a dropout; one that keeps the mean and variance adds a constant and is not homogeneous."""
    return Operation(
        name,
        (function,),
        modules=(module,),
        signature="input p training inplace",
        elementwise=True,
        homogeneous=homogeneous,
        rebuild=module,
        settings=("p",),
        **facts,
    )


def _copy(name: str, *functions: Any) -> Operation:
    """Return the row of an operation that changes no value, apart from rounding."""
    return Operation(
        name, functions, methods=(name,), signature="input memory_format", elementwise=True, homogeneous=True
    )


def _clamped(min: Any = -math.inf, max: Any = math.inf) -> nn.Module | None:
    """Return the module that clamps; None where the bounds are no two numbers in order, which it would refuse."""
    numbers = all(isinstance(bound, (int, float)) for bound in (min, max))
    return nn.Hardtanh(min, max) if numbers and min < max else None


_FEATURES = (aten.feature_dropout.default, aten.feature_dropout_.default)

ACTIVATIONS: tuple[Operation, ...] = (
    # Homogeneous: f(s z) = s f(z) for s > 0.
    _activation(
        nn.ReLU, "relu", F.relu, F.relu_, torch.relu, torch.relu_, methods=("relu", "relu_"),
        homogeneous=True, floor=0.0,
    ),
    _activation(
        nn.LeakyReLU, "leaky_relu", F.leaky_relu, F.leaky_relu_, settings="negative_slope", homogeneous=True
    ),
    Operation(
        "rrelu", (F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_), modules=(nn.RReLU,),
        signature="input lower upper training inplace", elementwise=True, homogeneous=True,
        rebuild=nn.RReLU, settings=("lower", "upper"),
    ),
    Operation(
        "prelu", (F.prelu, torch.prelu), ("prelu",), (nn.PReLU,), "input weight", elementwise=True, homogeneous=True,
        channels=rules.fix,  # could be scaled through; what that does to a trained network was not measured
    ),
    _dropout(
        nn.Dropout, "dropout", F.dropout, homogeneous=True,
        lifted_from=(aten.dropout.default, aten.dropout_.default, aten.native_dropout.default),
    ),
    _dropout(nn.Dropout1d, "dropout1d", F.dropout1d, homogeneous=True, lifted_from=_FEATURES),
    _dropout(nn.Dropout2d, "dropout2d", F.dropout2d, homogeneous=True, lifted_from=_FEATURES),
    _dropout(nn.Dropout3d, "dropout3d", F.dropout3d, homogeneous=True, lifted_from=_FEATURES),
    Operation("identity", modules=(nn.Identity,), elementwise=True, homogeneous=True),
    _copy("clone", torch.clone),
    _copy("detach", torch.detach),
    _copy("contiguous"),
    _copy("float"),
    Operation("negative", (torch.neg, operator.neg), ("neg", "__neg__"), elementwise=True, homogeneous=True),
    # Not homogeneous.
    _activation(nn.ReLU6, "relu6", F.relu6, floor=0.0),
    _activation(
        nn.Hardtanh, "hardtanh", F.hardtanh, F.hardtanh_, settings="min_val max_val",
        defaults={"min_val": -1.0, "max_val": 1.0}, floor="min_val",
    ),
    Operation(
        "clamp", (torch.clamp, torch.clamp_, torch.clip, torch.clip_), ("clamp", "clamp_", "clip", "clip_"),
        signature="input min max", elementwise=True, rebuild=_clamped, settings=("min", "max"), floor="min",
    ),
    _activation(nn.ELU, "elu", F.elu, F.elu_, settings="alpha"),
    _activation(nn.CELU, "celu", F.celu, F.celu_, torch.celu, torch.celu_, settings="alpha"),
    _activation(nn.SELU, "selu", F.selu, F.selu_, torch.selu, torch.selu_),
    _activation(nn.GELU, "gelu", F.gelu, settings="approximate"),
    _activation(nn.SiLU, "silu", F.silu),
    _activation(nn.Mish, "mish", F.mish),
    _activation(nn.Hardswish, "hardswish", F.hardswish),
    _activation(nn.Hardsigmoid, "hardsigmoid", F.hardsigmoid),
    _activation(
        nn.Sigmoid, "sigmoid", torch.sigmoid, torch.sigmoid_, F.sigmoid, torch.special.expit,
        methods=("sigmoid", "sigmoid_"),
    ),
    _activation(nn.Tanh, "tanh", torch.tanh, torch.tanh_, F.tanh, methods=("tanh", "tanh_")),
    _activation(nn.Softplus, "softplus", F.softplus, settings="beta threshold"),
    _activation(nn.LogSigmoid, "logsigmoid", F.logsigmoid),
    _activation(nn.Softsign, "softsign", F.softsign),
    _activation(nn.Tanhshrink, "tanhshrink", F.tanhshrink),
    _activation(
        nn.Hardshrink, "hardshrink", F.hardshrink, torch.hardshrink, methods=("hardshrink",), settings="lambd"
    ),
    _activation(nn.Softshrink, "softshrink", F.softshrink, settings="lambd"),
    _activation(
        nn.Threshold, "threshold", F.threshold, torch.threshold,
        settings="threshold value",
    ),
    _dropout(nn.AlphaDropout, "alpha_dropout", F.alpha_dropout, homogeneous=False),
    _dropout(nn.FeatureAlphaDropout, "feature_alpha_dropout", F.feature_alpha_dropout, homogeneous=False),
    # Of several values each, but with the same axes.
    Operation("softmax", (F.softmax, torch.softmax), ("softmax",), (nn.Softmax,), axes=KEPT),
    Operation("softmax2d", modules=(nn.Softmax2d,), axes=KEPT),
    Operation("log_softmax", (F.log_softmax, torch.log_softmax), ("log_softmax",), (nn.LogSoftmax,), axes=KEPT),
    Operation("softmin", (F.softmin,), modules=(nn.Softmin,), axes=KEPT),
    Operation("to", methods=("to",), signature="input *target", axes=KEPT),
)  # fmt: skip
"""The operations that act on each value by itself."""
