"""What autograd keeps of parametrized weights and norms, their second derivatives, and the benchmark that prints it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from normswap.nn import FilterLayout, MeanOnlyBatchNorm, WeightStandardization, parametrize_weight_norm

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
every_format = pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "training_step.py"
    spec = importlib.util.spec_from_file_location("benchmarks_training_step", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def standardize(layer: nn.Module) -> None:
    ws = WeightStandardization(FilterLayout.of(layer), offset=True)
    parametrize.register_parametrization(layer, "weight", ws)


def layer(parametrized: Callable[[nn.Module], Any], layout: torch.memory_format) -> Any:
    torch.manual_seed(0)
    made = nn.Conv2d(8, 16, 3)
    parametrized(made)
    return made.to(memory_format=layout)


@every_format
@pytest.mark.parametrize("parametrized", [parametrize_weight_norm, standardize])
def test_autograd_keeps_nothing_of_a_weights_size_to_compute_it(
    benchmark: Any, parametrized: Callable[[nn.Module], None], layout: torch.memory_format
) -> None:
    made = layer(parametrized, layout)
    rows = 3 * 16 * 4  # of float32: at most three values per filter
    assert benchmark.held(made, lambda: made.weight) <= rows < made.weight.numel() * 4 / 20


@every_format
def test_a_mean_only_norm_keeps_nothing_of_its_inputs_size(benchmark: Any, layout: torch.memory_format) -> None:
    x = torch.randn(4, 8, 16, 16, requires_grad=True).to(memory_format=layout)
    assert benchmark.held(MeanOnlyBatchNorm(8), lambda: None) == 0
    assert benchmark.held(norm := MeanOnlyBatchNorm(8), lambda: norm(x)) <= 8 * 4
    assert benchmark.held(nn.BatchNorm2d(8), lambda: nn.BatchNorm2d(8)(x)) >= x.numel() * 4


def test_torchs_own_weight_norm_copies_a_channels_last_weight(benchmark: Any) -> None:
    made = layer(parametrizations.weight_norm, torch.channels_last)
    assert benchmark.held(made, lambda: made.weight) >= made.weight.numel() * 4


def test_a_tensor_that_is_saved_twice_or_is_the_models_own_is_counted_once_or_not(benchmark: Any) -> None:
    x = torch.randn(1000, requires_grad=True)
    own = nn.PReLU(1000)
    assert benchmark.held(nn.Identity(), lambda: (x * x, x[:10].square(), x.exp())) == 2 * 4000
    assert benchmark.held(own, lambda: (own.weight.square(), own.weight * own.weight)) == 0


def gradients(made: Any, direction: Tensor) -> tuple[Tensor, ...]:
    weight = made.weight
    return (weight, *torch.autograd.grad(weight, list(made.parametrizations.parameters()), direction))


@every_format
@pytest.mark.parametrize("make", [lambda: nn.Conv2d(6, 8, 3, groups=2), lambda: nn.Conv2d(6, 8, 1)], ids=["3x3", "1x1"])
def test_weight_norm_is_torchs_in_value_gradient_and_state_dict(
    make: Callable[[], nn.Module], layout: torch.memory_format
) -> None:
    ours, theirs = make(), make()
    theirs.load_state_dict(ours.state_dict())
    parametrize_weight_norm(ours)
    parametrizations.weight_norm(theirs)
    ours, theirs = (one.to(memory_format=layout) for one in (ours, theirs))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    direction = torch.randn_like(ours.get_parameter("parametrizations.weight.original1"))
    for mine, other in zip(gradients(ours, direction), gradients(theirs, direction), strict=True):
        if layout is torch.contiguous_format:
            assert torch.equal(mine, other)
        # A row's values are summed in another order: float32 has 6e-8, of sums of 27 terms.
        assert (mine - other).abs().max() <= 1e-6 * other.abs().max()
    broken = gradients(ours, direction * 1.01)
    assert (broken[1] - gradients(theirs, direction)[1]).abs().max() > 1e-3


@pytest.mark.parametrize("parametrized", [parametrize_weight_norm, standardize])
def test_a_channels_last_weight_and_its_gradient_stay_channels_last(parametrized: Callable[[nn.Module], None]) -> None:
    made = layer(parametrized, torch.channels_last)
    made(torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)).square().sum().backward()
    (v,) = (p for p in made.parametrizations.parameters() if p.ndim == 4 and p.numel() > 16)
    assert v.grad is not None
    for tensor in (made.weight, v.grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


@every_format
@pytest.mark.parametrize("parametrized", [parametrize_weight_norm, standardize])
def test_the_second_derivatives_of_parametrized_weights_are_right(
    parametrized: Callable[[nn.Module], None], layout: torch.memory_format
) -> None:
    made = nn.Conv2d(3, 2, 2).double()
    parametrized(made)
    form = made.get_submodule("parametrizations.weight.0")
    values = [p.detach().clone() for p in made.parametrizations.parameters()]
    values = [v.contiguous(memory_format=layout) if v.ndim == 4 else v for v in values]
    assert torch.autograd.gradgradcheck(form, [v.requires_grad_() for v in values])
    # gradgradcheck compares with the first derivative as it is written for a second one, and not with the truth.
    direction = torch.randn_like(form(*values))
    plain = torch.autograd.grad(form(*values), values, direction)
    again = torch.autograd.grad(form(*values), values, direction, create_graph=True)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(plain, again, strict=True))


def test_torchs_own_weight_norm_has_a_wrong_second_derivative() -> None:
    """Where this fails, ``_NormalizedRows`` is no longer needed."""
    made = parametrizations.weight_norm(nn.Linear(3, 2).double())
    g, v = (p.detach().clone().requires_grad_() for p in made.parametrizations.parameters())
    form = made.parametrizations.weight[0]
    assert torch.autograd.gradcheck(form, (g, v))
    assert not torch.autograd.gradgradcheck(form, (g, v), raise_exception=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("parametrized", [parametrize_weight_norm, standardize])
def test_a_parametrized_layer_is_traced_and_stored_as_torchscript(
    parametrized: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    made, x = layer(parametrized, torch.contiguous_format), torch.randn(2, 8, 5, 5)
    torch.jit.save(torch.jit.trace(made, x), tmp_path / "layer.pt")
    stored = torch.jit.load(tmp_path / "layer.pt")
    allowed = 1e-6 * made(x).abs().max()  # TorchScript rounds a product of scalars otherwise
    assert (stored(x) - made(x)).abs().max() <= allowed < (stored(x * 1.01) - made(x)).abs().max()


class _Once(torch.autograd.Function):
    """A square whose second derivative is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * grad


def test_a_function_with_a_wrong_second_derivative_is_found() -> None:
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_Once.apply, (x,))
    assert not torch.autograd.gradgradcheck(_Once.apply, (x,), raise_exception=False)


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 4, 1, bias=False)
    )


def test_the_command_prints_a_row_for_each_network_in_each_format(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "resnet50", small)
    names = ["no norm", "gn+ws", "naive WS + GroupNorm", "torch weight_norm + naive mean-only"]
    arguments = ["--batch", "2", "--side", "8", "--rounds", "2", "--threads", str(torch.get_num_threads())]
    assert benchmark.main([*names, *arguments, "--autocast", "bf16"]) == 0
    printed = capsys.readouterr().out
    for name in ("BatchNorm", *names):
        assert printed.count(f"\n{name}  ") == 2, name
    with pytest.raises(SystemExit):
        benchmark.main(["gn+w"])
    assert "there is no network 'gn+w'" in capsys.readouterr().err
