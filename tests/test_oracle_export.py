"""Plans held against torch.export's graphs, and the oracle held against what the zoo proves by folding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import oracle_export
import pytest
import torch
from oracle_export import Comparison, Exported, compare, find_pair
from torch import nn
from zoo import ZOO, Entry
from zoo_packages import import_timm, import_torchvision

import normswap as ns
from normswap.records import Plan, Step

BY_NAME = {entry.name: entry for entry in ZOO}
ENTRIES = pytest.mark.parametrize("entry", ZOO, ids=str)

# Their forward branches on a value: torch.export refuses them, and so the oracle knows nothing of them.
NOT_EXPORTED = {
    "untraceable_child",
    "untraceable_child_around_block",
    "untraceable_owner_reaches_inside",
    "untraceable_root",
    "branch_hides_a_use",
}
# The fold is right there by numbers and no pair of the graph: through a pool or a reshape, into a computed weight, of a
# norm whose tensors are read elsewhere. The oracle says less than the zoo.
BY_NUMBERS_ONLY = {
    "norm_after_average_pool",
    "reshape_between",
    "weight_norm",
    "statistics_read_elsewhere",
}


@cache
def exported(name: str) -> Exported:
    entry = BY_NAME[name]
    return oracle_export.export(entry.model(), entry.inputs(), entry.kwargs())


def checked(name: str, change: Callable[[Plan], Plan] = lambda plan: plan) -> Comparison:
    found = exported(name)
    plan = ns.plan(found.model, "gn", example_inputs=BY_NAME[name].inputs())
    return compare(change(plan), found)


@ENTRIES
def test_no_graph_contradicts_a_site_and_every_pair_left_alone_has_its_reason(entry: Entry) -> None:
    found = checked(entry.name)
    assert found.ok, found
    assert bool(exported(entry.name).graphs) == (entry.name not in NOT_EXPORTED)


@ENTRIES
def test_the_oracle_finds_the_pairs_that_the_zoo_proves_by_folding(entry: Entry) -> None:
    if entry.name in NOT_EXPORTED:
        return
    model = exported(entry.name).model
    norms = {name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    norms |= entry.absorbable | entry.given_rank | entry.conditional
    # A functional norm goes by its running mean in the zoo, by ``owner:name`` in a plan.
    named = {n: n if n in dict(model.named_modules()) else ":".join(n.rpartition(".")[::2]) for n in norms}
    pairs = {norm for norm in norms if find_pair(exported(entry.name), named[norm]).layer}
    folds = entry.absorbable | entry.given_rank | entry.conditional
    without_statistics = entry.batch_statistics  # the pair is there; what to fold is not
    assert pairs - without_statistics <= folds
    uncalled = {norm for norm in norms if not find_pair(exported(entry.name), named[norm]).calls}
    assert (folds <= pairs | uncalled) == (entry.name not in BY_NUMBERS_ONLY)


# ---------------------------------------------------------------------------------------------- real networks

NETWORKS = (
    ("torchvision/resnet18", 20, 20),
    ("torchvision/mobilenet_v3_small", 34, 34),
    ("torchvision/shufflenet_v2_x0_5", 56, 56),
    ("torchvision/mnasnet0_5", 52, 52),
    ("torchvision/regnet_y_400mf", 53, 53),
    ("timm/resnet10t", 14, 14),
    ("timm/regnetx_002", 44, 44),
    ("timm/mobilenetv3_small_050", 34, 34),
    ("timm/ghostnet_050", 80, 80),
    ("timm/repvgg_a0", 61, 44),
    ("timm/resnetv2_50", 49, 32),
)


def network(name: str) -> nn.Module:
    package, _, what = name.partition("/")
    if package == "torchvision":
        model: nn.Module = import_torchvision().models.get_model(what, weights=None)
    else:
        model = import_timm().create_model(what, pretrained=False)
    return model.eval()


@pytest.mark.parametrize(("name", "norms", "pairs"), NETWORKS, ids=str)
def test_every_site_of_a_network_is_a_pair_of_the_graph_and_every_pair_a_site(
    name: str, norms: int, pairs: int
) -> None:
    model, x = network(name), torch.randn(2, 3, 64, 64)
    plan = ns.plan(model, "gn")
    found = compare(plan, oracle_export.export(model, (x,), modes=(False,)))
    assert found.ok, found
    assert (len(plan.steps), found.right, found.missed, found.unseen) == (norms, pairs, (), ())


# ----------------------------------------------------------------------------------------- what it must refuse


def with_layers(change: Callable[[tuple[str | None, ...]], tuple[str | None, ...]]) -> Callable[[Plan], Plan]:
    """A change of a plan that gives its sites other layers."""

    def changed(plan: Plan) -> Plan:
        layers = change(tuple(step.site.layer for step in plan.steps))
        sites = (
            dataclasses.replace(step.site, layer=layer, reason=None)
            for step, layer in zip(plan.steps, layers, strict=True)
        )
        steps = tuple(dataclasses.replace(s, site=site) for s, site in zip(plan.steps, sites, strict=True))
        return dataclasses.replace(plan, steps=steps)

    return changed


def test_a_plan_whose_layers_are_swapped_is_contradicted() -> None:
    assert checked("conv_bn_relu_chain").ok
    swapped = checked("conv_bn_relu_chain", with_layers(lambda layers: layers[::-1]))
    assert not swapped.ok
    assert len(swapped.wrong) == 2
    assert "the plan says 3, the graph says 0" in swapped.wrong[0]


def test_the_layers_of_a_real_network_swapped_are_contradicted() -> None:
    model = network("torchvision/resnet18")
    found = oracle_export.export(model, (torch.randn(2, 3, 64, 64),), modes=(False,))
    plan = with_layers(lambda layers: (layers[1], layers[0], *layers[2:]))(ns.plan(model, "gn"))
    assert len(compare(plan, found).wrong) == 2


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("preactivation", "conv2"),
        ("one_output_two_norms", "conv"),
        ("conv_output_returned_too", "conv"),
        ("conv_twice_norm_once", "conv"),
        ("one_norm_two_convs", "conv1"),
        ("tied_weights", "conv1"),
        ("weight_read_as_kernel", "conv"),
        ("bias_read_elsewhere", "conv"),
        ("second_use_in_training", "conv"),
        ("relu_between", "0"),
        ("dropout_between", "0"),
        ("in_place_between", "conv"),
        ("channels_moved_between", "conv"),
        ("linear_on_square_sequence", "fc"),
        ("conv1d_unbatched", "0"),
        ("registration_order_lies", "conv"),
        ("standardized_subclass", "0"),
        ("hooked_layer", "0"),
    ],
)
def test_a_layer_that_is_not_the_norms_own_is_contradicted(name: str, layer: str) -> None:
    """What a converter that goes by names, by one graph or by one consumer alone would absorb."""
    assert checked(name, with_layers(lambda layers: (layer,) * len(layers))).wrong


def test_a_pair_left_alone_without_a_reason_is_found() -> None:
    def forget(plan: Plan) -> Plan:
        return with_layers(lambda layers: (None,) * len(layers))(plan)

    found = checked("conv_bn_relu_chain", forget)
    assert found.missed == (("1", "0", ""), ("4", "3", ""))
    assert found.unexplained == ("1", "4")
    assert not found.ok


def test_a_norm_that_no_graph_calls_is_named() -> None:
    assert checked("uncalled_norm").unseen == ("old.1",)


def test_a_mode_that_cannot_be_exported_is_named_and_says_why() -> None:
    failed: dict[bool, Any] = exported("branch_hides_a_use").failed
    assert set(failed) == {False, True}
    assert "data-dependent" in failed[False]


def test_exporting_leaves_the_model_as_it_was() -> None:
    entry = BY_NAME["residual_block"]
    model = entry.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    oracle_export.export(model, entry.inputs())
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_plan_that_is_compared_is_made_of_steps() -> None:
    """A comparison of nothing would say that all is well."""
    plan = ns.plan(exported("conv_bn_relu_chain").model, "gn")
    assert all(isinstance(step, Step) for step in plan.steps)
    assert checked("conv_bn_relu_chain").right == len(plan.steps) == 2
