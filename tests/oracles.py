"""The papers' equations in NumPy, written from the papers: what the package's modules are compared with.

Plain loops over filters and kernel positions, float64, no torch. Papers:

- S&K: T. Salimans, D. Kingma, *Weight Normalization*, 2016
- Qiao: S. Qiao et al., *Weight Standardization*, 2019
- I&S: S. Ioffe, C. Szegedy, *Batch Normalization*, 2015
- Ba: J. Ba, J. Kiros, G. Hinton, *Layer Normalization*, 2016
- Wu: Y. Wu, K. He, *Group Normalization*, 2018

``x`` is ``(N, C)`` or ``(N, C, *space)``; what belongs to a channel is ``(C,)``; weights lie as torch's do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


# Layers


@dataclass(frozen=True)
class Layer:
    """A linear layer, convolution or transposed convolution.

    Args:
        weight: ``(out, in)``, ``(out, in/groups, *kernel)`` or, transposed, ``(in, out/groups, *kernel)``.
        bias: ``(out,)``.
        transposed: Whether it is a transposed convolution.
        groups: Input and output channels fall into so many groups, connected one to one.
        stride, padding, dilation, output_padding: One value per axis of space.
    """

    weight: Array
    bias: Array | None = None
    transposed: bool = False
    groups: int = 1
    stride: Sequence[int] = ()
    padding: Sequence[int] = ()
    dilation: Sequence[int] = ()
    output_padding: Sequence[int] = ()

    @property
    def out_channels(self) -> int:
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    def filter(self, c: int) -> tuple[Any, ...]:
        """Return where in the weight the values lie that reach output channel ``c``."""
        if not self.transposed:
            return (c,)
        n_in, n_out = self.weight.shape[0] // self.groups, self.weight.shape[1]
        group = c // n_out
        return slice(group * n_in, (group + 1) * n_in), c % n_out

    def per_filter(self, function: Callable[[Array, int], Array]) -> Array:
        """Return the weight with ``function(filter, c)`` in each filter's place."""
        weight = np.empty_like(self.weight)
        for c in range(self.out_channels):
            weight[self.filter(c)] = function(self.weight[self.filter(c)], c)
        return weight

    def __call__(self, x: Array) -> Array:
        """Return ``t = w·x + b`` at each position (S&K, eq. 1, before φ)."""
        t = _transposed_convolution(self, x) if self.transposed else _convolution(self, x)
        return t if self.bias is None else t + per_channel(self.bias, t)


def _convolution(layer: Layer, x: Array) -> Array:
    n_out, n_in, *kernel = layer.weight.shape
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in layer.padding)])
    steps = list(zip(x.shape[2:], kernel, layer.stride, layer.dilation, strict=True))
    size = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in steps]
    t = np.zeros((len(x), n_out, *size))
    for at in np.ndindex(*kernel):
        window = tuple(
            slice(a * d, a * d + s * (m - 1) + 1, s) for a, m, (_, _, s, d) in zip(at, size, steps, strict=True)
        )
        for c in range(n_out):
            first = c // (n_out // layer.groups) * n_in
            for i in range(n_in):
                t[:, c] += layer.weight[(c, i, *at)] * x[(slice(None), first + i, *window)]
    return t


def _transposed_convolution(layer: Layer, x: Array) -> Array:
    n_in, n_out, *kernel = layer.weight.shape
    steps = list(zip(x.shape[2:], kernel, layer.stride, layer.dilation, layer.output_padding, strict=True))
    size = [(n - 1) * s + d * (k - 1) + 1 + o for n, k, s, d, o in steps]
    t = np.zeros((len(x), n_out * layer.groups, *size))
    for at in np.ndindex(*kernel):
        window = tuple(slice(a * d, a * d + s * (n - 1) + 1, s) for a, (n, _, s, d, _) in zip(at, steps, strict=True))
        for i in range(n_in):
            first = i // (n_in // layer.groups) * n_out
            for o in range(n_out):
                t[(slice(None), first + o, *window)] += layer.weight[(i, o, *at)] * x[:, i]
    inside = tuple(slice(p, n - p) for p, n in zip(layer.padding, size, strict=True))
    return t[(slice(None), slice(None), *inside)]


def per_channel(values: Array, x: Array) -> Array:
    """Return ``values`` shaped to broadcast along axis 1 of ``x``."""
    return np.reshape(values, (1, -1, *[1] * (x.ndim - 2)))


# Weights


def weight_norm(layer: Layer, g: Array) -> Array:
    """``w = g/‖v‖ · v`` per filter, with v the layer's weight (S&K, eq. 2)."""
    return layer.per_filter(lambda v, c: g[c] / np.sqrt(np.sum(v**2)) * v)


def weight_norm_gradients(layer: Layer, g: Array, grad_w: Array) -> tuple[Array, Array]:
    """``∇g = ∇w·v/‖v‖`` and ``∇v = g/‖v‖ ∇w − g∇g/‖v‖² v`` per filter (S&K, eq. 3)."""
    grad_g, grad_v = np.empty_like(g), np.empty_like(layer.weight)
    for c in range(layer.out_channels):
        v, dw = layer.weight[layer.filter(c)], grad_w[layer.filter(c)]
        norm = np.sqrt(np.sum(v**2))
        grad_g[c] = np.sum(dw * v) / norm
        grad_v[layer.filter(c)] = g[c] / norm * dw - g[c] * grad_g[c] / norm**2 * v
    return grad_g, grad_v


def weight_standardization(
    layer: Layer, gain: Array | None = None, offset: Array | None = None, eps: float = 1e-5
) -> Array:
    """``Ŵ = (W − μ)/σ`` per filter, ``μ = 1/I ΣW``, ``σ = sqrt(1/I Σ(W − μ)² + ε)`` (Qiao, eq. 4-5).

    ε stands under the root, as in the other norms. ``gain`` and ``offset``, which the paper has not, make it
    ``(gain·Ŵ + offset)/sqrt(I)`` (for the gain: Brock et al. 2021, eq. 2).
    """

    def standardized(W: Array, c: int) -> Array:
        mean = np.sum(W) / W.size
        std = np.sqrt(np.sum((W - mean) ** 2) / W.size + eps)
        if gain is None:
            return (W - mean) / std
        return (gain[c] * (W - mean) / std + (0.0 if offset is None else offset[c])) / np.sqrt(W.size)

    return layer.per_filter(standardized)


# Activations


@dataclass(frozen=True)
class Running:
    """A norm's running statistics; ``momentum=None`` is the plain average of all batches so far."""

    mean: Array
    var: Array
    batches: int = 0
    momentum: float | None = 0.1

    def after(self, mean: Array, var: Array | None = None) -> Running:
        """Return ``(1 − m)·running + m·new``, with ``m = 1/batches`` where momentum is None."""
        batches = self.batches + 1
        m = 1.0 / batches if self.momentum is None else self.momentum
        var = self.var if var is None else (1 - m) * self.var + m * var
        return replace(self, mean=(1 - m) * self.mean + m * mean, var=var, batches=batches)


def batch_moments(x: Array) -> tuple[Array, Array]:
    """``μ[t]`` and ``σ²[t]`` per channel over batch and space (I&S, algorithm 1; S&K, eq. 5)."""
    channels = [x[:, c] for c in range(x.shape[1])]
    means = [np.sum(t) / t.size for t in channels]
    return np.array(means), np.array(
        [np.sum((t - mean) ** 2) / t.size for t, mean in zip(channels, means, strict=True)]
    )


def batch_norm_train(x: Array, gamma: Array, beta: Array, running: Running, eps: float = 1e-5) -> tuple[Array, Running]:
    """``y = γ (x − μ_B)/sqrt(σ_B² + ε) + β`` (I&S, algorithm 1).

    The running variance follows the unbiased estimate ``m/(m − 1) σ_B²`` (I&S, algorithm 2, step 10).
    """
    mean, var = batch_moments(x)
    m = x.size / x.shape[1]
    y = per_channel(gamma, x) * (x - per_channel(mean, x)) / np.sqrt(per_channel(var, x) + eps)
    return y + per_channel(beta, x), running.after(mean, m / (m - 1) * var)


def batch_norm_eval(x: Array, gamma: Array, beta: Array, running: Running, eps: float = 1e-5) -> Array:
    """``y = γ/sqrt(Var + ε) · x + (β − γ E/sqrt(Var + ε))`` (I&S, algorithm 2, step 11)."""
    scale = gamma / np.sqrt(running.var + eps)
    return per_channel(scale, x) * x + per_channel(beta - scale * running.mean, x)


def mean_only_batch_norm_train(x: Array, bias: Array, running: Running) -> tuple[Array, Running]:
    """``t̃ = t − μ[t] + b`` with the minibatch's mean (S&K, *Mean-only Batch Normalization*)."""
    mean, _ = batch_moments(x)
    return x - per_channel(mean, x) + per_channel(bias, x), running.after(mean)


def mean_only_batch_norm_eval(x: Array, bias: Array, running: Running) -> Array:
    """``t̃ = t − μ[t] + b`` with the running mean in the minibatch's place (S&K, the same section)."""
    return x - per_channel(running.mean, x) + per_channel(bias, x)


def mean_only_batch_norm_gradient(grad_y: Array) -> Array:
    """``∇_t = ∇_t̃ − μ[∇_t̃]``: the gradient is centred (S&K, *Mean-only Batch Normalization*)."""
    mean, _ = batch_moments(grad_y)
    return grad_y - per_channel(mean, grad_y)


def group_norm(x: Array, num_groups: int, gamma: Array, beta: Array, eps: float = 1e-5) -> Array:
    """``y_i = γ_c (x_i − μ_i)/σ_i + β_c``, ``σ_i = sqrt(1/m Σ_{S_i}(x − μ_i)² + ε)`` (Wu, eq. 1, 2, 6 and 7).

    ``S_i``: the same sample and ``⌊c/(C/G)⌋`` the same.
    """
    normal = np.empty_like(x)
    size = x.shape[1] // num_groups
    for n in range(len(x)):
        for group in range(num_groups):
            normal[n, group * size : (group + 1) * size] = _standardized(x[n, group * size : (group + 1) * size], eps)
    return per_channel(gamma, x) * normal + per_channel(beta, x)


def layer_norm(x: Array, gamma: Array, beta: Array, eps: float = 1e-5) -> Array:
    """``h = g/σ (a − μ) + b`` per sample, ``μ = 1/H Σa``, ``σ = sqrt(1/H Σ(a − μ)² + ε)`` (Ba, eq. 3-4).

    H: all units of the layer, on feature maps all channels at all positions. The affine is per channel.
    """
    return per_channel(gamma, x) * np.stack([_standardized(a, eps) for a in x]) + per_channel(beta, x)


def layer_norm_channels(x: Array, gamma: Array, beta: Array, eps: float = 1e-5) -> Array:
    """The same with the channels of one position as the units of the layer (Ba, eq. 3-4)."""
    normal = np.empty_like(x)
    for n in range(len(x)):
        for position in np.ndindex(*x.shape[2:]):
            at = (n, slice(None), *position)
            normal[at] = _standardized(x[at], eps)
    return per_channel(gamma, x) * normal + per_channel(beta, x)


def _standardized(a: Array, eps: float) -> Array:
    mean = np.sum(a) / a.size
    return (a - mean) / np.sqrt(np.sum((a - mean) ** 2) / a.size + eps)


# Initialization


def data_dependent_initialization(
    layers: Sequence[Layer], x: Array, phis: Sequence[Callable[[Array], Array]]
) -> tuple[list[tuple[Array, Array]], list[Array]]:
    """Initialize a stack ``x ← φ(w·x + b)`` from one minibatch; the layers' weights are v, each has its φ.

    ``t = v·x/‖v‖``, ``y = φ((t − μ[t])/σ[t])`` (S&K, eq. 5), so ``g = 1/σ[t]``, ``b = −μ[t]/σ[t]`` (eq. 6).

    Returns:
        (g, b) of each layer, and each layer's pre-activation ``(t − μ[t])/σ[t]``.
    """
    parameters, activations = [], []
    for layer, phi in zip(layers, phis, strict=True):
        direction = weight_norm(layer, np.ones(layer.out_channels))
        t = replace(layer, weight=direction, bias=None)(x)
        mean, var = batch_moments(t)
        std = np.sqrt(var)
        parameters.append((1 / std, -mean / std))
        activations.append((t - per_channel(mean, t)) / per_channel(std, t))
        x = phi(activations[-1])
    return parameters, activations
