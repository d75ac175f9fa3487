"""Gradient checkpointing runs a forward again within backward: the gradients are the same, or it is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normswap as ns
from normswap.errors import InputError
from normswap.nn import (
    BatchNormGRU,
    BatchNormLSTM,
    BatchNormLSTMCell,
    BatchNormRNN,
    LayerNormLSTM,
    StreamingNorm,
)

REFUSED = {"streaming", "bcn"}
LAYERS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "BatchNormLSTM": (lambda: BatchNormLSTM(3, 4), True),
    "BatchNormGRU": (lambda: BatchNormGRU(3, 4), True),
    "BatchNormRNN": (lambda: BatchNormRNN(3, 4, bidirectional=True), True),
    "per step": (lambda: BatchNormLSTM(3, 4, max_length=5), False),
    "input only": (lambda: BatchNormLSTM(3, 4, input_only=True), False),
    "LayerNormLSTM": (lambda: LayerNormLSTM(3, 4), False),
    "StreamingNorm of the batch alone": (lambda: StreamingNorm(8, alpha=0.0, beta=0.0), False),
}


def gradients(model: nn.Module, x: Tensor, run: Callable[..., Any]) -> list[Tensor]:
    model = copy.deepcopy(model).train()
    found = run(model, x)
    (found[0] if isinstance(found, tuple) else found).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def again(model: nn.Module, x: Tensor, *, reentrant: bool) -> Any:
    return checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)


def assert_same_or_refused(model: nn.Module, x: Tensor, refused: bool, *, reentrant: bool) -> None:
    def run(model: nn.Module, x: Tensor) -> Any:
        return again(model, x, reentrant=reentrant)

    if refused:
        gradients(model, x, lambda m, x: m(x))
        with pytest.raises(InputError, match="was run a second time by gradient checkpointing") as caught:
            gradients(model, x, run)
        assert caught.value.code == "recomputed"
        return
    for once, twice in zip(gradients(model, x, lambda m, x: m(x)), gradients(model, x, run), strict=True):
        torch.testing.assert_close(once, twice, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("to", ns.all_recipes())
def test_recipes(to: str, reentrant: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
    )
    for norm in (model[1], model[4]):
        assert isinstance(norm, nn.BatchNorm2d)
        norm.running_mean = torch.rand(4)
    x = torch.randn(4, 3, 8, 8)
    converted = ns.swap_norms(model.eval(), to, example_inputs=x)
    assert_same_or_refused(converted, x, to in REFUSED, reentrant=reentrant)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    make, refused = LAYERS[name]
    layer = make()
    with torch.no_grad():
        for own, parameter in layer.named_parameters():
            if "bn_" in own:
                parameter.fill_(1.0)
    assert_same_or_refused(layer, torch.randn(5, 8, 3), refused, reentrant=False)


def test_a_cell() -> None:
    class Stepped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = BatchNormLSTMCell(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for one in x:
                state = self.cell(one, state)
            assert state is not None
            return state[0]

    model = Stepped()
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if "bn_" in own:
                parameter.fill_(1.0)
    assert_same_or_refused(model, torch.randn(5, 8, 3), refused=True, reentrant=False)


@pytest.mark.parametrize("to", sorted(REFUSED))
def test_a_part_that_is_not_checkpointed_and_evaluation_go_on(to: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    x = torch.randn(4, 3, 8, 8)
    converted = ns.swap_norms(model.eval(), to, example_inputs=x)
    converted.train()
    checkpoint(converted[3], converted[:3](x), use_reentrant=False).sum().backward()
    checkpoint(converted.eval(), x, use_reentrant=False).sum().backward()
