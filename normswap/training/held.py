"""Optimizers that a model itself holds, as in reinforcement learning; after a swap they have its old tensors."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.optim import Optimizer

from normswap.errors import Text

__all__ = ["notes_on_optimizers", "optimizers_in"]

_DEPTH = 4  # of containers in containers
_MOST = 1000  # entries of one container


def optimizers_in(model: nn.Module) -> Iterator[tuple[str, Optimizer]]:
    """Yield each optimizer among the plain attributes of a model's modules, also in lists and dicts, with its name."""
    seen: set[int] = set()
    for fqn, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules") and not name.endswith("_hooks"):
                for path, found in _within(f"{fqn}.{name}" if fqn else name, value, _DEPTH):
                    if id(found) not in seen:
                        seen.add(id(found))
                        yield path, found


def _within(path: str, value: object, depth: int) -> Iterator[tuple[str, Optimizer]]:
    if isinstance(value, Optimizer):
        yield path, value
    elif depth and type(value) in (list, tuple) and len(value) <= _MOST:  # type: ignore[arg-type]
        for place, one in enumerate(value):  # type: ignore[arg-type, var-annotated]
            yield from _within(f"{path}[{place}]", one, depth - 1)
    elif depth and isinstance(value, dict) and len(value) <= _MOST:
        for key, one in value.items():
            yield from _within(f"{path}[{key!r}]", one, depth - 1)


def notes_on_optimizers(model: nn.Module) -> tuple[Text, ...]:
    """Return what a person should know of the optimizers that a converted model holds."""
    return tuple(
        Text(
            f"the model holds an optimizer, '{path}', which goes on training the old parameters: "
            f"normswap.migrate_optimizer(result.model.{path}, result, inplace=True) gives it the new ones"
        )
        for path, _ in optimizers_in(model)
    )
