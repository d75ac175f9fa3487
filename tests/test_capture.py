"""Capture is read-only, whatever the model does while it is looked at."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normswap as ns
from normswap.graph import capture_recorded, capture_symbolic


class Careless(nn.Module):
    """Caches, counts, draws random numbers and, on request, fails in the middle of its forward."""

    def __init__(self, failure: BaseException | None = None) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.cache: dict[str, Tensor] = {}
        self.seen: list[Tensor] = []
        self.calls, self.last, self.failure = 0, None, failure

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = y = self.conv(x)
        self.cache["y"] = y
        self.seen.append(y)
        torch.rand(1), random.random(), np.random.rand()
        if self.failure is not None:
            raise self.failure
        return self.bn(y).relu()


def fingerprint(model: Careless) -> tuple[object, ...]:
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    plain = (model.calls, model.last, dict(model.cache), list(model.seen), [m.training for m in model.modules()])
    hooks = [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in model.modules()]
    generators = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    return {n: t.tolist() for n, t in tensors.items()}, plain, hooks, generators


FAILURES = [None, RuntimeError("in the middle"), KeyboardInterrupt()]


@pytest.mark.parametrize("failure", FAILURES, ids=["none", "error", "interrupt"])
@pytest.mark.parametrize("training", [False, True])
def test_a_trace_leaves_the_model_as_it_was(failure: BaseException | None, training: bool) -> None:
    model = Careless(failure).train(training)
    before = fingerprint(model)
    if isinstance(failure, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            capture_symbolic(model)
    else:
        capture_symbolic(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("failure", FAILURES, ids=["none", "error", "interrupt"])
def test_a_run_on_example_inputs_leaves_the_model_as_it_was(failure: BaseException | None) -> None:
    model, x = Careless(failure).train(), torch.randn(2, 3, 6, 6)
    before = fingerprint(model)
    if failure is None:
        assert capture_recorded(model, (x,)).shapes["bn"] == frozenset({(4, 16)})
    else:
        with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else ns.NormswapError):
            capture_recorded(model, (x,))
    assert fingerprint(model) == before


def test_the_fingerprint_sees_what_a_forward_does() -> None:
    """The negative control of the tests above."""
    model = Careless().train()
    before = fingerprint(model)
    model(torch.randn(2, 3, 6, 6))
    assert all(a != b for a, b in zip(fingerprint(model), before, strict=True) if a != [[], [], []])


def test_an_untraceable_module_hides_no_more_than_itself() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if x.shape[0] > 1 else x

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Branches(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    capture = capture_symbolic(copy.deepcopy(model))
    assert set(capture.opaque) == {"2"}
    assert {trace.scope for trace in capture.traces} == {"", "2.inner"}
    found = {step.site.norm: step.site.layer for step in ns.plan(model, "ln").steps}
    assert found == {"1": "0", "2.inner.1": None, "4": "3"}
    for batch in (2, 1):  # the branch that one sample does not take, two do
        plan = ns.plan(model, "ln", example_inputs=torch.ones(batch, 3, 5, 5))
        (site,) = (step.site for step in plan.steps if step.site.norm == "2.inner.1")
        assert site.proof == "checked"
        assert (site.caveat is None) == (batch == 2)


@pytest.mark.parametrize(
    "wrap",
    [lambda m: nn.DataParallel(m), lambda m: torch.compile(m), lambda m: torch.jit.trace(m, torch.randn(1, 3, 6, 6))],
    ids=["DataParallel", "compiled", "TorchScript"],
)
@pytest.mark.filterwarnings("ignore")
def test_wrappers_are_refused_with_what_to_do(wrap: object) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(ns.NormswapError, match="cannot be replaced") as error:
        ns.plan(wrap(model), "ln")  # type: ignore[operator]
    assert error.value.hint
