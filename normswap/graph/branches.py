"""Which instructions of a method its module's flags leave out.

In ``if self.allow_single_element and x.size(0) <= 1: …`` nothing runs where ``allow_single_element`` is False. A jump
that tests a flag of the method's first argument, and is taken, leaves out what lies between it and its target, unless
another jump leads there. The answer errs on the side of what runs: other branches count as such.
"""

from __future__ import annotations

import dis
from collections.abc import Mapping
from types import CodeType

__all__ = ["left_out"]

_NOTHING = ("CACHE", "NOP", "EXTENDED_ARG", "TO_BOOL")
_HANDLERS = ("SETUP_", "PUSH_EXC", "CHECK_EXC")


def left_out(code: CodeType, flags: Mapping[str, bool]) -> frozenset[int]:
    """Return the offsets of the instructions that do not run where ``flags`` are attributes of the first argument."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in _NOTHING]
    first = code.co_varnames[0] if code.co_argcount else None
    if any(step.opname.startswith(_HANDLERS) for step in steps) or any(_writes(step, first) for step in steps):
        return frozenset()
    jumps = {step.offset: step.argval for step in steps if "JUMP" in step.opname or "FOR_ITER" in step.opname}
    found: set[int] = set()
    for test in range(2, len(steps)):
        jump, attribute, owner = steps[test], steps[test - 1], steps[test - 2]
        if not (jump.opname.startswith("POP_JUMP") and jump.opname.endswith(("IF_TRUE", "IF_FALSE"))):
            continue
        of_first = owner.opname.startswith("LOAD_FAST") and owner.argval == first
        if attribute.opname != "LOAD_ATTR" or not of_first or jump.offset in jumps.values():
            continue
        if flags.get(attribute.argval) is not jump.opname.endswith("IF_TRUE"):
            continue
        inside = range(jump.offset + 1, jump.argval)
        if not any(target in inside and source not in inside for source, target in jumps.items()):
            found |= {step.offset for step in steps if step.offset in inside}
    return frozenset(found)


def _writes(step: dis.Instruction, first: str | None) -> bool:
    """Tell whether the first argument, or an attribute, becomes something else on the way."""
    return step.opname == "STORE_ATTR" or (step.opname.startswith("STORE_FAST") and step.argval == first)
