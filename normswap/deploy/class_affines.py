"""Which of the calls where data meets the class are one affine of each channel, by runs of the graph.

Note [What runs have to show]
In each run the class's value must be the same at all samples and positions. On other data and with other random numbers
it must be the same as in the first run, which shows whether something has written to it, unseen by the graph. It must
be the same on other sizes, too: e/‖e‖ over the batch is one factor of each channel in any run, and another in each
batch size. The same is up to rounding, which differs between the rows of one product of matrices.

A gate of one value for each sample is a factor of whatever is on axis 1; where those are the steps of a sequence,
another length shows it. Of maps and lengths those that the model runs on count. A model that runs on no other batch
size is left as it is: how the class's values depend on that size is then not known.

Note [One sample]
With an example of one sample, an argument of one row for all samples is no different from one that has the batch, and
with twice the rows in it alone the model may run as well, as one is broadcast. So of the arguments that the model runs
with, those with which most of the class's values stay the same have the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from normswap.deploy.class_values import Meeting
from normswap.deploy.other_inputs import larger_batches, one_sample, other_data, other_maps
from normswap.nn import ChannelAffine
from normswap.runs.guard import untouched
from normswap.runs.settings import seed_generators

__all__ = ["ClassAffines", "class_affines"]

_Affines = dict[fx.Node, ChannelAffine | None]

_NO_AFFINE = "is not one factor and one summand of each channel"
_BY_DATA = "differs with the data, or from call to call"
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
    runs = _Runs(traced, {node: met for node, met in meets.items() if met is not None})
    left = {node: _NO_AFFINE for node in meets if runs.first(given).get(node) is None}

    def note(nodes: Iterable[fx.Node] | None, why: str) -> bool:
        """Tell whether the graph has run, after noting the nodes that were other affines than in the first run."""
        for node in nodes or ():
            left.setdefault(node, why)
        return nodes is not None

    for seed, inputs in enumerate((given, *other_data(given, name)), 1):
        note(runs.other_at(inputs, seed), _BY_DATA)
    batch, by_size = _batch(runs, given, name)
    note(by_size, _BY_SIZE)
    if not batch:
        note(meets, _UNKNOWN)
    small = given
    if batch and note(runs.other_at(one := one_sample(given, name, batch)), _BY_SIZE):
        small = one
    if len(left) < len(meets):
        # A longer sequence may be none that a table of positions has, at which an accelerator stops for good.
        tensors = chain(given.values(), traced.parameters(), traced.buffers())
        on_cpu = all(one.device.type == "cpu" for one in tensors if isinstance(one, Tensor))
        for inputs in other_maps(small, name, larger=on_cpu):
            note(runs.other_at(inputs), _BY_SIZE)
    found = {node: affine for node, affine in runs.usual.items() if affine is not None and node not in left}
    return ClassAffines(runs.calls, found, left, batch)


def _batch(runs: _Runs, given: Mapping[str, Any], name: str) -> tuple[tuple[str, ...], set[fx.Node]]:
    """Return the arguments that have the batch, as far as runs show them, and the calls that depend on its size.

    See Note [Which arguments have the batch] and Note [One sample].
    """
    found: list[tuple[tuple[str, ...], set[fx.Node]]] = []
    label = given[name]
    for number, (chosen, inputs) in enumerate(larger_batches(given, name)):
        others = runs.other_at(inputs)
        if others is None:
            continue
        found.append((chosen, others))
        if label.ndim and number and (others <= found[0][1] or len(label) > 1):
            break
    if not found:
        return (), set()
    batch, others = min(found, key=lambda one: (len(one[1]), len(one[0])))
    of_one = label.ndim and len(label) == 1
    return batch, others | found[0][1] if of_one else others.union(*(others for _, others in found))


class _Runs:
    """Runs of a graph, compared with its first.

    Args:
        traced: The graph.
        calls: The calls whose affines are compared.
    """

    def __init__(self, traced: fx.GraphModule, calls: Mapping[fx.Node, Meeting]) -> None:
        self.traced, self.calls = traced, calls
        self.usual: _Affines = {}

    def first(self, given: Mapping[str, Any]) -> _Affines:
        """Run on the arguments ``given``, by name; return the affine that each call is."""
        self.usual = self._affines_on(given, 0)
        return self.usual

    def other_at(self, given: Mapping[str, Any], seed: int = 0) -> set[fx.Node] | None:
        """Return the calls that are another affine on other inputs than in the first run; None where that fails."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                again = self._affines_on(given, seed)
        except Exception:  # the model does not take this size
            return None
        return {node for node in self.calls if not _agree(self.usual[node], again[node])}

    def _affines_on(self, given: Mapping[str, Any], seed: int) -> _Affines:
        run = _Kept(self.traced, self.calls)
        args = [given[str(node.target)] for node in self.traced.graph.nodes if node.op == "placeholder"]
        with untouched(self.traced), torch.no_grad():
            seed_generators(seed)
            torch.backends.cudnn.allow_tf32 = False  # whose rounding differs with the batch's size, and is coarse
            run.run(*(value.clone() if isinstance(value, Tensor) else value for value in args))
        return run.affines


class _Kept(fx.Interpreter):
    """Runs a graph and keeps the affine that each of ``calls`` is."""

    def __init__(self, module: fx.GraphModule, calls: Mapping[fx.Node, Meeting]) -> None:
        super().__init__(module)
        self.calls = calls
        self.affines: _Affines = {}

    def run_node(self, n: fx.Node) -> Any:
        met = self.calls.get(n)
        if met is None:
            return super().run_node(n)
        # What they are now: they may have been written to since they were made, and may be again.
        value, x = self.env[met.of_class], self.env[met.data]
        y = super().run_node(n)
        self.affines[n] = _affine_at(met, value, x, y)
        return y


def _affine_at(met: Meeting, value: Any, x: Any, y: Any) -> ChannelAffine | None:
    """Return the affine of each channel that a call applies to its data x, giving y; None where it is none."""
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
