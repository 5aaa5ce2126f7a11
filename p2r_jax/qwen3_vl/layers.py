"""Building blocks shared by the vision tower and the language model.

Every parameter carries `axes`, its logical axis names (see `parallel.mesh`), and computes in its
own dtype: mixed precision means casting the parameters before the call. Normalisations reduce in
float32.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int
) -> nnx.Param:
    """A normally initialised parameter (variance 1 / fan_in) with logical axis names."""
    return nnx.Param(fan_in**-0.5 * jax.random.normal(rngs.params(), shape), axes=axes)


class Linear(nnx.Module):
    """y = x W (+ b); `kernel` is [inputs, *outputs] and may have several output axes."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        bias: bool,
        rngs: nnx.Rngs,
    ):
        self.num_inputs = len(inputs)
        self.kernel = param(rngs, (*inputs, *outputs), axes, math.prod(inputs))
        bias_axes = axes[len(inputs) :]
        self.bias = nnx.Param(jnp.zeros(outputs), axes=bias_axes) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = jnp.tensordot(x, self.kernel[...], axes=self.num_inputs)
        return y if self.bias is None else y + self.bias[...]


class LayerNorm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(width), axes=(None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        wide = x.astype(jnp.float32)
        wide -= wide.mean(-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (wide * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width), axes=(None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        # The reference rounds to the model dtype before it scales.
        return wide.astype(x.dtype) * self.scale[...]


def inverse_frequencies(theta: float, count: int) -> np.ndarray:
    """Rotary frequencies 1 / theta^(i / count), float32 [count], as the reference rounds them.

    `theta ** -x` differs by one unit in the last place, which is 6e-4 in the cosine at position
    10,000. The power is taken in float64, since float32 powers differ between processors.
    """
    exponents = np.arange(count, dtype=np.float32) / np.float32(count)
    powers = np.float64(theta) ** exponents.astype(np.float64)
    return np.float32(1) / powers.astype(np.float32)


def rotate_half(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-second, first], axis=-1)


def stack(make: Any, count: int, rngs: nnx.Rngs) -> Any:
    """`count` modules as one whose parameters have a leading layer axis."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.fork(split=count))
