"""The definitions of the pretrained models compute what was published with their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pretrained import MODELS, accuracy, cifar10_test, data, expected_output, load
from pretrained.padding import same_output, same_padding
from pretrained.phasenet import PhaseNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

RECORDED = [name for name in MODELS if name != "imagenet_efficientnet_lite0"]  # of which an output was published
TOLERANCE = 1e-4  # between platforms; on one of them the definitions agree to 1e-6


def expected(name: str) -> Tensor:
    if name == "crepe_tiny":  # the model's authors published activations
        return data.pitch_frames()[1][:32]
    if name == "gtcrn_dns3":  # and so is a waveform, of the published code
        return data.noisy_speech()[1]
    return expected_output(name)


@torch.no_grad()
def relative_error(model: nn.Module, inputs: tuple[Tensor, ...], reference: Tensor) -> float:
    output = model(*inputs)
    if reference.ndim < output.ndim:
        output = data.waveform(output)
    assert output.shape == reference.shape
    return float((output - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("name", RECORDED)
def test_definition_reproduces_the_expected_output(name: str, data_dir: Path) -> None:
    model, inputs = load(name)
    assert relative_error(model, inputs, expected(name)) < TOLERANCE


@pytest.mark.parametrize("name", RECORDED)
def test_one_wrong_weight_is_noticed(name: str, data_dir: Path) -> None:
    model, inputs = load(name)
    with torch.no_grad():
        norm = next(module for module in model.modules() if isinstance(module, _BatchNorm))
        norm.weight[norm.weight.abs().argmax()] *= 1.1  # the largest: a channel that is not dead
    assert relative_error(model, inputs, expected(name)) > TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_definition_is_traced_symbolically(name: str, data_dir: Path) -> None:
    model, inputs = load(name)
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        torch.testing.assert_close(traced(*inputs), model(*inputs), rtol=0, atol=0)


def test_resnet20_classifies_the_published_share_of_all_test_images(data_dir: Path) -> None:
    model, _ = load("cifar10_resnet20")
    images, labels = cifar10_test()
    assert len(labels) == 10_000
    assert accuracy(model, images, labels) == pytest.approx(91.73, abs=0.02)  # two images may lie on an edge


def test_resnet8_classifies_the_recorded_share_of_all_test_images(data_dir: Path) -> None:
    model, _ = load("cifar10_resnet8")
    assert accuracy(model, *data.cifar10_images("test")) == pytest.approx(87.21, abs=0.02)


def test_efficientnet_lite0_classifies_the_recorded_share_of_photographs(data_dir: Path) -> None:
    model, _ = load("imagenet_efficientnet_lite0")
    images, labels = data.photographs()
    assert accuracy(model, images[:100], labels[:100], batch=20) == pytest.approx(86, abs=1.01)  # one photograph


def test_dscnn_recognises_the_recorded_share_of_keywords(data_dir: Path) -> None:
    model, _ = load("kws_dscnn")
    assert accuracy(model, *data.speech_commands()) == pytest.approx(91.5, abs=0.11)


def test_wake_word_net_recognises_41_of_45_clips(data_dir: Path) -> None:
    model, _ = load("wakeword_conv1d")
    assert accuracy(model, *data.wakeword_spectrograms()) == pytest.approx(100 * 41 / 45)


def test_phasenet_picks_as_the_analysts_did(data_dir: Path) -> None:
    model, _ = load("phasenet")
    waves, *picks = data.seismic_phases()
    with torch.no_grad():
        phases = torch.cat([model(batch) for batch in waves.split(32)]).softmax(1).argmax(2)
    near = [float(((phases[:, i] - pick).abs() <= 10).float().mean()) for i, pick in enumerate(picks, start=1)]
    assert near == pytest.approx([0.961, 0.851], abs=0.007)  # within 0.1 s, P and S; one record is 0.0065


def test_phasenet_cropped_before_or_behind_its_norms_evaluates_alike(data_dir: Path) -> None:
    model, inputs = load("phasenet")
    other = PhaseNet(crop_first=True).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert relative_error(other, inputs, model(*inputs)) < 1e-5


def test_crystal_energies_are_near_the_measured_ones(data_dir: Path) -> None:
    model, inputs = load("cgcnn_formation_energy")
    with torch.no_grad():
        error = (model(*inputs) - data.crystals()[1]).abs().mean()
    assert float(error) == pytest.approx(0.088, abs=5e-4)


class Scores(nn.Module):
    """Its input as scores, in eval mode only: a train-mode call gives the reverse."""

    def forward(self, x: Tensor) -> Tensor:
        return -x if self.training else x


def test_accuracy_counts_over_uneven_batches_and_restores_the_mode() -> None:
    model = Scores().train()
    scores, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    assert accuracy(model, scores, labels, batch=3) == 75.0
    assert model.training


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        (49, 10, 2, (4, 5)),
        (10, 4, 2, (1, 1)),
        (96, 3, 2, (0, 1)),
        (3000, 7, 4, (1, 2)),
        (47, 7, 4, (2, 2)),
        (8, 1, 2, (0, 0)),
    ],
)
def test_same_padding_leaves_the_input_length_over_the_stride(
    size: int, kernel: int, stride: int, padding: tuple[int, int]
) -> None:
    assert same_padding(size, kernel, stride) == padding
    assert (size + sum(padding) - kernel) // stride + 1 == same_output(size, stride)
