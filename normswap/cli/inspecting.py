"""``normswap inspect``."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import normswap as ns
from normswap.cli.console import print_json, progressing, say, table, working
from normswap.cli.flags import At, Chosen, DataFlags, InputFlags, Json, Model, To, flattened
from normswap.cli.inputs import calibration_data, example_inputs
from normswap.cli.reading import Reading
from normswap.cli.reporting import costs_as_record, show_choice, show_costs, show_norms, show_plan
from normswap.cli.requests import default_of
from normswap.cli.sources import Source
from normswap.cli.spelling import spell
from normswap.cli.values import AUTO, called, read_at

if TYPE_CHECKING:
    from torch import nn

__all__ = ["inspect_model"]


@flattened("inspect")
def inspect_model(
    *,
    model: Model,
    to: To = None,
    at: At = None,
    data: DataFlags,
    chosen: Chosen,
    given: InputFlags,
    reading: Reading,
    as_json: Json = False,
) -> None:
    """Show a model's norms, their layers, and what cannot be converted.

    With --to or --recurrent it shows what each norm or layer would become; with --calibration what the swap of each
    norm by itself costs, largest error first. Nothing is written.
    """
    network = Source.of(reading).open(model)
    inputs = example_inputs(network, given)
    batches = calibration_data(network, data, given, quiet=as_json)
    recurrent = chosen.pop("recurrent", None)
    recipe = read_at(to, at, default=default_of(recurrent))
    if batches is not None and recipe == AUTO:
        with progressing("choosing recipes", quiet=as_json) as progress:
            choice = ns.choose_recipes(network, calibration=batches, example_inputs=inputs, progress=progress, **chosen)
        print_json(choice.to_json()) if as_json else show_choice(choice)
    elif batches is not None:
        with progressing("ranking the sites", quiet=as_json) as progress:
            costs = ns.rank_sites(
                network, recipe, calibration=batches, example_inputs=inputs, progress=progress, **chosen
            )
        print_json(costs_as_record(costs)) if as_json else show_costs(costs, type(network).__name__, called(recipe))
    elif to is not None or at or recurrent is not None:
        with working("planning"):
            plan = ns.plan(network, recipe, example_inputs=inputs, recurrent=recurrent)
        print_json(plan.to_json()) if as_json else show_plan(plan)
    else:
        _show_sites(network, inputs, as_json=as_json)


def _show_sites(network: nn.Module, inputs: Any, *, as_json: bool) -> None:
    """Print the norms with their layers, and what is left alone with its reason."""
    with working("reading the dataflow"):
        from normswap.graph import capture
        from normswap.graph.dataflow import Dataflow
        from normswap.runs.inputs import as_inputs
        from normswap.stages.find_sites import find_sites
        from normswap.stages.recurrent import unasked
        from normswap.storage.origin import origin_of

        example = None if inputs is None else as_inputs(inputs)
        found = find_sites(Dataflow(capture(network, example)), example)
        left = [*found.skips, *map(unasked, found.recurrent)]
        parameters = sum(p.numel() for p in network.parameters())
    name = type(network).__name__
    if as_json:
        record = {
            "model": name,
            "parameters": parameters,
            "sites": [dataclasses.asdict(site) for site in found.sites],
            "skips": [dataclasses.asdict(skip) for skip in left],
        }
        print_json(json.dumps(record, indent=2, ensure_ascii=False))
        return
    origin = origin_of(network)
    converted = "" if origin is None else f", converted to {origin.plan.recipe}"
    say(f"{name}{converted}: {parameters:,} parameters, {len(found.sites)} BatchNorm sites\n")
    show_norms(
        ("norm", "type", "channels", "layer", "layer type", "proof"),
        [
            (s.norm, s.norm_type, str(s.num_features), s.layer or "–", s.layer_type or "–", s.evidence)
            for s in found.sites
        ],
        [s.remarks for s in found.sites],
    )
    if found.sites and left:
        say()
    table(("left alone", "what", "type", "reason"), [(s.name, s.what, s.type, spell(s.reason)) for s in left])
