"""Convert and fold random networks, and count what is refused, wrong, or crashes.

    python benchmarks/random_networks.py --count 2000
    python benchmarks/random_networks.py --count 2000 --results random.jsonl    # takes up what an earlier run left
    python benchmarks/random_networks.py --seed 7 --count 100 --shrink          # a failing network, made small
    python benchmarks/random_networks.py --count 2000 --sizes                   # forwards that ask for sizes

Each network is drawn by hypothesis (``tests/random_networks.py``), fifty from each seed, and must keep every
promise of ``tests/conversion_checks.py``: one exact recipe keeps the output, in evaluation and in training with
the statistics held; one inexact recipe is the original at the expected statistics; the folded models compute the same;
the plan holds every norm and layer once; the model is left untouched. What is drawn again is checked once. Of every
fourth network ``torch.export``'s graph, which takes as long to make as everything else, must contradict no site.
With ``--sizes`` the networks are those of ``tests/size_networks.py``: their forwards ask for sizes and classes and
write in place, and what is converted must be right at other sizes, too; refusals are then no failure.
With ``--shrink`` each kind of failure is reduced to a small network and printed as code. The exit code is 1 if a
promise was broken, or if 2 % of the norms are refused.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from normswap.records import text_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
conversion_checks = import_module("conversion_checks")
KINDS = {
    "networks": import_module("random_networks").networks,
    "sizes": import_module("size_networks").size_networks,
}

CHUNK, ORACLE_EVERY = 50, 4
MOST_REFUSED = 0.02
ON_PURPOSE = {
    "the forward asks for the norm's class or attributes": r"read-elsewhere: the forward of .* asks ",
    "the model reads the norm's parameters or statistics itself": r"read-elsewhere: ",
    "a call of batch_norm in a forward that cannot be rewritten: it branches on values or keeps state":
        r"functional-norm: .*(cannot be rewritten|cannot be traced|keeps state)",
    "a subclass whose forward branches on values": r"unknown-forward: .*cannot be traced",
}  # fmt: skip
"""The refusals without which a network would be wrong, as a new norm cannot do what the forward asks of the old one."""


@dataclass
class Count:
    """What was found of some networks.

    Args:
        networks: How many.
        distinct: How many of them differ.
        exported: How many torch.export takes.
        norms: How many norms they have.
        seconds: How long it took.
        sites: The sites by kind, layer and proof.
        refusals: Why norms stay.
        unlisted: How many functional norms a forward hides that cannot be traced.
        alone: Why norms convert without their layer.
        pairs_left: Why pairs that the exported graph shows are left alone.
        features: In how many networks each unusual thing occurs.
        broken: The broken promises: kind, text, code.
    """

    networks: int = 0
    distinct: int = 0
    exported: int = 0
    norms: int = 0
    unlisted: int = 0
    seconds: float = 0.0
    sites: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    alone: Counter[str] = field(default_factory=Counter)
    pairs_left: Counter[str] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)
    broken: list[list[str]] = field(default_factory=list)

    def add(self, other: dict[str, Any]) -> None:
        for name, value in other.items():
            mine = getattr(self, name)
            if isinstance(mine, Counter):
                mine.update(value)
            else:
                setattr(self, name, mine + value)


def draw(
    start: int, count: int, take: Callable[[Any], None], kind: str, phases: Sequence[Phase] = (Phase.generate,)
) -> None:
    """Draw ``count`` networks of a kind from a seed and hand each to ``take``."""

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=tuple(phases),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(KINDS[kind]())
    def each(network: Any) -> None:
        take(network)

    each()


def count_chunk(start: int, size: int, kind: str = "networks") -> Count:
    """Check the networks of one seed."""
    count, sources, began = Count(), set(), time.perf_counter()

    def take(network: Any) -> None:
        count.networks += 1
        count.features.update(network.features)
        if repr(network) in sources:  # hypothesis draws some again: the same network, and so the same answers
            return
        sources.add(repr(network))
        try:
            found = conversion_checks.check(network, oracle=kind == "networks" and len(sources) % ORACLE_EVERY == 0)
        except conversion_checks.BrokenPromiseError as broken:
            count.broken.append([broken.kind, str(broken), network.source])
            return
        count.norms += found.norms
        count.unlisted += found.unlisted
        count.exported += found.exported
        for name in ("sites", "refusals", "alone", "pairs_left"):
            getattr(count, name).update(getattr(found, name))

    draw(start, size, take, kind)
    count.distinct, count.seconds = len(sources), time.perf_counter() - began
    return count


def shrunk(start: int, size: int, kind: str, of: str) -> str:
    """Return the smallest network that hypothesis finds for a kind of failure, as code."""
    smallest: list[tuple[int, Any]] = []

    def take(network: Any) -> None:
        try:
            conversion_checks.check(network)
        except conversion_checks.BrokenPromiseError as broken:
            if broken.kind == kind:
                smallest.append((len(network.source), f"# {broken}\n{network!r}"))
                raise

    with suppress(conversion_checks.BrokenPromiseError):
        draw(start, size, take, of, (Phase.generate, Phase.shrink))
    return min(smallest, key=lambda one: one[0])[1] if smallest else "it did not show again"


def on_purpose(count: Count) -> Counter[str]:
    """Return how many norms are refused because nothing else would be right, by what their network does."""
    found: Counter[str] = Counter()
    for reason, times in count.refusals.items():
        what = next((what for what, pattern in ON_PURPOSE.items() if re.match(pattern, reason)), None)
        if what is not None:
            found[what] += times
    if count.unlisted:
        found[[*ON_PURPOSE][2]] += count.unlisted
    return found


def report(count: Count) -> str:
    refused = sum(count.refusals.values()) + count.unlisted
    rightly = on_purpose(count)
    others = refused - sum(rightly.values())
    with_layer = sum(n for kind, n in count.sites.items() if "with its layer" in kind)
    crashes = sum(kind.startswith("crash") for kind, *_ in count.broken)
    lines = [
        f"networks   {count.networks:,} ({count.distinct:,} different, {count.exported:,} exported for the oracle)",
        f"norms      {count.norms:,}",
        f"converted  {sum(count.sites.values()):,}, {with_layer:,} of them together with their layer",
        f"refused    {sum(rightly.values())} on purpose, and {others} others: {others / max(count.norms, 1):.1%}",
        f"wrong      {len(count.broken) - crashes} networks",
        f"crashes    {crashes} networks",
        f"seconds    {count.seconds:.0f}",
    ]
    for title, found in (
        ("sites", count.sites),
        ("refused on purpose, because", rightly),
        ("refused", count.refusals),
        ("alone, because", count.alone),
        ("pairs of the graph left alone, because", count.pairs_left),
        ("networks with", count.features),
    ):
        if found:
            lines += ["", text_table(("", title), [(str(n), what) for what, n in found.most_common(30)])]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000, metavar="N", help="how many networks")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the first fifty")
    parser.add_argument("--results", type=Path, metavar="FILE", help="keep each fifty here, and go on from it")
    parser.add_argument("--shrink", action="store_true", help="make a small network of each kind of failure")
    parser.add_argument("--sizes", action="store_true", help="forwards that ask for sizes and write in place")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # what torch's tracers say of their own future
    done: dict[str, dict[str, Any]] = {}
    if options.results is not None and options.results.exists():
        rows = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
        done = {row["chunk"]: row["count"] for row in rows}
    total, failed, of = Count(), {}, "sizes" if options.sizes else "networks"
    for start in range(options.seed, options.seed + -(-options.count // CHUNK)):
        size = min(CHUNK, options.count - (start - options.seed) * CHUNK)
        key = f"{start}:{size}" + (f":{of}" if options.sizes else "")
        if key not in done:
            done[key] = vars(count_chunk(start, size, of))
            if options.results is not None:
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"chunk": key, "count": done[key]}) + "\n")
        total.add(done[key])
        for kind, *_ in done[key]["broken"]:
            failed.setdefault(kind, (start, size))
    print(report(total))
    for kind, (start, size) in failed.items():
        shortest = min((one for one in total.broken if one[0] == kind), key=lambda one: len(one[2]))
        code = shrunk(start, size, kind, of) if options.shrink else f"# {shortest[1]}\n{shortest[2]}"
        print(f"\n{'=' * 100}\n{code}")
    refused = sum(total.refusals.values()) + total.unlisted - sum(on_purpose(total).values())
    return int(bool(total.broken) or (not options.sizes and refused >= MOST_REFUSED * total.norms))


if __name__ == "__main__":
    sys.exit(main())
