"""The networks of timm, torchvision, transformers, smp, ultralytics and torch_geometric: how to make and call them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.loading.importing import import_quietly

TESTS = Path(__file__).resolve().parent.parent / "tests"
INSTALL = {
    "timm": "pip install --no-deps timm",
    "torchvision": "pip install --no-deps torchvision",
    "transformers": "pip install --no-deps transformers && pip install regex tokenizers huggingface_hub",
    "segmentation_models_pytorch": "pip install --no-deps segmentation-models-pytorch timm",
    "ultralytics": "pip install --no-deps ultralytics && pip install opencv-python-headless requests psutil",
    "torch_geometric": "pip install torch_geometric",
}
Inputs = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class Network:
    """One network.

    Args:
        package: The package it comes from.
        name: Its name there.
        family: What it shares its code with.
        make: Makes it, with random weights, on the default device.
        inputs: Its inputs, from the size of the batch and the side of a square image.
        sides: The sides to try, the smallest first.
        inside: Submodules whose outputs are compared, too: those of a detector that finds nothing are empty, and of one
            that finds something they jump with the last digit of a score.
    """

    package: str
    name: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    sides: tuple[int, ...] = (64, 96, 128, 224, 256)
    inside: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        return f"{self.package}/{self.name}"


def missing(module: str) -> str | None:
    """Return how to install a package that is not there, None where it is."""
    return None if importlib.util.find_spec(module) else INSTALL[module]


def noise(batch: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *shape, generator=generator)


def image(batch: int, side: int) -> Inputs:
    return (noise(batch, 3, side, side),)


def images(batch: int, side: int) -> Inputs:
    """A detector's: a list, of values between 0 and 1."""
    return (list(torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))),)


# ---------------------------------------------------------------------------------------- timm and torchvision


def timm_networks() -> Iterator[Network]:
    import_quietly("torchvision")
    timm = import_quietly("timm")
    for family in timm.list_modules():
        for name in timm.list_models(module=family):
            given = timm.models.get_pretrained_cfg(name)
            side = given.input_size[-1] if given is not None else 224
            sides = (side,) if given is not None and given.fixed_input_size else tuple(sorted({64, 128, 224, side}))
            channels = given.input_size[0] if given is not None else 3
            make = partial(timm.create_model, name, pretrained=False)
            yield Network("timm", name, family, make, partial(_planes, channels), sides)


def _planes(channels: int, batch: int, side: int) -> Inputs:
    return (noise(batch, channels, side, side),)


# Their convolutions and BatchNorms are fused already, or will be by torch's own quantization.
LEFT_OUT = {"torchvision": ("quantization", "the quantizable models are fused by torch's own quantization")}


def torchvision_networks() -> Iterator[Network]:
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    from zoo_packages import import_torchvision  # it gives detectors an nms on any build of torch

    models = import_torchvision().models
    for name in models.list_models():
        home = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
        if home.startswith(LEFT_OUT["torchvision"][0]):
            continue
        options: dict[str, Any] = {"weights": None}
        inputs, sides, inside = image, (64, 128, 224), ()
        if home.startswith(("detection", "segmentation")):
            options["weights_backbone"] = None
        if home.startswith("detection"):
            inputs, sides = images, (128, 320)
            inside = ("backbone", "rpn.head") if "rcnn" in name else ("backbone", "head")
        if home.startswith("video"):
            inputs, sides = _clip, (64, 112, 224)
        if home.startswith("optical_flow"):
            inputs, sides = _two_images, (128,)
        if home in ("googlenet", "inception"):
            options["init_weights"] = False
            sides = (64, 128, 299)
        make = partial(models.get_model, name, **options)
        yield Network("torchvision", name, home, make, inputs, sides, inside)


def _clip(batch: int, side: int) -> Inputs:
    return (noise(batch, 3, 16, side, side),)


def _two_images(batch: int, side: int) -> Inputs:
    return noise(batch, 3, side, side), noise(batch + 1, 3, side, side)[1:]


# ------------------------------------------------------------------------------------------------ transformers


def _pixels(batch: int, side: int) -> Inputs:
    return {"pixel_values": noise(batch, 3, side, side)}


def _series(batch: int, side: int) -> Inputs:
    return {"past_values": noise(batch, 32, 7)}


def _features(batch: int, side: int) -> Inputs:
    return {"input_features": noise(batch, 96, 80)}


def _sound(batch: int, side: int) -> Inputs:
    return {"input_values": noise(batch, 3200)}


def _matting(batch: int, side: int) -> Inputs:
    return {"pixel_values": noise(batch, 4, side, side)}


def _pair_of_images(batch: int, side: int) -> Inputs:
    return {"pixel_values": torch.rand(batch, 2, 3, side, side, generator=torch.Generator().manual_seed(batch))}


_SMALL_RESNET = {
    "depths": [2, 2, 2, 2],
    "hidden_sizes": [32, 64, 128, 256],
    "embedding_size": 32,
    "layer_type": "basic",
}
_SMALL_VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "out_indices": [0, 1, 2, 3],
}
_SERIES = {"num_input_channels": 7, "context_length": 32}
_SMALL_SPEECH = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def _small_detr(hf: Any) -> dict[str, Any]:
    return {
        **{"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "num_queries": 20},
        "backbone_config": hf.ResNetConfig(**_SMALL_RESNET, out_features=["stage4"]),
        "use_timm_backbone": False,
        "backbone": None,
        "use_pretrained_backbone": False,
    }


# Class, configuration, its options (or a function of the package that gives them), inputs, sides.
_TRANSFORMERS: tuple[tuple[str, str, Any, Callable[[int, int], Inputs], tuple[int, ...]], ...] = (
    ("ResNetForImageClassification", "ResNetConfig", {}, _pixels, (64,)),
    ("RegNetForImageClassification", "RegNetConfig", {}, _pixels, (64,)),
    ("MobileNetV1ForImageClassification", "MobileNetV1Config", {}, _pixels, (64,)),
    ("MobileNetV2ForImageClassification", "MobileNetV2Config", {}, _pixels, (64,)),
    ("MobileNetV2ForSemanticSegmentation", "MobileNetV2Config", {}, _pixels, (64,)),
    (
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
        _pixels,
        (64,),
    ),
    ("LevitForImageClassification", "LevitConfig", {}, _pixels, (224,)),
    ("LevitForImageClassificationWithTeacher", "LevitConfig", {}, _pixels, (224,)),
    ("MobileViTForImageClassification", "MobileViTConfig", {}, _pixels, (64, 256)),
    ("MobileViTForSemanticSegmentation", "MobileViTConfig", {}, _pixels, (64, 256)),
    ("MobileViTV2ForImageClassification", "MobileViTV2Config", {}, _pixels, (64, 256)),
    ("MobileViTV2ForSemanticSegmentation", "MobileViTV2Config", {}, _pixels, (64, 256)),
    ("SwiftFormerForImageClassification", "SwiftFormerConfig", {}, _pixels, (64, 224)),
    ("CvtForImageClassification", "CvtConfig", {}, _pixels, (64, 224)),
    ("SegformerForSemanticSegmentation", "SegformerConfig", {}, _pixels, (64, 128)),
    (
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        lambda hf: {
            "backbone_config": hf.ResNetConfig(**_SMALL_RESNET, out_features=["stage1", "stage2", "stage3", "stage4"]),
            "auxiliary_in_channels": 128,
        },
        _pixels,
        (64, 128),
    ),
    (
        "BeitForSemanticSegmentation",
        "BeitConfig",
        {**_SMALL_VIT, "image_size": 64, "semantic_loss_ignore_index": 255},
        _pixels,
        (64,),
    ),
    ("Data2VecVisionForSemanticSegmentation", "Data2VecVisionConfig", {**_SMALL_VIT, "image_size": 64}, _pixels, (64,)),
    (
        "DPTForDepthEstimation",
        "DPTConfig",
        {
            **{k: v for k, v in _SMALL_VIT.items() if k != "out_indices"},
            "image_size": 64,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 32, 64, 64],
            "fusion_hidden_size": 32,
            "use_batch_norm_in_fusion_residual": True,
        },
        _pixels,
        (64,),
    ),
    ("RTDetrForObjectDetection", "RTDetrConfig", {"encoder_layers": 1, "decoder_layers": 2}, _pixels, (128,)),
    ("RTDetrV2ForObjectDetection", "RTDetrV2Config", {"encoder_layers": 1, "decoder_layers": 2}, _pixels, (128,)),
    ("DFineForObjectDetection", "DFineConfig", {"encoder_layers": 1, "decoder_layers": 2}, _pixels, (128,)),
    ("RTDetrResNetBackbone", "RTDetrResNetConfig", {}, _pixels, (64,)),
    ("HGNetV2ForImageClassification", "HGNetV2Config", {}, _pixels, (64,)),
    ("TextNetForImageClassification", "TextNetConfig", {}, _pixels, (64,)),
    ("PPLCNetForImageClassification", "PPLCNetConfig", {}, _pixels, (64,)),
    ("DetrForObjectDetection", "DetrConfig", _small_detr, _pixels, (64,)),
    ("ConditionalDetrForObjectDetection", "ConditionalDetrConfig", _small_detr, _pixels, (64,)),
    ("TableTransformerForObjectDetection", "TableTransformerConfig", _small_detr, _pixels, (64,)),
    (
        "VitMatteForImageMatting",
        "VitMatteConfig",
        lambda hf: {
            "backbone_config": hf.VitDetConfig(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=64,
                num_channels=4,
                pretrain_image_size=64,
                out_features=["stage2"],
            ),
            "hidden_size": 64,
            "convstream_hidden_sizes": [48, 96, 192],  # as lists: the defaults are tuples, which its code cannot add
            "fusion_hidden_sizes": [256, 128, 64, 32],
        },
        _matting,
        (64,),
    ),
    ("PatchTSTModel", "PatchTSTConfig", {**_SERIES, "patch_length": 4}, _series, (0,)),
    ("PatchTSMixerModel", "PatchTSMixerConfig", {**_SERIES, "norm_mlp": "BatchNorm"}, _series, (0,)),
    ("Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", _SMALL_SPEECH, _sound, (0,)),
    (
        "ParakeetEncoder",
        "ParakeetEncoderConfig",
        {**_SMALL_SPEECH, "num_mel_bins": 80, "subsampling_conv_channels": 16},
        _features,
        (0,),
    ),
    ("EfficientLoFTRModel", "EfficientLoFTRConfig", {}, _pair_of_images, (64, 128)),
    ("AlignVisionModel", "AlignVisionConfig", {"width_coefficient": 0.5, "depth_coefficient": 0.5}, _pixels, (64,)),
)  # fmt: skip


def transformers_networks() -> Iterator[Network]:
    import_quietly("torchvision")
    hf = import_quietly("transformers")
    hf.logging.set_verbosity_error()
    for name, config, options, inputs, sides in _TRANSFORMERS:
        if hasattr(hf, name):
            make = partial(_from_config, hf, name, config, options)
            yield Network("transformers", name, config.removesuffix("Config"), make, inputs, sides)


def _from_config(hf: Any, name: str, config: str, options: Any) -> nn.Module:
    given = options(hf) if callable(options) else options
    made: nn.Module = getattr(hf, name)(getattr(hf, config)(**given))
    return made


# ---------------------------------------------------------------------------------------- smp and ultralytics

_SMP = (
    ("Unet", "resnet18"),
    ("Unet", "timm-mobilenetv3_small_100"),
    ("UnetPlusPlus", "resnet18"),
    ("MAnet", "mobilenet_v2"),
    ("Linknet", "resnet18"),
    ("FPN", "efficientnet-b0"),
    ("PSPNet", "resnet18"),
    ("PAN", "resnet18"),
    ("DeepLabV3", "mobilenet_v2"),
    ("DeepLabV3Plus", "resnet18"),
    ("UPerNet", "tu-resnet10t"),
    ("Segformer", "resnet18"),
    ("Unet", "densenet121"),
    ("FPN", "vgg11_bn"),
)


def smp_networks() -> Iterator[Network]:
    import_quietly("torchvision")
    smp = import_quietly("segmentation_models_pytorch")
    for decoder, encoder in _SMP:
        make = partial(getattr(smp, decoder), encoder, encoder_weights=None)
        yield Network("smp", f"{decoder}-{encoder}", decoder, make, image, (64, 128, 256))


def ultralytics_networks() -> Iterator[Network]:
    import_quietly("torchvision")
    import_quietly("ultralytics")
    tasks = importlib.import_module("ultralytics.nn.tasks")
    made = {"yolov8n": tasks.DetectionModel, "yolo11n": tasks.DetectionModel, "yolov8n-seg": tasks.SegmentationModel}
    for name, make in made.items():
        yield Network("ultralytics", name, "yolo", partial(make, f"{name}.yaml", verbose=False), image, (64,))


# --------------------------------------------------------------------------------------------- torch_geometric

_FEATURES, _WIDTH, _NODES_A_GRAPH = 16, 32, 12


def _ring(batch: int) -> Tensor:
    """The edges of ``batch`` graphs, in each of which every node knows the next one and the one after it."""
    nodes = torch.arange(batch * _NODES_A_GRAPH)
    graph, place = nodes // _NODES_A_GRAPH, nodes % _NODES_A_GRAPH
    ahead = [graph * _NODES_A_GRAPH + (place + step) % _NODES_A_GRAPH for step in (1, 2)]
    pairs = [torch.stack((nodes, to)) for to in ahead]
    return torch.cat([*pairs, *(pair.flip(0) for pair in pairs)], dim=1)


def _nodes(batch: int, side: int) -> Inputs:
    return (noise(batch * _NODES_A_GRAPH, _FEATURES),)


def _graph(batch: int, side: int) -> Inputs:
    return (*_nodes(batch, side), _ring(batch))


def _graphs(batch: int, side: int) -> Inputs:
    return (*_graph(batch, side), torch.arange(batch).repeat_interleave(_NODES_A_GRAPH))


def _with_encodings(batch: int, side: int) -> Inputs:
    return _nodes(batch, side) * 2


def _wide_graph(batch: int, side: int) -> Inputs:
    return noise(batch * _NODES_A_GRAPH, _WIDTH), _ring(batch)


def _known_nodes(batch: int, side: int) -> Inputs:
    return noise(_LINKX_NODES, _FEATURES), _ring(4)


_LINKX_NODES = 4 * _NODES_A_GRAPH  # it holds a weight for each node


def _of_geometric(name: str, *positional: Any, **options: Any) -> nn.Module:
    made: nn.Module = getattr(importlib.import_module("torch_geometric.nn"), name)(*positional, **options)
    return made


def _pna(**options: Any) -> nn.Module:
    several = {"aggregators": ["mean", "max"], "scalers": ["identity", "amplification"], "deg": torch.tensor([0, 0, 4])}
    return _of_geometric("PNA", _FEATURES, _WIDTH, 3, 8, **several, **options)


def _deep_layer(block: str) -> nn.Module:
    conv, norm = _of_geometric("GENConv", _WIDTH, _WIDTH), _of_geometric("BatchNorm", _WIDTH)
    return _of_geometric("DeepGCNLayer", conv, norm, nn.ReLU(), block)


def _transformer_layer(**options: Any) -> nn.Module:
    return _of_geometric("GPSConv", _WIDTH, _of_geometric("SAGEConv", _WIDTH, _WIDTH), heads=4, **options)


def geometric_networks() -> Iterator[Network]:
    import_quietly("torchvision")
    import_quietly("torch_geometric")
    sizes = (_FEATURES, _WIDTH, 3, 8)
    made: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Inputs]]] = {
        "MLP": (partial(_of_geometric, "MLP", [_FEATURES, _WIDTH, _WIDTH, 8]), _nodes),
        "MLP-act_first": (partial(_of_geometric, "MLP", [_FEATURES, _WIDTH, _WIDTH, 8], act_first=True), _nodes),
        "PNA": (partial(_pna, norm="batch_norm"), _graph),
        "PMLP": (partial(_of_geometric, "PMLP", _FEATURES, _WIDTH, 8, 3), _graph),
        "LINKX": (partial(_of_geometric, "LINKX", _LINKX_NODES, *sizes[:2], 8, 2, 2, 2), _known_nodes),
        "GPSConv": (_transformer_layer, _wide_graph),
        "SGFormer": (partial(_of_geometric, "SGFormer", _FEATURES, _WIDTH, 8), _graphs),
        "Polynormer": (partial(_of_geometric, "Polynormer", _FEATURES, _WIDTH, 8, 2, 1), _graphs),
        "Polynormer-pre_ln": (
            partial(_of_geometric, "Polynormer", _FEATURES, _WIDTH, 8, 2, 1, pre_ln=True, local_attn=True), _graphs
        ),
        "GPSENodeEncoder": (partial(_of_geometric, "GPSENodeEncoder", _WIDTH, _FEATURES, 8), _with_encodings),
        **{f"DeepGCNLayer-{b}": (partial(_deep_layer, b), _wide_graph) for b in ("res+", "res", "dense", "plain")},
    }  # fmt: skip
    for name in ("GCN", "GraphSAGE", "GIN", "GAT", "EdgeCNN"):
        for more in ({}, {"act_first": True}, {"jk": "cat"}):
            full = "-".join((name, *more))
            made[full] = (partial(_of_geometric, name, *sizes, norm="batch_norm", **more), _graph)
    for name, (make, inputs) in made.items():
        yield Network("torch_geometric", name, name.partition("-")[0], make, inputs, (0,))


PACKAGES: dict[str, tuple[str, Callable[[], Iterator[Network]]]] = {
    "timm": ("timm", timm_networks),
    "torchvision": ("torchvision", torchvision_networks),
    "transformers": ("transformers", transformers_networks),
    "smp": ("segmentation_models_pytorch", smp_networks),
    "ultralytics": ("ultralytics", ultralytics_networks),
    "torch_geometric": ("torch_geometric", geometric_networks),
}
