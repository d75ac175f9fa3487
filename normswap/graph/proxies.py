"""What a forward sees of a value that is traced: every use of it is a node, and what no trace knows ends the trace.

Note [What a trace must not answer]
torch.fx's proxy has an answer for everything that Python asks of any object: it has a hash, a class and a text of its
own. ``x.shape[0] in {1, 2}`` is then False, ``isinstance(x, Tensor)`` as well, and ``f"{x.shape[-1]}"`` names no size:
the trace goes on, along a branch that no run takes. So here the class is that of the value itself where it is known,
and everything else that only a run can answer is an error that ends the trace, even where the forward catches it.
torch's own code goes on asking the proxy.
"""

from __future__ import annotations

import operator
import sys
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from normswap.operations.table import of_call

__all__ = ["ValueProxy", "WrittenProxy", "hook_barrier"]


def hook_barrier(value: Any) -> Any:
    """Stand in a graph where a forward hook sees, and may change, a value."""
    return value


_OF_MESSAGES = frozenset({"_assert", "print", "debug", "info", "warn", "warning", "warn_once", "warning_once"})
"""What takes a text that a person reads: code that calls one of these may write sizes down."""
_OWN = frozenset({"tracer", "node", "root", "attr", "_node", "tensor"})
_ATTRIBUTES: dict[str, type] = {
    **dict.fromkeys(("T", "mT", "H", "mH", "data", "real", "imag"), Tensor),
    **dict.fromkeys(("ndim", "itemsize", "nbytes"), int),
    **dict.fromkeys(("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "requires_grad"), bool),
    **{"shape": torch.Size, "dtype": torch.dtype, "device": torch.device, "layout": torch.layout},
}
_METHODS: dict[str, type] = {
    **dict.fromkeys(("dim", "ndimension", "numel", "nelement", "element_size", "storage_offset"), int),
    **dict.fromkeys(("is_contiguous", "is_floating_point", "is_complex"), bool),
    **dict.fromkeys(("chunk", "split", "unbind"), tuple),
}
_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)


class ValueProxy(fx.Proxy):
    """A value that may be written to: ``y[:, 0] = 0`` and ``y.data = z`` are uses of y like ``y.relu_()``."""

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            super().__setattr__(name, value)
        else:
            self.tracer.create_proxy("call_function", setattr, (self, name, value), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    # What no trace knows (Note [What a trace must not answer])

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if _is_torchs(sys._getframe(1)):
            return type(self)
        return self._class() or self._end("asks for the class of a value")

    def _class(self) -> type | None:
        """Return the class of the value itself, None where that is not known."""
        return _class_of(self.node, self.tracer)

    def __hash__(self) -> int:
        return id(self) if _is_torchs(sys._getframe(1)) else self._end("looks a value up")

    def __repr__(self) -> str:
        return super().__repr__() if _is_message(sys._getframe(1)) else self._end("makes a text of a value")

    def __format__(self, spec: str) -> str:
        return super().__repr__() if _is_message(sys._getframe(1)) else self._end("makes a text of a value")

    __str__ = __repr__

    def _number(self) -> Any:
        self._end("makes a number of a value")

    __int__ = __index__ = __float__ = __complex__ = _number

    def __len__(self) -> int:
        self._end("asks for the length of a value")

    def _end(self, what: str) -> NoReturn:
        """End the trace."""
        self.tracer.lost = True  # type: ignore[attr-defined]
        raise fx.proxy.TraceError(f"the forward {what} that is traced")


class _Attribute(fx.proxy.Attribute, ValueProxy):
    """An attribute of a value."""

    __getattr__ = ValueProxy.__getattr__


class WrittenProxy(ValueProxy):
    """A value that ``y *= a`` and its like write to."""

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _WrittenAttribute(self, name)


def _write(target: Any) -> Any:
    def write(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return write


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(WrittenProxy, f"__i{_name}__", _write(getattr(operator, f"i{_name}")))


class _WrittenAttribute(fx.proxy.Attribute, WrittenProxy):
    """An attribute of a value, as ``y.data``, which shares the value's memory."""

    __getattr__ = WrittenProxy.__getattr__


def _is_torchs(frame: FrameType) -> bool:
    """Tell whether it is torch's code or this package's that asks; what ``torch.is_tensor`` asks, its caller does."""
    root = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return root in ("torch", "normswap") and frame.f_code.co_name != "is_tensor"


def _is_message(frame: FrameType) -> bool:
    return _is_torchs(frame) or not _OF_MESSAGES.isdisjoint(frame.f_code.co_names)


def _class_of(node: Any, tracer: Any) -> type | None:
    """Return the class of a node's value, or of a constant; None where it is not known."""
    if not isinstance(node, fx.Node):
        return type(node)
    if node.op in ("placeholder", "get_attr"):  # a tensor, as inputs mostly are
        return Tensor
    if node.op == "call_module":
        known: type | None = tracer.class_given(str(node.target))
        return known
    if node.target is getattr:
        return _ATTRIBUTES.get(str(node.args[1]))
    if node.op == "call_method" and node.target in ("size", "stride"):
        whole = torch.Size if node.target == "size" else tuple
        return whole if len(node.args) + len(node.kwargs) == 1 else int
    if node.op == "call_method" and node.target in _METHODS:
        return _METHODS[str(node.target)]
    kinds = [_class_of(argument, tracer) for argument in node.args]
    if node.target is hook_barrier:
        return kinds[0]
    if node.target is operator.getitem:
        if kinds[0] is torch.Size:
            return torch.Size if kinds[1] is slice else int
        return Tensor if kinds[0] is Tensor else None
    if getattr(node.target, "__module__", "") == "_operator" and None not in kinds and Tensor not in kinds:
        if node.target in _COMPARISONS:
            return bool
        return float if node.target is operator.truediv or float in kinds else kinds[0]
    return Tensor if Tensor in kinds and of_call(node) is not None else None
