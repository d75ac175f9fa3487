"""Building modules: the module of torch.nn that computes what a call of ATen does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from normswap.exported.reading import FEATURE_DROPOUT_CALLS, Call, writes_to_input
from normswap.operations.table import TABLE, named

__all__ = ["build_dropout", "build_layer", "build_norm"]

_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def build_layer(settings: Mapping[str, Any], weight: Any, bias: Any) -> nn.Module | None:
    """Return the layer that holds ``weight`` and ``bias``; None where they are no layer's.

    Args:
        settings: The call's other arguments, none for a linear layer.
        weight: Its weight.
        bias: Its bias, None for none.
    """
    if not isinstance(weight, nn.Parameter) or not isinstance(bias, nn.Parameter | None):
        return None
    if settings:
        module = _convolution(settings, weight)
    elif weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return None  # a product with a vector, or a sum with a matrix
    else:
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.register_parameter("weight", weight)
    module.register_parameter("bias", bias)
    return module


def _convolution(given: Mapping[str, Any], weight: Tensor) -> nn.Module:
    axes = weight.ndim - 2
    transposed = bool(given.get("transposed"))
    make: Any = named(f"conv_transpose{axes}d" if transposed else f"conv{axes}d").modules[0]
    groups = int(given["groups"])
    inside, outside = (
        (weight.shape[0], weight.shape[1] * groups) if transposed else (weight.shape[1] * groups, weight.shape[0])
    )
    settings = {name: _per_axis(given[name], axes) for name in ("stride", "padding", "dilation")}
    if transposed:
        settings["output_padding"] = _per_axis(given["output_padding"], axes)
    module: nn.Module = make(
        inside, outside, tuple(weight.shape[2:]), groups=groups, bias=False, device="meta", **settings
    )
    return module


def _per_axis(value: Any, count: int) -> Any:
    """Return a setting per axis: ATen takes one value for all."""
    return value if isinstance(value, str) else tuple(value) * (count if len(value) == 1 else 1)


def build_norm(settings: Mapping[str, Any], tensors: Mapping[str, Any], counter: Any, axes: int) -> nn.Module | None:
    """Return the BatchNorm that holds ``tensors``; None where γ or β is no parameter, or no BatchNorm takes the input.

    Args:
        settings: ``eps``, ``momentum`` and ``training``.
        tensors: γ, β, μ and the variance by the names of torch's attributes, None for those that it does not have.
        counter: How many batches its statistics have seen; None where the program does not hold it.
        axes: How many axes its input has.
    """
    affine = [tensors[name] for name in ("weight", "bias") if tensors[name] is not None]
    if axes not in _NORMS or not all(isinstance(tensor, nn.Parameter) for tensor in affine):
        return None
    like = next(tensor for tensor in tensors.values() if tensor is not None)
    tracked = tensors["running_mean"] is not None
    module = _NORMS[axes](
        like.numel(),
        eps=settings["eps"],
        momentum=settings["momentum"],
        affine=bool(affine),
        track_running_stats=tracked,
        device=like.device,
        dtype=like.dtype,
    )
    if affine:
        module.register_parameter("weight", tensors["weight"])
        module.register_parameter("bias", tensors["bias"])
    if tracked:
        module.register_buffer("running_mean", tensors["running_mean"])
        module.register_buffer("running_var", tensors["running_var"])
        if isinstance(counter, Tensor):
            module.register_buffer("num_batches_tracked", counter)
    module.training = bool(settings["training"])
    return module


def build_dropout(call: Call) -> nn.Module | None:
    """Return the dropout of ``call``; None where it drops channels of a value that has no such dropout."""
    node = call.operation
    operation = TABLE.by_name.get("dropout")
    if node.target in FEATURE_DROPOUT_CALLS:
        value = call.input.meta.get("val")
        operation = TABLE.by_name.get(f"dropout{value.ndim - 2}d") if isinstance(value, Tensor) else None
    make: Any = None if operation is None else operation.modules[0]
    return None if make is None else make(call.settings["p"], inplace=writes_to_input(node))
