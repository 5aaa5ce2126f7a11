"""Building blocks shared by the vision tower and the language model.

Every parameter carries `axes`, its logical axis names (see `parallel.mesh`). A block computes in
the dtype of its input, to which weights of another dtype are rounded. Normalisations reduce in
float32.

The gradient of a weight is summed in float32, over tokens and over devices, and has the weight's
dtype. What JAX derives for a bfloat16 product is a bfloat16 product, of which every device adds its
rounded part. Only float32 weights give float32 sums throughout: where weights are bfloat16, XLA:TPU
rounds before an all-reduce, though not before the reduce-scatter of a kernel over `fsdp`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int
) -> nnx.Param:
    """A normally initialised parameter (variance 1 / fan_in) with logical axis names."""
    return nnx.Param(fan_in**-0.5 * jax.random.normal(rngs.params(), shape), axes=axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(
    x: Float[Array, "..."], kernel: Float[Array, "..."], num_inputs: int
) -> Float[Array, "..."]:
    """x W over the first `num_inputs` axes of W and as many last ones of x, in the dtype of x."""
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=num_inputs)


def _product_backward(
    num_inputs: int, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    count = x.ndim - num_inputs
    rows, outputs = tuple(range(count)), tuple(range(num_inputs, kernel.ndim))
    dx = jnp.tensordot(dy, kernel.astype(x.dtype), (tuple(range(count, dy.ndim)), outputs))
    # Still a product of bfloat16 arrays, if these are: only its result is float32.
    dkernel = jnp.tensordot(x, dy, (rows, rows), preferred_element_type=jnp.float32)
    return dx, dkernel.astype(kernel.dtype)


product.defvjp(lambda x, kernel, n: (product(x, kernel, n), (x, kernel)), _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def spread(weight: Float[Array, "..."], like: Any) -> Float[Array, "..."]:
    """A scale or bias, repeated to the shape and in the dtype of `like` (a `jax.typeof`)."""
    return jnp.broadcast_to(weight.astype(like.dtype), like.shape)


def _spread_backward(like: Any, weight: Array, dy: Array) -> tuple[Array]:
    rows = tuple(range(dy.ndim - weight.ndim))
    return (dy.sum(rows, dtype=jnp.float32).astype(weight.dtype),)


spread.defvjp(lambda weight, like: (spread(weight, like), weight), _spread_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(
    table: Float[Array, "V E"], rows: Int[Array, "..."], dtype: Any
) -> Float[Array, "... E"]:
    """Rows of a table in `dtype`."""
    return table[rows].astype(dtype)


def _look_up_backward(dtype: Any, saved: tuple[Array, Array], dy: Array) -> tuple[Array, None]:
    table, rows = saved
    gradient = jnp.zeros(table.shape, jnp.float32).at[rows].add(dy.astype(jnp.float32))
    return gradient.astype(table.dtype), None


look_up.defvjp(lambda table, rows, d: (look_up(table, rows, d), (table, rows)), _look_up_backward)


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
        y = product(x, self.kernel[...], self.num_inputs)
        return y if self.bias is None else y + spread(self.bias[...], jax.typeof(y))


class LayerNorm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(width), axes=(None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        wide = x.astype(jnp.float32)
        wide -= wide.mean(-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        scale, bias = (spread(w[...], jax.typeof(x)) for w in (self.scale, self.bias))
        return (wide * scale + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width), axes=(None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        # The reference rounds to the model dtype before it scales.
        return wide.astype(x.dtype) * spread(self.scale[...], jax.typeof(x))


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
