"""Affines of a model in evaluation, per channel, and the layers that they are fused into.

In evaluation a mean-only BatchNorm, a remaining BatchNorm and a per-channel affine all are ``y = a_c x + b_c``. Where
the graph proves that a convolution or linear layer feeds one and nothing else, ``W ← a W``, ``c ← a c + b``; so do two
affines in a row become one. Where a layer without zero padding reads one and nothing else does, that layer takes it up
(:mod:`normswap.nn.readers`). What is left becomes a 1×1 convolution of each channel by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from normswap.deploy.rows import FoldRow
from normswap.graph import capture
from normswap.graph.after_norm import after_norm
from normswap.graph.code_reads import reads_in_code
from normswap.graph.dataflow import Dataflow
from normswap.graph.perturbation import confirm_feeds
from normswap.graph.reading import reader_of
from normswap.nn import FilterLayout
from normswap.nn.kinds import is_layer
from normswap.nn.readers import fused_inputs
from normswap.norms import Affine, deployed
from normswap.runs.calling import run_on
from normswap.runs.guard import untouched
from normswap.runs.inputs import Inputs

__all__ = ["fuse_affines", "is_hooked", "put", "ranks_on", "standing_alone"]

Ranks = Mapping[int, int]
"""The number of axes that reach a module, by its id."""


def _affine_of(module: nn.Module) -> tuple[Affine, tuple[nn.Module, ...]] | None:
    """Return the affine that ``module`` is in evaluation, and what comes after it; None if it is none."""
    affine = deployed(module)
    if not isinstance(affine, Affine):
        return None
    after = after_norm(module)
    return None if isinstance(after, str) else (affine, after)


def fuse_affines(model: nn.Module, inputs: Inputs | None, ranks: Ranks) -> list[FoldRow]:
    """Fuse every affine that directly follows a layer, or another affine, into it; one pass over one capture."""
    flow = Dataflow(capture(model, inputs, modes=(False,)))
    affines: dict[str, tuple[Affine, tuple[nn.Module, ...]]] = {}
    feeding: dict[str, str] = {}  # by the norm: the layer in front of it
    reading_by: dict[str, str] = {}  # and the one behind it, where none in front may take it up
    open_pairs: list[tuple[str, str]] = []
    named = reads_in_code(flow.capture)
    for fqn in sorted(flow.order, key=flow.order.__getitem__):
        module = flow.capture.modules.get(fqn)
        if module is None or fqn in flow.functional or fqn in named or not _may_go(flow, module):
            continue
        found = _affine_of(module)
        if found is None:
            continue
        rank = _rank(flow, fqn, found[0], ranks)
        channels = found[0].factor.numel()
        feeds = flow.layer_feeding(fqn, channels, rank, _takes_affine)
        if feeds.layer is not None and not feeds.reason:
            affines[fqn], feeding[fqn] = found, feeds.layer
            if feeds.gap:
                open_pairs.append((feeds.layer, fqn))
            continue
        reading = reader_of(flow, fqn, channels, rank)
        if reading.layer is not None and not reading.reason and not found[1]:
            affines[fqn], reading_by[fqn] = found, reading.layer
    closed = confirm_feeds(model, open_pairs, inputs) if open_pairs and inputs is not None else {}
    rows: list[FoldRow] = []
    taken: set[str] = set()
    for fqn, layer in (*feeding.items(), *reading_by.items()):
        if fqn in taken or layer in taken or ((layer, fqn) in open_pairs and (layer, fqn) not in closed):
            continue
        affine, after = affines[fqn]
        (_into if fqn in feeding else _into_reader)(flow.capture.modules[layer], affine)
        rest = _rest(after)
        for name in flow.capture.names[fqn]:
            put(model, name, rest)
        taken |= {fqn, layer}
        rows.append(FoldRow(fqn, f"part of {layer}"))
    return rows


def _may_go(flow: Dataflow, module: nn.Module) -> bool:
    """Tell whether nobody sees the module but by its calls: no hook, and no read of its tensors."""
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    return not (is_hooked(module) or any(map(flow.reads, tensors)))


def is_hooked(module: nn.Module) -> bool:
    """Tell whether a hook on its calls keeps an affine where it is."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _takes_affine(module: nn.Module) -> bool:
    """Tell whether an affine may go into ``module``: into a layer, or into an affine that is one by its parameters."""
    if is_layer(module):
        return True
    affine = deployed(module)
    return isinstance(affine, Affine) and affine.otherwise is None and {*module._parameters} == {"weight", "bias"}


def _rank(flow: Dataflow, fqn: str, affine: Affine, ranks: Ranks) -> int | None:
    seen = {axes for axes, _ in flow.capture.shapes.get(fqn, ())}
    known = affine.rank or ranks.get(id(flow.capture.modules[fqn]))
    return known or flow.rank(fqn, (seen.pop(), 0) if len(seen) == 1 else None)


def _into(layer: nn.Module, affine: Affine) -> None:
    weight, bias = FilterLayout.weight(layer), layer.bias
    old = bias.detach().double() if isinstance(bias, Tensor) else torch.zeros_like(affine.shift)
    shift = affine.factor * old + affine.shift
    with torch.no_grad():
        weight.copy_(FilterLayout.of(layer).multiply_outputs(weight.double(), affine.factor))
        layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)


def _into_reader(layer: nn.Module, affine: Affine) -> None:
    trainable = next(layer.parameters()).requires_grad
    with torch.no_grad():
        for name, value in list(fused_inputs(layer, affine.factor, affine.shift)):
            old = layer._parameters.get(name)
            if old is None:  # a bias that there was not
                layer.register_parameter(name, nn.Parameter(value.to(next(layer.parameters()).dtype), trainable))
            else:
                old.copy_(value)


def _rest(after: tuple[nn.Module, ...]) -> nn.Module:
    """Return what is left of a norm once its affine is gone."""
    return nn.Sequential(*after) if len(after) > 1 else after[0] if after else nn.Identity()


def ranks_on(model: nn.Module, inputs: Inputs) -> dict[int, int]:
    """Return the numbers of axes that reach the affines which do not know them, by a run on ``inputs``."""
    found: dict[int, int] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        found[id(module)] = args[0].ndim

    answers = ((module, deployed(module)) for module in model.modules())
    unknown = [m for m, a in answers if isinstance(a, Affine) and a.rank is None and a.otherwise is None]
    handles = [module.register_forward_pre_hook(note) for module in unknown]
    try:
        if handles:
            with untouched(model):
                run_on(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def put(model: nn.Module, fqn: str, new: nn.Module) -> None:
    """Put ``new``, in eval mode, into the place ``fqn`` of ``model``."""
    parent, _, name = fqn.rpartition(".")
    new.eval()
    model.get_submodule(parent)._modules[name] = new


def standing_alone(affine: Affine, rank: int | None, like: Tensor) -> nn.Module | None:
    """Return the module of torch.nn that is an affine over ``rank`` axes; None where there is none.

    A convolution by 1×1 of each channel by itself, or a diagonal linear layer for vectors.
    """
    channels = affine.factor.numel()
    if rank == 2:
        linear = skip_init(nn.Linear, channels, channels, device=like.device, dtype=like.dtype)
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.weight.copy_(torch.diag(affine.factor))
            linear.bias.copy_(affine.shift)
        return linear
    if rank not in (3, 4, 5):
        return None
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 3]
    conv = skip_init(make, channels, channels, 1, groups=channels, device=like.device, dtype=like.dtype)
    assert isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    with torch.no_grad():
        conv.weight.copy_(affine.factor.view_as(conv.weight))
        assert conv.bias is not None
        conv.bias.copy_(affine.shift)
    return conv
