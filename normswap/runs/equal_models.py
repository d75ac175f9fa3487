"""Many processes' models: the same before something is done with all of them, and the same afterwards."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import InputError
from normswap.runs.processes import alone, objects, take_first

__all__ = ["make_equal", "refuse_different", "refuse_different_models"]


def refuse_different(what: str, text: str, hint: str) -> None:
    """Raise InputError where the processes do not have the same ``text``."""
    if len({*objects(what, zlib.crc32(text.encode()))}) > 1:
        raise InputError(f"the processes have different {what}", code="processes-differ", hint=hint)


def refuse_different_models(model: nn.Module, *, buffers: bool = True) -> None:
    """Raise InputError where the processes' models do not have the same parameters, and buffers."""
    if alone():
        return
    named = (*model.named_parameters(), *(model.named_buffers() if buffers else ()))
    every = objects("the model's values", {name: _bits(tensor) for name, tensor in named})
    for name, bits in every[0].items():
        if any(other.get(name) != bits for other in every):
            raise InputError(
                f"'{name}' has different values in the processes",
                code="processes-differ",
                hint="give all the values of one first: for t in model.state_dict().values(): dist.broadcast(t, 0)",
            )
    if len({tuple(one) for one in every}) > 1:
        raise InputError(
            "the processes' models have different parameters",
            code="processes-differ",
            hint="make the same model in all of them",
        )


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    """Return a tensor's form, and a sum of its bits, which no order of summation changes."""
    form = tuple(tensor.shape), str(tensor.dtype)
    if tensor.is_meta or type(tensor.data) is not Tensor or tensor.layout is not torch.strided:
        return form
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().view(-1)
    flat = torch.view_as_real(flat).view(-1) if flat.is_complex() else flat
    return *form, int(flat.view(words[flat.element_size()]).sum(dtype=torch.int64))


def make_equal(model: nn.Module) -> None:
    """Give all processes' models process 0's parameters and buffers."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if not t.is_meta}
    take_first("the new values", list(tensors.values()))
