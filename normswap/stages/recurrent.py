"""Recurrent layers: which of a model can be reparameterized, the plan's steps for them, and carrying these out.

A recurrent layer stands next to no norm, so it is no site of a norm, and no conversion touches it unless it is asked
to. Each row of its matrices makes one value of one gate: the layer computes the same whoever calls it, with whatever
state and however often, as long as its matrices are the same. So nothing has to be known of the dataflow but that the
layer alone owns and reads its matrices.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.utils import parametrize

from normswap.errors import Text, argument, parameter
from normswap.graph.bytecode import codes_of
from normswap.graph.dataflow import Dataflow
from normswap.nn.kinds import class_of
from normswap.nn.plain import legacy_hooks
from normswap.nn.recurrent import RECURRENT_CALLS, ROWS, is_recurrent, make_live, matrices_of
from normswap.norms import NewValue, apply, tensor_in
from normswap.options import Options
from normswap.recipes.recurrent import RecurrentRecipe, make_recurrent
from normswap.records import InitRow, Plan, RecurrentSite, RecurrentStep, Skip
from normswap.stages.misfits import misfit, submodule
from normswap.stages.other_layers import replaced, why_irreplaceable
from normswap.weights import Weight

__all__ = ["BoundRecurrent", "bind_recurrent", "bound_at", "carry_out", "find_recurrent", "unasked"]


@dataclass(frozen=True)
class BoundRecurrent:
    """One step of a plan for a recurrent layer, with the form that its matrices get.

    Args:
        step: The step.
        recipe: The recipe.
        weight: The form of the matrices; None where another layer comes in the layer's place.
        plain: Values that the layer's tensors get before, by their names.
    """

    step: RecurrentStep
    recipe: RecurrentRecipe
    weight: Weight | None
    plain: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def site(self) -> RecurrentSite:
        """The layer."""
        return self.step.site

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of the matrices that get the form."""
        return self.recipe.matrices(self.site)

    @property
    def row(self) -> InitRow:
        """How the layer got its values."""
        return InitRow(self.site.name, "exact" if self.recipe.exact else f"{self.step.weight}, on data")


def find_recurrent(flow: Dataflow) -> Iterator[RecurrentSite | Skip]:
    """Yield every recurrent layer of a captured model: as a site, or as a skip with the reason why it is none."""
    yield from _functional(flow)
    for fqn, module in flow.capture.modules.items():
        if is_recurrent(module):
            site = _site(fqn, module, tuple(name for name in flow.capture.names[fqn] if name != fqn))
            reason = site if isinstance(site, str) else _why_not(flow, fqn, site)
            if isinstance(site, RecurrentSite) and not reason:
                yield replace(site, irreplaceable=why_irreplaceable(flow.capture.model, module))
            else:
                yield Skip(fqn, "recurrent layer", class_of(module).__name__, "recurrent-refused", reason)


def _functional(flow: Dataflow) -> Iterator[Skip]:
    """Yield a skip for each function that computes a recurrent layer from tensors, once per module that calls it."""
    found = {
        (flow.capture.aliases[node.meta["owner"]], RECURRENT_CALLS[node.target])
        for trace in flow.capture.traces
        for node in trace.graph.nodes
        if node.op == "call_function" and node.target in RECURRENT_CALLS
    }
    if is_recurrent(flow.capture.model):  # a trace of the model is one of torch's own forward
        found = {(owner, name) for owner, name in found if owner}
    for owner, name in sorted(found):
        why = "it is called functionally: its matrices are left as they are"
        yield Skip(f"{owner}:{name}", "recurrent layer", name, "functional-recurrent", why)


def _site(fqn: str, module: nn.Module, aliases: tuple[str, ...] = ()) -> RecurrentSite | str:
    """Return the site that ``module`` is, or why it is none."""
    if parametrize.is_parametrized(module):
        return "its matrices are already parametrized"
    if class_of(module).__module__.startswith("normswap.nn."):
        return "it is normalized already"
    matrices = matrices_of(module)
    if matrices is None:
        return f"{type(module).__name__} is a class of its own, and may read its matrices in its own way"
    if "forward" in vars(module):
        return "its forward was replaced on the instance, and may read its matrices in its own way"
    if hooks := legacy_hooks(module):
        return f"a {hooks[0].what} hook computes its {hooks[0].tensor}"
    if module._forward_pre_hooks:
        return "a forward pre-hook is on it, and may write its matrices"
    if missing := [name for name in matrices if module._parameters.get(name) is None]:
        return f"its {missing[0]} is no parameter: the model computes it"
    assert isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    sizes = (module.input_size, module.hidden_size, matrices)
    if isinstance(module, nn.RNNCellBase):
        return RecurrentSite(fqn, type(module).__name__, *sizes, aliases=aliases, bias=module.bias)
    form = (module.num_layers, bool(module.bidirectional), module.proj_size)
    return RecurrentSite(fqn, type(module).__name__, *sizes, *form, aliases, module.bias)


def _why_not(flow: Dataflow, fqn: str, site: RecurrentSite) -> str:
    """Return what else owns or reads the matrices, or nothing."""
    if not fqn:  # the model itself: nothing is around it
        return ""
    if leaf := flow.enclosing_leaf(fqn):
        return f"it belongs to {leaf}, whose own code calls it"
    return flow.why_shared(fqn) or _named_in_hidden_code(flow, fqn, {*site.matrices, "_flat_weights", "all_weights"})


def _named_in_hidden_code(flow: Dataflow, fqn: str, tensors: set[str]) -> str:
    """Return which forward around the layer could not be seen and names one of its matrices, or nothing.

    What it does with the matrix is not known: a value that it writes there would be lost.
    """
    around = flow.opaque_ancestor(fqn)
    if around is None or any(trace.recorded for trace in flow.capture.traces):
        return ""
    for opaque in flow.capture.opaque:
        module = flow.capture.modules[flow.capture.aliases[opaque]]
        for found in codes_of(module):
            if named := sorted(tensors & (found.code.names | found.code.strings)):
                why = f"the forward of {class_of(module).__name__} cannot be traced and names {named[0]}"
                return Text(f"{why}: give {argument('example_inputs')}, which show what it does with it")
    return ""


def unasked(site: RecurrentSite) -> Skip:
    """Return the skip of a recurrent layer that nobody asked for."""
    why = Text(
        f"recurrent layers stay unless asked for: {argument('recurrent', 'wn')} normalizes the rows of their matrices, "
        "exactly"
    )
    return Skip(site.name, "recurrent layer", site.type, "recurrent", why)


def bound_at(
    site: RecurrentSite, recipe: RecurrentRecipe | None, options: Options, readers: Collection[str | None]
) -> BoundRecurrent | Skip:
    """Return what ``recipe`` does at ``site``, or why it does nothing there; ``readers`` take norms up."""
    if recipe is None:
        return unasked(site)

    def excluded(reason: str) -> Skip:
        return Skip(site.name, "recurrent layer", site.type, "excluded", reason)

    if not any(fnmatchcase(name, glob) for name in site.names for glob in options.include):
        return excluded(Text(f"no pattern of {parameter('include')} matches it"))
    for glob in options.exclude:
        if any(fnmatchcase(name, glob) for name in site.names):
            return excluded(f"the pattern {glob!r} excludes it")
    weight = recipe.weight()
    found = _bound(RecurrentStep(site, str(recipe.name if weight is None else weight.name)), recipe)
    reason = recipe.refuse(site) or (site.irreplaceable if weight is None else None)
    if reason is None and recipe.needs_data and site.name in readers:
        reason = "a BatchNorm goes into its matrix, for which it gets values as it is"
    if reason is not None:
        return Skip(site.name, "recurrent layer", site.type, "recipe-refuses", reason)
    return found


def _bound(step: RecurrentStep, recipe: RecurrentRecipe) -> BoundRecurrent:
    return BoundRecurrent(step, recipe, recipe.weight())


def bind_recurrent(plan: Plan, model: nn.Module) -> tuple[BoundRecurrent, ...]:
    """Return the steps of a plan that was made before, bound to ``model``, which is only read.

    Raises:
        PlanError: The plan was made for another architecture.
    """
    if not plan.recurrent:
        return ()
    recipe = make_recurrent(plan.recurrent_recipe, plan.recurrent_options)
    assert recipe is not None
    for step in plan.recurrent:
        module = submodule(model, step.site.name, plan)
        if not is_recurrent(module):
            raise misfit(plan, f"'{step.site.name}' is a {class_of(module).__name__} and no recurrent layer")
        found = _site(step.site.name, module, step.site.aliases)
        if isinstance(found, str):
            raise misfit(plan, f"'{step.site.name}': {found}")
        if replace(found, irreplaceable=step.site.irreplaceable) != step.site:
            what = f"'{step.site.name}' is {found.type} {found.sizes}"
            raise misfit(plan, f"{what}; the plan says {step.site.type} {step.site.sizes}")
    return tuple(_bound(step, recipe) for step in plan.recurrent)


def carry_out(model: nn.Module, plan: Plan, bound: BoundRecurrent) -> None:
    """Carry out one step, in place: parametrize the matrices, or put another layer into the layer's place.

    A layer that is parametrized stays the same object, with its hooks and under all of its names, and its matrices
    stay what they are.
    """
    module = submodule(model, bound.site.name, plan)
    if bound.weight is None:
        module = replaced(model, plan, bound.site, module, bound.recipe)
    apply({name: NewValue(value) for name, value in bound.plain.items()}, lambda name: tensor_in(module, name))
    if bound.weight is not None:
        _parametrize(module, bound, bound.weight)


def _parametrize(module: nn.Module, bound: BoundRecurrent, weight: Weight) -> None:
    make_live(module)
    for name in bound.matrices:
        matrix = module._parameters[name]
        assert matrix is not None
        old = matrix.detach().double()
        ones = old.new_ones(old.shape[0])
        values = {} if old.is_meta else weight.encode(ROWS, old, ones, matrix.dtype).values
        weight.register(module, name)
        apply(
            {key.replace(".weight.", f".{name}.", 1): value for key, value in values.items()},
            lambda key: tensor_in(module, key),
        )
    module.get_submodule("parametrizations").train(module.training)
