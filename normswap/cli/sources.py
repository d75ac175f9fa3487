"""The command line's files: models and inputs that are read, outputs that appear whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normswap.cli.console import note, working
from normswap.cli.options import Shapes, read_arch_kwargs
from normswap.errors import InputError
from normswap.storage.writing import reported

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Source",
    "calibration_batches",
    "example_inputs",
    "read_text",
    "required_inputs",
    "samples_of",
    "save_whole",
    "stated_inputs",
    "store",
    "write_text",
]

SEED = 0


@dataclass(frozen=True)
class Source:
    """How to read a model file.

    Args:
        trust: Packages and scripts whose classes the file may use.
        arch: What a state dict belongs to.
        arch_kwargs: Arguments of ``arch``.
        arch_if_needed: Whether ``arch`` is for those files only that need one.
    """

    trust: tuple[str, ...] = ()
    arch: str | None = None
    arch_kwargs: Mapping[str, Any] = field(default_factory=dict)
    arch_if_needed: bool = False

    @classmethod
    def of(cls, trust: Sequence[str] | None, arch: str | None, arch_kwargs: str | None) -> Source:
        """Return the source that the options tell of."""
        return cls(tuple(trust or ()), arch, read_arch_kwargs(arch_kwargs))

    def open(self, path: Path) -> nn.Module:
        """Return the model in ``path``: stored by normswap, a whole model, an exported program, or a state dict."""
        try:
            model = self._open(path)
        except InputError as error:
            if error.message.startswith(("the file", "the model")):  # what is wrong with it, and not yet which it is
                error.message = f"{str(path)!r}: {error.message}"
            raise
        from normswap.runs.recorded_inputs import fixed_sizes

        if sizes := fixed_sizes(model):
            shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
            any_size = " (* is any)" if "*" in shown else ""
            note(f"as exported, {path} takes {shown} and no other sizes{any_size}")
        return model

    def _open(self, path: Path) -> nn.Module:
        with working(f"reading {path}"):
            from normswap.loading import load_model
            from normswap.loading.architectures import build
            from normswap.storage import store as storage

            if path.is_file() and storage.is_stored(path):
                fresh = None if self.arch is None else build(self.arch, self.arch_kwargs)
                return storage.load(path, model=fresh, trust=self.trust)
            try:
                arch = None if self.arch_if_needed else self.arch
                return load_model(path, trust=self.trust, arch=arch, arch_kwargs=self.arch_kwargs)
            except InputError as error:
                if error.code != "arch-missing" or self.arch is None or not self.arch_if_needed:
                    raise
            return load_model(path, trust=self.trust, arch=self.arch, arch_kwargs=self.arch_kwargs)


def example_inputs(model: nn.Module | None, shapes: Shapes, path: Path | None) -> Any:
    """Return the inputs in ``path``, or seeded noise of ``shapes``, or None where neither is given.

    Raises:
        InputError: The model does not take them.
    """
    if shapes and path is not None:
        raise InputError("--input-shape and --input-file are both given", code="inputs-twice", hint="give one of them")
    if not shapes and path is None:
        return None
    with working("reading the inputs" if path else "making the inputs"):
        if path is not None:
            from normswap.loading import load_inputs

            inputs: Any = load_inputs(path)
        else:
            inputs = _noise(model, shapes)
        if model is not None:
            _check_inputs(model, inputs, "--input-file" if path else "--input-shape")
    return inputs


def required_inputs(model: nn.Module | None, shapes: Shapes, path: Path | None, use: str = "") -> Any:
    """Return :func:`example_inputs`, or made-up ones with a note where none are given.

    Args:
        model: What takes the inputs, where it is no ONNX file.
        shapes: Their shapes.
        path: Their file.
        use: What a person should know about the use of made-up ones.

    Raises:
        InputError: None are given and none could be made up.
    """
    if (inputs := example_inputs(model, shapes, path)) is not None:
        return inputs
    with working("making inputs up"):
        from normswap.runs.recorded_inputs import recorded_inputs

        if model is not None and (inputs := recorded_inputs(model)) is not None:
            return inputs
        from normswap.runs.inputs import make_up_inputs

        made_up = None if model is None else make_up_inputs(model)
    if made_up is None:
        raise InputError(
            "no inputs are given, and none could be made up that the model takes",
            code="inputs-missing",
            hint="give --input-shape 1x3x224x224, once for each input, or --input-file FILE",
        )
    shape = "x".join(map(str, made_up[0].shape))
    note(f"the input shape {shape} was made up{use}: give --input-shape for the size that you use")
    return made_up


def stated_inputs(model: nn.Module | None, paths: Sequence[Path]) -> Any:
    """Return noise of the sizes that one of the .onnx files states, None where a program has inputs of its own."""
    from normswap.checks.comparison import OnnxFile
    from normswap.runs.recorded_inputs import recorded_inputs

    if model is not None and recorded_inputs(model) is not None:
        return None
    with working("making the inputs"):
        return next((inputs for path in paths if (inputs := OnnxFile(path).example()) is not None), None)


def _noise(model: nn.Module | None, shapes: Shapes) -> tuple[Any, ...]:
    import torch

    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point()) if model is not None else iter(())
    dtype, generator = next(dtypes, torch.float32), torch.Generator().manual_seed(SEED)
    try:
        return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    except (RuntimeError, MemoryError) as cause:
        raise InputError(
            f"no memory for inputs of the shape {'x'.join(map(str, shapes[0]))}",
            code="input-shape",
            hint="give a smaller --input-shape",
        ) from cause


def _check_inputs(model: nn.Module, inputs: Any, option: str) -> None:
    """Run the model once: a misfit shall be told before the long work and in terms of the option."""
    from normswap.loading import explain_dtype
    from normswap.loading.importing import first_line
    from normswap.runs.calling import run_on
    from normswap.runs.guard import set_mode, untouched

    try:
        with untouched(model, values=True):
            set_mode(model, False)
            run_on(model, inputs)
    except Exception as cause:
        raise InputError(
            f"{type(model).__name__} fails on the inputs of {option}: {type(cause).__name__}: {first_line(cause)}",
            code="inputs-do-not-fit",
            hint=explain_dtype(inputs, model) or _operators_hint(cause) or _signature_hint(model, inputs, option),
        ) from cause


def _operators_hint(cause: Exception) -> str:
    """Return what to do where a detector finds torchvision's operators (``nms``) missing, else nothing."""
    missing = re.search(r"torchvision::|custom C\+\+ ops", str(cause))
    return "install the torchvision that was built for the installed torch" if missing else ""


def _signature_hint(model: nn.Module, inputs: Any, option: str) -> str:
    import inspect

    takes = f"forward takes {inspect.signature(model.forward)}"
    if isinstance(inputs, Mapping):
        return f"{takes}, the file holds {', '.join(inputs)}"
    lists = "; a list of images is given by --input-file FILE, written by torch.save(([image, image],), FILE)"
    return takes + (lists if option == "--input-shape" else "")


def calibration_batches(model: nn.Module, path: Path | None, size: int) -> list[Any] | None:
    """Return the inputs in ``path``, cut along their first axis into batches of ``size``."""
    if path is None:
        return None
    with working("reading the calibration data"):
        from torch import Tensor

        from normswap.loading import load_inputs
        from normswap.runs.batches import bind_batches

        inputs = load_inputs(path)
        named = isinstance(inputs, Mapping)
        values: list[Any] = list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)
        lengths = {len(v) if isinstance(v, Tensor) and v.ndim else 0 for v in values}
        batches: list[Any] = [inputs]
        if len(lengths) == 1 and (length := lengths.pop()):
            cuts = [[v[i : i + size] for v in values] for i in range(0, length, size)]
            batches = [dict(zip(inputs, cut, strict=True)) if named else tuple(cut) for cut in cuts]
        _check_inputs(model, next(bind_batches(model, batches)), "--calibration")
        return batches


def samples_of(model: nn.Module, batches: list[Any] | None) -> Any:
    """Return two samples of the calibration data, None without any or where a program has inputs of its own."""
    from torch import Tensor
    from torch.utils import _pytree as pytree

    from normswap.runs.batches import bind_batches, some_samples
    from normswap.runs.recorded_inputs import recorded_inputs

    if batches is None or recorded_inputs(model) is not None:
        return None
    inputs = some_samples(next(bind_batches(model, batches)))
    values: list[Any] = list(inputs.values() if isinstance(inputs, Mapping) else inputs or ())
    if all(isinstance(value, Tensor) and value.shape[:1] == (1,) for value in values):
        # Exported with a single sample, a program would take no other number.
        return pytree.tree_map(lambda value: value.repeat_interleave(2, 0), inputs)
    return inputs


def read_text(path: Path) -> str:
    """Return a text file's content."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        why = (cause.strerror or str(cause)) if isinstance(cause, OSError) else "it is no text file"
        raise InputError(f"cannot read {str(path)!r}: {why}", code="file-unreadable", hint="check the path") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with reported(path):
        path.write_text(text, encoding="utf-8")


def store(model: nn.Module, path: Path, inputs: Any) -> None:
    """Write a converted model by ``normswap.save``, or as a program where ``path`` is a .pt2 file."""
    from normswap.storage import store as storage

    if path.suffix == ".pt2":
        _save_program(model, path, inputs)
    else:
        storage.save(model, path)


def _save_program(model: nn.Module, path: Path, inputs: Any) -> None:
    """Write a model, as it is in evaluation, as an exported program."""
    import torch

    from normswap.exported.program import to_exported
    from normswap.runs.inputs import as_inputs

    program = to_exported(model.eval(), as_inputs(inputs))
    with reported(path):
        torch.export.save(program, path)


def save_whole(model: nn.Module, path: Path, inputs: Any) -> None:
    """Write a folded model such that :func:`normswap.loading.load_model` reads it.

    Args:
        model: The model.
        path: A .pt2 file becomes a program, exported with ``inputs``, any other a file by ``torch.save``.
        inputs: Inputs of the model.
    """
    import torch
    from torch import fx

    from normswap.loading.importing import scripts_as_main

    if path.suffix == ".pt2":
        _save_program(model, path, inputs)
        return
    if isinstance(model, fx.GraphModule):
        raise InputError(
            f"the {type(model).__name__} comes from an exported program: it has no class that {path.name} could name",
            code="output-kind",
            hint=f"write {path.stem}.pt2",
        )

    try:
        with scripts_as_main(), reported(path), path.open("wb") as file:
            torch.save(model, file)
    except InputError:
        raise
    except Exception as cause:
        raise InputError(
            f"the {type(model).__name__} cannot be pickled: {type(cause).__name__}: {cause}",
            code="not-picklable",
            hint="write the .onnx file instead (--onnx), or fold it in Python and save its state dict",
        ) from cause
