"""Fold: reparameterized weights become plain weights, and what is affine in evaluation goes into a neighbour."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import fx, nn

from normswap.checks.conversion import refuse_unfit
from normswap.checks.self_check import broken, eval_output, keeps_output, reference_output
from normswap.checks.verification import Verification
from normswap.deploy.affines import Fused, fuse_affines, is_hooked, put, rank_of, ranks_on, standing_alone
from normswap.deploy.conditions import at_class, without_identities
from normswap.deploy.rows import FoldRow
from normswap.errors import FoldError, InputError, Text, VerificationError, argument, marked
from normswap.nn import RankCheck
from normswap.nn.plain import make_plain
from normswap.norms import Affine, Stays, deployed
from normswap.records import text_table
from normswap.runs.guard import copy_of
from normswap.runs.inputs import Inputs, example_of, make_up_inputs
from normswap.runs.modes import training_modules
from normswap.runs.settings import settings_kept
from normswap.runs.wrappers import refuse_sharded, unwrapped
from normswap.stages.forwards import is_rewritten, trace_own_forward
from normswap.stages.references import followed
from normswap.storage.origin import forget

__all__ = ["Folding", "fold", "fold_with_report"]

_PARTS = {"rank", "affine", "front", "norm", "after"}
"""The names of the parts that stand in a norm's place (see rewriting)."""


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


def fold(model: nn.Module, *, example_inputs: Any = None, condition: Mapping[str, int] | None = None) -> nn.Module:
    """Return a copy of ``model`` with plain weights, for deployment; see :func:`fold_with_report`."""
    return fold_with_report(model, example_inputs=example_inputs, condition=condition).model


@settings_kept()  # a parametrization may draw random numbers wherever its weight is read
def fold_with_report(
    model: nn.Module, *, example_inputs: Any = None, condition: Mapping[str, int] | None = None
) -> Folding:
    """Return a copy of ``model`` with plain weights, what was folded, and what could not be.

    Weight norm (torch's two APIs, too), weight standardization and other parametrizations become plain weights;
    mean-only BatchNorms, remaining BatchNorms and per-channel affines go into the layer in front of them where the
    graph proves that they may. No module of this package is left where torch.nn has its like; each that is left is
    listed with the reason.

    Args:
        model: In eval mode. Of an AveragedModel its module is folded.
        example_inputs: Inputs to compare both models on; without, inputs are made up where the model takes them. They
            also show, by runs, which layers feed what inside modules that cannot be traced.
        condition: The class at which a class-conditional model is folded, by the name of the argument that gives it:
            ``{"label": 3}``. The folded model does not take that argument, and γ and β of the class go where other
            per-channel affines go. It needs example inputs, with the class as a whole number for each sample.

    Raises:
        FoldError: The model is in train mode, or cannot be written as a graph, which ``condition`` needs.
        InputError: A tensor of the model holds values that are none, or the model does not run on the inputs.
        VerificationError: The output moved.
    """
    model, _ = unwrapped(model)
    if training := training_modules(model):
        raise FoldError(
            f"the model is in train mode ({training[0]!r} and {len(training) - 1} more modules)",
            code="fold-train-mode",
            hint="call model.eval() before folding",
        )
    refuse_sharded(model)
    refuse_unfit(model)
    folded, inputs = copy_of(model), example_of(model, example_inputs)
    fixed = None if condition is None else at_class(folded, condition, inputs)
    given = inputs
    rows: list[FoldRow] = []
    left: list[FoldRow] = []
    if fixed is not None:
        folded, given, inputs = fixed.model, fixed.original, fixed.inputs
        rows += fixed.held
        left += fixed.left
    ranks = {} if inputs is None else ranks_on(folded, inputs)
    for name, reason in make_plain(folded):
        (left if reason else rows).append(FoldRow(name, "as it was" if reason else "a plain weight", reason))
    try:
        fused = _fused(folded, inputs, ranks)
        while fused.rows:
            rows += fused.rows
            fused = _fused(folded, inputs, ranks)
    except InputError as error:
        if error.code != "inputs-do-not-run":
            raise
        if given is not None:
            eval_output(model, given)  # raises it, too, where the inputs are to blame
        raise broken(error, _hint_for(error)) from error.__cause__
    with followed(folded):
        _simplify(folded)
        for row in _replace_the_rest(folded, ranks, fused.left):
            (left if row.reason else rows).append(row)
    if fixed is not None:
        without_identities(fixed.model)
    folded = _plain_forwards(folded)
    forget(folded)
    return Folding(folded, tuple(rows), tuple(left), _check(model, folded, given, inputs))


def _hint_for(error: InputError) -> str:
    """Return what to do where a folded model does not run."""
    if isinstance(error.__cause__, AttributeError):
        return "a forward asks a part for what its like in torch.nn does not have: let it do without"
    return "report this model"


def _fused(model: nn.Module, inputs: Inputs | None, ranks: Mapping[int, int]) -> Fused:
    with followed(model):
        return fuse_affines(model, inputs, ranks)


def _simplify(model: nn.Module) -> None:
    """Take the identities that folding left out of the sequences that conversion made, where no graph names them."""
    named = _named_by_graphs(model)
    simpler: dict[int, nn.Module] = {}
    for fqn, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in simpler:
            put(model, fqn, simpler[id(module)])
            continue
        if type(module) is not nn.Sequential or not module._modules:
            continue
        if not all(name.rstrip("0123456789") in _PARTS for name in module._modules):
            continue
        kept = OrderedDict((n, m) for n, m in module._modules.items() if type(m) is not nn.Identity)
        if len(kept) == len(module._modules) or is_hooked(module) or not fqn or id(module) in named:
            continue
        only = next(iter(kept.values()), nn.Identity())
        simpler[id(module)] = only if len(kept) < 2 else nn.Sequential(kept)
        put(model, fqn, simpler[id(module)])


def _named_by_graphs(model: nn.Module) -> set[int]:
    """Return the ids of the modules of which a graph within ``model`` calls or reads a part by its name."""
    found = set()
    for owner in model.modules():
        if isinstance(owner, fx.GraphModule):
            calls = (node for node in owner.graph.nodes if node.op in ("call_module", "get_attr"))
            named = [str(node.target).split(".") for node in calls]
            parents = {".".join(parts[:end]) for parts in named for end in range(1, len(parts))}
            found |= {id(m) for fqn, m in owner.named_modules(remove_duplicate=False) if fqn in parents}
    return found


def _replace_the_rest(model: nn.Module, ranks: Mapping[int, int], left: Mapping[int, str]) -> list[FoldRow]:
    """Replace what is still left to fold by modules of torch.nn, where there are any, and say what stays.

    ``left`` says why no layer takes an affine up, by the module's id.
    """
    rows = []
    names: dict[int, list[str]] = defaultdict(list)
    for fqn, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(fqn)
    for fqn, module in list(model.named_modules()):
        answer = deployed(module)
        if isinstance(module, RankCheck):
            for name in names[id(module)]:
                put(model, name, module.plain())
            what = f"a Flatten(-1, {module.rank - 1}), which lets inputs of {module.rank} axes through alone"
            rows.append(FoldRow(fqn, what))
        elif isinstance(answer, Stays):
            rows.append(FoldRow(fqn, "as it was", answer.reason))
        elif isinstance(answer, Affine):
            new, why = _in_place_of(module, answer, ranks, left)
            if new is None:
                rows.append(FoldRow(fqn, "as it was", why))
                continue
            what = "a diagonal Linear" if isinstance(new, nn.Linear) else f"a depthwise 1×1 {type(new).__name__}"
            if answer.rank is None or answer.rank_by_example:
                check = RankCheck(rank_of(module, answer, ranks) or 0).plain()
                what += f" for inputs of {check.end_dim + 1} axes alone, as the example inputs have"
                new = nn.Sequential(OrderedDict(rank=check, affine=new))
            rows.append(FoldRow(fqn, what))
            for name in names[id(module)]:
                put(model, name, new)
    return rows


def _in_place_of(
    module: nn.Module, affine: Affine, ranks: Mapping[int, int], left: Mapping[int, str]
) -> tuple[nn.Module | None, str]:
    """Return what stands in the place of an affine that no layer has taken up, or None and why there is nothing."""
    if affine.otherwise is not None:
        return None, Text(f"no layer takes it up: {marked(left[id(module)])}")
    like = next(chain(module.parameters(), module.buffers()))
    new = standing_alone(affine, rank_of(module, affine, ranks), like)
    if new is None:
        return None, Text(f"its input's number of axes is unknown: give {argument('example_inputs')}")
    if is_hooked(module):
        return None, "a forward hook is on it"
    return new, ""


def _plain_forwards(model: nn.Module) -> nn.Module:
    """Turn modules whose forward was rewritten, whose class no file defines, into GraphModules of their eval graph."""
    rewritten = [name for name, module in model.named_modules() if is_rewritten(module)]
    for name in sorted(rewritten, key=lambda name: -name.count(".") - bool(name)):
        owner = model.get_submodule(name)
        plain = fx.GraphModule(owner, trace_own_forward(owner, training=False), class_name=type(owner).__name__)
        plain.eval()
        if not name:
            return plain
        put(model, name, plain)
    return model


def _holds_rank(module: nn.Module) -> bool:
    """Tell whether ``module`` is what :meth:`RankCheck.plain` makes."""
    return isinstance(module, nn.Flatten) and module.start_dim == -1


def _check(model: nn.Module, folded: nn.Module, given: Inputs | None, example: Inputs | None) -> Verification | None:
    """Compare both models: the folded one on ``example``, the other on ``given``, which may have a class more."""
    inputs = example if example is not None else make_up_inputs(model, folded)
    if inputs is None and not any(_holds_rank(module) for module in folded.modules()):
        inputs = make_up_inputs(model)  # nothing explains that the folded model takes no input that the model takes
    if inputs is None:
        return None
    check = keeps_output(reference_output(model, inputs if given is None else given), folded, inputs)
    if check is not None and not check.ok:
        raise VerificationError(
            f"folding moved the output by {check.max_rel:.1e} of its size (allowed {check.tolerance:.0e})",
            code="fold-mismatch",
            hint="report this model",
        )
    return check
