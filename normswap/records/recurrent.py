"""A recurrent layer as a plan has it: its sizes, its matrices, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RecurrentSite", "RecurrentStep"]


@dataclass(frozen=True)
class RecurrentSite:
    """An LSTM, GRU or RNN, or a cell of one. It stands next to no norm: each of its matrices is one site of its own.

    Args:
        name: Its fqn.
        type: Its class.
        input_size: What it reads at each step.
        hidden_size: The size of its state.
        matrices: The names of its weight matrices, such as ``weight_ih_l0``. Each row makes one value of one gate.
        num_layers: Its layers.
        bidirectional: Whether each layer runs in both directions.
        proj_size: The size of its output where a projection makes it smaller, else 0.
        aliases: Further fqns of the same layer.
        bias: Whether it has biases.
        irreplaceable: Why no layer of another class may come in its place, or None.
    """

    name: str
    type: str
    input_size: int
    hidden_size: int
    matrices: tuple[str, ...]
    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    aliases: tuple[str, ...] = ()
    bias: bool = True
    irreplaceable: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All of its fqns."""
        return (self.name, *self.aliases)

    def fan_in(self, matrix: str) -> int:
        """How many values a row of one of its matrices has."""
        out = self.proj_size or self.hidden_size
        if matrix.startswith("weight_hr"):
            return self.hidden_size
        if matrix.startswith("weight_hh"):
            return out
        first = matrix.removesuffix("_reverse") in ("weight_ih", "weight_ih_l0")
        return self.input_size if first else out * (1 + self.bidirectional)

    @property
    def sizes(self) -> str:
        """The sizes in words: ``28 → 64, 2 layers, bidirectional``."""
        words = [f"{self.input_size} → {self.hidden_size}"]
        words += [f"projected to {self.proj_size}"] if self.proj_size else []
        words += [f"{self.num_layers} layers"] if self.num_layers > 1 else []
        words += ["bidirectional"] if self.bidirectional else []
        return ", ".join(words)


@dataclass(frozen=True)
class RecurrentStep:
    """What happens to one recurrent layer.

    Args:
        site: The layer.
        weight: The parametrization of its matrices, ``wn``, ``ws`` or ``aws``.
        notes: What a person should know about it.
    """

    site: RecurrentSite
    weight: str
    notes: tuple[str, ...] = ()
