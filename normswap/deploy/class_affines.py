"""Which of the calls where data meets the class are one affine of each channel, by runs of the graph.

Note [What runs have to show]
In each run the class's value must be the same at all samples and positions, in a run with other random numbers the same
as in the first, and the same on other sizes: e/‖e‖ over the batch is one factor of each channel in any run, and another
in each batch size. The same is up to rounding, which differs between the rows of one product of matrices.

A gate of one value for each sample is a factor of whatever is on axis 1; where those are the steps of a sequence,
another length shows it. Of maps and lengths those that the model runs on count. A model that runs on no other batch
size is left as it is: how the class's values depend on that size is then not known.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from normswap.deploy.class_values import Meeting
from normswap.deploy.other_sizes import larger_batches, one_sample, other_maps
from normswap.nn import ChannelAffine
from normswap.runs.guard import untouched
from normswap.runs.settings import seed_generators

__all__ = ["ClassAffines", "class_affines"]

_Affines = dict[fx.Node, ChannelAffine | None]

_NO_AFFINE = "is not one factor and one summand of each channel"
_RANDOM = "differs from call to call"
_BY_SIZE = "depends on the size of the batch, or on that of a map or a sequence"
_UNKNOWN = "may depend on the batch's size, as the model runs on no other"


_ROUNDINGS = 100
"""How many roundings one value that is computed in two ways may be off."""


@dataclass(frozen=True)
class ClassAffines:
    """What runs have shown (Note [What runs have to show]).

    Args:
        calls: The calls of two values in which data meets the class.
        found: The affine in the place of each call that is one.
        left: Why each of the others is none: what the class gives to it ….
        batch: The arguments that have as many samples as the batch, where that is known.
    """

    calls: Mapping[fx.Node, Meeting]
    found: Mapping[fx.Node, ChannelAffine]
    left: Mapping[fx.Node, str]
    batch: tuple[str, ...]


def class_affines(
    traced: fx.GraphModule, given: Mapping[str, Any], name: str, meets: Mapping[fx.Node, Meeting | None]
) -> ClassAffines:
    """Return which of the calls ``meets`` are affines.

    Args:
        traced: The model's graph.
        given: The graph's inputs by name, with all samples of one class.
        name: The argument that gives the class.
        meets: Where data meets the class.
    """
    calls = {node: met for node, met in meets.items() if met is not None}
    first = _affines_on(traced, given, calls, 0)
    left = {node: _NO_AFFINE for node in meets if first.get(node) is None}

    def compare(inputs: Mapping[str, Any], seed: int, why: str) -> bool:
        """Tell whether the graph runs on ``inputs``, after noting where it gives another affine."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                again = _affines_on(traced, inputs, calls, seed)
        except Exception:  # the model does not take this size
            return False
        for node in calls:
            if node not in left and not _agree(first[node], again[node]):
                left[node] = why
        return True

    compare(given, 1, _RANDOM)
    batch: tuple[str, ...] = ()
    small = given
    for chosen, inputs in larger_batches(given, name):
        if compare(inputs, 0, _BY_SIZE):
            batch = chosen
            break
    else:
        left = {node: left.get(node, _UNKNOWN) for node in meets}
    if batch and compare(one := one_sample(given, name, batch), 0, _BY_SIZE):
        small = one
    if len(left) < len(meets):
        # A longer sequence may be none that a table of positions has, at which an accelerator stops for good.
        tensors = chain(given.values(), traced.parameters(), traced.buffers())
        on_cpu = all(one.device.type == "cpu" for one in tensors if isinstance(one, Tensor))
        for inputs in other_maps(small, name, larger=on_cpu):
            compare(inputs, 0, _BY_SIZE)
    found = {node: affine for node, affine in first.items() if affine is not None and node not in left}
    return ClassAffines(calls, found, left, batch)


class _Kept(fx.Interpreter):
    """Runs a graph and keeps what some nodes give."""

    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value.clone() if isinstance(value, Tensor) else value  # it may be written to later
        return value


def _affines_on(
    traced: fx.GraphModule, given: Mapping[str, Any], calls: Mapping[fx.Node, Meeting], seed: int
) -> _Affines:
    """Return the affine that each of ``calls`` is in a run on arguments, which are given by their names."""
    run = _Kept(traced, {one for node, met in calls.items() for one in (node, met.of_class, met.data)})
    args = [given[str(node.target)] for node in traced.graph.nodes if node.op == "placeholder"]
    with untouched(traced), torch.no_grad():
        seed_generators(seed)
        torch.backends.cudnn.allow_tf32 = False  # whose rounding differs with the batch's size, and is coarse
        run.run(*(value.clone() if isinstance(value, Tensor) else value for value in args))
    return {node: _affine_at(node, met, run.values) for node, met in calls.items()}


def _affine_at(node: fx.Node, met: Meeting, values: Mapping[fx.Node, Any]) -> ChannelAffine | None:
    """Return the affine of each channel that ``node`` applies to its data; None where it is none."""
    value, x, y = values[met.of_class], values[met.data], values[node]
    if not all(isinstance(one, Tensor) for one in (value, x, y)) or x.ndim < 2 or y.shape != x.shape or not x.numel():
        return None
    each = value.expand(x.shape).movedim(1, 0).flatten(1)
    if not value.dtype.is_floating_point or not _same(each, each[:, :1].expand_as(each)):
        return None
    constant = each[:, 0].double()
    ones, zeros = torch.ones_like(constant), torch.zeros_like(constant)
    first = met.place == 0
    if met.part == "div" and not first:
        return None
    factor, shift = {
        "mul": (constant, zeros),
        "add": (ones, constant),
        "sub": (ones, -constant) if first else (-ones, constant),
        "div": (1 / constant, zeros),
    }[met.part]
    affine = ChannelAffine(x.shape[1], x.ndim, device=x.device, dtype=y.dtype)
    with torch.no_grad():
        affine.weight.copy_(factor)
        affine.bias.copy_(shift)
    return affine


def _agree(one: ChannelAffine | None, other: ChannelAffine | None) -> bool:
    """Tell whether two affines are the same up to rounding."""
    if one is None or other is None or (one.num_features, one.rank) != (other.num_features, other.rank):
        return False
    return all(map(_same, one.parameters(), other.parameters()))


def _same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are the same up to rounding, relative to the largest value of one."""
    eps = torch.finfo(a.dtype).eps
    size = float(a.detach().abs().nan_to_num(0, 0).amax())
    return torch.allclose(a, b, rtol=0, atol=min(_ROUNDINGS * eps, eps**0.5) * size)
