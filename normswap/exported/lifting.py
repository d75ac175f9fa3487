"""Lifting: calls of ATen in an exported program become calls of modules, which take the places of their tensors.

Note [Lifting]
A program calls ``aten.conv2d``, ``aten.batch_norm``, ``aten.dropout``, … on tensors that bare modules hold, and its
train flags are constants. Here such calls become calls of ``nn.Conv2d``, ``nn.BatchNorm2d``, ``nn.Dropout``, … which
take the holders' places and their very tensors. So whatever follows sees a model as a user would have written it:
names stay, and norms and dropout obey ``train()`` and ``eval()`` again. A call is lifted only where a module computes
the very same, in all calls that share its tensors. What is not lifted stays an operation, and is treated as one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.errors import CaptureError
from normswap.exported.building import build_dropout, build_layer, build_norm
from normswap.exported.reading import (
    DROPOUT_CALLS,
    NORM_CALLS,
    Call,
    dropout_call,
    layer_call,
    norm_call,
    transposed_weight,
)
from normswap.graph.ops import LAYER_CALLS

__all__ = ["Lifter", "refuse_control_flow"]

aten = torch.ops.aten


class Lifter:
    """Replaces calls by calls of modules, in the graph and the module tree of ``root``."""

    def __init__(self, root: fx.GraphModule) -> None:
        self.root, self.graph = root, root.graph
        self.notes: list[str] = []

    def lift(self) -> bool:
        """Lift what can be lifted; return whether the program was exported in train mode."""
        norms = self._calls(norm_call)
        mode = any(call.settings["training"] for call in norms)
        for group in self._groups(self._calls(layer_call)):
            self._lift_layer(group)
        for group in self._groups(norms):
            self._lift_norm(group)
        for call in self._calls(dropout_call):
            if call.settings["train"] == mode:  # else it is one that the model always, or never, applies
                self._lift_dropout(call)
        if left := sum(node.target in NORM_CALLS for node in self.graph.nodes):
            what = "1 batch norm stays" if left == 1 else f"{left} batch norms stay"
            self.notes.append(f"{what} an operation, with the batch's statistics or the stored ones as exported")
        if left := sum(node.target in DROPOUT_CALLS for node in self.graph.nodes):
            what = "1 dropout stays" if left == 1 else f"{left} dropouts stay"
            self.notes.append(f"{what} on, or off, as exported, and cannot follow train() and eval()")
        self._erase_unread()
        self.graph.lint()
        return mode

    def _calls(self, read: Callable[[fx.Node], Call | None]) -> list[Call]:
        found = (read(node) for node in self.graph.nodes if node.op == "call_function")
        return [call for call in found if call is not None]

    def _groups(self, calls: list[Call]) -> Iterator[list[Call]]:
        """Yield the calls on the same tensors, where all agree in everything else."""
        groups: dict[tuple[str | None, ...], list[Call]] = defaultdict(list)
        for call in calls:
            groups[tuple(call.tensors.values())].append(call)
        for group in groups.values():
            if all(call.settings == group[0].settings for call in group):
                yield group

    def _lift_layer(self, group: list[Call]) -> None:
        call = group[0]
        holder = self._holder(call.tensors)
        if holder is None:
            return
        module = build_layer(call.settings, self._tensor(call.tensors["weight"]), self._tensor(call.tensors["bias"]))
        if module is None:
            return
        self._put(holder, module, group)

    def _lift_norm(self, group: list[Call]) -> None:
        call = group[0]
        value = call.input.meta.get("val")
        tensors = {name: self._tensor(fqn) for name, fqn in call.tensors.items()}
        if not isinstance(value, Tensor):
            return
        holder = self._holder(call.tensors, ("num_batches_tracked",))
        counter = f"{holder}.num_batches_tracked" if holder else ""
        counting = self._counting(counter)
        if counting is None:
            return
        found = self._find(counter) if holder else None
        module = build_norm(call.settings, tensors, found, value.ndim)
        if module is None:
            return
        for node in counting:
            self.graph.erase_node(node)
        fqn = holder or self._free_name("norm")
        self._put(fqn, module, group)
        if holder is None:
            first = next(name for name in call.tensors.values() if name is not None)
            self.notes.append(
                f"'{fqn}', a call with {first!r}, now follows train() and eval(): whether it did is not in the program"
            )

    def _lift_dropout(self, call: Call) -> None:
        module = build_dropout(call)
        if module is not None:
            self._put(self._free_name("dropout"), module, [call])

    def _put(self, fqn: str, module: nn.Module, group: list[Call]) -> None:
        """Put ``module`` into the tree at ``fqn`` and call it instead of the operations of ``group``."""
        parent, _, name = fqn.rpartition(".")
        self.root.get_submodule(parent)._modules[name] = module
        for call in group:
            with self.graph.inserting_before(call.result):
                made = self.graph.call_module(fqn, (call.input,))
            made.meta = dict(call.result.meta)
            call.result.replace_all_uses_with(made)
            for node in call.done:
                self.graph.erase_node(node)

    def _holder(self, tensors: dict[str, str | None], further: tuple[str, ...] = ()) -> str | None:
        """Return the fqn of the bare module that holds ``tensors`` under their own names, and nothing but them.

        A tensor that is tied goes by one of its names everywhere, so the last tensor tells the module: a bias or
        statistics are rarely tied.
        """
        given = {name: self._find(fqn) for name, fqn in tensors.items() if fqn is not None}
        holder = [fqn for fqn in tensors.values() if fqn is not None][-1].rpartition(".")[0]
        module = self.root.get_submodule(holder)
        held = {n: t for table in (module._parameters, module._buffers) for n, t in table.items() if n not in further}
        bare = type(module) is nn.Module and not module._modules
        same = {id(t) for t in held.values() if t is not None} == {id(t) for t in given.values()}
        return holder if holder and bare and same and all(held.get(n) is t for n, t in given.items()) else None

    def _find(self, fqn: str) -> Any:
        parent, _, name = fqn.rpartition(".")
        return getattr(self.root.get_submodule(parent), name, None)

    def _tensor(self, fqn: str | None) -> Any:
        return None if fqn is None else self._find(fqn)

    def _counting(self, counter: str) -> list[fx.Node] | None:
        """Return the nodes that count the batches in ``counter``, users first; None where it serves something else."""
        pending = [node for node in self.graph.nodes if node.op == "get_attr" and node.target == counter]
        found: dict[fx.Node, None] = {}
        while pending:
            for user in pending.pop().users:
                adds = user.target in (aten.add_.Tensor, aten.add.Tensor) and user.args[1] == 1
                written = user.args[0] if user.target is aten.copy_.default else None
                back = isinstance(written, fx.Node) and written.op == "get_attr" and written.target == counter
                if not adds and not back:
                    return None
                if user not in found:
                    found[user] = None
                    pending.append(user)
        return [node for node in reversed(list(self.graph.nodes)) if node in found]

    def _free_name(self, stem: str) -> str:
        name, count = stem, 0
        while hasattr(self.root, name):
            count += 1
            name = f"{stem}_{count}"
        return name

    def _erase_unread(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            moved = node.op == "call_function" and transposed_weight(node) is not None
            if (node.op == "get_attr" or moved) and not node.users:
                self.graph.erase_node(node)


def refuse_control_flow(module: fx.GraphModule) -> None:
    """Refuse a program that calls layers or norms where a graph of its own holds them.

    Raises:
        CaptureError: ``module`` has BatchNorms, convolutions or linear layers inside a control-flow operation.
    """
    for name, child in module.named_modules():
        if child is module or not isinstance(child, fx.GraphModule):
            continue
        for node in child.graph.nodes:
            if node.target in NORM_CALLS | LAYER_CALLS:
                raise CaptureError(
                    f"the program calls {node.target} inside a control-flow operation ('{name}')",
                    code="exported-control-flow",
                    hint="export the model without torch.no_grad, autocast, cond or map around its layers",
                )
