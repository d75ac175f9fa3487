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
            values, moves of axes, gates computed from the output itself, and norms that divide by nothing.
        depth: How many layers its shortest way leads through.
    """

    layers: tuple[str, ...]
    ends: tuple[str, ...]
    depth: int


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
            for source in self._sources(node):
                self.above[node] |= self.above[source]

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """Return what a node reads: what a forward's code made beside the graph, or in another one, is none of it."""
        return [source for source in node.all_input_nodes if source in self.place]

    def _reads(self, reader: fx.Node, node: fx.Node) -> bool:
        """Tell whether ``reader`` is computed from ``node``; one of another graph is a reader of its own."""
        return node in self.place and bool(self.above[reader] >> self.place[node] & 1)

    def branches(self) -> Iterator[Branch]:
        """Yield the branch of each addition that has one."""
        for node in self.nodes:
            operation = of_call(node)
            addends = self._sources(node)
            if operation is not _ADD or len(addends) != 2 or not self.above[addends[0]] & self.above[addends[1]]:
                continue
            fewest = self._fewest_layers(*addends)
            shortcut, end = sorted(addends, key=fewest.__getitem__)
            ends = list(self._ends(end, node, fewest)) if fewest[shortcut] < fewest[end] else [None]
            if None not in ends:
                own = self.above[end] & ~self.above[shortcut]
                inside = (one for one in fewest if own >> self.place[one] & 1)
                layers = [name for one in inside if (name := self._layer(one)) is not None]
                yield Branch(tuple(dict.fromkeys(layers)), tuple(dict.fromkeys(n for n in ends if n)), fewest[end])

    def returned(self) -> Iterator[str]:
        """Yield the layers at the ends of all that the graph returns."""
        output = self.nodes[-1]
        given = sum(1 << self.place[node] for node in self.nodes if node.op == "placeholder")
        inside = {node: 0 for node in self.nodes if self.above[node] & given}
        for value in self._sources(output):
            yield from (name for name in self._ends(value, output, inside) if name)

    def _fewest_layers(self, p: fx.Node, q: fx.Node) -> Mapping[fx.Node, int]:
        """Return the fewest layers on a way from the fork of p and q to each value, where there is a way."""
        fork = (self.above[p] & self.above[q]).bit_length() - 1
        fewest = {self.nodes[fork]: 0}
        for node in self.nodes[fork + 1 : max(self.place[p], self.place[q]) + 1]:
            ways = [fewest[source] for source in self._sources(node) if source in fewest]
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
        if node not in inside or not all(self._reads(reader, user) for user in node.users):
            yield None
        elif name := self._layer(node):
            yield name
        else:
            sources = [source for source in self._sources(node) if source in inside]
            passed = self._passed_on(node, sources)
            for source in passed:
                yield from self._ends(source, node, inside)
            if not passed:
                yield None

    def _passed_on(self, node: fx.Node, sources: list[fx.Node]) -> list[fx.Node]:
        """Return those of ``sources`` that ``node`` adds up or passes on value for value; none where it mixes them."""
        module, operation = self.capture.module_of(self.trace, node), of_call(node)
        if module is not None:
            norm, operation = norm_of(module), of_module(module)
            if norm is not None and (norm.takes is Takes.AFFINE or (self.through_norms and norm.converts)):
                return sources
        if operation is _ADD or passes_through(node, module):
            return sources
        if operation in _SCALINGS and len(sources) == 2:  # a gate: what it opens is what it was computed from
            a, b = sorted(sources, key=self.place.__getitem__)
            return [a] if self._reads(b, a) else []
        normalizes = self.through_norms and operation is _BATCH_NORM
        alike = operation is not None and (operation.elementwise or operation.order is not None)
        return sources if len(sources) == 1 and (alike or normalizes or operation in _SCALINGS) else []
