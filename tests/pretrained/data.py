"""The arrays behind the pretrained models: read without pickle, preprocessed as each network was trained."""

from __future__ import annotations

import io
import itertools
import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

__all__ = [
    "accuracy",
    "available",
    "cifar10_images",
    "cifar10_test",
    "cifar10_train",
    "crystals",
    "data_folder",
    "expected_output",
    "log_mel_windows",
    "mnist_test",
    "mnist_train",
    "noisy_speech",
    "photographs",
    "pitch_frames",
    "seismic_phases",
    "speech_commands",
    "visual_wake_words_stand_in",
    "wakeword_spectrograms",
    "waveform",
    "weights",
]

# The CIFAR ResNets were trained with ImageNet's statistics.
IMAGENET_MEAN = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
IMAGENET_STD = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)

_SQRT_HANN = torch.hann_window(512).sqrt()


def data_folder() -> Path:
    """NORMSWAP_DATA, else `../shared/data` beside the repository."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(os.environ.get("NORMSWAP_DATA") or beside)


def available() -> bool:
    """Whether the data folder is there."""
    return (data_folder() / "weights").is_dir()


def weights(name: str) -> dict[str, Tensor]:
    """The state dict of a pretrained model."""
    return load_file(data_folder() / "weights" / f"{name}.safetensors")


def expected_output(name: str) -> Tensor:
    """What the model `name` gives for the first of its inputs."""
    return _tensor("expected_outputs.npz", name)


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Top-1 in percent, in eval mode; the model's own modes are restored afterwards.

    Args:
        model: gives (N, classes) scores.
        images: (N, …), already preprocessed.
        labels: (N,) int64.
        batch: images per forward pass.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        correct = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(batch), labels.split(batch), strict=True)
        )
    finally:
        for module, mode in modes.items():
            module.training = mode
    return 100.0 * correct / len(labels)


# Image classification ---------------------------------------------------------------------------------------


def cifar10_test(count: int | None = None) -> tuple[Tensor, Tensor]:
    """Normalised test images (N, 3, 32, 32) and labels; any prefix of 10n is balanced."""
    images, labels = cifar10_images("test", count)
    return (images / 255 - IMAGENET_MEAN) / IMAGENET_STD, labels


def cifar10_train(count: int | None = None) -> tuple[Tensor, Tensor]:
    """Normalised training images (N, 3, 32, 32) and labels: 2000 of each class."""
    images, labels = cifar10_images("train", count)
    return (images / 255 - IMAGENET_MEAN) / IMAGENET_STD, labels


def cifar10_images(part: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Raw images (N, 3, 32, 32) as floats in 0..255, and labels; `part` is "train" or "test"."""
    images = _array(f"cifar10_{part}.npz", "images")[:count].transpose(0, 3, 1, 2)
    labels = _array(f"cifar10_{part}.npz", "labels")[:count]
    return torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)), torch.from_numpy(labels).long()


def mnist_train(count: int | None = None) -> tuple[Tensor, Tensor]:
    """Normalised digits (N, 1, 28, 28) and labels."""
    return _mnist("train", count)


def mnist_test(count: int | None = None) -> tuple[Tensor, Tensor]:
    """Normalised digits (N, 1, 28, 28) and labels."""
    return _mnist("test", count)


def visual_wake_words_stand_in(count: int = 32) -> Tensor:
    """CIFAR test images, each pixel repeated 3 × 3, in 0..1: (N, 3, 96, 96)."""
    images, _ = cifar10_images("test", count)
    return images.repeat_interleave(3, 2).repeat_interleave(3, 3) / 255


@cache
def photographs() -> tuple[Tensor, Tensor]:
    """Photographs (600, 3, 224, 224), (RGB − 127)/128, each of another class of ImageNet, and their classes."""
    stored = data_folder() / "imagenet_photographs.npz"
    with np.load(stored, allow_pickle=False) as arrays:
        files, offsets, labels = arrays["jpeg"].tobytes(), arrays["offsets"], arrays["labels"]
    images = [Image.open(io.BytesIO(files[a:b])).convert("RGB") for a, b in itertools.pairwise(offsets)]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return (pixels.contiguous().float() - 127) / 128, torch.from_numpy(labels).long()


# Audio, waveforms, crystals ---------------------------------------------------------------------------------


def speech_commands() -> tuple[Tensor, Tensor]:
    """MFCC maps (1000, 1, 49, 10), de-quantised, and the labels of 12 keywords."""
    features = _tensor("speech_commands_mfcc.npz", "features").float()
    return ((features - 83) * 0.5847029089927673).unsqueeze(1), _labels("speech_commands_mfcc.npz")


def wakeword_spectrograms() -> tuple[Tensor, Tensor]:
    """Spectrograms (45, 40, 30) and the labels of 3 classes."""
    return _tensor("wakeword_spectrograms.npz", "features"), _labels("wakeword_spectrograms.npz")


def pitch_frames() -> tuple[Tensor, Tensor]:
    """Frames (251, 1024) and the activations (251, 360) published with the model."""
    return _tensor("pitch_frames.npz", "frames"), _tensor("pitch_frames.npz", "reference")


def seismic_phases() -> tuple[Tensor, Tensor, Tensor]:
    """Waveforms (154, 3, 3000) at 100 Hz and the samples where analysts put P and S."""
    file = "seismic_phases.npz"
    waves = _tensor(file, "waveforms").float()
    return waves, _tensor(file, "p_index").long(), _tensor(file, "s_index").long()


def noisy_speech() -> tuple[Tensor, Tensor]:
    """The spectrum (1, 2, 611, 257) of a noisy clip; the published model's waveform (1, 156160) for it."""
    mix = _tensor("noisy_speech.npz", "mix").float() / 32768
    spectrum = torch.stft(mix, 512, 256, window=_SQRT_HANN, return_complex=True)
    return torch.view_as_real(spectrum.T).permute(2, 0, 1)[None], _tensor("noisy_speech.npz", "reference")[None]


def waveform(spectrum: Tensor) -> Tensor:
    """Spectra (N, 2, T, 257), real and imaginary part, back to waveforms (N, samples)."""
    bins = torch.view_as_complex(spectrum.permute(0, 3, 2, 1).contiguous())
    return torch.istft(bins, 512, 256, window=_SQRT_HANN)


def log_mel_windows() -> Tensor:
    """Windows (302, 640) of five log-mel frames."""
    return _tensor("logmel_windows.npz", "features")


def crystals() -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(atom features (92, 92), distances (92, 12), neighbours (92, 12), pooling (37, 92)) and eV/atom (37,).

    A row of the pooling matrix holds 1/n at the n atoms of its crystal: the product with it is the mean.
    """
    file = "crystals.npz"
    member = torch.nn.functional.one_hot(_tensor(file, "crystal_idx").long()).T.float()
    pooling = member / member.sum(1, keepdim=True)
    inputs = (_tensor(file, "atom_fea"), _tensor(file, "nbr_dist"), _tensor(file, "nbr_idx").long(), pooling)
    return inputs, _tensor(file, "formation_energy")


# Reading ----------------------------------------------------------------------------------------------------


def _mnist(part: str, count: int | None) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(_array("mnist.npz", f"{part}_images")[:count].astype(np.float32))
    labels = torch.from_numpy(_array("mnist.npz", f"{part}_labels")[:count])
    return ((images / 255 - 0.1307) / 0.3081).unsqueeze(1), labels.long()


def _labels(file: str) -> Tensor:
    return _tensor(file, "labels").long()


def _tensor(file: str, key: str) -> Tensor:
    return torch.from_numpy(_array(file, key)).clone()


@cache  # a CIFAR part takes longer to unpack than a ResNet-20 needs for a thousand of its images
def _array(file: str, key: str) -> np.ndarray:
    with np.load(data_folder() / file, allow_pickle=False) as arrays:
        return arrays[key]
