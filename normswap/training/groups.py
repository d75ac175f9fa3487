"""Groups of parameters for an optimizer: which of them decay, and at which rate each part of the model learns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from normswap.errors import InputError, argument
from normswap.norms import norm_of
from normswap.runs.wrappers import refuse_no_module

__all__ = ["parameter_groups"]


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    lr: float | None = None,
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Return an optimizer's groups: weight decay for what has a direction, none for what is one value per channel.

    No decay get γ and β of every norm, of whatever shape, biases, weight normalization's g, weight standardization's
    gain and offset, per-channel affines, and all other parameters of fewer than two axes: to pull these to zero shrinks
    the function itself. Of a parametrized weight decays the original that is shaped as the weight.

    A rule by the number of axes, as timm's, would decay weight normalization's g, which is ``(C, 1, 1, 1)``; one by
    names, as Hugging Face's, would decay g, gain and offset, which are called ``original0`` to ``original2``.

    Args:
        model: The model; only read. Frozen parameters are left out, shared ones are in the groups once.
        weight_decay: The decay of those that decay.
        lr: The rate that ``rates`` are relative to.
        rates: Factors of ``lr`` by glob patterns of parameter names, such as ``{"backbone.*": 0.1}``; the first that
            fits decides. With them each group has its own ``lr``.

    Returns:
        Groups for ``torch.optim.SGD(groups, lr=…)`` and others, those that decay first, none of them empty.

    Raises:
        InputError: A number does not fit, a pattern fits no parameter, or ``rates`` are given without ``lr``.
    """
    refuse_no_module(model)
    _refuse_wrong("weight_decay", weight_decay)
    if rates is not None and (not isinstance(rates, Mapping) or not all(isinstance(one, str) for one in rates)):
        raise InputError(
            f"{argument('rates')} must give factors by globs of names, got {rates!r}",
            code="option-type",
            hint="give a dict such as {'backbone.*': 0.1}",
        )
    for pattern, factor in (rates or {}).items():
        _refuse_wrong(f"rates[{pattern!r}]", factor)
    if rates and lr is None:
        raise InputError(
            f"{argument('rates')} are factors of a rate, and none was given",
            code="no-rate",
            hint=f"give {argument('lr')}, the rate of what no pattern fits",
        )
    if lr is not None:
        _refuse_wrong("lr", lr)
    decaying = _decaying(model)
    names = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for pattern in rates or {}:
        if not any(fnmatchcase(name, pattern) for name, _ in model.named_parameters()):
            raise InputError(
                f"{argument('rates')} has {pattern!r}, which fits no parameter",
                code="no-such-parameter",
                hint="take the names from model.named_parameters(), such as 'backbone.*'",
            )
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in names:
        factor = next((float(f) for pattern, f in (rates or {}).items() if fnmatchcase(name, pattern)), 1.0)
        decays = id(parameter) in decaying
        group = groups.setdefault(
            (factor, decays), {"params": [], "weight_decay": float(weight_decay) if decays else 0.0}
        )
        group["params"].append(parameter)
        if rates and lr is not None:
            group["lr"] = lr * factor
    return [group for _, group in sorted(groups.items(), key=lambda found: not found[0][1])]


def _refuse_wrong(name: str, value: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise InputError(
            f"{argument(name, value)} is no rate", code="bad-number", hint="give a number that is at least 0 and finite"
        )


def _decaying(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that decay."""
    found: set[int] = set()
    barred: set[int] = set()
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        if norm_of(module) is not None:
            barred |= {id(parameter) for parameter in module.parameters(recurse=False)}
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and not name.startswith("bias") and parameter.ndim > 1:
                found.add(id(parameter))
        if parametrize.is_parametrized(module):
            found |= _directions(module)
        if "weight_v" in module._parameters and "weight_g" in module._parameters:  # torch's old weight norm
            barred.add(id(module._parameters["weight_g"]))
    return found - barred


def _directions(module: nn.Module) -> set[int]:
    """Return the ids of the originals that are shaped as what they parametrize; the last, where several are."""
    found = set()
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    for name, originals in parametrizations.items():
        value = getattr(module, name)
        alike = [one for one in originals.parameters(recurse=False) if one.shape == value.shape]
        if isinstance(value, Tensor) and value.ndim > 1 and not name.startswith("bias") and alike:
            found.add(id(alike[-1]))
    return found
