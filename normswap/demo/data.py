"""The demo's package data: trained weights, held-out digits and unlabelled calibration digits, in one file.

The digits are the UCI "Optical Recognition of Handwritten Digits" images (E. Alpaydin and C. Kaynak, 1998,
https://doi.org/10.24432/C50P49, CC BY 4.0), as scikit-learn ships them.
``examples/train_digits.py`` writes the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from normswap.demo.network import DigitsResNet
from normswap.errors import InputError

__all__ = ["load_calibration", "load_digits", "load_metadata", "load_network"]

FILE = "digits.safetensors"
WEIGHTS = "network."  # the prefix of the network's tensors in the file
MAX_PIXEL = 16  # a pixel counts the ink in a 4×4 block of the scanned bitmap


def load_network() -> DigitsResNet:
    """Return a fresh copy of the trained network, in eval mode.

    Raises:
        InputError: the package's data file is missing or damaged
    """
    network = DigitsResNet()
    with _opened() as file:
        names = [name for name in file.keys() if name.startswith(WEIGHTS)]  # noqa: SIM118
        network.load_state_dict({name.removeprefix(WEIGHTS): file.get_tensor(name) for name in names})
    return network.eval()


def load_digits() -> tuple[Tensor, Tensor]:
    """Return the 900 held-out digits, which the network was not trained on.

    Returns:
        images ``(900, 1, 8, 8)``, float in [0, 1], and labels ``(900,)``, int64

    Raises:
        InputError: the package's data file is missing or damaged
    """
    with _opened() as file:
        return _as_images(file.get_tensor("heldout.images")), file.get_tensor("heldout.labels").long()


def load_calibration() -> Tensor:
    """Return 768 of the training digits without their labels: what calibration needs, and no more.

    Returns:
        images ``(768, 1, 8, 8)``, float in [0, 1]

    Raises:
        InputError: the package's data file is missing or damaged
    """
    with _opened() as file:
        return _as_images(file.get_tensor("calibration.images"))


def load_metadata() -> dict[str, str]:
    """Return what the training script recorded: accuracy on the held-out digits, versions, source, licence.

    Returns:
        ``accuracy`` (a fraction), ``heldout_correct``, ``heldout_total``, ``torch``, ``scikit_learn``,
        ``digits`` (the source), ``digits_license``, ``trained_by``

    Raises:
        InputError: the package's data file is missing or damaged
    """
    with _opened() as file:
        return dict(file.metadata() or {})


def _as_images(pixels: Tensor) -> Tensor:
    """``(N, 8, 8)`` uint8 in 0..16 → ``(N, 1, 8, 8)`` float in [0, 1]."""
    return pixels.unsqueeze(1).float() / MAX_PIXEL


@contextmanager
def _opened() -> Iterator[Any]:  # safe_open has no type hints that mypy accepts
    """Open the data file inside the installed package, which may be a zip archive."""
    try:
        with (
            resources.as_file(resources.files("normswap.demo") / FILE) as path,
            safe_open(path, framework="pt") as file,
        ):
            yield file
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(
            f"the demo's data file {FILE!r} cannot be read: {error}",
            code="demo-data",
            hint="reinstall normswap, or run examples/train_digits.py, which writes the file",
        ) from error
