"""Fixup: start residual networks without norms such that a step of SGD changes their function by a step's size.

With L residual branches of m layers each (Zhang et al. 2019, section 3):

1. the last layer of each branch and the network's last layer begin at 0;
2. all others are drawn as He et al. (2015) do, ``N(0, 2/fan-in)``, and those within a branch are multiplied by
   ``L^(−1/(2m − 2))``;
3. each branch has a scalar multiplier, which begins at 1, and there are biases at 0.

Note [Fixup's biases]
The paper has a scalar bias in front of each layer and activation. A layer that took a BatchNorm up has a bias per
channel behind it, which is all that a scalar one in front of the activation can be; and what a scalar in front of a
layer adds is constant per channel, but at a border that is padded by zeros. The multipliers are the recipe's: ``none``
with ``multiplier=True``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from normswap.errors import InitializationError, InputError, argument
from normswap.graph import capture_recorded, capture_symbolic
from normswap.graph.residual import output_layers, residual_branches
from normswap.initialization.base import Initializer, Outcome, Work
from normswap.initialization.gains import gains_of
from normswap.nn import FilterLayout
from normswap.nn.kinds import is_layer
from normswap.norms import Assignment
from normswap.records import InitRow
from normswap.stages.bound import BoundStep
from normswap.stages.rewriting import Placed

__all__ = ["Fixup"]


class Fixup(Initializer):
    """Draw all layers of a residual network without norms anew; what the network has learnt is lost.

    The draw follows torch's seed (``torch.manual_seed``) and leaves the generator as it is.

    Source: H. Zhang, Y. Dauphin, T. Ma, *Fixup Initialization: Residual Learning Without Normalization*, 2019.
    """

    name = "fixup"
    keeps_function = False

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        for step in work.bound.steps:
            if not step.norm.leaves_nothing or step.weight.name not in (None, "scaled"):
                raise InputError(
                    f"{argument('init', 'fixup')} is for networks without norms; {step.recipe.name} leaves one, or "
                    f"another form of the weight, at '{step.site.norm}'",
                    code="fixup-recipe",
                    hint="choose the recipe none",
                )

        self.last, self.factors = _rules(work)

    def values(self, step: BoundStep) -> Assignment:
        """Return no values: all layers are drawn at once."""
        return {}

    def refine(self, target: nn.Module, placed: Sequence[Placed]) -> Outcome:
        """Give all layers of ``target`` their values."""
        return Outcome(tuple(_drawn(target, self.last, self.factors)))


def _rules(work: Work) -> tuple[Mapping[str, str], Mapping[str, float]]:
    """Return which layers begin at zero, with the reason, and the factors of those within branches.

    Raises:
        InitializationError: The model has no residual branches.
    """
    seen = [capture_symbolic(work.source, (False,))]
    if seen[0].opaque and work.example is not None:
        seen.append(capture_recorded(work.source, work.example, (False,)))
    found = (branch for one in seen for branch in residual_branches(one, through_norms=True))
    branches = {branch.ends: branch for branch in found}.values()
    if not branches:
        raise InitializationError(
            "no residual branch was found, and the initialization is for residual networks",
            code="no-branches",
            hint=f"give {argument('example_inputs')} where a forward cannot be traced; else initialize it otherwise",
        )
    last = {end: "0: ends a residual branch" for branch in branches for end in branch.ends}
    heads = (name for one in seen for name in output_layers(one, through_norms=True))
    last |= {name: "0: ends the network" for name in heads if name not in last}
    factors: dict[str, float] = {}
    for branch in branches:
        if branch.depth > 1:
            factor = len(branches) ** (-1 / (2 * branch.depth - 2))
            factors |= {name: min(factor, factors.get(name, 1.0)) for name in branch.layers if name not in last}
    return last, factors


def _drawn(model: nn.Module, last: Mapping[str, str], factors: Mapping[str, float]) -> Iterator[InitRow]:
    """Give the layers of ``model`` their values, and yield a row for each."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    with torch.no_grad():
        for name, layer in model.named_modules():
            if not is_layer(layer):
                continue
            weight = FilterLayout.weight(layer)
            drawn = torch.randn(weight.shape, generator=generator)  # of each, so that the others' do not depend on it
            std = 0.0 if name in last else (2 / FilterLayout.of(layer).fan_in(weight)) ** 0.5 * factors.get(name, 1.0)
            gains_of(layer).direction.copy_(std * drawn)  # the weight behind its multiplier, where it has one
            if isinstance(layer.bias, Tensor):
                layer.bias.zero_()
            scaled = (f"× {factors[name]:.3g}: in a residual branch",) if name in factors else ()
            yield InitRow(name, "fixup", (last[name],) if name in last else scaled)
