"""Models that no trace gets through: torchvision's detectors, and networks written as Hugging Face writes them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from laws import distance
from torch import Tensor, nn
from zoo import randomize_
from zoo_packages import import_torchvision

import normswap as ns
from normswap.norms import is_convertible

pytestmark = pytest.mark.filterwarnings("ignore")  # of torchvision, for what it still uses

SIDE = 64
SMALL = {"min_size": SIDE, "max_size": SIDE, "num_classes": 3, "weights": None, "weights_backbone": None}
FEW = {"rpn_post_nms_top_n_test": 8, "rpn_post_nms_top_n_train": 8, "box_detections_per_img": 4}  # slow without C++
DETECTORS = {
    "retinanet_resnet50_fpn": {},
    "fcos_resnet50_fpn": {},
    "fasterrcnn_resnet50_fpn": FEW,
    "maskrcnn_resnet50_fpn": FEW,
}


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Without its C++ half torchvision compiles roi_align, which takes longer than all that is tested here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def detector(name: str) -> nn.Module:
    import_torchvision()
    from torchvision.models import detection

    model: nn.Module = getattr(detection, name)(**SMALL, **DETECTORS[name])
    return model.eval()


def image() -> list[Tensor]:
    return [torch.rand(3, SIDE, SIDE)]


def targets() -> list[dict[str, Tensor]]:
    masks = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
    masks[0, 8:40, 8:32] = 1
    return [{"boxes": torch.tensor([[8.0, 8.0, 32.0, 40.0]]), "labels": torch.tensor([1]), "masks": masks}]


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "maskrcnn_resnet50_fpn"])
def test_a_detector_converts_and_trains_on_one_image(name: str) -> None:
    result = ns.convert(detector(name), "gn+ws", example_inputs=(image(),))
    assert len(result.plan.steps) == 53
    for step in result.plan.steps:
        assert step.site.layer is not None
        assert step.site.proof == "checked"
        assert "eval mode only" in str(step.site.caveat)  # in train mode it wants targets
    assert not any(is_convertible(m) for m in result.model.modules())
    losses = result.model.train()(image(), targets())
    loss = torch.stack([value.sum() for value in losses.values()]).sum()
    loss.backward()
    assert bool(torch.isfinite(loss))


@pytest.mark.parametrize("name", ["fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn"])
def test_the_layers_of_other_detectors_are_found_and_checked(name: str) -> None:
    plan = ns.plan(detector(name), "wn+mobn", example_inputs=(image(),))
    assert [step.site.proof for step in plan.steps] == ["checked"] * 53


def test_with_targets_a_detector_is_checked_in_train_mode_too() -> None:
    plan = ns.plan(detector("retinanet_resnet50_fpn"), "ln", example_inputs=(image(), targets()))
    assert {step.site.caveat for step in plan.steps} == {None}
    assert {step.site.proof for step in plan.steps} == {"checked"}


def test_a_head_with_norms_shared_by_all_levels_keeps_its_function() -> None:
    import_torchvision()
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.retinanet import RetinaNetHead

    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d)
    head = RetinaNetHead(backbone.out_channels, 9, 3, norm_layer=partial(nn.BatchNorm2d))
    model = RetinaNet(backbone, 3, head=head, min_size=SIDE, max_size=SIDE).eval()
    randomize_(model, 0)
    for module in head.modules():
        if isinstance(module, nn.Conv2d):  # torchvision's are so small that nothing but the last bias would be seen
            nn.init.kaiming_normal_(module.weight)
    result = ns.convert(model, "wn+mobn", example_inputs=(image(),), check=False)
    shared = [step.site for step in result.plan.steps if step.site.norm.startswith("head.")]
    assert len(shared) == 8
    assert all(site.layer and site.proof == "checked" for site in shared)
    features = [torch.rand(1, 256, n, n, dtype=torch.float64) for n in (8, 4, 2)]
    with torch.no_grad():
        before, after = model.head.double()(features), result.model.head.double()(features)
        assert distance(after, before) < 1e-5  # the weights were converted in float32
        result.model.head.classification_head.conv[0][1].bias += 0.1
        assert distance(result.model.head(features), before) > 1e-3


# ------------------------------------------------------------------------------------- as Hugging Face writes them


class ModelOutput(OrderedDict[str, Tensor]):
    """A dict of a class of its own, into which torch's tree utilities do not look."""


class ConvLayer(nn.Module):
    """Pads by the input's size, which no trace knows, and then has convolution and norm beside each other."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, groups: int = 1, activation: bool = True) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, groups=groups, bias=False)
        self.normalization = nn.BatchNorm2d(outputs)
        self.activation = nn.ReLU6() if activation else None

    def forward(self, features: Tensor) -> Tensor:
        height, width = features.shape[-2:]
        (stride, _), (size, _) = self.convolution.stride, self.convolution.kernel_size
        down = max(size - stride if height % stride == 0 else size - height % stride, 0)
        right = max(size - stride if width % stride == 0 else size - width % stride, 0)
        features = F.pad(features, (right // 2, right - right // 2, down // 2, down - down // 2))
        features = self.convolution(features)
        if self.normalization is not None:
            features = self.normalization(features)
        return features if self.activation is None else self.activation(features)


class InvertedResidual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = ConvLayer(channels, 2 * channels)
        self.depthwise = ConvLayer(2 * channels, 2 * channels, groups=2 * channels)
        self.reduce = ConvLayer(2 * channels, channels, activation=False)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.reduce(self.depthwise(self.expand(features)))


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvLayer(3, 8, stride=2)
        self.layer = nn.ModuleList(InvertedResidual(8) for _ in range(2))
        self.classifier = nn.Linear(8, 3)

    def forward(
        self, pixel_values: Tensor | None = None, output_hidden_states: bool | None = None, return_dict: bool = True
    ) -> ModelOutput | tuple[Tensor, ...]:
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        hidden, every = self.stem(pixel_values), []
        for block in self.layer:
            hidden = block(hidden)
            every.append(hidden)
        logits = self.classifier(hidden.mean((2, 3)))
        if not return_dict:
            return logits, hidden
        return ModelOutput(logits=logits, last_hidden_state=hidden, every=tuple(every))


def mobilenet() -> MobileNet:
    model = MobileNet()
    randomize_(model, 0)
    return model.double()


def test_conv_and_norm_beside_each_other_in_an_untraceable_forward_are_found() -> None:
    model, x = mobilenet(), torch.randn(2, 3, 17, 16, dtype=torch.float64)
    assert not any(step.site.layer for step in ns.plan(model, "wn+mobn").steps)
    result = ns.convert(model, "wn+mobn", example_inputs={"pixel_values": x})
    assert len(result.plan.steps) == 7
    for step in result.plan.steps:
        owner = step.site.norm.rpartition(".")[0]
        assert step.site.layer == f"{owner}.convolution"
        assert (step.site.found_by, step.site.proof, step.site.caveat) == ("recorded", "checked", None)
    with torch.no_grad():
        before = model(x)
        assert distance(dict(result.model(x)), dict(before)) < 1e-12
        folded = ns.fold(result.model.eval(), example_inputs={"pixel_values": x})
        convolutions = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
        assert len(convolutions) == 7  # none in a norm's place
        assert all(m.bias is not None for m in convolutions)
        assert distance(dict(folded(x)), dict(before)) < 1e-12
        result.model.stem.normalization.bias[0] += 0.1
        assert distance(dict(result.model(x)), dict(before)) > 1e-3
