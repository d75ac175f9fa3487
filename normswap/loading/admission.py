"""Decide which names of a pickle may be looked up, and what may be called with the file's arguments.

# Note [What a file may do]

``torch.load(weights_only=True)`` calls every admitted name that the file REDUCEs, with arguments of the
file's choice: admitting a class admits its constructor. Models that were pickled by torch.save never need
that. Each of their modules is ``object.__new__(cls)`` (NEWOBJ without arguments) followed by
``__setstate__`` with its attributes (BUILD). So, of names that the user does not vouch for:

* a module class is created empty and given its attributes, never called. ``__new__`` must be Python's own,
  and ``__setstate__`` torch's own;
* what weights-only loading admits anyway (tensors, OrderedDict, set) may be called, but with plain data
  alone: ``_rebuild_from_type_v2(f, ...)`` calls its first argument;
* classes and functions may lie in the file as values where they were reviewed (`_norm_layer =
  BatchNorm2d`), but not under a hook table nor in the place of a method, where the next forward pass would
  call them;
* ``functools.partial``: making one runs nothing, but it binds arguments from the file to what a later
  forward calls. So its function must be a layer class of ``torch.nn.modules`` and all arguments plain
  constants (ViT keeps ``partial(LayerNorm, eps=1e-6)``): the worst is a layer of the wrong size. Its second
  function, in BUILD, counts too.
* ``collections.defaultdict`` becomes a plain dictionary, whatever its factory is; within a model, whose code may count
  on it, it is refused.
* ``builtins.getattr`` reaches everything from anything and is never called. Where each of its calls is for a
  module's method of a forward's name, ``methods.note`` is called in its place; see there.
"""

from __future__ import annotations

import torch
from torch import nn

from normswap.errors import InputError
from normswap.loading.methods import GETATTR, is_forward, note
from normswap.loading.refusals import INSTEAD, refuse_code, refuse_hooks, refuse_known, refuse_names
from normswap.loading.scanning import Call, Global, Made, Scan, globals_in, parts
from normswap.loading.trust import STDLIB_DATA, Trust, import_trusted, under

__all__ = ["admit", "judge"]

MODULE_PREFIXES = (
    "torch.nn",
    "torch.ao.nn",
    "torch.ao.quantization",
    "torch.quantization",
    "torch.optim.swa_utils",  # AveragedModel
    "torchvision.models",
    "torchvision.ops",
    "timm.models",
    "timm.layers",
)
VALUE_PREFIXES = ("torch.nn.modules", "torchvision.ops", "timm.layers")
SETSTATE_PREFIXES = ("torch.nn.modules", "torch.ao.nn")

# What weights-only loading admits by itself. It checks again, so a name too many here opens nothing.
PLAIN = {
    "collections.OrderedDict",
    "collections.Counter",
    "_codecs.encode",
    "builtins.bytearray",
    "builtins.set",
    "builtins.complex",
    "torch.Size",
    "torch.Tensor",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
    "torch.serialization._get_layout",
    "torch.storage.TypedStorage",
    "torch.storage.UntypedStorage",
    "torch._tensor._rebuild_from_type_v2",
}

# Reviewed one by one. Plain holders of numbers: created empty, attributes set, no __setstate__ of their own.
HOLDERS = {
    "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
    "torchvision.models.detection._utils.BoxCoder",
    "torchvision.models.detection._utils.BoxLinearCoder",
    "torchvision.models.detection._utils.Matcher",
    "torchvision.models.detection._utils.SSDMatcher",
    "timm.models._features.FeatureInfo",
}
# Functions of tensors, and two block classes that a model keeps in a list: values, never called on loading.
ACTIVATIONS = (
    "relu",
    "relu6",
    "silu",
    "mish",
    "elu",
    "leaky_relu",
    "softplus",
    "hardswish",
    "sigmoid",
    "tanh",
)
VALUES = {f"torch.nn.functional.{name}" for name in ACTIVATIONS} | {
    "torch._C._nn.gelu",
    "torchvision.ops.boxes.box_iou",
    "torchvision.models.optical_flow.raft._pass_through_h",
    "timm.layers.activations.gelu",
    "timm.models.nextvit.NextConvBlock",
    "timm.models.nextvit.NextTransformerBlock",
}
PARTIAL = "functools.partial"
DEFAULTDICT = "collections.defaultdict"
FACTORIES = {f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")}
# An Enum is pickled as a call with its value, and that call only looks the member up.
ENUMS = {"timm.layers.format.Format"}
REVIEWED = HOLDERS | VALUES | ENUMS | FACTORIES | {PARTIAL, DEFAULTDICT}
CONSTANTS = (tuple, str, int, float, bool, type(None))


def admit(scan: Scan, trust: Trust) -> list[tuple[object, str]]:
    """Return the allow-list for ``torch.serialization.safe_globals``, or refuse the file.

    All names are judged before the first module is imported.

    Raises:
        InputError: a name is not admitted, or an admitted one is used in a way that would run code.
    """
    return _resolve(judge(scan, trust), trust)


def judge(scan: Scan, trust: Trust) -> list[Global]:
    """Return the names to be admitted, beside those of every file; nothing is imported.

    Raises:
        InputError: as :func:`admit`.
    """
    refuse_known(scan, trust)
    strange = {found for found in scan.globals if not _is_plain(found)}
    hooks = {found for table in scan.hook_tables for found in globals_in(table) if not _is_plain(found)}
    refuse_hooks({found for found in hooks if not trust.covers(found)})
    bound = {call.callee for call in scan.calls if _is_bound_forward(call)}
    bound -= {call.callee for call in scan.calls if not _is_bound_forward(call)}
    refuse_names({found for found in strange - bound if not (trust.covers(found) or _is_reviewed(found))})
    for call in scan.calls:
        if not trust.covers(call.callee):
            _check_call(call)
        if call.opcode == "BUILD" and any(found.path == DEFAULTDICT for found in strange):
            _refuse_kept_defaultdict(call)
    values = scan.values & strange
    refuse_names({found for found in values if not (trust.covers(found) or _may_be_value(found))})
    return sorted(strange)


def _is_plain(found: Global) -> bool:
    if found.module == "torch":
        value = getattr(torch, found.name, None)
        data = isinstance(value, torch.dtype | torch.layout | torch.qscheme | torch.memory_format)
        return data or found.name.endswith("Storage") or found.path in PLAIN
    if found.module == "torch._utils":
        return found.name.startswith("_rebuild_")
    return found.path in PLAIN


def _is_reviewed(found: Global) -> bool:
    """Return whether the name may be looked up: a module class by its prefix, or an entry of a list."""
    if "." in found.name:
        return False
    return under(found.module, MODULE_PREFIXES) or found.path in REVIEWED


def _may_be_value(found: Global) -> bool:
    return under(found.module, VALUE_PREFIXES) or found.path in VALUES | FACTORIES


def _is_bound_forward(call: Call) -> bool:
    """Return whether this is what pickle writes for a bound method of a module, with a forward's name."""
    if call.callee.path != GETATTR or call.opcode != "REDUCE" or not isinstance(call.args, tuple):
        return False
    return len(call.args) == 2 and isinstance(call.args[0], Made) and is_forward(call.args[1])


def _check_call(call: Call) -> None:
    """Refuse a call of an admitted name with what the file chose, see Note [What a file may do]."""
    name = call.callee.path
    if _is_plain(call.callee):
        if passed := sorted(found.path for found in globals_in(call.args) if not _is_plain(found)):
            raise _unsafe(f"{name} would be given {passed[0]}")
    elif name == GETATTR:
        pass  # refused already where it is no bound forward
    elif name == PARTIAL:
        for part in parts(call.args):
            layer = isinstance(part, Global) and under(part.module, ("torch.nn.modules",))
            container = isinstance(part, Made) and part.maker is None and not part.args
            if not (layer or container or type(part) in CONSTANTS):
                raise _unsafe(f"{name} would bind something that is neither a torch.nn layer nor a constant")
    elif name == DEFAULTDICT:
        if call.opcode != "REDUCE":
            raise _unsafe(f"{name} would be given a state")
    elif name in ENUMS:
        if call.opcode != "REDUCE" or not all(type(part) in CONSTANTS for part in parts(call.args)):
            raise _unsafe(f"{name} would be called with something else than a member's name")
    elif call.opcode == "REDUCE" or (call.opcode == "NEWOBJ" and call.args != ()):
        raise _unsafe(f"{name} would be called with arguments from the file")


def _refuse_kept_defaultdict(call: Call) -> None:
    data = _is_plain(call.callee) or call.callee.module in STDLIB_DATA
    for part in [] if data else parts(call.args):
        if isinstance(part, Made) and isinstance(part.maker, Global) and part.maker.path == DEFAULTDICT:
            raise InputError(
                f"a {call.callee.path} in the file keeps a {DEFAULTDICT}, and that is read beside a model alone",
                code="model-defaultdict",
                hint=INSTEAD,
            )


def _plain_dictionary(*_: object) -> dict[object, object]:
    """Stand in for ``collections.defaultdict``: torch's unpickler fills none, and nothing here asks for a default."""
    return {}


def _resolve(names: list[Global], trust: Trust) -> list[tuple[object, str]]:
    admitted: list[tuple[object, str]] = []
    for found in names:
        value: object
        if found.path == DEFAULTDICT:
            value = _plain_dictionary
        elif trust.covers(found):
            value = trust.resolve(found)
        elif found.path == GETATTR:
            value = note
        else:
            value = getattr(import_trusted(found), found.name)
            _check_value(found, value)
        admitted.append((value, found.path))
        if found.path == "numpy.dtype":  # its instances are of classes that the file does not name
            dtypes = vars(import_trusted(Global("numpy.dtypes", "Float64DType")))
            admitted += [(v, f"numpy.dtypes.{k}") for k, v in dtypes.items() if k.endswith("DType")]
    return admitted


def _check_value(found: Global, value: object) -> None:
    """Refuse what lies under an admitted prefix and is no module class that is safe to fill."""
    if found.path in REVIEWED:
        return
    if not (isinstance(value, type) and issubclass(value, nn.Module) and under(value.__module__, MODULE_PREFIXES)):
        refuse_names({found})
        return
    setstate = next(base for base in value.__mro__ if "__setstate__" in vars(base))
    if value.__new__ is not object.__new__ or not under(setstate.__module__, SETSTATE_PREFIXES):
        refuse_code(found)


def _unsafe(what: str) -> InputError:
    return InputError(
        f"the file is not a plain saved model: {what}",
        code="pickle-unsafe",
        hint="nothing of it was run; get the model from its author as a state dict or a .safetensors file",
    )
