"""torchvision and timm for the tests, on any build of torch."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

__all__ = ["import_timm", "import_torchvision"]


def import_torchvision() -> Any:
    """Return torchvision, or skip the test where it is not installed."""
    stand_in = _provide_torchvision_ops()
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    if stand_in is not None:
        torchvision.ops.boxes._assert_has_ops = lambda: None  # nms is all that boxes needs, and it is there
    return torchvision


def import_timm() -> Any:
    """Return timm, or skip the test where it or torchvision, which it imports, is not installed."""
    import_torchvision()
    return pytest.importorskip("timm", reason="timm is not installed")


# Note [torchvision without its compiled half]
# torchvision's own library is built for one torch, PyPI's for the CUDA build. On a CPU-only torch it does not
# load, and `import torchvision` fails: it registers shape functions for two operators that do not exist then.
# So they are defined here, and only where the library does not load: an operator cannot be defined twice.
# `nms` computes, because every detector calls it; `qnms` (quantized boxes) is a name only.
@cache
def _provide_torchvision_ops() -> torch.library.Library | None:
    if _torchvision_library_loads():
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")  # the operators live as long as this object
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):  # normswap declares them too, to load a user's model
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", nms, "CPU")
    return library


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: keep the best box, drop what overlaps it by more, go on with the rest.

    ``boxes`` is (N, 4) as x1, y1, x2, y2 and ``scores`` is (N,); returns the kept indices, best score first.
    """
    order = scores.argsort(descending=True, stable=True)
    low, high = boxes[order].split(2, dim=1)
    area = (high - low).prod(dim=1)
    alive = torch.ones(len(order), dtype=torch.bool)
    for i in range(len(order)):
        if alive[i]:
            sides = torch.minimum(high[i], high[i + 1 :]) - torch.maximum(low[i], low[i + 1 :])
            common = sides.clamp(min=0).prod(dim=1)
            alive[i + 1 :] &= common <= iou_threshold * (area[i] + area[i + 1 :] - common)
    return order[alive]


def _torchvision_library_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # nothing to stand in for: the import skips the test
    try:
        torch.ops.load_library(next(Path(spec.origin).parent.glob("_C.*")))
    except (OSError, StopIteration):  # built for another torch, or no library at all
        return False
    return True
