"""The demo's package data: real digits, the training script's split, and the accuracy that is recorded."""

import importlib.util
import subprocess
import sys
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, fx, nn

from normswap.demo import data
from normswap.demo.data import load_calibration, load_digits, load_metadata, load_network
from normswap.demo.network import DigitsResNet
from normswap.errors import InputError

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_digits.py"


def count_correct(network: nn.Module) -> int:
    images, labels = load_digits()
    with torch.no_grad():
        return int((network(images).argmax(1) == labels).sum())


def rows(images: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in images.flatten(1).tolist()}


def recorded_correct() -> int:
    return int(load_metadata()["heldout_correct"])


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("sklearn", reason="the training script's split needs scikit-learn")
    spec = importlib.util.spec_from_file_location("train_digits", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_heldout_accuracy_is_the_recorded_one_and_at_least_98_5_percent() -> None:
    metadata = load_metadata()
    correct, total = recorded_correct(), int(metadata["heldout_total"])
    assert count_correct(load_network()) == correct
    assert total == len(load_digits()[1])
    assert metadata["accuracy"] == f"{correct / total:.4f}"
    assert correct / total >= 0.985


def test_no_heldout_decision_is_close_enough_to_a_tie_for_rounding_to_flip_it() -> None:
    with torch.no_grad():
        best, second = load_network()(load_digits()[0]).topk(2).values.T
    # Logits here are of the order of 10, so another machine's float32 rounding moves them by about 1e-5.
    assert (best - second).min() > 1e-2


@pytest.mark.parametrize("name", ["bn1", "layer1.bn2", "layer2.bn1"])
def test_accuracy_is_lost_when_one_norm_forgets_its_running_statistics(name: str) -> None:
    network = load_network()
    norm = network.get_submodule(name)
    assert isinstance(norm, nn.BatchNorm2d)
    norm.reset_running_stats()
    assert count_correct(network) < recorded_correct()


def test_an_untrained_network_is_no_better_than_guessing() -> None:
    torch.manual_seed(0)
    assert count_correct(DigitsResNet().eval()) < 0.3 * recorded_correct()


def test_load_network_returns_a_fresh_eval_copy_each_time() -> None:
    first = load_network()
    assert not any(module.training for module in first.modules())
    with torch.no_grad():
        first.head.weight.zero_()
    assert count_correct(first) < recorded_correct()
    assert count_correct(load_network()) == recorded_correct()


def test_network_is_traceable_and_has_nine_norms() -> None:
    network = load_network()
    traced = fx.symbolic_trace(network)
    images, _ = load_digits()
    with torch.no_grad():
        assert torch.equal(traced(images[:8]), network(images[:8]))
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == 9
    assert sum(parameter.numel() for parameter in network.parameters()) == 77_754


def test_digits_have_the_documented_shapes_and_range() -> None:
    images, labels = load_digits()
    calibration = load_calibration()
    assert images.shape == (900, 1, 8, 8)
    assert calibration.shape == (768, 1, 8, 8)
    assert labels.shape == (900,)
    assert labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(10))
    for digits in (images, calibration):
        assert digits.dtype == torch.float32
        assert (digits.min(), digits.max()) == (0, 1)


def test_no_calibration_digit_is_a_heldout_digit() -> None:
    images, _ = load_digits()
    calibration = load_calibration()
    assert not rows(calibration) & rows(images)
    assert rows(torch.cat([calibration, images[:1]])) & rows(images), "the comparison sees a digit put into both"


def test_shipped_digits_are_the_training_scripts_split(example: ModuleType) -> None:
    train_pixels, _, held_pixels, held_labels = example.split_digits()
    images, labels = load_digits()
    assert torch.equal(images.squeeze(1) * data.MAX_PIXEL, held_pixels.float())
    assert torch.equal(labels, held_labels.long())
    assert torch.equal(load_calibration().squeeze(1) * data.MAX_PIXEL, train_pixels[: example.CALIBRATION].float())
    assert not torch.equal(labels.roll(1), held_labels.long())


def test_augmentation_moves_digits_by_at_most_the_stated_shift(example: ModuleType) -> None:
    torch.manual_seed(0)
    dot = torch.zeros(256, 1, 8, 8)
    dot[:, :, 3:5, 3:5] = 1  # the middle of the image, where turning and scaling move nothing
    moved = example.augment(dot)[:, 0]
    pixel = torch.arange(8.0)
    mass = moved.sum((1, 2))
    shift_y = (moved.sum(2) * pixel).sum(1) / mass - 3.5
    shift_x = (moved.sum(1) * pixel).sum(1) / mass - 3.5
    # 1 pixel of the input grid is up to 1/0.9 pixels of the output, turned by up to 10 degrees: 1.11 + 0.19.
    for shift in (shift_y, shift_x):
        assert 0.8 < shift.abs().max() < 1.32
        assert abs(shift.mean()) < 0.15


def test_metadata_names_source_licence_and_versions() -> None:
    metadata = load_metadata()
    assert metadata["digits_license"] == "CC BY 4.0"
    assert "UCI" in metadata["digits"]
    assert metadata["trained_by"] == "examples/train_digits.py"
    assert metadata["scikit_learn"]
    assert metadata["torch"]


def test_the_data_file_stays_below_half_a_megabyte() -> None:
    assert len((resources.files("normswap.demo") / data.FILE).read_bytes()) < 500_000


def test_the_demo_does_not_need_scikit_learn() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\n"  # None makes every later import of it fail
        "from normswap.demo.data import load_network, load_digits\n"
        "load_network()(load_digits()[0][:1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("damage", ["missing", "truncated", "tensor left out"])
def test_a_damaged_data_file_is_refused_with_a_hint(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (resources.files("normswap.demo") / data.FILE).read_bytes()
    if damage == "truncated":
        (tmp_path / data.FILE).write_bytes(content[:-1])
    elif damage == "tensor left out":
        tensors = load(content)
        del tensors["network.head.bias"]
        (tmp_path / data.FILE).write_bytes(save(tensors))
    monkeypatch.setattr(data.resources, "files", lambda package: tmp_path)
    with pytest.raises(InputError) as caught:
        load_network()
    assert caught.value.code == "demo-data"
    assert "train_digits.py" in caught.value.hint
