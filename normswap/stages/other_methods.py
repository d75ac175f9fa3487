"""What the model's other methods, beside its forward, do with its norms: freeze them, and look them up by class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from normswap.graph.class_lookups import class_lookups
from normswap.graph.dataflow import Dataflow
from normswap.norms import norm_of
from normswap.records import Site, Skip
from normswap.runs.modes import Held

__all__ = ["refuse_by_mode", "with_methods"]


_BATCHWISE = "the model keeps it in train mode in evaluation, too, where it uses the batch's statistics"


_HELD_DROPOUT = (
    "train() leaves it in eval mode with a random module inside of it, which would be random once it is outside"
)


def refuse_by_mode(flow: Dataflow, held: Held) -> None:
    """Refuse calls of ``batch_norm`` that use the batch's statistics in evaluation, and such as may be frozen or not.

    A call with the tensors of a BatchNorm may take its mode from that or from the module whose forward makes it, and
    one of them stays in eval mode when the other does not.
    """
    for key in list(flow.functional):
        asked = [id(module) for module in _modules_of(flow, key)]
        if any(one in held.in_train for one in asked):
            flow.refuse(key, _BATCHWISE)
        elif len({one in held.in_eval for one in asked}) > 1:
            why = "train() leaves either this BatchNorm or the module that calls it in eval mode, and not both"
            flow.refuse(key, f"whether it is frozen is open: {why}")


def with_methods(flow: Dataflow, found: Iterable[Site], held: Held) -> tuple[list[Site], list[Skip]]:
    """Return the sites with what other methods do there, and skips for norms that these keep from being sites.

    Args:
        flow: The model's dataflow.
        found: The sites.
        held: The modules that the model keeps in one mode: norms that stay in eval mode are frozen.
    """
    lookups = class_lookups(flow.capture.model)
    sites: list[Site] = []
    skips: list[Skip] = []
    for site in found:
        norm = id(_modules_of(flow, site.norm)[0])
        if norm in held.in_train:
            skips.append(Skip(site.norm, "norm", site.norm_type, "batch-statistics", _BATCHWISE))
            continue
        if norm in held.in_eval and _drops(_modules_of(flow, site.norm)[0]):
            skips.append(Skip(site.norm, "norm", site.norm_type, "held-dropout", _HELD_DROPOUT))
            continue
        names = (site.norm.partition(":")[0], *site.aliases)
        methods = [m for owner, ms in lookups.items() for m in ms if any(_is_below(name, owner) for name in names)]
        if norm in held.in_eval:
            site = replace(site, frozen=True, held=True)
            methods = [method for method in methods if not method.endswith(".train")]  # what it does is done
        sites.append(replace(site, looked_up_by=tuple(dict.fromkeys(methods))))
    return sites, skips


def _drops(norm: nn.Module) -> bool:
    """Tell whether a module inside of a norm is random in train mode; a call's owner stays, and so does its mode."""
    inside = norm.modules() if norm_of(norm) is not None else ()
    return any(isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU)) for module in inside)


def _is_below(name: str, owner: str) -> bool:
    return not owner or name == owner or name.startswith(f"{owner}.")


def _modules_of(flow: Dataflow, name: str) -> list[nn.Module]:
    """Return the modules whose mode may be that of a site's norm."""
    modules = flow.capture.modules
    if name not in flow.functional:
        return [modules[name]]
    owner, norm = flow.functional[name]
    return [modules[owner], *([modules[owner].get_submodule(norm.name)] if norm.holder else [])]
