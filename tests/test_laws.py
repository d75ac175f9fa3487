"""Laws that hold for every recipe on every model of the zoo; a new recipe is tested without an edit here."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import laws
import pytest
import torch
import torch.nn.functional as F
from laws import (
    BY_NAME,
    EXACT,
    INEXACT,
    RECIPES,
    Case,
    absorbed,
    at_expected_statistics,
    case,
    changed,
    distance,
    filters,
    fingerprint,
    layers_of,
    new_norm,
    norms_of,
    not_finite,
    old_tensor,
    replayed,
    sharing,
    standardized,
    structure,
    without_centring_,
    zoo_name,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize
from zoo import ZOO, leaves

import normswap as ns
from normswap.errors import FoldError, InputError, NormswapError
from normswap.initialization import absorb as absorption
from normswap.nn import ChannelLayerNorm, MeanOnlyBatchNorm
from normswap.nn.kinds import Answering
from normswap.records import Plan

NAMES = [entry.name for entry in ZOO]
# The scope makes pytest try all laws on one entry before it goes to the next: no case has to be kept for longer. Each
# that is kept holds classes of parametrized layers, and torch.fx's patches of nn.Module go through all its subclasses.
ENTRIES = pytest.mark.parametrize("name", NAMES, scope="module")
ALL = pytest.mark.parametrize("recipe", RECIPES)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The models are tiny: a second thread only waits for the first, four times as long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_share(name: str, recipe: str, nth: int) -> bool:
    """Whether ``recipe`` is among every ``nth`` that are tried on an entry; on the next entry it is those beside."""
    return (RECIPES.index(recipe) - NAMES.index(name)) % nth == 0


def every(
    recipes: Sequence[str], given: Sequence[bool] | None = None, *, nth: int = 1
) -> Callable[[Callable[..., None]], Any]:
    """Make a check of (entry, recipe) a test of each entry that tries all recipes and names those that break it.

    With ``given`` the check gets a third argument: whether the entry's inputs are given as example inputs. Without them
    what is found depends little on the recipe, so every third one is tried. Of a check that converts or folds anew it
    is every ``nth``.
    """

    def decorate(check: Callable[..., None]) -> Any:
        def test(name: str) -> None:
            broken: dict[str, Exception | AssertionError] = {}
            for recipe in (one for one in recipes if in_share(name, one, nth)):
                values = [value for value in given or () if value or in_share(name, recipe, 3)]
                for extra in [()] if given is None else [(value,) for value in values]:
                    try:
                        check(name, recipe, *extra)
                    except Exception as error:
                        broken[recipe + ("" if extra != (False,) else " without inputs")] = error
            if broken:
                what = "\n".join(f"{recipe}: {type(e).__name__}: {e}" for recipe, e in broken.items())
                raise AssertionError(f"{name} breaks the law under\n{what}") from next(iter(broken.values()))

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return ENTRIES(test)

    return decorate


def test_a_law_names_the_recipes_that_break_it() -> None:
    def check(name: str, recipe: str, given: bool) -> None:
        assert recipe == "gn" or given

    name = NAMES[RECIPES.index("ln")]
    every(["gn"], [True, False])(check)(name)
    with pytest.raises(AssertionError, match=f"{name} breaks the law under\nln without inputs: AssertionError"):
        every(["gn", "ln"], [True, False])(check)(name)


def test_every_recipe_meets_its_share_of_the_entries() -> None:
    met: list[tuple[str, str]] = []

    @every(RECIPES, nth=3)
    def law(name: str, recipe: str) -> None:
        met.append((name, recipe))

    for name in NAMES:
        law(name)
    shares = Counter(recipe for _, recipe in met)
    assert {*shares} == {*RECIPES}
    assert min(shares.values()) >= len(NAMES) // 3
    assert {name for name, _ in met} == {*NAMES}


# ---------------------------------------------------------------------------------- what is refused, and left


# Every norm that stays although it was to be converted, by (entry, recipe) and with the plan's code; "*" is every
# recipe. This is with example inputs. A refusal that is not written here fails a test, and so does one that has gone.
NEEDS_LAYER = ", ".join(name for name, recipe in ns.all_recipes().items() if recipe.needs_layer)
REFUSALS: dict[tuple[str, str], dict[str, str]] = {
    ("norm_beside_groupnorm", "*"): {"1": "not-batch-norm"},
    ("no_running_statistics", "*"): {"1": "no-statistics"},
    ("relu_norm_subclass", "*"): {"1": "unknown-forward"},
    ("statistics_read_elsewhere", "*"): {"bn": "read-elsewhere"},
    ("functional_batch_statistics", "*"): {":batch_norm": "functional-norm"},
    ("user_graph_traced_in_training", "*"): {":3.running_mean": "functional-norm"},
    # These need a layer of their own for each norm, with more than one value per filter.
    ("depthwise_1x1", NEEDS_LAYER): {"1": "recipe-refuses"},
    # Weight standardization alone none of a depthwise convolution, whose filters would be blind to what only they see.
    ("depthwise_separable", "ws"): {"1": "recipe-refuses"},
    ("depthwise_multiplier", "ws"): {"1": "recipe-refuses"},
    ("transposed_conv2d_depthwise", "ws"): {"1": "recipe-refuses"},
    ("preactivation", NEEDS_LAYER): {"bn1": "recipe-refuses"},
    ("one_output_two_norms", NEEDS_LAYER): {"bn1": "recipe-refuses", "bn2": "recipe-refuses"},
    ("two_calls_two_norms", NEEDS_LAYER): {"bn1": "recipe-refuses", "bn2": "recipe-refuses"},
    ("conv_twice_norm_once", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("one_norm_two_convs", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("same_norm_in_two_places", NEEDS_LAYER): {"1": "recipe-refuses"},
    ("norm_on_one_of_two_uses", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("conv_output_returned_too", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("tied_weights", NEEDS_LAYER): {"bn1": "recipe-refuses", "bn2": "recipe-refuses"},
    ("aliases_called_by_both_names", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("weight_read_as_kernel", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("weight_read_by_penalty", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("bias_read_elsewhere", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("weight_read_by_parent", NEEDS_LAYER): {"block.1": "recipe-refuses"},
    ("relu_between", NEEDS_LAYER): {"2": "recipe-refuses"},
    ("dropout_between", NEEDS_LAYER): {"2": "recipe-refuses"},
    ("norm_first", NEEDS_LAYER): {"0": "recipe-refuses"},
    ("norm_after_max_pool", NEEDS_LAYER): {"2": "recipe-refuses"},
    ("norm_after_average_pool", NEEDS_LAYER): {"2": "recipe-refuses"},
    ("norm_after_add", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("concat", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("reshape_between", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("channels_moved_between", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("in_place_between", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("assignment_between", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("chunk_between", NEEDS_LAYER): {"bn1": "recipe-refuses", "bn2": "recipe-refuses"},
    ("norm_after_norm", NEEDS_LAYER): {"2": "recipe-refuses"},
    ("calls_forward_itself", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("conv1d_unbatched", NEEDS_LAYER): {"1": "recipe-refuses"},
    ("linear_on_square_sequence", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("linear_on_sequence", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("read_by_unpadded_conv", NEEDS_LAYER): {"0": "recipe-refuses"},
    ("read_by_linear", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("read_by_lstm", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("standardized_subclass", NEEDS_LAYER): {"1": "recipe-refuses"},
    ("weight_norm", NEEDS_LAYER): {"1": "recipe-refuses"},
    ("uncalled_norm", NEEDS_LAYER): {"old.1": "recipe-refuses"},
    ("second_use_in_training", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("hooked_layer", NEEDS_LAYER): {"1": "recipe-refuses"},
    ("functional_without_layer", NEEDS_LAYER): {":running_mean": "recipe-refuses"},
    ("untraceable_owner_reaches_inside", NEEDS_LAYER): {"3.block.1": "recipe-refuses"},
    ("branch_hides_a_use", NEEDS_LAYER): {"bn": "recipe-refuses"},
    # A class of one's own may do more than multiply.
    ("same_pad_subclass", "cosine"): {"1": "recipe-refuses"},
}

# What differs without example inputs: more is open, and one entry is taken for what it is not (see below).
REFUSALS_WITHOUT_INPUTS: dict[tuple[str, str], dict[str, str]] = {
    **REFUSALS,
    ("linear_of_unknown_rank", NEEDS_LAYER): {"1": "recipe-refuses", "4": "recipe-refuses"},
    ("untraceable_child", NEEDS_LAYER): {"3.bn": "recipe-refuses"},
    ("untraceable_child_around_block", NEEDS_LAYER): {"3.block.1": "recipe-refuses"},
    ("untraceable_root", NEEDS_LAYER): {"bn": "recipe-refuses"},
    ("conv1d_unbatched", NEEDS_LAYER): {},
}

# Norms that stand in a layer's place by the zoo, and yet keep an affine of their own in front: what the proof would
# have to look into is named. Only the first is in the zoo's `absorbable`.
NOT_ABSORBED: dict[str, tuple[str, str]] = {
    "weight_norm": ("1", "the weight is parametrized already"),
    "norm_after_average_pool": ("2", "a pool in between"),
    "reshape_between": ("bn", "a reshape in between"),
    "calls_forward_itself": ("bn", "the layer's forward is called by name: no hook and no node sees it"),
    "branch_hides_a_use": ("bn", "the negated inputs take the branch that uses the layer otherwise"),
}

# Without example inputs a convolution is taken to be called with a batch, as nearly all are: torch reads the axes of
# an unbatched (C, L) input otherwise, and BatchNorm1d then normalizes positions. The last entry is called so, and
# what was absorbed there is wrong; with example inputs it is seen.
TAKEN_TO_BE_BATCHED = {
    "conv1d",
    "transposed_conv1d_grouped",
    "sync_batchnorm",
    "functional_norm",
    "functional_frozen",
    "norm_as_holder",
}
WRONGLY_TAKEN_TO_BE_BATCHED = {"conv1d_unbatched": {"1"}}


def skipped_norms(plan: Plan) -> dict[str, str]:
    return {skip.name: skip.code for skip in plan.skips if skip.what == "norm"}


@every(RECIPES, given=(True, False))
def test_only_the_norms_of_the_table_are_refused(name: str, recipe: str, given: bool) -> None:
    table = REFUSALS if given else REFUSALS_WITHOUT_INPUTS
    expected = table.get((name, "*"), {}) | table.get((name, recipe), {})
    if recipe in NEEDS_LAYER.split(", "):
        expected |= table.get((name, NEEDS_LAYER), {})
    assert skipped_norms(case(name, recipe, given).plan) == expected


def test_the_tables_name_entries_and_recipes_that_exist() -> None:
    assert {name for name, _ in REFUSALS} | {*NOT_ABSORBED, *TAKEN_TO_BE_BATCHED} <= set(NAMES)
    assert {one for _, recipe in REFUSALS for one in recipe.split(", ")} <= {"*", *RECIPES}


def test_a_layer_without_a_shape_is_refused_until_the_model_has_run() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2)).eval()
    with pytest.raises(InputError, match=r"'3\.weight' has neither shape nor values yet"):
        ns.swap_norms(model)
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert torch.allclose(ns.swap_norms(model, "none", example_inputs=(x,))(x), expected, atol=1e-5)


@ALL
def test_a_model_of_which_nothing_can_be_converted_is_refused_with_the_reason(recipe: str) -> None:
    with pytest.raises(NormswapError) as caught:
        ns.convert(BY_NAME["relu_norm_subclass"].model(), recipe)
    assert caught.value.code == "nothing-to-convert"
    assert "ReluNorm" in caught.value.hint


# ----------------------------------------------------------------------------------------- the original, the plan


@every(RECIPES, given=(True, False))
def test_the_original_and_the_random_generators_are_untouched(name: str, recipe: str, given: bool) -> None:
    known = case(name, recipe, given)
    touched = changed(known.before, known.after)
    assert not touched


@pytest.mark.parametrize(
    "touch",
    [
        lambda m: m.conv.weight.data[0, 0, 0, 0].add_(1e-6),
        lambda m: m.bn.num_batches_tracked.add_(1),
        lambda m: m.bn.train(),
        lambda m: m.conv.register_forward_hook(lambda *_: None),
        lambda m: m.conv.register_parameter("bias", nn.Parameter(m.conv.bias.detach())),
        lambda m: m.conv.requires_grad_(False),
        lambda m: setattr(m, "project", copy.deepcopy(m.conv)),
        lambda m: setattr(m, "__class__", type("Other", (type(m),), {})),
        lambda m: setattr(m.bn, "eps", 1e-4),
        lambda m: m.register_buffer("more", torch.zeros(1)),
        lambda m: torch.randn(1),
    ],
)
def test_the_fingerprint_sees_a_touch(touch: Callable[[nn.Module], Any]) -> None:
    model = BY_NAME["aliases"].model()
    before = fingerprint(model)
    assert not changed(before, fingerprint(model))
    touch(model)
    assert changed(before, fingerprint(model))


def accounted_for(plan: Plan, model: nn.Module, norms: int) -> bool:
    """Whether every layer and every norm, functional ones too, stands in the plan exactly once."""
    in_plan = Counter(step.site.norm for step in plan.steps)
    in_plan += Counter(s.name for s in plan.skips if s.what == "norm" and s.code != "not-batch-norm")
    layers = Counter(step.site.layer for step in plan.steps if step.site.layer is not None)
    layers += Counter(s.name for s in plan.skips if s.what == "layer" and s.code != "functional-layer")
    functional = set(in_plan) - set(norms_of(model))
    return (
        layers == Counter(list(layers_of(model)))
        and set(norms_of(model)) <= set(in_plan)
        and set(in_plan.values()) <= {1}
        and len(in_plan) == norms
        and all(":" in name for name in functional)
    )


@every(RECIPES, given=(True, False))
def test_every_layer_and_norm_stands_exactly_once_in_the_plan(name: str, recipe: str, given: bool) -> None:
    known = case(name, recipe, given)
    assert accounted_for(known.plan, known.original, known.entry.norms)


def test_a_plan_that_forgets_or_repeats_something_is_found() -> None:
    known = case("functional_and_module_mix", "gn", True)
    plan, model = known.plan, known.original
    assert accounted_for(plan, model, 3)
    assert not accounted_for(plan, model, 4)
    for wrong in (
        Plan("", "", {}, plan.steps[1:], plan.skips),
        Plan("", "", {}, (*plan.steps, plan.steps[0]), plan.skips),
    ):
        assert not accounted_for(wrong, model, 3)
    open_ended = case("relu_between", "gn", True)
    assert accounted_for(open_ended.plan, open_ended.original, 1)
    assert not accounted_for(Plan("", "", {}, open_ended.plan.steps, ()), open_ended.original, 1)


@every(RECIPES, given=(True, False))
def test_a_layer_is_absorbed_only_where_the_zoo_says_it_can_be(name: str, recipe: str, given: bool) -> None:
    known = case(name, recipe, given)
    allowed = known.entry.absorbable | known.entry.conditional
    if given or name in TAKEN_TO_BE_BATCHED:
        allowed |= known.entry.given_rank
    if not given:
        allowed |= WRONGLY_TAKEN_TO_BE_BATCHED.get(name, set())
    assert absorbed(known.plan) <= allowed


@every(RECIPES)
def test_a_norm_is_absorbed_wherever_it_can_be_but_for_the_named_ones(name: str, recipe: str) -> None:
    for given in (True, False) if in_share(name, recipe, 3) else (True,):
        known = case(name, recipe, given)
        norms = known.entry.absorbable
        if given:
            norms = norms | known.entry.given_rank | known.entry.conditional
        elif name in TAKEN_TO_BE_BATCHED:
            norms = norms | known.entry.given_rank
        left = norms - absorbed(known.plan) - {zoo_name(norm) for norm in skipped_norms(known.plan)}
        missing = {NOT_ABSORBED[name][0]} if name in NOT_ABSORBED else set()
        assert left <= missing
        if given:
            assert missing <= left | {zoo_name(norm) for norm in skipped_norms(known.plan)}, (
                "now it is: shorten the table"
            )


@every(RECIPES)
def test_the_layer_that_is_absorbed_is_the_one_that_feeds_the_norm(name: str, recipe: str) -> None:
    """Replaying hooks on the original: at every call of the norm its input is what the layer has just returned."""
    known = case(name, recipe, True)
    for step in known.plan.steps:
        if step.site.layer is None or ":" in step.site.norm or not known.entry.calls.get(step.site.norm, 1):
            continue
        model = copy.deepcopy(known.original)
        returned: list[Tensor] = []
        received: list[Tensor] = []
        model.get_submodule(step.site.layer).register_forward_hook(
            lambda m, a, y, seen=returned: seen.append(y.clone())
        )
        model.get_submodule(step.site.norm).register_forward_pre_hook(
            lambda m, a, seen=received: seen.append(a[0].clone())
        )
        known.run(model)
        if name == "norm_as_holder":  # its norm is read, not called
            assert not received
            continue
        assert len(returned) == len(received) > 0
        if step.site.axis == -1:  # the last axis has become the channels
            returned = [y.movedim(-1, 1) for y in returned]
        assert all(torch.equal(a, b) for a, b in zip(returned, received, strict=True))


# -------------------------------------------------------------------------------------- what the model computes


# float64: rounding alone is below 1e-13, a wrong term is a good part of the output. float32 and bfloat16: a dozen
# roundings of the weights and values, each half of the last digit (6e-8 and 4e-3).
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 6e-2}


def tolerance(known: Case) -> float:
    return TOLERANCES[known.inputs()[0].dtype]


def is_wrongly_absorbed(name: str, recipe: str, given: bool) -> bool:
    """Under `ws` the BatchNorm stays and no scale moves, so that nothing goes wrong."""
    return not given and name in WRONGLY_TAKEN_TO_BE_BATCHED and recipe != "ws"


@every(EXACT, given=(True, False))
def test_an_exact_recipe_keeps_the_eval_output(name: str, recipe: str, given: bool) -> None:
    known = case(name, recipe, given)
    if known.model is None:
        return
    error = distance(known.run(known.model), known.run(known.original))
    if is_wrongly_absorbed(name, recipe, given):
        assert error > 1e-2, "now it is right: shorten the table"
        return
    assert error <= tolerance(known)
    if known.other_inputs is not None:
        other = known.run(known.original, known.other_inputs)
        assert distance(known.run(known.model, known.other_inputs), other) <= tolerance(known)


@pytest.mark.parametrize("recipe", EXACT)
def test_one_broken_weight_moves_the_output_beyond_the_tolerance(recipe: str) -> None:
    known = case("residual_block", recipe, True)
    broken = copy.deepcopy(known.model)
    parameter = next(broken.parameters())
    parameter.data.flatten()[0] += 1e-6
    expected = known.run(known.original)
    assert tolerance(known) < distance(known.run(broken), expected) < 1e-3


def test_the_distance_of_nan_is_infinite_and_of_other_shapes_an_error() -> None:
    one = torch.ones(2)
    assert distance([one], [one]) == 0
    assert distance(one * float("nan"), one) == float("inf")
    assert distance(one, one * float("nan")) == float("inf")
    for a, b in ((one, torch.ones(3)), ([one, one], [one]), (one, one.double()), ([], [])):
        with pytest.raises((AssertionError, ValueError)):
            distance(a, b)


@pytest.mark.parametrize("recipe", EXACT)
@pytest.mark.parametrize("name", ["frozen_batchnorm", "functional_frozen"])
def test_an_exact_recipe_keeps_the_train_output_of_a_frozen_norm(name: str, recipe: str) -> None:
    """A frozen norm takes its stored statistics in train mode, too."""
    known = case(name, recipe, True)
    model, original = copy.deepcopy(known.model).train(), copy.deepcopy(known.original).train()
    error = distance(known.run(model), known.run(original))
    assert error <= 1e-9


@pytest.mark.parametrize("recipe", EXACT)
@pytest.mark.parametrize("name", ["no_running_statistics"])
def test_statistics_that_a_norm_does_not_store_are_measured_on_the_calibration_data(name: str, recipe: str) -> None:
    """In eval mode such a norm uses the batch's own mean and variance: on that batch nothing may move."""
    known = case(name, recipe, True)
    model = ns.swap_norms(known.original, recipe, calibration=known.inputs(), check=False)
    assert distance(known.run(model), known.run(known.original)) <= 1e-9
    moved = known.inputs()[0] * 2 + 1
    assert distance(model(moved).detach(), known.original(moved).detach()) > 1e-2


@pytest.mark.parametrize("recipe", EXACT)
@pytest.mark.parametrize("name", ["residual_block", "linear_after_flatten", "functional_and_module_mix", "bfloat16"])
def test_an_exact_recipe_checks_itself(name: str, recipe: str) -> None:
    entry = BY_NAME[name]
    result = ns.convert(entry.model(), recipe, example_inputs=entry.inputs())
    assert result.check is not None
    assert result.check.ok
    assert str(result.check).startswith("the model before and the model after agree: ")


def before_centring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        absorption,
        "centre",
        lambda layout, weight, moments: (weight, weight.new_zeros(layout.out_channels(weight))),
    )


def at_statistics_before_centring(known: Case, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The converted model at the expected statistics, with no filter's mean taken away."""
    assert known.model is not None
    model = known.model
    if any(True for _ in standardized(model)) and any(step.weight == "ws" for step in known.plan.steps):
        before_centring(monkeypatch)
        examples = known.inputs() if known.original_is_double else None
        with laws.SMALL:
            model = ns.convert(known.fresh(), plan=known.plan, example_inputs=examples, check=False).model
        model = at_expected_statistics(known, model)
        return without_centring_(model)
    return at_expected_statistics(known, model)


@every(INEXACT, given=(True, False))
def test_at_the_expected_statistics_an_inexact_recipe_is_the_original(name: str, recipe: str, given: bool) -> None:
    """Each new norm replaced by its affine at mean 0 and variance r_g; a BatchNorm that stays is left as it is."""
    known = case(name, recipe, given)
    if known.model is None:
        return
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = at_statistics_before_centring(known, monkeypatch)
    assert not any(isinstance(new_norm(found, s), (nn.GroupNorm, ChannelLayerNorm)) for s in known.plan.steps)
    error = distance(known.run(found), known.run(known.original))
    if is_wrongly_absorbed(name, recipe, given):
        assert error > 1e-2, "now it is right: shorten the table"
        return
    # Without inputs the model is in its own dtype, and the law multiplies once more.
    assert error <= tolerance(known) * (1 if given else 5)


@pytest.mark.parametrize(
    ("recipe", "name"), [("gn", "residual_block"), ("gn", "norm_first"), ("gn+aws", "grouped_conv")]
)
def test_the_law_of_the_expected_statistics_sees_a_wrong_value(recipe: str, name: str) -> None:
    known = case(name, recipe, True)
    expected = known.run(known.original)
    for _, tensor in known.model.named_parameters():
        broken = copy.deepcopy(known.model)
        dict(broken.named_parameters())[_].data.flatten()[0] += 1e-4
        assert distance(known.run(at_expected_statistics(known, broken)), expected) > 1e-9 or not tensor.numel()
    assert distance(known.run(known.model), expected) > 1e-2, "at the sample's own statistics it is not the original"


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("gn", {"group_size": 1}),
        ("gn", {"group_size": 2}),
        ("gn", {"num_groups": 2, "eps": 0.5}),
        ("gn+aws", {"group_size": 3}),
        ("ln", {"axes": "channel"}),
        ("ln", {"eps": 0.3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["residual_block", "dead_channels", "large_eps", "norm_first", "transposed_conv2d"])
def test_the_law_of_the_expected_statistics_holds_under_options(
    name: str, recipe: str, options: dict[str, Any]
) -> None:
    entry = BY_NAME[name]
    original = entry.model().double()
    inputs = laws.doubled(entry.inputs)
    result = ns.convert(original, recipe, example_inputs=inputs(), **options)
    known = Case(entry, original, inputs, None, result.model, result.plan, {}, {})
    assert distance(known.run(at_expected_statistics(known, result.model)), known.run(original)) <= 1e-9


@pytest.mark.parametrize("recipe", ["gn+ws", "ws"])
@pytest.mark.parametrize(
    "name", ["residual_block", "transposed_conv2d_grouped", "linear_after_flatten", "zero_filters"]
)
def test_without_a_gain_the_norm_makes_the_lost_scale_good(
    name: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As published, ``W = (v − mean)/std``: the layer's output is σ/std times the one asked for, and the norm knows."""
    entry = BY_NAME[name]
    original = entry.model().double()
    inputs = laws.doubled(entry.inputs)
    before_centring(monkeypatch)
    result = ns.convert(original, recipe, example_inputs=inputs(), gain=False, scale=False)
    known = Case(entry, original, inputs, None, result.model, result.plan, {}, {})
    assert all(not ws.gain for _, _, ws in standardized(result.model))

    def excess(step: Any) -> Tensor | float:
        if step.site.layer is None:
            return 1.0
        layer = original.get_submodule(step.site.layer)
        std = (filters(layer, layer.weight.detach()).var(1, correction=0) + 1e-5).sqrt()
        return (old_tensor(original, step, "running_var") + step.site.eps).sqrt() / std

    model = without_centring_(at_expected_statistics(known, result.model, excess))
    error = distance(known.run(model), known.run(original))
    assert error <= 1e-9


# ----------------------------------------------------------------------------------------------------- centring


@every(RECIPES, given=(True, False))
def test_the_filters_of_a_standardized_layer_have_the_mean_zero(name: str, recipe: str, given: bool) -> None:
    known = case(name, recipe, given)
    if known.model is None:
        return
    planned = {step.site.layer for step in known.plan.steps if step.weight in ("ws", "aws")}
    found = list(standardized(known.model))
    assert {layer for layer, _, _ in found} == planned
    for _, layer, ws in found:
        rows = filters(layer, layer.weight.detach().double())
        ratio = float((rows.mean(1).abs() / rows.abs().amax().clamp(min=1e-300)).amax())
        limit = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[layer.weight.dtype]
        assert ws.offset or ratio <= limit


def test_filters_with_a_mean_are_seen() -> None:
    layer = BY_NAME["residual_block"].model().conv1
    assert float(filters(layer, layer.weight.detach()).mean(1).abs().amax()) > 1e-3


CENTRED = [
    "norm_last",
    "depthwise_separable",
    "grouped_conv",
    "strided_dilated_chain",
    "conv1d",
    "conv3d",
    "transposed_conv2d",
    "transposed_conv2d_grouped",
    "transposed_conv3d_grouped",
    "linear_of_unknown_rank",
    "padding_reflect",
    "padding_circular",
    "same_pad_subclass",
    "zero_filters",
]


def first_layer_outputs(recipe: str, name: str, **options: Any) -> tuple[Tensor, Tensor]:
    """What reaches the first norm, converted with the entry's inputs as data, and the normalized value asked for."""
    entry = BY_NAME[name]
    original = entry.model().double()

    def inputs() -> tuple[Tensor, ...]:  # neighbours are correlated, as a camera's pixels are
        return tuple(tensor.double().cumsum(-1) for tensor in entry.inputs())

    options = {"init": "absorb", "spread": 0, **options}  # no signs and no offsets
    result = ns.convert(original, recipe, calibration=inputs(), example_inputs=inputs(), **options)
    step = result.plan.steps[0]
    values: list[Tensor] = []
    for model in (original, result.model):
        model.get_submodule(step.site.layer).register_forward_hook(lambda m, a, y: values.append(y.detach()))
        entry_output = model(*inputs())
        assert leaves(entry_output)
    norm = original.get_submodule(step.site.norm)
    shape = (1, -1, *(1,) * (values[0].ndim - 2))
    wanted = (values[0] - norm.running_mean.view(shape)) / (norm.running_var + norm.eps).sqrt().view(shape)
    return values[1].movedim(1, 0).flatten(1), wanted.movedim(1, 0).flatten(1)


@pytest.mark.parametrize("name", CENTRED)
def test_centring_keeps_the_mean_of_every_channel_on_the_calibration_data(name: str) -> None:
    found, wanted = first_layer_outputs("gn+ws", name, depthwise=True, input_offset=False)
    assert float((found.mean(1) - wanted.mean(1)).abs().amax()) <= 1e-9
    assert float((found - wanted).abs().amax()) > 1e-3, "the filters' means were not taken away at all"


@pytest.mark.parametrize("name", CENTRED)
def test_centring_in_the_data_moves_the_output_less_than_centring_evenly(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, wanted = first_layer_outputs("gn+ws", name, depthwise=True, input_offset=False)
    moved = (found - wanted).var(1).sum()
    monkeypatch.setattr(
        absorption,
        "centre",
        lambda layout, weight, moments: (
            layout.unflatten(layout.flatten(weight) - layout.flatten(weight).mean(1, keepdim=True), weight),
            weight.new_zeros(layout.out_channels(weight)),
        ),
    )
    evenly, _ = first_layer_outputs("gn+ws", name, depthwise=True, input_offset=False)
    assert float(moved) < 0.9 * float((evenly - wanted).var(1).sum())


# ----------------------------------------------------------------------------------------------------- training


@every(RECIPES)
def test_training_gives_finite_gradients_everywhere_and_none_is_lost(name: str, recipe: str) -> None:
    """No zero filter, zero γ or dead channel makes a NaN, nor does a step of SGD; for a third in the model's dtype."""
    known = case(name, recipe, not in_share(name, recipe, 3))
    if known.model is None:
        return
    original = copy.deepcopy(known.original).train()
    laws.loss(known.entry.run(original, known.inputs)).backward()
    model = copy.deepcopy(known.model).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss = laws.loss(known.entry.run(model, known.inputs))
        try:
            loss.backward()
        except InputError as refused:
            if refused.code == "recomputed" and recipe in ("streaming", "bcn"):
                return  # these cannot be run again by gradient checkpointing
            raise
        assert not not_finite(model)
        if all(p.grad is not None for p in original.parameters() if p.requires_grad):
            assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        optimizer.step()
    assert not not_finite(model)
    for tensor in leaves(known.run(model.eval())):
        assert bool(torch.isfinite(tensor).all())


def test_a_nan_in_a_gradient_or_a_value_is_seen() -> None:
    layer = nn.Linear(2, 1)
    assert not not_finite(layer)
    layer.bias.grad = torch.tensor([float("nan")])
    assert not_finite(layer) == {"bias"}
    layer.weight.data[0, 0] = float("inf")
    assert not_finite(layer) == {"bias", "weight"}


def test_a_plain_weight_norm_of_a_zero_filter_would_fail_the_law() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.data[0].zero_()
    torch.nn.utils.parametrizations.weight_norm(layer, dim=0)
    layer(torch.ones(1, 3)).sum().backward()
    assert not_finite(layer)


# ---------------------------------------------------------------------------------- plans, copies, state dicts


@every(RECIPES, nth=3)
def test_a_plan_survives_json_and_replays_in_place_to_the_same_model(name: str, recipe: str) -> None:
    known = case(name, recipe, True)
    assert Plan.from_json(known.plan.to_json()) == known.plan
    if known.model is None:
        return
    again = replayed(name, recipe)
    assert structure(again) == structure(known.model)
    error = distance(known.run(again), known.run(known.model))
    assert error <= 1e-14


@pytest.mark.parametrize(
    "touch",
    [
        lambda m: m.conv1.register_parameter("bias", nn.Parameter(torch.zeros(8))),
        lambda m: setattr(m, "bn1", nn.Identity()),
        lambda m: setattr(m, "bn2", m.bn1),
        lambda m: m.conv1.double(),
        lambda m: m.conv1.requires_grad_(False),
        lambda m: setattr(m.bn1, "eps", 1e-4),
    ],
)
def test_the_comparison_of_structures_sees_a_change(touch: Callable[[nn.Module], Any]) -> None:
    model = BY_NAME["residual_block"].model()
    assert structure(model) == structure(BY_NAME["residual_block"].model())
    touch(model)
    assert structure(model) != structure(BY_NAME["residual_block"].model())


@pytest.mark.parametrize("damage", [{"normswap_plan": 0}, {"steps": [{"site": {}}]}, {"steps": None}], ids=str)
def test_a_damaged_plan_is_refused(damage: dict[str, Any]) -> None:
    record = json.loads(case("residual_block", "gn", True).plan.to_json())
    with pytest.raises(NormswapError):
        Plan.from_json(json.dumps(record | damage))


@every(RECIPES, nth=3)
def test_a_state_dict_carries_everything_into_another_converted_model(name: str, recipe: str) -> None:
    known = case(name, recipe, True)
    if known.model is None:
        return
    other = copy.deepcopy(replayed(name, recipe))
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.fill_(2)
    expected = known.run(known.model)
    assert distance(known.run(other), expected) > 1e-6
    other.load_state_dict(copy.deepcopy(known.model.state_dict()))
    error = distance(known.run(other), expected)
    assert error <= 1e-14


@every(RECIPES)
def test_a_deep_copy_computes_the_same_and_shares_nothing(name: str, recipe: str) -> None:
    known = case(name, recipe, True)
    if known.model is None:
        return
    expected = known.run(known.model)
    twin = copy.deepcopy(known.model)
    error = distance(known.run(twin), expected)
    assert error == 0
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    assert distance(known.run(known.model), expected) == 0
    assert not {id(m) for m in twin.modules()} & {id(m) for m in known.model.modules()}


@every(RECIPES)
def test_the_converted_model_shares_no_tensor_with_the_original(name: str, recipe: str) -> None:
    known = case(name, recipe, True)
    if known.model is None:
        return
    places = {t.data_ptr() for t in (*known.original.parameters(), *known.original.buffers()) if t.numel()}
    assert not [n for n, t in known.model.state_dict().items() if t.numel() and t.data_ptr() in places]


# ------------------------------------------------------------------------------------------- what is carried over


@every(RECIPES, nth=3)
def test_dtype_device_and_memory_format_are_carried_over(name: str, recipe: str) -> None:
    known = case(name, recipe, False)
    if known.model is None:
        return
    for fqn, layer in layers_of(known.original).items():
        new = known.model.get_submodule(fqn)
        assert new.weight.dtype == layer.weight.dtype
        for parameter in new.parameters():
            assert parameter.dtype == layer.weight.dtype
            assert parameter.device == layer.weight.device
            assert parameter.shape != layer.weight.shape or formats(parameter) == formats(layer.weight)
    for fqn, layer, _ in standardized(known.model):
        assert formats(layer.weight) == formats(known.original.get_submodule(fqn).weight)
    for step in known.plan.steps:
        like = old_tensor(known.original, step, "running_mean")
        if isinstance(new_norm(known.model, step), nn.Module):
            for tensor in new_norm(known.model, step).parameters():
                assert tensor.dtype == like.dtype


def formats(weight: Tensor) -> tuple[bool, bool]:
    """Whether the weight is contiguous, and whether it is so in channels-last order; a 1x1 kernel may be both."""
    last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return weight.is_contiguous(), last


@every(RECIPES, nth=3)
def test_frozen_parameters_and_the_modes_of_modules_are_carried_over(name: str, recipe: str) -> None:
    known = case(name, recipe, True)
    if known.model is None:
        return
    model = known.fresh().requires_grad_(False)
    for index, module in enumerate(model.modules()):
        module.training = bool(index % 2)
    modes = {n: m.training for n, m in model.named_modules(remove_duplicate=False)}
    converted = ns.convert(model, plan=known.plan, init="fresh", check=False).model
    assert not [n for n, p in converted.named_parameters() if p.requires_grad]
    found = {n: m.training for n, m in converted.named_modules(remove_duplicate=False)}
    assert {n: found[n] for n in modes.keys() & found.keys()} == {n: modes[n] for n in modes.keys() & found.keys()}
    for step in known.plan.steps:
        if step.site.norm in modes and new_norm(converted, step) is not None:
            inside = dict(new_norm(converted, step).named_children())
            parts = [part for part in (inside.get("affine"), inside.get("norm")) if part is not None]
            assert all(part.training == modes[step.site.norm] for part in parts)


@every(RECIPES)
def test_modules_and_weights_that_were_one_stay_one(name: str, recipe: str) -> None:
    known = case(name, recipe, True)
    if known.model is None:
        return
    new_names = {n for n, _ in known.model.named_modules(remove_duplicate=False)}
    names = {n for n, _ in known.original.named_modules(remove_duplicate=False)} & new_names
    assert sharing(known.model, names) == sharing(known.original, names)
    if name == "tied_weights":
        assert known.model.conv1.weight is known.model.conv2.weight


@every(RECIPES)
def test_the_users_classes_and_hooks_stay(name: str, recipe: str) -> None:
    known = case(name, recipe, True)
    if known.model is None:
        return
    replaced = {alias for step in known.plan.steps for alias in (step.site.norm, *step.site.aliases)}
    for fqn, module in known.original.named_modules(remove_duplicate=False):
        if any(fqn == norm or fqn.startswith(f"{norm}.") for norm in replaced):
            continue
        new = known.model.get_submodule(fqn)
        if isinstance(module, torch.fx.GraphModule):  # each has a class of its own
            assert isinstance(new, torch.fx.GraphModule)
            continue
        assert isinstance(new, type(module))
        own = type(new).__name__.removeprefix("Parametrized").removeprefix("Cosine")
        assert own == type(module).__name__.removeprefix("Parametrized")
        assert [*new._forward_hooks.values()] == [*module._forward_hooks.values()]


class TakesOptions(nn.Module):
    """A functional norm in a forward with a default and a keyword-only argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.register_buffer("running_mean", torch.full((6,), 0.5))
        self.register_buffer("running_var", torch.full((6,), 2.0))

    def forward(self, x: Tensor, scale: float = 2.0, *, shift: float = 0.5) -> Tensor:
        y = F.batch_norm(self.conv(x), self.running_mean, self.running_var, training=self.training)
        return scale * y + shift


def test_a_functional_norm_in_a_forward_with_options_is_refused() -> None:
    """A trace knows one way of calling a forward; rewritten from it, the others would be lost or wrong."""
    (skip,) = [skip for skip in ns.plan(TakesOptions(), "ln").skips if skip.what == "norm"]
    assert skip.code == "functional-norm"
    assert "optional arguments" in skip.reason
    with pytest.raises(ns.NormswapError, match="no norm of the TakesOptions"):
        ns.swap_norms(TakesOptions(), "ln")


class SeenInPlace(nn.Module):
    """A functional norm whose output is written to in place, which a second name of it sees; the sum counts little."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gain = nn.Conv2d(3, 3, 3, padding=1), nn.Parameter(torch.rand(3, 1, 1) + 1)
        self.register_buffer("running_mean", torch.randn(3))
        self.register_buffer("running_var", torch.rand(3) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.batch_norm(self.conv(x), self.running_mean, self.running_var, training=self.training)
        again = out
        out *= self.gain
        return x + 1e-6 * (out + again)


@pytest.mark.parametrize("recipe", EXACT)
def test_a_rewritten_forward_writes_in_place_where_the_forward_does(recipe: str) -> None:
    model, x = SeenInPlace().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    converted = ns.convert(model, recipe, example_inputs=(x,)).model
    with torch.no_grad():
        expected = model(x)
        for found in (converted, ns.fold(converted, example_inputs=(x,))):
            assert distance(found(x), expected) <= 1e-13
        out = (expected - x) / 2e-6
        assert distance(x + 1e-6 * (out + out / model.gain), expected) > 1e-9, "what a check on outputs would let pass"


@ALL
def test_a_hook_on_a_norm_goes_on_counting(recipe: str) -> None:
    known = case("hooked_norm", recipe, True)
    model = copy.deepcopy(known.model)
    before = model[1].count
    known.run(model)
    known.run(model)
    assert model[1].count == before + 2


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "mobn" in name])
def test_a_running_mean_goes_on_where_it_was(recipe: str) -> None:
    for name, momentum in (("momentum_none", None), ("norm_last", 0.1)):
        known = case(name, recipe, True)
        norm = known.model[1]
        assert isinstance(norm, MeanOnlyBatchNorm)
        assert norm.momentum == momentum
        assert int(norm.num_batches_tracked) == int(known.original[1].num_batches_tracked) == 7


@ALL
@pytest.mark.parametrize("name", ["user_graph", "user_graph_traced_in_training"])
def test_a_graph_module_stays_one_that_lints_and_recompiles(name: str, recipe: str) -> None:
    known = case(name, recipe, True)
    model = copy.deepcopy(known.model)
    assert isinstance(model, torch.fx.GraphModule)
    model.graph.lint()
    expected = known.run(model)
    model.recompile()
    error = distance(known.run(model), expected)
    assert error == 0
    targets = {str(node.target) for node in model.graph.nodes if node.op == "call_module"}
    assert all(isinstance(model.get_submodule(target), nn.Module) for target in targets)


# ------------------------------------------------------------------------------------------------ the meta device


# What is not proven is tried by running: whether a user's layer is linear in its weight, and whether code that cannot
# be traced uses a layer a second time. The meta device runs nothing, so there nothing is absorbed.
UNTRIED_ON_META = {"same_pad_subclass"}


@every(RECIPES, nth=3)
def test_on_the_meta_device_the_plan_and_the_structure_are_the_same(name: str, recipe: str) -> None:
    known = case(name, recipe, False)
    with torch.device("meta"):
        model = known.entry.build().eval()
    if known.model is None or (name in UNTRIED_ON_META and recipe == "ws"):
        found = ns.plan(model, recipe)
        assert found == known.plan or (name in UNTRIED_ON_META and absorbed(found) <= absorbed(known.plan))
        return
    result = ns.convert(model, recipe)
    if name in UNTRIED_ON_META:
        assert absorbed(result.plan) <= absorbed(known.plan)
        return
    assert result.plan == known.plan
    assert structure(result.model) == structure(known.model)
    tensors = [*result.model.parameters(), *result.model.buffers()]
    assert all(tensor.is_meta for tensor in tensors if tensor.ndim)


# -------------------------------------------------------------------------------------------------------- folding


@lru_cache(maxsize=2 * len(RECIPES))
def folding(name: str, recipe: str) -> tuple[nn.Module, set[str]]:
    """What folding gives, with the entry's inputs as example inputs, and what it touched."""
    known = case(name, recipe, True)
    before = fingerprint(known.model)
    model = ns.fold(known.model, example_inputs=known.inputs())
    return model, changed(before, fingerprint(known.model))


def folded(name: str, recipe: str) -> nn.Module:
    return folding(name, recipe)[0]


def keeps_its_class(module: nn.Module) -> bool:
    """Whether torch.nn has nothing like it, or a forward hook of the user's is on it, which must go on seeing it."""
    kept = isinstance(module, (ChannelLayerNorm, Answering))
    return kept or bool(module._forward_hooks or module._forward_pre_hooks)


@ENTRIES
def test_folding_the_original_keeps_its_eval_output(name: str) -> None:
    """The BatchNorms themselves go into the layers that feed them, without any conversion."""
    entry = BY_NAME[name]
    inputs, other = laws.doubled(entry.inputs), laws.doubled(entry.other_inputs)
    model = entry.model().double()
    folded = ns.fold(model, example_inputs=inputs() if not entry.kwargs() else None)
    with torch.no_grad():
        for given in filter(None, (inputs, other)):
            assert distance(entry.run(folded, given), entry.run(model, given)) <= 1e-9


@every(RECIPES)
def test_folding_keeps_the_eval_output(name: str, recipe: str) -> None:
    known = case(name, recipe, True)
    if known.model is None:
        return
    error = distance(known.run(folded(name, recipe)), known.run(known.model))
    assert error <= 1e-9
    if known.other_inputs is not None:
        other = known.run(known.model, known.other_inputs)
        assert distance(known.run(folded(name, recipe), known.other_inputs), other) <= 1e-9


@every(RECIPES)
def test_a_folded_model_holds_plain_weights_and_layers_of_torch(name: str, recipe: str) -> None:
    known = case(name, recipe, True)
    if known.model is None:
        return
    model = folded(name, recipe)
    assert not [n for n, m in model.named_modules() if parametrize.is_parametrized(m)]
    ours = {n: m for n, m in model.named_modules() if type(m).__module__.startswith("normswap.")}
    assert not {n: type(m).__name__ for n, m in ours.items() if not keeps_its_class(m)}


@every(RECIPES, nth=3)
def test_folding_again_changes_nothing(name: str, recipe: str) -> None:
    known = case(name, recipe, True)
    if known.model is None:
        return
    once = folded(name, recipe)
    again = ns.fold(once, example_inputs=known.inputs())
    assert structure(again) == structure(once)
    assert distance(known.run(again), known.run(once)) == 0


@every(RECIPES)
def test_folding_leaves_the_converted_model_and_the_random_generators_untouched(name: str, recipe: str) -> None:
    if case(name, recipe, True).model is not None:
        assert not folding(name, recipe)[1]


def test_a_wrong_fold_moves_the_output_beyond_the_tolerance() -> None:
    known = case("residual_block", "wn+mobn", True)
    broken = copy.deepcopy(folded("residual_block", "wn+mobn"))
    next(broken.parameters()).data.flatten()[0] += 1e-6
    assert distance(known.run(broken), known.run(known.model)) > 1e-9


def test_what_is_not_folded_is_seen() -> None:
    model = case("residual_block", "wn+mobn", True).model
    assert [n for n, m in model.named_modules() if parametrize.is_parametrized(m)]
    assert [m for m in model.modules() if type(m).__module__.startswith("normswap.") and not keeps_its_class(m)]


@ALL
def test_a_model_in_train_mode_is_not_folded(recipe: str) -> None:
    model = copy.deepcopy(case("residual_block", recipe, True).model).train()
    with pytest.raises(FoldError):
        ns.fold(model)
