"""Batch normalization, as it stands in models: torch's, its subclasses, and frozen ones that share no base class."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from normswap.nn.kinds import class_of
from normswap.norms.assignment import LinearOf, NewValue
from normswap.norms.base import Norm
from normswap.norms.records import Affine, Bias, Encoding, Incoming, NormState, Stays, Takes
from normswap.records import Site

__all__ = ["BatchNormalization"]

_TENSORS = ("weight", "bias", "running_mean", "running_var")
_TORCHS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_OWN = frozenset({"forward", "extra_repr", "reset_parameters"})
"""What a subclass may define anew, beside its forward: what only makes or prints it."""
_HOOKS_OF_CLASSES = frozenset({"__call__", "__getattr__", "__getattribute__", "__setattr__", "__delattr__"})


@dataclass(frozen=True)
class BatchNormalization(Norm):
    """``y = γ (x − μ)/sqrt(var + eps) + β``, with the batch's statistics in training and stored ones in evaluation.

    As a target it stays where it is, and its statistics follow the weight where that has changed.

    Source: S. Ioffe, C. Szegedy, *Batch Normalization*, 2015.
    """

    modules = (_BatchNorm,)
    converts = True
    follows_batches = True
    takes = Takes.NOTHING
    bias = Bias.KEPT

    @classmethod
    def recognizes(cls, module: nn.Module) -> bool:
        """Tell whether ``module`` is a frozen BatchNorm.

        Those of torchvision, detectron2 and timm share no base class: they are known by ``BatchNorm`` in the class's
        name and the four tensors.
        """
        return "BatchNorm" in class_of(module).__name__ and all(name in module._buffers for name in _TENSORS)

    @classmethod
    def read(cls, module: nn.Module) -> NormState:
        weight, bias, mean, var = (getattr(module, name, None) for name in _TENSORS)
        return NormState.of(
            getattr(module, "num_features", None),
            (weight, bias, mean, var),
            eps=float(getattr(module, "eps", 1e-5)),
            momentum=getattr(module, "momentum", 0.1),
            frozen=cls.frozen(module),
            synchronized=cls.synchronizes(module),
            batches=getattr(module, "num_batches_tracked", None),
        )

    @classmethod
    def frozen(cls, module: nn.Module) -> bool:
        return not isinstance(module, _BatchNorm)

    @classmethod
    def synchronizes(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.SyncBatchNorm)

    @classmethod
    def only_normalizes(cls, module: nn.Module) -> bool:
        torchs = class_of(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        return torchs and "forward" not in module.__dict__

    @classmethod
    def bare(cls, module: nn.Module) -> nn.Module | None:
        kind = class_of(module)
        base = next((one for one in kind.__mro__ if one.__module__.startswith("torch.nn.")), None)
        if base not in _TORCHS or kind is base or parametrize.is_parametrized(module):
            return None
        theirs = {name for one in kind.__mro__ if not issubclass(base, one) for name in vars(one)}
        known = {name for one in base.__mro__ for name in vars(one) if not name.startswith("__")}
        if (theirs & (known | _HOOKS_OF_CLASSES)) - _OWN or known & {*vars(module)}:
            return None
        if not ({*module._parameters} <= {*_TENSORS} and {*module._buffers} <= {*_TENSORS, "num_batches_tracked"}):
            return None
        norm = base(1)  # for the names of its settings, and what torch may add to them
        settings = [name for name in vars(norm) if not name.startswith("_")]
        # The tables themselves: what is written to the one is written to the other.
        norm.__dict__.update({name: vars(module)[name] for name in ("_parameters", "_buffers", *settings)})
        return norm

    @classmethod
    def axes(cls, module: nn.Module) -> tuple[int, ...]:
        known = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
        return next((axes for kind, axes in known.items() if isinstance(module, kind)), ())

    @classmethod
    def deployed(cls, module: nn.Module) -> Affine | Stays | nn.Module:
        return module if cls.read(module).mean is None else cls.affine(module)

    @classmethod
    def affine(cls, module: nn.Module) -> Affine:
        """Return the affine that a norm with stored statistics is in evaluation."""
        state = cls.read(module)
        assert state.mean is not None
        scale = state.gamma.double() * state.inverse_std
        return Affine(scale, state.beta.double() - scale * state.mean.double(), otherwise=module)

    def build(self, site: Site, like: Tensor) -> None:
        return None

    def encode(self, incoming: Incoming) -> Encoding:
        """Let the mean follow the layer's new weight and, where that keeps no scale, the variance and γ, too.

        ``var' = var·excess²``, ``γ' = γ sqrt(var·excess² + eps)/(excess·sqrt(var + eps))``.
        """
        state, excess = incoming.state, incoming.excess
        assert state.var is not None
        var = state.var.double()
        gain = (var * excess.square() + state.eps).sqrt() / (excess * (var + state.eps).sqrt())
        values = {}
        if state.stored:
            values = {"running_mean": NewValue(incoming.mean), "running_var": NewValue(var * excess.square())}
        if state.affine[0]:
            values["weight"] = NewValue(incoming.gamma * gain, (LinearOf("norm.weight", gain),))
        return Encoding(values)

    def __str__(self) -> str:
        return "itself"
