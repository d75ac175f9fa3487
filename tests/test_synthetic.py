"""Synthetic samples: the norms see the recorded statistics on them, and a match on them keeps more than one without."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import normswap as ns
from normswap.cli import app
from normswap.cli.spelling import spell
from normswap.demo.data import load_digits, load_network
from normswap.errors import InitializationError, InputError
from normswap.initialization.noise import noise_like
from normswap.runs.data import FAR


def trained(scale: float = 1.0, offset: float = 0.0) -> nn.Sequential:
    """A small network whose BatchNorms have recorded the statistics of smooth images of this scale and offset."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU()
    )
    for norm in (model[1], model[4]):
        norm.momentum = None
    for seed in range(4):
        (images,) = noise_like((torch.zeros(1, 3, 12, 12),), 64, seed)
        model(images * scale * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1) + offset)
    return model.eval()


def mismatch(model: nn.Sequential, x: Tensor) -> float:
    """The formula in NumPy, of what reaches the network's two norms."""
    terms = []
    for number in (1, 4):
        norm = model[number]
        y = model[:number](x).detach().double().numpy()
        floor = 1e-3 * norm.running_var.double().mean().item()
        deviation = np.sqrt(norm.running_var.double().numpy() + floor)
        own = np.sqrt(y.var((0, 2, 3)) + floor)
        far = (y.mean((0, 2, 3)) - norm.running_mean.double().numpy()) / deviation
        terms.append((far**2).mean() + ((own / deviation - 1) ** 2).mean())
    return float(np.mean(terms))


def test_the_mismatch_is_the_formulas_and_falls_to_a_tenth() -> None:
    model = trained()
    samples = ns.synthesize_samples(model, torch.zeros(1, 3, 12, 12), count=16, steps=60)
    ((x,),) = samples.batches
    assert x.shape == (16, 3, 12, 12)
    assert samples.after == pytest.approx(mismatch(model, x), rel=1e-4)  # of float32 sums
    assert mismatch(model, 1.05 * x) != pytest.approx(samples.after, rel=1e-4)
    assert samples.after < 0.1 * samples.before
    assert "1 batch of synthetic samples" in str(samples)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (60.0, 120.0), (0.01, 0.0), (10.0, 50.0)])
def test_the_samples_are_in_the_units_of_the_data(scale: float, offset: float) -> None:
    samples = ns.synthesize_samples(trained(scale, offset), torch.zeros(1, 3, 12, 12), count=16, steps=80)
    assert samples.after < 0.05
    x = torch.cat([batch[0] for batch in samples])
    assert 0.3 * scale < float(x.std(dim=(0, 2, 3)).mean()) < 3 * scale
    assert abs(float(x.mean()) - offset) < scale


def test_a_match_on_them_keeps_more_of_a_trained_network_than_one_on_noise_or_none() -> None:
    model, images = load_network(), load_digits()[0][:400]
    with torch.no_grad():
        expected = model(images)

    def error(**data: Any) -> float:
        with torch.no_grad():
            found = ns.swap_norms(model, "gn+ws", **data)(images)
        return float((found - expected).norm() / expected.norm())

    samples = ns.synthesize_samples(model, images[:1], count=64, steps=60)
    found, none = error(calibration=samples), error(example_inputs=images[:1])
    assert found < 0.8 * none  # 0.20 and 0.28
    assert error(calibration=noise_like((images[:1],), 64)) > none


def test_a_conversion_says_that_it_had_no_data() -> None:
    model = trained()
    samples = ns.synthesize_samples(model, torch.zeros(1, 3, 12, 12), count=16, steps=2)
    notes = ns.convert(model, "gn+ws", calibration=samples).init.notes
    assert any("how far the outputs agree on real data was not measured" in note for note in notes)
    for after in (FAR, 1.01 * FAR):
        notes = ns.convert(model, "gn+ws", calibration=replace(samples, after=after)).init.notes
        far = [spell(note) for note in notes if "far from the recorded statistics" in note]
        assert len(far) == (after > FAR)
        assert all(text.endswith("more steps may bring them closer (steps= in Python)") for text in far)
    assert not any(
        "synthetic" in note for note in ns.convert(model, "gn+ws", calibration=samples.batches[0]).init.notes
    )


class Several(nn.Module):
    """Takes numbers and class indices by keyword; one norm is a function, one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 8)
        self.layer, self.other = nn.Linear(5, 8), nn.Linear(8, 8)
        self.register_buffer("mean", torch.linspace(-1, 1, 8))
        self.register_buffer("var", torch.linspace(0.5, 2, 8))

    def forward(self, *, x: Tensor, kind: Tensor) -> Tensor:
        y = self.layer(x) + self.embedding(kind)
        return self.other(nn.functional.batch_norm(y, self.mean, self.var, training=False))


def test_whole_numbers_stay_and_functional_norms_count() -> None:
    kinds = torch.tensor([0, 3])
    samples = ns.synthesize_samples(Several(), {"x": torch.zeros(2, 5), "kind": kinds}, count=32, steps=40)
    (batch,) = samples.batches
    assert set(batch["kind"].tolist()) == {0, 3}
    assert batch["x"].shape == (32, 5)
    assert samples.after < samples.before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_samples_have_the_examples_dtype(dtype: torch.dtype) -> None:
    samples = ns.synthesize_samples(trained().to(dtype), torch.zeros(1, 3, 12, 12, dtype=dtype), count=6, steps=3)
    assert [x.dtype for (x,) in samples] == [dtype]


def test_large_samples_are_cut_into_equal_batches_and_the_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    samples = ns.synthesize_samples(
        model, torch.zeros(1, 3, 8, 8), count=50, steps=2, progress=lambda *told_now: told.append(told_now)
    )
    assert [len(x) for (x,) in samples] == [25, 25]
    assert told == [("synthetic samples", done, 4) for done in (1, 2, 3, 4)]
    assert not torch.equal(samples.batches[0][0], samples.batches[1][0])


class Pairs(nn.Module):
    """Takes two samples and no other number, as a program may that was exported with two."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained()

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) == 2
        return self.net(x)


def test_a_model_that_takes_one_number_of_samples_gets_it() -> None:
    samples = ns.synthesize_samples(Pairs(), torch.zeros(2, 3, 12, 12), count=5, steps=2)
    assert [len(x) for (x,) in samples] == [2, 2, 2]


def test_the_callers_grad_mode_does_not_matter() -> None:
    model = trained()
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            samples = ns.synthesize_samples(model, torch.zeros(1, 3, 12, 12), count=4, steps=2)
        assert samples.after < samples.before


class Deaf(nn.Module):
    """Its norm gets nothing by which a gradient could come back."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.detach().round())


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = trained()

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())  # type: ignore[no-any-return]


def with_a_nan() -> nn.Module:
    model = trained()
    model[1].running_var[0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("model", "inputs", "options", "code"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), torch.zeros(2, 3), {}, "no-statistics"),
        (nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), torch.zeros(2, 3), {}, "no-statistics"),
        (nn.Sequential(nn.Embedding(9, 3), nn.BatchNorm1d(3)), torch.zeros(2, dtype=torch.long), {}, "inputs-type"),
        (Deaf(), torch.zeros(2, 3), {}, "no-gradient"),
        (trained(), torch.zeros(2, 5, 12, 12), {}, "inputs-do-not-run"),
        (trained(), torch.zeros(2, 3, 12, 12), {"count": 0}, "option-value"),
        (trained(), torch.zeros(2, 3, 12, 12), {"steps": 1.5}, "option-value"),
        (trained(), "images", {}, "inputs-type"),
        (nn.Sequential(), None, {}, "inputs-missing"),
        (Checkpointed(), torch.zeros(2, 3, 12, 12), {}, "no-gradient"),
        (scripted(), torch.zeros(2, 3, 12, 12), {}, "wrapped-model"),
    ],
)
def test_what_it_cannot_do_is_refused(model: nn.Module, inputs: Any, options: dict[str, Any], code: str) -> None:
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises((InputError, InitializationError)) as caught:
        ns.synthesize_samples(model, inputs, **options)
    assert caught.value.code == code
    assert caught.value.hint
    assert [p.requires_grad for p in model.parameters()] == before


def without_a_deviation() -> nn.Module:
    model = trained()
    model[4].running_var.zero_()
    return model


def with_huge_weights() -> nn.Module:
    model = trained()
    model[3].weight.data[0] = 3e38
    return model


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (without_a_deviation, "no-statistics", "the running variance of '4' is 0 in all channels"),
        (with_huge_weights, "not-finite", "the values that reach '4' are not finite"),
    ],
)
def test_the_norm_is_named_at_which_something_is_not_finite(
    make: Callable[[], nn.Module], code: str, words: str
) -> None:
    with pytest.raises(InitializationError, match=words) as caught:
        ns.synthesize_samples(make(), torch.zeros(2, 3, 12, 12))
    assert caught.value.code == code
    dead = trained()
    dead[4].running_var[0] = 0
    ns.synthesize_samples(dead, torch.zeros(2, 3, 12, 12), count=2, steps=1)  # negative control: of one channel


class WithAState(nn.Module):
    """A recurrent layer's state has its batch on another axis than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.bn = nn.GRU(4, 4, batch_first=True), nn.BatchNorm1d(4)

    def forward(self, x: Tensor, h: Tensor, edges: Tensor) -> Tensor:
        return self.bn(self.rnn(x, h)[1][-1]) + edges.reshape(3, 1)[0]


def test_an_input_whose_samples_are_on_another_axis_keeps_its_shape() -> None:
    example = (torch.randn(2, 5, 4), torch.zeros(1, 2, 4), torch.tensor([1, 2, 3]))
    samples = ns.synthesize_samples(WithAState().eval(), example, count=4, steps=1)
    assert [tuple(x.shape for x in batch) for batch in samples.batches] == 2 * [((2, 5, 4), (1, 2, 4), (3,))]
    assert all(torch.equal(batch[2], example[2]) for batch in samples.batches)
    x, y, labels = noise_like((torch.randn(2, 5), torch.randn(2, 5), torch.tensor([6, 7])), 5)  # negative control
    assert len(x) == len(y) == 5
    assert labels.tolist() == [6, 7, 6, 7, 6]


def test_statistics_that_are_not_finite_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"'1\.running_var' holds NaN or infinite values"):
        ns.synthesize_samples(with_a_nan(), torch.zeros(2, 3, 12, 12), steps=2)


def test_the_command_line_makes_them_where_there_is_no_data(tmp_path: Path) -> None:
    torch.save(load_network(), tmp_path / "digits.pt")

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(
            app, [arguments[0], str(tmp_path / "digits.pt"), "--trust", "normswap", *arguments[1:]]
        )

    target = tmp_path / "new.safetensors"
    done = run("convert", "--synthetic", "10", "--input-shape", "1x1x8x8", "-o", str(target))
    assert done.exit_code == 0, done.output
    assert "calibrated on 1 batch of synthetic samples" in " ".join(done.output.split())
    assert target.exists()
    ranked = run("inspect", "--to", "gn+ws", "--synthetic", "10", "--input-shape", "1x1x8x8", "--json")
    assert [cost["norm"] for cost in json.loads(ranked.stdout)] != []
    np.save(tmp_path / "x.npy", np.zeros((10, 1, 8, 8), np.float32))
    refused = run("convert", "--synthetic", "10", "--calibration", str(tmp_path / "x.npy"))
    assert refused.exit_code == 2  # as for a wrong use of any flag
    assert "--synthetic and --calibration are both given" in refused.output
