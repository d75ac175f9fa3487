"""The refusals of pickled models by name: what the name means, and what to do instead."""

from __future__ import annotations

from normswap.errors import InputError, argument
from normswap.loading.scanning import Global, Scan
from normswap.loading.trust import SCRIPT, Trust, entry_for, under

__all__ = ["INSTEAD", "refuse_code", "refuse_hooks", "refuse_known", "refuse_names"]

SHOWN = 10
INSTEAD = f"save model.state_dict() instead and give {argument('arch')}"
"""What to do about a pickled model whose names are not trusted."""

# The first that matches speaks: a compiled model, for one, also holds contexts, hooks and bound methods.
KNOWN = (
    (
        "torch._dynamo",
        "compiled-model",
        "the model was saved after torch.compile",
        "save model._orig_mod, or call torch.save before torch.compile",
    ),
    (
        "torch.fx",
        "graph-module",
        "the model is an fx GraphModule, which is saved as source code to be run",
        f"save the model from before the tracing, or its state dict with {argument('arch')}",
    ),
    (
        "torch.jit",
        "torchscript",
        "the model holds TorchScript parts",
        "save the original model with torch.save(model, path), or its state dict",
    ),
    (
        "torch.nn.parallel.distributed",
        "distributed-model",
        "the model is wrapped in DistributedDataParallel",
        "save model.module",
    ),
    (
        "torch.distributed",
        "distributed-model",
        "the model holds distributed parts",
        f"gather it on one process and save its full state dict, then give {argument('arch')}",
    ),
    (
        "torch.nn.utils.weight_norm",
        "weight-norm-hook",
        "the model uses the old torch.nn.utils.weight_norm, a hook",
        "call torch.nn.utils.remove_weight_norm on each such layer before torch.save",
    ),
    (
        "torch.nn.utils.spectral_norm",
        "spectral-norm-hook",
        "the model uses the old torch.nn.utils.spectral_norm, a hook",
        "call torch.nn.utils.remove_spectral_norm on each such layer before torch.save",
    ),
    (
        "torch.nn.utils.prune",
        "pruning-hook",
        "the model is being pruned, by a hook",
        "call torch.nn.utils.prune.remove on each such layer before torch.save",
    ),
)


def refuse_known(scan: Scan, trust: Trust) -> None:
    """Raise for models of kinds that have a better answer than a list of names."""
    for prefix, code, what, hint in KNOWN:
        for found in sorted(scan.globals):
            if under(found.module, (prefix,)) and not trust.covers(found):
                raise InputError(f"{what} (the file names {found.path})", code=code, hint=hint)


def refuse_hooks(names: set[Global]) -> None:
    """Raise where `names` lie in a table of hooks, which the first forward pass would call."""
    if names:
        listed, advice = _listed(names)
        raise InputError(
            f"the model was saved with hooks: {listed}",
            code="model-hooks",
            hint=f"remove the hooks before torch.save; or {advice}",
        )


def refuse_names(names: set[Global]) -> None:
    """Raise one error that lists `names`, each with the option that would admit it; nothing for no names."""
    if names:
        listed, advice = _listed(names)
        plural = "s that are" if len(names) > 1 else " that is"
        raise InputError(
            f"the file needs {len(names)} name{plural} not admitted: {listed}",
            code="untrusted-global",
            hint=advice,
        )


def refuse_code(found: Global) -> None:
    """Raise for a class with pickling code of its own, which nobody reviewed."""
    raise InputError(
        f"{found.path} runs code of its own while it is unpickled", code="untrusted-global", hint=_listed({found})[1]
    )


def _listed(names: set[Global]) -> tuple[str, str]:
    """Return the names with what would admit each, and what to do about them."""
    entries = {found: entry_for(found) for found in sorted(names)}
    lines = [
        f"{found.path} ({argument('trust', [entry]) if entry else 'never admitted'})"
        for found, entry in entries.items()
    ]
    if len(lines) > SHOWN:
        lines = [*lines[:SHOWN], f"and {len(lines) - SHOWN} more"]
    advice = f"nothing of it was run; {INSTEAD}"
    if None not in entries.values():
        trusted = sorted({entry for entry in entries.values() if entry})
        script = f" ({SCRIPT} is the script that saved the model)" if SCRIPT in trusted else ""
        advice = f"where you trust the file: {argument('trust', trusted)}{script}; or {INSTEAD}"
    return ", ".join(lines), advice
