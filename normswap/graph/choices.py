"""Choices at run time: modules that no run calls, and that another run may call where those that are seen do.

Note [Modules that no run calls]
``self.bns[domain](self.conv(x))`` with ``domain = 0`` shows one norm behind the layer, in every trace. That others
stand beside it shows only in the module tree. So a value that goes from one module to another is *not* proven to go
there always, where a module stands that

- no run calls;
- the code of the forwards around it can reach: each part of its name is a place in a container or a name in that code
  (an old head that no forward mentions is none);
- lies inside a module through whose forward the value passes; and
- could take the value or give it: a norm over as many channels, a layer with as many inputs or outputs, or anything
  else that shares a ModuleList or ModuleDict with one of the two.

Whether the choice is made by an argument, an attribute, a shape or the number of inputs makes no difference here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx, nn

from normswap.graph.bytecode import has_code, names_in_code
from normswap.graph.calls import Call, Calls
from normswap.graph.symbolic import capture_symbolic
from normswap.nn import FilterLayout
from normswap.nn.kinds import class_of, is_layer
from normswap.norms import norm_of

__all__ = ["Choices"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, fx.GraphModule)
"""What holds modules whose names no code needs to contain."""
_BY_ANY_NAME = frozenset(
    {"getattr", "modules", "children", "named_modules", "named_children", "get_submodule", "_modules", "__dict__"}
    | {"vars", "__getattr__"}
)
"""With these, code reaches a child whose name it does not contain."""


@dataclass
class Choices:
    """The modules that no run calls, and what they may do in another run.

    Args:
        flow: The calls of a capture.
    """

    flow: Calls
    _uncalled: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _names: dict[type, tuple[frozenset[str], frozenset[str]]] = field(default_factory=dict)

    def why_not_always(self, first: str, second: str, channels: int) -> str | None:
        """Return why the output of ``first`` may go elsewhere than into ``second`` although all runs show that it does.

        Args:
            first: The fqn of a module whose output goes into the other.
            second: That of the other.
            channels: The channels of the value between them.
        """
        other = self._beside((first, second), channels)
        if other is None:
            return None
        return f"{other} may be called instead of {first} or {second}: nothing that was traced or run calls it"

    def why_unwritable(self, owner: str, channels: int) -> str | None:
        """Return why a rewritten forward may do less than the old one: it would be what the traces show.

        Args:
            owner: The fqn of the module whose forward calls a norm functionally.
            channels: The norm's channels.
        """
        left = self._left_out(owner, channels)
        if left is None:
            return None
        kind = class_of(self._module(owner)).__name__
        return f"the forward of {kind}, which calls it, may also use {left}, which nothing that was traced or run does"

    def _beside(self, pair: tuple[str, str], channels: int) -> str | None:
        """Return a module that may be called in the place of one of two (Note [Modules that no run calls])."""
        passed = self._passed(pair)
        for around in [*passed, *self._reaching(pair, passed)]:
            if not has_code(self._module(around)):
                continue
            holders = {holder for one in pair for holder in self._lists_of(one, around)}
            for fqn in self._uncalled_in(around):
                if fqn in pair or fqn in self._trained:
                    continue
                if around in passed:
                    found = _parent(fqn) in holders or self._fits(fqn, pair, channels)
                else:
                    found = self._fits(fqn, pair, channels) and not self._replaces_both(fqn, pair, holders)
                if found:
                    return fqn
        return None

    def _left_out(self, owner: str, channels: int) -> str | None:
        """Return what a run of ``owner``'s forward may use that none does: a module, or a vector of ``channels``."""
        module = self._module(owner)
        if has_code(module):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.shape == (channels,) and id(tensor) not in self._read:
                    return f"{owner}.{name}".lstrip(".")
            return next((fqn for fqn in self._uncalled_in(owner) if fqn not in self._trained), None)
        return None

    @cached_property
    def _read(self) -> frozenset[int]:
        """The ids of the tensors that some forward reads."""
        tensors: set[int] = set()
        for trace in self.flow.capture.traces:
            for node in trace.graph.nodes:
                if node.op == "get_attr":
                    holder, _, name = trace.fqn(str(node.target)).rpartition(".")
                    tensors.add(id(getattr(self._module(holder), name, None)))
        return frozenset(tensors)

    # The forwards that a value passes through

    def _passed(self, pair: Sequence[str]) -> list[str]:
        """Return the modules through whose forward a value between ``pair`` passes."""
        calls = [call for one in pair for run in self.flow.calls.get(one, {}).values() for call in run]
        places = {place for call in calls for place in (call.node.meta["owner"], _parent(_path(call)))}
        common = _common(places)
        return list(
            dict.fromkeys(name for place in sorted(places) for name in _outwards(place) if _is_in(name, common))
        )

    def _reaching(self, pair: Sequence[str], passed: Sequence[str]) -> Iterator[str]:
        """Yield the modules further out whose code may call one of ``pair`` itself: ``self.block.conv(x)``."""
        for name in dict.fromkeys(name for one in passed for name in _outwards(one)):
            if name not in passed and any(self._names_all(name, one) for one in pair if _is_in(one, name)):
                yield name

    def _names_all(self, around: str, fqn: str) -> bool:
        """Tell whether the code of ``around`` has every part of ``fqn``: ``self.block.conv``, ``self.block[0]``."""
        named, values = self._named_by(self._module(around))
        parts = _parts(fqn, around)
        digits = [place for place, part in enumerate(parts) if part.isdigit()]
        taken_apart = all(parts[place - 1] in values or place - 1 in digits for place in digits)
        return len(parts) > 1 and taken_apart and all(part in named or part.isdigit() for part in parts)

    def _lists_of(self, fqn: str, around: str) -> Iterator[str]:
        """Yield the ModuleLists and ModuleDicts, within ``around``, that hold ``fqn`` or what it lies in."""
        for name in _outwards(_parent(fqn)):
            if name == around or not _is_in(name, around):
                return
            if isinstance(self._module(name), (nn.ModuleList, nn.ModuleDict)):
                yield name

    def _replaces_both(self, fqn: str, pair: Sequence[str], holders: Iterable[str]) -> bool:
        """Tell whether ``fqn`` lies in another element of a list than both of ``pair``: a block instead of a block."""
        return any(
            len(places := {_parts(one, holder)[0] for one in pair}) == 1 and _parts(fqn, holder)[0] not in places
            for holder in holders
            if all(_is_in(one, holder) for one in (fqn, *pair))
        )

    # The modules that no run calls

    def _uncalled_in(self, around: str) -> tuple[str, ...]:
        """Return the modules inside ``around`` that no run of its forward calls and that code can reach, outermost."""
        if around not in self._uncalled:
            capture = self.flow.capture
            called = self._called_from(around)
            # Of a forward that cannot be traced, records of runs alone show what it calls.
            hidden = any(capture.aliases[name] == capture.aliases[around] for name in capture.opaque)
            known = capture.aliases[around] in called and (self._recorded or not hidden)
            self._uncalled[around] = tuple(
                path
                for path, _ in self._module(around).named_modules(prefix=around)
                if known and capture.aliases[path] not in called and self._reachable(path, around)
            )
        return self._uncalled[around]

    def _called_from(self, around: str) -> frozenset[str]:
        """Return what runs of ``around``'s forward call.

        The trace of a scope inside is no evidence that it does. What an untraceable module calls is not known from
        outside, so all of it counts.
        """
        found = {name for scope, names in self._called.items() if _is_in(around, scope) for name in names}
        wholes = [self._module(name) for name in self.flow.capture.opaque if name in found and not _is_in(around, name)]
        inside = {id(module) for whole in wholes for module in whole.modules()}
        return frozenset(found | {n for n, module in self.flow.capture.modules.items() if id(module) in inside})

    @cached_property
    def _recorded(self) -> bool:
        return any(trace.recorded for trace in self.flow.capture.traces)

    @cached_property
    def _called(self) -> dict[str, set[str]]:
        """The modules that are called or read, and all around them, by the scope of the trace that shows it."""
        aliases = self.flow.capture.aliases
        found: dict[str, set[str]] = {}
        for trace in self.flow.capture.traces:
            paths = set()
            for node in trace.graph.nodes:
                paths.add(node.meta.get("owner", trace.scope))
                if node.op in ("call_module", "get_attr"):
                    target = trace.fqn(str(node.target))
                    paths.add(target if node.op == "call_module" else _parent(target))
            around = {name for path in paths for name in _outwards(path)}
            found.setdefault(trace.scope, set()).update(aliases[name] for name in around if name in aliases)
        return found

    @cached_property
    def _trained(self) -> frozenset[str]:
        """What train mode is shown to call, where the capture is of eval mode alone and knows nothing of it."""
        capture = self.flow.capture
        if True in capture.modes:
            return frozenset()
        return frozenset(Choices(Calls(capture_symbolic(capture.model, (True,))))._called.get("", ()))

    def _reachable(self, path: str, around: str) -> bool:
        """Tell whether each part of ``path``'s name is a place in a container or is named by code further out."""
        named: set[str] = set()
        holder = ""
        for name in [*reversed(list(_outwards(_parent(path))))]:
            module = self._module(name)
            own, _ = self._named_by(module)
            named |= own
            holder = name
            part = _parts(path, holder)[0]
            if not _is_in(holder, around):
                continue
            if not (isinstance(module, _CONTAINERS) or part in named or own & _BY_ANY_NAME):
                return False
        return True

    def _named_by(self, module: nn.Module) -> tuple[frozenset[str], frozenset[str]]:
        """Return what :func:`names_in_code` does; nothing where the code is torch's or a graph's."""
        if not has_code(module):
            return frozenset(), frozenset()
        if "forward" in module.__dict__:
            return names_in_code(module)
        if type(module) not in self._names:
            self._names[type(module)] = names_in_code(module)
        return self._names[type(module)]

    def _fits(self, fqn: str, pair: Sequence[str], channels: int) -> bool:
        """Tell whether ``fqn`` is a norm or layer that could give or take a value of so many channels."""
        module = self._module(fqn)
        others = [self._module(one) for one in pair if one in self.flow.capture.modules]
        if is_layer(module):
            layout, weight = FilterLayout.of(module), FilterLayout.weight(module)
            axes = {FilterLayout.weight(other).ndim for other in others if is_layer(other)}
            fits = channels in (layout.in_channels(weight), layout.out_channels(weight))
            return fits and (not axes or weight.ndim in axes)
        norm = norm_of(module)
        if norm is None:
            return False
        tensors = (*module._parameters.values(), *module._buffers.values())
        own = {t.numel() for t in tensors if t is not None and t.ndim == 1}
        axes_of = [set(n.axes(other)) for other in others if (n := norm_of(other)) is not None]
        able = set(norm.axes(module))
        return (not own or channels in own) and all(not able or not axes or able & axes for axes in axes_of)

    def _module(self, name: str) -> nn.Module:
        capture = self.flow.capture
        return capture.modules[capture.aliases[name]]


def _path(call: Call) -> str:
    return call.trace.fqn(str(call.node.target)) if call.node.op == "call_module" else call.node.meta["owner"]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_in(name: str, around: str) -> bool:
    """Tell whether the module ``name`` is ``around`` or lies inside it."""
    return not around or name == around or name.startswith(around + ".")


def _parts(name: str, around: str) -> list[str]:
    return name[len(around) :].lstrip(".").split(".")


def _outwards(name: str) -> Iterator[str]:
    """Yield ``name`` and the modules around it, the model last."""
    while name:
        yield name
        name = _parent(name)
    yield ""


def _common(names: set[str]) -> str:
    """Return the innermost module in which all of ``names`` lie."""
    first = next(iter(names), "")
    return next(name for name in _outwards(first) if all(_is_in(other, name) for other in names))
