"""What a file remembers of old parameters is read as it was written, and what is none of it is one clear error."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import normswap as ns
from normswap.errors import InputError
from normswap.storage.origin import origin_of
from normswap.storage.remembered import moves_from_text, moves_to_text


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("to", ns.all_recipes())
def test_it_is_read_as_it_was_written(to: str) -> None:
    origin = origin_of(ns.swap_norms(net(), to))
    assert origin is not None
    assert origin.moves is not None
    text = moves_to_text([origin.moves, None])
    (found, none) = moves_from_text(text, 2)
    assert none is None
    assert found is not None
    assert moves_to_text([found, None]) == text
    assert found.moves.keys() == origin.moves.moves.keys()
    assert found.old == {}
    factors = [term.factor for move in found.moves.values() for term in move.terms if term.factor is not None]
    sizes = [value.numel() for value in (*found.before.values(), *factors)]
    assert max(sizes) <= 8  # nothing is of a weight's size
    assert moves_to_text([None]) is None
    assert moves_from_text(None, 1) == [None]


def packed(head: object, tensors: bytes = b"") -> str:
    return base64.b64encode(zlib.compress(json.dumps(head).encode() + b"\0" + tensors)).decode()


@pytest.mark.parametrize(
    "text",
    [
        "not base64 at all!",
        base64.b64encode(b"not compressed").decode(),
        packed([]),
        packed({"moves": 3}),
        packed([{"moves": {"a": {}}, "scales": {}, "before": {}}]),
        packed([{"moves": {}, "scales": {}, "before": {"a": 7}}]),
    ],
)
def test_what_is_none_of_it_is_a_damaged_file(text: str, tmp_path: Path) -> None:
    ns.save(ns.swap_norms(net(), "wn"), tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as content:
        metadata, tensors = content.metadata(), {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "bad.safetensors", {**metadata, "normswap_moves": text})
    with pytest.raises(InputError, match="damaged"):
        ns.load(tmp_path / "bad.safetensors")


def test_a_file_that_remembers_nothing_is_read_and_says_so_when_it_is_asked(tmp_path: Path) -> None:
    """Files of earlier versions."""
    model = net()
    ns.save(ns.swap_norms(model, "wn"), tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as content:
        metadata, tensors = content.metadata(), {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    del metadata["normswap_moves"]
    save_file(tensors, tmp_path / "old.safetensors", metadata)
    loaded = ns.load(tmp_path / "old.safetensors")
    with pytest.raises(InputError, match="no-moves"):
        ns.migrate_optimizer(torch.optim.SGD(model.parameters(), lr=0.1).state_dict(), loaded)
    there = ns.migrate_state_dict(model.state_dict(), loaded)
    back = ns.migrate_state_dict(there.state, loaded)
    assert "not remembered" in str(back)
    again = net()
    again.load_state_dict(back.state)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(again.eval()(x), model(x), rtol=1e-4, atol=1e-5)
