"""The values of recurrent layers that follow from data: what each of their matrices sees.

**Rows that lose their means** do it where it costs least. A row w of W_ih sees the inputs x of its layer, one of W_hh
the states h before each step. As for a filter, ``w = w₀ − C⁻¹1 (1ᵀw₀)/(1ᵀC⁻¹1)`` with C the covariance of what it sees,
and the bias gets ``E[(w₀ − w)·x]``.

**Layer normalization** starts as an affine map, see :mod:`normswap.initialization.null_space`. That of c cannot: its
deviation s over the units is taken for constant, and ``γ_c (c − mean c)/s + β_c`` fitted to c, per unit. **Batch
normalization** is one, with any statistics; it gets those that its matrices show.

What the layers and directions within a module see, no call shows: they are run one by one on what the module is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from normswap.errors import InitializationError, InputError, argument
from normswap.initialization.moments import Moments, centre, moments_of_covariance
from normswap.initialization.null_space import offsets
from normswap.nn.recurrent import ROWS
from normswap.recipes.recurrent.base import Start
from normswap.runs.calling import Batch
from normswap.runs.processes import summed_by_name
from normswap.runs.watching import watch_inputs
from normswap.stages.bound import BoundPlan
from normswap.stages.recurrent import BoundRecurrent

__all__ = ["centred"]


@dataclass
class _Sums:
    """What was seen of the vectors that a matrix multiplies."""

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    products: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: Tensor) -> None:
        rows = x.detach().double().flatten(0, -2)
        self.count += len(rows)
        self.total = self.total + rows.sum(0)
        self.products = self.products + rows.mT @ rows

    def moments(self) -> Moments:
        mean = self.total / self.count
        return moments_of_covariance(
            mean[None], (self.products / self.count - torch.outer(mean, mean))[None], self.count
        )


def centred(bound: BoundPlan, model: nn.Module, batches: Sequence[Batch] | None) -> BoundPlan:
    """Return the plan with the values that matrices whose rows lose their means get before; ``model`` is only read.

    Raises:
        InputError: There are such matrices and no data.
        InitializationError: The data does not reach a layer.
    """
    names = [step.site.name for step in bound.recurrent if step.recipe.needs_data]
    if not names:
        return bound
    if batches is None:
        recipe = next(step.recipe.name for step in bound.recurrent if step.recipe.needs_data)
        raise InputError(
            f"{argument('recurrent', recipe)} needs data, which show what the layers' matrices see, and none was given",
            code="no-calibration",
            hint=f"give {argument('calibration')}, some hundred unlabelled samples, or {argument('recurrent', 'wn')}",
        )
    cells = {step.site.name for step in bound.recurrent if step.recipe.reads_cell}
    seen = _watch(model, names, batches, cells)
    steps = []
    for step in bound.recurrent:
        if step.recipe.needs_data:
            if not seen[step.site.name]:
                raise InitializationError(
                    f"the calibration data never reaches '{step.site.name}'",
                    code="no-statistics",
                    hint="exclude it, or give data that reaches it",
                )
            module = model.get_submodule(step.site.name)
            found = _STARTS[step.recipe.start]
            step = dataclasses.replace(step, plain=found(step, module, seen[step.site.name]))
        steps.append(step)
    return dataclasses.replace(bound, recurrent=tuple(steps))


def _centred(step: BoundRecurrent, module: nn.Module, seen: Mapping[str, _Sums]) -> dict[str, Tensor]:
    """Return matrices whose rows have lost their means, and the biases that make up for these."""
    values: dict[str, Tensor] = {}
    for name in step.matrices:
        bias = name.replace("weight", "bias")
        weight, shift = centre(ROWS, _plain(module, name), seen[name].moments())
        values |= {name: weight, bias: _plain(module, bias) + shift}
    return values


def _normalized(step: BoundRecurrent, module: nn.Module, seen: Mapping[str, _Sums]) -> dict[str, Tensor]:
    """Return the tensors of a layer-normalized LSTM that begins as nearly ``module``.

    Raises:
        InitializationError: A matrix reads too much for that.
    """
    values: dict[str, Tensor] = {}
    recipe = step.recipe
    for name in step.matrices:
        weight = _plain(module, name)
        if name.startswith("weight_hr"):
            values[name] = weight
            continue
        products = seen[name].products / seen[name].count
        found = offsets(weight, products, getattr(recipe, "spread", 10.0), getattr(recipe, "eps", 1e-5))
        if found is None:
            raise InitializationError(
                f"the {name} of '{step.site.name}' reads {weight.shape[1]} values and gives {weight.shape[0]}: no "
                "scales of its rows let a norm behind it start as an affine map",
                code="no-null-space",
                hint=f"{argument('exclude', [step.site.name])}, or {argument('recurrent', 'wn')}",
            )
        bias = name.replace("weight", "bias")
        old = 0.0 if module._parameters.get(bias) is None else _plain(module, bias)
        norm = name.replace("weight", "ln").replace("ln_ih", "ln_ih_%s").replace("ln_hh", "ln_hh_%s")
        values |= {name: found.weight, bias: found.inner}
        values |= {norm % "weight": found.gain, norm % "bias": found.shift + old}
    for name, sums in seen.items():
        if name.startswith(_CELL):
            values |= _of_cell(name, sums)
    return values


def _of_cell(name: str, seen: _Sums) -> dict[str, Tensor]:
    """Return γ_c and β_c with which LN(c) is c in least squares, its deviation over the units being what it is in mean.

    A unit that does not differ from the mean of all has nothing to be told from: its gain is 0.
    """
    mean, products = seen.total / seen.count, seen.products / seen.count
    centring = torch.eye(len(mean)).to(mean) - 1 / len(mean)
    deviation = (centring @ products @ centring).diagonal().mean().sqrt()
    covariance = products - torch.outer(mean, mean)
    about = (centring @ covariance @ centring).diagonal()
    gain = torch.where(about > 0, (centring @ covariance).diagonal() / about, torch.zeros_like(about))
    names = (name.replace(_CELL, f"{_CELL}_{kind}") for kind in ("weight", "bias"))
    return dict(zip(names, (gain * deviation, mean - gain * (centring @ mean)), strict=True))


def _batch_normalized(step: BoundRecurrent, module: nn.Module, seen: Mapping[str, _Sums]) -> dict[str, Tensor]:
    """Return the tensors of a batch-normalized layer that is ``module``: ``γ = √(var + eps)``, ``b' = b + μ``."""
    values: dict[str, Tensor] = {}
    for name in step.matrices:
        weight, bias = _plain(module, name), name.replace("weight", "bias")
        values[name] = weight
        if name.startswith("weight_hr"):
            continue
        values[bias] = (
            _plain(module, bias) if module._parameters.get(bias) is not None else weight.new_zeros(len(weight))
        )
        if name.startswith("weight_ih") or not getattr(step.recipe, "input_only", False):
            sums = seen[name]
            mean, products = sums.total / sums.count, sums.products / sums.count
            var = torch.einsum("ij,jk,ik->i", weight, products - torch.outer(mean, mean), weight).clamp(min=0)
            values[bias] = values[bias] + weight @ mean
            norm = name.replace("weight", "bn").replace("bn_ih", "bn_ih_%s").replace("bn_hh", "bn_hh_%s")
            values |= {norm % "weight": (var + getattr(step.recipe, "eps", 1e-5)).sqrt()}
            values |= {norm % "mean": weight @ mean, norm % "var": var}
    return values


_CELL = "ln_c"
_STARTS = {Start.CENTRED_ROWS: _centred, Start.NULL_SPACE: _normalized, Start.STATISTICS: _batch_normalized}


def _plain(module: nn.Module, name: str) -> Tensor:
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter.detach().double()


def _watch(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch], cells: Collection[str]
) -> dict[str, dict[str, _Sums]]:
    """Return what each matrix of the named layers multiplies, and in those of ``cells`` c, over all batches."""
    seen: dict[str, dict[str, _Sums]] = {name: {} for name in names}

    def see(name: str, module: nn.Module, given: Sequence[Any]) -> None:
        for what, x in _multiplied(module, given[0], given[1] if len(given) > 1 else None, cell=name in cells):
            seen[name].setdefault(what, _Sums()).add(x)

    watch_inputs(model, names, batches, see)
    return {name: _over_processes(name, own) for name, own in seen.items()}


def _over_processes(layer: str, seen: Mapping[str, _Sums]) -> dict[str, _Sums]:
    sums = {name: [one.total.new_tensor(float(one.count)), one.total, one.products] for name, one in seen.items()}
    return {
        name: _Sums(int(count), total, products)
        for name, (count, total, products) in summed_by_name(f"'{layer}'", sums).items()
    }


def _multiplied(module: nn.Module, x: Any, hx: Any, *, cell: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each matrix and the vectors that it multiplies in one call of ``module``; with ``cell`` c."""
    if isinstance(module, nn.RNNCellBase):
        h = hx[0] if isinstance(hx, tuple) else hx
        yield "weight_ih", torch.atleast_2d(x)
        yield "weight_hh", torch.atleast_2d(x.new_zeros(*x.shape[:-1], module.hidden_size) if h is None else h)
        if cell:
            yield _CELL, torch.atleast_2d(module.forward(x, hx)[1])  # without its hooks, of which one runs now
        return
    assert isinstance(module, nn.RNNBase)
    if isinstance(x, PackedSequence):
        padded, lengths = pad_packed_sequence(x)
        for n, length in enumerate(lengths.tolist()):
            own = hx if hx is None else _each(hx, lambda s, n=n: s[:, n : n + 1])
            yield from _in_layers(module, padded[:length, n : n + 1], own, cell=cell)
        return
    if x.ndim == 2:
        x, hx = x[:, None], hx if hx is None else _each(hx, lambda s: s[:, None])
    elif module.batch_first:
        x = x.transpose(0, 1)
    yield from _in_layers(module, x, hx, cell=cell)


def _each(hx: Any, change: Any) -> Any:
    return tuple(map(change, hx)) if isinstance(hx, tuple) else change(hx)


def _in_layers(module: nn.RNNBase, x: Tensor, hx: Any, *, cell: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the same for inputs ``(T, N, in)``, layer by layer and direction by direction."""
    directions = 2 if module.bidirectional else 1
    for k in range(module.num_layers):
        outputs = []
        for d in range(directions):
            end = f"l{k}" + "_reverse" * d
            one = _one_layer(module, end, x.shape[-1])
            row = k * directions + d
            state = None if hx is None else _each(hx, lambda s, row=row: s[row : row + 1].contiguous())
            seen = x.flip(0) if d else x
            y = one(seen, state)[0]
            first = y.new_zeros(1, *y.shape[1:]) if state is None else state[0] if isinstance(state, tuple) else state
            yield f"weight_ih_{end}", seen
            yield f"weight_hh_{end}", torch.cat([first, y[:-1]])
            if cell:
                yield f"{_CELL}_{end}", _cells(one, seen, state)
            outputs.append(y.flip(0) if d else y)
        x = torch.cat(outputs, -1)


def _cells(one: nn.RNNBase, x: Tensor, state: Any) -> Tensor:
    """Return c after each step of a layer of one direction."""
    found = []
    for k in range(len(x)):
        _, state = one(x[k : k + 1], state)
        found.append(state[1][0])
    return torch.stack(found)


def _one_layer(module: nn.RNNBase, end: str, inputs: int) -> nn.RNNBase:
    """Return a layer of one direction with the tensors of ``module`` whose names end with ``end``."""
    own = {name: value for name, value in module._parameters.items() if name.endswith(f"_{end}") and value is not None}
    options: dict[str, Any] = {"proj_size": module.proj_size} if module.proj_size else {}
    options |= {"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}
    like = next(module.parameters())
    options |= {"device": like.device, "dtype": like.dtype}
    make: Any = type(module)
    one: nn.RNNBase = make(inputs, module.hidden_size, bias=module.bias, **options)
    one.load_state_dict({name.replace(f"_{end}", "_l0"): value for name, value in own.items()})
    return one
