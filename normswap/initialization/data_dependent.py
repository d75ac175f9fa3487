"""Data-dependent initialization: each layer's output gets mean 0 and deviation 1 on one minibatch.

For the pre-activation t of a layer, in execution order, with mean μ[t] and deviation σ[t] per channel over minibatch
and space (Salimans & Kingma 2016, eq. 5-6):

    g ← 1/σ[t],  b ← −μ[t]/σ[t],  so that t ← (t − μ[t])/σ[t].

Note [One pass]
The pass runs in evaluation mode, so that it can be repeated, and once: a layer's output is corrected on the spot, and
what follows sees the corrected value. A BatchNorm or mean-only BatchNorm takes the minibatch's statistics as its own
when it is first reached: evaluation on that minibatch then shows what training on it would.

Note [Residual branches]
With deviation 1 at the end of every branch and of the network, a ResNet-20 was infinite within 25 steps of SGD at a
rate of 0.01. A step that moves one branch by its own deviation moves all sums after it, and nothing brings a sum back
to its size, as a BatchNorm would in each branch. In their own residual networks the authors give a branch's last layer
the deviation 0.1 (Salimans et al., *PixelCNN++*, 2017, ``init_scale=0.1`` in the code), and that bounds the sums. But
behind small branches what goes into the head differs little from sample to sample, and a head of deviation 1 would make
up for it by large weights, so that the first steps are as wild. It has 0.1, too (Salimans et al., *Improved Techniques
for Training GANs*, 2016, ``init_stdv=0.1``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.errors import InitializationError, InputError, Text, argument
from normswap.graph import capture_recorded, capture_symbolic
from normswap.graph.linearity import scales_with_its_parameters
from normswap.graph.residual import output_layers, residual_branches
from normswap.initialization.gains import Gains, gains_of
from normswap.initialization.output_statistics import factors_to, scaled, statistics_along
from normswap.initialization.recurrent_rows import settle_rows
from normswap.nn import EstimatedStatistics, FilterLayout, MeanOnlyBatchNorm
from normswap.nn.kinds import is_layer
from normswap.nn.recurrent import is_recurrent
from normswap.records import InitReport, InitRow
from normswap.runs.batches import bind_batches
from normswap.runs.calling import Batch, run_on
from normswap.runs.equal_models import make_equal, refuse_different, refuse_different_models
from normswap.runs.guard import set_mode, untouched
from normswap.runs.processes import objects, together
from normswap.runs.wrappers import refuse_no_module, refuse_script
from normswap.runs.writes import unwatched

__all__ = ["initialize"]

_PER_SAMPLE = (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
_NORMS = (_BatchNorm, MeanOnlyBatchNorm, EstimatedStatistics, *_PER_SAMPLE)
_FRESH_STD = 0.05
_SMALL_STD = 0.1
"""The deviation at the end of a residual branch, and of a network of such (Note [Residual branches])."""


def initialize(
    model: nn.Module,
    batch: Any,
    *,
    fresh: bool = False,
    seed: int = 0,
    recurrent: bool = False,
    processes: bool = True,
) -> InitReport:
    """Initialize ``model`` in place from one minibatch, in one forward pass; converted or not.

    A layer with a bias ends with |mean| < 1e-3 and |std − 1| < 1e-2 per channel on that minibatch. In a residual
    network the deviation is 0.1, as in the authors' own, where a layer's output is added to a shortcut with no norm in
    between that divides by a deviation, and at the network's end; with 1 training diverges. A bias-free layer gets its
    scale only; a shared layer is initialized at its first call; a channel that is constant keeps its scale. The report
    says which.

    Args:
        model: The model; left as it was if anything fails.
        batch: A minibatch: a tensor, a tuple or dict of inputs, or an iterable of which the first is taken.
        fresh: Whether to draw the weights anew first, from N(0, 0.05²); those of recurrent layers stay.
        seed: The seed of that draw.
        recurrent: Whether the pre-activations of the gates of LSTM, GRU and RNN get mean 0 and deviation 1 over all
            steps, too, by the scales of the rows of W_ih and by b_ih, while W_hh and b_hh stay. The authors keep the
            usual initialization of recurrent networks.
        processes: Whether all processes of an initialized ``torch.distributed`` group call this, each with a minibatch
            of its own: the statistics are then those of all of them, and the values are the same. False works alone.

    Raises:
        InputError: The minibatch does not fit, or the model is no module or a TorchScript one.
        InitializationError: The forward pass failed, or the model became infinite.

    Source: T. Salimans, D. Kingma, *Weight Normalization*, 2016, section 3; the 0.1: T. Salimans, A. Karpathy, X. Chen,
    D. Kingma, *PixelCNN++*, 2017, its code.
    """
    refuse_no_module(model)
    refuse_script(model)
    with together(processes):
        refuse_different_models(model)
        report = _initialized(model, batch, seed if fresh else None, recurrent=recurrent)
        make_equal(model)
    return report


def _initialized(model: nn.Module, batch: Any, seed: int | None, *, recurrent: bool) -> InitReport:
    inputs = next(bind_batches(model, batch))
    layers = {name: module for name, module in model.named_modules() if is_layer(module)}
    over_time = {name: module for name, module in model.named_modules() if is_recurrent(module)}
    small, notes = _small_layers(model, inputs)
    refuse_different("residual branches", str(sorted(small.items())), "give inputs that take the same way through it")
    run = _Pass(small)
    try:
        with untouched(model):
            if seed is not None:
                run.draw(layers.values(), torch.Generator().manual_seed(seed))
            for name, layer in layers.items():
                layer.register_forward_hook(partial(run.settle, name), prepend=True)
            for name, layer in over_time.items() if recurrent else ():
                layer.register_forward_hook(partial(run.settle_rows, name), prepend=True, with_kwargs=True)
            for module in model.modules():
                if isinstance(module, _NORMS):
                    module.register_forward_pre_hook(run.adopt)
            set_mode(model, False)
            run_on(model, inputs)
        objects("the new values", None)  # whatever has failed elsewhere, the model is as it was
    except BaseException as cause:
        run.undo()
        if isinstance(cause, InitializationError) or not isinstance(cause, Exception):
            raise
        raise InitializationError(
            f"the forward pass failed: {type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}",
            code="initialize-forward",
            hint="give a batch that the model takes; the model is as it was",
        ) from cause
    rows = [InitRow(name, *run.found[name]) for name in run.found]
    unasked = Text(f"a recurrent layer: its rows keep the scale that they have ({argument('recurrent', True)} sets it)")
    why = dict.fromkeys(over_time, "the batch never reached it" if recurrent else unasked)
    why = dict.fromkeys(layers, "the batch never reached it") | why
    missed = [InitRow(name, "not initialized", (reason,)) for name, reason in why.items() if name not in run.found]
    return InitReport("data-dependent", (*rows, *missed), notes)


def _small_layers(model: nn.Module, inputs: Batch) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Return which layers get the small deviation, each with what it ends, and a note where nothing could be known."""
    try:
        seen = [capture_symbolic(model, (False,))]
        if seen[0].opaque and not callable(inputs):
            seen.append(capture_recorded(model, inputs, (False,)))
    except InputError as cause:
        return {}, (f"residual branches were not looked for: {cause}",)
    found = {end: "a residual branch" for one in seen for branch in residual_branches(one) for end in branch.ends}
    heads = {name: "the network" for one in seen for name in output_layers(one)} if found else {}
    return heads | found, ()


@dataclass
class _Pass:
    """One pass over the minibatch: what was done so far, and the values from before it.

    Args:
        small: The layers that get a small deviation, each with what it ends.
        found: How each layer was initialized, and the notes on it, in execution order.
        scaled: The ids of the tensors that were scaled: a tied one is scaled once.
        adopted: The ids of the norms that have taken the minibatch's statistics.
        before: Each changed tensor with the values that it had, by its id.
        last: The layer that ran last, its new output, and that output's mean and variance along axis 1, if known.
    """

    small: Mapping[str, str]
    found: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    scaled: set[int] = field(default_factory=set)
    adopted: set[int] = field(default_factory=set)
    before: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    last: tuple[str, Tensor, tuple[Tensor, Tensor] | None] | None = None

    @contextmanager
    def changing(self, *tensors: Tensor) -> Iterator[None]:
        """Let what is written to ``tensors`` within stay, unless the pass fails."""
        with unwatched(*tensors), torch.no_grad():
            for tensor in tensors:
                if id(tensor) not in self.before:
                    self.before[id(tensor)] = tensor, tensor.detach().clone()
            yield

    def undo(self) -> None:
        """Give the changed tensors their values from before."""
        with torch.no_grad():
            for tensor, values in self.before.values():
                tensor.copy_(values)

    def note(self, name: str, note: str) -> None:
        """Add a note, once."""
        method, notes = self.found[name]
        self.found[name] = method, notes if note in notes else (*notes, note)

    def draw(self, layers: Iterable[nn.Module], generator: torch.Generator) -> None:
        """Draw each layer's direction v from N(0, 0.05²); g and the gain start at one: no channel stays dead."""
        for layer in layers:
            weight = gains_of(layer)
            v = weight.direction
            with self.changing(v, *weight.gains):
                v.copy_(torch.randn(v.shape, generator=generator).to(v) * _FRESH_STD)
                weight.reset()

    def settle(self, name: str, layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Scale and shift ``layer`` such that its output has mean 0 and deviation 1, or 0.1; return the new output."""
        self.last = None
        if name in self.found:
            self.note(name, "shared: initialized at its first call")
            return out
        weight = gains_of(layer)
        if out.ndim < 2 or not weight.gains:
            vector = "its output is a single vector: there is no batch"
            self.found[name] = "not initialized", (vector if out.ndim < 2 else "its weight keeps no scale",)
            return out
        # The channels are the last axis of a linear layer's output and the first but for the batch of a convolution's.
        axis = out.ndim - (1 if isinstance(layer, nn.Linear) else weight.direction.ndim - 1)
        mean, std, centred = statistics_along(out, axis, name)
        if not isfinite((mean + std).sum(dtype=torch.float64)):
            raise InitializationError(
                f"the output of '{name}' is not finite on this batch",
                code="initialize-not-finite",
                hint="check the batch and the weights; the model is as it was",
            )
        notes: list[str] = []
        wanted = _SMALL_STD if name in self.small else 1.0
        factor, constant = factors_to(mean, std, wanted)
        if stuck := int(constant.sum()):
            notes.append(f"{stuck} constant channels keep their scale")
        if self.scaled & set(map(id, weight.gains)):
            factor = torch.ones_like(factor)
            notes.append("its weight is tied to one that is initialized already")
        bias = layer.bias if isinstance(layer.bias, Tensor) else None
        changed = (*weight.gains, *([] if bias is None else [bias]))
        proportional = scales_with_its_parameters(layer)
        before = [] if proportional else [tensor.detach().clone() for tensor in changed]
        with self.changing(*changed):
            _multiply(layer, weight, factor, bias, mean)
        new_mean = mean * factor if bias is None else torch.zeros_like(mean)
        if proportional:
            new = scaled(centred, factor, new_mean, axis).to(out.dtype)
        else:
            new = layer.forward(*args)
            deviation = statistics_along(new, axis, name)[1]
            if not bool(((deviation / wanted - 1).abs() < 1e-2).logical_or(constant).all()):
                with self.changing(*changed):
                    for tensor, values in zip(changed, before, strict=True):
                        tensor.copy_(values)
                self.found[name] = "not initialized", ("its output does not scale with its weight",)
                return out
            notes.append("its forward is its own: its output was computed anew")
        if name in self.small:
            notes.append(f"ends {self.small[name]}: deviation {_SMALL_STD}")
        if bias is None:
            notes.append("bias-free: scale only")
        self.scaled.update(map(id, weight.gains))
        self.found[name] = "scale" if bias is None else "scale and bias", tuple(notes)
        self.last = name, new, (new_mean, (std * factor).square()) if axis == 1 else None
        return new

    def settle_rows(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Do the same for the pre-activations of a recurrent layer's gates; return its new output."""
        self.last = None
        if name in self.found:
            self.note(name, "shared: initialized at its first call")
            return out
        self.found[name] = settle_rows(name, layer, (args, kwargs), self.changing, self.scaled)
        return layer.forward(*args, **kwargs)

    def adopt(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        """Give a norm with running statistics those of the minibatch, at its first call."""
        x = args[0]
        known = self.last if self.last is not None and self.last[1] is x else None
        if known is not None and self.found[known[0]][0] == "scale":
            method, notes = self.found[known[0]]
            self.found[known[0]] = method, (*notes[:-1], "bias-free in front of a norm: scale only")
        running = getattr(norm, "running_mean", None)
        if id(norm) in self.adopted or not isinstance(running, Tensor):
            return
        self.adopted.add(id(norm))
        if known is not None and known[2] is not None:
            mean, var = known[2]
        else:
            mean, std, _ = statistics_along(x, 1, "a norm")
            var = std.square()
        new = [(running, mean), (getattr(norm, "running_var", None), var)]
        buffers = [(buffer, values) for buffer, values in new if isinstance(buffer, Tensor)]
        with self.changing(*(buffer for buffer, _ in buffers)):
            for buffer, values in buffers:
                buffer.copy_(values)


def _multiply(layer: nn.Module, weight: Gains, factor: Tensor, bias: Tensor | None, mean: Tensor) -> None:
    """Multiply a layer's output by ``factor`` per channel, after taking ``mean`` away where there is a bias."""
    weight.multiply(FilterLayout.of(layer), factor)
    if bias is not None:
        bias.copy_((bias.to(mean) - mean) * factor)
