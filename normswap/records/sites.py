"""A site: a norm with the layer that it normalizes, how both were found, and what is at no site."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SKIPPED", "FoundBy", "NormKind", "Proof", "Site", "Skip"]


class NormKind:
    """How a site's norm is written in the model."""

    MODULE = "module"
    """A submodule that is a BatchNorm, a subclass of one or a frozen one."""
    FUNCTIONAL = "functional"
    """A call of ``batch_norm`` in the forward of the user's own module."""


class Proof:
    """How sure it is that a site's layer feeds its norm and nothing else."""

    PROVEN = "proven"
    """The graph shows it."""
    CHECKED = "checked"
    """The graph has a gap there, or is the record of a run; a numeric check on example inputs closed it."""
    NONE = "none"
    """Nothing is absorbed at this site; ``Site.reason`` says why."""


class FoundBy:
    """What shows that a site's norm is where it is."""

    SYMBOLIC = "symbolic"
    """A graph that was traced, in train and in eval mode."""
    RECORDED = "recorded"
    """Runs on example inputs: what is absorbed on their strength has passed a numeric check."""


@dataclass(frozen=True)
class Site:
    """A norm and, where that is proven, the one layer whose output it normalizes.

    Args:
        norm: The norm's fqn; for a functional norm ``owner:running_mean``, the owning module's fqn and the name of
            the buffer (or, without one, of the call).
        kind: A :class:`NormKind`.
        norm_type: The norm's class, or ``batch_norm``.
        num_features: The norm's channels, C.
        eps: The norm's eps.
        momentum: The norm's momentum.
        layer: The fqn of the layer that takes the norm's statistics up; None where none may.
        layer_type: The layer's class.
        fan_in: Values in each of the layer's filters, 0 without a layer.
        depthwise: Whether each of the layer's filters sees one input channel of several.
        rank: The number of axes of the norm's input where it is known.
        spatial: The number of positions per sample and channel (1 for a vector) where it is known.
        frozen: Whether the norm uses its stored statistics in training, too.
        synchronized: Whether the norm's statistics are those of all processes.
        has_statistics: Whether the norm stores a mean and a variance.
        proof: A :class:`Proof`.
        reason: Why there is no layer, or None.
        aliases: Further fqns of the same norm.
        found_by: A :class:`FoundBy`.
        caveat: What the numeric check of a layer could not reach, or None.
        axis: The axis of the layer's output that its channels are on: 1, or −1 for a linear layer whose output has its
            last axis moved to the norm's axis 1.
        readers: The layers that read the norm's output, which goes nowhere else, and into which what the norm is in
            evaluation may go.
        unread: Why the layer that reads the norm's output may not take it up, or None.
        rank_by_example: Whether example inputs alone show the rank, and the norm takes inputs of others.
        held: Whether the norm is frozen by the model's own ``train()``, which leaves it in eval mode.
        reads_input: Whether what the layer reads is an input of the model.
        ends_branch: Whether the norm's output is added to a shortcut.
        inside: The BatchNorm subclass in whose forward the norm was found, where it was: its name in the user's model.
        looked_up_by: The methods of the modules around it, beside the forward, that look for BatchNorms.
    """

    norm: str
    kind: str
    norm_type: str
    num_features: int
    eps: float = 1e-5
    momentum: float | None = 0.1
    layer: str | None = None
    layer_type: str | None = None
    fan_in: int = 0
    depthwise: bool = False
    rank: int | None = None
    spatial: int | None = None
    frozen: bool = False
    synchronized: bool = False
    has_statistics: bool = True
    proof: str = Proof.NONE
    reason: str | None = None
    aliases: tuple[str, ...] = ()
    found_by: str = FoundBy.SYMBOLIC
    caveat: str | None = None
    axis: int = 1
    readers: tuple[str, ...] = ()
    unread: str | None = None
    rank_by_example: bool = False
    held: bool = False
    looked_up_by: tuple[str, ...] = ()
    reads_input: bool = False
    ends_branch: bool = False
    inside: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All names by which patterns choose it."""
        return (self.norm, *self.aliases, *(() if self.inside is None else (self.inside,)))

    @property
    def writers(self) -> tuple[str, ...]:
        """The layers that give the norm its channels."""
        return () if self.layer is None else (self.layer,)

    @property
    def evidence(self) -> str:
        """The grade of proof, and that a record is behind it where one is: ``checked, recorded``."""
        return f"{self.proof}, {self.found_by}" if self.found_by == FoundBy.RECORDED else self.proof

    @property
    def remarks(self) -> tuple[str, ...]:
        """Why there is no layer, what the check of the layer could not reach, and what keeps the norm in eval mode."""
        held = "frozen: train() leaves it in eval mode" if self.held else None
        return tuple(text for text in (self.reason, self.caveat, held) if text)


SKIPPED = ("norm", "layer", "recurrent layer", "scope")
"""What may be at no site, in the order in which it is shown."""


@dataclass(frozen=True)
class Skip:
    """A norm, layer, recurrent layer or scope that no site holds, and why.

    Args:
        name: Its fqn.
        what: One of :data:`SKIPPED`.
        type: Its class.
        code: A stable slug of the reason.
        reason: The reason, in words that a person can act on.
    """

    name: str
    what: str
    type: str
    code: str
    reason: str
