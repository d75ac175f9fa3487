"""Read what a pickle would do, without doing it: a stack machine over its opcodes whose values are symbols.

The machine knows the opcodes of ``torch.load(weights_only=True)`` and no others, and moves its stack in the
same way, so that what it reports is what that unpickler would call.
"""

from __future__ import annotations

import pickletools
import warnings
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from normswap.errors import InputError

__all__ = ["Call", "Global", "Made", "Scan", "globals_in", "parts", "scan_pickle"]


class Global(NamedTuple):
    """A name that the pickle looks up: ``torch.nn.modules.linear`` and ``Linear``."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """Both parts, as torch's allow-list spells them."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Made:
    """An object that the pickle makes: a container, a call's result or an instance."""

    maker: object = None
    args: object = ()
    items: list[object] = field(default_factory=list)


class Call(NamedTuple):
    """One thing that unpickling would call: ``opcode`` is REDUCE, NEWOBJ or BUILD."""

    opcode: str
    callee: Global
    args: object


@dataclass
class Scan:
    """All names of a pickle, what would be called, and the names that lie in it as values."""

    globals: set[Global] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)
    values: set[Global] = field(default_factory=set)
    hook_tables: list[object] = field(default_factory=list)


def parts(value: object) -> Iterator[object]:
    """Yield `value` and everything it holds, once each; cycles and any depth are fine."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, Made):
            if id(item) in seen:
                continue
            seen.add(id(item))
            stack += [item.maker, item.args, *item.items]
        elif type(item) is tuple:
            if id(item) in seen:
                continue
            seen.add(id(item))
            stack += item
        yield item


def globals_in(value: object) -> set[Global]:
    """Return the names that `value` holds at any depth."""
    return {part for part in parts(value) if isinstance(part, Global)}


CONSTANTS = {
    "NONE": None,
    "NEWFALSE": False,
    "NEWTRUE": True,
    "EMPTY_TUPLE": (),
}
LITERALS = {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"}


class _Machine:
    """The unpickler's stack, marks and memo, with symbols for values."""

    def __init__(self) -> None:
        self.scan = Scan()
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: dict[int, object] = {}

    def pop_mark(self) -> list[object]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def put_tuple(self, items: list[object]) -> None:
        self.stack.append(tuple(items))
        self.scan.values.update(item for item in items if isinstance(item, Global))

    def store(self, items: list[object]) -> None:
        """Put `items` into the container on top of the stack."""
        target = self.stack[-1]
        if not isinstance(target, Made):
            raise _odd("an entry is put into something that is not a container")
        target.items += items
        self.scan.values.update(item for item in items if isinstance(item, Global))

    def store_pairs(self, items: list[object]) -> None:
        self.store(items)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str) and key.endswith("_hooks"):
                self.scan.hook_tables.append(value)  # read at the end: it may still grow through the memo

    def call(self, opcode: str) -> None:
        args = self.stack.pop()
        callee = self.stack.pop()
        if not isinstance(callee, Global) or type(args) is not tuple:
            raise _odd("something that is not a plain name is called")
        self.scan.calls.append(Call(opcode, callee, args))
        self.stack.append(Made(callee, args))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Made) or not isinstance(target.maker, Global):
            raise _odd("a state is given to something that was not made from a name")
        self.scan.calls.append(Call("BUILD", target.maker, state))

    def step(self, opcode: str, arg: object) -> None:
        """Move the stack as the unpickler would."""
        stack = self.stack
        if opcode in CONSTANTS:
            stack.append(CONSTANTS[opcode])
        elif opcode in LITERALS:
            stack.append(arg)
        elif opcode in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
            stack.append(Made())
        elif opcode == "GLOBAL":
            found = _global(str(arg))
            self.scan.globals.add(found)
            stack.append(found)
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            assert isinstance(arg, int)
            self.memo[arg] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            assert isinstance(arg, int)
            stack.append(self.memo[arg])
        elif opcode == "MARK":
            self.marks.append(stack)
            self.stack = []
        else:
            self.combine(opcode)

    def combine(self, opcode: str) -> None:
        """Move the stack for an opcode that makes something of what is on it."""
        stack = self.stack
        if opcode == "TUPLE":
            self.put_tuple(self.pop_mark())
        elif opcode in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self.put_tuple([stack.pop() for _ in range(int(opcode[-1]))][::-1])
        elif opcode == "APPEND":
            item = stack.pop()
            self.store([item])
        elif opcode == "APPENDS":
            self.store(self.pop_mark())
        elif opcode == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self.store_pairs([key, value])
        elif opcode == "SETITEMS":
            self.store_pairs(self.pop_mark())
        elif opcode in ("REDUCE", "NEWOBJ"):
            self.call(opcode)
        elif opcode == "BUILD":
            self.build()
        elif opcode == "BINPERSID":
            stack.append(Made(None, stack.pop()))
        else:
            raise _odd(f"the opcode {opcode} is not among those that weights-only loading reads")


def scan_pickle(data: bytes) -> Scan:
    """Return what unpickling `data` would look up and call.

    Raises:
        InputError: the pickle has another protocol than 2, is cut short, or uses the stack in an odd way.
    """
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged name may look like an escape sequence
            for opcode, arg, _ in pickletools.genops(data):
                if opcode.name == "PROTO":
                    if arg != 2:
                        raise _protocol(arg)
                elif opcode.name == "STOP":
                    machine.stack.pop()
                else:
                    machine.step(opcode.name, arg)
    except (ValueError, IndexError, KeyError, AssertionError, UnicodeError) as error:
        raise InputError(
            f"the file's pickle is damaged ({type(error).__name__}: {error})",
            code="file-damaged",
            hint="download or save it again",
        ) from None
    return machine.scan


def _global(arg: str) -> Global:
    """Split a GLOBAL's argument and apply the Python 2 names that protocol 2 writes."""
    module, _, name = arg.partition(" ")
    if (module, name) in NAME_MAPPING:
        return Global(*NAME_MAPPING[(module, name)])
    return Global(IMPORT_MAPPING.get(module, module), name)


def _protocol(found: object) -> InputError:
    return InputError(
        f"the file was written with pickle protocol {found}; only 2 can be read without running its code",
        code="pickle-protocol",
        hint="save it again with torch.save(model, path) and no pickle_protocol=",
    )


def _odd(what: str) -> InputError:
    return InputError(
        f"the file's pickle is not one that torch.save writes: {what}",
        code="pickle-unsafe",
        hint="nothing of it was run; get the model from its author as a state dict or a .safetensors file",
    )
