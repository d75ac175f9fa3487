"""Heads, such as a classifier: layers without a norm whose output is the model's; they are fitted like any site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.nn import FilterLayout
from normswap.nn.kinds import is_layer
from normswap.runs.calling import Batch, run_on_data
from normswap.runs.guard import set_mode, untouched
from normswap.runs.paired_sites import PairedSite
from normswap.runs.tensors import tensors_of

__all__ = ["find_heads"]


def find_heads(original: nn.Module, converted: nn.Module, sources: set[int], inputs: Batch) -> list[PairedSite]:
    """Return the layers without a norm whose output the model returns, such as a classifier, in the order of calls.

    Args:
        original: The original; left as it is.
        converted: The converted network.
        sources: The ids of its layers that are fitted at a norm.
        inputs: A batch.
    """
    outputs: dict[str, list[Any]] = {}

    def record(name: str) -> Callable[..., None]:
        return lambda _, args, output: outputs.setdefault(name, []).append(output)

    handles = []
    owners = Counter(id(p) for m in converted.modules() for p in m._parameters.values())
    reads: Counter[int] = Counter()
    try:
        with untouched(original), _Reads(reads):
            set_mode(original, False)
            for name, layer in converted.named_modules():
                if not is_layer(layer) or id(layer) in sources:
                    continue
                own = [p for p in layer._parameters.values() if p is not None]
                if layer._parameters.get("weight") is not None and all(owners[id(p)] == 1 for p in own):
                    handles.append(original.get_submodule(name).register_forward_hook(record(name)))
            returned = {id(tensor) for tensor in tensors_of(run_on_data(original, inputs))}
    finally:
        for handle in handles:
            handle.remove()
    heads = []
    for name, found in outputs.items():
        layer, before = converted.get_submodule(name), original.get_submodule(name)
        once = len(found) == 1 and all(reads[id(p)] == 1 for p in before._parameters.values() if p is not None)
        # Channels lie on axis 1 of a batch; more axes of a linear layer come before them.
        axes = 2 if isinstance(layer, nn.Linear) else FilterLayout.weight(layer).ndim
        if once and isinstance(found[0], Tensor) and id(found[0]) in returned and found[0].ndim == axes:
            heads.append(PairedSite(name, layer, None, before, alone=True))
    return heads


class _Reads(TorchFunctionMode):
    """Counts, by id, how often each parameter is computed with."""

    def __init__(self, counts: Counter[int]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # .shape and the like
            values = (*args, *(kwargs or {}).values())
            self.counts.update({id(value) for value in values if isinstance(value, nn.Parameter)})
        return func(*args, **(kwargs or {}))
