"""Affines of a model in evaluation, per channel, and the layers that they are fused into.

In evaluation a mean-only BatchNorm, a remaining BatchNorm and a per-channel affine all are ``y = a_c x + b_c``. Where
the graph proves that a convolution or linear layer feeds one and nothing else, ``W ← a W``, ``c ← a c + b``; so do two
affines in a row become one. Where a layer without zero padding reads one and nothing else does, that layer takes it up
(:mod:`normswap.nn.readers`). What is left becomes a 1×1 convolution of each channel by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from normswap.deploy.rows import FoldRow
from normswap.errors import Text, argument, marked
from normswap.graph import capture
from normswap.graph.after_norm import after_norm
from normswap.graph.code_reads import reads_in_code
from normswap.graph.dataflow import Dataflow
from normswap.graph.perturbation import confirm_feeds
from normswap.graph.reading import reader_of
from normswap.nn import FilterLayout, RankCheck
from normswap.nn.kinds import is_layer
from normswap.nn.readers import fused_inputs
from normswap.norms import Affine, deployed
from normswap.runs.calling import run_on_data
from normswap.runs.guard import untouched
from normswap.runs.inputs import Inputs

__all__ = ["Fused", "fuse_affines", "is_hooked", "put", "rank_of", "ranks_on", "standing_alone"]

Ranks = Mapping[int, int]
"""The number of axes that reach a module, by its id."""


@dataclass(frozen=True)
class Fused:
    """What one pass has fused.

    Args:
        rows: A row for each affine that is gone.
        left: Why each of the others is left, by the module's id.
    """

    rows: tuple[FoldRow, ...]
    left: Mapping[int, str]


@dataclass(frozen=True)
class _Fusion:
    """An affine that a layer, or another affine, may take up.

    Args:
        affine: The affine.
        after: What comes after it in its module.
        target: What takes it up.
        behind: Whether that is the layer that reads the affine.
        rank: The number of axes that inputs are held to, as only an example shows it; None for any.
        gap: What is not proven, where a run may close it.
    """

    affine: Affine
    after: tuple[nn.Module, ...]
    target: str
    behind: bool = False
    rank: int | None = None
    gap: str | None = None


def fuse_affines(model: nn.Module, inputs: Inputs | None, ranks: Ranks) -> Fused:
    """Fuse every affine that directly follows a layer, or another affine, into it; one pass over one capture."""
    flow = Dataflow(capture(model, inputs, modes=(False,)))
    fusions: dict[str, _Fusion] = {}
    left: dict[int, str] = {}
    named = reads_in_code(flow.capture)
    for fqn in sorted(flow.capture.modules, key=lambda fqn: flow.order.get(fqn, len(flow.order))):
        module = flow.capture.modules[fqn]
        if not isinstance(deployed(module), Affine):
            continue
        found = _why_stays(flow, fqn, module) or named.get(fqn) or _fusion(flow, fqn, module, ranks)
        if inputs is None and isinstance(found, str) and not flow.calls.get(fqn) and flow.opaque_ancestor(fqn):
            found = Text(f"{marked(found)}: give {argument('example_inputs')}")
        if isinstance(found, _Fusion):
            fusions[fqn] = found
        else:
            left[id(module)] = found
    open_pairs = [(one.target, fqn) for fqn, one in fusions.items() if one.gap]
    closed = confirm_feeds(model, open_pairs, inputs) if open_pairs and inputs is not None else {}
    rows: list[FoldRow] = []
    taken: set[str] = set()
    for fqn, one in sorted(fusions.items(), key=lambda item: item[1].behind):
        if one.gap and (one.target, fqn) not in closed:
            missing = Text(f"give {argument('example_inputs')}")
            tail = marked(missing) if inputs is None else "the example inputs do not show it"
            left[id(flow.capture.modules[fqn])] = Text(f"{one.gap}: {tail}")
            continue
        if fqn in taken or one.target in taken:
            continue
        target = flow.capture.modules[one.target]
        (_into_reader if one.behind else _into)(target, one.affine)
        rest = _rest(one.after, one.rank if is_layer(target) or one.behind else None)
        for name in flow.capture.names[fqn]:
            put(model, name, rest)
        taken |= {fqn, one.target}
        rows.append(FoldRow(fqn, f"part of {one.target}"))
    return Fused(tuple(rows), left)


def _fusion(flow: Dataflow, fqn: str, module: nn.Module, ranks: Ranks) -> _Fusion | str:
    """Return what may take up the affine that ``module`` is, or why nothing may."""
    affine, after = deployed(module), after_norm(module)
    assert isinstance(affine, Affine)
    if isinstance(after, str):
        return after
    rank, by_example = _rank(flow, fqn, affine, ranks)
    held = rank if by_example else None
    channels = affine.factor.numel()
    feeds = flow.layer_feeding(fqn, channels, rank, _takes_affine)
    if feeds.layer is not None and not feeds.reason:
        return _Fusion(affine, after, feeds.layer, rank=held, gap=feeds.gap)
    reading = reader_of(flow, fqn, channels, rank)
    if reading.layer is not None and not reading.reason and not after:
        return _Fusion(affine, after, reading.layer, behind=True, rank=held)
    reasons = [marked(reason) for reason in (feeds.reason, reading.reason) if reason]
    return Text("; ".join(reasons) or "what feeds it is not known")


def _why_stays(flow: Dataflow, fqn: str, module: nn.Module) -> str:
    """Return who sees the module otherwise than by its calls: a hook, or a read of its tensors; nothing if no one."""
    if is_hooked(module):
        return "a forward hook is on it"
    if fqn in flow.functional:
        return "a forward calls batch_norm with its tensors"
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    return "the model reads its parameters or statistics outside of its call" if any(map(flow.reads, tensors)) else ""


def is_hooked(module: nn.Module) -> bool:
    """Tell whether a hook on its calls keeps an affine where it is."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _takes_affine(module: nn.Module) -> bool:
    """Tell whether an affine may go into ``module``: into a layer, or into an affine that is one by its parameters."""
    if is_layer(module):
        return True
    affine = deployed(module)
    return isinstance(affine, Affine) and affine.otherwise is None and {*module._parameters} == {"weight", "bias"}


def _rank(flow: Dataflow, fqn: str, affine: Affine, ranks: Ranks) -> tuple[int | None, bool]:
    """Return the number of axes that reach an affine, and whether only example inputs show it."""
    seen = {axes for axes, _ in flow.capture.shapes.get(fqn, ())}
    shown = rank_of(flow.capture.modules[fqn], affine, ranks) or (seen.pop() if len(seen) == 1 else None)
    proven = (None if affine.rank_by_example else affine.rank) or flow.rank(fqn)
    # The graph takes the input of a Conv1d to be batched; a run may show that it is not.
    return shown or proven, proven is None or shown not in (None, proven)


def rank_of(module: nn.Module, affine: Affine, ranks: Ranks) -> int | None:
    """Return the number of axes that reach an affine: by itself or by the example inputs, the newest first."""
    return ranks.get(id(module)) or affine.rank


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


def _rest(after: tuple[nn.Module, ...], rank: int | None) -> nn.Module:
    """Return what is left of a norm once its affine is gone; with ``rank``, its inputs are held to so many axes."""
    left = after if rank is None else (RankCheck(rank), *after)
    return nn.Sequential(*left) if len(left) > 1 else left[0] if left else nn.Identity()


def ranks_on(model: nn.Module, inputs: Inputs) -> dict[int, int]:
    """Return the numbers of axes that reach the affines which do not know them, by a run on ``inputs``."""
    found: dict[int, int] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        found[id(module)] = args[0].ndim

    answers = ((module, deployed(module)) for module in model.modules())
    affines = ((m, a) for m, a in answers if isinstance(a, Affine) and a.otherwise is None)
    unknown = [module for module, affine in affines if affine.rank is None or affine.rank_by_example]
    handles = [module.register_forward_pre_hook(note) for module in unknown]
    try:
        if handles:
            with untouched(model):
                run_on_data(model, inputs)
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
