"""Everything that hangs on a model, as it is now: attributes, containers, tensors, generators; to be put back.

Note [What hangs on a model]
The walk begins at the model and follows attributes, containers and gradients to whatever a forward may write: hidden
modules in lists, tensors in dicts, optimizers, counters in objects of a class of the model's own packages, attributes
of these classes. It does not go into other packages' objects (a trainer, a logger), functions or files: those belong to
the program around the model. Only what has changed is written when it is put back.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from functools import partial
from operator import is_
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normswap.runs.writes import SavedValues

__all__ = ["Snapshot"]

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size})
_EMPTY = frozenset({dict, OrderedDict, list, set})
_FOLLOWED = (nn.Module, torch.optim.Optimizer, SimpleNamespace)
_LIBRARIES = frozenset({"builtins", "torch", "numpy", "normswap"})
_Undo = Callable[[], object]
"""Puts something back; True where it is known to have changed."""


class Snapshot:
    """What hangs on ``model`` now (Note [What hangs on a model]).

    Args:
        model: The model.

    Attributes:
        values: The values of its tensors, of which those that are written are saved.
        changed: After :meth:`restore`, whether attributes, containers or tensors had changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.changed = False
        self._seen: dict[int, Any] = {}  # holds what it has seen: no id comes again
        self._undo: list[_Undo] = []
        self._tensors: list[Tensor] = []
        self._packages: set[str] = set()
        self._foreign: list[Any] = []
        self._walk([model])
        while own := [one for one in self._foreign if _package(type(one)) in self._packages]:
            self._foreign = [one for one in self._foreign if _package(type(one)) not in self._packages]
            for one in own:
                self._walk(list(self._instance(one)))
        buffers = [b for m in self._seen.values() if isinstance(m, nn.Module) for b in m._buffers.values()]
        self.values = SavedValues(self._tensors)
        for buffer in buffers:  # operations that do not say what they write, write statistics
            if buffer is not None:
                self.values.save(buffer)

    def restore(self) -> None:
        """Put everything back."""
        undone = [undo() for undo in self._undo]
        self.changed = any(one is True for one in undone) or self.values.written
        self.values.restore()

    def _walk(self, pending: list[Any]) -> None:
        while pending:
            value = pending.pop()
            kind = type(value)
            if kind in _ATOMS or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            if kind in _EMPTY and not value:  # as most of a module's tables of hooks are
                self._undo.append(partial(_clear, value))
            else:
                pending += self._children(value)

    def _children(self, value: Any) -> Iterator[Any]:
        """Note how ``value`` is put back, and yield what it holds."""
        if isinstance(value, Tensor):
            yield from self._tensor(value)
        elif isinstance(value, (dict, list, set, deque, bytearray)):
            yield from self._container(value)
        elif isinstance(value, (tuple, frozenset)):
            yield from value
        elif (undo := _undo_of_values(value)) is not None:
            self._undo.append(undo)
        elif isinstance(value, _FOLLOWED):
            yield from self._instance(value)
        elif hasattr(value, "__dict__") or hasattr(type(value), "__slots__"):
            self._foreign.append(value)

    def _container(self, value: Any) -> Iterator[Any]:
        before = value.copy()
        self._undo.append(partial(_refill, value, before))
        yield from before.values() if isinstance(before, dict) else before

    def _instance(self, value: Any) -> Iterator[Any]:
        cls, attributes = type(value), getattr(value, "__dict__", None)
        if isinstance(value, nn.Module):
            self._packages |= {_package(cls)} - _LIBRARIES
        if isinstance(value, torch.jit.ScriptModule):  # what it holds is in no table of Python's
            self._undo.append(partial(_restore_mode, value, value.training))
            yield from (*value.children(), *value.parameters(recurse=False), *value.buffers(recurse=False))
        if attributes is not None:
            before = dict(attributes)
            self._undo.append(partial(_restore_attributes, value, cls, before))
            yield from before.values()
        for name in _slots(cls):
            if hasattr(value, name):
                content = getattr(value, name)
                self._undo.append(partial(_restore_slot, value, name, content))
                yield content
        for owner in cls.__mro__:
            if id(owner) not in self._seen and _package(owner) not in _LIBRARIES:
                self._seen[id(owner)] = owner
                of_class = _plain_attributes(owner)
                self._undo.append(partial(_restore_class, owner, of_class))
                yield from of_class.values()

    def _tensor(self, tensor: Tensor) -> Iterator[Any]:
        self._tensors.append(tensor)
        self._undo.append(_undo_of_tensor(tensor))
        if tensor.is_leaf and tensor.grad is not None:
            yield tensor.grad
        if (attributes := getattr(tensor, "__dict__", None)) is not None:
            yield attributes


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _slots(cls: type) -> Iterator[str]:
    for owner in cls.__mro__:
        slots = vars(owner).get("__slots__", ())
        yield from (s for s in ((slots,) if isinstance(slots, str) else slots) if s not in ("__dict__", "__weakref__"))


def _plain_attributes(cls: type) -> dict[str, Any]:
    """Return the attributes of a class that are values: no methods, properties or classes."""
    return {
        name: value
        for name, value in vars(cls).items()
        if not name.startswith("__") and not isinstance(value, type) and not hasattr(type(value), "__get__")
    }


def _same(a: Any, b: Any) -> bool:
    """Tell whether two containers hold the very same objects in the same order."""
    if len(a) != len(b) or not all(map(is_, a, b)):
        return False
    return not isinstance(a, dict) or all(map(is_, a.values(), b.values()))


def _clear(value: Any) -> bool:
    """Empty a container that was empty, and tell whether it was not."""
    changed = len(value) > 0
    if changed:
        value.clear()
    return changed


def _refill(value: Any, before: Any) -> bool:
    if _same(value, before):
        return False
    value.clear()
    value.extend(before) if isinstance(value, (list, deque, bytearray)) else value.update(before)
    return True


def _restore_attributes(value: Any, cls: type, before: dict[str, Any]) -> bool:
    other = type(value) is not cls
    if other:
        value.__class__ = cls
    return _refill(value.__dict__, before) or other


def _restore_mode(value: torch.jit.ScriptModule, training: bool) -> bool:
    changed = value.training is not training
    if changed:
        value.training = training
    return changed


def _restore_slot(value: Any, name: str, before: Any) -> bool:
    changed = getattr(value, name, None) is not before
    object.__setattr__(value, name, before)
    return changed


def _restore_class(cls: type, before: dict[str, Any]) -> bool:
    new = _plain_attributes(cls).keys() - before.keys()
    for name in new:
        delattr(cls, name)
    changed = {name: value for name, value in before.items() if vars(cls).get(name) is not value}
    for name, value in changed.items():
        setattr(cls, name, value)
    return bool(new or changed)


def _undo_of_values(value: Any) -> _Undo | None:
    """Return what puts back an object that is neither a tensor nor a container and whose state can be asked for."""
    if isinstance(value, np.ndarray):
        array = value.copy()
        return lambda: np.copyto(value, array) if value.flags.writeable else None
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return partial(setattr, bits, "state", bits.state)
    return None


def _undo_of_tensor(tensor: Tensor) -> _Undo:
    """Return what gives ``tensor`` its storage, shape, class, gradient and hooks back, but not its values."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        cls, alias, place = type(tensor), tensor.detach(), _place(tensor)
        leaf, needs_gradient = tensor.is_leaf, tensor.requires_grad
        gradient = tensor.grad if leaf else None
        hooks = tensor._backward_hooks
        held = dict(hooks) if hooks else {}

    def undo() -> bool:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            now = type(tensor), _place(tensor), tensor.requires_grad, tensor.grad if leaf else None
            if now[0] is not cls:
                tensor.__class__ = cls
            if leaf and now[3] is not gradient:
                tensor.grad = None
            if now[1] != place:
                tensor.data = alias
            if leaf and tensor.requires_grad != needs_gradient:
                tensor.requires_grad_(needs_gradient)
            if leaf and tensor.grad is not gradient:
                tensor.grad = gradient
            hooked = tensor._backward_hooks is not hooks or (hooks is not None and _refill(hooks, held))
            if hooked:
                tensor._backward_hooks = hooks
        return hooked or now[:3] != (cls, place, needs_gradient) or now[3] is not gradient

    return undo


def _place(tensor: Tensor) -> Any:
    """Return where the values of ``tensor`` lie, and how."""
    try:
        storage = tensor.untyped_storage()._cdata
        return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    except (RuntimeError, NotImplementedError):
        return tensor.dtype
