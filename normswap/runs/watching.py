"""Watch what reaches a model's modules: their inputs, and the mean and variance of these over all batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import InitializationError
from normswap.runs.calling import Batch, first_input, run_on_data
from normswap.runs.guard import set_mode, untouched
from normswap.runs.processes import alone, summed_by_name

__all__ = ["Statistics", "measure_statistics", "not_finite", "over_processes", "watch_inputs"]


def watch_inputs(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Batch],
    see: Callable[[str, nn.Module, Sequence[Any]], None],
) -> None:
    """Run ``model`` in evaluation and call ``see(name, module, inputs)`` at each call of these; read-only."""
    with untouched(model), torch.no_grad():
        set_mode(model, False)
        handles = []
        for name in names:

            def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                see(
                    name,
                    module,
                    [first_input(args, kwargs), *args[1:], *(v for k, v in kwargs.items() if k != "input")],
                )

            handles.append(model.get_submodule(name).register_forward_pre_hook(show, with_kwargs=True))
        try:
            for inputs in batches:
                run_on_data(model, inputs)
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class Statistics:
    """What reaches a norm on data: per channel ``(C,)``, in float64.

    Args:
        mean: E[x].
        var: E[(x − E[x])²].
        values: How many values of a channel these are of.
        samples: Of how many samples.
    """

    mean: Tensor
    var: Tensor
    values: int
    samples: int

    @classmethod
    def of(cls, x: Tensor) -> Statistics:
        """Return the statistics of ``(N, C, …)``."""
        x = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        return cls(mean.double(), var.double(), x[:, 0].numel(), len(x))

    def __add__(self, other: Statistics) -> Statistics:  # as Chan, Golub, LeVeque 1979 merge variances
        values = self.values + other.values
        share = other.values / values
        step = other.mean - self.mean
        var = (1 - share) * self.var + share * other.var + share * (1 - share) * step.square()
        return Statistics(self.mean + share * step, var, values, self.samples + other.samples)


def over_processes(found: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """Return the statistics of what all processes have found, by name."""
    if alone():
        return dict(found)

    def weighed(one: Statistics, value: Tensor) -> list[Tensor]:
        counts = one.mean.new_tensor([one.values, one.samples])
        return [counts, one.values * value]

    firsts = summed_by_name("means", {name: weighed(one, one.mean) for name, one in found.items()})
    means = {name: first / counts[0].clamp(min=1) for name, (counts, first) in firsts.items()}
    spreads = {
        name: weighed(one, one.var + (one.mean - means[name].to(one.mean)).square()) for name, one in found.items()
    }
    merged = {}
    for name, (counts, spread) in summed_by_name("variances", spreads).items():
        values, samples = (int(count) for count in counts)
        merged[name] = Statistics(means[name], spread / max(values, 1), values, samples)
    return merged


def measure_statistics(model: nn.Module, norms: Sequence[str], batches: Iterable[Batch]) -> dict[str, Statistics]:
    """Return the statistics at the inputs of ``norms`` over all batches, by fqn; read-only.

    Raises:
        InitializationError: They are not finite.
    """
    found: dict[str, Statistics] = {}

    def add(name: str, _: nn.Module, given: Sequence[Any]) -> None:
        x: Tensor = given[0]
        if x.numel():
            found[name] = found[name] + Statistics.of(x) if name in found else Statistics.of(x)

    watch_inputs(model, norms, batches, add)
    found = over_processes(found)
    for name, one in found.items():
        if not bool((one.mean + one.var).isfinite().all()):
            raise not_finite(f"'{name}'")
    return found


def not_finite(where: str) -> InitializationError:
    """Return the error about what reaches ``where``."""
    return InitializationError(
        f"the values that reach {where} are not finite",
        code="not-finite",
        hint="check the inputs, and what the model gives for them",
    )
