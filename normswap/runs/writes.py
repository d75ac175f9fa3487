"""The values of tensors while a forward runs: copied just before they are first written, and put back afterwards.

Note [Copied when written]
To save all values before each run would hold a second copy of the model, and nearly all models write nothing but a few
buffers. So a ``TorchDispatchMode`` sees each operation and copies a storage in front of the first that writes to it.
It looks at storages and not at tensors: ``.data``, views and ``detach()`` reach the same values under other objects,
and do not change a tensor's version. torch says of each of its operations what it writes, but for the running
statistics of ``native_batch_norm``; operations of other libraries are taken to write all that they are given. Not seen
is what goes past torch's operations: an address that a forward got from a tensor (``.numpy()``, ``.data_ptr()``), and
threads that it starts itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
    is_traceable_wrapper_subclass,
)

__all__ = ["SavedValues", "Watched", "kept", "unwatched", "watched_here"]


class SavedValues:
    """The values that some tensors have now, of those that are written from here on.

    Args:
        tensors: The tensors.

    Attributes:
        written: Whether any was written.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._saved: dict[int, torch.UntypedStorage] = {}
        self._whole: list[tuple[Tensor, Tensor]] = []  # tensors without a storage, such as sparse ones
        self._keeping, self._kept = False, set[int]()
        self.written = False
        with torch._C.DisableTorchFunction():
            for tensor in tensors:
                self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        wrapper: Any = tensor
        if is_traceable_wrapper_subclass(wrapper):  # the values are those of the tensors in it
            for name in wrapper.__tensor_flatten__()[0]:
                self._add(getattr(wrapper, name))
        elif tensor.is_meta:
            return
        elif (storage := _storage(tensor)) is not None:
            self._storages[storage._cdata] = storage
        else:
            self._whole.append((tensor, tensor.detach().clone()))

    def before_write(self, tensor: Tensor) -> None:
        """Note that the values of ``tensor`` are about to change."""
        storage = _storage(tensor)
        key = None if storage is None else storage._cdata
        if storage is None or key not in self._storages:
            return
        if self._keeping:
            self._kept.add(key)
        else:
            self.written = True
            self._save(key, storage)

    def save(self, tensor: Tensor) -> None:
        """Save the values of ``tensor`` now, for operations that do not say that they write it."""
        storage = _storage(tensor)
        if storage is not None and storage._cdata in self._storages:
            self._save(storage._cdata, storage)

    def _save(self, key: int, storage: torch.UntypedStorage) -> None:
        if key not in self._saved:
            self._saved[key] = storage.clone()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Take what is written within for the values that are to be put back."""
        before, self._keeping = self._keeping, True
        try:
            yield
        finally:
            self._keeping = before
            self._keep(self._kept)
            self._kept.clear()

    def keep(self, *tensors: Tensor) -> None:
        """Take the values that ``tensors`` have now for those that are to be put back."""
        storages = (_storage(tensor) for tensor in tensors)
        self._keep({storage._cdata for storage in storages if storage is not None})

    def _keep(self, keys: set[int]) -> None:
        for key in keys & self._saved.keys():
            self._saved[key] = self._storages[key].clone()

    def restore(self) -> None:
        """Put back what was written."""
        for key, values in self._saved.items():
            storage = self._storages[key]
            if storage.nbytes() != values.nbytes():
                storage.resize_(values.nbytes())
            storage.copy_(values)
        with torch.no_grad():
            for tensor, value in self._whole:
                tensor.copy_(value)

    @property
    def copied(self) -> int:
        """How many bytes were copied."""
        return sum(values.nbytes() for values in self._saved.values())


class Watched(TorchDispatchMode):
    """Lets saved values know of what the calling thread writes (Note [Copied when written])."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let ``torch.compile`` work within: attention with a score function compiles itself."""
        return True

    def __init__(self, values: SavedValues) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = values

    def __enter__(self) -> Watched:
        _watches().append(self.values)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        _watches().pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = _written(func)
        if written is None:
            self._note((args, kwargs))
        else:
            for place, name in written:
                self._note(args[place] if place < len(args) else kwargs.get(name))
        return func(*args, **kwargs)

    def _note(self, value: Any) -> None:
        for leaf in (value,) if isinstance(value, Tensor) else pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                self.values.before_write(leaf)


@contextmanager
def kept() -> Iterator[None]:
    """Let what is written within stay: it is no forward's, and is not put back."""
    with ExitStack() as stack:
        for values in _watches():
            stack.enter_context(values.keeping())
        yield


@contextmanager
def unwatched(*written: Tensor) -> Iterator[None]:
    """Do what is no forward's without being watched, which takes time: only ``written`` may be written, and stays."""
    with ExitStack() as stack:
        while isinstance(_get_current_dispatch_mode(), Watched):
            stack.enter_context(_pop_mode_temporarily())
        yield
        for values in _watches():
            values.keep(*written)


class watched_here:  # noqa: N801
    """Watch, in the thread that enters this, for the guards of the thread that has made it."""

    def __init__(self) -> None:
        self._values = tuple(_watches())

    def __enter__(self) -> None:
        self._stack = ExitStack()
        for values in self._values:
            self._stack.enter_context(Watched(values))

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()


_of_thread = threading.local()


def _watches() -> list[SavedValues]:
    """Return what the calling thread's guards have saved, innermost last."""
    if not hasattr(_of_thread, "watches"):
        _of_thread.watches = []
    watches: list[SavedValues] = _of_thread.watches
    return watches


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    try:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):  # sparse tensors have none, vmap's and fake ones do not tell it
        return None


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...] | None:
    """Return the place and the name of each argument that ``func`` may write; None where that may be any."""
    schema = getattr(func, "_schema", None)
    if schema is None or func.namespace not in ("aten", "prim", "prims"):
        return None
    named = ("running_mean", "running_var")
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write) or argument.name in named
    )
