"""What a conversion remembers of the parameters that it replaced, as text for a file's header and back.

The factors are one value per channel each, as safetensors in a text: no code is in it, and tools that list a file's
tensors show those of the model alone.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from normswap.nn import FilterLayout
from normswap.norms import Along, LinearOf
from normswap.stages.moves import Move, Moves, Scale

__all__ = ["moves_from_text", "moves_to_text"]

_LARGEST = 32 << 20
"""Bytes of the text; a safetensors header may have 100 MB. A network of 100,000 channels has about 5 MB."""


class _Writer:
    """Numbers tensors while the rest of a record becomes JSON."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def number(self, tensor: Tensor | None) -> int | None:
        """Return the number that stands for a tensor, None for None."""
        if tensor is None:
            return None
        self.tensors[str(len(self.tensors))] = tensor.detach().cpu().contiguous().clone()
        return len(self.tensors) - 1

    def move(self, move: Move) -> dict[str, Any]:
        """Return one move."""
        terms = [[t.old, self.number(t.factor), t.over_inputs, t.along.name] for t in move.terms]
        layout = [move.layout.transposed, move.layout.groups]
        return {
            "terms": terms,
            "near": list(move.near),
            "filters": move.filters,
            "layout": layout,
            "reason": move.reason,
        }

    def scale(self, scale: Scale) -> list[Any]:
        """Return one scale."""
        layout = [scale.layout.transposed, scale.layout.groups]
        return [self.number(scale.outputs), self.number(scale.inputs), layout]


def moves_to_text(moves: Sequence[Moves | None]) -> str | None:
    """Return the moves of each of a model's conversions as text; None where none are known, or it would be too long."""
    if all(one is None for one in moves):
        return None
    writer = _Writer()
    listed = [
        None
        if one is None
        else {
            "moves": {name: writer.move(move) for name, move in one.moves.items()},
            "scales": {name: writer.scale(scale) for name, scale in one.scales.items()},
            "before": {name: writer.number(value) for name, value in one.before.items()},
        }
        for one in moves
    ]
    data = json.dumps(listed, ensure_ascii=False).encode() + b"\0" + save_tensors(writer.tensors)
    text = base64.b64encode(zlib.compress(data, 6)).decode("ascii")
    return text if len(text) <= _LARGEST else None


def moves_from_text(text: str | None, count: int) -> list[Moves | None]:
    """Read what :func:`moves_to_text` gave for so many conversions.

    Raises:
        ValueError, KeyError, TypeError, …: The text is none of it; a reader of damaged files expects all of these.
    """
    if text is None:
        return [None] * count
    decompressor = zlib.decompressobj()
    data = decompressor.decompress(base64.b64decode(text, validate=True), 16 * _LARGEST)
    if not decompressor.eof:
        raise ValueError("what it remembers of old parameters is cut short or too large")
    head, _, rest = data.partition(b"\0")
    listed, tensors = json.loads(head), load_tensors(rest)
    if not isinstance(listed, list) or len(listed) != count:
        raise ValueError(f"it remembers old parameters of {len(listed)} conversions and has {count}")
    return [None if one is None else _moves(one, tensors) for one in listed]


def _moves(found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Moves:
    def tensor(number: int | None) -> Tensor | None:
        if number is None:
            return None
        value = tensors[str(int(number))]
        if value.ndim != 1 or not value.is_floating_point():
            raise ValueError("a factor that it remembers is not one number per channel")
        return value

    moves = {}
    for name, move in found["moves"].items():
        terms = tuple(
            LinearOf(str(old), tensor(factor), bool(over), Along[along]) for old, factor, over, along in move["terms"]
        )
        filters = None if move["filters"] is None else str(move["filters"])
        near = tuple(map(str, move["near"]))
        moves[str(name)] = Move(terms, near, filters, _layout(move["layout"]), str(move["reason"]))
    scales = {
        str(name): Scale(tensor(outputs), tensor(inputs), _layout(layout))
        for name, (outputs, inputs, layout) in found["scales"].items()
    }
    return Moves(moves, scales, {str(name): tensors[str(int(value))] for name, value in found["before"].items()})


def _layout(found: Sequence[Any]) -> FilterLayout:
    transposed, groups = found
    return FilterLayout(bool(transposed), int(groups))
