"""Attention of many queries on one CPU: head by head, in plain matrix products.

The reference (`ops.attention`) leaves the order of loops to XLA, which on a CPU multiplies batches
of small matrices with strides between their rows. Here heads come first, and each block of queries
is one product with all keys of its head: scores of a block stay in the cache, forward and backward.
Results are the reference's to rounding. Letters as there.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from p2r_jax.ops import attention as xla

WHOLE, BLOCK = 1024, 512
"""Queries up to WHOLE are one block; more go in blocks of BLOCK."""


def attention(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    mask: Bool[Array, "B Q S"],
) -> Float[Array, "B Q H D"]:
    """As `ops.attention.attention`. The backward pass recomputes the scores of each block."""
    rows, queries, heads, width = q.shape
    kv_heads = k.shape[2]
    groups = heads // kv_heads
    block = queries if queries <= WHOLE else BLOCK
    pad = ((0, 0), (0, -queries % block))
    mask = jnp.pad(mask, (*pad, (0, 0))).reshape(rows, -1, block, mask.shape[2])
    # [B * K, blocks, g * block, D]: the query heads of a key head are rows of one matrix.
    q = jnp.pad(q, (*pad, (0, 0), (0, 0))).reshape(rows, -1, block, kv_heads, groups, width)
    q = q.transpose(0, 3, 1, 4, 2, 5).reshape(rows * kv_heads, -1, groups * block, width)
    k, v = (jnp.swapaxes(x, 1, 2).reshape(rows * kv_heads, -1, width) for x in (k, v))

    def head(part: tuple[Array, Array, Array, Array]) -> Array:
        q, k, v, number = part
        own = jax.lax.dynamic_index_in_dim(mask, number // kv_heads, keepdims=False)

        @jax.checkpoint
        def one(part: tuple[Array, Array]) -> Array:
            q, own = part
            scores = jnp.einsum("qd,kd->qk", q, k, preferred_element_type=jnp.float32)
            scores = (scores * width**-0.5).reshape(groups, block, -1)
            weights = jax.nn.softmax(jnp.where(own, scores, xla.MASKED))
            return weights.reshape(groups * block, -1).astype(v.dtype) @ v

        return one((q[0], own[0]))[None] if len(q) == 1 else jax.lax.map(one, (q, own))

    out = jax.lax.map(head, (q, k, v, jnp.arange(rows * kv_heads)))
    out = out.reshape(rows, kv_heads, -1, groups, block, width).transpose(0, 2, 4, 1, 3, 5)
    return out.reshape(rows, -1, heads, width)[:, :queries]


def causal_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    valid: Int[Array, "B S"],
) -> Float[Array, "B S H D"]:
    """As `ops.attention.causal_attention`."""
    return attention(q, k, v, xla.causal_mask(valid))


def segment_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segment: Int[Array, "B S"],
) -> Float[Array, "B S H D"]:
    """As `ops.attention.segment_attention`."""
    return attention(q, k, v, xla.segment_mask(segment))


shared_prefix_attention = functools.partial(xla.shared_prefix_attention, causal=causal_attention)
"""As `ops.attention.shared_prefix_attention`: its prompts; completions are short."""
