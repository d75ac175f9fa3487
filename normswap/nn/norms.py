"""Normalization modules that torch.nn does not have."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.errors import InputError

__all__ = ["ChannelAffine", "ChannelLayerNorm", "MeanOnlyBatchNorm", "any_sample", "per_channel"]

_WIDE = (torch.float32, torch.float64)


def any_sample(x: Tensor) -> Tensor:
    """Return whether a batch has a sample: the mean of none is NaN. A tensor, so that it can be traced. ``()``"""
    return x.new_ones(x.shape[:1], dtype=torch.bool).any()


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Return ``values``, ``(C,)``, in the dtype of ``x`` and shaped to broadcast along its axis 1."""
    return values.view(1, -1, *(1,) * (x.ndim - 2)).to(x.dtype)


def _laid_out_as(y: Tensor, x: Tensor) -> Tensor:
    """Return ``y`` contiguous where ``x`` is, and as it is elsewhere."""
    return y.contiguous() if x.is_contiguous() else y


# The rank and the layout of a proxy are unknown: a trace of these modules calls the functions as a whole.
torch.fx.wrap("per_channel")
torch.fx.wrap("_laid_out_as")


class ChannelAffine(nn.Module):
    """``y = weight_c · x + bias_c`` per channel, axis 1; folds into a neighbour or to a depthwise 1×1 convolution.

    Shape: ``(N, C)`` or ``(N, C, ...)`` to the same.

    Args:
        num_features: C.
        rank: The number of axes of x where it is known; folding needs it.
        rank_by_example: Whether example inputs alone show it: folding then holds the inputs to it.
    """

    def __init__(
        self,
        num_features: int,
        rank: int | None = None,
        *,
        rank_by_example: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.rank, self.rank_by_example = num_features, rank, rank_by_example
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift ``x``."""
        return x * per_channel(self.weight, x) + per_channel(self.bias, x)

    def extra_repr(self) -> str:
        return f"{self.num_features}"


class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalization over the channel axis 1 at each position: ``y = γ (x − mean_c x)/sqrt(var_c x + eps) + β``.

    Shape: ``(N, C, ...)`` to the same, in the memory format of the input, as torch's norms do: a ``view`` behind it
    fails otherwise, and code that reads strides, as Opacus' gradients of convolutions, computes something else.

    Source: J. Ba, J. Kiros, G. Hinton, *Layer Normalization*, 2016, eq. 3, with the channels of one position as the
    units of the layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` over axis 1."""
        y = F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return _laid_out_as(y.movedim(-1, 1), x)


# Note [A BatchNorm by class]
# Much code finds norms by their class: loops that freeze them, swa_utils.update_bn, groups of parameters for weight
# decay, a model's own fuse(). Mean-only norms are what it looks for: they have running statistics to be frozen and
# estimated anew, and in evaluation they are a BatchNorm with the variance 1 and the gain 1. So the class is a subclass
# of torch's, and the constants can be read. They are properties: nothing is added to the state dict or to a
# synchronization of buffers, and what is written into them is lost; ones may be assigned as the variance, with which
# loops that average weights let statistics begin anew. The gain is sqrt(1 + eps), so that formulas hold
# with any eps that code sets. SyncBatchNorm.convert_sync_batchnorm would make a SyncBatchNorm of it, whose gain is a
# parameter and which divides by the batch's standard deviation: where it reads the gain, an error says what to do.


class MeanOnlyBatchNorm(_BatchNorm):
    """Mean-only batch normalization: ``y = x − μ + β``, with no division by a standard deviation.

    In training μ is the minibatch's mean per channel over batch and space and ``running_mean`` follows it as
    BatchNorm's does: ``running_mean ← (1 − momentum)·running_mean + momentum·μ``, the plain average of all batches with
    ``momentum=None``. In evaluation μ is ``running_mean``.

    Code that looks for BatchNorms finds it (Note [A BatchNorm by class]): the subclass that :meth:`of_rank` returns is
    a BatchNorm1d, 2d or 3d.

    Shape: ``(N, C)`` or ``(N, C, ...)`` to the same; statistics over all axes but 1.

    Args:
        num_features: C.
        momentum: As in BatchNorm.
        rank: The number of axes of x where it is known; folding may need it.
        synchronized: Whether μ is the mean over all processes of the default group, as in SyncBatchNorm.
        rank_by_example: Whether example inputs alone show the rank: folding then holds the inputs to it.

    Source: T. Salimans, D. Kingma, *Weight Normalization*, 2016, section 3.
    """

    running_mean: Tensor
    num_batches_tracked: Tensor
    # Of the class and not of each norm: models that were pickled before have none of their own.
    eps: float = 0.0
    affine: bool = True
    track_running_stats: bool = True

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        rank: int | None = None,
        *,
        synchronized: bool = False,
        rank_by_example: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # a BatchNorm's own makes tensors of what is constant here
        self.num_features, self.momentum, self.rank = num_features, momentum, rank
        self.synchronized, self.rank_by_example = synchronized, rank_by_example
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))

    @staticmethod
    def of_rank(rank: int | None) -> type[MeanOnlyBatchNorm]:
        """Return the class for inputs of so many axes, which is also torch's BatchNorm for them."""
        return {2: MeanOnlyBatchNorm1d, 3: MeanOnlyBatchNorm1d, 4: MeanOnlyBatchNorm2d, 5: MeanOnlyBatchNorm3d}.get(
            rank or 0, MeanOnlyBatchNorm
        )

    @property
    def running_var(self) -> Tensor:
        """Ones: what BatchNorm would divide by the root of."""
        return torch.ones_like(self.running_mean)

    @running_var.setter
    def running_var(self, value: Tensor | None) -> None:
        if value is None or not bool((value == 1).all()):
            raise InputError(
                "a mean-only BatchNorm was assigned a running variance: it divides by none",
                code="mean-only-variance",
                hint="assign ones; normswap.migrate_state_dict makes the converted model's values of a BatchNorm's",
            )

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The gain of the BatchNorm that this is in evaluation: ``sqrt(running_var + eps)``, which is 1."""
        _refuse_synchronizing(sys._getframe(1))
        return torch.sqrt(self.running_var + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """Subtract the mean and add the bias."""
        if not self.training:
            return x + per_channel(self.bias - self.running_mean, x)
        mean = self._batch_mean(x)
        if self.track_running_stats:
            self._follow(mean if self.synchronized else torch.where(any_sample(x), mean, self.running_mean))
        return x + per_channel(self.bias - mean, x)

    @torch.no_grad()
    def _follow(self, mean: Tensor) -> None:
        count = (self.num_batches_tracked + 1).to(self.running_mean.dtype)
        momentum = 1.0 / count if self.momentum is None else self.momentum
        try:
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        except RuntimeError as cause:
            if "vmap" not in str(cause):
                raise
            raise InputError(
                "a mean-only BatchNorm got a batched tensor from vmap, while its running mean, which would follow it, "
                "is not batched",
                code="vmap-running-mean",
                hint="call eval(), set track_running_stats = False on it, or give vmap its buffers, too",
            ) from cause
        self.num_batches_tracked.add_(1)

    def _batch_mean(self, x: Tensor) -> Tensor:
        axes = [0, *range(2, x.ndim)]
        if not (self.synchronized and dist.is_available() and dist.is_initialized()):
            # The gradient of a sum is one number per channel, that of a mean is written out at the size of x. The sum
            # of a half-precision x may overflow.
            return x.sum(axes) / (x.numel() // x.shape[1]) if x.dtype in _WIDE else x.mean(axes)
        total = torch.cat([x.sum(axes), x.new_tensor([float(x.numel() // x.shape[1])])])
        total = _SumOverProcesses.apply(total)  # type: ignore[no-untyped-call]
        mean: Tensor = total[:-1] / total[-1]
        return mean

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if strict and f"{prefix}running_var" in state_dict:
            error_msgs.append(
                f"'{prefix.removesuffix('.')}' is a mean-only norm, the state dict has a BatchNorm's values for it: "
                "normswap.migrate_state_dict(state_dict, model) gives the converted model's"
            )

    def extra_repr(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}"


class _SumOverProcesses(torch.autograd.Function):
    """The sum over all processes of the default group; each has a loss of its own, whose gradients add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


_SYNCHRONIZES = nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__  # type: ignore[attr-defined]


def _refuse_synchronizing(reader: FrameType | None) -> None:
    """Raise InputError where ``reader`` is torch's function that makes SyncBatchNorms (Note [A BatchNorm by class])."""
    if reader is None or reader.f_code is not _SYNCHRONIZES:
        return
    names: list[str] = []
    caller = reader.f_back
    while caller is not None and caller.f_code is _SYNCHRONIZES:
        names.insert(0, str(caller.f_locals["name"]))
        caller = caller.f_back
    where = f"'{'.'.join(names)}'" if names else "the module"
    raise InputError(
        f"{where} is a mean-only BatchNorm, of which convert_sync_batchnorm cannot make a SyncBatchNorm: that would "
        "divide by a standard deviation, too",
        code="sync-mean-only",
        hint="call convert_sync_batchnorm on the model before it is converted, which makes its mean-only norms "
        "synchronized; or set .synchronized = True on each MeanOnlyBatchNorm",
    )


class MeanOnlyBatchNorm1d(MeanOnlyBatchNorm, nn.BatchNorm1d):
    """Mean-only batch normalization where a BatchNorm1d was."""


class MeanOnlyBatchNorm2d(MeanOnlyBatchNorm, nn.BatchNorm2d):
    """Mean-only batch normalization where a BatchNorm2d was."""


class MeanOnlyBatchNorm3d(MeanOnlyBatchNorm, nn.BatchNorm3d):
    """Mean-only batch normalization where a BatchNorm3d was."""
