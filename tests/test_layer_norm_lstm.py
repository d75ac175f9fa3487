"""The derivative of a layer-normalized LSTM that is written out: it is the loop's, and used where it may be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from normswap.nn import LayerNormLSTM
from normswap.nn.layer_norm_lstm import derives_by_hand

_DECISION = "normswap.nn.layer_norm_rnn.derives_by_hand"

FORMS: dict[str, dict[str, Any]] = {
    "usual": {},
    "c not normalized": {"cell_norm": False},
    "without biases, eps": {"bias": False, "eps": 1e-2},
    "projection": {"proj_size": 3},
    "layers, both directions, projection": {"num_layers": 2, "bidirectional": True, "proj_size": 3},
    "both directions, c not normalized, no biases": {"bidirectional": True, "cell_norm": False, "bias": False},
}
IN, SIZE = 5, 4


def made(form: str) -> LayerNormLSTM:
    layer = LayerNormLSTM(IN, SIZE, dtype=torch.float64, **FORMS[form])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def given(layer: LayerNormLSTM, steps: int = 6, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and a first state."""
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = ((steps, batch, IN), (rows, batch, layer.proj_size or SIZE), (rows, batch, SIZE))
    x, h, c = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
    return x, h, c


def gradients(layer: LayerNormLSTM, x: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
    """Of all parameters and inputs, of a loss that sees every output."""
    y, last = layer(x, (h, c))
    generator = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(v.shape, generator=generator, dtype=v.dtype) * v).sum() for v in (y, *last))
    wanted = [v for v in (*layer.parameters(), x, h, c) if v.requires_grad]
    return list(torch.autograd.grad(loss, wanted))


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Tells of each direction of each layer that has run whether its derivative is the one written out."""
    found: list[bool] = []

    def noted(*args: Any) -> bool:
        found.append(derives_by_hand(*args))
        return found[-1]

    monkeypatch.setattr(_DECISION, noted)
    return found


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after whose call autograd derives each step."""
    return lambda: monkeypatch.setattr(_DECISION, lambda *_: False)


def assert_equal(found: list[Tensor], expected: list[Tensor], atol: float = 1e-11) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


# --- the gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("form", FORMS)
def test_all_gradients_are_those_of_the_loop(
    form: str, steps: int, by_hand: list[bool], loop: Callable[[], None]
) -> None:
    layer = made(form)
    x, h, c = given(layer, steps)
    y = layer(x, (h, c))
    found = gradients(layer, x, h, c)
    assert by_hand
    assert all(by_hand)
    loop()
    expected = layer(x, (h, c))
    assert_equal([y[0], *y[1]], [expected[0], *expected[1]], atol=1e-13)
    assert_equal(found, gradients(layer, x, h, c))
    layer.eps *= 1.5
    with pytest.raises(AssertionError):
        assert_equal(found, gradients(layer, x, h, c))


@pytest.mark.parametrize("wanted", ["weight_ih", "weight_hh", "weight_hr", "bias_hh", "ln_hh_weight", "ln_c_bias", "x"])
def test_where_little_is_trained(wanted: str, by_hand: list[bool], loop: Callable[[], None]) -> None:
    layer = made("projection")
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.startswith(wanted))
    x, h, c = given(layer)
    x, h, c = (x if wanted == "x" else x.detach()), h.detach(), c.detach()
    found = gradients(layer, x, h, c)
    assert all(by_hand)
    loop()
    assert_equal(found, gradients(layer, x, h, c))
    assert len(found) == 1


def test_a_batch_without_samples(by_hand: list[bool]) -> None:
    layer = made("usual")
    x, h, c = given(layer, batch=0)
    assert all(g is not None and not g.any() for g in gradients(layer, x, h, c))
    assert all(by_hand)


@pytest.mark.parametrize("form", FORMS)
def test_it_can_be_derived_twice(form: str, by_hand: list[bool]) -> None:
    layer = made(form)
    names = [name for name, _ in layer.named_parameters()]
    x, h, c = given(layer, steps=2, batch=2)

    def run(x: Tensor, h: Tensor, c: Tensor, *values: Tensor) -> Tensor:
        y, last = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, (h, c)))
        return torch.cat([y.flatten(), *(v.flatten() for v in last)])

    values = tuple(value.detach().clone().requires_grad_() for value in layer.parameters())
    assert torch.autograd.gradcheck(run, (x, h, c, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, h, c, *values), fast_mode=True, atol=1e-4)
    assert all(by_hand)


def test_a_gradient_penalty_is_that_of_the_loop(by_hand: list[bool], loop: Callable[[], None]) -> None:
    layer = made("layers, both directions, projection")
    x, h, c = given(layer)

    def penalty() -> list[Tensor]:
        (of_x,) = torch.autograd.grad(layer(x, (h, c))[0].square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(of_x.square().sum(), (*layer.parameters(), x), allow_unused=True))

    found = [g for g in penalty() if g is not None]
    assert all(by_hand)
    loop()
    assert_equal(found, [g for g in penalty() if g is not None], atol=1e-8)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented")
def test_many_gradients_at_once(by_hand: list[bool], loop: Callable[[], None]) -> None:
    layer = made("projection")
    x, h, c = given(layer, steps=2)
    vectors = torch.randn(5, 2, 3, 3, dtype=torch.float64)

    def of_x() -> Tensor:
        return torch.autograd.grad(layer(x, (h, c))[0], x, vectors, is_grads_batched=True)[0]

    found = of_x()
    assert all(by_hand)
    loop()
    assert_equal([found], [of_x()])


# --- how it is used ---------------------------------------------------------------------------------------------------


def test_outputs_may_be_changed_in_place_and_derived_once_more(loop: Callable[[], None]) -> None:
    layer = made("layers, both directions, projection")
    x, _, _ = given(layer)

    def twice() -> list[Tensor]:
        y, (h, c) = layer(x)
        loss = (y.relu_() * 2).sum() + h.mul_(3).sum() + c.neg_().sum()
        first = torch.autograd.grad(loss, [*layer.parameters(), x], retain_graph=True)
        second = torch.autograd.grad(loss, [*layer.parameters(), x])
        assert_equal(list(first), list(second), atol=0)
        return list(first)

    found = twice()
    loop()
    assert_equal(found, twice())


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(reentrant: bool) -> None:
    layer = made("layers, both directions, projection")
    x, h, c = given(layer)
    wanted = [*layer.parameters(), x]
    expected = torch.autograd.grad(layer(x, (h, c))[0].square().sum(), wanted)
    checkpoint(layer, x, (h, c), use_reentrant=reentrant)[0].square().sum().backward()
    assert_equal([v.grad for v in wanted if v.grad is not None], list(expected))


def test_in_bfloat16(by_hand: list[bool], loop: Callable[[], None]) -> None:
    layer = made("layers, both directions, projection").bfloat16()
    x = torch.randn(4, 3, IN).bfloat16()
    layer(x)[0].float().sum().backward()
    found = [p.grad for p in layer.parameters() if p.grad is not None]
    assert all(by_hand)
    layer.zero_grad()
    loop()
    layer(x)[0].float().sum().backward()
    for one, parameter in zip(found, layer.parameters(), strict=True):
        assert parameter.grad is not None
        assert float((one - parameter.grad).float().norm()) < 0.1 * float(parameter.grad.float().norm())


class _Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("context", "written_out"),
    [(nullcontext, True), (torch.no_grad, False), (torch.inference_mode, False), (_Watching, False)],
)
def test_it_is_used_in_training_where_nobody_watches(
    context: Callable[[], AbstractContextManager[object]], written_out: bool, by_hand: list[bool]
) -> None:
    layer = made("usual")
    with context():
        layer(torch.randn(2, 3, IN, dtype=torch.float64))
    assert by_hand == [written_out]


@pytest.mark.filterwarnings("ignore:`torch.jit.script. is deprecated")  # torch's own forward derivatives call it
def test_it_is_not_used_under_autocast_and_transforms_and_for_sequences_of_several_lengths(by_hand: list[bool]) -> None:
    layer = made("usual")
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        copy.deepcopy(layer).float()(x.float())
    torch.func.vmap(lambda x: layer(x)[0])(x[None])
    torch.func.jvp(lambda x: layer(x)[0], (x,), (x,))
    torch.func.grad(lambda x: layer(x)[0].sum())(x)
    layer(pack_sequence([x[:, 0], x[:1, 0]]))
    assert by_hand == [False] * 5
    layer(pack_sequence([x[:, 0], x[:, 1]]))
    assert by_hand[5:] == [True]
