"""What a model holds, apart from its structure: collected from one model, given to another of the same structure."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.errors import InputError
from normswap.storage.origin import Slot, slots, substituted

__all__ = ["Contents", "collect", "give", "is_plain"]

_OWN = frozenset(vars(nn.Module()))
_OTHER_MODEL = {
    "code": "storage-model",
    "hint": "give a model of the architecture that was converted, built with the same arguments",
}
_SCALARS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Contents:
    """All tensors of a model, each once and contiguous on the CPU, and what else may change after a conversion.

    Args:
        tensors: By the first name that a tensor has.
        ties: Further names of the same tensor, and its first one.
        shared: Names of tensors of their own whose values are another's, in the same memory.
        strides: Of the tensors that are dense with another order of their axes, such as channels-last weights.
        loose: Names of tensors that are neither parameters nor buffers.
        trainable: Names of the tensors that require a gradient.
        training: Fqns of the modules in train mode.
        attributes: Per fqn, the plain values (numbers, texts, None, lists and dicts of these) that differ from the
            replay's.
    """

    tensors: dict[str, Tensor]
    ties: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    strides: dict[str, list[int]] = field(default_factory=dict)
    loose: list[str] = field(default_factory=list)
    trainable: list[str] = field(default_factory=list)
    training: list[str] = field(default_factory=list)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return everything but the tensors."""
        return json.dumps({k: v for k, v in vars(self).items() if k != "tensors"}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, tensors: dict[str, Tensor]) -> Contents:
        """Read what :meth:`to_json` gave.

        Raises:
            ValueError: The text is none of it.
        """
        found = json.loads(text)
        kinds = {f.name: list if str(f.type).startswith("list") else dict for f in fields(cls) if f.name != "tensors"}
        if not isinstance(found, dict) or found.keys() != kinds.keys():
            raise ValueError("the names of its entries are not those of a stored model")
        if wrong := [name for name, kind in kinds.items() if type(found[name]) is not kind]:
            raise ValueError(f"its entry {wrong[0]!r} is a {type(found[wrong[0]]).__name__}")
        return cls(tensors, **found)


def collect(model: nn.Module, replayed: nn.Module | None) -> Contents:
    """Return what ``model`` holds.

    Args:
        model: The model; only read.
        replayed: A model of the same structure, from which plain attributes are told apart; None where there is none.

    Raises:
        InputError: A tensor has no values, or is no plain strided tensor.
    """
    contents = Contents({})
    first: dict[int, str] = {}
    memory: dict[object, str] = {}
    storages: set[int] = set()
    for slot in slots(model):
        name, tensor = slot.name, slot.tensor
        if slot.kind == "attribute":
            contents.loose.append(name)
        if id(tensor) in first:
            contents.ties[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        if tensor.requires_grad:
            contents.trainable.append(name)
        plain = _plain(slot)
        where = (plain.device, plain.data_ptr(), plain.shape, plain.stride(), plain.dtype, plain.is_conj())
        if plain.numel() and where in memory:
            contents.shared[name] = memory[where]
            continue
        memory[where] = name
        if plain.stride() != torch.empty(plain.shape, device="meta").stride() and _is_dense(
            plain.shape, plain.stride()
        ):
            contents.strides[name] = list(plain.stride())
        contents.tensors[name] = _alone(plain, storages)
    contents.training.extend(fqn for fqn, module in model.named_modules() if module.training)
    if replayed is not None:
        contents.attributes.update(_changed_attributes(model, replayed))
    return contents


def _alone(tensor: Tensor, storages: set[int]) -> Tensor:
    """Return a contiguous tensor on the CPU that shares no memory with those of ``storages``, and add its own.

    The file's format takes no part of a tensor as another one: it becomes a tensor of its own.
    """
    found = tensor.resolve_conj().resolve_neg().cpu().contiguous()
    place = found.untyped_storage().data_ptr()
    found = found.clone() if found.numel() and place in storages else found
    storages.add(found.untyped_storage().data_ptr())
    return found


def _plain(slot: Slot) -> Tensor:
    tensor = slot.tensor.detach()
    data = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    if data.is_meta:
        raise _unstorable(slot, "is on the meta device and has no values", "give the model its values first")
    if type(data) is not Tensor or data.layout is not torch.strided or data.is_quantized:
        what = data.layout if type(data) is Tensor else f"a {type(data).__name__}"
        hint = "store the model before it is sharded, quantized or made sparse"
        raise _unstorable(slot, f"is {what} and no plain tensor", hint)
    return data


def _unstorable(slot: Slot, what: str, hint: str) -> InputError:
    return InputError(f"the {slot.kind} '{slot.name}' {what}", code="storage-tensor", hint=hint)


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Tell whether the strides are those of some order of the axes: without overlaps and without gaps.

    That of an axis of size 1 means nothing and may be any.
    """
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _changed_attributes(model: nn.Module, replayed: nn.Module) -> dict[str, dict[str, Any]]:
    changed: dict[str, dict[str, Any]] = defaultdict(dict)
    before = dict(replayed.named_modules())
    for fqn, module in model.named_modules():
        old = vars(before[fqn])
        for name, value in vars(module).items():
            if not _may_be_set(module, name) or not is_plain(value):
                continue
            if name not in old or repr(old[name]) != repr(value):  # NaN is NaN here, and True is not 1
                changed[fqn][name] = _encode(value)
    return changed


def _may_be_set(module: nn.Module, name: str) -> bool:
    taken = name in _OWN or (isinstance(module, fx.GraphModule) and name in ("_code", "_graph"))
    return not taken and not callable(getattr(type(module), name, None))


def is_plain(value: object) -> bool:
    """Tell whether a value is one that is stored: a number, a text, None, or a list, tuple or dict of these."""
    if type(value) in (list, tuple):
        return all(map(is_plain, value))  # type: ignore[call-overload]
    if type(value) is dict:
        return all(type(key) is str for key in value) and all(map(is_plain, value.values()))
    return type(value) in _SCALARS


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {"dict": {key: _encode(part) for key, part in value.items()}}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_encode(part) for part in value]}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict) and len(value) == 1:
        ((kind, parts),) = value.items()
        if kind == "dict" and isinstance(parts, dict):
            return {key: _decode(part) for key, part in parts.items()}
        if kind in ("list", "tuple") and isinstance(parts, list):
            return {"list": list, "tuple": tuple}[kind](map(_decode, parts))
    if type(value) not in _SCALARS:
        raise ValueError(f"an attribute is a {type(value).__name__}")
    return value


def give(model: nn.Module, contents: Contents) -> nn.Module:
    """Return a copy of ``model``, which is on the meta device, that holds ``contents``.

    Raises:
        InputError: The model has other tensors.
        ValueError: The contents contradict themselves.
    """
    there = {slot.name: slot for slot in slots(model)}
    _check_references(contents)
    _refuse_other_modules(model, contents)
    _refuse_other_tensors(there, contents)
    parameters = {contents.ties.get(name, name) for name, slot in there.items() if slot.kind == "parameter"}
    values: dict[str, Tensor] = {}
    require_gradients, in_training = set(contents.trainable), set(contents.training)
    for name in (*contents.tensors, *contents.shared):
        value = values[contents.shared[name]].detach() if name in contents.shared else _restored(name, contents)
        trainable = name in require_gradients
        values[name] = nn.Parameter(value, trainable) if name in parameters else value.requires_grad_(trainable)
    for name, root in contents.ties.items():
        values[name] = values[root]
    # By identity first, as the model may hold a tensor in a list or an object, too; then by name, for ties that differ.
    model = substituted(model, {id(there[name].tensor): value for name, value in values.items() if name in there})
    there = {slot.name: slot for slot in slots(model)}
    for name, value in values.items():
        if name in there:
            there[name].table[there[name].key] = value
        else:
            fqn, _, key = name.rpartition(".")
            _set(model, fqn, key, value)
    for fqn, module in model.named_modules():
        vars(module)["training"] = fqn in in_training
    for fqn, attributes in contents.attributes.items():
        for key, value in attributes.items():
            _set(model, fqn, key, _decode(value))
    return model


def _restored(name: str, contents: Contents) -> Tensor:
    stored = contents.tensors[name]
    # A copy in memory of its own: a file's tensors may all lie in one mapping, which each deep copy would copy whole.
    value = torch.empty_like(stored)
    if name in contents.strides:
        strides = contents.strides[name]
        if len(strides) != stored.ndim or not _is_dense(stored.shape, strides):
            raise ValueError(f"the strides {strides} of '{name}' do not fit its shape {tuple(stored.shape)}")
        value = torch.empty_strided(stored.shape, strides, dtype=stored.dtype)
    return value.copy_(stored)


def _set(model: nn.Module, fqn: str, key: str, value: Any) -> None:
    try:
        module = model.get_submodule(fqn)
    except AttributeError:
        raise ValueError(f"the model has no module '{fqn}'") from None
    if not _may_be_set(module, key):
        raise ValueError(f"'{fqn}.{key}' is not an attribute that may be set")
    vars(module)[key] = value


def _check_references(contents: Contents) -> None:
    own = {*contents.tensors, *contents.shared}
    for entry, names, known in (
        ("shared", contents.shared.values(), set(contents.tensors)),
        ("ties", contents.ties.values(), own),
        ("strides", contents.strides, set(contents.tensors)),
        ("trainable", contents.trainable, own),
        ("loose", contents.loose, own | set(contents.ties)),
    ):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"its entry {entry!r} names {unknown[0]!r}, which is not there")


def _refuse_other_modules(model: nn.Module, contents: Contents) -> None:
    known = {fqn for fqn, _ in model.named_modules()}
    if missing := [fqn for fqn in (*contents.training, *contents.attributes) if fqn not in known]:
        raise InputError(f"the model has no module '{missing[0]}', and the file stores its state", **_OTHER_MODEL)


def _refuse_other_tensors(there: Mapping[str, Slot], contents: Contents) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in contents.tensors.items()}
    for names in (contents.shared, contents.ties):
        shapes.update({name: shapes[root] for name, root in names.items()})
    wanted = {name: shape for name, shape in shapes.items() if name not in contents.loose}
    found = {name: tuple(slot.tensor.shape) for name, slot in there.items() if slot.kind != "attribute"}
    if different := differences(found, wanted, "the model", "the file"):
        raise InputError(f"the model does not have the tensors that the file stores: {different}", **_OTHER_MODEL)


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], here: str, there: str) -> str:
    """Return in words where two tables differ, the first three places and how many more; '' where they are equal."""
    lines = [f"'{name}' is missing in {here}" for name in wanted if name not in found]
    lines += [f"'{name}' is missing in {there}" for name in found if name not in wanted]
    lines += [
        f"'{name}' is {value} in {here} and {wanted[name]} in {there}"
        for name, value in found.items()
        if name in wanted and value != wanted[name]
    ]
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more
