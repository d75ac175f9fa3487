"""Feature distillation without labels: tune a matched network by gradient towards the original's activations.

    loss = mean over sites s of  E‖y'_s − y_s‖² / Var y_s  +  E‖out' − out‖² / Var out

y_s is a norm's output or, where that goes into an addition and nowhere else, the sum: a residual block's output. All
sites are tuned at once, not block after block: an early block then also learns what the later ones need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.errors import InitializationError, argument
from normswap.initialization.match import Match
from normswap.records import InitRow
from normswap.runs.calling import Batch, call
from normswap.runs.guard import set_mode, untouched
from normswap.runs.processes import alone, objects, summed
from normswap.runs.tensors import tensors_of
from normswap.runs.uses import ADDITIONS, find_uses
from normswap.runs.writes import kept
from normswap.stages.rewriting import Placed

__all__ = ["Tune", "tune_to"]

_RATE = 1e-3
_HOLD_OUT = 5  # every fifth batch


def tune_to(
    original: nn.Module,
    converted: nn.Module,
    sites: Sequence[str],
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Batch],
    *,
    steps: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[float, float]:
    """Take ``steps`` Adam steps on ``parameters``, one batch each, with the rate falling to zero along a cosine.

    Every fifth batch is held out, where there are five; if the loss there has not become less, nothing is changed.
    Of many processes each takes a batch of its own for a step, and all step along the mean of their gradients.

    Args:
        original: The original; left as it is.
        converted: The matched network; its parameters are changed in place.
        sites: The fqns of modules that both have, where they are compared beside their outputs.
        parameters: What is tuned.
        batches: Unlabelled inputs.
        steps: The number of steps.
        progress: Called with a word, the number of steps taken and ``steps``.

    Returns:
        The held-out loss before and after.
    """
    held = [b for i, b in enumerate(batches) if len(batches) >= _HOLD_OUT and i % _HOLD_OUT == _HOLD_OUT - 1]
    train = [b for i, b in enumerate(batches) if not held or i % _HOLD_OUT != _HOLD_OUT - 1]
    before_values = [p.detach().clone() for p in parameters]
    with ExitStack() as stack:
        stack.enter_context(untouched(original))
        stack.enter_context(untouched(converted))
        stack.enter_context(torch.enable_grad())
        set_mode(original, False)
        set_mode(converted, False)
        ends = [{name: network.get_submodule(name) for name in sites} for network in (original, converted)]
        features = _Features((original, converted), ends, find_uses(original, ends[0], batches[0]).into_addition)
        stack.enter_context(features.recording())
        converted.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        judging = held if sum(objects("held-out batches", len(held))) else train
        before = _mean_loss(features, judging)
        optimizer = torch.optim.Adam(parameters, lr=_RATE)
        order = torch.Generator().manual_seed(0)
        chosen: list[int] = []
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = _RATE * (1 + math.cos(math.pi * step / steps)) / 2
            chosen = chosen or torch.randperm(len(train), generator=order).tolist()
            loss = features.loss(train[chosen.pop()])
            if not loss.requires_grad:
                raise InitializationError(
                    "the model's forward records no gradients, so nothing can be tuned",
                    code="tune-no-gradient",
                    hint=f"convert with {argument('init', 'match')}",
                )
            optimizer.zero_grad()
            loss.backward()
            _average_gradients(parameters)
            with kept():
                optimizer.step()
            if progress is not None:
                progress("gradient steps", step + 1, steps)
        after = _mean_loss(features, judging)
    if not after < before:
        with torch.no_grad():
            for parameter, value in zip(parameters, before_values, strict=True):
                parameter.copy_(value)
    return before, after


def _mean_loss(features: _Features, batches: Sequence[Batch]) -> float:
    with torch.no_grad():
        found = torch.tensor([[float(features.loss(batch)), 1.0] for batch in batches], dtype=torch.float64).view(-1, 2)
    ((loss, count),) = summed("a loss", found.sum(0))
    return float(loss / count)


def _average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give each parameter the mean of its gradients in all processes."""
    if alone():
        return
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    share = 1 / len(objects("a gradient step", None))
    for parameter, total in zip(parameters, summed("gradients", *own), strict=True):
        parameter.grad = total * share


class _Features:
    """Both networks' activations on one batch, at all sites and at the end, and the distance between them."""

    def __init__(
        self,
        networks: tuple[nn.Module, nn.Module],
        ends: Sequence[Mapping[str, nn.Module]],
        into_addition: frozenset[str],
    ) -> None:
        self.networks, self.ends, self.into_addition = networks, ends, into_addition
        self.found: dict[str, Tensor] = {}
        self.pending: dict[int, tuple[Tensor, str]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Let hooks record what the sites give, once per run: at a site's first call."""
        handles = [
            module.register_forward_hook(self._recorder(name)) for ends in self.ends for name, module in ends.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _recorder(self, name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: Any, output: Any) -> None:
            if name in self.found:
                return
            (output, *_state) = tensors_of(output)  # a recurrent layer's outputs come before its state
            self.found[name] = output
            if name in self.into_addition:
                self.pending[id(output)] = output, name

        return record

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss on one batch."""
        with torch.no_grad():
            expected, outputs = self._run(self.networks[0], batch)
        found, results = self._run(self.networks[1], batch)
        pairs = [(found[name], y) for name, y in expected.items() if name in found and found[name].shape == y.shape]
        at_sites = [_relative(a, b) for a, b in pairs]
        at_end = [_relative(a, b) for a, b in zip(results, outputs, strict=True) if a.shape == b.shape]
        total = sum(at_end, torch.zeros((), device=results[0].device) if results else torch.zeros(()))
        return total + (torch.stack(at_sites).mean() if at_sites else 0.0)

    def _run(self, network: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], list[Tensor]]:
        self.found, self.pending = {}, {}
        with _RecordSums(self):
            output = call(network, batch)
        return self.found, tensors_of(output)


def _relative(found: Tensor, expected: Tensor) -> Tensor:
    expected = expected.detach().float()
    return (found.float() - expected).square().mean() / expected.var().clamp(min=1e-12)


class _RecordSums(TorchFunctionMode):
    """Records the sum that a site's output goes into in place of the output."""

    def __init__(self, features: _Features) -> None:
        super().__init__()
        self.features = features

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ADDITIONS and self.features.pending:
            for value in args:
                if id(value) in self.features.pending:
                    self.features.found[self.features.pending.pop(id(value))[1]] = result
        return result


class Tune(Match):
    """Take gradient steps towards the original's own values, without labels, from what :class:`Match` gives."""

    name = "tune"
    revisits = True

    def further(self, target: nn.Module, placed: Sequence[Placed], fitted: Mapping[str, InitRow]) -> tuple[str, ...]:
        """Tune all parameters that the swap has touched."""
        work, steps = self.work, self.work.options.tune_steps
        assert isinstance(work.batches, list)
        heads = [target.get_submodule(name) for name in fitted.keys() - {one.name for one in placed}]
        parts = [part for one in placed for part in one.parts]
        layers = {s.site.name: target.get_submodule(s.site.name) for s in work.bound.recurrent if not s.recipe.exact}
        parameters = {id(p): p for part in (*parts, *heads, *layers.values()) for p in part.parameters()}
        places = [name for name in fitted if ":" not in name]
        places += [name for name, layer in layers.items() if isinstance(layer, nn.RNNBase)]  # a cell shows one step
        before, after = tune_to(
            work.source, target, places, list(parameters.values()), work.batches, steps=steps, progress=work.progress
        )
        if after < before:
            return (f"{steps} gradient steps took the held-out error from {before:.3g} to {after:.3g}",)
        return (
            f"{steps} gradient steps did not lessen the held-out error of {before:.3g}: the matched values were kept",
        )
