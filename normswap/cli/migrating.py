"""``normswap migrate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import normswap as ns
from normswap.cli.console import facts, note, print_json, say, working
from normswap.cli.flags import Json, flattened, output_flag
from normswap.cli.outputs import beside, save_weights
from normswap.cli.protecting import FilesRead
from normswap.cli.reading import Reading
from normswap.cli.reporting import written
from normswap.cli.sources import Source
from normswap.errors import InputError
from normswap.storage.writing import reported

if TYPE_CHECKING:
    from normswap.training.records import StateDictMigration

__all__ = ["migrate_checkpoint"]

_PLAIN = (".pt", ".pth")


@flattened("migrate")
def migrate_checkpoint(
    *,
    old: Annotated[
        Path,
        typer.Argument(metavar="OLD", help="a state dict, a checkpoint that holds one, or a whole model by torch.save"),
    ],
    like: Annotated[
        Path,
        typer.Option(metavar="FILE", help="what `normswap convert` wrote: the conversion that OLD follows"),
    ],
    output: Annotated[
        Path | None,
        output_flag("a .safetensors file, or a .pt file for a state dict (default: beside OLD)"),
    ] = None,
    reading: Reading,
    read: FilesRead,
    as_json: Json = False,
) -> None:
    """Carry another checkpoint through a conversion that was made before, or back to BatchNorm.

    OLD is a later checkpoint of the model that was converted, an average of its weights, or another fold. A BatchNorm's
    checkpoint gives what `normswap convert` would, with the same plan and without data: exactly so for recipes such as
    wn+mobn. One of the converted model gives a BatchNorm state dict, where the recipe is exact.
    """
    source = Source.of(reading)
    if output is not None and output.suffix not in (".safetensors", *_PLAIN):
        raise InputError(
            f"a checkpoint is not written to {output}", code="output-kind", hint=f"write {output.stem}.safetensors"
        )
    model = source.stored(like)
    given = source.tensors(old, model)
    with working("migrating"):
        found = ns.migrate_state_dict(given, model)
    target = output or _beside(old, found)
    with read.staged(target) as place, working(f"writing {target}"):
        _write(found, model, place(target))
    if as_json:
        record = {
            "to": found.to,
            "exact": found.exact,
            "tensors": len(found.state),
            "notes": [str(text) for text in found.notes],
            "written": [str(target)],
        }
        print_json(json.dumps(record, indent=2, ensure_ascii=False))
        return
    say(type(model).__name__)
    what = "the converted model" if found.to == "converted" else "the model with BatchNorm"
    facts(
        [
            ("migrated", f"{len(found.state)} tensors, for {what}"),
            ("function", "the same, up to rounding" if found.exact else "not the same: the recipe is not exact"),
            *written([target]),
        ]
    )
    for text in found.notes:
        note(text)
    if output is None:
        note("no -o was given: the output stands beside OLD")


def _beside(old: Path, found: StateDictMigration) -> Path:
    return beside(old, f"migrated.{'safetensors' if found.to == 'converted' else 'pt'}")


def _write(found: StateDictMigration, model: Any, path: Path) -> None:
    """Write a converted model as `normswap convert` does, and a state dict as such."""
    if path.suffix == ".safetensors" and found.to == "converted":
        model.load_state_dict(found.state)
        ns.save(model, path)
        return
    if path.suffix == ".safetensors":
        save_weights(found.state, path)
        return
    with reported(path):
        import torch

        torch.save(dict(found.state), path)
