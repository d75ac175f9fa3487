"""Read exported programs (``.pt2``) so that nothing in the file can run code.

Note [What a program may hold]
``torch.export.load`` is not safe on its own. It unpickles tensors and objects without a filter, falls back to the
unfiltered unpickler where the filtered one fails, loads compiled libraries, evaluates the file's expressions for sizes
and its guards as Python, imports what an enum in a tree's description names, looks operators up by any dotted name, and
puts the file's names into code that it compiles. So the archive is checked first, and from the same bytes:

* its records are those of one program: weights and constants as plain bytes, example inputs whose pickle names nothing
  but tensors and containers;
* in the program's description every text stands where it is known, and has the form that belongs there: an identifier,
  a dotted name, an operator of a list of families, a size's arithmetic, a guard of comparisons of sizes.

What does not fit is refused, with its place. Someone who trusts such a file loads it with ``torch.export.load`` and
gives the program to :func:`normswap.from_exported`.
"""

from __future__ import annotations

import ast
import io
import json
import keyword
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from normswap.errors import InputError
from normswap.loading.admission import admit
from normswap.loading.importing import first_line
from normswap.loading.scanning import scan_pickle
from normswap.loading.trust import Trust

__all__ = ["read_program"]

_RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|extra/.+|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/(weights|constants)/(model_(weights|constants)_config\.json|(weight|tensor)_\d+)"
)
_HIGHER_ORDER = ("cond", "map_impl", "wrap_with_autocast", "wrap_with_set_grad_enabled")
_VISION = ("deform_conv2d", "nms", "ps_roi_align", "ps_roi_pool", "roi_align", "roi_pool")
_OPERATORS = re.compile(
    r"torch\.ops\.(aten\.(?!(from_file|save)\b)\w+\.\w+"
    rf"|higher_order\.({'|'.join(_HIGHER_ORDER)})|torchvision\.({'|'.join(_VISION)})\.\w+)"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|torch\.(sym_\w+|_sym_\w+)|math\.(ceil|floor|trunc)",
    re.ASCII,
)
_SYMPY = {"Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Abs", "true", "false"}
_SYMPY |= {
    "Equality",
    "Unequality",
    "LessThan",
    "GreaterThan",
    "StrictLessThan",
    "StrictGreaterThan",
    "And",
    "Or",
    "Not",
}
_ARITHMETIC = {"FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt"}
_ARITHMETIC |= {"CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToInt"}
_ARITHMETIC |= {"TruncToFloat", "RoundToInt", "RoundDecimal", "ToFloat", "Identity"}
_PYTHON = {"Eq", "Ne", "Le", "Lt", "Ge", "Gt", "inf", "max", "min", "abs"}
_EXPRESSION_NODES = (
    ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.keyword, ast.BinOp, ast.UnaryOp, ast.BoolOp,
    ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
_TREES = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


def read_program(file: BinaryIO, path: Path) -> ExportedProgram:
    """Return the program in ``file``, on the devices that it names.

    Raises:
        InputError: The file is damaged, of another version of torch, or holds what might run code.
    """
    data = file.read()
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(data))
        names = reader.get_all_records()
        if "models/model.json" not in names:
            raise InputError(
                f"{str(path)!r} is an exported program of an old format, or not torch.export.save's",
                code="exported-format",
                hint="load it with the torch that wrote it, and export the model again with the installed one",
            )
        _check_records(reader, names)
        _check_program(json.loads(reader.get_record("models/model.json")))
    except InputError:
        raise
    except Exception as error:  # whatever a damaged archive or description leads to
        raise _damaged(path, error) from None
    from torch.export.pt2_archive._package import load_pt2  # unlike torch.export.load without a way around the check

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_pt2(io.BytesIO(data)).exported_programs["model"]
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{str(path)!r} cannot be read as an exported program: {type(error).__name__}: {first_line(error)}",
        code="file-damaged",
        hint="copy it again, or export the model again with the installed version of torch, on the CPU",
    )


def _unsafe(what: str) -> InputError:
    return InputError(
        f"the exported program is not loaded: {what}",
        code="exported-unsafe",
        hint="nothing of it was run; where you trust the file: "
        "normswap.from_exported(torch.export.load(path)) in Python",
    )


def _check_records(reader: Any, names: list[str]) -> None:
    for name in names:
        if not _RECORDS.fullmatch(name):
            raise _unsafe(f"its record {name!r} is not one of a plain program's")
    for kind in ("weights", "constants"):
        payloads = json.loads(reader.get_record(f"data/{kind}/model_{kind}_config.json"))["config"]
        for name, payload in payloads.items():
            if payload["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
                raise _unsafe(f"{name!r} is pickled, or no tensor")
            _match(name, _dotted, f"the name of one of its {kind}")
    inputs = reader.get_record("data/sample_inputs/model.pt")
    if not inputs:
        return
    pickled = torch._C.PyTorchFileReader(io.BytesIO(inputs)).get_record("data.pkl")
    if admit(scan_pickle(pickled), Trust()):
        raise _unsafe("its example inputs hold more than tensors and containers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.load(io.BytesIO(inputs), weights_only=True)  # what torch will do; its way out is not reached
    for keys, _ in pytree.tree_flatten_with_path(found)[0]:
        for key in keys:
            place = getattr(key, "key", getattr(key, "idx", None))
            if not isinstance(place, int):
                _match(place, _identifier, "a key of its example inputs")


# ------------------------------------------------------------------------------------------------ the description


def _match(value: Any, rule: Callable[[str], bool], what: str) -> None:
    if not isinstance(value, str) or not rule(value):
        raise _unsafe(f"{what} is {str(value)[:60]!r}")


def _identifier(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z_]\w*", text, re.ASCII) is not None and not keyword.iskeyword(text)


def _argument(text: str) -> bool:
    """Tell whether ``text`` may name an operator's argument: also a Python keyword ('from'), or nothing."""
    return re.fullmatch(r"\w*", text, re.ASCII) is not None


def _dotted(text: str) -> bool:
    return re.fullmatch(r"[\w-]+(\.[\w-]+)*", text, re.ASCII) is not None


def _parsed(text: str) -> list[ast.AST]:
    """Return the nodes of a Python expression, none where it is no expression or a long one."""
    try:
        return [] if len(text) > 20_000 else list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _is_size(text: str) -> bool:
    """Tell whether ``text`` is the arithmetic of a size, as sympy's ``srepr`` writes it: ``Symbol('s0')``."""
    nodes = _parsed(text)
    words = {n.id for n in nodes if isinstance(n, ast.Name)}
    texts = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    calls = all(isinstance(n.func, ast.Name) for n in nodes if isinstance(n, ast.Call))
    known = all(word in _SYMPY | _ARITHMETIC or re.fullmatch(r"[suz]\w*\d+", word) for word in words)
    plain = all(re.fullmatch(r"\w+|-?\d+\.\d*(e[+-]?\d+)?", text, re.ASCII) for text in texts)
    return bool(nodes) and calls and known and plain and all(isinstance(n, _EXPRESSION_NODES) for n in nodes)


def _is_guard(text: str) -> bool:
    """Tell whether ``text`` compares sizes of the inputs: ``L['x'].size()[0] >= 2``."""
    nodes = _parsed(text) if text.isprintable() and "#" not in text else []
    for node in nodes:
        if isinstance(node, ast.Attribute):
            good = node.attr in ("size", "stride", "dim", "ndim", "storage_offset")
        elif isinstance(node, ast.Name):
            good = node.id == "L" or node.id in _SYMPY | _ARITHMETIC | _PYTHON
        elif isinstance(node, ast.Constant):
            good = isinstance(node.value, (int, float, bool)) or (type(node.value) is str and _identifier(node.value))
        else:
            good = isinstance(node, (*_EXPRESSION_NODES, ast.Subscript))
        if not good:
            return False
    return bool(nodes)


def _is_tree(text: str) -> bool:
    """Tell whether ``text`` describes nested tuples, lists and dicts."""
    version, root = json.loads(text)
    pending = [root]
    while pending:
        node = pending.pop()
        context = node["context"]
        context = json.loads(context) if isinstance(context, str) else context
        keys = context if isinstance(context, list) else [] if context is None else None
        if node["type"] not in _TREES or keys is None:
            return False
        if not all(isinstance(key, int) or (isinstance(key, str) and _identifier(key)) for key in keys):
            return False
        pending += node["children_spec"]
    return bool(version == 1)


def _constant(text: str) -> bool:
    """Tell whether ``text`` may be an operator's argument: torch quotes some in code, without care for quotes."""
    return text.isprintable() and not set(text) & set("'\"\\")


def _number(text: str) -> bool:
    return text in ("Infinity", "-Infinity", "NaN")


def _free(text: str) -> bool:
    return True


_RULES: dict[str, Callable[[str], bool]] = {
    "target": lambda text: _OPERATORS.fullmatch(text) is not None,
    "name": _argument,
    "as_name": _identifier,
    "forward_arg_names": _identifier,
    "parameter_name": _dotted,
    "buffer_name": _dotted,
    "tensor_constant_name": _dotted,
    "user_input_name": _identifier,
    "fqn": _free,  # where a submodule was called: a key, which nothing is made of
    "expr_str": _is_size,
    "guards_code": _is_guard,
    "in_spec": _is_tree,
    "out_spec": _is_tree,
    "type": _identifier,
    "verifiers": _identifier,
    "torch_version": _free,
    "as_string": _constant,
    "as_strings": _constant,
    "as_float": _number,
    "as_floats": _number,
}
"""The form of each text in a program's description, by the entry in which it stands."""
_NAMED = (
    "tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values", "range_constraints",
    "as_string_to_argument",
)  # fmt: skip
"""Entries whose keys are names."""


def _check_program(description: Any) -> None:
    for entry, value in _texts(description, ""):
        rule = _RULES.get(entry)
        if rule is None:
            raise _unsafe(f"it has a text in the entry {entry!r}: {value[:60]!r}")
        _match(value, rule, f"its entry {entry!r}")


def _texts(value: Any, entry: str) -> Iterator[tuple[str, str]]:
    """Yield every text with the entry in which it stands; names that are keys as those of a value."""
    if isinstance(value, str):
        yield entry, value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part, entry)
    elif isinstance(value, dict):
        for key, part in value.items():
            if entry in _NAMED:
                yield "name", key
            elif key == "metadata":
                continue  # stack traces and the like: comments, of which nothing is made
            yield from _texts(part, "" if entry in _NAMED else key)
