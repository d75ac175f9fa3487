"""What the commands run models on: inputs from a file, of a shape, or made up; and calibration data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import normswap as ns
from normswap.cli.console import note, progressing, working
from normswap.cli.flags import DataFlags, InputFlags
from normswap.cli.values import Shapes
from normswap.errors import InputError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["calibration_data", "example_inputs", "required_inputs", "samples_of", "stated_inputs"]

SEED = 0


def example_inputs(model: nn.Module | None, given: InputFlags) -> Any:
    """Return the inputs in --input-file, or seeded noise of --input-shape, or None where neither is given.

    Raises:
        InputError: The model does not take them.
    """
    shapes, path = given.shapes, given.input_file
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


def required_inputs(model: nn.Module | None, given: InputFlags, use: str = "") -> Any:
    """Return :func:`example_inputs`, or made-up ones with a note where none are given.

    Args:
        model: What takes the inputs, where it is no ONNX file.
        given: What the command was given.
        use: What a person should know about the use of made-up ones.

    Raises:
        InputError: None are given and none could be made up.
    """
    if (inputs := example_inputs(model, given)) is not None:
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
    from normswap.checks.onnx_file import OnnxFile
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
        with untouched(model):
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


def calibration_data(model: nn.Module, given: DataFlags, inputs: InputFlags, *, quiet: bool = False) -> Any:
    """Return the data of --calibration, or --synthetic samples, in batches; None where neither is given.

    Raises:
        InputError: Both are given, or the model does not take the data.
    """
    if given.synthetic is None:
        return _batches_of(model, given)
    if given.calibration is not None:
        raise InputError("--synthetic and --calibration are both given", code="inputs-twice", hint="give one of them")
    example = required_inputs(model, inputs, " for the synthetic samples")
    with progressing("making synthetic samples", quiet=quiet) as progress:
        return ns.synthesize_samples(model, example, count=given.synthetic, progress=progress)


def _batches_of(model: nn.Module, given: DataFlags) -> list[Any] | None:
    """Return the inputs in --calibration, cut along their first axis into batches of --batch-size."""
    path, size = given.calibration, given.batch_size
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


def samples_of(model: nn.Module, batches: Any) -> Any:
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
