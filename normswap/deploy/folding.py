"""Fold: reparameterized weights become plain weights, and what is affine in evaluation goes into a neighbour.

In evaluation a mean-only BatchNorm, a remaining BatchNorm and a per-channel affine all are ``y = a_c x + b_c``. Where
the graph proves that a convolution or linear layer feeds one and nothing else, ``W ← a W``, ``c ← a c + b``. Elsewhere
two in a row become one, and what is left becomes a depthwise 1×1 convolution.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import skip_init

from normswap.checks.comparison import Verification, training_modules
from normswap.checks.self_check import eval_output, keeps_output
from normswap.errors import FoldError, Text, VerificationError, argument
from normswap.graph import capture
from normswap.graph.after_norm import after_norm, read_batch_norm
from normswap.graph.code_reads import reads_in_code
from normswap.graph.dataflow import Dataflow
from normswap.graph.ops import is_norm
from normswap.graph.perturbation import confirm_feeds
from normswap.nn import ChannelAffine, ChannelLayerNorm, FilterLayout, MeanOnlyBatchNorm
from normswap.nn.kinds import is_layer
from normswap.nn.plain import make_plain
from normswap.records import text_table
from normswap.runs.calling import run_on
from normswap.runs.guard import copy_of
from normswap.runs.inputs import Inputs, example_of, make_up_inputs
from normswap.stages.forwards import is_rewritten, trace_own_forward
from normswap.storage.origin import forget

__all__ = ["FoldRow", "Folding", "fold", "fold_with_report"]

_PARTS = {"affine", "norm", "after"}
"""The names of the parts that stand in a norm's place (see rewriting)."""


@dataclass(frozen=True)
class FoldRow:
    """One thing that was folded, or was not: its fqn, what became of it, and the reason if it stays."""

    name: str
    result: str
    reason: str = ""


@dataclass(frozen=True)
class Folding:
    """What folding gave.

    Args:
        model: The folded model.
        rows: What was folded and how.
        left: What could not be folded, and why.
        check: The comparison of both models' outputs; None where there were no inputs for it, or no output on them.
    """

    model: nn.Module
    rows: tuple[FoldRow, ...]
    left: tuple[FoldRow, ...]
    check: Verification | None

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [(row.name, row.result, row.reason) for row in (*self.rows, *self.left)]
        return text_table(("what", "became", "why"), lines) if lines else "nothing to fold"


def fold(model: nn.Module, *, example_inputs: Any = None) -> nn.Module:
    """Return a copy of ``model`` with plain weights, for deployment; see :func:`fold_with_report`."""
    return fold_with_report(model, example_inputs=example_inputs).model


def fold_with_report(model: nn.Module, *, example_inputs: Any = None) -> Folding:
    """Return a copy of ``model`` with plain weights, what was folded, and what could not be.

    Weight norm (torch's two APIs, too), weight standardization and other parametrizations become plain weights;
    mean-only BatchNorms, remaining BatchNorms and per-channel affines go into the layer in front of them where the
    graph proves that they may. No module of this package is left where torch.nn has its like.

    Args:
        model: In eval mode.
        example_inputs: Inputs to compare both models on; without, inputs are made up where the model takes them. They
            also show, by runs, which layers feed what inside modules that cannot be traced.

    Raises:
        FoldError: The model is in train mode.
        VerificationError: The output moved.
    """
    if training := training_modules(model):
        raise FoldError(
            f"the model is in train mode ({training[0]!r} and {len(training) - 1} more modules)",
            code="fold-train-mode",
            hint="call model.eval() before folding",
        )
    folded = copy_of(model)
    inputs = example_of(model, example_inputs)
    if inputs is not None:
        _note_ranks(folded, inputs)
    rows: list[FoldRow] = []
    left: list[FoldRow] = []
    for name, reason in make_plain(folded):
        (left if reason else rows).append(FoldRow(name, "as it was" if reason else "a plain weight", reason))
    while done := _fold_affines(folded, inputs):
        rows += done
    _simplify(folded)
    for row in _replace_the_rest(folded):
        (left if row.reason else rows).append(row)
    folded = _plain_forwards(folded)
    forget(folded)
    return Folding(folded, tuple(rows), tuple(left), _check(model, folded, inputs))


@dataclass(frozen=True)
class _Affine:
    """``y = after(scale·x + shift)`` per channel, float64."""

    scale: Tensor
    shift: Tensor
    after: tuple[nn.Module, ...] = ()

    def rest(self) -> nn.Module:
        """Return what is left of the module once the affine is gone."""
        return nn.Sequential(*self.after) if len(self.after) > 1 else self.after[0] if self.after else nn.Identity()


def _as_affine(module: nn.Module) -> _Affine | None:
    """Return the per-channel affine that ``module`` is in evaluation, None if it is none."""
    if isinstance(module, ChannelAffine):
        return _Affine(module.weight.detach().double(), module.bias.detach().double())
    if isinstance(module, MeanOnlyBatchNorm):
        shift = module.bias.detach().double() - module.running_mean.double()
        return _Affine(torch.ones_like(shift), shift)
    if not is_norm(module):
        return None
    state, after = read_batch_norm(module), after_norm(module)
    if state.mean is None or isinstance(after, str):
        return None
    scale = state.gamma.double() * state.inverse_std
    return _Affine(scale, state.beta.double() - scale * state.mean.double(), after)


def _fold_affines(model: nn.Module, inputs: Inputs | None) -> list[FoldRow]:
    """Fold every affine that directly follows a layer, or another affine, into it; one pass over one capture."""
    flow = Dataflow(capture(model, inputs, modes=(False,)))
    named = reads_in_code(flow.capture)
    affines: dict[str, _Affine] = {}
    feeding: dict[str, str] = {}
    open_pairs: list[tuple[str, str]] = []
    for fqn in sorted(flow.order, key=flow.order.__getitem__):
        module = flow.capture.modules.get(fqn)
        if module is None or fqn in flow.functional:
            continue
        affine = _as_affine(module)
        if affine is None or module._forward_hooks or module._forward_pre_hooks:
            continue
        if fqn in named or any(
            flow.reads(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None
        ):
            continue  # the model reads its tensors or numbers outside of its call: it must stay
        found = flow.layer_feeding(fqn, affine.scale.numel(), _rank(flow, fqn), _takes_affine)
        if found.layer is None or found.reason:
            continue
        affines[fqn], feeding[fqn] = affine, found.layer
        if found.gap:
            open_pairs.append((found.layer, fqn))
    closed = confirm_feeds(model, open_pairs, inputs) if open_pairs and inputs is not None else {}
    rows: list[FoldRow] = []
    taken: set[str] = set()
    for fqn, layer in feeding.items():
        if fqn in taken or layer in taken or ((layer, fqn) in open_pairs and (layer, fqn) not in closed):
            continue
        affine = affines[fqn]
        _into(flow.capture.modules[layer], affine)
        rest = affine.rest()
        for name in flow.capture.names[fqn]:
            _replace(model, name, rest)
        taken |= {fqn, layer}
        rows.append(FoldRow(fqn, f"part of {layer}"))
    return rows


def _takes_affine(module: nn.Module) -> bool:
    return is_layer(module) or isinstance(module, ChannelAffine)


def _rank(flow: Dataflow, fqn: str) -> int | None:
    module = flow.capture.modules[fqn]
    known = module.rank if isinstance(module, (ChannelAffine, MeanOnlyBatchNorm)) else None
    seen = {axes for axes, _ in flow.capture.shapes.get(fqn, ())}
    return known or flow.rank(fqn, (seen.pop(), 0) if len(seen) == 1 else None)


def _into(layer: nn.Module, affine: _Affine) -> None:
    weight, bias = FilterLayout.weight(layer), layer.bias
    old = bias.detach().double() if isinstance(bias, Tensor) else torch.zeros_like(affine.shift)
    shift = affine.scale * old + affine.shift
    with torch.no_grad():
        if isinstance(layer, ChannelAffine):
            weight.copy_(weight.double() * affine.scale)
        else:
            weight.copy_(FilterLayout.of(layer).scale(weight.double(), affine.scale))
        layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)


def _note_ranks(model: nn.Module, inputs: Inputs) -> None:
    """Note the number of axes that reach the modules which may become a depthwise convolution."""

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        module.rank = args[0].ndim

    unknown = [m for m in model.modules() if isinstance(m, (ChannelAffine, MeanOnlyBatchNorm)) and m.rank is None]
    handles = [module.register_forward_pre_hook(note) for module in unknown]
    try:
        if handles:
            run_on(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def _replace(model: nn.Module, fqn: str, new: nn.Module) -> None:
    parent, _, name = fqn.rpartition(".")
    new.eval()
    model.get_submodule(parent)._modules[name] = new


def _simplify(model: nn.Module) -> None:
    """Take the identities that folding left out of the sequences that conversion made."""
    simpler: dict[int, nn.Module] = {}
    for fqn, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in simpler:
            _replace(model, fqn, simpler[id(module)])
            continue
        if type(module) is not nn.Sequential or not module._modules:
            continue
        if not all(name.rstrip("0123456789") in _PARTS for name in module._modules):
            continue
        kept = OrderedDict((n, m) for n, m in module._modules.items() if type(m) is not nn.Identity)
        hooked = module._forward_hooks or module._forward_pre_hooks
        if len(kept) == len(module._modules) or hooked or not fqn:
            continue
        only = next(iter(kept.values()), nn.Identity())
        simpler[id(module)] = only if len(kept) < 2 else nn.Sequential(kept)
        _replace(model, fqn, simpler[id(module)])


def _replace_the_rest(model: nn.Module) -> list[FoldRow]:
    """Replace what is still of this package by modules of torch.nn, where there are any."""
    rows = []
    names: dict[int, list[str]] = defaultdict(list)
    for fqn, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(fqn)
    for fqn, module in list(model.named_modules()):
        if isinstance(module, (ChannelAffine, MeanOnlyBatchNorm)):
            affine = _as_affine(module)
            assert affine is not None
            new = _depthwise(affine, module.rank, module.bias)
            if new is None or module._forward_hooks or module._forward_pre_hooks:
                unknown = Text(f"its input's number of axes is unknown: give {argument('example_inputs')}")
                why = "a forward hook is on it" if new else unknown
                rows.append(FoldRow(fqn, "as it was", why))
                continue
            what = "a diagonal Linear" if isinstance(new, nn.Linear) else f"a depthwise 1×1 {type(new).__name__}"
            rows.append(FoldRow(fqn, what))
            for name in names[id(module)]:
                _replace(model, name, new)
        elif isinstance(module, ChannelLayerNorm):
            rows.append(FoldRow(fqn, "as it was", "torch.nn has no layer normalization over channels"))
        elif is_norm(module):
            rows.append(FoldRow(fqn, "as it was", "no layer may take it up"))
    return rows


def _depthwise(affine: _Affine, rank: int | None, like: Tensor) -> nn.Module | None:
    channels = affine.scale.numel()
    if rank == 2:
        linear = skip_init(nn.Linear, channels, channels, device=like.device, dtype=like.dtype)
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.weight.copy_(torch.diag(affine.scale))
            linear.bias.copy_(affine.shift)
        return linear
    if rank not in (3, 4, 5):
        return None
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 3]
    conv = skip_init(make, channels, channels, 1, groups=channels, device=like.device, dtype=like.dtype)
    assert isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    with torch.no_grad():
        conv.weight.copy_(affine.scale.view_as(conv.weight))
        assert conv.bias is not None
        conv.bias.copy_(affine.shift)
    return conv


def _plain_forwards(model: nn.Module) -> nn.Module:
    """Turn modules whose forward was rewritten, whose class no file defines, into GraphModules of their eval graph."""
    rewritten = [name for name, module in model.named_modules() if is_rewritten(module)]
    for name in sorted(rewritten, key=lambda name: -name.count(".") - bool(name)):
        owner = model.get_submodule(name)
        plain = fx.GraphModule(owner, trace_own_forward(owner, training=False), class_name=type(owner).__name__)
        plain.eval()
        if not name:
            return plain
        _replace(model, name, plain)
    return model


def _check(model: nn.Module, folded: nn.Module, example: Inputs | None) -> Verification | None:
    inputs = example if example is not None else make_up_inputs(model)
    if inputs is None:
        return None
    check = keeps_output(eval_output(model, inputs), folded, inputs)
    if check is not None and not check.ok:
        raise VerificationError(
            f"folding moved the output by {check.max_rel:.1e} of its size (allowed {check.tolerance:.0e})",
            code="fold-mismatch",
            hint="report this model",
        )
    return check
