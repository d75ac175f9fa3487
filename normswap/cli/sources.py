"""The model files that the commands read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normswap.cli.console import note, working
from normswap.cli.reading import Reading
from normswap.cli.values import read_arch_kwargs
from normswap.errors import InputError, Text, argument, marked

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Source"]


@dataclass(frozen=True)
class Source:
    """How to read a model file.

    Args:
        trust: Packages and scripts whose classes the file may use.
        arch: What a state dict belongs to.
        arch_kwargs: Arguments of ``arch``.
        key: The entry of a checkpoint that holds the weights.
        prefix: What is taken off the names of a state dict.
        arch_if_needed: Whether ``arch``, ``key`` and ``prefix`` are for those files only that need them.
    """

    trust: tuple[str, ...] = ()
    arch: str | None = None
    arch_kwargs: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    prefix: str | None = None
    arch_if_needed: bool = False

    @classmethod
    def of(cls, reading: Reading, *, arch_if_needed: bool = False) -> Source:
        """Return the source that the flags tell of."""
        return cls(
            tuple(reading.trust or ()),
            reading.arch,
            read_arch_kwargs(reading.arch_kwargs),
            reading.key,
            reading.prefix,
            arch_if_needed,
        )

    def open(self, path: Path) -> nn.Module:
        """Return the model in ``path``: stored by normswap, a whole model, an exported program, or a state dict."""
        try:
            model = self._open(path)
        except InputError as error:
            if error.message.startswith(("the file", "the model")):  # what is wrong with it, and not yet which it is
                error.message = Text(f"{str(path)!r}: {marked(error.message)}")
            raise
        from normswap.runs.recorded_inputs import fixed_sizes

        if sizes := fixed_sizes(model):
            shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
            any_size = " (* is any)" if "*" in shown else ""
            note(f"as exported, {path} takes {shown} and no other sizes{any_size}")
        return model

    def stored(self, path: Path) -> nn.Module:
        """Return the converted model in ``path``, a file by `normswap convert` or ``normswap.save``.

        Raises:
            InputError: It is another file.
        """
        from normswap.storage import store as storage

        if path.is_file() and not storage.is_stored(path):
            raise InputError(
                f"{str(path)!r} was not written by `normswap convert`: it does not say what its conversion did",
                code="storage-foreign",
                hint="give the .safetensors file that `normswap convert` wrote",
            )
        return self._open(path, like=True) if path.is_file() else self.open(path)

    def tensors(self, path: Path, model: nn.Module) -> dict[str, Any]:
        """Return the state dict in ``path``, under the names of ``model`` or of what it was before its conversions."""
        with working(f"reading {path}"):
            from normswap.loading.models import load_tensors
            from normswap.storage import store as storage
            from normswap.storage.replay import history

            if path.is_file() and storage.is_stored(path):
                self._refuse_unused(path)
                return dict(self._open(path).state_dict())
            name = type(model).__name__
            networks = {f"the converted {name}": model}
            networks |= {f"the {name} before its conversion": o.skeleton for o in history(model) if o.skeleton}
            targets = {what: network.state_dict(keep_vars=True) for what, network in networks.items()}
            return load_tensors(path, targets, trust=self.trust, key=self.key, prefix=self.prefix)

    def _open(self, path: Path, *, like: bool = False) -> nn.Module:
        with working(f"reading {path}"):
            from normswap.loading import load_model
            from normswap.loading.architectures import build
            from normswap.storage import store as storage

            if path.is_file() and storage.is_stored(path):
                if not like:
                    self._refuse_unused(path)
                fresh = None if self.arch is None else build(self.arch, self.arch_kwargs)
                return storage.load(path, model=fresh, trust=self.trust)
            given: dict[str, str | None] = {"arch": self.arch, "key": self.key, "prefix": self.prefix}
            while True:
                try:
                    return load_model(path, trust=self.trust, arch_kwargs=self.arch_kwargs, **given)
                except InputError as error:
                    unused = error.code.removesuffix("-unused")
                    if not self.arch_if_needed or given.get(unused) is None:
                        raise
                    given[unused] = None

    def _refuse_unused(self, path: Path) -> None:
        """Refuse flags about checkpoints beside a file by `normswap convert`, which has no entries."""
        for name, value in (("key", self.key), ("prefix", self.prefix)):
            if value is not None and not self.arch_if_needed:
                raise InputError(
                    f"{str(path)!r} was written by `normswap convert`: {argument(name, value)} is for other files",
                    code=f"{name}-unused",
                    hint="leave it out",
                )
