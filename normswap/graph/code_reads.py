"""Static analysis of bytecode: reads of a norm's attributes that no graph and no record of a run shows.

Note [Reads in the code]
A norm's tensors and numbers are gone once it is replaced, so a forward that reads ``self.bn.running_mean`` itself would
fail. A trace shows such a read where the tensor is computed with; it shows none of ``self.bn.num_features`` or
``self.bn.weight.dtype``, none behind a branch, and nothing at all of a forward that cannot be traced. The bytecode of
the forward, of the methods that it names and of the functions that it names holds them all. ``self.a.bn.running_mean``
names its norm, as does ``bn = self.a.bn``. In ``self.bns[0].running_mean`` the code does not tell which norm is read:
in a forward that cannot be traced this counts for each norm below that the code can name, unless the record of a run
shows which. What a flag of the module leaves out, as it is set, does not count.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from normswap.errors import Text, argument
from normswap.graph.bytecode import STATISTICS, codes_of, has_code, is_named
from normswap.graph.class_tests import class_tests_of
from normswap.graph.records import Capture
from normswap.nn.kinds import class_of
from normswap.norms import is_convertible

__all__ = ["reads_in_code"]

_TENSORS = STATISTICS | {"weight", "bias"}


def reads_in_code(capture: Capture) -> dict[str, str]:
    """Return the norms whose attributes some forward reads, or may read, by fqn, each with the reason."""
    below: dict[str, list[tuple[str, str]]] = {}  # by a module's fqn: the path to each norm inside, and its first fqn
    for name, first in capture.aliases.items():
        if is_convertible(capture.modules[first]):
            parent = name
            while parent:
                parent = parent.rpartition(".")[0]
                below.setdefault(capture.aliases[parent], []).append((name[len(parent) :].lstrip("."), first))
    recorded = any(trace.recorded for trace in capture.traces)
    owners = [fqn for fqn in below if has_code(capture.modules[fqn])]
    called = frozenset().union(*(one.code.names for fqn in owners for one in codes_of(capture.modules[fqn])))
    found: dict[str, str] = {}
    for fqn in owners:
        module, norms = capture.modules[fqn], below[fqn]
        opaque = fqn in capture.opaque or any(capture.aliases[name] == fqn for name in capture.opaque)
        for norm, why in _reads_of(module, norms, called, guess=opaque and not recorded):
            found.setdefault(norm, why)
        for norm, why in class_tests_of(module, norms, called):
            found.setdefault(norm, why)
    return found


def _reads_of(
    module: nn.Module, norms: list[tuple[str, str]], called: frozenset[str], *, guess: bool
) -> Iterator[tuple[str, str]]:
    whose = f"the forward of {class_of(module).__name__}"
    codes = list(codes_of(module, called))
    for one in codes:
        for read in one.code.reads:
            if read.path:
                dotted = ".".join(read.path)
                exact = read.of_first and one.is_method
                for path, norm in norms:
                    if path == dotted or (not exact and f".{path}".endswith(f".{dotted}")):
                        yield norm, f"{whose} reads its {read.name}, which a new norm does not have"
    if not guess:
        return
    names = frozenset().union(*(one.code.names for one in codes))
    unknown = {r.name for one in codes for r in one.code.reads if not r.path and not (r.of_first and one.is_method)}
    unknown |= {string for one in codes for string in one.code.strings & STATISTICS}
    if seen := sorted(unknown & _TENSORS, reverse=True):
        for path, norm in norms:
            if is_named(module, path, names):
                why = f"{whose} cannot be traced and reads the {seen[0]} of a module, which may be this one"
                yield norm, Text(f"{why}: give {argument('example_inputs')}, which show which one it is")
