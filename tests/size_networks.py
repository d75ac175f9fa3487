"""Random forwards that ask for sizes, values and classes of what they compute, and write to it in place.

:func:`size_networks` is the strategy; its networks are those of ``random_networks``, with other shapes on which a
conversion must hold as well. Each step keeps the shape, so that any size runs through all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from random_networks import Network

__all__ = ["size_networks"]

_HEAD = """\
import math
import random
import torch
import torch.nn.functional as F
from torch import nn

SCALES = {1: 0.5, 4: 2.0, 7: -1.0, 12: 3.0}
"""
_SIZES = (
    *(
        "{}.shape[-1] > 6",
        "{}.shape[-1] > 10",
        "{}.shape[-1] < 5",
        "{}.size(0) == 1",
        "{}.shape[0] > 3",
        "len({}) == 2",
    ),
    *("{}.numel() > 600", "{}.shape[0] % 2 == 0", "{}.shape[-1] % 2", "{}.shape[0] in (1, 2)", "{}.shape[0] in SCALES"),
    *(
        "{}.shape[0] in {{1, 2}}",
        "SCALES.get({}.shape[-1], 0) > 1",
        "math.prod({}.shape[1:]) > 300",
        "max({}.shape) > 8",
    ),
    *(
        "tuple({}.shape[:1]) == (1,)",
        "{}.shape[:1] == torch.Size([1])",
        "str({}.shape[0]) == '1'",
        "int({}.shape[0]) > 3",
    ),
    *(
        "f'{{{}.shape[-1]}}' == '12'",
        "{}.shape[0] >= self.limit",
        "any(s > 10 for s in {}.shape)",
        "not {}.shape[0] - 1",
    ),
    *("{}.shape[0] == 1 and not self.training", "hasattr(self, f'conv{{{}.shape[0]}}')", "list({}.shape)[0] == 1"),
)
_VALUES = ("{}.mean() > 0", "({} > 0).any()", "float({}.sum()) > 0", "{}.max().item() > 2")
_CLASSES = (
    *(
        "isinstance({}, torch.Tensor)",
        "torch.is_tensor({})",
        "isinstance({}.shape[0], int)",
        "isinstance({}.shape, tuple)",
    ),
    *("isinstance({}, (list, tuple))", "isinstance(self.scale, float)", "{}.dtype == torch.float64", "{}.ndim > 3"),
    *("{}.dtype in {{torch.float32, torch.float64}}", "{}.device.type == 'cpu'", "self.flag", "{} is not None"),
)
_LOOPS = ("range({0}.shape[-1] // 3)", "range({0}.shape[0])", "range(len({0}) - 1)", "range(min({0}.shape[0], 3))")
_TRIED = ("len({})", "int({}.shape[0])", "SCALES[{}.shape[0]]", "float({}.shape[-1])", "[1, 2, 3][{}.shape[0]]")
_ARITHMETIC = (
    *(
        "{0} / {0}.shape[-1]",
        "{0} / math.sqrt({0}.shape[-1])",
        "{0} / len({0})",
        "{0} * SCALES.get({0}.shape[-1], 1.0)",
    ),
    *("torch.cat([{0}[: {0}.shape[0] // 2], 2 * {0}[{0}.shape[0] // 2 :]])", "{0}.reshape(2, -1).reshape({0}.shape)"),
    *("{0}.view({0}.size(0), -1).view({0}.size())", "{0} * torch.tensor(float({0}.shape[0]))", "{0} * self.scale"),
    *("torch.stack([t * (i + 1) for i, t in enumerate({0}.unbind(0))])", "(lambda t, k={0}.shape[0]: t * k)({0})"),
    *("{0} * max(1, {0}.shape[0] - 2)", "{0} * ({0}.shape[0] > 2)", "{0} - {0}[:, : {0}.shape[1] // 2].mean()"),
)
_WRITES = (  # {0} is written; {1} is another value
    *(
        "{0} *= 2",
        "{0} += 1",
        "{0} += {1}",
        "{0} *= torch.sigmoid({1})",
        "{0}[:, 0] = 0",
        "{0}[:, :1] *= 3",
        "{0}[0] = 0.5",
    ),
    *("{0}[:, :1].mul_(2)", "{0}.add_({1})", "F.relu_({0})", "{0}.clamp_(min=-0.5)", "{0}.detach().mul_(2)"),
    *("{0}.data.add_(1)", "{0}.data = {0}.data * 2", "{0}.masked_fill_({0} < 0, 0.25)", "{0}.copy_({0} * 2)"),
    *(
        "{0}.copy_({1})",
        "{0}.index_put_((torch.tensor([0]),), torch.tensor(0.5, dtype={0}.dtype))",
        "{0}.select(1, 0).zero_()",
    ),
    *(
        "a, b = {0}.chunk(2, 1); a += b",
        "q = {0}.view({0}.shape[0], -1); q[:, 0] = 1",
        "q = {0}.flatten(1); q.mul_(0.5)",
    ),
    *(
        "q = {0}; q *= 2",
        "q = {0}; {0} = {0} * 2; q.add_(1)",
        "q = {0}.transpose(0, 1); q += 1",
        "l = [{0}]; l[0] += 1",
    ),
    *(
        "torch.add({0}, 1, out={0})",
        "b = torch.empty_like({0}); torch.add({0}, {1}, out=b); {0} = b",
        "torch.sigmoid_({0})",
    ),
    *(
        "b = torch.zeros_like({0}); b.copy_({0}); {0} = b",
        "b = {0}.new_zeros({0}.shape); b[:, 1:] = {0}[:, 1:]; {0} = b",
    ),
    *("self.last = {0}; self.last.mul_(2)", "{0}.div_({0}.shape[0])", "torch._foreach_mul_([{0}], 2.0)"),
    *("[t.mul_(2) for t in {0}.unbind(1)[:1]]", "d = {{'k': {0}}}; d['k'] *= 2", "F.leaky_relu_({0}, 0.2)"),
    *(
        "F.dropout({0}, 0.3, self.training, inplace=True)",
        "{0}.transpose_(0, 1).transpose_(0, 1)",
        "{0}.lerp_({1}, 0.5)",
    ),
)


@dataclass
class _Writer:
    """One class that is being written.

    Args:
        r: Where all choices come from.
        rank: How many axes of space values have.
        padded: Whether convolutions have zero padding.
        functional: Whether norms may be calls.
    """

    r: random.Random
    rank: int
    padded: bool
    functional: bool
    inner: bool = False
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    features: set[str] = field(default_factory=set)
    values: list[str] = field(default_factory=list)
    convs: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    made: dict[str, int] = field(default_factory=dict)
    norm_count: int = 0
    indent: int = 2

    def name(self, stem: str) -> str:
        self.made[stem] = self.made.get(stem, 0) + 1
        return f"{stem}{self.made[stem]}"

    def emit(self, line: str) -> None:
        self.body.append("    " * self.indent + line)

    def put(self, code: str) -> str:
        value = self.name("h")
        self.emit(f"{value} = {code}")
        self.values.append(value)
        return value

    def under(self, head: str, write: Callable[[str], Any], value: str) -> None:
        self.emit(head)
        self.indent += 1
        before = list(self.values)
        write(value)
        self.values = before
        self.indent -= 1

    def layer(self, v: str) -> str:
        if self.convs and self.r.random() < 0.25:
            return f"{self.r.choice(self.convs)}({v})"
        path = f"self.{self.name('conv')}"
        kernel = self.r.choice(("1", "1", "3, padding=1" if self.padded else "1"))
        options = f"{kernel}, groups={self.r.choice((1, 1, 4))}, bias={self.r.choice((True, False))}"
        self.init.append(f"{path} = nn.Conv{self.rank}d(4, 4, {options})" if self.rank else f"{path} = nn.Linear(4, 4)")
        self.convs.append(path)
        return f"{path}({v})"

    def norm(self, v: str) -> str:
        if self.norms and self.r.random() < 0.15:
            return f"{self.r.choice(self.norms)}({v})"
        path = f"self.{self.name('bn')}"
        self.norm_count += 1
        self.init.append(f"{path} = nn.BatchNorm{max(self.rank, 1)}d(4)")
        if self.functional and self.r.random() < 0.5:
            self.features.add("norm: holder")
            return (
                f"F.batch_norm({v}, {path}.running_mean, {path}.running_var, {path}.weight, {path}.bias, self.training)"
            )
        self.norms.append(path)
        return f"{path}({v})"

    def activation(self, v: str) -> str:
        return self.r.choice(("F.relu({})", "torch.tanh({})", "F.relu_({})", "F.leaky_relu({}, 0.1)")).format(v)

    # ---------------------------------------------------------------------------------------------------- steps

    def pair(self, v: str) -> str:
        y = self.put(self.layer(v))
        if self.r.random() < 0.25:
            self.write(y)
        y = self.put(self.norm(y))
        return self.put(self.activation(y)) if self.r.random() < 0.5 else y

    def before_layer(self, v: str) -> str:
        y = self.put(self.norm(v))
        if v != "x" and self.r.random() < 0.4:
            self.write(v)
        return self.put(self.layer(y))

    def residual(self, v: str) -> str:
        y = self.put(self.norm(self.layer(v)))
        self.emit(self.r.choice(("{0} += {1}", "{0} = {1} + {0}", "{0}.add_({1})")).format(y, v))
        return y

    def write(self, v: str) -> None:
        other = self.r.choice([u for u in self.values if u != v] or [v])
        code = self.r.choice(_WRITES)
        self.features.add(f"write: {code.format('h', 'g')}")
        for line in code.format(v, other).split("; "):
            self.emit(line)

    def change(self, v: str) -> None:
        """Change the value called ``v``, in some way."""
        kind = self.r.choice(("pair", "layer", "more", "norm", "double", "write"))
        if kind == "write":
            self.write(v)
            return
        made = {"pair": lambda: self.norm(self.layer(v)), "layer": lambda: self.layer(v), "double": lambda: f"{v} * 2"}
        made |= {"more": lambda: f"{v} + {self.layer(v)}", "norm": lambda: f"{v} + {self.norm(v)}"}
        self.emit(f"{v} = {made[kind]()}")

    def branch(self, v: str) -> str:
        y = self.put(f"{v} * 1.5")
        test = self.r.choice(self.r.choice((_SIZES, _SIZES, _SIZES, _VALUES, _CLASSES)))
        self.features.add(f"if {test.format('h')}")
        self.under(f"if {test.format(y)}:", self.change, y)
        if self.r.random() < 0.5:
            self.under("else:", self.change, y)
        return y

    def loop(self, v: str) -> str:
        y = self.put(f"{v} * 1.5")
        code = self.r.choice(_LOOPS)
        self.features.add(f"for {code.format('h')}")
        self.under(f"for _ in {code.format(y)}:", self.change, y)
        return y

    def tried(self, v: str) -> str:
        y = self.put(f"{v} * 1.5")
        self.features.add("try")
        self.under("try:", lambda value: self.emit(f"{y} = {y} * {self.r.choice(_TRIED).format(value)}"), y)
        self.under("except Exception:", self.change, y)
        return y

    def arithmetic(self, v: str) -> str:
        code = self.r.choice(_ARITHMETIC)
        self.features.add(f"arithmetic: {code.format('h')}")
        return self.put(code.format(v))

    def alias(self, v: str) -> str:
        if v == "x":
            return self.pair(v)
        again = self.put(
            self.r.choice(("{0}", "{0}[:]", "{0}.view({0}.shape)", "{0}.detach()", "{0}.contiguous()")).format(v)
        )
        self.write(v)
        return self.put(
            self.r.choice((self.layer(again), self.norm(again), f"{v} + {again}", f"{self.layer(v)} + {again}"))
        )

    def context(self, v: str) -> str:
        y = self.put(f"{v} * 1.5")
        self.features.add("context")
        self.under(f"with torch.{self.r.choice(('no', 'enable'))}_grad():", self.change, y)
        return y

    def chance(self, v: str) -> str:
        self.features.add("chance")
        chance = ("F.dropout({0}, 0.3, self.training)", "{0} * (1 + random.random() if self.training else 1)")
        return self.put(self.r.choice(chance).format(v))

    def block(self, v: str) -> str:
        if self.inner:
            return self.pair(v)
        inner = _Writer(self.r, self.rank, self.padded, self.functional, inner=True)
        self.classes.append(inner.written(f"Block{len(self.classes) + 1}", inner.steps(self.r.choice((1, 2)))))
        self.features |= inner.features
        self.norm_count += inner.norm_count
        path = f"self.{self.name('block')}"
        self.init.append(f"{path} = Block{len(self.classes)}()")
        return self.put(f"{path}({self.put(f'{path}({v})') if self.r.random() < 0.3 else v})")

    def steps(self, count: int) -> str:
        v, plain = "x", [self.pair, self.residual, self.before_layer]
        asking = [*[self.branch] * 4, *[self.alias] * 3, *[self.arithmetic] * 2, self.loop, self.tried]
        for _ in range(count):
            v = self.r.choice([*plain * 2, *asking, self.context, self.chance, self.block, self.block])(v)
            if self.r.random() < 0.2:
                self.write(v)
        return v

    def written(self, name: str, result: str) -> str:
        init = "".join(f"        {line}\n" for line in self.init)
        body = "\n".join(self.body)
        return (
            f"class {name}(nn.Module):\n    scale, limit, flag = 1.25, 2, True\n\n    def __init__(self):\n"
            f"        super().__init__()\n{init}\n    def forward(self, x):\n{body}\n        return {result}\n"
        )


@st.composite
def size_networks(draw: Callable[[st.SearchStrategy[Any]], Any], largest: int = 5) -> Network:
    """Draw a network of at most ``largest`` steps, with other shapes of its inputs."""
    r = random.Random(draw(st.integers(0, 2**32)))
    rank = r.choice((2, 2, 2, 1, 1, 3, 0))
    writer = _Writer(r, rank, padded=r.random() < 0.6, functional=r.random() < 0.25)
    result = writer.steps(draw(st.integers(1, largest)))
    net = writer.written("Net", result)
    others = [(n, 4, *(6,) * rank) for n in (1, 2, 5, 8)]
    if rank:
        others += [
            (n, 4, *(side,) * rank) for n, side in ((3, 4), (3, 12), (1, 7), (4, 5), (2, 20 if rank < 3 else 11))
        ]
    if rank == 2:
        others += [(3, 4, 6, 9), (1, 4, 12, 5)]
    source = "\n\n".join([_HEAD, *writer.classes, net, "def adjust(model):\n    pass\n"])
    return Network(source, (4, *(6,) * rank), writer.norm_count, frozenset(writer.features), tuple(others))
