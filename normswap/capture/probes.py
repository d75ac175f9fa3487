"""Numeric proofs: what a graph cannot show is tried on numbers, on a copy or with the model put back afterwards."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from normswap.capture.guard import set_mode, untouched
from normswap.capture.observed import run_on
from normswap.capture.ops import LAYERS, class_of
from normswap.nn import FilterLayout

__all__ = ["confirm_feeds", "scales_with_its_parameters"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def scales_with_its_parameters(layer: nn.Module) -> bool:
    """Tell whether scaling ``layer``'s filters and shifting its bias scales and shifts its output, per channel.

    True for torch's own forwards. A user's subclass is tried on noise: ``f(x; s·W, s·b + t) = s·f(x; W, b) + t``. It
    holds for a subclass with its own padding and not for one that standardizes its weight. Unknown, so False, for a
    subclass on the meta device.
    """
    base = next(cls for cls in LAYERS if isinstance(layer, cls))
    own = class_of(layer)
    same = own.forward is base.forward and "forward" not in layer.__dict__
    if issubclass(base, _ConvNd) and same:
        same = getattr(own, "_conv_forward", None) is getattr(base, "_conv_forward", None)
    if same:
        return True
    weight = layer.weight
    if not isinstance(weight, Tensor) or weight.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    layout = FilterLayout.of(layer)
    channels = layout.out_channels(weight)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight)

    if isinstance(layer, nn.Linear):
        x = noise(2, layer.in_features)
    else:
        assert isinstance(layer, _ConvNd)
        spans = [(k - 1) * d + 4 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        x = noise(2, layer.in_channels, *spans)
    scale, shift = noise(channels).abs() + 0.5, noise(channels)
    bias = layer.bias if isinstance(layer.bias, Tensor) else torch.zeros_like(shift)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    with untouched(layer, values=True), torch.no_grad():
        set_mode(layer, False)
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
        try:
            before = functional_call(layer, {"weight": weight, "bias": bias}, (x,)).movedim(axis, -1)
            moved = {"weight": layout.scale(weight, scale), "bias": bias * scale + shift}
            after = functional_call(layer, moved, (x,)).movedim(axis, -1)
        except Exception:  # a forward that does not run on noise proves nothing
            return False
    expected = before * scale + shift
    tolerance = _TOLERANCE.get(weight.dtype, 5e-2)
    return bool((after - expected).abs().amax() <= tolerance * expected.abs().amax())


def confirm_feeds(
    model: nn.Module, pairs: Sequence[tuple[str, str]], inputs: tuple[Any, ...] | Mapping[str, Any]
) -> frozenset[tuple[str, str]]:
    """Return those (layer, norm) pairs where the layer feeds the norm and nothing else, tried on ``inputs``.

    On a copy of the model each layer's filters and bias are scaled and shifted at random, and each norm undoes that on
    its input: where the model's output stays, no one else saw the difference. If all pairs together pass, each does;
    if not, they are halved until the wrong ones stand alone. A layer or norm that does not run on ``inputs`` proves
    nothing, nor does an output that is empty, as that of a detector which finds nothing, or that stays in any case.
    """
    clone = copy.deepcopy(model)
    set_mode(clone, False)
    with torch.no_grad():
        ran: set[str] = set()
        hooks = [
            clone.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.add(name))
            for name in {name for pair in pairs for name in pair}
        ]
        reference = _tensors(run_on(clone, inputs))
        for hook in hooks:
            hook.remove()
        pairs = [pair for pair in pairs if ran.issuperset(pair)]

        def stays(subset: Sequence[tuple[str, str]], *, undone: bool) -> bool:
            saved, handles = [], []
            generator = torch.Generator().manual_seed(len(subset))
            try:
                for name, norm in subset:
                    layer = clone.get_submodule(name)
                    layout = FilterLayout.of(layer)
                    weight, bias = layout.weight(layer), layer._parameters["bias"]
                    n = layout.out_channels(weight)
                    scale = (torch.rand(n, generator=generator) + 0.5).to(weight)
                    shift = torch.randn(n, generator=generator).to(weight)
                    saved.append((layer, weight.detach().clone(), bias))
                    weight.copy_(layout.scale(weight, scale))
                    layer.bias = nn.Parameter(shift if bias is None else bias * scale + shift)
                    if undone:
                        undo = _Undo(scale, shift)
                        handles.append(clone.get_submodule(norm).register_forward_pre_hook(undo, prepend=True))
                moved = _tensors(run_on(clone, inputs))
            except Exception:
                return False
            finally:
                for handle in handles:
                    handle.remove()
                for layer, weight_before, bias in saved:
                    FilterLayout.weight(layer).copy_(weight_before)
                    layer._parameters["bias"] = bias
            return len(moved) == len(reference) and all(map(_close, moved, reference))

        def search(subset: Sequence[tuple[str, str]]) -> frozenset[tuple[str, str]]:
            if not subset or stays(subset, undone=True):
                return frozenset(subset)
            if len(subset) == 1:
                return frozenset()
            half = len(subset) // 2
            return search(subset[:half]) | search(subset[half:])

        shows = any(tensor.numel() for tensor in reference) and not stays(pairs, undone=False)
        return search(pairs) if shows else frozenset()


class _Undo:
    """Undoes ``s·x + t`` per channel on a norm's input."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        self.scale, self.shift = scale, shift

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        shape = (1, -1, *(1,) * (x.ndim - 2))
        return ((x - self.shift.view(shape)) / self.scale.view(shape), *args[1:])


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = _TOLERANCE.get(a.dtype, 5e-2)
    return bool(((a - b).abs().amax() <= tolerance * b.abs().amax()).item()) if a.numel() else True
