"""What a norm answers for itself: as what stands in a model, and as what takes its place.

With BatchNorm in evaluation, per channel,

    y = γ (x − μ)/σ + β,  σ = sqrt(var + eps),  x = W·u + b,

the layer (or, where none may be fused, a per-channel affine in front of the norm) hands ``s·W·u`` on, with s one of
1, 1/σ and γ/σ (:class:`Takes`), and the new norm takes up the rest, of which it may leave a bias to the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.nn.kinds import class_of
from normswap.norms.records import Affine, Bias, Encoding, Incoming, NormState, Stays, Takes
from normswap.records import Site

__all__ = ["Norm", "registered"]


_REGISTERED: list[type[Norm]] = []


def registered() -> Sequence[type[Norm]]:
    """Return every norm that is defined, those of this package first."""
    return _REGISTERED


class Norm:
    """A kind of normalization, in one class: what it is in a model, and what it is as another norm's successor.

    To add one, subclass this as a frozen dataclass whose fields are what :meth:`build` needs, name the modules that are
    such norms in ``modules``, and implement :meth:`build`, :meth:`encode` and :meth:`__str__`. Defining the class makes
    it known: nothing else is to be edited. What only stands in models, and never takes another norm's place, leaves
    these three out.
    """

    # As what stands in a model ------------------------------------------------------------------------------------

    modules: ClassVar[tuple[type[nn.Module], ...]] = ()
    """The classes of the modules that are such norms; subclasses count, the closest class in the MRO decides."""
    converts: ClassVar[bool] = False
    """Whether such a norm can be replaced, as it has statistics to take over."""
    follows_batches: ClassVar[bool] = False
    """Whether such a norm has running statistics that follow the batches of training."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "modules" in vars(cls):
            _REGISTERED.append(cls)

    @classmethod
    def recognizes(cls, module: nn.Module) -> bool:
        """Tell whether ``module`` is such a norm although it is of none of the classes in ``modules``."""
        return False

    @classmethod
    def why_kept(cls, module: nn.Module) -> str:
        """Return why such a norm, which does not convert, is left as it is."""
        return f"its class is {class_of(module).__name__}, not BatchNorm"

    @classmethod
    def read(cls, module: nn.Module) -> NormState:
        """Return what such a norm, which converts, computes. Tensors are not copied."""
        raise NotImplementedError

    @classmethod
    def frozen(cls, module: nn.Module) -> bool:
        """Tell whether such a norm uses its stored statistics in training, too."""
        return False

    @classmethod
    def synchronizes(cls, module: nn.Module) -> bool:
        """Tell whether such a norm's statistics of a batch are those of all processes' batches."""
        return False

    @classmethod
    def only_normalizes(cls, module: nn.Module) -> bool:
        """Tell whether the module's forward is known to normalize and to do nothing else."""
        return True

    @classmethod
    def bare(cls, module: nn.Module) -> nn.Module | None:
        """Return the norm whose forward that of ``module``, a subclass, calls as its own: a module of torch's class.

        It holds the very tensors. None where ``module`` is no subclass or differs in more than its forward.
        """
        return None

    @classmethod
    def axes(cls, module: nn.Module) -> tuple[int, ...]:
        """Return how many axes the input of such a norm may have; nothing where that is not known."""
        return ()

    @classmethod
    def deployed(cls, module: nn.Module) -> Affine | Stays | nn.Module:
        """Return what becomes of such a norm in a model that is deployed; folding and export both ask.

        An :class:`Affine` goes into a neighbour; a module of torch.nn stands in its place (the module itself where it
        is one); and :class:`Stays` says why the model goes on needing the file that defines it.
        """
        kind = class_of(module)
        if kind.__module__.startswith("torch."):
            return module
        return Stays(f"torch.nn has no {kind.__name__}: {kind.__module__} must be there")

    # As what takes another norm's place -----------------------------------------------------------------------------

    takes: ClassVar[Takes] = Takes.NORMALIZATION
    bias: ClassVar[Bias] = Bias.SET
    removes_mean: ClassVar[bool] = True
    """Whether it subtracts a mean of its own: then the signs and offsets of a group's channels may be chosen."""
    leaves_nothing: ClassVar[bool] = False
    """Whether no module stands in the old norm's place, so that what that was may go into the layer that reads it."""
    per_position: ClassVar[bool] = False
    """Whether one mean is over the channels of one position, and not over all positions of a sample."""

    @property
    def groups(self) -> int | None:
        """Over how many groups of channels it normalizes, None where it has no groups."""
        return None

    @property
    def is_fitted(self) -> bool:
        """Whether a match fits the layer in front of it and its affine: there is one, and something is divided by."""
        return self.takes is not Takes.AFFINE and self.bias is not Bias.KEPT

    @property
    def is_batch_norm(self) -> bool:
        """Whether code that looks for BatchNorms by their class finds it."""
        return any(issubclass(kind, _BatchNorm) for kind in self.modules)

    def build(self, site: Site, like: Tensor) -> nn.Module | None:
        """Return the module, on the device and with the dtype of ``like``; None for no module."""
        raise NotImplementedError

    def in_front(self, site: Site, like: Tensor) -> nn.Module | None:
        """Return a module that stands between the layer and the norm; None for none, as a rule.

        It makes the norm need no affine where no layer takes the scale up. Its values are the encoding's ``front``.
        """
        return None

    def encode(self, incoming: Incoming) -> Encoding:
        """Return the values with which the module, at its expected statistics, does what the BatchNorm did. Pure."""
        raise NotImplementedError

    def group_counts(self, channels: int, least: int) -> Sequence[int]:
        """Return the group counts that it allows for so many channels, with at least ``least`` channels in a group."""
        if self.groups is None:
            return ()
        most = channels // max(2, least)
        return [count for count in range(1, most + 1) if channels % count == 0]

    def regroup(self, module: nn.Module, count: int) -> None:
        """Give the module, which :meth:`build` made, another number of groups."""
        module.__dict__["num_groups"] = count

    def follow(self, front: nn.Module, means: Tensor, squares: Tensor) -> None:
        """Give what stands in front the statistics of what reaches it: each sample's per channel, ``(n, C)`` each."""

    def divisor(self, means: Tensor, squares: Tensor) -> Tensor:
        """Return what it divides by, about, given each sample's mean and mean square per channel, ``(n, C)`` each.

        One number, or one per channel.
        """
        about = means.mean(0).square() if self.removes_mean else 0
        return (squares.mean(0) - about).clamp(min=0).mean().double().sqrt()

    def __str__(self) -> str:
        raise NotImplementedError
