"""Residual branches: what is computed from a value and added to it again, or to a projection of it.

Note [Which addend is the branch]
Of an addition ``p + q`` the fork is the last value that both are computed from. From there to each addend some way
leads through the fewest layers: none for an identity, one for a projection shortcut. The addend with more of them is
the branch. With as many on both sides it is a sum of equals, and neither is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from normswap.graph.ops import passes_through
from normswap.graph.records import Capture, Trace
from normswap.nn.kinds import is_layer
from normswap.norms import Takes, norm_of
from normswap.operations.table import named, of_call, of_module

__all__ = ["Branch", "output_layers", "residual_branches"]

_ADD = named("add")
_BATCH_NORM = named("batch_norm")
_SCALINGS = (named("multiply"), named("multiply in place"), named("divide"))


@dataclass(frozen=True)
class Branch:
    """A residual branch.

    Args:
        layers: The convolutions and linear layers in it, by fqn, in the order of their calls.
        ends: Those of them whose outputs go into the sum and nowhere else, through nothing but functions of single
            values and norms that divide by nothing.
    """

    layers: tuple[str, ...]
    ends: tuple[str, ...]


def residual_branches(capture: Capture, *, through_norms: bool = False) -> tuple[Branch, ...]:
    """Return the residual branches of a model whose ends are known, in the order of their additions.

    Args:
        capture: The model's dataflow.
        through_norms: Whether norms that can be replaced may stand behind the ends, although they divide.
    """
    found: dict[tuple[str, ...], Branch] = {}
    for trace in capture.traces:
        for branch in _Reader(capture, trace, through_norms).branches():
            found.setdefault(branch.ends, branch)
    return tuple(found.values())


def output_layers(capture: Capture, *, through_norms: bool = False) -> tuple[str, ...]:
    """Return the layers whose outputs the model returns, one by one or through functions of single values.

    The arguments are those of :func:`residual_branches`.
    """
    found: dict[str, None] = {}
    for trace in capture.traces:
        if not trace.scope:
            found |= dict.fromkeys(_Reader(capture, trace, through_norms).returned())
    return tuple(found)


class _Reader:
    """Reads one graph. ``above`` holds each node and all that it is computed from, a bit for each by its place."""

    def __init__(self, capture: Capture, trace: Trace, through_norms: bool = False) -> None:
        self.capture, self.trace, self.through_norms = capture, trace, through_norms
        self.nodes = list(trace.graph.nodes)
        self.place = {node: place for place, node in enumerate(self.nodes)}
        self.above: dict[fx.Node, int] = {}
        for node, place in self.place.items():
            self.above[node] = 1 << place
            for source in node.all_input_nodes:
                self.above[node] |= self.above[source]

    def branches(self) -> Iterator[Branch]:
        """Yield the branch of each addition that has one."""
        for node in self.nodes:
            operation = of_call(node)
            addends = node.all_input_nodes
            if operation is not _ADD or len(addends) != 2 or not self.above[addends[0]] & self.above[addends[1]]:
                continue
            fewest = self._fewest_layers(*addends)
            shortcut, end = sorted(addends, key=fewest.__getitem__)
            ends = list(self._ends(end, node, fewest)) if fewest[shortcut] < fewest[end] else [None]
            if None not in ends:
                own = self.above[end] & ~self.above[shortcut]
                inside = (one for one in fewest if own >> self.place[one] & 1)
                layers = [name for one in inside if (name := self._layer(one)) is not None]
                yield Branch(tuple(dict.fromkeys(layers)), tuple(dict.fromkeys(name for name in ends if name)))

    def returned(self) -> Iterator[str]:
        """Yield the layers at the ends of all that the graph returns."""
        output = self.nodes[-1]
        for value in output.all_input_nodes:
            yield from (name for name in self._ends(value, output, self.place) if name)

    def _fewest_layers(self, p: fx.Node, q: fx.Node) -> Mapping[fx.Node, int]:
        """Return the fewest layers on a way from the fork of p and q to each value, where there is a way."""
        fork = (self.above[p] & self.above[q]).bit_length() - 1
        fewest = {self.nodes[fork]: 0}
        for node in self.nodes[fork + 1 : max(self.place[p], self.place[q]) + 1]:
            ways = [fewest[source] for source in node.all_input_nodes if source in fewest]
            if ways:
                fewest[node] = min(ways) + (self._layer(node) is not None)
        return fewest

    def _layer(self, node: fx.Node) -> str | None:
        module = self.capture.module_of(self.trace, node)
        return (
            None if module is None or not is_layer(module) else self.capture.aliases[self.trace.fqn(str(node.target))]
        )

    def _ends(self, node: fx.Node, reader: fx.Node, inside: Mapping[fx.Node, int]) -> Iterator[str | None]:
        """Yield the layers whose outputs make up what ``reader`` reads of a branch, None for what is none of them."""
        if set(node.users) != {reader} or node not in inside:
            yield None
        elif name := self._layer(node):
            yield name
        elif (sources := self._scaled(node)) is None:
            yield None
        else:
            for source in sources:
                if source.op != "get_attr":
                    yield from self._ends(source, node, inside)

    def _scaled(self, node: fx.Node) -> list[fx.Node] | None:
        """Return the values that ``node`` adds up or is an elementwise function of, else None."""
        module, operation, sources = self.capture.module_of(self.trace, node), of_call(node), node.all_input_nodes
        if module is not None:
            norm, operation = norm_of(module), of_module(module)
            keeps = norm is not None and (norm.takes is Takes.AFFINE or (self.through_norms and norm.converts))
            return sources if keeps or passes_through(node, module) or (operation and operation.elementwise) else None
        if operation is _ADD or passes_through(node, None):
            return sources
        values = [source for source in sources if source.op != "get_attr"]
        scales = len(values) == 1 and (operation in _SCALINGS or (self.through_norms and operation is _BATCH_NORM))
        return values if scales or (operation is not None and operation.elementwise) else None
