"""Real BatchNorm networks with their published weights, written from the papers.

`load(name)` gives a model in eval mode and inputs; `MODELS` is the table. Parameter names are those of the
weight files, so every definition loads with `strict=True`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from . import data
from .autoencoder import Autoencoder
from .cgcnn import CGCNN
from .cifar_resnet import ResNet8, ResNet20, ResNet32
from .crepe import CrepeTiny
from .data import accuracy, available, cifar10_test, cifar10_train, data_folder, expected_output
from .efficientnet import EfficientNetLite0
from .gtcrn import GTCRN
from .phasenet import PhaseNet
from .separable import DSCNN, MobileNetV1, WakeWordNet

__all__ = [
    "MODELS",
    "Pretrained",
    "accuracy",
    "available",
    "cifar10_test",
    "cifar10_train",
    "data",
    "data_folder",
    "expected_output",
    "load",
]


class Pretrained(NamedTuple):
    """How to build a model, its weight file, and the first of its inputs, preprocessed."""

    build: Callable[[], nn.Module]
    weights: str
    inputs: Callable[[], tuple[Tensor, ...]]


MODELS: dict[str, Pretrained] = {
    name: Pretrained(build, name, inputs)
    for name, build, inputs in (
        ("cifar10_resnet20", ResNet20, lambda: (cifar10_test(32)[0],)),
        ("cifar10_resnet32", ResNet32, lambda: (cifar10_test(32)[0],)),
        ("cifar10_resnet8", ResNet8, lambda: (data.cifar10_images("test", 32)[0],)),
        ("imagenet_efficientnet_lite0", EfficientNetLite0, lambda: (data.photographs()[0][:4],)),
        ("kws_dscnn", DSCNN, lambda: (data.speech_commands()[0][:32],)),
        ("wakeword_conv1d", WakeWordNet, lambda: (data.wakeword_spectrograms()[0],)),
        ("vww_mobilenetv1", MobileNetV1, lambda: (data.visual_wake_words_stand_in(32),)),
        ("anomaly_autoencoder", Autoencoder, lambda: (data.log_mel_windows()[:32],)),
        ("crepe_tiny", CrepeTiny, lambda: (data.pitch_frames()[0][:32],)),
        ("phasenet", PhaseNet, lambda: (data.seismic_phases()[0][:4],)),
        ("cgcnn_formation_energy", CGCNN, lambda: data.crystals()[0]),
        ("gtcrn_dns3", GTCRN, lambda: (data.noisy_speech()[0],)),
    )
}


def load(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The pretrained model `name` in eval mode, and the tuple of its example inputs."""
    entry = MODELS[name]
    model = entry.build()
    model.load_state_dict(data.weights(entry.weights), strict=True)
    return model.eval(), entry.inputs()
