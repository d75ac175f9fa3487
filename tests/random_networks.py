"""Random networks as Python source: what a person might write, and worse. Made by hypothesis, so that they shrink.

A network is a DAG of convolutions, transposed convolutions, linear layers, norms, activations, sums, concatenations,
pools and reshapes in one, two or three dimensions. Modules are shared, weights tied and read, layers and norms called
functionally, forwards branch on the mode, on shapes and on values, blocks are called twice and reached into, outputs
are changed in place and stashed, hooks double what a layer gives.

:func:`networks` is the strategy, :meth:`Network.source` the network as code that can be run by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import zoo
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = ["Network", "networks"]

Draw = Callable[[st.SearchStrategy[Any]], Any]

_HEAD = """\
import torch
import torch.nn.functional as F
from hooked import old_spectral_norm, old_weight_norm, pruned
from last_axis import (
    Around, AroundFlat, Derived, Flattened, Moved, Permuted, Reshaped, Transposed, Unsqueezed, ViewedAs, WithAttribute,
)
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from zoo import FrozenBatchNorm2d, NormDropAct, NormRelu, ReluNorm, SamePadConv2d, StandardizedConv2d


def double(module, args, output):
    return 2 * output
"""


@dataclass(frozen=True)
class Network:
    """One random network.

    Args:
        source: Its code; the class is ``Net``.
        shape: The shape of one sample.
        norms: How many norms it has, functional ones among them.
        features: What is unusual about it.
        others: The shapes of further inputs, on some of which it may not run.
    """

    source: str
    shape: tuple[int, ...]
    norms: int
    features: frozenset[str]
    others: tuple[tuple[int, ...], ...] = ()

    def model(self, seed: int = 0) -> nn.Module:
        """Return the network in eval mode and double precision, with random weights and statistics."""
        scope: dict[str, Any] = {"__name__": "random_network"}
        exec(self.source, scope)
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            model: nn.Module = scope["Net"]().double()
        zoo.randomize_(model, seed)
        with torch.no_grad():
            scope["adjust"](model)
            if "legacy hook" in self.features:  # what it has computed so far has a gradient, which cannot be copied
                model.eval()(*self.inputs())
        return model.eval()

    def inputs(self, batch: int = 3, seed: int = 1) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(batch, *self.shape, generator=generator, dtype=torch.float64),)

    def __repr__(self) -> str:
        return f"\n{self.source}\n# one sample: {self.shape}\n"


@dataclass(frozen=True)
class _Value:
    """A value of the forward: its name, channels, and the sizes of its space; a vector has none."""

    name: str
    channels: int
    space: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.space)


@dataclass(frozen=True)
class _Layer:
    """A layer that keeps the space, to be used again: how it is called, and its channels in and out."""

    path: str
    inputs: int
    outputs: int
    rank: int
    arguments: str = ""
    plain: bool = True


@dataclass
class _Scope:
    """One class that is being written: the lines of its ``__init__`` and ``forward``, and what they have made."""

    draw: Draw
    depth: int
    classes: list[str]
    adjust: list[str]
    features: set[str]
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    values: list[_Value] = field(default_factory=list)
    layers: list[_Layer] = field(default_factory=list)
    norms: list[tuple[str, int, int]] = field(default_factory=list)  # path, channels, rank
    blocks: list[tuple[str, int, tuple[int, ...]]] = field(default_factory=list)  # those that keep the shape
    made: dict[str, int] = field(default_factory=dict)
    norm_count: int = 0
    indent: int = 2
    prefix: str = ""  # where the instance of this class hangs in the network, once
    optional: bool = False  # whether the forward has an optional argument
    which: bool = False  # whether that chooses norms

    # ------------------------------------------------------------------------------------------------ writing

    def name(self, stem: str) -> str:
        self.made[stem] = self.made.get(stem, 0) + 1
        return f"{stem}{self.made[stem]}"

    def emit(self, line: str) -> None:
        self.body.append("    " * self.indent + line)

    @contextmanager
    def under(self, head: str) -> Iterator[None]:
        self.emit(head)
        self.indent += 1
        yield
        self.indent -= 1

    def register(self, stem: str, code: str) -> str:
        name = self.name(stem)
        self.init.append(f"        self.{name} = {code}")
        return f"self.{name}"

    def put(self, code: str, channels: int, space: tuple[int, ...]) -> _Value:
        """Write ``v = code`` and return the value."""
        value = _Value(self.name("v"), channels, space)
        self.emit(f"{value.name} = {code}")
        self.values.append(value)
        return value

    def mark(self, feature: str) -> None:
        self.features.add(feature)

    def pick(self, *choices: Any) -> Any:
        """Draw one of the choices, each as likely as it is there; the first is the simplest."""
        return self.draw(st.sampled_from(choices))

    def rarely(self, one_in: int) -> bool:
        return self.pick(*(False,) * (one_in - 1), True)

    def last(self) -> _Value:
        """Return the newest value, now and then an older one: a fork."""
        if len(self.values) > 1 and self.rarely(6):
            return self.draw(st.sampled_from(self.values))
        return self.values[-1]

    # ------------------------------------------------------------------------------------------------- layers

    def layer(self, v: _Value, outputs: int | None = None) -> _Value:
        """Write a layer on ``v``; with ``outputs`` one that has so many and keeps the space."""
        again = [one for one in self.layers if one.inputs == v.channels and one.rank == v.rank]
        again = [one for one in again if outputs in (None, one.outputs)]
        if again and self.rarely(8):
            one = self.draw(st.sampled_from(again))
            self.mark("layer called again")
            return self.put(f"{one.path}({v.name})", one.outputs, v.space)
        if not v.space:
            return self._linear(v, outputs)
        return self._convolution(v, outputs)

    def _linear(self, v: _Value, outputs: int | None) -> _Value:
        size = outputs or self.pick(4, 2, 5, 6)
        bias = self.pick(True, False)
        if self.rarely(10):
            self.mark("functional layer")
            weight, b = self._parameters((size, v.channels), size if bias else 0)
            return self.put(f"F.linear({v.name}, {weight}, {b})", size, ())
        path = self.register("fc", f"nn.Linear({v.channels}, {size}, bias={bias})")
        self.layers.append(_Layer(path, v.channels, size, 0))
        return self.put(f"{path}({v.name})", size, ())

    def _convolution(self, v: _Value, outputs: int | None) -> _Value:  # noqa: C901, PLR0915 - one draw after another
        n, c = v.rank, v.channels
        transposed = self.rarely(5)
        divisors = [g for g in (1, 2, 3, c) if c % g == 0]
        groups = self.pick(1, 1, 1, *divisors)
        sizes = [s for s in (4, 6, 2, 3, c, 8) if s % groups == 0 and (outputs is None or s == outputs)]
        if outputs is not None and not sizes:
            groups, sizes = math.gcd(c, outputs), [outputs]
        size = self.pick(*sizes)
        kernel = self.pick(3, 1) if min(v.space) >= 3 else 1
        keeps = outputs is not None or transposed or self.pick(True, True, False) or min(v.space) < 5
        bias = self.pick(True, False)
        options: dict[str, Any] = {}
        if keeps and kernel == 3:
            options["padding"] = 1
        if not keeps:
            options["stride"] = 2
        if groups > 1:
            options["groups"] = groups
            self.mark("grouped" if groups < c else "depthwise")
        arguments = ", ".join(f"{k}={value}" for k, value in options.items())
        space = v.space if keeps else tuple((s - kernel) // 2 + 1 for s in v.space)
        if not keeps:
            kind = "plain"
        else:
            kind = self.pick(
                *("plain",) * 9, "functional", "mode", "subclass", "tied", "weight norm", "hook", "forward", "legacy"
            )
        function = f"conv_transpose{n}d" if transposed else f"conv{n}d"
        if transposed:
            self.mark("transposed")
        if kind == "functional":
            self.mark("functional layer")
            shape = (c, size // groups) if transposed else (size, c // groups)
            weight, b = self._parameters((*shape, *(kernel,) * n), size if bias else 0)
            return self.put(f"F.{function}({v.name}, {weight}, {b}{', ' * bool(arguments)}{arguments})", size, space)
        given = ", ".join(filter(None, [f"{c}, {size}, {kernel}", arguments, "" if bias else "bias=False"]))
        cls = f"nn.ConvTranspose{n}d" if transposed else f"nn.Conv{n}d"
        if kind == "mode" and kernel == 3 and not transposed:
            self.mark("padding mode")
            given += f", padding_mode='{self.pick('circular', 'replicate')}'"
        if kind == "subclass" and n == 2 and not transposed:
            self.mark("layer subclass")
            one_value = c == groups and kernel == 1  # has no deviation
            cls = "SamePadConv2d" if one_value else self.pick("SamePadConv2d", "StandardizedConv2d")
            if cls == "SamePadConv2d":
                given = given.replace(", padding=1", "")
        code = f"{cls}({given})"
        if kind == "weight norm":
            self.mark("parametrized")
            code = f"weight_norm({code})"
        if kind == "legacy":
            self.mark("legacy hook")
            code = f"{self.pick('old_weight_norm', 'old_spectral_norm', 'pruned')}({code})"
        path = self.register("conv", code)
        plain = kind not in ("weight norm", "subclass", "legacy")
        if kind == "tied":
            like = [one for one in self.layers if one.arguments == code]
            if like:
                self.mark("tied")
                self.init.append(f"        {path}.weight = {self.draw(st.sampled_from(like)).path}.weight")
        if kind == "hook":
            self.mark("hook")
            self.init.append(f"        {path}.register_forward_hook(double)")
        if keeps:
            self.layers.append(_Layer(path, c, size, n, code, plain))
        if plain and self.rarely(12):
            self.mark("zero filter")
            self.adjust.append(f"{path}.weight.data[0] = 0.0")
        if kind == "forward":
            self.mark("calls forward itself")
            return self.put(f"{path}.forward({v.name})", size, space)
        return self.put(f"{path}({v.name})", size, space)

    def _parameters(self, shape: tuple[int, ...], bias: int) -> tuple[str, str]:
        size = ", ".join(map(str, shape))
        weight = self.register("w", f"nn.Parameter(torch.randn({size}) / {math.prod(shape[1:]) ** 0.5:.2f})")
        return weight, self.register("b", f"nn.Parameter(torch.randn({bias}))") if bias else "None"

    # -------------------------------------------------------------------------------------------------- norms

    def norm(self, v: _Value) -> _Value:
        again = [path for path, channels, rank in self.norms if (channels, rank) == (v.channels, v.rank)]
        if again and self.rarely(10):
            self.mark("norm called again")
            return self.put(f"{self.draw(st.sampled_from(again))}({v.name})", v.channels, v.space)
        self.norm_count += 1
        functional = ("functional", "functional frozen", "holder") if not self.optional else ()
        kind = self.pick(
            *("module",) * 14, "no affine", "large eps", "no momentum", "sync", "frozen parameters", *functional,
            *(("frozen", "norm and activation") if v.rank == 2 else ()),
        )  # fmt: skip
        if kind == "module" and self.rarely(60):
            kind = self.pick("no statistics", *(("activation and norm",) if v.rank == 2 else ()))
        if kind != "module":
            self.mark(f"norm: {kind}")
        if kind.startswith("functional"):
            return self._functional_norm(v, frozen=kind == "functional frozen")
        c, dims = v.channels, max(v.rank, 1)
        options = {
            "no affine": ", affine=False",
            "large eps": ", eps=0.1",
            "no momentum": ", momentum=None",
            "no statistics": ", track_running_stats=False",
        }.get(kind, "")
        cls = {
            "sync": "nn.SyncBatchNorm",
            "frozen": "FrozenBatchNorm2d",
            "norm and activation": self.pick("NormRelu", "NormDropAct") if kind == "norm and activation" else "",
            "activation and norm": "ReluNorm",
        }.get(kind, f"nn.BatchNorm{dims}d")
        path = self.register("bn", f"{cls}({c}{options})")
        if kind == "frozen parameters":
            self.init.append(f"        {path}.requires_grad_(False)")
        if kind == "module":
            self.norms.append((path, c, v.rank))
            if self.rarely(10):
                self.mark("dead channel")
                self.adjust.append(self.pick(f"{path}.running_var[0] = 0.0", f"{path}.weight.data[0] = 0.0"))
        if kind == "holder":
            n = path
            code = f"F.batch_norm({v.name}, {n}.running_mean, {n}.running_var, {n}.weight, {n}.bias, self.training)"
            return self.put(code, c, v.space)
        return self.put(f"{path}({v.name})", c, v.space)

    def _functional_norm(self, v: _Value, frozen: bool) -> _Value:
        stem = f"self.{self.name('n')}_"
        for name, code in (("gamma", "ones"), ("beta", "zeros")):
            self.init.append(f"        {stem}{name} = nn.Parameter(torch.{code}({v.channels}))")
        for name, code in (("running_mean", "zeros"), ("running_var", "ones")):
            self.init.append(
                f"        self.register_buffer('{stem.removeprefix('self.')}{name}', torch.{code}({v.channels}))"
            )
        affine = f"{stem}gamma, {stem}beta" if self.pick(True, True, False) else "None, None"
        flag = "False" if frozen else "self.training"
        code = f"F.batch_norm({v.name}, {stem}running_mean, {stem}running_var, {affine}, {flag}, eps=1e-3)"
        return self.put(code, v.channels, v.space)

    # -------------------------------------------------------------------------------------------------- steps

    def pair(self, v: _Value) -> _Value:
        y = self.layer(v)
        if self.rarely(8):
            y = self.between(y)
        y = self.norm(y)
        return self.activation(y) if self.pick(True, False) else y

    def between(self, v: _Value) -> _Value:
        """What stands between a layer and its norm, and mostly should not."""
        self.mark("something between")
        kinds: list[Callable[[_Value], _Value]] = [
            self.identity, self.activation, self.change_in_place, self.stash, self.add_itself, self.read_twice,
        ]  # fmt: skip
        return self.draw(st.sampled_from(kinds))(v)

    def identity(self, v: _Value) -> _Value:
        path = self.register("same", "nn.Identity()")
        return self.put(self.pick(f"{path}({v.name})", f"{v.name}.contiguous()", v.name), v.channels, v.space)

    def activation(self, v: _Value) -> _Value:
        module = self.pick("ReLU()", "Tanh()", "SiLU()", "Dropout(0.3)", "")
        if module:
            return self.put(f"{self.register('act', 'nn.' + module)}({v.name})", v.channels, v.space)
        code = self.pick("F.relu({})", "torch.sigmoid({})", "{}.tanh()", "F.gelu({})")
        return self.put(code.format(v.name), v.channels, v.space)

    def change_in_place(self, v: _Value) -> _Value:
        if v is self.values[0]:  # the caller's own tensor
            return self.activation(v)
        self.mark("in place")
        self.emit(self.pick("{}.mul_(2)", "{}.clamp_(min=-0.5)", "{}[:, 0] = 0.5", "{}[:, :1].add_(1)").format(v.name))
        return v

    def stash(self, v: _Value) -> _Value:
        self.mark("stash")
        self.emit(f"self.last = {v.name}")
        return self.put("self.last", v.channels, v.space)

    def write_state(self, v: _Value) -> _Value:
        """The forward writes what the model holds, and uses it."""
        state = self.register("state", f"nn.Parameter(torch.zeros({v.channels}))")
        own = f"dict(self.named_parameters(recurse=False))['{state.removeprefix('self.')}']"
        other = self.register("running", f"[torch.zeros({v.channels})]")
        kinds = {
            "in place": f"{own}.detach().add_(0.1)",
            "by its data": f"{own}.data.mul_(0.9).add_(0.1)",
            "other data": f"{own}.data = {own}.data + 0.1",
            "an attribute": f"{other}[0].add_(0.1)",
            "an exchanged tensor": f"{other}[0] = {other}[0] + 0.1",
            "registered anew": f"{state} = nn.Parameter({own}.detach() + 0.1)",
        }
        kind = self.pick(*kinds)
        self.mark("writes state")
        self.emit(kinds[kind])
        held = f"{other}[0]" if kind in ("an attribute", "an exchanged tensor") else state
        return self.put(f"{v.name} * (1 + {held}.view(1, -1{', 1' * v.rank}))", v.channels, v.space)

    def add_itself(self, v: _Value) -> _Value:
        return self.put(f"{v.name} + {v.name}", v.channels, v.space)

    def read_twice(self, v: _Value) -> _Value:
        """Fork: the value itself goes on, and is used once more."""
        self.put(f"torch.tanh({v.name})", v.channels, v.space)
        return v

    def layer_alone(self, v: _Value) -> _Value:
        return self.layer(v)

    def add(self, v: _Value) -> _Value:
        like = [u for u in self.values if (u.channels, u.space) == (v.channels, v.space)]
        u = self.draw(st.sampled_from(like))
        code = self.pick(
            f"{v.name} + {u.name}", f"{v.name} * torch.sigmoid({u.name})", f"torch.add({v.name}, {u.name})"
        )
        return self.put(code, v.channels, v.space)

    def chosen_norm(self, v: _Value) -> _Value:
        """A norm of several: by a flag, by an attribute that is set later, or by the size of a batch."""
        self.mark("norm chosen at run time")
        y, dims = self.layer(v), max(v.rank, 1)
        self.norm_count += 2
        path = self.register("bns", f"nn.ModuleList(nn.BatchNorm{dims}d({y.channels}) for _ in range(2))")
        if self.which:
            self.mark("norm chosen by argument")
            return self.put(f"{path}[which]({y.name})", y.channels, y.space)
        index = self.pick("self.domain", f"{y.name}.shape[0] % 2", "int(self.training)", f"({y.name}.size(0) > 2) * 1")
        return self.put(f"{path}[{index}]({y.name})", y.channels, y.space)

    def residual(self, v: _Value) -> _Value:
        y = self.layer(v, v.channels)
        if (y.channels, y.space) != (v.channels, v.space):
            return y
        y = self.norm(y)
        return self.put(f"{v.name} + {y.name}", v.channels, v.space)

    def concatenate(self, v: _Value) -> _Value:
        like = [u for u in self.values if u.space == v.space and u.channels + v.channels <= 16]
        if not like:
            return self.activation(v)
        u = self.draw(st.sampled_from(like))
        return self.put(f"torch.cat([{v.name}, {u.name}], 1)", v.channels + u.channels, v.space)

    def chunk(self, v: _Value) -> _Value:
        if v.channels == 1:
            return self.activation(v)
        if v.channels % 2:
            return self.put(f"{v.name}[:, 1:]", v.channels - 1, v.space)
        left, right = self.name("v"), self.name("v")
        self.emit(f"{left}, {right} = {v.name}.chunk(2, 1)")
        self.values += [_Value(name, v.channels // 2, v.space) for name in (left, right)]
        return self.values[-1]

    def pool(self, v: _Value) -> _Value:
        n = v.rank
        if not n or min(v.space) < 4:
            return self.activation(v)
        module = self.register("pool", f"nn.{self.pick('MaxPool', 'AvgPool')}{n}d(2)")
        return self.put(f"{module}({v.name})", v.channels, tuple(s // 2 for s in v.space))

    def to_vector(self, v: _Value) -> _Value:
        if not v.rank:
            return self.activation(v)
        n = v.rank
        if v.channels * math.prod(v.space) <= 40:
            path = self.register("flat", "nn.Flatten()")
            code = self.pick(f"{v.name}.flatten(1)", f"{path}({v.name})", f"{v.name}.reshape({v.name}.size(0), -1)")
            return self.put(code, v.channels * math.prod(v.space), ())
        if self.pick(True, False):
            return self.put(f"{v.name}.mean({tuple(range(2, 2 + n))})", v.channels, ())
        pool = self.register("pool", f"nn.AdaptiveAvgPool{n}d(1)")
        return self.put(f"torch.flatten({pool}({v.name}), 1)", v.channels, ())

    def reshape(self, v: _Value) -> _Value:
        if v.rank < 2:
            return self.put(f"{v.name}.flip(1)", v.channels, v.space)
        self.mark("reshape")
        kind = self.pick("transpose", "flatten", "permute")
        if kind == "flatten":
            return self.put(f"{v.name}.flatten(2)", v.channels, (math.prod(v.space),))
        if kind == "permute" and v.channels == v.space[-1]:
            order = (0, v.rank + 1, *range(2, v.rank + 1), 1)
            return self.put(f"{v.name}.permute{order}", v.space[-1], (*v.space[:-1], v.channels))
        space = (*v.space[:-2], v.space[-1], v.space[-2])
        return self.put(f"{v.name}.transpose(-1, -2)", v.channels, space)

    def tokens(self, v: _Value) -> _Value:
        """A linear layer on (N, L, C), and a norm over what may or may not be its channels."""
        if v.rank != 1:
            return self.reshape(v)
        self.mark("tokens")
        (length,) = v.space
        size = self.pick(4, length, 6)
        if self.rarely(3):
            return self.read_tokens(v, size)
        fc = self.register("fc", f"nn.Linear({v.channels}, {size})")
        y = self.name("v")
        self.emit(f"{y} = {fc}({v.name}.transpose(1, 2))")
        self.norm_count += 1
        kind = self.pick("positions", "channels", "flat")
        bn = self.register("bn", f"nn.BatchNorm1d({length if kind == 'positions' else size})")
        code = {
            "positions": f"{bn}({y}).transpose(1, 2)",
            "channels": f"{bn}({y}.transpose(1, 2))",
            "flat": f"{bn}({y}.flatten(0, 1)).view(-1, {length}, {size}).transpose(1, 2)",
        }[kind]
        return self.put(code, size, v.space)

    def last_axis(self, v: _Value) -> _Value:
        """A norm over the last axis of a linear layer's output, as a subclass or as a module around a plain one."""
        if not v.rank:
            return self.pair(v)
        length = math.prod(v.space)
        cls = self.pick(
            "Transposed", "Around", "Permuted", "Moved", "Derived", "WithAttribute", "Reshaped", "ViewedAs",
            "Flattened", "Unsqueezed", "AroundFlat",
        )  # fmt: skip
        self.mark("norm over the last axis, around" if cls.startswith("Around") else "norm over the last axis")
        size = self.pick(4, length, 6) if length <= 12 else 4
        fc, bn = self.register("fc", f"nn.Linear({v.channels}, {size})"), self.register("bn", f"{cls}({size})")
        self.norm_count += 1
        tokens = f"{v.name}.flatten(2).transpose(1, 2)"
        kind = self.pick("behind a layer", "in front of a layer", "behind an activation")
        if kind == "in front of a layer":
            self.init[-1] = self.init[-1].replace(f"({size})", f"({v.channels})")
            return self.put(f"{fc}({bn}({tokens})).transpose(1, 2)", size, (length,))
        code = f"{fc}({tokens})" if kind == "behind a layer" else f"{fc}({tokens}).tanh()"
        return self.put(f"{bn}({code}).transpose(1, 2)", size, (length,))

    def read_tokens(self, v: _Value, size: int) -> _Value:
        """A norm over the channels, read by a linear or recurrent layer that has them last."""
        self.norm_count += 1
        bn = self.register("bn", f"nn.BatchNorm1d({v.channels})")
        tokens = f"{bn}({v.name}).transpose(1, 2)"
        kind = self.pick("linear", "recurrent")
        if kind == "linear":
            self.mark("norm read by a linear layer")
            fc = self.register("fc", f"nn.Linear({v.channels}, {size})")
            return self.put(f"{fc}({tokens}).transpose(1, 2)", size, v.space)
        self.mark("norm read by a recurrent layer")
        rnn = self.register("rnn", f"nn.{self.pick('LSTM', 'GRU', 'RNN')}({v.channels}, {size}, batch_first=True)")
        return self.put(f"{rnn}({tokens})[0].transpose(1, 2)", size, v.space)

    def other_norm(self, v: _Value) -> _Value:
        path = self.register("gn", f"nn.GroupNorm(1, {v.channels})")
        return self.put(f"{path}({v.name})", v.channels, v.space)

    def read_weight(self, v: _Value) -> _Value:
        plain = [one for one in self.layers if one.plain]
        if not plain:
            return self.layer(v)
        self.mark("weight read")
        path = self.draw(st.sampled_from(plain)).path
        weight = self.pick("{}.weight", "{}.weight", "next({}.parameters())", "{}._parameters['weight'].data")
        return self.put(f"{v.name} * (1 + {weight.format(path)}.mean())", v.channels, v.space)

    def read_statistics(self, v: _Value) -> _Value:
        if not self.norms or not self.rarely(6):
            return self.norm(v)
        self.mark("statistics read")
        path = self.draw(st.sampled_from(self.norms))[0]
        return self.put(f"{v.name} + {path}.running_mean.mean()", v.channels, v.space)

    def only_in_training(self, v: _Value) -> _Value:
        usable = [one for one in self.layers if (one.inputs, one.outputs, one.rank) == (v.channels, v.channels, v.rank)]
        self.mark("use in training")
        with self.under("if self.training:"):
            if usable and self.pick(True, False):
                self.emit(f"{v.name} = {v.name} + {self.draw(st.sampled_from(usable)).path}({v.name})")
            else:
                self.emit(f"{v.name} = {v.name} * 1.5")
        return v

    def branch(self, v: _Value) -> _Value:
        """A branch that always goes one way, which no trace knows."""
        conditions = {
            "{0}.sum() > -1e9": "a value",
            "{0}.shape[-1] > 0": "a shape",
            "{0}.size(0) < 99": "a shape",
            "bool(({0} == {0}).all())": "a value",
        }
        condition = self.pick(*conditions)
        self.mark(f"branch on {conditions[condition]}")
        before, norms, layers = list(self.values), list(self.norms), list(self.layers)
        with self.under(f"if {condition.format(v.name)}:"):
            y = self.layer(v, v.channels)
            y = self.norm(y)
            if self.pick(True, False):
                y = self.put(f"{y.name} + {v.name}", y.channels, y.space) if y.space == v.space else y
            name = self.name("v")
            self.emit(f"{name} = {y.name}")
        with self.under("else:"):
            self.emit(f"{name} = {v.name}")
        self.values[:], self.norms[:], self.layers[:] = before, norms, layers
        self.values.append(_Value(name, y.channels, y.space))
        return self.values[-1]

    def block(self, v: _Value) -> _Value:
        again = [path for path, channels, space in self.blocks if (channels, space) == (v.channels, v.space)]
        if again and self.rarely(3):
            self.mark("block called again")
            return self.put(f"{self.draw(st.sampled_from(again))}({v.name})", v.channels, v.space)
        if self.depth:
            return self.pair(v)
        inner = _Scope(self.draw, self.depth + 1, self.classes, [], self.features)
        out = _write(inner, v, self.pick(1, 2, 3, 4))
        cls = f"Block{len(self.classes) + 1}"
        code = _class(cls, inner, f"return {out.name}")
        if self.rarely(10):
            self.mark("a block overrides train")
            code += _train(self)
        self.classes.append(code)
        path = self.register("block", f"{cls}()")
        self.norm_count += inner.norm_count
        self.adjust += [line.replace("self.", f"{path}.", 1) for line in inner.adjust]
        if (out.channels, out.space) == (v.channels, v.space):
            self.blocks.append((path, v.channels, v.space))
        if self.rarely(8):
            self.mark("checkpoint")
            return self.put(f"checkpoint({path}, {v.name}, use_reentrant=False)", out.channels, out.space)
        result = self.put(f"{path}({v.name})", out.channels, out.space)
        # From now on the outer forward may reach inside.
        if inner.layers and self.rarely(5):
            self.mark("reaches inside")
            one = self.draw(st.sampled_from(inner.layers))
            inside = f"{path}.{one.path.removeprefix('self.')}"
            self.layers.append(_Layer(inside, one.inputs, one.outputs, one.rank))
        return result

    def sequential(self, v: _Value) -> _Value:
        """A list of modules that the forward runs through, or a Sequential."""
        c, n = v.channels, v.rank
        bn = f"nn.BatchNorm{max(n, 1)}d({c})"
        layer = f"nn.Conv{n}d({c}, {c}, 1)" if n else f"nn.Linear({c}, {c})"
        parts = self.pick([layer, bn], [layer, bn, "nn.ReLU()"], [bn, "nn.ReLU()", layer], [layer, bn, layer, bn])
        self.norm_count += sum(part == bn for part in parts)
        if self.pick(True, False):
            path = self.register("seq", f"nn.Sequential({', '.join(parts)})")
            return self.put(f"{path}({v.name})", c, v.space)
        path, name = self.register("parts", f"nn.ModuleList([{', '.join(parts)}])"), self.name("v")
        self.emit(f"{name} = {v.name}")
        with self.under(f"for part in {path}:"):
            if self.rarely(3):
                self.mark("class asked for")
                kinds = ("isinstance(part, {0})", "type(part) is {0}", "hasattr(part, 'running_var')")
                test = self.pick(*kinds, "'BatchNorm' in part.__class__.__name__").format(f"nn.BatchNorm{max(n, 1)}d")
                self.emit(f"{name} = part({name}) * 2 if {test} else part({name})")
            else:
                self.emit(f"{name} = part({name})")
        self.values.append(_Value(name, c, v.space))
        return self.values[-1]


_STEPS = (
    *("pair",) * 12, *("residual",) * 4, *("sequential",) * 2, *("block",) * 4, "activation", "norm", "norm",
    "layer_alone", "layer_alone", "add", "add", "concatenate", "concatenate", "chunk", "pool", "pool", "to_vector",
    "reshape", "tokens", "other_norm", "read_weight", "read_statistics", "only_in_training", "branch",
    "change_in_place", "stash", "write_state", "chosen_norm", "last_axis", "last_axis",
)  # fmt: skip


def _write(scope: _Scope, start: _Value, steps: int) -> _Value:
    """Write so many steps on ``start``, and return the last value."""
    value = _Value("x", start.channels, start.space)
    scope.values.append(value)
    for _ in range(steps):
        step = scope.draw(st.sampled_from(_STEPS))
        value = getattr(scope, step)(scope.last())
        if value is not scope.values[-1] and value in scope.values:
            scope.values.remove(value)
            scope.values.append(value)
    return value


def _class(name: str, scope: _Scope, result: str, signature: str = "self, x") -> str:
    lines = [
        f"class {name}(nn.Module):",
        "    domain = 0",
        "",
        "    def __init__(self):",
        "        super().__init__()",
        *scope.init,
    ]
    return "\n".join([*lines, "", f"    def forward({signature}):", *scope.body, f"        {result}"])


def _train(scope: _Scope) -> str:
    isinstance_of = "isinstance(module, nn.modules.batchnorm._BatchNorm)"
    return _TRAIN.format(condition=scope.pick(isinstance_of, "hasattr(module, 'running_mean')"))


_TRAIN = """

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if {condition}:
                module.eval()
        return self"""
"""Freezes every norm, as the backbones of detectors do."""


@st.composite
def networks(draw: Draw, largest: int = 9) -> Network:
    """Draw a network of at most ``largest`` steps."""
    space = draw(st.sampled_from([(6, 6), (6, 6), (6, 6), (9,), (4, 4, 4), ()]))
    channels = draw(st.sampled_from([4, 3, 6]))
    scope = _Scope(draw, 0, [], [], set())
    scope.optional = scope.rarely(8)
    scope.which = scope.optional and scope.pick(True, False)
    value = _write(scope, _Value("x", channels, space), draw(st.integers(1, largest)))
    signature = "self, x"
    if scope.which:
        signature = "self, x, which=0"
        if "norm chosen by argument" not in scope.features:
            value = scope.chosen_norm(value)
    elif scope.optional:
        scope.mark("optional argument")
        signature = "self, x, more=False"
        with scope.under("if more:"):
            usable = [one for one in scope.layers if (one.inputs, one.rank) == (channels, len(space))]
            use = f"{scope.draw(st.sampled_from(usable)).path}(x)" if usable else "x"
            scope.emit(f"{value.name} = {value.name} * {use}.mean()")
    others = [u for u in scope.values[1:] if u is not value]
    result = f"return {value.name}"
    if others and scope.rarely(5):
        other = draw(st.sampled_from(others))
        result = scope.pick(f"return {value.name}, {other.name}", f"return {{'a': {value.name}, 'b': [{other.name}]}}")
        scope.mark("several outputs")
    adjust = "\n".join(f"    {line.replace('self.', 'model.', 1)}" for line in scope.adjust) or "    pass"
    net = _class("Net", scope, result, signature)
    if scope.rarely(8):
        scope.mark("overrides train")
        net += _train(scope)
    parts = [_HEAD, *scope.classes, net, f"def adjust(model):\n{adjust}"]
    return Network("\n\n\n".join(parts) + "\n", (channels, *space), scope.norm_count, frozenset(scope.features))
