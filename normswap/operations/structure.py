"""Structure: the rows of layers, norms, pooling, arithmetic, reshaping, and of what reads no value."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normswap.nn import RankCheck
from normswap.operations import channel_rules as rules
from normswap.operations.axis_rules import flattened, held, moved, permuted, permuted_axes, transposed, viewed
from normswap.operations.operation import KEPT, Operation

__all__ = ["STRUCTURE"]

aten = torch.ops.aten
_CONVOLUTION = aten.convolution.default
_MAX_POOL = "input kernel_size stride padding dilation ceil_mode return_indices"
_MEAN_POOL = "input kernel_size stride padding ceil_mode count_include_pad divisor_override"


def _layer(module: type[nn.Module], axes: Any, function: Any, *overloads: Any) -> Operation:
    """Return the row of a layer: its channels are the layer's own, which is found by its module."""
    return Operation(function.__name__, (function,), modules=(module,), axes=axes, lifted_from=overloads)


def _max_pool(axes: int, module: type[nn.Module], adaptive: type[nn.Module], *functions: Any) -> tuple[Operation, ...]:
    *plain, over_output = functions
    return (
        Operation(
            f"max_pool{axes}d", tuple(plain), modules=(module,), signature=_MAX_POOL,
            axes=axes + 2, channels=rules.max_pool(axes),
        ),
        Operation(
            f"adaptive_max_pool{axes}d", (over_output,), modules=(adaptive,),
            signature="input output_size return_indices", axes=axes + 2, channels=rules.max_pool(axes),
        ),
    )  # fmt: skip


def _mean_pool(axes: int, module: type[nn.Module], adaptive: type[nn.Module], *functions: Any) -> tuple[Operation, ...]:
    plain, *over_output = functions
    return (
        Operation(
            f"avg_pool{axes}d", (plain,), modules=(module,), signature=_MEAN_POOL,
            axes=axes + 2, channels=rules.over_space(axes),
        ),
        Operation(
            f"adaptive_avg_pool{axes}d", tuple(over_output), modules=(adaptive,), signature="input output_size",
            axes=axes + 2, channels=rules.over_space(axes),
        ),
    )  # fmt: skip


def _reduction(function: Any) -> Operation:
    return Operation(
        function.__name__, (function,), (function.__name__,), signature="input dim keepdim",
        defaults={"keepdim": False}, channels=rules.reduce,
    )  # fmt: skip


def _pad(axes: int, *modules: type[nn.Module]) -> Operation:
    return Operation(
        f"pad{axes}d", modules=modules, signature="input padding value",
        axes=axes + 2, channels=rules.pad_space(axes),
    )  # fmt: skip


_LAYERS = (
    _layer(nn.Linear, KEPT, F.linear, aten.linear.default),
    _layer(nn.Conv1d, 3, F.conv1d, aten.conv1d.default, aten.conv1d.padding, _CONVOLUTION),
    _layer(nn.Conv2d, 4, F.conv2d, aten.conv2d.default, aten.conv2d.padding, _CONVOLUTION),
    _layer(nn.Conv3d, 5, F.conv3d, aten.conv3d.default, aten.conv3d.padding, _CONVOLUTION),
    _layer(nn.ConvTranspose1d, 3, F.conv_transpose1d, aten.conv_transpose1d.default, _CONVOLUTION),
    _layer(nn.ConvTranspose2d, 4, F.conv_transpose2d, aten.conv_transpose2d.input, _CONVOLUTION),
    _layer(nn.ConvTranspose3d, 5, F.conv_transpose3d, aten.conv_transpose3d.input, _CONVOLUTION),
)
_NORMS = (
    Operation(
        "batch_norm", (F.batch_norm, torch.batch_norm), modules=(nn.BatchNorm1d, nn.SyncBatchNorm), axes=KEPT,
        lifted_from=(
            aten.batch_norm.default, aten.native_batch_norm.default, aten._native_batch_norm_legit.default,
            aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit_no_training.default,
        ),
    ),
    Operation("batch_norm2d", modules=(nn.BatchNorm2d,), axes=4),
    Operation("batch_norm3d", modules=(nn.BatchNorm3d,), axes=5),
    Operation("group_norm", (F.group_norm,), modules=(nn.GroupNorm,), axes=KEPT),
    Operation("layer_norm", (F.layer_norm,), modules=(nn.LayerNorm,), axes=KEPT),
    Operation("rms_norm", (F.rms_norm,), modules=(nn.RMSNorm,), axes=KEPT),
    Operation("local_response_norm", (F.local_response_norm,), modules=(nn.LocalResponseNorm,), axes=KEPT),
    Operation(
        "instance_norm", (F.instance_norm,),
        modules=(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), axes=KEPT,
    ),
)  # fmt: skip
_SPACE = (
    *_max_pool(1, nn.MaxPool1d, nn.AdaptiveMaxPool1d, F.max_pool1d, torch.max_pool1d, F.adaptive_max_pool1d),
    *_max_pool(2, nn.MaxPool2d, nn.AdaptiveMaxPool2d, F.max_pool2d, torch.max_pool2d, F.adaptive_max_pool2d),
    *_max_pool(3, nn.MaxPool3d, nn.AdaptiveMaxPool3d, F.max_pool3d, torch.max_pool3d, F.adaptive_max_pool3d),
    *_mean_pool(
        1, nn.AvgPool1d, nn.AdaptiveAvgPool1d, F.avg_pool1d, F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d
    ),
    *_mean_pool(2, nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
    *_mean_pool(3, nn.AvgPool3d, nn.AdaptiveAvgPool3d, F.avg_pool3d, F.adaptive_avg_pool3d),
    _pad(1, nn.ReflectionPad1d, nn.ReplicationPad1d, nn.ZeroPad1d, nn.ConstantPad1d),
    _pad(2, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ZeroPad2d, nn.ConstantPad2d),
    _pad(3, nn.ReflectionPad3d, nn.ReplicationPad3d, nn.ZeroPad3d, nn.ConstantPad3d),
    Operation(
        "pad", (F.pad,), signature="input pad mode value", defaults={"mode": "constant"},
        axes=KEPT, channels=rules.pad,
    ),
    Operation(
        "interpolate", (F.interpolate,), modules=(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
        signature="input size scale_factor mode align_corners recompute_scale_factor antialias",
        axes=KEPT, channels=rules.same,
    ),
    _reduction(torch.mean),
    _reduction(torch.sum),
    _reduction(torch.amax),
)  # fmt: skip
_ARITHMETIC = (
    Operation(
        "add", (torch.add, operator.add, operator.iadd), ("add", "add_", "__add__", "__iadd__", "__radd__"),
        signature="input other alpha", channels=rules.add,
    ),
    Operation(
        "subtract", (torch.sub, operator.sub, operator.isub), ("sub", "sub_", "__sub__", "__isub__"),
        signature="input other alpha", channels=rules.add,
    ),
    Operation(
        "multiply", (torch.mul, operator.mul), ("mul", "__mul__", "__rmul__"),
        signature="input other", channels=rules.multiply,
    ),
    Operation(
        "multiply in place", (operator.imul,), ("mul_", "__imul__"),
        signature="input other", channels=rules.multiply_in_place,
    ),
    Operation(
        "divide", (torch.div, operator.truediv, operator.itruediv), ("div", "div_", "__truediv__"),
        signature="input other", channels=rules.divide,
    ),
)  # fmt: skip
_SHAPE = (
    Operation(
        "flatten", (torch.flatten,), ("flatten",), (nn.Flatten,), "input start_dim end_dim",
        defaults={"start_dim": 0, "end_dim": -1}, axes=flattened, channels=rules.flatten,
    ),
    Operation("rank check", modules=(RankCheck,), signature="input rank", axes=held, channels=rules.same),
    Operation(
        "transpose", (torch.transpose, torch.swapaxes, torch.swapdims, aten.transpose.int),
        ("transpose", "swapaxes", "swapdims"), signature="input dim0 dim1", axes=KEPT, order=transposed,
    ),
    Operation(
        "permute", (torch.permute, aten.permute.default), ("permute",), signature="input *dims",
        axes=permuted_axes, order=permuted,
    ),
    Operation(
        "movedim", (torch.movedim, torch.moveaxis), ("movedim", "moveaxis"), signature="input source destination",
        axes=KEPT, order=moved,
    ),
    Operation("view", (torch.reshape,), ("view", "reshape"), signature="input *size", axes=viewed),
    Operation(
        "join", (torch.cat, torch.concat), signature="tensors dim", defaults={"dim": 0}, channels=rules.join
    ),
    Operation("item", (operator.getitem,), ("__getitem__",), signature="input index", channels=rules.item),
    Operation(
        "split", (torch.split,), ("split",), signature="tensor split_size_or_sections dim",
        defaults={"dim": 0}, channels=rules.split,
    ),
    Operation(
        "chunk", (torch.chunk,), ("chunk",), signature="input chunks dim", defaults={"dim": 0}, channels=rules.chunk
    ),
)  # fmt: skip
_ASKED_BY_METHODS = """
    size dim ndimension numel nelement stride storage_offset is_contiguous get_device element_size is_floating_point
    is_complex is_inference is_pinned __len__ __hash__
"""
_ASKED_BY_ATTRIBUTES = """
    shape ndim dtype device layout itemsize nbytes requires_grad is_leaf grad_fn is_cpu is_cuda is_meta is_mps is_xpu
    is_sparse is_sparse_csr is_quantized is_nested is_mkldnn _version
"""

STRUCTURE: tuple[Operation, ...] = (
    *_LAYERS,
    *_NORMS,
    *_SPACE,
    *_ARITHMETIC,
    *_SHAPE,
    *(Operation(name, methods=(name,), value_free=True) for name in _ASKED_BY_METHODS.split()),
    *(Operation(name, attributes=(name,), value_free=True) for name in _ASKED_BY_ATTRIBUTES.split()),
)
"""The operations that mix values, or only ask for a tensor's form."""
