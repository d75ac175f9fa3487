"""Forwards that gradient checkpointing runs a second time, within backward."""

from __future__ import annotations

import torch

from normswap.errors import InputError

__all__ = ["refuse_recomputation"]


def refuse_recomputation(what: str) -> None:
    """Raise where a forward in training runs within backward, though its output depends on how often it has run.

    A norm that normalizes by statistics which follow each batch would compute something else than the first time, and
    the gradients would be wrong without a word. A BatchNorm's output in training depends on the batch alone.

    Args:
        what: What cannot be run again, as the subject of a sentence.

    Raises:
        InputError: The forward runs within backward.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise InputError(
            f"{what} was run a second time by gradient checkpointing: its statistics have followed the batch since, so "
            "it would compute something else, and the gradients would be wrong",
            code="recomputed",
            hint="leave it out of the checkpointed part, or take another recipe, as wn+mobn or gn+ws",
        )
