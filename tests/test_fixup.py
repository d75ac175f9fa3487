"""Fixup (Zhang et al. 2019): its three rules against the paper, what is refused, and the multiplier's way to a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from laws import distance
from pretrained.cifar_resnet import CifarResNet
from torch import Tensor, nn

import normswap as ns
from normswap.nn import ScalarMultiplier

BRANCHES, LAYERS_IN_EACH = 6, 2


def fixed_up(blocks: int = 2) -> ns.Conversion[nn.Module]:
    return ns.convert(CifarResNet(blocks).eval(), "none", multiplier=True, init="fixup")


def test_the_rules_are_the_papers() -> None:
    torch.manual_seed(5)
    result = fixed_up()
    scale = BRANCHES ** (-1 / (2 * LAYERS_IN_EACH - 2))
    for name, layer in result.model.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        weight = layer.weight.detach()
        assert layer.bias is not None
        assert not layer.bias.any()
        if name.endswith("conv2") or name == "linear":  # rule 1
            assert not weight.any(), name
        else:  # rule 2: He et al., and the scale within branches alone
            std = (2 / weight[0].numel()) ** 0.5 * (scale if "layer" in name else 1)
            assert abs(float(weight.std()) / std - 1) < 5 / (2 * weight.numel()) ** 0.5, name  # five standard errors
            if "layer" in name:
                assert abs(float(weight.std()) / (std / scale) - 1) > 0.3, name
        if name.endswith("conv2"):  # rule 3
            assert isinstance(layer.parametrizations["weight"][0], ScalarMultiplier)
            assert layer.parametrizations["weight"].original0.item() == 1
    with torch.no_grad():
        assert not result.model(torch.randn(2, 3, 16, 16)).any()


def test_branches_of_three_layers_are_scaled_by_the_fourth_root() -> None:
    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 1)
            self.na, self.nb, self.nc = (nn.BatchNorm2d(64) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.nc(self.c(F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))))))

    result = ns.convert(nn.Sequential(*(Bottleneck() for _ in range(16))).eval(), "none", init="fixup")
    notes = {row.name: row.notes for row in result.init.rows}
    assert notes["0.a"] == notes["7.b"] == ("× 0.5: in a residual branch",)  # 16 ** (-1/4)
    assert notes["3.c"] == ("0: ends a residual branch",)


def test_the_draw_follows_the_seed_and_leaves_the_generator() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    model = CifarResNet(1).eval()
    torch.set_rng_state(state)
    one, again = (ns.swap_norms(model, "none", init="fixup").conv1.weight for _ in range(2))
    assert torch.equal(one, again)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert not torch.equal(ns.swap_norms(model, "none", init="fixup").conv1.weight, one)


def test_a_step_changes_the_function_and_every_branch_learns_in_two() -> None:
    """The first step moves the zero layers alone, the second all others."""
    model = fixed_up().model.train()
    x, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("to", ["gn", "wn", "mobn"])
def test_networks_that_keep_a_norm_or_another_weight_are_refused(to: str) -> None:
    with pytest.raises(ns.NormswapError, match="for networks without norms"):
        ns.convert(CifarResNet(1).eval(), to, init="fixup")


def test_a_network_without_branches_is_refused_before_it_is_touched() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(ns.NormswapError, match="no residual branch was found"):
        ns.convert(model, "none", init="fixup", inplace=True)
    assert isinstance(model[1], nn.BatchNorm2d)


def test_with_the_multiplier_the_swap_is_exact_and_trains_folds_and_is_stored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = CifarResNet(1).double().eval(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
    result = ns.convert(model, "none", multiplier=True)
    assert [step.weight for step in result.plan.steps if step.site.ends_branch] == ["scaled"] * 3
    with torch.no_grad():
        assert distance(result.model(x), model(x)) < 1e-12
        originals = result.model.layer2[0].conv2.parametrizations.weight
        originals.original0 *= 1.5  # trained
        assert distance(result.model(x), model(x)) > 1e-3
        folded = ns.fold(result.model)
        assert type(folded.layer2[0].conv2) is nn.Conv2d
        assert distance(folded(x), result.model(x)) < 1e-12
        ns.save(result.model, tmp_path / "m.safetensors")
        assert torch.equal(ns.load(tmp_path / "m.safetensors", model=model)(x), result.model(x))
    back = ns.migrate_state_dict(result.model.state_dict(), result)
    again = CifarResNet(1).double().eval()
    again.load_state_dict(back.state)
    with torch.no_grad():
        assert distance(again(x), result.model(x)) < 1e-12
    groups = ns.parameter_groups(result.model, weight_decay=0.1)
    decaying = {id(p) for p in groups[0]["params"]}
    assert id(originals.original1) in decaying
    assert id(originals.original0) not in decaying
