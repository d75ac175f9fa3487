"""Operation: what is known of one, in one record, and how a call's arguments are bound to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from torch import nn

from normswap.operations import channel_rules
from normswap.operations.channel_rules import Numbering, Rule

__all__ = ["KEPT", "Operation"]

KEPT: Final[Literal["kept"]] = "kept"
"""The result has as many axes as the operation's first argument."""


@dataclass(frozen=True)
class Operation:
    """One operation, however it is written: as a function, as a tensor's method or as a module.

    Args:
        name: What a person calls it.
        functions: The functions that compute it.
        methods: The names of the methods and operators of tensors that compute it.
        modules: The classes of modules that compute it. Their settings are attributes named as in ``signature``.
        signature: The names of the arguments in order, the tensor first. A last name with a star takes all the rest.
        defaults: The arguments that have another default than None.
        elementwise: Whether each value of the result is a function of the value at the same place alone, and perhaps
            of settings of its channel. Dropout counts: in eval mode it is the identity.
        homogeneous: For an elementwise one, whether ``f(s z) = s f(z)`` for every ``s > 0``.
        axes: How many axes the result has: :data:`KEPT`, a number, or a function of the bound arguments; None where it
            is not known. Elementwise operations keep them.
        order: Where it moves the axes: a function of the bound arguments and the number of axes that gives, for each
            axis of the result, the one of the first argument that it was; None where it does more than move them.
        channels: What it does to channels that are scaled; None where that is not known. For an elementwise operation
            it follows from ``homogeneous``.
        rebuild: What makes a module of it, from the arguments named in ``settings``; None where a call of it is no
            activation or cannot be made a module.
        settings: The names of ``rebuild``'s arguments, as in ``signature``.
        floor: The number below which nothing is let through, or the name of the argument that gives it: all values
            below become that number. An operation with floor 0 rectifies.
        value_free: Whether the result tells nothing of the tensor's values, as its size does.
        attributes: The names of tensors' attributes that are such.
        lifted_from: The overloads of ATen for which an exported program calls it.
    """

    name: str
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    modules: tuple[type[nn.Module], ...] = ()
    signature: str = "input"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    elementwise: bool = False
    homogeneous: bool = False
    axes: Literal["kept"] | int | Callable[[Mapping[str, Any]], int | None] | None = None
    order: Callable[[Mapping[str, Any], int], tuple[int, ...] | None] | None = None
    channels: Rule | None = None
    rebuild: Callable[..., nn.Module | None] | None = None
    settings: tuple[str, ...] = ()
    floor: float | str | None = None
    value_free: bool = False
    attributes: tuple[str, ...] = ()
    lifted_from: tuple[Any, ...] = ()

    @property
    def keeps_axes(self) -> bool:
        """Whether the result has as many axes as the first argument."""
        return self.elementwise or self.axes == KEPT

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return a call's arguments by name, defaults filled in; None where they do not fit the signature."""
        names = self.signature.split()
        given: dict[str, Any] = dict.fromkeys(names) | dict(self.defaults)
        if names[-1].startswith("*"):
            last = names.pop()
            del given[last]
            given[last[1:]] = tuple(args[len(names) :])
            args = args[: len(names)]
        if len(args) > len(names) or set(kwargs) - set(names):
            return None
        return given | dict(zip(names, args, strict=False)) | dict(kwargs)

    def bind_module(self, module: nn.Module, x: Any) -> dict[str, Any]:
        """Return the arguments of a call of ``module``, one of ``modules``, with ``x``: its settings are attributes."""
        first, *names = self.signature.split()
        given = dict.fromkeys(names) | dict(self.defaults)
        return {first: x} | given | {name: getattr(module, name) for name in names if hasattr(module, name)}

    def on_channels(self, numbering: Numbering, arguments: Mapping[str, Any] | None) -> Any:
        """Return what is known of the channels of the result; None where nothing is.

        Args:
            numbering: What knows the channels.
            arguments: The bound arguments, with what is known of each; None where they did not fit.
        """
        rule = self.channels
        if rule is None and self.elementwise:
            rule = channel_rules.same if self.homogeneous else channel_rules.gate
        return None if rule is None or arguments is None else rule(numbering, *arguments.values())

    def rebuilt(self, arguments: Mapping[str, Any] | None) -> nn.Module | None:
        """Return a module that computes what a call with these arguments does; None where none is known to."""
        if self.rebuild is None or arguments is None:
            return None
        given = {name: arguments[name] for name in self.settings if arguments[name] is not None}
        return self.rebuild(**given)
