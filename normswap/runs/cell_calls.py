"""A guard for runs on inputs of a size that may not fit: torch's recurrent cells end the process on some.

Note [Cells without a batch]
``nn.LSTMCell`` takes x and its state (h, c) with a batch axis, (N, features), or all without. It asks of each alone how
many axes it has, and gives all of them a batch axis where x has none: a loop over ``x[t]`` that makes its state from
``x.shape[1]`` passes a state of three axes on when x of (T, N, features) has come as (N, features). The kernel compares
the first two sizes alone and splits the second axis of what it computes, (1, N, 4 features), into four gates. Where it
has fewer than four, reading the fourth is a segmentation fault. Cells of the other kinds raise an error or broadcast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.nn.recurrent import RECURRENT_CALLS

__all__ = ["refuse_misfitting_cells", "seen_by_no_mode"]


class refuse_misfitting_cells(TorchFunctionMode):  # noqa: N801  (it is used as a function)
    """Within it, a step of a recurrent cell on an input or a state that is no (N, features) raises ValueError.

    See Note [Cells without a batch].
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if RECURRENT_CALLS.get(func, "").endswith("_cell"):
            given = dict(zip(("input", "hx"), args, strict=False)) | (kwargs or {})
            for x in (given.get("input"), *_tensors(given.get("hx"))):
                if isinstance(x, Tensor) and x.ndim != 2:
                    raise ValueError(f"a recurrent cell takes (N, features) and got {tuple(x.shape)}")
        return func(*args, **(kwargs or {}))


def _tensors(state: Any) -> tuple[Any, ...]:
    return tuple(state) if isinstance(state, (tuple, list)) else (state,)


def seen_by_no_mode(model: nn.Module) -> bool:
    """Tell whether ``model`` holds a TorchScript module that calls an LSTM's cell, where no mode sees the call."""
    scripts = (module for module in model.modules() if isinstance(module, torch.jit.ScriptModule))
    return any("lstm_cell" in str(getattr(script, "inlined_graph", "")) for script in scripts)
