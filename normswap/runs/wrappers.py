"""Whether a model is a module at all, and wrappers around one: those that are taken off, and those that pass all on."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from normswap.errors import InputError

__all__ = ["entry_of", "refuse_no_module", "refuse_script", "refuse_sharded", "unwrapped"]

logger = logging.getLogger(__name__)


def _all(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.inner(*args, **kwargs)


def _positional(self: Any, *args: Any) -> Any:
    return self.inner(*args)


def _shape(code: CodeType) -> tuple[bytes, int, int]:
    """Return what is the same in two functions that differ in names alone."""
    return code.co_code, code.co_argcount, code.co_flags


_PASSING_ON = {_shape(function.__code__) for function in (_all, _positional)}


def entry_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the module whose forward says what ``model`` takes, and its fqn; '' and the model itself as a rule.

    Another is it behind ``def forward(self, *args, **kwargs): return self.inner(*args, **kwargs)``.
    """
    path: list[str] = []
    found = model
    while (name := _passes_to(found)) is not None:
        path.append(name)
        found = found.get_submodule(name)
    return ".".join(path), found


def _passes_to(module: nn.Module) -> str | None:
    """Return the child that ``module`` hands all its arguments to, None where it does anything else."""
    if isinstance(module, torch.jit.ScriptModule):  # such a class has no forward to look at
        return None
    function = type(module).forward
    if not isinstance(function, FunctionType) or "forward" in vars(module):
        return None
    code = function.__code__
    if _shape(code) not in _PASSING_ON or code.co_names[0] not in module._modules:
        return None
    child = module._modules[code.co_names[0]]
    if child is None or child._forward_hooks or child._forward_pre_hooks:
        return None
    return code.co_names[0]


def refuse_no_module(model: object, called: str = "the model") -> None:
    """Raise InputError for a model that is no module; the error calls it ``called`` and says how to come to one."""
    if isinstance(model, nn.Module):
        return
    what = f"of type {type(model).__name__}"
    code, hint = "no-module", "give a torch.nn.Module"
    if model is None:
        what = "None"
    elif isinstance(model, type):
        what, hint = f"the class {model.__name__}", f"give an instance of it: {model.__name__}(...)"
    elif isinstance(model, torch.export.ExportedProgram):
        code, hint = "wrapped-model", "convert normswap.from_exported(program)"
    elif isinstance(model, Mapping):
        hint = "build the model and load such a state dict into it: model.load_state_dict(...)"
    elif isinstance(model, (str, os.PathLike)):
        hint = "read the file first: normswap.load reads what normswap.save wrote, torch.load other models"
    elif isinstance(getattr(model, "model", None), nn.Module):
        hint = "give its attribute model"
    raise InputError(f"{called} is {what}, and no torch.nn.Module", code=code, hint=hint)


def refuse_script(model: nn.Module) -> None:
    """Raise InputError for a TorchScript model: its modules take no hooks and no other modules."""
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "the model is a TorchScript model; its modules cannot be replaced",
            code="wrapped-model",
            hint="give the Python model that it was made from",
        )


def unwrapped(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the model inside of ``torch.optim.swa_utils.AveragedModel``, and notes on what was taken off.

    That wrapper passes whatever it is called with on: nothing of its forward tells which arguments the model takes. It
    averages the parameters of one model during training, and a network of another structure is not that model.

    Raises:
        InputError: The model is no module.
    """
    refuse_no_module(model)
    found = model
    while isinstance(found, AveragedModel):
        found = found.module
    if found is model:
        return model, ()
    text = f"the {type(model).__name__} was taken off: what follows is about its module, a {type(found).__name__}"
    logger.info(text)
    return found, (text,)


def refuse_sharded(model: nn.Module) -> None:
    """Raise InputError for a model whose parameters are spread over processes, or that is no module."""
    refuse_no_module(model)
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise InputError(
                f"the parameter '{name}' is sharded over processes (a DTensor)",
                code="sharded-model",
                hint="convert first and shard afterwards; to fold, store or export gather it: load "
                "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)), of "
                "torch.distributed.checkpoint.state_dict, into the converted model as it was before",
            )
