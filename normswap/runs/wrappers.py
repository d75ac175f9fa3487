"""Wrappers around a whole model that a conversion takes off."""

from __future__ import annotations

import logging

from torch import nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["unwrapped"]

logger = logging.getLogger(__name__)


def unwrapped(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the model inside of ``torch.optim.swa_utils.AveragedModel``, and notes on what was taken off.

    That wrapper passes whatever it is called with on: nothing of its forward tells which arguments the model takes. It
    averages the parameters of one model during training, and a network of another structure is not that model.
    """
    found = model
    while isinstance(found, AveragedModel):
        found = found.module
    if found is model:
        return model, ()
    text = f"the {type(model).__name__} was taken off: what follows is about its module, a {type(found).__name__}"
    logger.info(text)
    return found, (text,)
